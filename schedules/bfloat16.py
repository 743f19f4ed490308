"""bfloat16, the upper half of float32, in NumPy, which has no type for it: its bits are uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32, which must be finite, to bfloat16, halves to even; the shape stays."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the values as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return what is left of float32 values in bfloat16."""
    return from_bits(to_bits(values))
