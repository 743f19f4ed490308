"""What raising knows about the values of a graph that may be an encoder.

Raising (raise_encoder.py) is an abstract interpretation: it walks a straight-line graph of tensor operations and
keeps one *fact* per value. There are two worlds.

* Everything that follows from shapes, masks, ids and constants alone (masks, position ids, reshape targets, weights)
  is *known*: it is computed, at two *probes*. A probe is one concrete batch; the two differ in batch size, in length
  and in contents. What such a value means is decided by looking at its numbers ("0 where the mask is 1, below −1000
  where it is 0"), never by how the exporter wrote it. What is equal at both probes is a constant.
* Everything downstream of an embedding table stays symbolic: a *node* of the raised graph together with how its
  elements are laid out in the tensor (``axes``) and which element-wise functions were applied (``curve``: their values
  at sample points, so that every spelling of GELU is the same fact).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
PROBES = (0, 1)


class NotAnEncoder(ValueError):
    """The graph does something that the encoder dialect has no op for; the message says what."""


# ----------------------------------------------------------------------------------------------------------------- axes


@dataclass(frozen=True, eq=False)
class Axis:
    """An indivisible axis of a layout; ``sizes`` are its lengths at the two probes. Compared by identity."""

    name: str
    sizes: tuple[int, int]


Group: TypeAlias = tuple[Axis, ...]
"""The axes that one tensor dimension runs over, outermost first; ``()`` is a dimension of length 1."""


def size(group: Sequence[Axis], probe: int) -> int:
    """Length of a dimension at a probe."""
    return math.prod(axis.sizes[probe] for axis in group)


def sizes(group: Sequence[Axis]) -> tuple[int, int]:
    """Lengths of a dimension at both probes."""
    return size(group, 0), size(group, 1)


def channel_axis(length: int) -> Axis:
    """An axis over (a factor of) the channels."""
    return Axis("channel", (length, length))


def group(*axes: Axis) -> Group:
    """A dimension over these axes. Axes of length 1 are left out everywhere: such a dimension is ``()``."""
    return tuple(axis for axis in axes if axis.sizes != (1, 1))


# --------------------------------------------------------------------------------------------------------------- probes


@dataclass(frozen=True)
class Probes:
    """Two concrete batches. ``ids``, ``mask``, ``token_types``: one int64 ``(batch, sequence)`` array per probe."""

    batch: Axis
    token: Axis
    key: Axis
    """The token axis a second time: what attention scores are summed over."""
    ids: tuple[Array, Array]
    mask: tuple[Array, Array]
    token_types: tuple[Array, Array]

    @property
    def positions(self) -> tuple[Array, Array]:
        """The place of every token in its request."""
        first, last = (np.broadcast_to(np.arange(m.shape[1]), m.shape) for m in self.mask)
        return first, last

    @staticmethod
    def of(batch: int | None = None, sequence: int | None = None, pad: int = 0) -> Probes:
        """Probes for the given static sizes; ``None`` is a dynamic one, for which primes are taken."""
        batches = (3, 5) if batch is None else (batch, batch)
        lengths = (13, 11) if sequence is None else (sequence, sequence)
        ids, masks, types = [], [], []
        for probe, (b, s) in enumerate(zip(batches, lengths, strict=True)):
            random = np.random.default_rng(probe)
            valid = np.maximum(1, s - 2 * np.arange(probe, probe + b) % s)
            mask = (np.arange(s)[None] < valid[:, None]).astype(np.int64)
            masks.append(mask)
            ids.append(np.where(mask == 1, random.integers(5, 100, (b, s)), pad))
            types.append(random.integers(0, 2, (b, s)) * mask)
        return Probes(
            Axis("batch", batches),
            Axis("token", lengths),
            Axis("key", lengths),
            (ids[0], ids[1]),
            (masks[0], masks[1]),
            (types[0], types[1]),
        )


# ------------------------------------------------------------------------------------------------------------ constants


@dataclass(frozen=True)
class Integers:
    """The integers behind a dequantised constant: value = ``values * scale``, shapes broadcast."""

    values: Array
    scale: Array


@dataclass(frozen=True, eq=False)
class Known:
    """A value computed at the probes; one array if it is the same at both, which makes it a constant."""

    values: tuple[Array, ...]
    integers: Integers | None = None
    name: str = ""

    @staticmethod
    def of(values: Sequence[Array]) -> Known:
        """Merge what was computed at the probes."""
        first, last = values[0], values[-1]
        same = first.shape == last.shape and first.dtype == last.dtype and bool(np.array_equal(first, last))
        return Known((first,) if same else (first, last))

    @property
    def fixed(self) -> bool:
        """Whether the value is a constant."""
        return len(self.values) == 1

    def at(self, probe: int) -> Array:
        """The array at a probe."""
        return self.values[-1 if probe else 0]

    def constant(self, what: str) -> Array:
        """The array of a constant; ``what`` names it in the error."""
        if not self.fixed:
            raise NotAnEncoder(f"{what} depends on the inputs")
        return self.values[0]

    def transpose(self, order: Sequence[int] | None) -> Known:
        """A constant with its dimensions, and those of its integers, permuted (None: reversed)."""
        exact = self.integers
        if exact is not None:
            scale = exact.scale if exact.scale.ndim == 0 else exact.scale.transpose(order)
            exact = Integers(exact.values.transpose(order), scale)
        return Known((self.values[0].transpose(order),), exact, self.name)

    def scalar(self) -> float | None:
        """The number, if this is a constant with a single element."""
        return float(self.values[0].reshape(())) if self.fixed and self.values[0].size == 1 else None


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight ``(rows, columns)``: float32, or int8 with one float64 scale per row."""

    values: Array
    scale: Array | None = None

    @staticmethod
    def of(known: Known, what: str, *, transpose: bool) -> tuple[Matrix, str]:
        """Read a constant; keeps its integers when they fit into int8 and have one scale per row. Also says why not."""
        values = known.constant(what)
        if values.ndim != 2:
            raise NotAnEncoder(f"{what} has shape {values.shape}, expected two dimensions")
        why = ""
        if known.integers is not None:
            integers, scale = known.integers.values, np.broadcast_to(known.integers.scale, values.shape)
            integers, scale = (integers.T, scale.T) if transpose else (integers, scale)
            if not (scale == scale[:, :1]).all():
                why = f"{what} is quantised with a scale per input channel: its dequantised values are used"
            elif integers.min() < -128 or integers.max() > 127:
                low, high = integers.min(), integers.max()
                why = f"{what} minus its zero point is {low} to {high}, more than int8: its dequantised values are used"
            else:
                return Matrix(np.ascontiguousarray(integers, np.int8), scale[:, 0].astype(np.float64)), ""
        return Matrix(np.ascontiguousarray(values.T if transpose else values, np.float32)), why

    @staticmethod
    def table(known: Known, what: str) -> tuple[Matrix, str]:
        """Read an embedding table, which keeps its integers even if their zero point is far from the middle.

        They are shifted into int8: that adds the same number to all channels of a token, and the layer norm that
        follows subtracts it with the mean.
        """
        exact = known.integers
        if exact is not None and exact.values.max() - exact.values.min() < 256:
            low, high = int(exact.values.min()), int(exact.values.max())
            shift = 0 if low >= -128 and high <= 127 else (low + high + 1) // 2
            known = Known(known.values, Integers(exact.values - shift, exact.scale), known.name)
        return Matrix.of(known, what, transpose=False)

    def scaled(self, factor: Array | float) -> Matrix:
        """Every row times its ``factor``."""
        rows = np.broadcast_to(np.asarray(factor, np.float64), self.values.shape[:1])
        if (rows == 1).all():
            return self
        if self.scale is not None:
            return Matrix(self.values, self.scale * rows)
        return Matrix((self.values * rows[:, None]).astype(np.float32))

    def rows(self, index: Array) -> Matrix:
        """The given rows."""
        return Matrix(self.values[index], None if self.scale is None else self.scale[index])

    def dense(self) -> Array:
        """As float32."""
        if self.scale is None:
            return np.asarray(self.values, np.float32)
        return (self.values * self.scale[:, None]).astype(np.float32)


# -------------------------------------------------------------------------------------------- nodes of the raised graph


@dataclass(frozen=True, eq=False)
class Node:
    """A value of the raised graph: one column of ``channels`` numbers per token, or per request."""

    channels: int
    per_request: bool


@dataclass(frozen=True, eq=False)
class Rows(Node):
    """The sum of one row of each table; a table is read at the token's id, position or type."""

    word: Matrix | None = None
    position: Matrix | None = None
    token_type: Matrix | None = None


@dataclass(frozen=True, eq=False)
class Linear(Node):
    """``activation(weight · x + bias)``."""

    x: Node
    weight: Matrix
    bias: Array
    activation: str = "none"
    name: str = ""


@dataclass(frozen=True, eq=False)
class Norm(Node):
    """Layer norm."""

    x: Node
    gamma: Array
    beta: Array
    eps: float


@dataclass(frozen=True, eq=False)
class Centred(Node):
    """``x`` minus its mean over the channels: half of a layer norm, never emitted."""

    x: Node


@dataclass(frozen=True, eq=False)
class Op(Node):
    """Any other dialect op: ``name`` of the function in whet.passes.dialect, inputs and attributes."""

    name: str
    inputs: tuple[Node, ...]
    attrs: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, eq=False)
class Scale:
    """The scale of a quantised activation: a number, or unknown (computed at run time) and compared by identity."""

    value: float | None = None


@dataclass(frozen=True, eq=False)
class Scales:
    """A tensor that is the product of run-time scales and a constant."""

    scales: tuple[Scale, ...]
    factor: Array


class DontCare:
    """A value that only matters to arithmetic which raising leaves out, e.g. the zero point of an activation."""


@dataclass(frozen=True, eq=False)
class Laid:
    """A fact about a tensor whose dimensions run over ``axes``.

    ``unit``: the tensor holds its meaning divided by these scales (a quantised activation, or a product of two).
    """

    axes: tuple[Group, ...]
    unit: tuple[Scale, ...] = field(default=(), kw_only=True)

    def shape(self, probe: int) -> tuple[int, ...]:
        """The tensor's shape at a probe."""
        return tuple(size(group, probe) for group in self.axes)

    @property
    def flat(self) -> Group:
        """All axes, outermost first."""
        return tuple(axis for group in self.axes for axis in group)

    def along(self, known: Known, want: Group) -> tuple[Array, ...] | None:
        """``known``, broadcast to this tensor, as arrays over the axes ``want``; None if it varies along others."""
        found = []
        for probe in PROBES:
            try:
                full = np.broadcast_to(known.at(probe), self.shape(probe))
            except ValueError:
                return None
            full = full.reshape([axis.sizes[probe] for axis in self.flat])
            rest = list(self.flat)
            for axis in self.flat:
                if axis not in want:
                    place = rest.index(axis)
                    first = full.take([0], place)
                    if not np.array_equal(np.broadcast_to(first, full.shape), full):
                        return None
                    full = first.squeeze(place)
                    del rest[place]
            if len(rest) != sum(axis.sizes != (1, 1) for axis in want):
                return None
            full = full.transpose([rest.index(axis) for axis in want if axis in rest])
            found.append(full.reshape([axis.sizes[probe] for axis in want]))
        return tuple(found)


@dataclass(frozen=True, eq=False)
class Tokens(Laid):
    """The elements of ``node``.

    ``channels``: the factors of the channel axis, outermost first (heads and head size, say). ``curve``: element-wise
    functions applied since. ``weights``: ``(batch, sequence)`` arrays that multiply the tokens; if no token axis is
    left, the tokens were summed with them. ``hidden``: padding was overwritten with a very negative number.
    """

    node: Node
    channels: Group
    curve: Array | None = None
    weights: tuple[Array, ...] | None = None
    hidden: bool = False


@dataclass(frozen=True, eq=False)
class Scores(Laid):
    """``scale · Q·Kᵀ``: axes (batch), (heads), (token), (key). ``masked``: keys of padding were excluded."""

    q: Node
    k: Node
    heads: Group
    scale: float = 1.0
    masked: bool = False


@dataclass(frozen=True, eq=False)
class Probabilities(Laid):
    """The softmax of scores over the keys."""

    scores: Scores


@dataclass(frozen=True, eq=False)
class IsNaN(Laid):
    """Where the probabilities of a request without any token are NaN: nowhere, as Whet has no such request."""


@dataclass(frozen=True, eq=False)
class Moment(Laid):
    """A statistic over the channels of ``node``: ``max((statistic + shift) ** power, floor)``."""

    node: Node
    kind: Literal["mean", "variance", "square_sum"]
    shift: float = 0.0
    power: float = 1.0
    floor: float = 0.0


Fact: TypeAlias = Known | Laid | Scales | DontCare
L = TypeVar("L", bound=Laid)


# --------------------------------------------------------------------------------------------------------------- layout


def transpose(value: L, order: Sequence[int]) -> L:
    """Permute the dimensions."""
    return replace(value, axes=tuple(value.axes[i] for i in order))


def squeeze(value: L, dims: Sequence[int]) -> L:
    """Drop dimensions of length 1."""
    dims = [d % len(value.axes) for d in dims]
    if any(sizes(value.axes[d]) != (1, 1) for d in dims):
        raise NotAnEncoder(f"squeezes dimensions {dims} of shape {value.shape(0)}")
    return replace(value, axes=tuple(g for d, g in enumerate(value.axes) if d not in dims))


def unsqueeze(value: L, dims: Sequence[int]) -> L:
    """Insert dimensions of length 1 at the given places of the result."""
    rank = len(value.axes) + len(dims)
    places = {d % rank for d in dims}
    rest = iter(value.axes)
    return replace(value, axes=tuple(() if d in places else next(rest) for d in range(rank)))


def reshape(value: L, target: tuple[tuple[int, ...], tuple[int, ...]]) -> L:
    """Regroup the axes to a shape given at both probes (no −1, no 0); splits the channel axis where that is needed."""
    rest = list(value.flat)
    split: dict[Axis, Group] = {}
    groups: list[Group] = []
    if len(target[0]) != len(target[1]):
        raise NotAnEncoder(f"reshapes to {target[0]} or {target[1]} depending on the input")
    for want in zip(*target, strict=True):
        taken: list[Axis] = []
        while sizes(taken) != want:
            if not rest:
                raise NotAnEncoder(f"reshapes {value.shape(0)} to {target[0]}")
            have, axis = sizes(taken), rest.pop(0)
            room = want[0] // have[0]
            fits = all(n >= h * s for n, h, s in zip(want, have, axis.sizes, strict=True))
            if not fits:
                length = axis.sizes[0]
                if axis.name != "channel" or want[0] % have[0] or want[1] != have[1] * room or length % room:
                    raise NotAnEncoder(f"reshapes {value.shape(0)} to {target[0]}")
                outer, inner = channel_axis(room), channel_axis(length // room)
                split[axis] = (outer, inner)
                rest.insert(0, inner)
                axis = outer
            taken.append(axis)
        groups.append(tuple(taken))
    if rest:
        raise NotAnEncoder(f"reshapes {value.shape(0)} to {target[0]}")
    value = replace(value, axes=tuple(groups))
    return _resplit(value, split)


def _resplit(value: L, split: dict[Axis, Group]) -> L:
    """Replace split axes where the fact lists its channels; an inner factor may have been split again."""

    def expand(group: Group) -> Group:
        return tuple(a for axis in group for a in (expand(split[axis]) if axis in split else (axis,)))

    if isinstance(value, Tokens):
        return replace(value, channels=expand(value.channels))
    if isinstance(value, Scores):
        return replace(value, heads=expand(value.heads))
    if isinstance(value, Probabilities):
        return replace(value, scores=replace(value.scores, heads=expand(value.scores.heads)))
    return value


# --------------------------------------------------------------------------------------------------------------- curves

GRID: Array = np.concatenate([[0.0, 1.0], np.linspace(-6, 6, 241)])
"""Where element-wise functions are sampled."""

erf: Callable[[Array], Array] = np.vectorize(math.erf, otypes=[np.float64])
_tanh_gelu = 0.5 * GRID * (1 + np.tanh(math.sqrt(2 / math.pi) * (GRID + 0.044715 * GRID**3)))

CURVES: dict[str, Array] = {
    "gelu": 0.5 * GRID * (1 + erf(GRID / math.sqrt(2))),
    "gelu_tanh": _tanh_gelu,
    "relu": np.maximum(GRID, 0),
    "tanh": np.tanh(GRID),
}
"""The activations of the dialect."""


def activation_of(curve: Array) -> str | None:
    """The activation with these samples. The two GELUs differ by 5e-4; float16 constants by less than 1e-4."""
    return next((name for name, samples in CURVES.items() if np.allclose(curve, samples, rtol=0, atol=1e-4)), None)


def affine_of(curve: Array) -> tuple[float, float] | None:
    """``(a, b)`` if the samples are those of ``a · x + b``."""
    b = float(curve[0])
    a = float(curve[1]) - b
    return (a, b) if np.allclose(curve, a * GRID + b, rtol=1e-9, atol=1e-12) else None
