import numpy as np
from execute import program
from graphs import build, encoder_layer, requests

from whet.passes import dialect
from whet.passes.assemble import Workspace, assemble
from whet.passes.pipeline import Options, run_pipeline
from whet.passes.quantise import QuantisationConfig
from whet.progress import Silent
from whet.schedules.isa import isa

ISA = isa("avx2")


def lowered(write):
    batch = requests(20, 30)
    options = Options((ISA,), max_length=64, quantisation=QuantisationConfig("static"))
    return run_pipeline(build(write), options, batch, [b * 0 for b in batch], Silent())[0].lowered


def test_values_that_live_at_different_times_share_memory():
    def chain(b):
        h = b.embed(64)
        for i in range(6):
            h = b.dense(h, 64, f"layer{i}")
        return h

    module = lowered(chain)
    assembled = assemble(module.module, [64 * i for i in range(len(module.weights))])
    # The embedding's tiles, which nobody reads, and its quads; all later values take turns in those two places.
    tiles, quads = 64 * 16 * 4, 64 * 16
    assert assembled.workspace == Workspace(per_tile=tiles + quads, per_group=0)


def test_what_is_per_request_lies_where_tokens_lay():
    def classifier(b):
        pooled = b.emit(dialect.pool(encoder_layer(b, 64, 2, 128), b.segments, mode="cls"), "pooled")
        return b.dense(b.dense(pooled, 64, "pooler", activation="tanh"), 5, "logits")

    module = lowered(classifier)
    # Only the first tokens of the residual have a place of their own, beside it.
    assert assemble(module.module, [0] * len(module.weights)).workspace.per_group == 64 * 16 * 4
    run, batch = program(module, ISA), requests(*[1] * 17, 33, 5)
    np.testing.assert_array_equal(run(batch, True), np.concatenate([run([r], True) for r in batch]))


def test_a_residual_stays_where_it_is_until_it_is_read():
    run = program(lowered(lambda b: encoder_layer(b, 64, 2, 128)), ISA)
    batch = requests(33, 5)
    first = run(batch, False)
    assert (run(batch, False) == first).all()  # from memory full of the values of the last call, or of 0xA5


def test_a_residual_is_overwritten_by_the_sum_and_the_sum_by_its_norm():
    """So one stretch of float32 tiles does for all layers."""
    module = lowered(lambda b: encoder_layer(b, 64, 2, 128))
    assembled = assemble(module.module, [0] * len(module.weights))
    tiles, quads = 64 * 16 * 4, 64 * 16
    # At most at once: the residual, the layer's input, its Q, K and V.
    assert assembled.workspace.per_tile == tiles + 5 * quads


def test_a_kernel_is_there_once():
    def twice(b):
        return b.dense(b.dense(b.dense(b.embed(64), 64, "one"), 64, "two"), 64, "three")

    module = lowered(twice)
    assembled = assemble(module.module, [0] * len(module.weights))
    names = {v.name_hint.removesuffix("_serial") for v in assembled.module.get_global_vars()}
    assert names == {"dense_i8_64x64_quads", "dense_i8_64x64_tiles", "embed", "main"}


def test_parallel_and_serial_kernels_agree(monkeypatch):
    module = lowered(lambda b: encoder_layer(b, 64, 2, 128))
    batch = requests(33, 5, 50)
    serial = program(module, ISA)(batch, False)  # so small a model never pays
    monkeypatch.setattr("whet.passes.assemble.REGION_NANOSECONDS", 0)
    names = [v.name_hint for v in assemble(module.module, [0] * len(module.weights)).module.get_global_vars()]
    assert not any(name.endswith("_serial") for name in names)
    assert (program(module, ISA)(batch, False) == serial).all()
