"""What a compiled module says about itself, without running any of it: ``whet inspect``."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np

from whet.runtime.artifact import open_artifact
from whet.runtime.cpu import choose_variant, why_not
from whet.runtime.metadata import ArtifactError, Metadata, Weight


@dataclass(frozen=True)
class Variant:
    """The code for one instruction set; sizes are bytes."""

    isa: str
    needs: tuple[str, ...]
    """Flags of the CPU, named as in ``/proc/cpuinfo``."""
    weights: int
    own_weights: int
    """Those that no other variant reads."""
    why_not: str
    """Why this machine cannot run it; empty if it can."""

    def __str__(self) -> str:
        sizes = f"weights {_megabytes(self.weights)}, {_megabytes(self.own_weights)} of them its own"
        return f"{self.isa}: {sizes}; {self.why_not or 'runs here'}"


@dataclass(frozen=True)
class Description:
    """A module file; sizes are bytes."""

    path: str
    size: int
    weights: dict[str, int]
    """By dtype; what variants share counts once."""
    tokenizer: int
    digest: str
    """SHA-256 of everything but the weights, then of the weights."""
    weights_verified: bool
    """Whether the weights were compared with their checksum; the rest always is."""
    runs_here: bool
    why_not: str
    variants: tuple[Variant, ...]
    metadata: Metadata
    """Of the variant that loading takes here, or of the fastest if none runs."""

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
        isas = ", ".join(variant.isa for variant in self.variants)
        several = len(self.variants) > 1
        rows = [
            ("model", f"{m.name}, {m.task}"),
            ("code", f"{m.precision} for {isas}, made by whet {m.whet} (tvm-ffi {m.tvm_ffi})"),
            ("inputs", f"{', '.join(m.inputs)}; {m.vocab_size} token ids, at most {m.max_length} tokens a request"),
            ("output", f"{m.output.channels} values per {m.output.per}"),
            ("labels", ", ".join(m.labels[:8]) + (f", … ({len(m.labels)})" if len(m.labels) > 8 else "")),
            (
                "size",
                f"{_megabytes(self.size)}: code {_megabytes(self.code)}, tokenizer {_megabytes(self.tokenizer)}, "
                f"{len(m.weights)} weights ({weights})",
            ),
            *(("variant", str(variant)) for variant in self.variants if several),
            ("needs", "" if several else " ".join(m.cpu_flags) or "any x86-64 CPU"),
            ("runs here", f"no: {self.why_not}" if self.why_not else f"yes, as {m.isa}" if several else "yes"),
            ("checksum", "all right" + ("" if self.weights_verified else " (weights not compared; --verify does)")),
        ]
        lines = [self.path, *(f"  {name:10} {value}" for name, value in rows if value)]
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
    metadata, reason = artifact.metadata, ""
    try:
        metadata = choose_variant(artifact.variants)
    except ArtifactError as error:
        reason = str(error)
    tables = [{w.offset: w for w in variant.weights if _bytes(w)} for variant in artifact.variants]
    times = Counter(offset for table in tables for offset in table)
    all_weights = {offset: weight for table in tables for offset, weight in table.items()}.values()
    by_dtype: Counter[str] = Counter()
    for weight in all_weights:
        by_dtype[weight.dtype] += _bytes(weight)
    return Description(
        path=str(path),
        size=artifact.path.stat().st_size,
        weights=dict(by_dtype.most_common()),
        tokenizer=len((artifact.tokenizer_json or "").encode()),
        digest=artifact.digest.hex(),
        weights_verified=verify,
        runs_here=not reason,
        why_not=reason,
        variants=tuple(
            Variant(
                isa=variant.isa,
                needs=variant.cpu_flags,
                weights=sum(map(_bytes, table.values())),
                own_weights=sum(_bytes(weight) for offset, weight in table.items() if times[offset] == 1),
                why_not=why_not(variant),
            )
            for variant, table in zip(artifact.variants, tables, strict=True)
        ),
        metadata=metadata,
    )


def _bytes(weight: Weight) -> int:
    return math.prod(weight.shape) * np.dtype(weight.dtype).itemsize


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
