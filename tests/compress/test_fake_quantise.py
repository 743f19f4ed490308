"""Fake quantisation: it rounds as the compiler does, lets gradients through, and training with it helps int8."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compress/ needs the extra compress")

from tiny_encoders import load, make_sentence_encoder, sentences  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from whet.compress.fake_quantise import fake_quantised, round_affine, round_symmetric  # noqa: E402
from whet.compress.recipe import Data, Pruning, Recipe, Training  # noqa: E402
from whet.compress.run import run_recipe  # noqa: E402
from whet.frontend.huggingface import from_folder  # noqa: E402
from whet.passes.error_budget import noise  # noqa: E402
from whet.passes.fuse_activations import fuse_activations  # noqa: E402
from whet.passes.fuse_qkv import fuse_qkv  # noqa: E402
from whet.passes.fuse_residuals import fuse_residuals  # noqa: E402
from whet.passes.interpret import _dense, interpret  # noqa: E402
from whet.passes.quantise import QuantisationConfig, quantise, quantise_weight  # noqa: E402
from whet.passes.smooth_outliers import smooth_outliers  # noqa: E402
from whet.progress import Silent  # noqa: E402


def test_weights_round_as_the_compiler_rounds_them():
    weight = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    weight[3] = 0
    weight[:, 4:8] = 0
    values, scale = quantise_weight(weight)
    got = round_symmetric(torch.from_numpy(weight), dim=1).numpy()
    np.testing.assert_allclose(got, values * scale[:, None], atol=1e-6)
    assert (got[weight == 0] == 0).all()


@pytest.mark.parametrize("shift", [-3, 0, 3])
def test_tokens_round_as_the_interpreter_rounds_them(shift):
    x = (np.random.default_rng(1).normal(size=(5, 16)) + shift).astype(np.float32)
    eye = np.eye(16, dtype=np.float32)
    want = _dense(x, eye, np.zeros(16, np.float32), activation="none", per_token=True)
    np.testing.assert_allclose(round_affine(torch.from_numpy(x), per_token=True).numpy(), want, atol=1e-5)


def test_gradients_pass_and_the_model_is_left_as_it_was(tmp_path):
    encoder = load(make_sentence_encoder(tmp_path / "m"))
    batch = {"input_ids": torch.tensor([[2, 9, 14, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    plain = encoder.model(**batch).last_hidden_state
    with fake_quantised(encoder):
        rounded = encoder.model(**batch).last_hidden_state
    rounded.square().sum().backward()
    assert 1e-4 < float(((rounded - plain).norm() / plain.norm()).detach()) < 0.1
    assert all(float(dense.weight.grad.abs().sum()) > 0 for dense in encoder.dense.values())
    torch.testing.assert_close(encoder.model(**batch).last_hidden_state, plain, rtol=0, atol=0)


def test_int8_comes_closer_to_the_teacher(tmp_path):
    """Training makes up for the rounding; as much training without rounding does not."""
    dense = make_sentence_encoder(tmp_path / "m")
    texts = [text for text, _ in sentences(400)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    training = Training(steps=200, batch=32, learning_rate=5e-4, quantise=True)
    recipe = Recipe(
        model=str(dense),
        task="embedding",
        teacher=str(dense),
        data=Data(train=(str(tmp_path / "texts.txt"),)),
        pruning=Pruning(sparsity=0.0),
        training=training,
    )
    plain = replace(recipe, training=replace(training, quantise=False))
    for name, each in (("aware", recipe), ("plain", plain)):
        run_recipe(each, tmp_path / name, Silent(), lambda line: None)
    model = from_folder(dense)
    ids = [np.asarray(e.ids) for e in Tokenizer.from_str(model.tokenizer_json).encode_batch(texts[:100])]
    wanted = interpret(model.module, ids)
    config = QuantisationConfig()

    def error(folder):
        module = fuse_residuals(fuse_activations(fuse_qkv(from_folder(folder).module)))
        return noise(interpret(quantise(smooth_outliers(module, config, ids), config, ids), ids), wanted)

    aware, unaware = error(tmp_path / "aware"), error(tmp_path / "plain")
    assert aware < min(unaware, error(dense))
