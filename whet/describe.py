"""What a compiled module says about itself, without running any of it: ``whet inspect``."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np

from whet.runtime.artifact import Artifact, open_artifact
from whet.runtime.cpu import check_cpu
from whet.runtime.metadata import ArtifactError, Metadata


@dataclass(frozen=True)
class Description:
    """A module file; sizes are bytes."""

    path: str
    size: int
    weights: dict[str, int]
    """By dtype."""
    tokenizer: int
    digest: str
    """SHA-256 of everything but the weights, then of the weights."""
    weights_verified: bool
    """Whether the weights were compared with their checksum; the rest always is."""
    runs_here: bool
    why_not: str
    metadata: Metadata

    @property
    def code(self) -> int:
        """What is neither weights nor tokenizer."""
        return self.size - sum(self.weights.values()) - self.tokenizer

    def to_json(self) -> str:
        """The description as one JSON object; the weights table is left to the file."""
        document: dict[str, Any] = {**asdict(self), "code": self.code}
        del document["metadata"]["weights"]
        return json.dumps(document, indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        m = self.metadata
        weights = ", ".join(f"{dtype} {_megabytes(size)}" for dtype, size in self.weights.items())
        rows = {
            "model": f"{m.name}, {m.task}",
            "code": f"{m.precision} for {m.isa}, made by whet {m.whet} (tvm-ffi {m.tvm_ffi})",
            "inputs": f"{', '.join(m.inputs)}; {m.vocab_size} token ids, at most {m.max_length} tokens a request",
            "output": f"{m.output.channels} values per {m.output.per}",
            "labels": ", ".join(m.labels[:8]) + (f", … ({len(m.labels)})" if len(m.labels) > 8 else ""),
            "size": f"{_megabytes(self.size)}: code {_megabytes(self.code)}, tokenizer {_megabytes(self.tokenizer)}, "
            f"{len(m.weights)} weights ({weights})",
            "needs": " ".join(m.cpu_flags) or "any x86-64 CPU",
            "runs here": "yes" if self.runs_here else f"no: {self.why_not}",
            "checksum": "all right" + ("" if self.weights_verified else " (weights not compared; --verify does)"),
        }
        lines = [self.path, *(f"  {name:10} {value}" for name, value in rows.items() if value)]
        return "\n".join([*lines, *(f"  note: {note}" for note in m.notes)])


def describe(path: str | PathLike[str], *, verify: bool = False) -> Description:
    """Read a module file; ``verify`` compares the weights with their checksum too.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: it is no module, or damaged.

    """
    artifact = open_artifact(path)
    if verify:
        artifact.verify()
    why_not = _why_not(artifact.metadata)
    return Description(
        path=str(path),
        size=artifact.path.stat().st_size,
        weights=_weights(artifact),
        tokenizer=len((artifact.tokenizer_json or "").encode()),
        digest=artifact.digest.hex(),
        weights_verified=verify,
        runs_here=not why_not,
        why_not=why_not,
        metadata=artifact.metadata,
    )


def _why_not(metadata: Metadata) -> str:
    try:
        check_cpu(metadata.cpu_flags, metadata.isa)
    except ArtifactError as error:
        return str(error)
    return ""


def _weights(artifact: Artifact) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for weight in artifact.metadata.weights:
        sizes[weight.dtype] += int(np.prod(weight.shape)) * np.dtype(weight.dtype).itemsize
    return dict(sizes.most_common())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
