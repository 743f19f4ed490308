"""The search space of a kernel instance: values of each knob, and which of their combinations make a good kernel.

Only what can't pay is left out: combinations that need more registers than there are, and units of parallel work so
large that a machine with several cores could not share a layer, however well they do on the one core that measures.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from whet.schedules import amx, dense_amx, expanded_amx, paired_i8, sparse_channel_i8, sparse_i8, sparse_low_i8
from whet.schedules.attention import AttentionKnobs, AttentionSpec
from whet.schedules.dense import DenseSpec, family_of
from whet.schedules.isa import Isa, isa
from whet.tune.instance import Instance, Knobs

UNITS = 4
"""Units of parallel work that a layer is cut into at least, unless the default is fewer."""

ON_TILES = (dense_amx, expanded_amx)
"""Families whose accumulators are the tile registers of AMX."""


@dataclass(frozen=True)
class Space:
    """``choices`` are the values of each knob, in the order of the knobs' dataclass."""

    instance: Instance
    choices: dict[str, tuple[int, ...]]

    def accepts(self, values: dict[str, int]) -> bool:
        """Whether a kernel should be made with these values. The defaults always are."""
        default = self.instance.default_knobs()
        if values == asdict(default):
            return True
        try:
            knobs = self.instance.knobs(values)
        except ValueError:
            return False
        target = isa(self.instance.isa)
        if isinstance(knobs, AttentionKnobs):
            return knobs.accumulators + knobs.queries < target.registers * 2
        assert isinstance(self.instance.spec, DenseSpec)
        if knobs.chunk < knobs.rows:
            return False  # the same kernel as chunk == rows
        if family_of(self.instance.spec, target) in ON_TILES:
            across = knobs.rows // amx.ROWS
            return across * knobs.tiles + across + knobs.tiles <= amx.REGISTERS
        if isinstance(knobs, sparse_i8.SparseBlocking) and knobs.tiles == 1 and knobs.reach:
            return False  # the same kernel as reach == 0
        return knobs.rows * knobs.tiles * target.parts < target.registers

    def __iter__(self) -> Iterator[dict[str, int]]:
        """Every setting that is accepted."""
        for values in itertools.product(*self.choices.values()):
            setting = dict(zip(self.choices, values, strict=True))
            if self.accepts(setting):
                yield setting


def space(instance: Instance) -> Space:
    """Return the search space of an instance; it holds the default knobs."""
    target, default = isa(instance.isa), instance.default_knobs()
    if isinstance(instance.spec, AttentionSpec):
        choices = {"queries": (1, 2, 3, 4), "accumulators": (4, 8, 12, 16, 24, 32), "unit": (1, 2, 4, 8, 16, 32)}
    else:
        choices = _dense(instance.spec, target, default)
    return Space(instance, {name: tuple(sorted({*choices[name], value})) for name, value in asdict(default).items()})


def _dense(spec: DenseSpec, target: Isa, default: Knobs) -> dict[str, tuple[int, ...]]:
    largest = max(spec.out_features // UNITS, 1)
    chunks = tuple(c for c in (16, 32, 48, 64, 96, 128, 192, 256, 384, 512) if c <= largest)
    family = family_of(spec, target)
    if family in ON_TILES:
        return {"rows": (16, 32, 48), "tiles": (1, 2, 3), "chains": (1,), "chunk": chunks}
    if family is paired_i8:
        highest = spec.block_rows if spec.weight == "i8_sparse" else 8
        return {
            "rows": tuple(r for r in (1, 2, 4, 8) if r <= highest),
            "tiles": (1, 2, 4),
            "chains": (1,),
            "chunk": chunks,
        }
    tiles: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8)
    rows: tuple[int, ...] = (2, 4, 6, 8, 12, 16, 24)
    if family is sparse_channel_i8:
        rows, tiles = (4,), tuple(t for t in tiles if t * target.parts <= sparse_channel_i8.COLUMNS)
    elif family is sparse_low_i8:
        rows = tuple(r for r in (1, 2, 4, 8) if r % spec.block_rows == 0)
    elif family is sparse_i8:
        return {
            "rows": tuple(r for r in (4, 8, 16) if spec.block_rows % r == 0),
            "tiles": (1, 2, 3, 4, 5, 6),
            "chains": (8, 16),
            "chunk": tuple(c for c in chunks if c & (c - 1) == 0),
            "ahead": (1024, 2048, 4096),
            "reach": (0, sparse_i8.STEPS_AHEAD),
            "unroll": (1, 2),
        }
    return {"rows": rows, "tiles": tiles, "chains": (4, 8, 16, 24), "chunk": chunks}
