"""Texts to tokens."""

import numpy as np
import pytest
import tiny_module

from whet.runtime.text import Tokenizer, check_texts

TEXT = "the cat runs fast in the park , a dog plays the guitar on stage"


def tokenizer(max_length, threads=1):
    return Tokenizer(tiny_module.tokenizer_json(), max_length, threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_encode(threads):
    texts = ["", "the cat", ("the cat", "a dog"), TEXT, (TEXT, "a dog")]
    encodings = tokenizer(12, threads).encode(texts)
    assert [e.ids for e in encodings[:3]] == [[2, 3], [2, 8, 10, 3], [2, 8, 10, 3, 9, 11, 3]]
    assert [len(e) for e in encodings[3:]] == [12, 12]
    assert encodings[4].ids[-4:] == [3, 9, 11, 3]  # the longer text was cut
    assert encodings[2].type_ids == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("max_length", "overlap"), [(100, 3), (8, 2), (8, 0), (8, 50), (3, 1)])
def test_windows_cover_the_text(max_length, overlap):
    whole, windows = tokenizer(max_length).windows(TEXT, overlap)
    assert whole.tokens == TEXT.split()
    for window in windows:
        tokens = window.encoding.tokens
        assert len(tokens) <= max_length
        assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
        assert tokens[1:-1] == whole.tokens[window.start : window.start + len(tokens) - 2]
    seen = np.concatenate([np.arange(w.start, w.start + len(w.encoding) - 2) for w in windows])
    assert set(seen) == set(range(len(whole)))


def test_pair_windows():
    whole, windows = tokenizer(50).pair_windows("the cat", TEXT, 10, 2)
    assert len(windows) == 5
    for window in windows:
        tokens = window.encoding.tokens
        assert tokens[:4] == ["[CLS]", "the", "cat", "[SEP]"]
        assert tokens[4:-1] == whole.tokens[window.start : window.start + len(tokens) - 5]
    with pytest.raises(ValueError, match="question has 6 tokens, which leaves no room in 9"):
        tokenizer(50).pair_windows("the cat runs in the park", TEXT, 9, 2)


def test_settings_in_the_file_do_not_matter():
    from tokenizers import Tokenizer as Backend  # noqa: PLC0415

    backend = Backend.from_str(tiny_module.tokenizer_json())
    backend.enable_padding(length=20)
    backend.enable_truncation(3)
    ours = Tokenizer(backend.to_str(), 10, 1)
    assert len(ours.encode(["the cat"])[0]) == 4
    assert len(ours.windows(TEXT, 2)[0]) == len(TEXT.split())


def test_check_texts():
    assert check_texts("one", pairs=False) == ["one"]
    assert check_texts(("a", "b"), pairs=False) == ["a", "b"]
    assert check_texts((t for t in "ab"), pairs=False) == ["a", "b"]
    assert check_texts([("a", "b"), ["c", "d"], "e"], pairs=True) == [("a", "b"), ("c", "d"), "e"]
    assert check_texts(np.array(["a", "b"]), pairs=False) == ["a", "b"]
    assert check_texts([], pairs=True) == []
    for wrong, name in ((3, "int"), (None, "NoneType"), ([b"x"], "bytes"), ([("a", "b")], "tuple")):
        with pytest.raises(ValueError, match=rf"text 0 is .*, a {name}; expected a str"):
            check_texts(wrong, pairs=False)
    with pytest.raises(ValueError, match="text 1 is None"):
        check_texts(["a", None], pairs=True)
    with pytest.raises(ValueError, match="text 0 is 1, a int"):
        check_texts([("a", 1)], pairs=True)
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        check_texts(["a\ud800"], pairs=False)
