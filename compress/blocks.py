"""Blocks of R output × 4 input channels.

A weight is float ``(N, K)``, as ``torch.nn.Linear`` has it. Block scores and masks are ``(N / R, K / 4)``. The
compiler's sparse kernels skip these blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Pooling: TypeAlias = Literal["mean", "max"]

ROWS = (1, 2, 4, 8, 16)
COLUMNS = 4
"""Input channels of a block: what one VNNI instruction multiplies."""


@dataclass(frozen=True)
class Block:
    """A shape of blocks; prints as ``4x4``."""

    rows: int

    @classmethod
    def parse(cls, text: str) -> Block:
        """Read ``"4x4"``; ValueError names the shapes that there are."""
        match = re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)", text.strip())
        if match is None or int(match[1]) not in ROWS or int(match[2]) != COLUMNS:
            raise ValueError(f"block is {text!r}; expected one of {', '.join(f'{r}x{COLUMNS}' for r in ROWS)}")
        return cls(int(match[1]))

    def __str__(self) -> str:
        return f"{self.rows}x{COLUMNS}"

    def divides(self, weight: Tensor) -> bool:
        """Whether whole blocks cover the weight."""
        return not (weight.shape[0] % self.rows or weight.shape[1] % COLUMNS)

    def view(self, weight: Tensor) -> Tensor:
        """The weight as ``(N / R, R, K / 4, 4)``."""
        rows, columns = weight.shape
        return weight.reshape(rows // self.rows, self.rows, columns // COLUMNS, COLUMNS)

    def pool(self, scores: Tensor, pooling: Pooling) -> Tensor:
        """One score per block of scores per weight, ``(N, K)`` to ``(N / R, K / 4)``."""
        blocks = self.view(scores)
        return blocks.mean(dim=(1, 3)) if pooling == "mean" else blocks.amax(dim=(1, 3))

    def expand(self, keep: Tensor) -> Tensor:
        """A mask per weight of a mask per block, ``(N / R, K / 4)`` to ``(N, K)``."""
        return keep.repeat_interleave(self.rows, 0).repeat_interleave(COLUMNS, 1)

    def held(self, weight: Tensor) -> Tensor:
        """Which blocks hold anything but zeros."""
        return (self.view(weight) != 0).any(dim=3).any(dim=1)
