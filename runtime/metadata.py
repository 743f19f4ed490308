"""What a compiled module says about itself: the JSON document in its section ``.whet.metadata``.

A file holds the code for one instruction set, or variants of it for several. The document is an object with the fields
of :class:`Metadata`; where the variants differ the fields stand in the objects of a list ``"variants"`` instead, the
fastest first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

FORMAT = 4
"""Format of the artefact; a runtime reads exactly the one it was written for."""

ALIGNMENT = 64
"""Every weight starts at a multiple of this in the blob; compiled code loads whole cache lines."""


class ArtifactError(ValueError):
    """A file that is not a usable compiled module; the message says why and what to do."""


@dataclass(frozen=True)
class Output:
    """Shape of what ``main`` returns: one column of ``channels`` values per token or per request."""

    per: str
    channels: int

    def __post_init__(self) -> None:
        if self.per not in ("token", "request"):
            raise ValueError(f"output.per is {self.per!r}; expected 'token' or 'request'")


@dataclass(frozen=True)
class Records:
    """What a module's records of attention hold, see whet.schedules.attention_memoized."""

    identity: str
    """Of the weights and scales that the probabilities follow from; hexadecimal."""
    layers: int
    heads: int
    dimensions: int
    """Of the keys by which they are found, see whet.schedules.nearest_record."""

    def size(self, length: int) -> int:
        """Bytes of the record of a request of so many tokens."""
        return self.layers * self.heads * -(-length // 16) * -(-length // 4) * 64


@dataclass(frozen=True)
class Weight:
    """One row of the weights table: a contiguous array at ``offset`` bytes into the weights blob."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Metadata:
    """Everything a runtime has to know about a module, or about one variant of its code."""

    whet: str
    tvm_ffi: str
    name: str
    task: str
    convention: str
    """``"packed"``: the function entry(ids, positions, token_types, segments, weights, workspace, out), where weights
    is the blob and workspace is scratch memory, both uint8. ``"recorded"``: the same with the addresses of records,
    int64 ``(groups, 16, 2)``, after segments; the functions ``{entry}_key`` and ``{entry}_nearest`` find these.
    ``"padded"``: a Relax VM executable with main(*inputs, weights), int64 ``(batch, sequence)`` inputs and a tuple of
    weights."""
    inputs: tuple[str, ...]
    vocab_size: int
    max_length: int
    type_vocab_size: int
    pad_token_id: int
    labels: tuple[str, ...]
    multi_label: bool
    """Whether classification scores are sigmoids, one by one, instead of a softmax."""
    output: Output
    precision: str
    isa: str
    cpu_flags: tuple[str, ...]
    """Flags, named as in ``/proc/cpuinfo``, without which the code must not run."""
    max_tokens: int
    """Most packed tokens a single call takes."""
    exits: tuple[int, ...] = ()
    """After how many layers requests may be answered, the last number being all; empty without caches. With them the
    code writes two more channels, see ``whet.passes.dialect.settle``, and reads the weight ``exits.…``, which it is
    fine to change in a session's own memory: float32 ``(2, caches)``, the caches' layers and thresholds."""
    allowed_loss: float = 0.0
    """Mean over all requests of ``whet.runtime.audit.expected_loss`` above which audits raise thresholds."""
    budget: float = 0.0
    """What they then bring it down to."""
    leave: tuple[float, ...] = ()
    """Shares of requests that leave at each of ``exits`` as long as they are like those that caches were fitted to."""
    entry: str = "main"
    """Name of the function that runs the model."""
    workspace_per_tile: int = 0
    workspace_per_group: int = 0
    """Bytes of scratch memory that a packed ``main`` wants for each tile of tokens and each group of requests. There
    must be no more groups than tiles, which follows where every request but unused entries of the last group has
    tokens."""
    weights: tuple[Weight, ...] = ()
    report: tuple[Mapping[str, Any], ...] = ()
    """One entry per layer: what was chosen, and why."""
    notes: tuple[str, ...] = ()
    records: Records | None = None
    """With the convention ``"recorded"``."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.convention not in ("packed", "recorded", "padded"):
            raise ValueError(f"convention is {self.convention!r}; expected 'packed', 'recorded' or 'padded'")
        for name in ("vocab_size", "max_length", "type_vocab_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.max_tokens < self.max_length:
            raise ValueError(
                f"max_tokens is {self.max_tokens}, less than max_length {self.max_length}: the longest request must fit"
            )


def to_json(variants: Sequence[Metadata]) -> str:
    """Write the document, indented: ``strings model.so`` shows it."""
    documents = [asdict(variant) for variant in variants]
    shared = {k: v for k, v in documents[0].items() if all(document[k] == v for document in documents)}
    if len(documents) > 1:
        shared["variants"] = [{k: v for k, v in d.items() if k not in shared} for d in documents]
    return json.dumps(shared, indent=1, ensure_ascii=False)


def from_json(text: str | bytes) -> tuple[Metadata, ...]:
    """Parse the document; one entry per variant.

    Raises:
        ArtifactError: it is not JSON, lacks a field, or has another format version.

    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"the metadata is not JSON ({error}); the file is corrupt: copy it again") from error
    if not isinstance(document, dict):
        raise ArtifactError("the metadata is not a JSON object; the file is corrupt: copy it again")
    if document.get("format") != FORMAT:
        raise ArtifactError(
            f"the module has format {document.get('format')!r} (written by whet {document.get('whet', '?')}), this "
            f"runtime reads format {FORMAT}: compile the model again, or install the whet that wrote it"
        )
    variants = document.get("variants", [{}])
    if not isinstance(variants, list) or not variants or not all(isinstance(v, dict) for v in variants):
        raise ArtifactError("the metadata is malformed (variants is no list of objects); compile the model again")
    return tuple(_parse({**document, **variant}) for variant in variants)


def _parse(document: dict[str, Any]) -> Metadata:
    missing = sorted(f.name for f in fields(Metadata) if f.name not in document and f.default is MISSING)
    if missing:
        raise ArtifactError(f"the metadata lacks {', '.join(missing)}; compile the model again")
    known = {f.name: document[f.name] for f in fields(Metadata) if f.name in document}
    try:
        known["output"] = Output(**known["output"])
        if known.get("records") is not None:
            known["records"] = Records(**known["records"])
        known["weights"] = tuple(Weight(**{**w, "shape": tuple(w["shape"])}) for w in known.get("weights", ()))
        for name in ("inputs", "labels", "cpu_flags", "exits", "leave", "report", "notes"):
            known[name] = tuple(known.get(name, ()))
        return Metadata(**known)
    except (TypeError, KeyError, ValueError) as error:
        raise ArtifactError(f"the metadata is malformed ({error}); compile the model again") from error
