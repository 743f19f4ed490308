"""What each tensor operation does to the facts of raise_facts.py: one small rule per operation.

Every rule takes facts and gives the fact of the result, or raises NotAnEncoder with the reason. Rules are independent
of the file format: a frontend walks its graph, computes what is known at the probes, and calls them for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from .raise_facts import (
    GRID,
    PROBES,
    Array,
    Centred,
    DontCare,
    Fact,
    Group,
    Integers,
    IsNaN,
    Known,
    Laid,
    Linear,
    Matrix,
    Moment,
    Node,
    Norm,
    NotAnEncoder,
    Op,
    Probabilities,
    Probes,
    Rows,
    Scale,
    Scales,
    Scores,
    Tokens,
    activation_of,
    affine_of,
    channel_axis,
    group,
    sizes,
)

NEGLIGIBLE = -1000.0
"""A score this far below the others has probability 0 in float32 (exporters add −10000, the lowest float, or −inf)."""


class Rules:
    """The rules, with the probes they look at."""

    def __init__(self, probes: Probes) -> None:
        self.probes = probes
        self._notes: list[str] = []
        self._dequantised: list[str] = []
        self._settled: dict[tuple[Node, int, int], tuple[Tokens, Node]] = {}

    def note(self, text: str) -> None:
        """Remember a sentence once."""
        if text not in self._notes:
            self._notes.append(text)

    @property
    def notes(self) -> list[str]:
        """What a user should know, one sentence each; weights that could not stay integers share one."""
        if not self._dequantised:
            return self._notes
        more = len(self._dequantised) - 1
        return [*self._notes, self._dequantised[0] + (f" (so are those of {more} more)." if more else ".")]

    def _weight(self, read: tuple[Matrix, str]) -> Matrix:
        matrix, why = read
        if why and why not in self._dequantised:
            self._dequantised.append(why)
        return matrix

    # ------------------------------------------------------------------------------------------------------- embeddings

    def lookup(self, table: Known, index: Known) -> Tokens | None:
        """Rows of a table ``(rows, channels)`` at token ids, positions or types. None: ``index`` is none of these."""
        matrix = self._weight(Matrix.table(table, table.name or "an embedding table"))
        batch, token = self.probes.batch, self.probes.token
        rank = max(v.ndim for v in index.values)
        axes = ((), group(batch), group(token))[3 - rank :] if rank in (1, 2) else None
        if axes is None or any(index.at(p).shape[-1] != token.sizes[p] for p in PROBES):
            return None
        if rank == 2 and all(index.at(p).shape[0] == 1 for p in PROBES):
            axes = ((), group(token))
        try:
            found = [np.broadcast_to(index.at(p), (batch.sizes[p], token.sizes[p])) for p in PROBES]
        except ValueError:
            return None
        valid = [self.probes.mask[p] == 1 for p in PROBES]

        def equals(wanted: Sequence[Array]) -> bool:
            return all(np.array_equal(found[p][valid[p]], wanted[p][valid[p]]) for p in PROBES)

        first = int(found[0][0, 0])
        places = self.probes.positions
        channels = matrix.values.shape[1]
        if equals(self.probes.ids):
            node = Rows(channels, False, word=matrix)
        elif equals(self.probes.token_types):
            node = Rows(channels, False, token_type=matrix)
        elif first >= 0 and equals([place + first for place in places]):
            node = Rows(channels, False, position=matrix.rows(np.arange(first, matrix.values.shape[0])))
        elif 0 <= first < matrix.values.shape[0] and equals([np.full_like(place, first) for place in places]):
            node = Rows(channels, False, token_type=matrix.rows(np.array([first])))
        else:
            return None
        return self.tokens(node, axes)

    def tokens(self, node: Node, axes: tuple[Group, ...]) -> Tokens:
        """The elements of ``node`` with the channels as the last dimension."""
        last = group(channel_axis(node.channels))
        return Tokens((*axes, last), node=node, channels=last)

    # --------------------------------------------------------------------------------------------------------- settling

    def settle(self, x: Fact) -> Tokens:
        """The same value with nothing pending: activation, scale and pooling become nodes."""
        if not isinstance(x, Tokens):
            raise NotAnEncoder(f"uses {describe(x)} as if it were hidden states")
        if x.unit or x.hidden:
            raise NotAnEncoder("uses " + ("hidden states with padding overwritten" if x.hidden else describe(x)))
        if x.curve is None and x.weights is None and not isinstance(x.node, Centred):
            return x
        # One node per value, however often it is used: layer norm is recognised by the identity of its input.
        key = (x.node, id(x.curve), id(x.weights))
        if key not in self._settled:
            self._settled[key] = (x, self._settled_node(x))
        return replace(x, node=self._settled[key][1], curve=None, weights=None)

    def _settled_node(self, x: Tokens) -> Node:
        node = x.node
        if x.curve is not None:
            kind, affine = activation_of(x.curve), affine_of(x.curve)
            if affine is not None:
                node = fold(node, *affine)
            elif kind is None:
                raise NotAnEncoder("applies an element-wise function that is none of gelu, gelu_tanh, relu, tanh")
            elif isinstance(node, Linear) and node.activation == "none":
                node = replace(node, activation=kind)
            else:
                node = Op(node.channels, node.per_request, "activate", (node,), {"kind": kind})
        if x.weights is not None:
            node = self._pooled(x, node)
        if isinstance(node, Centred):
            raise NotAnEncoder("subtracts the mean of the channels without dividing by their deviation")
        return node

    def _pooled(self, x: Tokens, node: Node) -> Node:
        assert x.weights is not None
        mask = self.probes.mask
        if self.probes.token in x.flat:
            if all(np.allclose(w[m == 1], 1) for w, m in zip(x.weights, mask, strict=True)):
                return node  # padding was zeroed, which packed tokens don't have
            raise NotAnEncoder("multiplies tokens by weights that are not the attention mask")
        counts = [m.sum(1, keepdims=True) for m in mask]
        cls = [np.arange(m.shape[1])[None] == np.zeros((m.shape[0], 1)) for m in mask]

        def equals(wanted: Sequence[Array]) -> bool:
            return all(np.allclose(w, v, rtol=1e-5, atol=1e-7) for w, v in zip(x.weights or (), wanted, strict=True))

        if equals([m / c for m, c in zip(mask, counts, strict=True)]):
            mode = "mean"
        elif equals(cls):
            mode = "cls"
        elif equals([np.full(m.shape, 1 / m.shape[1]) for m in mask]):
            mode = "mean"
            self.note("The source averages over padding too; here a request is averaged over its own tokens.")
        else:
            raise NotAnEncoder("pools tokens in a way that is neither mean, first token nor maximum")
        return Op(node.channels, True, "pool", (node,), {"mode": mode})

    # ----------------------------------------------------------------------------------------------------- element-wise

    def unary(self, x: Fact, function: Callable[[Array], Array], name: str) -> Fact:
        """An element-wise function given as a NumPy function."""
        if isinstance(x, Moment):
            return self._power(x, {"Sqrt": 0.5, "Reciprocal": -1.0}.get(name))
        if not isinstance(x, Tokens):
            raise NotAnEncoder(f"applies {name} to {describe(x)}")
        if x.unit or x.weights is not None:
            x = self.settle(x)
        with np.errstate(all="ignore"):
            return replace(x, curve=np.asarray(function(GRID if x.curve is None else x.curve)))

    def power(self, x: Fact, exponent: Known) -> Fact:
        """``x ** exponent`` for a constant exponent."""
        value = exponent.scalar()
        if value is None:
            raise NotAnEncoder("raises to a power that is not a constant number")
        if isinstance(x, Moment):
            return self._power(x, value)
        return self.unary(x, lambda v: v**value, "Pow")

    def _power(self, x: Moment, exponent: float | None) -> Moment:
        if exponent is None or x.floor:
            raise NotAnEncoder(f"applies an element-wise function to {describe(x)}")
        return replace(x, power=x.power * exponent)

    def clip(self, x: Fact, low: Known | None, high: Known | None) -> Fact:
        """Limit to a range of constants."""
        ends = [None if end is None else end.scalar() for end in (low, high)]
        if any(end is not None and value is None for end, value in zip((low, high), ends, strict=True)):
            raise NotAnEncoder("clips to limits that are not constant numbers")
        if isinstance(x, Moment):
            if ends[0] is None or (ends[1] is not None and ends[1] < 1e30):
                raise NotAnEncoder(f"clips {describe(x)}")
            return replace(x, floor=ends[0])
        return self.unary(x, lambda v: np.clip(v, ends[0], ends[1]), "Clip")

    def add(self, x: Fact, y: Fact) -> Fact:
        """Element-wise sum."""
        if isinstance(x, Known):
            x, y = y, x
        if isinstance(y, Known):
            return self._add_known(x, y)
        if isinstance(x, Tokens) and isinstance(y, Tokens):
            if x.node is y.node and (x.curve is not None or y.curve is not None) and x.axes == y.axes:
                return replace(x, curve=_curve(x) + _curve(y))
            return self._add_tokens(self.settle(x), self.settle(y))
        raise NotAnEncoder(f"adds {describe(x)} and {describe(y)}")

    def _add_known(self, x: Fact, y: Known) -> Fact:
        value = y.scalar()
        if isinstance(x, Moment) and value is not None:
            return replace(x, shift=x.shift + value) if x.power == 1 else x if abs(value) < 1e-5 else _fail(x, "shifts")
        if isinstance(x, Scores):
            return self.mask_scores(x, y)
        if not isinstance(x, Tokens):
            raise NotAnEncoder(f"adds a constant to {describe(x)}")
        if x.unit:
            value, unit = None, unit_of(x)
            y = Known(tuple(v * unit for v in y.values), name=y.name)
        if value is not None and x.node.channels > 1:
            return replace(x, curve=_curve(x) + value)
        per_channel = x.along(y, x.channels) if y.fixed else None
        if per_channel is None:
            return self._add_position(x, y)
        x = x if x.unit and x.curve is None else self.settle(x)
        return replace(x, node=fold(x.node, 1.0, per_channel[0].reshape(-1), y.name))

    def _add_position(self, x: Tokens, y: Known) -> Tokens:
        """Position embeddings that an export with a static length folded to one constant."""
        rows = x.along(y, (self.probes.token, *x.channels)) if y.fixed and isinstance(x.node, Rows) else None
        if rows is None:
            raise NotAnEncoder("adds an array that is neither a bias, a mask nor a position embedding")
        table = rows[0].reshape(rows[0].shape[0], -1).astype(np.float32)
        return self._add_tokens(x, replace(x, node=Rows(x.node.channels, False, position=Matrix(table))))

    def _add_tokens(self, x: Tokens, y: Tokens) -> Tokens:
        if isinstance(x.node, Rows) and isinstance(y.node, Rows):
            x, y = (x, y) if len(x.flat) >= len(y.flat) else (y, x)
            node: Node = merge(x.node, y.node)  # type: ignore[arg-type]
        elif same_layout(x, y):
            node = Op(x.node.channels, x.node.per_request, "add", (x.node, y.node))
        else:
            raise NotAnEncoder(f"adds values of shapes {x.shape(0)} and {y.shape(0)} that are laid out differently")
        return replace(x, node=node)

    def mul(self, x: Fact, y: Fact) -> Fact:
        """Element-wise product."""
        if isinstance(x, Known | Scales) and not isinstance(y, Known):
            x, y = y, x
        if isinstance(x, Scales):
            factor = y.scales if isinstance(y, Scales) else ()
            if isinstance(y, Scales | Known):
                return Scales(
                    x.scales + factor, x.factor * (y.factor if isinstance(y, Scales) else y.constant("scale"))
                )
        if isinstance(y, Scales) and isinstance(x, Laid):
            return self._rescale(x, y)
        if isinstance(y, Known):
            return self._mul_known(x, y)
        if isinstance(x, Tokens) and isinstance(y, Moment):
            return self._normalise(x, y)
        if isinstance(x, Moment) and isinstance(y, Tokens):
            return self._normalise(y, x)
        if isinstance(x, Tokens) and isinstance(y, Tokens) and x.node is y.node and x.axes == y.axes:
            if x.weights is not None or y.weights is not None:
                x = y = self.settle(x)
            return replace(x, curve=_curve(x) * _curve(y))
        raise NotAnEncoder(f"multiplies {describe(x)} and {describe(y)}")

    def _rescale(self, x: Laid, by: Scales) -> Fact:
        if sorted(map(id, x.unit)) != sorted(map(id, by.scales)):
            raise NotAnEncoder(f"multiplies {describe(x)} by the scale of another value")
        return self._leave_unit(replace(x, unit=()), Known((by.factor,)))

    def _leave_unit(self, x: Laid, factor: Known) -> Fact:
        """``factor · x`` where the factor holds the scale of a weight: it goes there rather than into a curve."""
        if all(np.allclose(v, 1, rtol=1e-6, atol=0) for v in factor.values):
            return x  # a product of activations; what is left is float32 rounding
        per_channel = x.along(factor, x.channels) if isinstance(x, Tokens) and factor.fixed else None
        if isinstance(x, Tokens) and isinstance(x.node, Linear) and per_channel is not None:
            return replace(x, node=fold(x.node, np.broadcast_to(per_channel[0].reshape(-1), x.node.channels), 0.0))
        return self._mul_known(x, factor)

    def _mul_known(self, x: Fact, y: Known) -> Fact:
        if isinstance(x, Laid) and x.unit:
            unit = unit_of(x)
            return self._leave_unit(replace(x, unit=()), Known(tuple(v / unit for v in y.values)))
        value = y.scalar()
        if isinstance(x, Scores) and value is not None and not x.masked:
            return replace(x, scale=x.scale * value)
        if isinstance(x, Probabilities) and value is not None and abs(value - 1) < 1e-5:
            return x
        if not isinstance(x, Tokens):
            raise NotAnEncoder(f"multiplies {describe(x)} by a constant")
        if value is not None and x.weights is None and x.node.channels > 1:
            return replace(x, curve=_curve(x) * value)
        per_channel = x.along(y, x.channels) if y.fixed and x.weights is None else None
        if per_channel is not None:
            x = self.settle(x)
            return replace(x, node=fold(x.node, per_channel[0].reshape(-1), 0.0))
        return self._weigh(x, y)

    def _weigh(self, x: Tokens, y: Known) -> Tokens:
        """Multiply each token, or each request, by its own number."""
        batch, token = self.probes.batch, self.probes.token
        want = (batch, token) if token in x.flat else (batch,)
        found = x.along(y, want)
        if found is None or (x.node.per_request and y.scalar() is None):
            raise NotAnEncoder("multiplies by an array that is neither per channel nor per token")
        found = tuple(f.reshape(f.shape[0], -1) for f in found)
        old = x.weights or tuple(np.ones(m.shape) for m in self.probes.mask)
        return replace(x, weights=tuple(w * f for w, f in zip(old, found, strict=True)))

    def sub(self, x: Fact, y: Fact) -> Fact:
        """Element-wise difference."""
        if isinstance(x, Tokens) and isinstance(y, Moment) and y.kind == "mean" and y.power == 1 and not y.shift:
            x = self.settle(x)
            if x.node is not y.node:
                raise NotAnEncoder("subtracts the mean of another value")
            return replace(x, node=Centred(x.node.channels, x.node.per_request, x.node))
        if isinstance(y, Known):
            return self.add(x, Known(tuple(-v for v in y.values)))
        return self.add(x, self.mul(y, Known((np.array(-1.0),))))

    def div(self, x: Fact, y: Fact) -> Fact:
        """Element-wise quotient."""
        if isinstance(y, Known):
            with np.errstate(divide="ignore", invalid="ignore"):
                return self.mul(x, Known(tuple(1.0 / np.asarray(v, np.float64) for v in y.values)))
        if isinstance(y, Moment):
            inverse = replace(y, power=-y.power)
            return inverse if isinstance(x, Known) and x.scalar() == 1 else self.mul(x, inverse)
        raise NotAnEncoder(f"divides {describe(x)} by {describe(y)}")

    def where(self, condition: Fact, x: Fact, y: Fact) -> Fact:
        """``x`` where the condition holds, else ``y``."""
        if isinstance(condition, IsNaN) and isinstance(y, Probabilities) and isinstance(x, Known) and x.scalar() == 0:
            return y
        if isinstance(condition, Known):
            condition = Known(tuple(v.astype(bool) for v in condition.values))
            if isinstance(x, Known):
                x, y, condition = y, x, Known(tuple(~v for v in condition.values))
            fill = y.scalar() if isinstance(y, Known) else None
            if isinstance(x, Scores) and fill is not None and fill <= NEGLIGIBLE:
                return self.mask_scores(x, condition)
            if isinstance(x, Tokens) and fill is not None and self.probes.token in x.flat:
                return self._fill(x, condition, fill)
        raise NotAnEncoder(f"selects between {describe(x)} and {describe(y)}")

    def _fill(self, x: Tokens, keep: Known, fill: float) -> Tokens:
        kept = x.along(keep, (self.probes.batch, self.probes.token))
        if kept is None or not all(np.array_equal(k, m == 1) for k, m in zip(kept, self.probes.mask, strict=True)):
            raise NotAnEncoder("overwrites tokens that are not padding")
        if fill == 0:
            return self._weigh(x, keep)
        if fill > NEGLIGIBLE:
            raise NotAnEncoder(f"overwrites padding with {fill}")
        return replace(self.settle(x), hidden=True)

    # ------------------------------------------------------------------------------------------------------- reductions

    def reduce(self, x: Fact, kind: Literal["mean", "sum", "max", "l2"], dims: Sequence[int], *, keep: bool) -> Fact:
        """Reduce over dimensions (none given: all)."""
        if not isinstance(x, Tokens):
            raise NotAnEncoder(f"takes the {kind} of {describe(x)}")
        rank = len(x.axes)
        places = {d % rank for d in dims} if dims else set(range(rank))
        over = tuple(axis for d in sorted(places) for axis in x.axes[d])
        axes = tuple(() if d in places else g for d, g in enumerate(x.axes) if keep or d not in places)
        if set(over) == set(x.channels) and over:
            return self._moment(x, kind, axes)
        if over == (self.probes.token,):
            return self._pool(x, kind, axes)
        raise NotAnEncoder(f"takes the {kind} over dimensions {sorted(places)} of shape {x.shape(0)}")

    def _moment(self, x: Tokens, kind: str, axes: tuple[Group, ...]) -> Moment:
        if x.weights is not None:
            x = self.settle(x)
        squared = x.curve is not None and np.allclose(x.curve, GRID**2, rtol=1e-9)
        if isinstance(x.node, Centred) and squared and kind == "mean":
            return Moment(axes, node=x.node, kind="variance")
        if kind == "mean" and not squared and not isinstance(x.node, Centred):
            return Moment(axes, node=self.settle(x).node, kind="mean")
        if (kind == "sum" and squared) or (kind == "l2" and x.curve is None):
            return Moment(axes, node=x.node, kind="square_sum", power=0.5 if kind == "l2" else 1.0)
        raise NotAnEncoder(f"takes the {kind} over the channels of {describe(x)}")

    def _pool(self, x: Tokens, kind: str, axes: tuple[Group, ...]) -> Tokens:
        mask = self.probes.mask
        if kind in ("sum", "mean") and not x.hidden:
            ones = tuple(np.ones(m.shape) for m in mask)
            weights = tuple(w / (w.shape[1] if kind == "mean" else 1) for w in x.weights or ones)
            return replace(x, axes=axes, weights=weights)
        if kind == "max":
            if not x.hidden:
                self.note("The source takes the maximum over padding too; here only over the tokens of a request.")
                x = self.settle(x)
            node = Op(x.node.channels, True, "pool", (x.node,), {"mode": "max"})
            return replace(x, axes=axes, node=node, hidden=False)
        raise NotAnEncoder(f"takes the {kind} over the tokens")

    def _normalise(self, x: Tokens, by: Moment) -> Tokens:
        """``(x − mean) / deviation`` or ``x / norm``."""
        if by.kind == "variance" and by.node is x.node and by.power == -0.5 and isinstance(x.node, Centred):
            inner = x.node.x
            ones, zeros = np.ones(inner.channels), np.zeros(inner.channels)
            return replace(x, node=Norm(inner.channels, inner.per_request, inner, ones, zeros, by.shift))
        if by.kind == "square_sum" and by.power == -0.5 and by.shift < 1e-5 and by.floor < 1e-5:
            x = self.settle(x)
            if by.node is x.node:
                return replace(x, node=Op(x.node.channels, x.node.per_request, "normalize", (x.node,)))
        raise NotAnEncoder(f"divides {describe(x)} by {describe(by)}")

    def layer_norm(self, x: Fact, gamma: Known, beta: Known | None, eps: float) -> Tokens:
        """Layer norm over the last dimension."""
        x = self.settle(x)
        if x.axes[-1] != x.channels or not x.channels:
            raise NotAnEncoder(f"applies layer norm to a value of shape {x.shape(0)}")
        shape = (x.node.channels,)
        g = np.broadcast_to(gamma.constant("gamma of a layer norm").astype(np.float64), shape)
        b = np.zeros(shape) if beta is None else beta.constant("beta of a layer norm").astype(np.float64)
        return replace(x, node=Norm(x.node.channels, x.node.per_request, x.node, g, np.broadcast_to(b, shape), eps))

    # --------------------------------------------------------------------------------------------------------- products

    def linear(self, x: Fact, weight: Known, *, transposed: bool = False) -> Tokens:
        """``x · weight`` for a constant ``(in, out)``, or ``(out, in)`` if ``transposed``."""
        name = weight.name.removesuffix("_quantized").removesuffix(".weight")
        unit = x.unit if isinstance(x, Tokens) else ()
        x = self.settle(replace(x, unit=()) if isinstance(x, Tokens) else x)
        if x.axes[-1] != x.channels:
            raise NotAnEncoder(f"multiplies dimension {len(x.axes) - 1} of shape {x.shape(0)} by a weight")
        matrix = self._weight(Matrix.of(weight, weight.name or "a weight", transpose=not transposed))
        if matrix.values.shape[1] != x.node.channels:
            raise NotAnEncoder(f"multiplies {x.node.channels} channels by a weight that takes {matrix.values.shape[1]}")
        rows = matrix.values.shape[0]
        node = Linear(rows, x.node.per_request, x.node, matrix, np.zeros(rows), name=name)
        return replace(self.tokens(node, x.axes[:-1]), unit=unit)

    def matmul(self, x: Fact, y: Fact) -> Fact:
        """Product over the last dimension of ``x`` and the last but one of ``y``."""
        if isinstance(y, Known) and isinstance(x, Tokens) and y.fixed:
            return self.linear(x, y)
        if isinstance(x, Tokens) and isinstance(y, Tokens):
            return self._scores(x, y)
        if isinstance(x, Probabilities) and isinstance(y, Tokens):
            return self._context(x, y)
        if isinstance(x, Known) and isinstance(y, Tokens):
            return self._weighted_sum(x, y)
        raise NotAnEncoder(f"multiplies {describe(x)} and {describe(y)} as matrices")

    def _weighted_sum(self, x: Known, y: Tokens) -> Tokens:
        """``(batch, 1, token) · (batch, token, channel)``: pooling written as a product."""
        if len(y.axes) == 3 and y.axes[1] == (self.probes.token,) and all(x.at(p).shape[-2] == 1 for p in PROBES):
            weights = Known(tuple(np.swapaxes(v, -1, -2) for v in x.values))
            return self._pool(self._weigh(self.settle(y), weights), "sum", (y.axes[0], (), y.axes[2]))
        raise NotAnEncoder(f"multiplies an array by a value of shape {y.shape(0)}")

    def _heads(self, x: Tokens, inner: Group) -> Group:
        """The axes that number the heads, given those within a head; checks that a head is a run of channels."""
        heads = x.channels[: len(x.channels) - len(inner)]
        outer = tuple(axis for group_ in x.axes[:-2] for axis in group_)
        if (*heads, *inner) != x.channels or outer != group(self.probes.batch, *heads):
            raise NotAnEncoder("splits the channels into heads in an unusual order")
        return heads

    def _scores(self, q: Tokens, k: Tokens) -> Scores:
        q, q_scale = self._scaled(q)
        k, k_scale = self._scaled(k)
        token = (self.probes.token,)
        if len(q.axes) < 3 or q.axes[-2] != token or k.axes[-1] != token:
            raise NotAnEncoder(f"multiplies values of shapes {q.shape(0)} and {k.shape(0)}")
        q_heads, k_heads = self._heads(q, q.axes[-1]), self._heads(k, k.axes[-2])
        if sizes(q_heads) != sizes(k_heads) or sizes(q.axes[-1]) != sizes(k.axes[-2]):
            raise NotAnEncoder("splits queries and keys into different heads")
        axes = (*q.axes[:-2], token, (self.probes.key,))
        return Scores(axes, q=q.node, k=k.node, heads=q_heads, scale=q_scale * k_scale, unit=q.unit + k.unit)

    def _scaled(self, x: Tokens) -> tuple[Tokens, float]:
        """Queries or keys, and the number they were multiplied by."""
        unit, x = x.unit, replace(x, unit=())
        affine = affine_of(x.curve) if x.curve is not None else None
        if affine is not None and affine[1] == 0:
            return replace(self.settle(replace(x, curve=None)), unit=unit), affine[0]
        return replace(self.settle(x), unit=unit), 1.0

    def _context(self, p: Probabilities, v: Tokens) -> Tokens:
        scores, unit = p.scores, p.unit + v.unit
        v = self.settle(replace(v, unit=()))
        token = (self.probes.token,)
        if p.axes[-1] != (self.probes.key,) or p.axes[-2] != token or v.axes[-2] != token:
            raise NotAnEncoder(f"multiplies probabilities by a value of shape {v.shape(0)}")
        heads = self._heads(v, v.axes[-1])
        if sizes(heads) != sizes(scores.heads) or sizes(v.axes[-1])[0] * sizes(heads)[0] != v.node.channels:
            raise NotAnEncoder("splits queries and values into different heads")
        node = self._attend(scores.q, scores.k, v.node, sizes(heads)[0], scores)
        inner = tuple(channel_axis(axis.sizes[0]) for axis in v.axes[-1])
        return Tokens((*p.axes[:-1], inner), node=node, channels=(*scores.heads, *inner), unit=unit)

    def _attend(self, q: Node, k: Node, v: Node, heads: int, scores: Scores) -> Node:
        if not q.channels == k.channels == v.channels:
            raise NotAnEncoder(f"attends with {q.channels}, {k.channels} and {v.channels} channels")
        if not scores.masked:
            self.note("The source does not mask padding in attention; here a request attends to its own tokens only.")
        attrs = {"heads": heads, "scale": float(scores.scale)}
        return Op(v.channels, False, "attention", (q, k, v), attrs)

    def attention(self, q: Fact, k: Fact, v: Fact, heads: int, scale: float | None, masks: Sequence[Known]) -> Tokens:
        """Attention as one operation on ``(batch, token, channel)`` values; ``masks``: see mask_scores."""
        q, k, v = self.settle(q), self.settle(k), self.settle(v)
        if not (q.axes[-1] == q.channels and same_layout(q, k) and same_layout(q, v)) or q.node.channels % heads:
            raise NotAnEncoder(f"attends from shape {q.shape(0)} to {k.shape(0)} with {heads} heads")
        head = channel_axis(heads)
        scale = 1 / math.sqrt(q.node.channels / heads) if scale is None else scale
        axes = (group(self.probes.batch), group(head), (self.probes.token,), (self.probes.key,))
        scores = Scores(axes, q=q.node, k=k.node, heads=group(head), scale=scale)
        for mask in masks:
            scores = self.mask_scores(scores, mask)
        return replace(q, node=self._attend(q.node, k.node, v.node, heads, scores))

    def mask_scores(self, x: Scores, mask: Known) -> Scores:
        """Exclude the keys of padding: a boolean array of what to keep, or an array to add, of the scores' shape."""
        if x.unit:
            raise NotAnEncoder("masks scores before they are rescaled")
        found = x.along(mask, group(self.probes.batch, *x.heads, self.probes.token, self.probes.key))
        if found is None:
            raise NotAnEncoder(f"adds an array of shape {mask.values[0].shape} to scores of shape {x.shape(0)}")
        verdicts = {self._is_mask(values, m) for values, m in zip(found, self.probes.mask, strict=True)}
        if len(verdicts) != 1:
            raise NotAnEncoder("masks scores in a way that depends on the length")
        return replace(x, masked=x.masked or verdicts.pop())

    def _is_mask(self, values: Array, mask: Array) -> bool:
        """Whether padded keys are excluded and others untouched; False if nothing is. Padded queries don't matter."""
        batch, token = mask.shape
        values = values.reshape(batch, -1, token, token)
        values = np.moveaxis(values, 1, 2)[mask == 1]  # (valid queries, heads, keys)
        keep = np.broadcast_to(mask[np.nonzero(mask == 1)[0]][:, None] == 1, values.shape)
        added = np.where(values, 0.0, -np.inf) if values.dtype == bool else values
        base = added[keep].flat[0] if keep.any() else 0.0
        if np.isfinite(base) and (added[keep] == base).all():
            if (added[~keep] <= base + NEGLIGIBLE).all():
                return True
            if (added == base).all():
                return False
        raise NotAnEncoder("adds to the scores what is not a padding mask")

    def softmax(self, x: Fact, dim: int) -> Probabilities:
        """Softmax of scores over the keys."""
        if (
            isinstance(x, Scores)
            and not x.unit
            and x.axes[dim] == (self.probes.key,)
            and dim % len(x.axes) == len(x.axes) - 1
        ):
            return Probabilities(x.axes, scores=x)
        raise NotAnEncoder(f"applies softmax to {describe(x)}")

    # ---------------------------------------------------------------------------------------------------------- slicing

    def expand(self, x: Fact, target: tuple[tuple[int, ...], tuple[int, ...]]) -> Fact:
        """Broadcast to a shape given at both probes."""
        if isinstance(x, Moment) or (isinstance(x, Laid) and (x.shape(0), x.shape(1)) == target):
            return x  # statistics are broadcast where they are used
        if isinstance(x, Tokens) and isinstance(x.node, Rows) and x.axes[0] == ():
            whole = replace(x, axes=(group(self.probes.batch), *x.axes[1:]))
            if (whole.shape(0), whole.shape(1)) == target:
                return whole
        raise NotAnEncoder(f"broadcasts {describe(x)} to shape {target[0]}")

    def take(self, x: Fact, dim: int, index: Sequence[Array | int]) -> Fact:
        """Elements of one dimension, given for both probes: numbers drop the dimension, arrays keep it."""
        if not isinstance(x, Tokens):
            raise NotAnEncoder(f"slices {describe(x)}")
        dim %= len(x.axes)
        axes = x.axes[dim]
        length = sizes(axes)
        places = [np.arange(n)[np.asarray(i)] for n, i in zip(length, index, strict=True)]
        drop = places[0].ndim == 0
        rest = (*x.axes[:dim], *x.axes[dim + 1 :])
        if all(p.ndim and np.array_equal(p, np.arange(n)) for p, n in zip(places, length, strict=True)):
            return x
        if length == (1, 1) and drop:
            return replace(x, axes=rest)
        if axes == (self.probes.token,) and all(p.size == 1 for p in places):
            picked = [np.eye(n)[int(p.reshape(()))] for n, p in zip(length, places, strict=True)]
            old = x.weights or tuple(np.ones(m.shape) for m in self.probes.mask)
            weights = tuple(w * one for w, one in zip(old, picked, strict=True))
            return replace(x, axes=rest if drop else (*x.axes[:dim], (), *x.axes[dim + 1 :]), weights=weights)
        if axes and all(axis in x.channels for axis in axes) and np.array_equal(*places):
            return self._take_channels(x, dim, places[0])
        raise NotAnEncoder(f"slices dimension {dim} of shape {x.shape(0)}")

    def _take_channels(self, x: Tokens, dim: int, places: Array) -> Tokens:
        node, axes = x.node, x.axes[dim]
        start = x.channels.index(axes[0])
        if not isinstance(node, Linear) or x.channels[start : start + len(axes)] != axes:
            raise NotAnEncoder("slices the channels of a value that is not the output of a linear layer")
        outer = sizes(x.channels[:start])[0]
        rows = np.arange(node.channels).reshape(outer, sizes(axes)[0], -1)[:, places].reshape(-1)
        new = group(channel_axis(places.size)) if places.ndim else ()
        inside = (new,) if places.ndim else ()
        taken = replace(node, channels=rows.size, weight=node.weight.rows(rows), bias=node.bias[rows])
        return replace(
            x,
            node=taken,
            axes=(*x.axes[:dim], *inside, *x.axes[dim + 1 :]),
            channels=(*x.channels[:start], *new, *x.channels[start + len(axes) :]),
        )

    def concat(self, parts: Sequence[Fact], dim: int) -> Tokens:
        """Join linear layers of one input along their channels."""
        tokens = [self.settle(part) for part in parts]
        nodes = [t.node for t in tokens]
        first = nodes[0]
        if not all(isinstance(n, Linear) and isinstance(first, Linear) and n.x is first.x for n in nodes):
            raise NotAnEncoder("joins values that are not linear layers of the same input")
        if any(t.axes[dim] != t.channels or len(t.axes) != len(tokens[0].axes) for t in tokens):
            raise NotAnEncoder("joins values along a dimension that is not the channels")
        return replace(self.tokens(join(nodes), tokens[0].axes[:-1]))  # type: ignore[arg-type]

    # ----------------------------------------------------------------------------------------------------- quantisation

    def quantise(self, x: Fact, scale: Scale) -> Fact:
        """Activations become integers: the same value in another unit, as Whet calibrates activations itself."""
        if not isinstance(x, Laid):
            raise NotAnEncoder(f"quantises {describe(x)}")
        self.note("Quantisation parameters of activations in the source are left out: activations are calibrated anew.")
        return replace(x, unit=(*x.unit, scale))

    def dequantise(self, x: Fact, scale: Known, zero_point: Known | None) -> Fact:
        """The inverse; or integer rows of an embedding table become numbers."""
        if isinstance(x, Laid) and x.unit:
            return replace(x, unit=x.unit[:-1])
        if isinstance(x, Tokens) and isinstance(x.node, Rows) and scale.scalar() is not None:
            tables: dict[str, Matrix] = {}
            for kind in ("word", "position", "token_type"):
                table: Matrix | None = getattr(x.node, kind)
                if table is not None:
                    zero = 0 if zero_point is None else int(zero_point.constant("a zero point").reshape(()))
                    factor = scale.values[0].reshape(1, 1)
                    integers = table.values.astype(np.int32) - zero
                    known = Known((integers * factor,), Integers(integers, factor))
                    tables[kind] = self._weight(Matrix.table(known, f"the {kind} embedding table"))
            return replace(x, node=Rows(x.node.channels, False, **tables))
        raise NotAnEncoder(f"dequantises {describe(x)}")


def fold(node: Node, a: Array | float, b: Array | float, name: str = "") -> Node:
    """``a · node + b`` per channel, with ``a`` and ``b`` moved into the node's weights."""
    if isinstance(node, Linear) and node.activation == "none":
        name = name.removesuffix(".bias") if name.endswith(".bias") else node.name
        return replace(node, weight=node.weight.scaled(a), bias=node.bias * a + b, name=name)
    if isinstance(node, Norm):
        return replace(node, gamma=node.gamma * a, beta=node.beta * a + b)
    if np.all(np.asarray(a) == 1) and np.all(np.asarray(b) == 0):
        return node
    raise NotAnEncoder("scales or shifts the channels of a value that is neither a linear layer nor a layer norm")


def unit_of(x: Laid) -> float:
    """What a tensor in integers has to be multiplied by, if its scales are constants."""
    values = [scale.value for scale in x.unit if scale.value is not None]
    if len(values) < len(x.unit):
        raise NotAnEncoder("computes with a dynamically quantised value before multiplying it by its scale")
    return math.prod(values)


def join(nodes: Sequence[Linear]) -> Linear:
    """Linear layers of one input as one, their outputs one after the other."""
    if len({n.activation for n in nodes}) != 1:
        raise NotAnEncoder("joins linear layers with different activations")
    if all(n.weight.scale is not None for n in nodes):
        scale = np.concatenate([n.weight.scale for n in nodes if n.weight.scale is not None])
        weight = Matrix(np.concatenate([n.weight.values for n in nodes]), scale)
    else:
        weight = Matrix(np.concatenate([n.weight.dense() for n in nodes]))
    bias = np.concatenate([n.bias for n in nodes])
    return replace(nodes[0], channels=len(bias), weight=weight, bias=bias)


def merge(x: Rows, y: Rows) -> Rows:
    """The sum of embedding rows."""
    tables: dict[str, Matrix | None] = {}
    for kind in ("word", "position", "token_type"):
        found = [t for t in (getattr(x, kind), getattr(y, kind)) if t is not None]
        if len(found) > 1:
            raise NotAnEncoder(f"adds two {kind} embeddings")
        tables[kind] = found[0] if found else None
    return Rows(x.channels, False, **tables)


def same_layout(x: Tokens, y: Tokens) -> bool:
    """Whether elements of the same place belong to the same token and channel."""

    def key(t: Tokens) -> list[list[object]]:
        """Per dimension its axes; runs of channels, however they are split, as their length and stride."""
        found: list[list[object]] = []
        for dim in t.axes:
            runs: list[object] = []
            for axis in dim:
                if axis not in t.channels:
                    runs.append(axis)
                    continue
                length, stride = axis.sizes[0], sizes(t.channels[t.channels.index(axis) + 1 :])[0]
                match runs:
                    case [*_, (int(before), int(outer))] if outer == length * stride:
                        runs[-1] = (before * length, stride)
                    case _:
                        runs.append((length, stride))
            found.append(runs)
        return found

    return x.node.per_request == y.node.per_request and x.node.channels == y.node.channels and key(x) == key(y)


def describe(x: Fact) -> str:
    """A fact in words, for error messages."""
    match x:
        case Known():
            return f"an array of shape {x.values[0].shape}"
        case Laid(unit=(_, *_)):
            return "a value that is still in integers"
        case Tokens():
            what = "a pooled value" if x.weights is not None or x.node.per_request else "hidden states"
            return f"{what} of shape {x.shape(0)}"
        case Scores():
            return "attention scores"
        case Probabilities():
            return "attention probabilities"
        case Moment():
            return f"the {x.kind.replace('_', ' ')} over the channels"
        case DontCare():
            return "a zero point"
        case _:
            return "the scale of an activation"


def _curve(x: Tokens) -> Array:
    if x.unit or x.weights is not None:
        raise NotAnEncoder(f"applies an element-wise function to {describe(x)}")
    return GRID if x.curve is None else x.curve


def _fail(x: Fact, verb: str) -> Fact:
    raise NotAnEncoder(f"{verb} {describe(x)}")
