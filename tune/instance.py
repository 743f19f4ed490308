"""Kernel instances, the tasks of tuning: what is computed, for which instruction set, on weights of which density."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from whet.schedules.attention import AttentionKnobs, AttentionSpec, attention
from whet.schedules.dense import BLOCKS, DenseSpec, dense, family_of
from whet.schedules.gemm import Blocking
from whet.schedules.isa import TILE, Isa, isa

Spec: TypeAlias = "DenseSpec | AttentionSpec"
Knobs: TypeAlias = "Blocking | AttentionKnobs"

TOKENS = (16, 32, 128, 384)
"""Tokens that a kernel is timed with; kernels serve any number, so their knobs must suit all of these."""

DENSITY_STEP = 0.05
"""Densities are rounded to this: layers that differ by less are one task."""

_SPECS: dict[str, type[Any]] = {"dense": DenseSpec, "attention": AttentionSpec}


@dataclass(frozen=True)
class Instance:
    """A kernel that can be tuned; equal instances of two models are one task.

    ``density`` is the share of the blocks of a sparse layer that hold anything, rounded; 1 for all others.
    """

    spec: Spec
    isa: str
    density: float = 1.0

    @staticmethod
    def of(spec: Spec, target: Isa, density: float = 1.0) -> Instance:
        """Return the instance that a layer belongs to."""
        if not isinstance(spec, DenseSpec) or spec.weight not in BLOCKS:
            density = 1.0
        return Instance(spec, target.name, max(DENSITY_STEP, round(round(density / DENSITY_STEP) * DENSITY_STEP, 2)))

    @property
    def op(self) -> str:
        """``"dense"`` or ``"attention"``."""
        return next(name for name, cls in _SPECS.items() if isinstance(self.spec, cls))

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token counts that it is timed with: whole tiles, at most the longest request of an attention."""
        limit = self.spec.max_length if isinstance(self.spec, AttentionSpec) else max(TOKENS)
        return tuple(t for t in TOKENS if t <= limit) or (TILE,)

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which ``from_json`` makes an equal instance."""
        return {"op": self.op, "spec": asdict(self.spec), "isa": self.isa, "density": self.density}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Instance:
        """Read what ``to_json`` wrote; ValueError, KeyError or TypeError if it is anything else."""
        return Instance(_SPECS[value["op"]](**value["spec"]), isa(value["isa"]).name, float(value["density"]))

    def knobs(self, values: dict[str, int]) -> Knobs:
        """Knobs of this kernel's family from their values by name."""
        return type(self.default_knobs())(**values)

    def default_knobs(self) -> Knobs:
        """What an untuned compilation takes."""
        target = isa(self.isa)
        if isinstance(self.spec, AttentionSpec):
            return AttentionKnobs.default(self.spec, target)
        knobs: Blocking = family_of(self.spec, target).default_knobs(self.spec, target)
        return knobs

    def __str__(self) -> str:
        if isinstance(self.spec, AttentionSpec):
            return f"attention {self.spec.precision} {self.spec.heads} heads × {self.spec.head_size}"
        spec = self.spec
        blocks = f" {spec.block_rows}x{spec.block_columns} {self.density:.0%}" if spec.weight in BLOCKS else ""
        more = (
            [spec.activation] * (spec.activation != "none")
            + ["residual"] * spec.residual
            + ["per token"] * spec.per_token
        )
        parts = [spec.weight.removesuffix("_sparse").replace("_", " ") + blocks, *more, f"→ {spec.output}"]
        return f"dense {spec.out_features} × {spec.in_features} {' '.join(parts)}"


def key(instance: Instance) -> str:
    """The instance as one line of JSON, the same for equal instances."""
    return json.dumps(instance.to_json(), sort_keys=True)


def generate(instance: Instance, knobs: Knobs) -> Any:
    """Generate the kernel (a PrimFunc). ValueError if it can't be made with these knobs."""
    target = isa(instance.isa)
    if isinstance(instance.spec, AttentionSpec):
        assert isinstance(knobs, AttentionKnobs)
        return attention(instance.spec, target, knobs)
    assert isinstance(knobs, Blocking)
    return dense(instance.spec, target, knobs).func
