import numpy as np
import tvm
import tvm_ffi
from execute import aligned
from tvm import relax

from whet.passes.lift_constants import lift_constants


def test_large_constants_become_one_tuple():
    weight = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((tvm.tirx.Var("n", "int64"), 64), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, relax.const(weight)))
            output = builder.emit_output(relax.op.add(y, relax.const(np.float32(1))))
        builder.emit_func_output(output)
    module, weights = lift_constants(builder.get())
    assert [a.shape for _, a in weights] == [(64, 32)]
    machine = relax.VirtualMachine(relax.build(module, tvm.target.Target("llvm")), tvm.cpu())
    value = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    got = machine["main"](aligned(value), tvm_ffi.convert([aligned(a) for _, a in weights])).numpy()
    np.testing.assert_allclose(got, value @ weight + 1, atol=1e-5)
