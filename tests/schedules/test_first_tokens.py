"""The first token of each request against NumPy, in every form that a value has."""

import numpy as np
import oracles
import pytest

from whet.schedules.first_tokens import FirstTokensSpec, first_tokens

LENGTHS = [1, 2, 15, 16, 17, 31, 3, 64, 100, 5, 1, 1, 8, 8, 8, 9, 40, 7]


@pytest.mark.parametrize("isa", oracles.NAMES)
@pytest.mark.parametrize("quantize", ["none", "bf16", "static"])
@pytest.mark.parametrize("channels", [4, 20, 384])
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [33]])
def test_first_tokens(isa, quantize, channels, lengths):
    """No value is computed, so any bits must come through."""
    rng = np.random.default_rng(channels)
    segments = oracles.segments_of(lengths, gaps=[0, 4][: len(lengths)])
    in_word, dtype = {"none": (1, "float32"), "bf16": (2, "uint16"), "static": (4, "uint8")}[quantize]
    words = rng.integers(1, 2**30, (-(-sum(lengths) // 16), channels // in_word, 16)).astype("uint32")
    lanes = () if in_word == 1 else (in_word,)
    kernel = oracles.build(first_tokens, FirstTokensSpec(channels, quantize), isa)
    out_shape = (len(segments), channels // in_word, 16, *lanes)
    x = words.view(dtype).reshape(*words.shape, *lanes)
    (out,) = oracles.run(kernel, [x, segments], [(out_shape, dtype)])
    expected = np.zeros((len(segments), channels // in_word, 16), "uint32")
    for i, tokens in oracles.requests_of(segments):
        expected[i // 16, :, i % 16] = words[tokens.start // 16, :, tokens.start % 16]
    np.testing.assert_array_equal(out.view("uint32").reshape(expected.shape), expected)


def test_channels_must_fill_quads():
    with pytest.raises(ValueError, match="channels is 6"):
        FirstTokensSpec(6, "static")
    with pytest.raises(ValueError, match="quantize is 'per_token'"):
        FirstTokensSpec(8, "per_token")
