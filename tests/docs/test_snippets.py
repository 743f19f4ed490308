"""The documentation is true: its Python runs, its quotations stand in the files, its links lead somewhere.

The Python blocks of a document run in order in one namespace, in a folder where ``path/to/…`` are reference models. A
block under ``<!-- from: FILE -->`` is a quotation instead; one under ``<!-- not run: REASON -->`` has to parse.
"""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

import whet
from whet import cli, compiler
from whet.frontend.huggingface import from_folder
from whet.onnx_export import export_onnx

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MODELS = {
    "model": "bert-embedding",
    "encoder": "distilbert-hidden-states",
    "classifier": "bert-sequence",
    "tagger": "bert-token",
    "reader": "bert-question",
}


@dataclass(frozen=True)
class Block:
    document: Path
    line: int
    language: str
    text: str
    mark: str
    """The comment on the line before, without its brackets."""

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks(document: Path) -> list[Block]:
    found = []
    pattern = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```", re.M | re.S)
    text = document.read_text(encoding="utf-8")
    for match in pattern.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(document, line, match["language"], match["text"], match["mark"] or ""))
    return found


PYTHON = [b for document in DOCUMENTS for b in blocks(document) if b.language == "python"]
RUN = {
    document: [b for b in PYTHON if b.document == document and not b.mark.startswith(("from: ", "not run: "))]
    for document in DOCUMENTS
}


@pytest.fixture
def folder(references, tmp_path, monkeypatch):
    """A working folder with the models that the documents name."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    for name, reference in MODELS.items():
        (tmp_path / "path" / "to" / name).symlink_to(references / reference)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if RUN[d]], ids=lambda d: d.name)
def test_python_runs(document, folder, monkeypatch):
    texts = "".join(b.text for b in RUN[document])
    if "path/to/model.onnx" in texts:
        export_onnx(from_folder("path/to/model"), "path/to/model.onnx")
    if 'load("m.so"' in texts and 'output="m.so"' not in texts:
        whet.compile("path/to/model", output="m.so")
    if "whet.load" not in texts:
        skip_code_generation(monkeypatch)
    namespace = {"__name__": document.stem}
    for block in RUN[document]:
        # The line numbers of an error are then those of the document.
        code = compile("\n" * (block.line - 1) + block.text, str(document), "exec")
        exec(code, namespace)


def skip_code_generation(monkeypatch):
    """It is most of the time, and says nothing about a document that loads no module."""
    monkeypatch.setattr(compiler, "generate_code", lambda *_: None)
    monkeypatch.setattr(compiler, "write_module", lambda *args: args[-1].touch())


@pytest.mark.parametrize("block", [b for b in PYTHON if b.mark.startswith("from: ")], ids=str)
def test_quotation_is_verbatim(block):
    name = block.mark.removeprefix("from: ")
    assert block.text in (ROOT / name).read_text(encoding="utf-8"), f"{block} no longer stands in {name}"


@pytest.mark.parametrize("block", [b for b in PYTHON if b.mark.startswith("not run: ")], ids=str)
def test_what_does_not_run_parses(block):
    ast.parse(block.text)


COMMANDS = [
    (b, line)
    for document in DOCUMENTS
    for b in blocks(document)
    if b.language == "sh"
    for line in b.text.splitlines()
    if line.startswith("whet ")
]


@pytest.mark.parametrize(("block", "line"), COMMANDS, ids=str)
def test_command_is_understood(block, line):
    cli._parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document):
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document.name} links to {name}"
        if anchor:
            assert anchor in anchors(path), f"{document.name} links to {target}"


def anchors(document: Path) -> set[str]:
    """Anchors of the headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
