"""From a model to answers, through the file: every family and head against what torch computed."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import whet
from whet.describe import describe
from whet.explain import explain_module
from whet.host import host_isa
from whet.runtime.artifact import open_artifact
from whet.runtime.cpu import cpu_flags, why_not
from whet.schedules.isa import BF16_ISAS, ISAS

REFERENCES = Path(__file__).parent / "references"
SEEDED = sorted(p.parent.name for p in REFERENCES.glob("*/expected.npz"))
INTEGER = ["bert-embedding", "bert-token", "distilbert-hidden-states", "distilbert-sequence"]
SAY_PHASES = """
import sys, whet
from whet.progress import Silent

class Say(Silent):
    def phase(self, name, total=None):
        print(name, flush=True)
        return super().phase(name, total)

whet.compile(sys.argv[1], sys.argv[2], progress=Say())
"""


GROW = """
import sys
from pathlib import Path
import numpy as np
from whet.runtime import load

session = load(sys.argv[1], threads=1)
random = np.random.default_rng(0)

def call(batch, sequence):
    session.run(random.integers(0, session.metadata.vocab_size, (batch, sequence)))

def rounds(count):
    for _ in range(count):
        call(random.integers(1, 41), random.integers(1, 25))
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

call(40, 24)
before = rounds(100)
print(rounds(300) - before)
"""


def expected(name):
    return np.load(REFERENCES / name / "expected.npz")


def skip_code_generation(monkeypatch):
    monkeypatch.setattr("whet.compiler.generate_code", lambda *_: None)
    monkeypatch.setattr("whet.compiler.write_module", lambda *args: args[-1].touch())


def run(session, data):
    return session.run_packed(data["ids"], data["lengths"], token_types=data["token_types"])


needs_bf16 = pytest.mark.skipif(
    not cpu_flags().issuperset(BF16_ISAS["avx512_bf16"].cpu_flags), reason="this CPU has no avx512_bf16"
)


@pytest.mark.parametrize("name", SEEDED)
def test_fp32_equals_torch(compiled, name):
    session, report = compiled(REFERENCES / name, "fp32")
    data = expected(name)
    np.testing.assert_allclose(run(session, data), data["output"], atol=1e-4)
    assert report.recognised and report.layers == () and session.metadata.precision == "fp32"


@pytest.mark.parametrize("name", INTEGER)
def test_int8_is_close_to_torch(compiled, name):
    session, report = compiled(REFERENCES / name, "int8")
    data = expected(name)
    got, want = run(session, data), data["output"]
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 0.1
    assert len(report.layers) == 8


def test_bf16_says_that_it_multiplies_zeros(tmp_path, monkeypatch):
    skip_code_generation(monkeypatch)
    options = {"isa": "avx512_bf16", "sparsity": 0.8}
    report = whet.compile(REFERENCES / "bert-embedding", tmp_path / "m.so", "bf16", **options)
    assert any("of the weights are 0, which bf16 multiplies too" in note for note in report.notes)
    assert not whet.compile(REFERENCES / "bert-embedding", tmp_path / "m.so", "bf16", isa="avx512_bf16").notes


@needs_bf16
@pytest.mark.parametrize("name", INTEGER)
def test_bf16_is_closer_to_torch(compiled, name):
    session, report = compiled(REFERENCES / name, "bf16")
    data = expected(name)
    got, want = run(session, data), data["output"]
    assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)
    assert report.precision == session.metadata.precision == "bf16"
    assert report.isa == session.metadata.isa in BF16_ISAS
    assert "uint16" in {weight.dtype for weight in session.metadata.weights}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16), "int8"])
def test_an_answer_never_depends_on_its_neighbours(compiled, precision):
    session, _ = compiled(REFERENCES / "bert-token", precision)
    data = expected("bert-token")
    together = run(session, data)
    start = 0
    for length in data["lengths"]:
        rows = slice(start, start + length)
        alone = session.run_packed(data["ids"][rows], [length], token_types=data["token_types"][rows])
        np.testing.assert_array_equal(together[rows], alone)
        start += length


def test_block_sparse_layers_are_found_and_right(compiled):
    session, report = compiled(REFERENCES / "bert-token", "int8", sparsity=0.75, isa="avx2")
    assert all(layer.zeros >= 0.74 for layer in report.layers)
    out = run(session, expected("bert-token"))
    assert np.isfinite(out).all() and out.std() > 0


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    path = tmp_path_factory.mktemp("variants") / "m.so"
    return path, whet.compile(REFERENCES / "bert-embedding", path, isa=["avx2", "avx512_vnni"], sparsity=0.75)


@pytest.mark.parametrize(
    ("source", "precision"),
    [("bert-embedding", "int8"), ("bert-hidden-states", "fp32"), ("onnx/mpnet-ts17.onnx", "fp32")],
)
def test_memory_does_not_grow_over_shapes(compiled, source, precision):
    session, _ = compiled(REFERENCES / source, precision)
    command = [sys.executable, "-c", GROW, session.path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 500, f"grew by {done.stdout} KB in 300 calls of different shapes"


def test_a_call_lets_other_threads_run(compiled):
    """A plain graph here, whose calls are long; in short ones the threads of Python would take turns anyhow."""
    session, _ = compiled(REFERENCES / "onnx" / "mpnet-ts17.onnx", "fp32")
    ids = np.ones((16, 256), int)
    session.run(ids)
    with ThreadPoolExecutor(1) as pool:
        start = time.perf_counter()
        call = pool.submit(session.run, ids)
        turns = 0
        while not call.done():
            time.sleep(0.001)
            turns += 1
        seconds = time.perf_counter() - start
    assert turns > 50 * seconds, f"{turns} turns in {seconds:.3f} s"


class TestVariants:
    """One file with code for several instruction sets."""

    def test_all_that_this_cpu_runs_answer_alike(self, variants):
        path, _ = variants
        data = expected("bert-embedding")
        loaded = [whet.load(path, threads=1, isa=m.isa) for m in open_artifact(path).variants if not why_not(m)]
        outputs = [run(session, data) for session in loaded]
        assert loaded[-1].metadata.isa == "avx2"
        for output in outputs:
            np.testing.assert_array_equal(output, outputs[-1])
        assert whet.load(path).metadata.isa == loaded[0].metadata.isa

    def test_the_report_has_them_all(self, variants):
        path, report = variants
        assert (report.isa, [*report.others]) == ("avx512_vnni", ["avx2"])
        assert len(report.layers) == len(report.others["avx2"]) == 8
        assert "int8 for avx512_vnni, avx2, " in str(report) and "\nfor avx2:\n" in str(report)
        explanation = explain_module(path)
        assert explanation.others.keys() == {"avx2"} and str(explanation).count("layer_0_intermediate") == 2

    def test_tables_are_there_once(self, variants):
        fast, slow = open_artifact(variants[0]).variants
        places = [{w.name: w.offset for w in m.weights} for m in (fast, slow)]
        shared = [name for name in places[0] if places[0][name] == places[1].get(name)]
        assert any(name.startswith("embed") for name in shared)
        inspected = describe(variants[0])
        assert all(v.own_weights < v.weights for v in inspected.variants)
        total = sum(v.weights for v in inspected.variants)
        assert max(v.weights for v in inspected.variants) <= sum(inspected.weights.values()) < total
        assert "variant    avx512_vnni: weights" in str(inspected)

    @pytest.mark.parametrize(
        ("given", "names"),
        [
            ("all", [*ISAS]),
            (["avx2", "avx_vnni", "avx2"], ["avx_vnni", "avx2"]),
            (["host", "avx2"], [isa for isa in ISAS if isa in (host_isa().name, "avx2")]),
            ("avx2", ["avx2"]),
        ],
    )
    def test_names(self, tmp_path, monkeypatch, given, names):
        skip_code_generation(monkeypatch)
        report = whet.compile(REFERENCES / "bert-sequence", tmp_path / "m.so", "fp32", isa=given)
        assert [report.isa, *report.others] == names

    def test_bf16_has_its_own(self, tmp_path, monkeypatch):
        skip_code_generation(monkeypatch)
        report = whet.compile(REFERENCES / "bert-sequence", tmp_path / "m.so", "bf16", isa="all")
        assert [report.isa, *report.others] == [*BF16_ISAS]

    @pytest.mark.parametrize(("precision", "name"), [("bf16", "avx2"), ("int8", "avx512_bf16"), ("fp32", "amx_bf16")])
    def test_those_of_another_precision_are_refused(self, tmp_path, precision, name):
        with pytest.raises(ValueError, match=f"isa is '{name}'; expected 'host', 'all', or some of .*'{precision}'"):
            whet.compile(REFERENCES / "bert-sequence", tmp_path / "m.so", precision, isa=name)

    def test_a_host_without_bfloat16_is_told_what_to_do(self, tmp_path, monkeypatch):
        monkeypatch.setattr("whet.tune.machine.cpu_flags", lambda: frozenset(ISAS["avx512_vnni"].cpu_flags))
        message = "none of amx_bf16, avx512_bf16: it lacks avx512_bf16; CPUs without it take precision 'int8'"
        with pytest.raises(ValueError, match=message):
            whet.compile(REFERENCES / "bert-sequence", tmp_path / "m.so", "bf16")

    def test_a_plain_graph_is_compiled_once_for_all(self, tmp_path, monkeypatch):
        skip_code_generation(monkeypatch)
        path = REFERENCES / "onnx" / "mpnet-ts17.onnx"
        report = whet.compile(path, tmp_path / "m.so", "fp32", isa=["avx512_vnni", "avx_vnni"])
        assert report.isa == "avx2" and not report.others
        assert any("avx2" in note for note in report.notes)


class TestOnnx:
    """ONNX files against ONNX Runtime: one that is recognised, and one that runs as plain operators."""

    @pytest.mark.parametrize(("name", "recognised"), [("token-ts14", True), ("mpnet-ts17", False)])
    def test_answers_are_those_of_onnx_runtime(self, compiled, name, recognised):
        path = REFERENCES / "onnx" / f"{name}.onnx"
        session, report = compiled(path, "fp32")
        assert report.recognised == recognised
        ids = np.random.default_rng(0).integers(5, session.metadata.vocab_size, (3, 9))
        mask = np.ones_like(ids)
        mask[1, 4:] = 0
        peer = onnxruntime.InferenceSession(path)
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        wanted = [i.name for i in peer.get_inputs()]
        expected = peer.run(None, {n: given[n] for n in wanted})[0]
        got = session.run(ids, mask)
        np.testing.assert_allclose(got[mask == 1], expected[mask == 1], atol=1e-4)

    @pytest.mark.parametrize("precision", ["int8", pytest.param("bf16", marks=needs_bf16)])
    def test_of_a_plain_graph_all_is_fp32_and_says_so(self, compiled, precision):
        session, report = compiled(REFERENCES / "onnx" / "mpnet-ts17.onnx", precision)
        assert session.metadata.precision == report.precision == "fp32"
        assert any("plain" in note and f"precision={precision!r}" in note for note in session.metadata.notes)

    def test_what_a_plain_graph_has_no_use_for_is_named(self, tmp_path, monkeypatch):
        skip_code_generation(monkeypatch)
        path = REFERENCES / "onnx" / "mpnet-ts17.onnx"
        given = {"sparsity": 0.5, "calibration": ["a"], "quantisation": whet.QuantisationConfig(), "dump_ir": tmp_path}
        report = whet.compile(path, tmp_path / "m.so", **given)
        assert "precision='int8', calibration, quantisation, sparsity=0.5, dump_ir." in report.notes[-1]
        assert not any("effect" in note for note in whet.compile(path, tmp_path / "m.so", "fp32").notes)


class TestMiniLM:
    """The real all-MiniLM-L6-v2."""

    def test_fp32_embeddings(self, compiled, minilm_folder):
        session, _ = compiled(minilm_folder, "fp32")
        data = np.load(REFERENCES / "minilm.npz")
        np.testing.assert_allclose(session.encode([str(s) for s in data["sentences"]]), data["output"], atol=1e-4)

    def test_int8_embeddings(self, compiled, minilm_folder):
        session, _ = compiled(minilm_folder, "int8")
        data = np.load(REFERENCES / "minilm.npz")
        cosine = (session.encode([str(s) for s in data["sentences"]]) * data["output"]).sum(axis=1)
        degenerate = [2, 4]  # an empty text, and one word 254 times: smoothing channels helps what is like other texts
        assert np.delete(cosine, degenerate).min() > 0.995
        assert cosine.min() > 0.96

    def test_texts_of_every_kind(self, compiled, minilm_folder):
        session, _ = compiled(minilm_folder, "int8")
        texts = ["", "a", "naïve café — 東京 🙂", "\u200b\t\n", "word " * 2000, "Ω" * 500]
        together = session.encode(texts)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
        for row, text in zip(together, texts, strict=True):
            np.testing.assert_array_equal(row, session.encode(text)[0])


class TestErrors:
    """Bad input is refused before any work is lost, and nothing is left behind."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"precision": "int4"}, "precision is 'int4'"),
            ({"isa": "neon"}, "isa is 'neon'"),
            ({"isa": ["avx2", "neon"]}, "isa is 'neon'; expected 'host', 'all', or some of amx_int8, "),
            ({"isa": []}, r"isa is \[\]"),
            ({"sparsity": 1.5}, "sparsity is 1.5"),
            ({"tokens": 0}, "tokens is 0"),
            ({"max_length": 4096}, "max_length is 4096"),
            ({"calibration": []}, "calibration is empty"),
            ({"precision": "fp32", "quantisation": whet.QuantisationConfig()}, "leave one of them out"),
            ({"precision": "bf16", "quantisation": whet.QuantisationConfig()}, "leave one of them out"),
        ],
    )
    def test_arguments(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            whet.compile(REFERENCES / "bert-embedding", tmp_path / "m.so", **options)
        assert not list(tmp_path.iterdir())

    def test_missing_source(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            whet.compile(tmp_path / "nowhere", tmp_path / "m.so")

    def test_missing_output_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="create it"):
            whet.compile(REFERENCES / "bert-embedding", tmp_path / "no" / "m.so")

    def test_a_file_that_is_no_model(self, tmp_path):
        (tmp_path / "weights.bin").write_bytes(b"\0" * 100)
        with pytest.raises(ValueError, match="Hugging Face folder or an ONNX file"):
            whet.compile(tmp_path / "weights.bin", tmp_path / "m.so")

    def test_no_c_compiler(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        with pytest.raises(FileNotFoundError, match="install"):
            whet.compile(REFERENCES / "bert-embedding", tmp_path / "m.so")

    def test_interrupt_leaves_nothing(self, tmp_path):
        command = [sys.executable, "-c", SAY_PHASES, str(REFERENCES / "bert-embedding"), str(tmp_path / "m.so")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert "7 generate code\n" in process.stdout  # reads up to there
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
        assert process.returncode != 0
        assert not list(tmp_path.iterdir())
