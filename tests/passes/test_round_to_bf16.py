import numpy as np
from execute import program
from graphs import build, encoder_layer, requests
from tvm import relax

from whet.passes import dialect
from whet.passes.fuse_qkv import fuse_qkv
from whet.passes.graph import Graph, attributes, is_call
from whet.passes.interpret import interpret
from whet.passes.pipeline import Options, run_pipeline
from whet.passes.round_to_bf16 import round_to_bf16, share_of_zeros
from whet.progress import Silent
from whet.runtime.cpu import cpu_flags, request_amx
from whet.schedules.isa import BF16_ISAS


def layer(b):
    return encoder_layer(b, 64, 2, 128)


def test_small_heads_and_layers_per_request_stay_float():
    def write(b):
        h = b.dense(b.embed(64), 64, "wide")
        b.dense(h, 3, "tags")
        pooled = b.emit(dialect.pool(h, b.segments, mode="cls"), "pooled")
        return b.dense(pooled, 64, "classifier")

    graph = Graph(round_to_bf16(build(write)))
    found = {b.var.name: attributes(b.value) for b in graph.bindings if is_call(b.value, dialect.DENSE)}
    assert {name for name, a in found.items() if a.get("bf16")} == {"wide"}


def test_zeros_are_counted_over_all_layers():
    def write(b):
        b.const = lambda *shape: relax.const(np.arange(np.prod(shape), dtype=np.float32).reshape(shape) % 2)
        return b.dense(b.embed(64), 32, "half")

    assert share_of_zeros(build(write)) == 0.5


def test_compiled_it_computes_what_the_interpreter_does():
    """Up to values between two of bfloat16, which another order of summation rounds to the other one."""
    options = Options(tuple(BF16_ISAS.values()), max_length=64, quantisation=None, bf16=True)
    batch = requests(7, 1, 33, 16)
    want = interpret(round_to_bf16(fuse_qkv(build(layer))), batch)
    for variant, isa in zip(run_pipeline(build(layer), options, [], [], Silent()), options.isas, strict=True):
        assert variant.choices == []
        script = str(variant.lowered.module.script(show_meta=False))
        assert script.count("def dense_bf16") == 4
        assert "def quantize" not in script
        if not cpu_flags().issuperset(isa.cpu_flags) or (isa.has_amx and request_amx()):
            continue
        answer = program(variant.lowered, isa)
        got = answer(batch, False)
        assert np.linalg.norm(got - want) < 1e-3 * np.linalg.norm(want)
        np.testing.assert_array_equal(got, np.concatenate([answer([r], False) for r in batch]))
