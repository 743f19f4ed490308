"""Which layers run how, and why: of a compiled module from its own report, of a model from the passes' decisions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from whet.progress import Progress, Silent
from whet.runtime.artifact import open_artifact

if TYPE_CHECKING:
    from whet.frontend.model import Model, Task
    from whet.passes.dialect import Pooling


RIVALS = 3
"""Candidates that a line about a layer names beside the chosen and the dense kernel."""


@dataclass(frozen=True)
class Explanation:
    """What becomes of a model."""

    source: str
    name: str
    task: str
    precision: str
    isa: str
    layers: tuple[Mapping[str, Any], ...]
    """The integer dense layers; fields as in ``whet.passes.choose_kernels.Choice``."""
    plain: tuple[str, ...]
    """Dense layers that stay float32, and why; known of models, not of compiled modules."""
    notes: tuple[str, ...]
    others: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    """The further instruction sets that a module has code for, with their layers, the fastest first."""

    def to_json(self) -> str:
        """The explanation as one JSON object."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        isas = ", ".join([self.isa, *self.others])
        lines = [
            f"{self.source}: {self.name}, {self.task}, {self.precision} for {isas}",
            *map(describe_layer, self.layers),
        ]
        if not self.layers:
            lines.append("  no integer layers")
        for isa, layers in self.others.items():
            lines += [f"for {isa}:", *map(describe_layer, layers)]
        lines += [f"  fp32: {line}" for line in self.plain]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def explain_module(path: str | PathLike[str]) -> Explanation:
    """Read the report that a compiled module carries. Raises as ``whet.runtime.artifact.open_artifact``."""
    m, *others = open_artifact(path).variants
    more = {other.isa: other.report for other in others}
    return Explanation(str(path), m.name, m.task, m.precision, m.isa, m.report, (), m.notes, more)


def explain_model(
    source: str | PathLike[str],
    *,
    isa: str = "host",
    task: Task | None = None,
    pooling: Pooling | None = None,
    tokenizer: str | None = None,
    sparsity: float = 0.0,
    block_rows: int = 4,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Import a model and decide about its layers as an int8 compilation would, without generating code.

    Arguments and errors are those of ``whet.compile``; needs the compiler.
    """
    from whet.compiler import import_model  # noqa: PLC0415 -- a module's own report needs no compiler
    from whet.host import host_isa  # noqa: PLC0415
    from whet.passes.choose_kernels import TYPICAL_TOKENS  # noqa: PLC0415
    from whet.passes.pipeline import Options, run_pipeline  # noqa: PLC0415
    from whet.passes.quantise import QuantisationConfig  # noqa: PLC0415
    from whet.schedules import isa as isas  # noqa: PLC0415

    progress = progress or Silent()
    target = host_isa() if isa == "host" else isas.isa(isa)
    with progress.phase("import"):
        model = import_model(source, task=task, pooling=pooling, tokenizer=tokenizer)
    layers: list[Mapping[str, Any]] = []
    plain: list[str] = []
    if model.dialect:
        options = Options(
            isas=(target,),
            max_length=model.max_length,
            quantisation=QuantisationConfig(method="minmax"),
            sparsity=sparsity,
            block_rows=block_rows,
            tokens=tokens or TYPICAL_TOKENS,
        )
        # The decisions depend on the weights alone, so one short request is calibration enough.
        request = [np.zeros(4, np.int64)]
        (compiled,) = run_pipeline(model.module, options, request, request, progress)
        layers = [asdict(choice) for choice in compiled.choices]
        plain = _plain(model.module)
    precision = "int8" if layers else "fp32"
    return Explanation(
        str(source), model.name, model.task, precision, target.name, tuple(layers), tuple(plain), _notes(model)
    )


def explain(source: str | PathLike[str], **options: Any) -> Explanation:
    """Explain a compiled module (``.so``, no options) or a model."""
    return explain_module(source) if Path(source).suffix == ".so" else explain_model(source, **options)


def _notes(model: Model) -> tuple[str, ...]:
    if model.dialect:
        return model.notes
    return ("The model was not recognised as an encoder: all of it runs as plain fp32 operators.", *model.notes)


def _plain(module: Any) -> list[str]:
    """Say which dense layers ``quantise`` will leave in float32, and why."""
    from whet.passes import dialect  # noqa: PLC0415
    from whet.passes.fuse_qkv import fuse_qkv  # noqa: PLC0415
    from whet.passes.graph import Graph, is_call  # noqa: PLC0415
    from whet.passes.quantise import why_float  # noqa: PLC0415

    graph = Graph(fuse_qkv(module))
    lines = []
    for binding in graph.bindings:
        if is_call(binding.value, dialect.DENSE) and (why := why_float(graph, binding.value)):
            rows, columns = dialect.shape_of(binding.value.args[1])
            lines.append(f"{binding.var.name} ({rows} × {columns}): {why}")
    return lines


def describe_layer(layer: Mapping[str, Any]) -> str:
    """One integer dense layer: its zeros, the kernel chosen, and how the candidates were judged."""
    kernel = layer["kernel"]
    cycles = layer["cycles"]
    others = sorted((name for name in cycles if name not in (kernel, "dense")), key=lambda name: cycles[name])[:RIVALS]
    if kernel != "dense":
        others = ["dense", *others]
    judged = ", ".join(f"{name} {cycles[name] / cycles[kernel]:.2f}×" for name in others)
    shape = f"{layer['out_features']} × {layer['in_features']}"
    return f"  {layer['layer']:32} {shape:>12} {layer['zeros']:6.1%} zeros → {kernel:12} ({judged})"
