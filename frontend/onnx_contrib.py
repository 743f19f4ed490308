"""What ONNX Runtime's fused operators (domain ``com.microsoft``) mean: those its transformer optimiser writes.

Their definitions: ContribOperators.md in ONNX Runtime's documentation.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from whet.passes import raise_facts
from whet.passes.raise_facts import PROBES, DontCare, Fact, Known, NotAnEncoder, Tokens
from whet.passes.raise_rules import Rules

from .onnx_graph import MS, Node
from .onnx_ops import Inputs, for_constants, gelu, given, known, laid, optional, rule, scaled, with_bias
from .onnx_quantised import integers
from .onnx_walk import Walk


@rule(MS + "Gelu", MS + "BiasGelu", MS + "FastGelu")
def _gelu(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    kind = "gelu_tanh" if node.op.endswith("FastGelu") else "gelu"
    return gelu(walk, with_bias(walk, given(inputs, 0), inputs, 1), kind)


@rule("SkipLayerNormalization", MS + "SkipLayerNormalization")
def _skip_layer_norm(walk: Walk, node: Node, inputs: Inputs) -> tuple[Fact, ...]:
    total = with_bias(walk, given(inputs, 0), inputs, 4)
    total = walk.rules.add(total, given(inputs, 1))
    normed = walk.rules.layer_norm(total, known(inputs, 2), optional(inputs, 3), node.attrs.get("epsilon", 1e-12))
    return normed, DontCare(), DontCare(), total


@for_constants(MS + "EmbedLayerNormalization")
def _embed_layer_norm(walk: Walk, node: Node, inputs: Inputs) -> tuple[Fact, ...]:
    return _embed(walk, node, inputs, optional(inputs, 7), optional(inputs, 8), [known(inputs, i) for i in (2, 3)])


@for_constants(MS + "QEmbedLayerNormalization")
def _quantised_embed_layer_norm(walk: Walk, node: Node, inputs: Inputs) -> tuple[Fact, ...]:
    """Inputs 8 to 12 are the scales of inputs 2 to 6, inputs 13 to 17 their zero points."""
    for i in range(2, 7):
        if (table := optional(inputs, i)) is not None:
            inputs[i] = integers(table, known(inputs, i + 6).constant("a scale"), optional(inputs, i + 11))
    return _embed(walk, node, inputs, optional(inputs, 7), None, [known(inputs, i) for i in (2, 3)])


def _embed(
    walk: Walk, node: Node, inputs: Inputs, mask: Known | None, positions: Known | None, tables: list[Known]
) -> tuple[Fact, ...]:
    ids, types, type_table = known(inputs, 0), optional(inputs, 1), optional(inputs, 4)
    places = walk.rules.probes.positions
    total: Fact = _lookup(walk.rules, tables[0], ids)
    total = walk.rules.add(total, _lookup(walk.rules, tables[1], positions or Known(places)))
    if type_table is not None:
        zeros = Known((np.zeros_like(places[0]), np.zeros_like(places[1])))
        total = walk.rules.add(total, _lookup(walk.rules, type_table, types or zeros))
    normed = walk.rules.layer_norm(total, known(inputs, 5), known(inputs, 6), node.attrs.get("epsilon", 1e-12))
    lengths = [np.zeros(ids.at(p).shape[0]) if mask is None else mask.at(p).sum(1) for p in PROBES]
    return normed, Known((lengths[0].astype(np.int32), lengths[1].astype(np.int32))), total


def _lookup(rules: Rules, table: Known, index: Known) -> Tokens:
    rows = rules.lookup(table, index)
    if rows is None:
        raise NotAnEncoder("looks up rows by what is neither token ids, positions nor token types")
    return rows


@rule(MS + "Attention")
def _attention(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    if any(x is not None for x in (inputs[4:5] + inputs[6:])) or node.attrs.get("unidirectional", 0):
        raise NotAnEncoder("attends causally or with a cache")
    qkv = with_bias(walk, walk.rules.linear(given(inputs, 0), known(inputs, 1)), inputs, 2)
    return _attend_fused(walk, node, qkv, [_key_mask(walk, optional(inputs, 3)), optional(inputs, 5)])


@rule(MS + "QAttention")
def _quantised_attention(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    """Inputs: x, weight, bias, scale of x, scale of the weight, mask, zero points of x and of the weight."""
    if any(x is not None for x in inputs[8:]) or node.attrs.get("unidirectional", 0):
        raise NotAnEncoder("attends causally or with a cache")
    x = given(inputs, 0)
    if isinstance(x, Tokens):  # the operator dequantises by itself, whether the scale is known or not
        x = replace(x, unit=())
    weight = integers(known(inputs, 1), known(inputs, 4).constant("a scale"), optional(inputs, 7), dim=-1)
    qkv = with_bias(walk, walk.rules.linear(x, weight), inputs, 2)
    return _attend_fused(walk, node, qkv, [_key_mask(walk, optional(inputs, 5))])


def _attend_fused(walk: Walk, node: Node, qkv: Fact, masks: list[Known | None]) -> Fact:
    channels = laid([qkv]).shape(0)[-1]
    sizes = node.attrs.get("qkv_hidden_sizes") or [channels // 3] * 3
    ends = np.cumsum(sizes)
    q, k, v = (walk.rules.take(qkv, -1, [np.arange(e - n, e)] * 2) for n, e in zip(sizes, ends, strict=True))
    return _attend(walk, node, q, k, v, masks)


def _attend(walk: Walk, node: Node, q: Fact, k: Fact, v: Fact, masks: list[Known | None]) -> Fact:
    scale = node.attrs.get("scale", 0.0) or None
    return walk.rules.attention(q, k, v, node.attrs["num_heads"], scale, [mask for mask in masks if mask is not None])


@rule(MS + "MultiHeadAttention")
def _multi_head_attention(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    inputs = [*inputs, *[None] * (6 - len(inputs))]
    if any(x is not None for x in inputs[6:]) or node.attrs.get("unidirectional", 0):
        raise NotAnEncoder("attends causally or with a cache")
    if inputs[1] is None or inputs[2] is None:
        raise NotAnEncoder("takes queries, keys and values packed into one input")
    q, k, v = (given(inputs, i) for i in range(3))
    if (bias := optional(inputs, 3)) is not None:
        parts = np.split(bias.constant("a bias"), 3)
        q, k, v = (walk.rules.add(x, Known((part,))) for x, part in zip((q, k, v), parts, strict=True))
    return _attend(walk, node, q, k, v, [_key_mask(walk, optional(inputs, 4)), optional(inputs, 5)])


def _key_mask(walk: Walk, mask: Known | None) -> Known | None:
    """``(batch,)`` lengths or a ``(batch, token)`` mask as booleans that broadcast to scores; others as they are."""
    if mask is None or mask.values[0].ndim > 2:
        return mask
    found = []
    for p, (batch, token) in enumerate(m.shape for m in walk.rules.probes.mask):
        array = mask.at(p)
        if array.ndim == 1:
            if array.shape != (batch,):
                raise NotAnEncoder(f"has a mask of shape {array.shape}")
            array = np.arange(token) < array[:, None]
        found.append(array.astype(bool)[:, None, None, :])
    return Known((found[0], found[1]))


@rule(MS + "FusedMatMul")
def _fused_matmul(walk: Walk, node: Node, inputs: Inputs) -> Fact:
    if node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0):
        raise NotAnEncoder("transposes the batch")

    def turned(place: int, name: str) -> Fact:
        x = given(inputs, place)
        if not node.attrs.get(name, 0):
            return x
        if isinstance(x, Known):
            return Known(tuple(np.swapaxes(v, -1, -2) for v in x.values), name=x.name)
        rank = len(laid([x]).axes)
        return raise_facts.transpose(laid([x]), [*range(rank - 2), rank - 1, rank - 2])

    return scaled(walk, walk.rules.matmul(turned(0, "transA"), turned(1, "transB")), node.attrs.get("alpha", 1.0))
