"""The encoder dialect: the Relax ops that frontends emit and passes speak.

Layouts (every value's type says which one it has):

* *tiles*: float32 ``(tiles, channels, 16)``. The tokens of all requests of a batch stand one after the other with no
  padding between them; 16 consecutive tokens are one tile, and the last tile is filled up. Tokens are the vector lanes.
* *quads*: uint8 or int8 ``(tiles, channels / 4, 16, 4)``: what one VNNI instruction multiplies, 16 tokens × 4 channels.
* *pairs*: bfloat16 (its bits as uint16) ``(tiles, channels / 2, 16, 2)``: likewise, 16 tokens × 2 channels.
* *segments*: int32 ``(groups, 16, 2)``: first token and length of each request; unused entries have length 0. A value
  with one column per request has the tiles layout too, ``(groups, channels, 16)``.

Weights are ``(out_features, in_features)``, float32, or ``quantized_weight`` where the source file had integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import tvm
from tvm import relax, tirx
from tvm.ir import Op
from tvm.ir import _ffi_api as ir_ffi

TILE = 16
"""Tokens in a tile."""

Activation: TypeAlias = Literal["none", "gelu", "gelu_tanh", "relu", "tanh"]
Pooling: TypeAlias = Literal["mean", "cls", "max"]

PREFIX = "relax.whet."


def _register(name: str, arguments: int, infer: Any) -> Op:
    full = PREFIX + name
    if full not in Op.list_op_names():
        ir_ffi.RegisterOp(full, f"Whet's {name}; see whet.passes.dialect")
    op = Op.get(full)
    op.set_num_inputs(arguments)
    tvm.ir.register_op_attr(full, "FInferType", infer)
    tvm.ir.register_op_attr(full, "FPurity", True)
    return op


def _call(op: Op, args: list[relax.Expr], **attrs: Any) -> relax.Call:
    return relax.Call(op, args, tvm.ir.make_node("ir.DictAttrs", **attrs) if attrs else None)


def shape_of(value: relax.Expr) -> list[Any]:
    """Dimensions of a tensor value: Python ints where they are known, TIR expressions elsewhere."""
    return [int(d) if isinstance(d, tirx.IntImm) else d for d in value.ty.shape]


def _tiles(first: Any, channels: Any) -> relax.TensorType:
    return relax.TensorType((first, channels, TILE), "float32")


def _infer_embed(call: relax.Call, _: Any) -> relax.TensorType:
    return _tiles(shape_of(call.args[0])[0], shape_of(call.args[3])[1])


def _infer_dense(call: relax.Call, _: Any) -> relax.TensorType:
    x, weight = shape_of(call.args[0]), shape_of(call.args[1])
    if isinstance(x[1], int) and isinstance(weight[1], int) and x[1] != weight[1]:
        raise ValueError(f"dense: the input has {x[1]} channels, the weight takes {weight[1]}")
    return _tiles(x[0], weight[0])


def _infer_same(call: relax.Call, _: Any) -> relax.TensorType:
    return call.args[0].ty


def _infer_self_attention(call: relax.Call, _: Any) -> relax.TensorType:
    first, channels, _lanes = shape_of(call.args[0])
    return _tiles(first, channels // 3)


def _infer_stack(call: relax.Call, _: Any) -> relax.TensorType:
    return _tiles(shape_of(call.args[0])[0], sum(shape_of(a)[1] for a in call.args))


def _infer_pool(call: relax.Call, _: Any) -> relax.TensorType:
    return _tiles(shape_of(call.args[1])[0], shape_of(call.args[0])[1])


def _infer_lookup(call: relax.Call, _: Any) -> relax.TensorType:
    outputs = shape_of(call.args[7])[0 if call.attrs["kind"] == "perceptron" else 1]
    return _tiles(shape_of(call.args[1])[0], outputs)


def _infer_stay(call: relax.Call, _: Any) -> relax.TensorType:
    return relax.TensorType((call.attrs["groups"], TILE, 2), "int32")


def _infer_move(call: relax.Call, _: Any) -> relax.TensorType:
    return _tiles(call.attrs["tiles"], shape_of(call.args[0])[1])


def _infer_settle(call: relax.Call, _: Any) -> relax.TensorType:
    groups, channels, _lanes = shape_of(call.args[0])
    return _tiles(groups, channels + 2)


def _infer_follow(call: relax.Call, _: Any) -> relax.TensorType:
    return relax.TensorType((shape_of(call.args[1])[0], TILE, 2), "int64")


def _infer_divide(call: relax.Call, _: Any) -> relax.TensorType:
    return relax.TensorType((call.attrs["groups"], TILE, 2), "int32")


def _infer_part(call: relax.Call, _: Any) -> relax.TensorType:
    return _tiles(call.attrs["tiles"], shape_of(call.args[0])[1])


def _infer_memoized_attention(call: relax.Call, _: Any) -> relax.TensorType:
    return _tiles(call.attrs["tiles"], shape_of(call.args[2])[1])


def _infer_quantized_weight(call: relax.Call, _: Any) -> relax.TensorType:
    return relax.TensorType(call.args[0].ty.shape, "float32")


EMBED = _register("embed", 8, _infer_embed)
DENSE = _register("dense", -1, _infer_dense)
LAYER_NORM = _register("layer_norm", 3, _infer_same)
ATTENTION = _register("attention", 4, _infer_same)
SELF_ATTENTION = _register("self_attention", 2, _infer_self_attention)
STACK = _register("stack", -1, _infer_stack)
ACTIVATE = _register("activate", 1, _infer_same)
ADD = _register("add", 2, _infer_same)
SCALE_CHANNELS = _register("scale_channels", 2, _infer_same)
POOL = _register("pool", 2, _infer_pool)
NORMALIZE = _register("normalize", 1, _infer_same)
LOOKUP = _register("lookup", -1, _infer_lookup)
STAY = _register("stay", 3, _infer_stay)
MOVE = _register("move", 2, _infer_move)
SETTLE = _register("settle", -1, _infer_settle)
FOLLOW = _register("follow", 2, _infer_follow)
DIVIDE = _register("divide", 2, _infer_divide)
PART = _register("part", 1, _infer_part)
MEMOIZED_ATTENTION = _register("memoized_attention", 5, _infer_memoized_attention)
QUANTIZED_WEIGHT = _register("quantized_weight", 2, _infer_quantized_weight)


def embed(
    ids: relax.Expr,
    positions: relax.Expr,
    token_types: relax.Expr,
    word: relax.Expr,
    position: relax.Expr,
    token_type: relax.Expr,
    gamma: relax.Expr,
    beta: relax.Expr,
    *,
    eps: float,
) -> relax.Call:
    """Sum of three table rows per token, then layer norm.

    ``ids``, ``positions``, ``token_types`` are int32 ``(tiles, 16)``; the tables are float32 ``(rows, channels)``. A
    model without token types gives a table of one zero row. Returns tiles.
    """
    return _call(EMBED, [ids, positions, token_types, word, position, token_type, gamma, beta], eps=eps)


def dense(
    x: relax.Expr,
    weight: relax.Expr,
    bias: relax.Expr,
    residual: relax.Expr | None = None,
    *,
    activation: Activation = "none",
    **quantisation: float | bool | int,
) -> relax.Call:
    """``activation(weight · x + bias) + residual`` per token.

    Tiles ``(t, K, 16)``, weight ``(N, K)``, bias ``(N,)``, and optionally tiles ``(t, N, 16)``, to the last of these.
    ``quantise`` adds the attributes ``x_scale``, ``x_zero`` or ``per_token``; ``choose_kernels`` adds ``block_rows``,
    ``block_columns`` and ``expanded``; ``round_to_bf16`` adds ``bf16``.
    """
    _check("activation", activation, Activation)
    args = [x, weight, bias] if residual is None else [x, weight, bias, residual]
    return _call(DENSE, args, activation=activation, **quantisation)


def layer_norm(x: relax.Expr, gamma: relax.Expr, beta: relax.Expr, *, eps: float) -> relax.Call:
    """Layer norm over the channels of each token; tiles to tiles."""
    return _call(LAYER_NORM, [x, gamma, beta], eps=eps)


def attention(
    q: relax.Expr, k: relax.Expr, v: relax.Expr, segments: relax.Expr, *, heads: int, scale: float
) -> relax.Call:
    """``softmax(scale · Q·Kᵀ)·V`` per head within each segment; tiles to tiles, channels = heads × head size."""
    return _call(ATTENTION, [q, k, v, segments], heads=heads, scale=scale)


def self_attention(
    qkv: relax.Expr, segments: relax.Expr, *, heads: int, scale: float, **quantisation: float | bool
) -> relax.Call:
    """Attention whose Q, K and V stand one after the other in one value: tiles ``(t, 3·C, 16)`` to ``(t, C, 16)``.

    ``quantise`` adds the attributes ``q_scale``, ``k_scale`` and ``v_scale``; ``round_to_bf16`` adds ``bf16``;
    ``hoist_pooling`` adds ``first_only`` where other tokens than the requests' first need no result.
    """
    return _call(SELF_ATTENTION, [qkv, segments], heads=heads, scale=scale, **quantisation)


def stack(*values: relax.Expr) -> relax.Call:
    """Values with the same tokens, one after the other along the channels."""
    return _call(STACK, list(values))


def activate(x: relax.Expr, *, kind: Activation) -> relax.Call:
    """Element-wise activation; tiles to tiles."""
    _check("kind", kind, Activation)
    return _call(ACTIVATE, [x], kind=kind)


def add(x: relax.Expr, y: relax.Expr) -> relax.Call:
    """Element-wise sum of two tiles values."""
    return _call(ADD, [x, y])


def scale_channels(x: relax.Expr, factors: relax.Expr) -> relax.Call:
    """Multiply each channel by its factor, float32 ``(C,)``; tiles to tiles.

    There is no kernel for it: the result can only be read by dense layers with one scale for all tokens, and what makes
    ``x`` multiplies while it rounds.
    """
    return _call(SCALE_CHANNELS, [x, factors])


def pool(x: relax.Expr, segments: relax.Expr, *, mode: Pooling) -> relax.Call:
    """One column per request: tiles ``(t, C, 16)`` to ``(g, C, 16)`` for segments ``(g, 16, 2)``; empty ones give 0."""
    _check("mode", mode, Pooling)
    return _call(POOL, [x, segments], mode=mode)


def normalize(x: relax.Expr) -> relax.Call:
    """Divide each column by its Euclidean norm (at least 1e-12); tiles to tiles."""
    return _call(NORMALIZE, [x])


def lookup(x: relax.Expr, segments: relax.Expr, *cache: relax.Expr, kind: str) -> relax.Call:
    """What a cache answers each request: tiles ``(t, C, 16)`` to ``(g, outputs, 16)`` for segments ``(g, 16, 2)``.

    ``cache`` are the arrays of a ``whet.caching.cache.Cache`` of this kind, which says what they are. How far to trust
    each answer is known to ``stay`` and ``settle``.
    """
    return _call(LOOKUP, [x, segments, *cache], kind=kind)


def stay(answer: relax.Expr, segments: relax.Expr, exits: relax.Expr, *, number: int) -> relax.Call:
    """Segments of the requests whose ``lookup`` is trusted less than the threshold ``exits[1, number]``, side by side.

    ``exits`` are float32 ``(2, caches)``: after how many layers each cache stands, and its threshold. How many requests
    and tokens stay is not known before: attributes of the call name both numbers, ``groups`` and ``tiles``. Segments
    that ``stay`` made also say which requests these are.
    """
    sizes = {unit: tirx.Var(unit, "int64") for unit in ("groups", "tiles")}
    return _call(STAY, [answer, segments, exits], number=number, **sizes)


def move(x: relax.Expr, segments: relax.Expr, *, tiles: tirx.Var) -> relax.Call:
    """Tokens of ``x`` at the places that they have in ``segments``, which ``stay`` made and whose ``tiles`` these are.

    Between the segments that ``x`` has and these there is no other ``stay``.
    """
    return _call(MOVE, [x, segments], tiles=tiles)


def settle(first: relax.Expr, *later: relax.Expr, layers: Sequence[int]) -> relax.Call:
    """The last answer that each request got, and two more channels: after how many layers, and how far it is trusted.

    ``first`` is the ``lookup`` ``(g, C, 16)`` of all; ``later`` are answers of some, and the segments, made by
    ``stay``, in turn; the last answer is the model's own, whose trust is 1. ``layers`` has a number for each answer.
    """
    return _call(SETTLE, [first, *later], layers=list(layers))


def follow(records: relax.Expr, segments: relax.Expr) -> relax.Call:
    """Of ``records``, int64 ``(groups, 16, 2)``, an input of ``main``, those of the ``segments`` that ``stay`` made."""
    return _call(FOLLOW, [records, segments])


def divide(segments: relax.Expr, records: relax.Expr, *, stored: bool) -> relax.Call:
    """Segments of the requests that have a record to use (``stored``) or of those that have none.

    ``records`` are int64 ``(groups, 16, 2)``: addresses as ``whet.schedules.attention_memoized`` has them, or 0. The
    result's groups, and the tiles that have tokens of its requests, which are the last or the first ones of all that
    the ``segments`` have, are not known before: attributes of the call name both numbers, ``groups`` and ``tiles``.
    """
    sizes = {name: tirx.Var(name, "int64") for name in ("groups", "tiles")}
    return _call(DIVIDE, [segments, records], stored=stored, **sizes)


def part(x: relax.Expr, *, tiles: tirx.Var, last: bool) -> relax.Call:
    """The first ``tiles`` tiles of ``x``, or the last."""
    return _call(PART, [x], tiles=tiles, last=last)


def memoized_attention(
    qkv: relax.Expr,
    computed: relax.Expr,
    v: relax.Expr,
    stored: relax.Expr,
    records: relax.Expr,
    *,
    tiles: tirx.Var,
    layer: int,
    **of_self_attention: float | bool | int,
) -> relax.Call:
    """``self_attention`` of ``qkv``, the first tiles, for the ``computed`` segments; the others use their records.

    Those are the ``stored`` segments, of which ``v`` has V alone, in the last tiles. ``layer`` is the number within a
    record. Returns all ``tiles``.
    """
    args = [qkv, computed, v, stored, records]
    return _call(MEMOIZED_ATTENTION, args, tiles=tiles, layer=layer, **of_self_attention)


def quantized_weight(values: relax.Expr, scale: relax.Expr) -> relax.Call:
    """int8 ``(rows, columns)`` times float32 ``(rows,)``: a weight that was integer in the source and stays exact."""
    return _call(QUANTIZED_WEIGHT, [values, scale])


def _check(name: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(get_args(allowed))}")
