"""What workers do, in this process, and a worker that dies."""

import numpy as np
import pytest
import tvm
from laboratory import ISAS, Instance
from tvm.s_tir import meta_schedule as ms

from whet.runtime.cpu import cpu_flags
from whet.schedules.attention import AttentionSpec
from whet.schedules.dense import DenseSpec
from whet.tune.arguments import make_arguments
from whet.tune.laboratory import Laboratory, WorkersLostError, check
from whet.tune.measure import Experiment, allocate_nothing, build, evaluate, read_label, unpack
from whet.tune.metaschedule import workload
from whet.tune.space import space

AVX2 = ISAS["avx2"]
pytestmark = pytest.mark.skipif(not cpu_flags().issuperset(AVX2.cpu_flags), reason="this CPU lacks AVX2")

KERNELS = [
    DenseSpec(12, 8, "i8", per_token=True, output="heads"),
    DenseSpec(16, 16, "i8_sparse", activation="gelu", output="quads"),
    DenseSpec(5, 6, "f32", residual=True),
    AttentionSpec(1, 16, "i8", 32),
    AttentionSpec(1, 16, "f32", 32),
]


@pytest.mark.parametrize("spec", KERNELS, ids=str)
def test_variants_are_timed_for_each_token_count(spec, tmp_path):
    instance = Instance.of(spec, AVX2, 0.5)
    other = instance.knobs(next(iter(space(instance))))
    experiment = Experiment(instance, (instance.default_knobs(), other), 2)
    stand_in = workload(instance)["main"].with_attr("whet.experiment", experiment.to_json())
    build(tvm.IRModule({"main": stand_in}), tvm.target.Target(AVX2.target)).export_library(str(tmp_path / "m.so"))
    module = tvm.runtime.load_module(str(tmp_path / "m.so"))
    assert read_label(module) == experiment
    seconds = unpack(evaluate(module, None, None, None), experiment)
    assert seconds.shape == (len(instance.tokens), 2, 2)
    assert (seconds > 0).all() and (seconds < 0.1).all()


def test_workers_with_other_generators_refuse(monkeypatch):
    instance = Instance.of(KERNELS[0], AVX2)
    text = Experiment(instance, (instance.default_knobs(),), 2).to_json()
    assert Experiment.from_json(text).instance == instance
    monkeypatch.setattr("whet.tune.measure.kernel_version", lambda _: "other")
    with pytest.raises(ValueError, match="generators") as refused:
        Experiment.from_json(text)
    with pytest.raises(WorkersLostError, match="generators"):  # which is no failure of the candidate
        check(str(refused.value))


def test_weights_have_the_density_of_the_layer():
    instance = Instance.of(DenseSpec(256, 256, "i8_sparse"), ISAS["avx_vnni"], 0.2)  # which packs blocks as they are
    *_, blocks = make_arguments(instance, instance.default_knobs(), 16).weights
    assert np.any(blocks, axis=(1, 2)).sum() / (64 * 64) == pytest.approx(0.2, abs=0.02)


def test_arrays_start_on_cache_lines():
    arguments = make_arguments(
        Instance.of(DenseSpec(7, 8, "i8"), AVX2), Instance.of(KERNELS[0], AVX2).default_knobs(), 20
    )
    for array in (*arguments.before, *arguments.weights, *arguments.after):
        assert array.ctypes.data % 64 == 0
    assert arguments.before[0].shape == (2, 2, 16, 4)


def test_a_worker_that_dies_fails_its_trial_only(tmp_path):
    instance = Instance.of(DenseSpec(8, 8, "i8"), AVX2)
    experiment = Experiment(instance, (instance.default_knobs(),), 1)
    stand_in = workload(instance)["main"].with_attr("whet.experiment", experiment.to_json())
    kernel = build(tvm.IRModule({"main": stand_in}), tvm.target.Target(AVX2.target))
    mark = tmp_path / "died"

    def die_once(*_):
        import os  # noqa: PLC0415 -- runs in a worker
        import signal  # noqa: PLC0415

        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [1e-6] * 4

    runner = ms.runner.LocalRunner(timeout_sec=60, f_alloc_argument=allocate_nothing, f_run_evaluator=die_once)
    laboratory = Laboratory(ms.builder.LocalBuilder(max_workers=1), runner)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        kernel.export_library(str(tmp_path / name / "m.so"))
    assert laboratory.start(experiment, str(tmp_path / "first" / "m.so")).result()[0] is None
    seconds, error = laboratory.start(experiment, str(tmp_path / "second" / "m.so")).result()
    assert seconds.shape == (4, 1, 1) and not error
    assert not (tmp_path / "second").exists()
