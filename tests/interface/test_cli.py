"""The commands, called as the shell calls them."""

import io
import json
import subprocess
import sys

import pytest

from whet.cli import main


@pytest.fixture
def run(capsys):
    def run(*arguments, stdin=None, monkeypatch=None):
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def records(out):
    return [json.loads(line) for line in out.splitlines()]


# Usage and errors


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_and_version_are_no_errors(run, arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "") and "whet" in out


@pytest.mark.parametrize("command", ["compile", "run", "inspect", "explain", "bench", "eval"])
def test_every_command_has_help_and_json(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and "--json" in out


def test_choices_come_from_the_registries(run):
    from whet.schedules.isa import ISAS  # noqa: PLC0415 -- the command line must not need it

    _, out, _ = run("compile", "--help")
    assert all(name in out for name in [*ISAS, "percentile", "token_classification", "cls", "fp32"])
    code, _, err = run("compile", "m", "-o", "m.so", "--isa", "sse2")
    assert code == 2 and "'sse2'" in err and "'avx2'" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["compile", "m"],
        ["bench", "m.so", "--batch", "1,x"],
        ["bench", "m.so", "--threads", "0"],
        ["bench", "m.so", "--against", "tensorrt"],
        ["eval", "m.so", "--data", "x", "--format", "glue"],
        ["run", "m.so", "--pair", "one"],
    ],
)
def test_wrong_usage_is_2(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and "whet" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.so", "x"], "none.so"),
        (["inspect", "none.so"], "none.so"),
        (["explain", "none.so"], "none.so"),
        (["explain", "x.so", "--isa", "avx2"], "--isa can't change it"),
        (["bench", "none.so"], "none.so"),
        (["bench", "m.so", "--data", "d.csv"], "--data are the requests for --plain"),
        (["bench", "m.so", "--texts", "t.txt"], "--texts are the requests for --memo"),
        (["bench", "m.so", "--plain", "p.so"], "no requests to compare on"),
        (["bench", "m.so", "--plain", "p.so", "--memo", "m.memo"], "make one at a time"),
        (["eval", "none.so", "--data", "none.tsv", "--format", "sst2"], "none.tsv: No such file"),
        (["compile", "none", "-o", "m.so", "--calibration", "none.txt"], "none.txt: No such file"),
    ],
)
def test_what_cannot_be_done_is_1_and_one_line(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 1 and out == ""
    assert err.startswith("whet: error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_debug_shows_where(run, how, monkeypatch):
    monkeypatch.setenv("WHET_DEBUG", "1" if how == "variable" else "")
    code, _, err = run("inspect", "none.so", *(["--debug"] if how == "flag" else []))
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("whet: error: ")


def test_an_error_of_several_lines_becomes_one(run, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("first\n  second")

    monkeypatch.setattr("whet.describe.describe", broken)
    assert run("inspect", "m.so")[2] == "whet: error: RuntimeError: first second (--debug shows where)\n"


def test_an_interrupt_is_130(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("whet.describe.describe", interrupted)
    assert run("inspect", "m.so") == (130, "", "whet: interrupted\n")


def test_without_the_compiler_the_error_says_what_to_install():
    code = "import sys; sys.modules['tvm'] = None; from whet.cli import main; sys.exit(main(sys.argv[1:]))"
    commands = [["compile", "m", "-o", "m.so", "--isa", "avx2"], ["compile", "--help"]]
    failed, helped = (
        subprocess.run([sys.executable, "-c", code, *c], capture_output=True, text=True, check=False) for c in commands
    )
    assert failed.returncode == 1 and "pip install '.[compile]'" in failed.stderr
    assert helped.returncode == 0, helped.stderr


def test_a_closed_pipe_is_quiet(tiny_modules):
    lines = "the cat runs\n" * 2000
    command = [sys.executable, "-m", "whet.cli", "run", str(tiny_modules["embedding"]), "--json", "--threads", "1"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(lines.encode())
    process.stdin.close()
    assert json.loads(process.stdout.readline())["text"] == "the cat runs"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.parametrize(
    "arguments", [["run", "embedding", "the cat"], ["inspect", "embedding"], ["explain", "embedding"], ["eval"]]
)
def test_commands_for_modules_import_no_compiler(tiny_modules, tmp_path, arguments):
    (tmp_path / "d.csv").write_text("text_a,text_b,score\nthe cat,a dog,1\nmusic,guitar,2\n")
    if arguments == ["eval"]:
        arguments = ["eval", "embedding", "--data", str(tmp_path / "d.csv"), "--format", "csv"]
    arguments[1] = str(tiny_modules[arguments[1]])
    code = (
        "import sys; from whet.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'tvm', 'torch', 'transformers', 'onnx', 'onnxruntime', 'scipy'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# run


def test_run_encodes(run, tiny_modules):
    code, out, _ = run("run", tiny_modules["embedding"], "the cat", "a dog", "--json")
    found = records(out)
    assert code == 0 and [r["text"] for r in found] == ["the cat", "a dog"]
    assert len(found[0]["vector"]) == 5
    _, out, _ = run("run", tiny_modules["embedding"], "the cat", "a dog", "the cat")
    assert "cosine similarity" in out and out.count("1.0000") >= 3
    _, out, _ = run("run", tiny_modules["embedding"], "--pair", "the cat", "the cat", "--json")
    assert records(out) == [{"text": ["the cat", "the cat"], "similarity": pytest.approx(1)}]


def test_run_reads_files_and_standard_input(run, tiny_modules, tmp_path, monkeypatch):
    path = tmp_path / "texts.txt"
    path.write_text("the cat\n\na dog\tthe man\n")
    module = tiny_modules["classifier"]
    _, out, _ = run("run", module, "--file", path, "--tab-pairs", "--json")
    assert [r["text"] for r in records(out)] == ["the cat", ["a dog", "the man"]]
    _, again, _ = run("run", module, "--tab-pairs", "--json", stdin=path.read_text(), monkeypatch=monkeypatch)
    assert again == out
    _, out, _ = run("run", module, "--file", path, "--json")
    assert [r["text"] for r in records(out)] == ["the cat", "a dog\tthe man"]
    code, _, err = run("run", module, "x", "--file", path)
    assert code == 1 and "leave one of them out" in err


def test_run_classifies(run, tiny_modules):
    _, out, _ = run("run", tiny_modules["classifier"], "the cat", "--pair", "the cat", "a dog", "--json")
    single, pair = records(out)
    assert single["label"] in "xyz" and 0 < single["score"] <= 1
    assert pair["text"] == ["the cat", "a dog"]
    _, out, _ = run("run", tiny_modules["classifier"], "the cat", "--top-k", "3", "--json")
    labels = records(out)[0]["labels"]
    assert {label["label"] for label in labels} == set("xyz")
    _, out, _ = run("run", tiny_modules["classifier"], "the cat", "--top-k", "2")
    assert out.count(",") == 1 and "the cat" in out


def test_run_tags(run, tiny_modules):
    _, out, _ = run("run", tiny_modules["tagger"], "the cat runs", "--json")
    assert [tag["text"] for tag in records(out)[0]["tags"]] == ["the", "cat", "runs"]
    _, out, _ = run("run", tiny_modules["tagger"], "the cat runs")
    assert [word.partition("/")[0] for word in out.split()] == ["the", "cat", "runs"]


def test_run_answers(run, tiny_modules, tmp_path, monkeypatch):
    path = tmp_path / "context.txt"
    path.write_text("the cat runs in the park")
    ask = ["run", tiny_modules["answerer"], "--question", "a dog ?", "--json"]
    _, out, _ = run(*ask, "--context", path.read_text())
    answer = records(out)[0]
    assert path.read_text()[answer["start"] : answer["end"]] == answer["answer"]
    assert run(*ask, "--file", path)[1] == out
    assert run(*ask, stdin=path.read_text(), monkeypatch=monkeypatch)[1] == out
    assert len(records(run(*ask, "--file", path, "--top-k", "3")[1])) == 3
    code, _, err = run(*ask, "--file", path, "--context", "x")
    assert code == 1 and "several contexts" in err


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("token", ["the cat"], "--pooling"),
        ("answerer", ["the cat"], "--question"),
        ("embedding", ["--question", "a ?", "--context", "b"], "embedding"),
        ("embedding", ["the cat", "--context", "b"], "without a --question"),
        ("tagger", ["--pair", "a", "b"], "single texts"),
    ],
)
def test_run_says_what_the_module_is_for(run, tiny_modules, module, arguments, message):
    code, _, err = run("run", tiny_modules[module], *arguments)
    assert code == 1 and message in err


# inspect and explain


def test_inspect(run, tiny_modules):
    code, out, _ = run("inspect", tiny_modules["classifier"], "--json")
    found = json.loads(out)
    assert code == 0 and found["metadata"]["labels"] == ["x", "y", "z"]
    assert found["size"] == tiny_modules["classifier"].stat().st_size
    assert found["weights"] == {"float32": 3 * 4 * (50 + 64 + 2)}
    assert found["code"] + sum(found["weights"].values()) + found["tokenizer"] == found["size"]
    assert found["weights_verified"] is False
    _, out, _ = run("inspect", tiny_modules["classifier"], "--verify")
    assert "x, y, z" in out and "all right\n" in out


def test_inspect_finds_damage_and_foreign_cpus(run, tiny_modules, tmp_path):
    sound = tiny_modules["token"].read_bytes()
    from whet.runtime.artifact import open_artifact  # noqa: PLC0415

    first = open_artifact(tiny_modules["token"]).weights()[0].tobytes()[:64]
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(sound.replace(first, bytes(64)))
    assert run("inspect", damaged)[0] == 0
    code, _, err = run("inspect", damaged, "--verify")
    assert code == 1 and "checksum" in err
    (tmp_path / "cut.so").write_bytes(sound[:5000])
    assert run("inspect", tmp_path / "cut.so")[0] == 1
    import tiny_module  # noqa: PLC0415 -- on the path once tiny_modules is made

    path = tiny_module.write(tmp_path / "foreign.so", cpu_flags=("sve2",), isa="sve2")
    code, out, _ = run("inspect", path, "--json")
    found = json.loads(out)
    assert code == 0 and not found["runs_here"] and "sve2" in found["why_not"]
    assert run("run", path, "x")[0] == 1


def test_explain_shows_the_report_of_a_module(run, tiny_modules, tmp_path):
    import tiny_module  # noqa: PLC0415

    layer = {
        "layer": "layer_0_query",
        "out_features": 8,
        "in_features": 4,
        "zeros": 0.75,
        "kernel": "4x4 sparse",
        "density": 0.25,
        "cycles": {"dense": 200.0, "4x4 sparse": 100.0},
    }
    path = tiny_module.write(tmp_path / "m.so", report=(layer,), notes=("Something stayed plain.",))
    code, out, _ = run("explain", path)
    assert code == 0
    assert "layer_0_query" in out and "75.0%" in out and "4x4 sparse" in out and "dense 2.00×" in out
    assert "note: Something stayed plain." in out
    assert json.loads(run("explain", path, "--json")[1])["layers"] == [layer]


def test_explain_decides_without_compiling(run, references):
    code, out, _ = run("explain", references / "bert-sequence", "--isa", "avx2", "--json")
    found = json.loads(out)
    assert code == 0 and found["isa"] == "avx2"
    assert any(layer["layer"].endswith("intermediate") for layer in found["layers"])
    assert any(line.startswith("logits") and "once per request" in line for line in found["plain"])
    _, out, _ = run("explain", references / "bert-sequence", "--isa", "avx2", "--sparsity", "0.9", "--json")
    assert all(layer["zeros"] > 0.8 for layer in json.loads(out)["layers"])


# bench and eval


def test_bench_prints_and_writes(run, tiny_modules, tmp_path):
    arguments = ["bench", tiny_modules["token"], "--seq", "4,8", "--min-seconds", "0.01", "-o", tmp_path / "r.json"]
    code, out, _ = run(*arguments, "--json")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "r.json").read_text())
    assert [t["sequence"] for t in json.loads(out)["timings"]] == [4, 8]


def test_eval(run, tiny_modules, tmp_path):
    data = tmp_path / "d.csv"
    data.write_text("text_a,text_b,score\nthe cat,the cat,5\nmusic on stage,a dog,1\nthe man,the red house,2\n")
    module = tiny_modules["embedding"]
    code, out, _ = run("eval", module, "--data", data, "--format", "csv", "--against-fp32", module, "--json")
    found = json.loads(out)
    assert code == 0 and found["rows"] == 3 and -1 <= found["scores"]["spearman"] <= 1
    assert found["against"]["cosine_mean"] == pytest.approx(1)
    code, _, err = run("eval", tiny_modules["classifier"], "--data", data, "--format", "csv")
    assert code == 1 and "asks for an embedding model" in err


def test_compile_then_run(run, references, tmp_path):
    output = tmp_path / "m.so"
    code, out, err = run("compile", references / "bert-embedding", "-o", output, "--isa", "avx2", "--json")
    assert code == 0, err
    assert json.loads(out)["size"] == output.stat().st_size
    assert "link" in err, "phases go to standard error"
    assert run("inspect", output, "--verify")[0] == 0


def test_options_without_effect_are_named(run, references, tmp_path, monkeypatch):
    monkeypatch.setattr("whet.compiler.generate_code", lambda *_: None)
    monkeypatch.setattr("whet.compiler.write_module", lambda *args: args[-1].touch())
    plain = ["compile", references / "onnx" / "mpnet-ts17.onnx", "-o", tmp_path / "m.so"]
    assert "warning" not in run(*plain)[2]
    assert "warning" not in run(*plain, "--precision", "fp32")[2]
    options = ["--precision", "int8", "--sparsity", "0.5", "--calibration-method", "mse", "--dump-ir", tmp_path]
    code, _, err = run(*plain, *options)
    assert code == 0
    assert err.endswith("without effect: --precision, --calibration-method, --sparsity, --dump-ir\n")
    encoder = ["compile", references / "bert-embedding", "-o", tmp_path / "m.so"]
    assert "warning" not in run(*encoder, *options)[2]


def test_several_instruction_sets(run, references, tmp_path, monkeypatch):
    monkeypatch.setattr("whet.compiler.generate_code", lambda *_: None)
    monkeypatch.setattr("whet.compiler.write_module", lambda *args: args[-1].touch())
    arguments = ["compile", references / "bert-embedding", "-o", tmp_path / "m.so", "--precision", "fp32", "--isa"]
    found = json.loads(run(*arguments, "avx2,avx512_vnni", "--json")[1])
    assert found["isa"] == "avx512_vnni" and [*found["others"]] == ["avx2"]
    code, _, err = run(*arguments, "avx2,sse2")
    assert code == 2 and "sse2" in err


def test_inspect_lists_variants(run, tiny_modules):
    _, out, _ = run("inspect", tiny_modules["variants"])
    lines = [line.strip() for line in out.splitlines()]
    weights = "weights 0.0 MB, 0.0 MB of them its own"
    assert f"variant    future: {weights}; this CPU lacks sve9" in lines
    assert f"variant    second: {weights}; runs here" in lines
    assert "runs here  yes, as second" in lines
    found = json.loads(run("inspect", tiny_modules["variants"], "--json")[1])
    assert found["weights"] == {"float32": 5 * 4 * (50 + 64 + 2)}
    assert [(v["isa"], v["weights"], v["own_weights"]) for v in found["variants"]] == [
        (isa, 5 * 4 * (50 + 64 + 2), 0) for isa in ("future", "second", "third")
    ]
