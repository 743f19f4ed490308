"""Opening a file: everything that is not a sound module of this machine gives an error, never a crash."""

import gc
import json
import mmap
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_module

from whet.runtime import ArtifactError, artifact, cpu, load
from whet.runtime.artifact import open_artifact
from whet.runtime.metadata import to_json

# Loads each file named on the command line and runs it if that works.
TRY = """
import sys
from whet.runtime import load
for path in sys.argv[1:]:
    try:
        load(path, threads=1).run([[1, 2]])
        print("ran")
    except ValueError as error:
        print(type(error).__name__, error)
"""


def attempts(paths) -> list[str]:
    done = subprocess.run([sys.executable, "-c", TRY, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def damaged(module: Path, path: Path, change) -> Path:
    data = bytearray(module.read_bytes())
    data = change(data) or data
    path.write_bytes(data)
    return path


def test_contents(modules):
    opened = open_artifact(modules["embedding"])
    assert opened.metadata.name == "tiny"
    assert json.loads(opened.tokenizer_json)["model"]["type"] == "WordPiece"
    assert open_artifact(modules["token"]).tokenizer_json is None
    for array, (name, expected) in zip(opened.weights(), tiny_module.weights().items(), strict=True):
        np.testing.assert_array_equal(array, expected, err_msg=name)
        assert array.ctypes.data % 64 == 0
    opened.verify()


def test_weights_are_pages_of_the_file(modules):
    array = open_artifact(modules["token"]).weights()[0]
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base.base.obj if isinstance(base.base, memoryview) else base.base, mmap.mmap)


def test_weights_outlive_the_artifact(modules):
    opened = open_artifact(modules["token"])
    arrays = opened.weights()
    del opened
    gc.collect()
    np.testing.assert_array_equal(arrays[0], tiny_module.weights()["word"])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.so is missing"):
        load(tmp_path / "none.so")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load(tmp_path)


@pytest.mark.parametrize("data", [b"", b"short", b"x" * 1000, b"PK\3\4" + bytes(100), b"\x7fELF" + bytes(100)])
def test_not_a_module(tmp_path, data):
    path = tmp_path / "m.so"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"m\.so is not a compiled module"):
        load(path)


def test_foreign_shared_object(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "foreign.c"
    source.write_text("int whet_metadata; int f(void) { return 1; }")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "foreign.so", source], check=True)
    with pytest.raises(ArtifactError, match=r"foreign\.so is a shared object but not a Whet module"):
        load(tmp_path / "foreign.so")


def test_foreign_object_does_not_run(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "foreign.c"
    source.write_text("#include <stdlib.h>\n__attribute__((constructor)) static void f(void) { exit(42); }")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "foreign.so", source], check=True)
    assert attempts([tmp_path / "foreign.so"])[0].startswith("ArtifactError")


@pytest.mark.parametrize("machine", [183, 243])
def test_other_machine(modules, tmp_path, machine):
    path = damaged(
        modules["token"], tmp_path / "m.so", lambda d: d.__setitem__(slice(18, 20), struct.pack("<H", machine))
    )
    with pytest.raises(ArtifactError, match="not a compiled module for x86-64"):
        load(path)


def test_truncated_anywhere(modules, tmp_path):
    size = modules["token"].stat().st_size
    data = modules["token"].read_bytes()
    path = tmp_path / "m.so"
    cuts = {*range(0, size, 97), *range(64, 4096, 512), size - 1, size - 64, size - 4096}
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with pytest.raises(ArtifactError, match="truncated" if cut >= 64 else "not a compiled module"):
            open_artifact(path)


def test_truncated_files_do_not_crash_a_process(modules, tmp_path):
    data = modules["token"].read_bytes()
    paths = [tmp_path / f"{i}.so" for i in range(12)]
    for i, path in enumerate(paths):
        path.write_bytes(data[: len(data) * i // len(paths)])
    lines = attempts(paths)
    assert len(lines) == len(paths)
    assert all(line.startswith("ArtifactError") for line in lines)


def test_damage_outside_the_weights_is_found(modules, tmp_path):
    size = modules["token"].stat().st_size
    opened = open_artifact(modules["token"])
    weights = opened._sections[".whet.weights"]
    spared = range(weights.offset, weights.end)
    places = [p for p in np.random.default_rng(0).integers(0, size, 60).tolist() if p not in spared]
    paths = [
        damaged(modules["token"], tmp_path / f"{p}.so", lambda d, p=p: d.__setitem__(p, d[p] ^ 0x55)) for p in places
    ]
    for path in paths:
        with pytest.raises(ArtifactError):
            open_artifact(path)
    assert all(line.startswith("ArtifactError") for line in attempts(paths[:12]))


def test_damaged_weights_are_found_by_verify(modules, tmp_path):
    span = open_artifact(modules["token"])._sections[".whet.weights"]
    path = damaged(
        modules["token"], tmp_path / "m.so", lambda d: d.__setitem__(span.offset + 9, d[span.offset + 9] ^ 1)
    )
    with pytest.raises(ArtifactError, match="weights differ from their checksum"):
        open_artifact(path).verify()


def test_random_headers_give_errors(modules, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "m.so"
    data = bytearray(modules["token"].read_bytes())
    table = struct.unpack_from("<Q", data, 40)[0]
    for _ in range(200):
        broken = bytearray(data)
        for place in rng.integers(table, len(data), 20):
            broken[place] = rng.integers(256)
        for place in rng.integers(40, 64, 2):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        with pytest.raises(ArtifactError):
            open_artifact(path)


def test_another_cpu(modules, tmp_path, monkeypatch):
    path = tiny_module.write(tmp_path / "m.so", cpu_flags=("avx2", "sve2", "avx1024"), isa="avx1024")
    assert open_artifact(path).metadata.isa == "avx1024"  # still open to inspection
    monkeypatch.setattr("whet.runtime.engine._load_library", lambda _: pytest.fail("loaded code for another CPU"))
    with pytest.raises(ArtifactError, match=r"compiled for \(avx1024: this CPU lacks avx1024, sve2\)\. Compile"):
        load(path)


def test_another_architecture(modules, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(ArtifactError, match="this machine is aarch64"):
        load(modules["token"])


def test_another_format_version(tmp_path):
    path = tiny_module.write(tmp_path / "m.so", format=7)
    with pytest.raises(ArtifactError, match=r"m\.so: the module has format 7"):
        load(path)


@pytest.mark.parametrize("document", ["", "{", '{"format": 4}', '"text"'])
def test_corrupt_metadata(tmp_path, monkeypatch, document):
    monkeypatch.setattr("whet.link.to_json", lambda _: document)
    path = tiny_module.write(tmp_path / "m.so")
    with pytest.raises(ArtifactError, match=r"m\.so: the metadata"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 32}, "does not fit"),
        ({"offset": 1 << 40}, "does not fit"),
        ({"offset": -64}, "does not fit"),
        ({"shape": [1 << 40, 1 << 40]}, "does not fit"),
        ({"shape": [-1]}, "does not fit"),
        ({"dtype": "float99"}, "unknown dtype"),
        ({"dtype": "object"}, "does not fit"),
    ],
)
def test_weights_table_is_checked(tmp_path, monkeypatch, change, message):
    def broken(variants):
        document = json.loads(to_json(variants))
        document["weights"][1].update(change)
        return json.dumps(document)

    monkeypatch.setattr("whet.link.to_json", broken)
    path = tiny_module.write(tmp_path / "m.so")
    with pytest.raises(ArtifactError, match=message):
        open_artifact(path)


def test_code_that_does_not_load(tmp_path, monkeypatch):
    """Sound in all that is checked, but no TVM library."""
    monkeypatch.setattr("tvm_ffi.load_module", lambda _: (_ for _ in ()).throw(RuntimeError("no symbol")))
    with pytest.raises(
        ArtifactError, match=r"does not load in this TVM runtime \(no symbol\); it was compiled with apache-tvm-ffi 0:"
    ):
        load(tiny_module.write(tmp_path / "m.so", name="never loaded before"))


def test_amx_permission(monkeypatch):
    if "amx_int8" not in cpu.cpu_flags():
        pytest.skip("this CPU has no AMX")
    assert cpu.request_amx() == cpu.request_amx() == ""
    monkeypatch.setattr(cpu, "_ARCH_REQ_XCOMP_PERM", 0x7FFF)
    assert "refuses the AMX registers (Invalid argument)" in cpu.request_amx()


class TestVariants:
    """One file with code for several instruction sets; the first is for no CPU there is."""

    def test_the_first_that_the_cpu_runs_is_taken(self, modules):
        session = load(modules["variants"], threads=1)
        assert session.metadata.isa == "second"
        np.testing.assert_array_equal(session.run([[1, 2, 3]]), load(modules["token"], threads=1).run([[1, 2, 3]]))

    def test_one_can_be_named(self, modules, monkeypatch):
        class Library(dict):
            def __missing__(self, name):
                return name

        monkeypatch.setattr("whet.runtime.engine._load_library", lambda _: Library())
        for isa in ("second", "third"):
            session = load(modules["variants"], isa=isa)
            assert (session.metadata.isa, session._main) == (isa, f"main_{isa}")

    def test_weights_are_shared(self, modules):
        opened = open_artifact(modules["variants"])
        assert [m.isa for m in opened.variants] == ["future", "second", "third"]
        first = opened.weights()[0].ctypes.data
        assert all(opened.weights(m)[0].ctypes.data == first for m in opened.variants)

    def test_none_runs_here(self, modules, monkeypatch):
        monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"sse2", "avx2"}))
        monkeypatch.setattr("whet.runtime.engine._load_library", lambda _: pytest.fail("loaded code for another CPU"))
        message = r"\(future: this CPU lacks sve9; second: this CPU lacks fma; third: this CPU lacks fma\)"
        with pytest.raises(ArtifactError, match=message):
            load(modules["variants"])
        with pytest.raises(ArtifactError, match=r"\(second: this CPU lacks fma\)"):
            load(modules["variants"], isa="second")

    def test_unknown(self, modules):
        with pytest.raises(ValueError, match="isa is 'avx2'; the module holds code for future, second, third"):
            load(modules["variants"], isa="avx2")

    def test_without_amx_registers_the_next_is_taken(self, monkeypatch):
        fast, slow = (
            replace(tiny_module.METADATA, isa=isa, cpu_flags=flags)
            for isa, flags in (("amx", ("amx_tile",)), ("avx2", ()))
        )
        monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"amx_tile"}))
        monkeypatch.setattr(cpu, "request_amx", lambda: "")
        assert cpu.choose_variant([fast, slow]) is fast
        monkeypatch.setattr(cpu, "request_amx", lambda: "the kernel refuses")
        assert cpu.choose_variant([fast, slow]) is slow
        with pytest.raises(ArtifactError, match="amx: the kernel refuses"):
            cpu.choose_variant([fast])


def test_sections_of_many_names_are_listed(modules):
    with modules["token"].open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sections = artifact.find_sections(modules["token"], pages)
    assert {".text", ".whet.weights", ".whet.digest"} <= sections.keys()
    assert sections[".whet.weights"].offset % 4096 == 0
    assert sections[".whet.digest"].size == 64
