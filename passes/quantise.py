"""Quantise dense layers and attention to uint8 activations × int8 weights.

Before: fp32 dialect after ``fuse_qkv``, ``fuse_activations`` and ``fuse_residuals``. After: every dense layer that can
be integer has a ``quantized_weight`` and the attributes ``x_scale`` and ``x_zero`` (or ``per_token``, where its input
comes from a layer norm or an embedding and the configuration asks for it); every self-attention between two such layers
has ``q_scale``, ``k_scale`` and ``v_scale``. Weights are symmetric per output channel, word embeddings per row; those
that were integers in the source stay as they are. Small heads (fewer than 32 outputs) and layers that see one column
per request stay fp32: they cost next to nothing and carry the answer. With a budget of error (``max_error``) the layers
that cost most of it become ``per_token`` or stay fp32, and have the attribute ``raised``, which says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from tvm import IRModule, relax

from . import dialect
from .calibrate import Method, Observations, affine_u8, observe, symmetric_s8
from .error_budget import Level, choose_levels, noise
from .graph import Graph, attributes, is_call, is_per_token, rewrite
from .interpret import interpret

SMALL_HEAD = 32
JUDGED = 64
"""Requests, about, that a budget of error is judged on."""


@dataclass(frozen=True)
class QuantisationConfig:
    """How activations become integers. ``version`` changes when the meaning of a field does."""

    activations: Literal["static", "per_token"] = "per_token"
    """``per_token``: inputs that come from a layer norm get a scale of each token's own; nearly free, and closer."""
    method: Method = "mse"
    percentile: float = 99.99
    """Share of the values inside the range, in percent, for the method ``percentile``."""
    max_error: float | None = None
    """Most squared error of the model's outputs on the calibration requests, as a share of their variance: layers get
    more precision until it is met. None: no limit."""
    version: int = 1

    def __post_init__(self) -> None:
        if self.activations not in ("static", "per_token"):
            raise ValueError(f"activations is {self.activations!r}; expected 'static' or 'per_token'")
        if self.method not in get_args(Method):
            raise ValueError(f"method is {self.method!r}; expected one of {', '.join(get_args(Method))}")
        if not 50.0 < self.percentile <= 100.0:
            raise ValueError(f"percentile is {self.percentile}; expected more than 50 and at most 100")
        if self.max_error is not None and not self.max_error > 0:
            raise ValueError(f"max_error is {self.max_error}; expected more than 0, a share of the outputs' variance")
        if self.version != 1:
            raise ValueError(f"version is {self.version}; this whet reads version 1")

    def to_json(self) -> str:
        """The configuration as one JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> QuantisationConfig:
        """Read what ``to_json`` wrote; unknown fields are errors."""
        return cls(**json.loads(text))


def quantise(
    module: IRModule,
    config: QuantisationConfig,
    requests: Sequence[np.ndarray[Any, Any]],
    token_types: Sequence[np.ndarray[Any, Any]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> IRModule:
    """Calibrate on ``requests`` (1-D arrays of token ids) and rewrite as the module docstring says."""
    graph = Graph(module)
    layers = integer_layers(graph)
    ladders = {var: _ladder(graph, call, config) for var, call in layers.items()}
    levels = {var: ladder[0] for var, ladder in ladders.items()}
    wanted = {call.args[0].name: 1 for var, call in layers.items() if levels[var] == "static"}
    attentions = [b for b in graph.bindings if joins_its_layers(graph, layers, b.var, b.value)]
    wanted.update({b.value.args[0].name: 3 for b in attentions})
    seen = observe(module, wanted, requests, token_types, progress)
    raised: dict[relax.Var, float] = {}
    if config.max_error is not None:
        judged = slice(None, None, max(1, len(requests) // JUDGED))
        sample = requests[judged], None if token_types is None else token_types[judged]
        reference = interpret(module, *sample)

        def error(levels: Mapping[relax.Var, Level]) -> float:
            return noise(interpret(_round(module, config, seen, levels), *sample), reference)

        def advance(done: int) -> None:
            if progress is not None:
                progress(len(requests) + done)

        levels, raised = choose_levels(ladders, error, config.max_error, advance)
    return _round(module, config, seen, levels, raised)


def raised_layers(module: IRModule) -> tuple[str, ...]:
    """One line for every layer that ``quantise`` gave more precision, with the reason."""
    dense = {b.var.name: attributes(b.value) for b in Graph(module).bindings if is_call(b.value, dialect.DENSE)}
    return tuple(f"{name}: {attrs['raised']}" for name, attrs in dense.items() if "raised" in attrs)


def _ladder(graph: Graph, dense: relax.Call, config: QuantisationConfig) -> tuple[Level, ...]:
    """The levels that an integer layer may have, the lowest first."""
    if is_dynamic(graph, dense, config):
        return ("per_token", "float32")
    if is_call(graph.producer(dense.args[0]), dialect.SELF_ATTENTION):
        return ("static", "float32")  # integer attention rounds with one scale
    return ("static", "per_token", "float32")


def _round(
    module: IRModule,
    config: QuantisationConfig,
    seen: Observations,
    levels: Mapping[relax.Var, Level],
    raised: Mapping[relax.Var, float] | None = None,
) -> IRModule:
    """Rewrite the layers of ``levels`` to integers; those without a level stay float32."""
    graph = Graph(module)
    eligible = integer_layers(graph)
    layers = {var: eligible[var] for var, level in levels.items() if level != "float32"}
    attentions = {b.var: b.value for b in graph.bindings if joins_its_layers(graph, layers, b.var, b.value)}

    def why(var: relax.Var) -> dict[str, str]:
        if not raised or var not in raised:
            return {}
        kept = "stays float32" if levels[var] == "float32" else "has a scale per token"
        return {"raised": f"{kept}; int8 in this layer alone is an error of {raised[var]:.2g} in the model's output"}

    def visit(builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Expr:
        if var in eligible and levels.get(var) != "static":
            call = _unscaled(graph, builder, var, call)
        if var in layers:
            old = graph.values[var].args[1]
            weight = _integer_weight(graph, builder, var, old if isinstance(old, relax.Var) else call.args[1])
            x = graph.values[var].args[0].name
            found = {"per_token": True} if levels[var] == "per_token" else _input_scale(seen, x, config)
            return dialect.dense(call.args[0], weight, *call.args[2:], **attributes(call) | found | why(var))
        if why(var):
            return dialect.dense(*call.args, **attributes(call) | why(var))
        if var in attentions:
            parts = seen[graph.values[var].args[0].name]
            scales = {
                f"{part}_scale": symmetric_s8(observation, config.method, config.percentile)
                for part, observation in zip("qkv", parts, strict=True)
            }
            return dialect.self_attention(*call.args, **attributes(call) | scales)
        if is_call(call, dialect.EMBED):
            args = list(call.args)
            args[3] = _integer_weight(graph, builder, var, graph.values[var].args[3])
            return dialect.embed(*args, **attributes(call))
        return call

    return rewrite(module, visit)


def integer_layers(graph: Graph) -> dict[relax.Var, relax.Call]:
    """The dense layers that become integer."""
    dense = {b.var: b.value for b in graph.bindings if is_call(b.value, dialect.DENSE)}
    return {var: call for var, call in dense.items() if why_float(graph, call) is None}


def is_dynamic(graph: Graph, dense: relax.Call, config: QuantisationConfig) -> bool:
    """Whether the input of an integer layer gets a scale of each token's own."""
    made = graph.producer(dense.args[0])
    normalised = is_call(made, dialect.LAYER_NORM) or is_call(made, dialect.EMBED)
    return config.activations == "per_token" and normalised


def why_float(graph: Graph, dense: relax.Call) -> str | None:
    """Why a dense layer stays float32; None if it becomes integer."""
    rows, columns = dialect.shape_of(dense.args[1])
    if not is_per_token(graph, dense.args[0]):
        return "it runs once per request, not per token"
    if columns % 4:
        return f"integer kernels take input channels four at a time, and it has {columns}"
    if rows < SMALL_HEAD:
        return f"with fewer than {SMALL_HEAD} output channels it costs little, and accuracy much"
    return None


def joins_its_layers(graph: Graph, layers: dict[Any, Any], var: relax.Var, call: relax.Expr) -> bool:
    """Whether ``var`` is an attention that reads what one of ``layers`` makes for it alone, and only they read it."""
    if not is_call(call, dialect.SELF_ATTENTION):
        return False
    projection = call.args[0]
    readers = [b.var for b in graph.bindings if isinstance(b.value, relax.Call) and var in list(b.value.args)]
    return (
        projection in layers
        and graph.uses[projection] == 1
        and len(layers[projection].args) == 3
        and attributes(layers[projection])["activation"] == "none"
        and graph.source(graph.result) != var
        and all(r in layers and graph.values[r].args[0].same_as(var) for r in readers)
    )


def _input_scale(seen: Observations, name: str, config: QuantisationConfig) -> dict[str, float | int]:
    observation = seen[name][0]
    scale, zero = affine_u8(observation, config.method, config.percentile)
    return {"x_scale": scale, "x_zero": zero}


def _unscaled(graph: Graph, builder: relax.BlockBuilder, var: relax.Var, call: relax.Call) -> relax.Call:
    """A layer whose input is not rounded with one scale: without ``scale_channels``, which needs that."""
    scaled = graph.producer(graph.values[var].args[0])
    if not is_call(scaled, dialect.SCALE_CHANNELS):
        return call
    x = builder.lookup_binding(call.args[0]).args[0]
    weight = relax.const(graph.constant(call.args[1]) * graph.constant(scaled.args[1]))
    return dialect.dense(x, weight, *call.args[2:], **attributes(call))


def _integer_weight(graph: Graph, builder: relax.BlockBuilder, var: relax.Var, weight: relax.Expr) -> relax.Expr:
    made = graph.producer(weight)
    if is_call(made, dialect.QUANTIZED_WEIGHT):
        return builder.emit(dialect.quantized_weight(*made.args))
    values, scale = quantise_weight(graph.constant(made))
    return builder.emit(
        dialect.quantized_weight(relax.const(values), relax.const(scale)), name_hint=var.name + "_weight"
    )


def quantise_weight(weight: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A float32 ``(N, K)`` weight as int8 ``(N, K)`` in [-127, 127] and float32 scales ``(N,)``; zeros stay zeros."""
    largest = np.abs(weight).max(axis=1)
    scale = np.where(largest > 0, largest / 127.0, 1.0).astype(np.float32)
    values = np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)
    return values, scale
