"""Lower the dialect to kernel calls.

Before: the dialect after all other passes. After: ``main`` holds nothing but ``call_tir`` of functions made by
``whet.schedules``; its parameters are the four inputs and, after them, one tuple of packed weights.

A value can exist in several forms: float32 tiles, pairs of bfloat16, quads with a scale and zero point, quads with a
scale per token, or Q, K and V apart. Which forms a value needs follows from who reads it, so the layer before makes the
form that the layer after wants, and no conversion runs that nothing asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from tvm import IRModule, relax, tirx

from whet.schedules.attention import AttentionSpec, attention
from whet.schedules.attention_memoized import DivideSpec, divide, memoized_attention
from whet.schedules.bfloat16 import to_bits
from whet.schedules.cache_lookup import LookupSpec, lookup, pack_rows
from whet.schedules.dense import BLOCKS, DenseSpec, Output, Weight, dense
from whet.schedules.dense_spec import HEADS
from whet.schedules.early_exit import FollowSpec, MoveSpec, SettleSpec, StaySpec, follow, move, settle, stay
from whet.schedules.elementwise import ActivateSpec, AddSpec, Quantization, QuantizeSpec, elementwise
from whet.schedules.embed import EmbedSpec, embed
from whet.schedules.first_tokens import FirstTokensSpec, first_tokens
from whet.schedules.isa import Isa
from whet.schedules.layer_norm import LayerNormSpec, layer_norm
from whet.schedules.pool import NormalizeSpec, PoolSpec, normalize, pool

from . import dialect
from .assemble import LIVE, OVERWRITES, READS_ALL_WEIGHTS, READS_LAST
from .choose_kernels import block_density
from .dialect import TILE, shape_of
from .graph import Graph, arguments, attributes, is_call, weight_of

Array: TypeAlias = np.ndarray[Any, Any]
Form: TypeAlias = Literal["tiles", "pairs", "quads", "dynamic", "heads", "values", "requests", "sources", "trust"]
"""The last three stand beside others: ``requests`` and ``sources`` beside the segments that ``stay`` makes, ``trust``
beside what ``lookup`` answers."""
Tuned: TypeAlias = Callable[[DenseSpec | AttentionSpec, Isa, float], Any]
"""Asked once for every use of a kernel that has knobs, with the share of its blocks that hold anything (1 if it is not
sparse): returns the knobs to generate it with, or None for its defaults."""
MADE: dict[Form, Quantization] = {"pairs": "bf16", "quads": "static", "dynamic": "per_token"}
WEIGHTS: dict[Form, Weight] = {"tiles": "f32", "pairs": "bf16", "quads": "i8", "dynamic": "i8"}
"""How the weight is stored that multiplies an input of this form."""

Q_ZERO = 128
"""Zero point of Q, which is unsigned; K and V are signed."""


@dataclass
class Demand:
    """The forms of one value that its readers want."""

    forms: set[Form] = field(default_factory=set)
    scale: float = 1.0
    zero: int = 0
    factors: Array | None = None
    """What each channel of quads is multiplied by before it is rounded; None: by nothing."""

    @property
    def rounded(self) -> Form | None:
        """The form among them that dense layers multiply, if it is not tiles; a value has at most one."""
        return next((f for f in MADE if f in self.forms), None)

    def requant(self, channels: int) -> Array:
        """What a kernel that makes quads multiplies each channel by, and then adds: float32 (channels + 1,)."""
        factors = np.ones(channels) if self.factors is None else self.factors
        return np.append(factors / self.scale, self.zero).astype(np.float32)


@dataclass(frozen=True)
class Lowered:
    """``module`` takes ``weights`` (name, array) as the last argument of ``main``, in this order."""

    module: IRModule
    weights: list[tuple[str, Array]]


def untuned(_spec: DenseSpec | AttentionSpec, _isa: Isa, _density: float) -> None:
    """Leave every kernel at its defaults."""


def lower(module: IRModule, isa: Isa, max_length: int, tuned: Tuned = untuned) -> Lowered:
    """Lower ``module`` for one instruction set and requests of at most ``max_length`` tokens."""
    return _Lowering(Graph(module), isa, max_length, tuned).run()


class _Lowering:
    def __init__(self, graph: Graph, isa: Isa, max_length: int, tuned: Tuned) -> None:
        self.graph = graph
        self.isa = isa
        self.max_length = max_length
        self.tuned = tuned
        self.builder = relax.BlockBuilder()
        self.demands = _demands(graph)
        self.forms: dict[tuple[relax.Var, Form], tuple[relax.Expr, ...]] = {}
        self.counts: dict[tirx.Var, tirx.Var] = {}
        self.weights: list[tuple[str, Array]] = []
        self.weight_vars: list[relax.Var] = []
        self.kernels: dict[Hashable, Any] = {}
        self.functions: dict[tirx.PrimFunc, Any] = {}

    def run(self) -> Lowered:
        tiles, groups = tirx.Var("tiles", "int64"), tirx.Var("groups", "int64")
        shapes = [(tiles, TILE)] * 3 + [(groups, TILE, 2)]
        names = ("ids", "positions", "token_types", "segments")
        inputs = [relax.Var(n, relax.TensorType(s, "int32")) for n, s in zip(names, shapes, strict=True)]
        if len(self.graph.params) > len(inputs):
            inputs.append(relax.Var(self.graph.params[-1].name, relax.TensorType((groups, TILE, 2), "int64")))
        for old, new in zip(self.graph.params, inputs, strict=True):
            self.forms[old, "tiles"] = (new,)
            self.counts[old.ty.shape[0]] = new.ty.shape[0]
        with self.builder.function("main"):
            with self.builder.dataflow():
                for binding in self.graph.bindings:
                    self.visit(binding.var, binding.value)
                output = self.builder.emit_output(self.tiles(self.graph.source(self.graph.result)))
            self.builder.emit_func_output(output, params=[*inputs, *self.weight_vars])
        module = self.builder.get()
        module["main"] = module["main"].with_attr("num_input", len(inputs))
        return Lowered(relax.transform.BundleModelParams()(module), self.weights)

    # One method per op, found by the op's name.

    def visit(self, var: relax.Var, value: relax.Expr) -> None:
        if not isinstance(value, relax.Call):
            return  # aliases are looked through
        if is_call(value, dialect.QUANTIZED_WEIGHT):
            return  # the layer that reads it takes it apart
        name = value.op.name.removeprefix(dialect.PREFIX)
        method = getattr(self, "lower_" + name, None)
        if method is None:
            raise ValueError(f"{var.name}: op {value.op.name} has no kernel")
        method(var, value)

    def lower_embed(self, var: relax.Var, call: relax.Call) -> None:
        table = self.graph.producer(call.args[3])
        integer = is_call(table, dialect.QUANTIZED_WEIGHT)
        word = [self.graph.constant(a) for a in (table.args if integer else [table])]
        position, token_type, gamma, beta = (weight_of(self.graph, a) for a in call.args[4:8])
        demand = self.demands[var]
        spec = EmbedSpec(
            vocab=word[0].shape[0],
            positions=position.shape[0],
            types=token_type.shape[0],
            channels=word[0].shape[1],
            eps=float(attributes(call)["eps"]),
            table="i8" if integer else "f32",
            quantize=MADE[demand.rounded] if demand.rounded else "none",
        )
        inputs = [self.tiles(a) for a in call.args[:3]]
        weights = [*word, position, token_type, gamma, beta, *self.requant(var)]
        self.normalised(var, "embed", spec, embed, inputs, weights, spec.channels)

    def lower_layer_norm(self, var: relax.Var, call: relax.Call) -> None:
        demand = self.demands[var]
        spec = LayerNormSpec(
            channels=shape_of(var)[1],
            eps=float(attributes(call)["eps"]),
            quantize=MADE[demand.rounded] if demand.rounded else "none",
        )
        weights = [*(self.graph.constant(a) for a in call.args[1:]), *self.requant(var)]
        inputs = [self.tiles(call.args[0])]
        self.normalised(var, "layer_norm", spec, _layer_norm_in_place, inputs, weights, spec.channels)

    def normalised(
        self,
        var: relax.Var,
        name: str,
        spec: Hashable,
        generator: Any,
        inputs: list[relax.Expr],
        weights: list[Array],
        channels: int,
    ) -> None:
        """A kernel that ends in a layer norm: it makes tiles, and the form that is wanted beside them."""
        form = self.demands[var].rounded
        outputs = [self.tiles_type(var), *self.rounded_types(var, channels, form)]
        results = self.call(name, spec, generator, inputs, weights, outputs, var.name)
        self.forms[var, "tiles"] = results[:1]
        if form:
            self.forms[var, form] = results[1:]

    def lower_dense(self, var: relax.Var, call: relax.Call) -> None:
        attrs = attributes(call)
        form = _input_form(attrs)
        integer = form in ("quads", "dynamic")
        rows, columns = shape_of(call.args[1])
        demand = self.demands[var]
        output: Output = "tiles"
        if apart := [o for o in HEADS if o in demand.forms]:
            (output,) = apart
        elif integer and demand.forms == {"quads"}:
            output = "quads"
        elif form == "pairs" and demand.forms == {"pairs"}:
            output = "pairs"
        block_rows, block_columns = (int(attrs.get(name, 0)) for name in ("block_rows", "block_columns"))
        spec = DenseSpec(
            out_features=rows,
            in_features=columns,
            weight=("i8_expanded" if attrs.get("expanded") else "i8_sparse") if block_rows else WEIGHTS[form],
            block_rows=block_rows or 4,
            block_columns=block_columns or 4,
            activation=attrs["activation"],
            residual=len(call.args) == 4,
            per_token=form == "dynamic",
            output=output,
        )
        if integer:
            source = self.graph.producer(call.args[1])
            values, weight_scale = (self.graph.constant(a) for a in source.args)
        knobs = self.tuned(spec, self.isa, block_density(values, *spec.block) if block_rows else 1.0)
        kernel = self.kernel((spec, knobs), lambda: dense(spec, self.isa, knobs))
        if integer:
            numbers = self.folded(var, values, weight_scale, self.graph.constant(call.args[2]), attrs, output)
        else:
            values, numbers = weight_of(self.graph, call.args[1]), [self.graph.constant(call.args[2])]
            if form == "pairs":
                values = to_bits(values)
        weights = [*kernel.pack(values), *numbers]
        inputs = list(self.forms[self.graph.source(call.args[0]), form])
        inputs, dynamic = inputs[:1], inputs[1:]
        residual = [self.tiles(call.args[3])] if spec.residual else []
        arguments = [*inputs, *(self.weight(var.name, w) for w in weights), *dynamic, *residual]
        if output == "quads":
            arguments += [self.weight(var.name, w) for w in self.requant(var)]
        if output == "tiles":
            types = [self.tiles_type(var)]
        else:
            types = (
                self.heads_types(var, rows, output, integer)
                if output in HEADS
                else self.rounded_types(var, rows, output)
            )
        notes: dict[str, Any] = {READS_ALL_WEIGHTS: True}
        if residual:
            notes[OVERWRITES] = arguments.index(residual[0])
        source = self.graph.producer(call.args[0])
        if last := is_call(source, dialect.PART) and bool(attributes(source)["last"]):
            notes[READS_LAST] = True
        func = self.kernel(("streaming", spec, knobs, last), lambda: kernel.func.with_attrs(notes))
        self.forms[var, output] = self.emit(func, _kernel_name(spec), arguments, types, var.name)
        if output == "tiles" and demand.rounded:
            self.round(var)

    def folded(
        self, var: relax.Var, values: Array, weight_scale: Array, bias: Array, attrs: dict[str, Any], output: str
    ) -> list[Array]:
        """Scale and bias per output channel (and row sums for per-token scales), in the order of the kernel."""
        sums = values.astype(np.int64).sum(axis=1).astype(np.float64)
        if attrs.get("per_token"):
            scale, bias = weight_scale.astype(np.float64), bias.astype(np.float64)
        else:
            scale = weight_scale.astype(np.float64) * float(attrs["x_scale"])
            bias = bias.astype(np.float64) - scale * int(attrs["x_zero"]) * sums
        if output in HEADS:
            reader = next(v for v in self.graph.values.values() if any(var.same_as(a) for a in arguments(v)))
            parts = [float(attributes(reader)[f"{p}_scale"]) for p in HEADS[output]]
            inverse = np.repeat(1.0 / np.array(parts), len(bias) // len(parts))
            scale, bias = scale * inverse, bias * inverse
        folded = [scale.astype(np.float32), bias.astype(np.float32)]
        return [*folded, sums.astype(np.float32)] if attrs.get("per_token") else folded

    def lower_self_attention(self, var: relax.Var, call: relax.Call) -> None:
        attrs = attributes(call)
        heads = int(attrs["heads"])
        channels = shape_of(var)[1]
        integer = "q_scale" in attrs
        spec = AttentionSpec(
            heads=heads,
            head_size=channels // heads,
            precision="i8" if integer else "bf16" if attrs.get("bf16") else "f32",
            scale=1.0 if integer else float(attrs["scale"]),
            max_length=self.max_length,
            first_only=bool(attrs.get("first_only")),
        )
        segments = self.tiles(call.args[1])
        knobs = self.tuned(replace(spec, first_only=False), self.isa, 1.0)

        def generator(spec: AttentionSpec, isa: Isa) -> tirx.PrimFunc:
            return attention(spec, isa, knobs)

        if spec.precision == "f32":
            inputs = [self.tiles(call.args[0]), segments]
            types = [self.tiles_type(var)]
            self.forms[var, "tiles"] = self.call("attention", spec, generator, inputs, [], types, var.name)
            if self.demands[var].rounded:
                self.round(var)
            return
        inputs = [*self.forms[self.graph.source(call.args[0]), "heads"], segments]
        form: Form = "quads" if integer else "pairs"
        numbers: list[Array] = []
        if integer:
            numbers = [self.attention_params(attrs, self.demands[var])]
        types = self.rounded_types(var, channels, form)
        self.forms[var, form] = self.call("attention", spec, generator, inputs, numbers, types, var.name)

    def lower_scale_channels(self, var: relax.Var, call: relax.Call) -> None:
        """Nothing is left to do: what made the value has scaled it while it was rounding it."""
        self.forms[var, "quads"] = self.forms[self.graph.source(call.args[0]), "quads"]

    def attention_params(self, attrs: dict[str, Any], demand: Demand) -> Array:
        """The params of int8 attention, see ``AttentionSpec``."""
        score = float(attrs["q_scale"]) * float(attrs["k_scale"]) * float(attrs["scale"])
        return np.array([score, float(attrs["v_scale"]) / demand.scale, demand.zero, 0.0], np.float32)

    def lower_divide(self, var: relax.Var, call: relax.Call) -> None:
        groups, tiles = (attributes(call)[unit] for unit in ("groups", "tiles"))
        types = [
            relax.TensorType((groups, TILE, 2), "int32"),
            relax.TensorType((tiles,), "int8"),
            relax.TensorType((2,), "int32"),
        ]
        segments, records = map(self.graph.source, call.args)
        tokens = self.forms.get((segments, "sources"), self.forms[self.graph.params[0], "tiles"])
        inputs = [*tokens, self.tiles(segments), self.tiles(records)]
        spec = DivideSpec(bool(attributes(call)["stored"]))
        self.forms[var, "tiles"] = self.call("divide", spec, _divide_live, inputs, [], types, var.name)[:1]

    def lower_part(self, var: relax.Var, call: relax.Call) -> None:
        source = self.graph.source(call.args[0])
        for form in self.demands[var].forms:
            self.forms[var, form] = self.forms[source, form]

    def lower_memoized_attention(self, var: relax.Var, call: relax.Call) -> None:
        attrs = attributes(call)
        channels, heads = shape_of(var)[1], int(attrs["heads"])
        qkv, computed, v, stored, records = (self.graph.source(a) for a in call.args)
        spec = AttentionSpec(heads, channels // heads, "i8", self.max_length)
        knobs = self.tuned(spec, self.isa, 1.0)
        inputs = [
            *self.forms[qkv, "heads"],
            self.tiles(computed),
            *self.forms[v, "values"],
            *(self.tiles(a) for a in (stored, records)),
        ]
        numbers = [self.attention_params(attrs, self.demands[var]), np.array([attrs["layer"]], np.int32)]
        types = self.rounded_types(var, channels, "quads")
        self.forms[var, "quads"] = self.call(
            "memoized_attention",
            spec,
            lambda spec, isa: memoized_attention(spec, isa, knobs),
            inputs,
            numbers,
            types,
            var.name,
        )

    def lower_activate(self, var: relax.Var, call: relax.Call) -> None:
        spec = ActivateSpec(shape_of(var)[1], attributes(call)["kind"])
        self.simple(var, "activate", spec, elementwise, call.args)

    def lower_add(self, var: relax.Var, call: relax.Call) -> None:
        self.simple(var, "add", AddSpec(shape_of(var)[1]), elementwise, call.args)

    def lower_pool(self, var: relax.Var, call: relax.Call) -> None:
        channels, mode = shape_of(var)[1], attributes(call)["mode"]
        if mode != "cls":
            self.simple(var, "pool", PoolSpec(channels, mode), pool, call.args)
        elif not _takes_rounded(self.graph, call):
            self.simple(var, "first_tokens", FirstTokensSpec(channels), first_tokens, call.args)
        else:
            form = self.demands[var].rounded
            assert form is not None
            spec = FirstTokensSpec(channels, MADE[form])
            inputs = [*self.forms[self.graph.source(call.args[0]), form], self.tiles(call.args[1])]
            types = self.rounded_types(var, channels, form)
            self.forms[var, form] = self.call("first_tokens", spec, first_tokens, inputs, [], types, var.name)

    def lower_normalize(self, var: relax.Var, call: relax.Call) -> None:
        self.simple(var, "normalize", NormalizeSpec(shape_of(var)[1]), normalize, call.args)

    def lower_stack(self, var: relax.Var, call: relax.Call) -> None:
        self.forms[var, "tiles"] = (
            self.builder.emit(relax.op.concat([self.tiles(a) for a in call.args], axis=1), name_hint=var.name),
        )

    def lower_lookup(self, var: relax.Var, call: relax.Call) -> None:
        x, segments, *cache = call.args
        scale, shift, rows, row_scale, row_bias, *more = map(self.graph.constant, cache)
        spec = LookupSpec(rows.shape[1], len(rows), shape_of(var)[1], attributes(call)["kind"])
        more = pack_rows(*more) if spec.kind == "perceptron" else more
        arrays = [scale, shift, *pack_rows(rows, row_scale, row_bias), *more]
        first = self.first(segments)
        types = [self.tiles_type(var), relax.TensorType((first, TILE), "float32")]
        made = self.call(
            "lookup", spec, _streaming_lookup, [self.tiles(x), self.tiles(segments)], arrays, types, var.name
        )
        self.forms[var, "tiles"], self.forms[var, "trust"] = made[:1], made[1:]

    def lower_stay(self, var: relax.Var, call: relax.Call) -> None:
        answer, segments = map(self.graph.source, call.args[:2])
        exits = self.graph.constant(call.args[2])
        requests = self.forms.get((segments, "requests"), ())
        attrs = attributes(call)
        spec = StaySpec(int(attrs["number"]), exits.shape[1], numbered=bool(requests))
        groups, tiles = attrs["groups"], attrs["tiles"]
        types = [
            relax.TensorType((groups, TILE, 2), "int32"),
            relax.TensorType((groups, TILE), "int32"),
            relax.TensorType((tiles, TILE), "int32"),
            relax.TensorType((3,), "int32"),
        ]
        inputs = [*self.forms[answer, "trust"], self.tiles(segments), *requests]
        made = self.call("stay", spec, _stay_live, inputs, [exits], types, "exits")
        self.forms[var, "tiles"] = made[:1]
        self.forms[var, "requests"] = made[1:2]
        self.forms[var, "sources"] = made[2:3]

    def lower_move(self, var: relax.Var, call: relax.Call) -> None:
        form = self.demands[var].rounded
        x, segments = (self.graph.source(a) for a in call.args)
        channels = shape_of(var)[1]
        inputs = [*self.forms[segments, "sources"], self.tiles(x), *(self.forms[x, form] if form else ())]
        types = [self.tiles_type(var), *self.rounded_types(var, channels, form)]
        made = self.call("move", MoveSpec(channels, MADE[form] if form else "none"), move, inputs, [], types, var.name)
        self.forms[var, "tiles"] = made[:1]
        if form:
            self.forms[var, form] = made[1:]

    def lower_follow(self, var: relax.Var, call: relax.Call) -> None:
        records, segments = map(self.graph.source, call.args)
        inputs = [*self.forms[segments, "requests"], self.tiles(records)]
        types = [relax.TensorType((self.first(var), TILE, 2), "int64")]
        self.forms[var, "tiles"] = self.call("follow", FollowSpec(), follow, inputs, [], types, var.name)

    def lower_settle(self, var: relax.Var, call: relax.Call) -> None:
        answer, *later = map(self.graph.source, call.args)
        inputs = [self.tiles(answer), *self.forms[answer, "trust"]]
        for some, segments in zip(later[::2], later[1::2], strict=True):
            inputs += [self.tiles(some), *self.forms.get((some, "trust"), ()), *self.forms[segments, "requests"]]
        spec = SettleSpec(shape_of(answer)[1], tuple(int(n) for n in attributes(call)["layers"]))
        self.forms[var, "tiles"] = self.call("settle", spec, settle, inputs, [], [self.tiles_type(var)], var.name)

    def simple(self, var: relax.Var, name: str, key: Hashable, generator: Any, args: list[relax.Expr]) -> None:
        """A kernel from tiles to tiles; what else is wanted is made after it."""
        inputs = [self.tiles(a) for a in args]
        self.forms[var, "tiles"] = self.call(name, key, generator, inputs, [], [self.tiles_type(var)], var.name)
        if self.demands[var].rounded:
            self.round(var)

    def round(self, var: relax.Var) -> None:
        """Pairs or quads from tiles, where the kernel that made the tiles could not make both."""
        demand = self.demands[var]
        form = demand.rounded
        assert form is not None
        channels = shape_of(var)[1]
        spec = QuantizeSpec(channels, MADE[form])
        types = self.rounded_types(var, channels, form)
        self.forms[var, form] = self.call(
            "quantize", spec, elementwise, [self.tiles(var)], self.requant(var), types, var.name
        )

    # Pieces of a kernel call.

    def tiles(self, value: relax.Expr) -> relax.Expr:
        return self.forms[self.graph.source(value), "tiles"][0]

    def first(self, var: relax.Var) -> Any:
        """The number of tiles (or of groups, for a value per request) of a value, in the new function."""
        count = var.ty.shape[0]
        return self.counts.get(count, count)

    def tiles_type(self, var: relax.Var) -> relax.TensorType:
        return relax.TensorType((self.first(var), shape_of(var)[1], TILE), "float32")

    def rounded_types(self, var: relax.Var, channels: int, form: Form | None) -> list[relax.TensorType]:
        first = self.first(var)
        quads = relax.TensorType((first, channels // 4, TILE, 4), "uint8")
        return {
            None: [],
            "pairs": [relax.TensorType((first, channels // 2, TILE, 2), "uint16")],
            "quads": [quads],
            "dynamic": [quads, relax.TensorType((first, 2, TILE), "float32")],
        }[form]

    def heads_types(self, var: relax.Var, rows: int, output: Output, integer: bool) -> list[relax.TensorType]:
        first = self.first(var)
        channels = rows // len(HEADS[output])
        in_word, unsigned, signed = (4, "uint8", "int8") if integer else (2, "uint16", "uint16")
        types = {
            "q": relax.TensorType((first, channels // in_word, TILE, in_word), unsigned),
            "k": relax.TensorType((first, channels // in_word, TILE, in_word), signed),
            "v": relax.TensorType((first, channels, TILE), signed),
        }
        return [types[part] for part in HEADS[output]]

    def requant(self, var: relax.Var) -> list[Array]:
        demand = self.demands[var]
        return [demand.requant(shape_of(var)[1])] if demand.rounded == "quads" else []

    def weight(self, layer: str, array: Array) -> relax.Var:
        name = f"{layer}.{len(self.weights)}"
        array = np.ascontiguousarray(array)
        var = relax.Var(f"w{len(self.weights)}", relax.TensorType(array.shape, str(array.dtype)))
        self.weights.append((name, array))
        self.weight_vars.append(var)
        return var

    def kernel(self, key: Hashable, make: Any) -> Any:
        """What ``make`` returns, made once per key."""
        if key not in self.kernels:
            self.kernels[key] = make()
        return self.kernels[key]

    def call(
        self,
        name: str,
        spec: Hashable,
        generator: Any,
        inputs: list[relax.Expr],
        weights: list[Array],
        types: list[relax.TensorType],
        layer: str,
    ) -> tuple[relax.Expr, ...]:
        """Call the kernel that ``generator`` makes of ``spec``."""
        func = self.kernel((name, spec), lambda: generator(spec, self.isa))
        arguments = [*inputs, *(self.weight(layer, w) for w in weights)]
        return self.emit(func, name, arguments, types, layer)

    def emit(
        self, func: tirx.PrimFunc, name: str, arguments: list[relax.Expr], types: list[relax.TensorType], layer: str
    ) -> tuple[relax.Expr, ...]:
        """Emit a call of ``func``, which is added to the module under a name of its own."""
        if func not in self.functions:
            number = sum(1 for f in self.functions.values() if f.name_hint.split(".")[0] == name)
            unique = f"{name}.{number}" if number else name
            self.functions[func] = self.builder.add_func(func.with_attr("global_symbol", unique), unique)
        result = self.builder.emit(
            relax.call_tir(self.functions[func], arguments, types if len(types) > 1 else types[0]), name_hint=layer
        )
        if len(types) == 1:
            return (result,)
        return tuple(self.builder.emit(relax.TupleGetItem(result, i)) for i in range(len(types)))


def _layer_norm_in_place(spec: LayerNormSpec, isa: Isa) -> tirx.PrimFunc:
    return layer_norm(spec, isa).with_attr(OVERWRITES, 0)


def _streaming_lookup(spec: LookupSpec, isa: Isa) -> tirx.PrimFunc:
    return lookup(spec, isa).with_attr(READS_ALL_WEIGHTS, True)


def _stay_live(spec: StaySpec, isa: Isa) -> tirx.PrimFunc:
    return stay(spec, isa).with_attr(LIVE, ["group", "group", "tile"])


def _divide_live(spec: DivideSpec, isa: Isa) -> tirx.PrimFunc:
    return divide(spec, isa).with_attr(LIVE, ["group", "tile"])


def _kernel_name(spec: DenseSpec) -> str:
    block = f"_{spec.block_rows}x{spec.block_columns}" if spec.weight in BLOCKS else ""
    return f"dense_{spec.weight}{block}_{spec.out_features}x{spec.in_features}_{spec.output}"


def _input_form(attrs: dict[str, Any]) -> Form:
    """The form that a dense layer with these attributes reads."""
    if attrs.get("per_token"):
        return "dynamic"
    if "x_scale" in attrs:
        return "quads"
    return "pairs" if attrs.get("bf16") else "tiles"


def _rounds_itself(call: relax.Expr) -> bool:
    """Whether this is attention that makes integers, or bfloat16, and no float32."""
    attrs = attributes(call) if isinstance(call, relax.Call) else {}
    integer = is_call(call, dialect.SELF_ATTENTION) and ("q_scale" in attrs or bool(attrs.get("bf16")))
    return integer or is_call(call, dialect.MEMOIZED_ATTENTION)


def _takes_rounded(graph: Graph, call: relax.Expr) -> bool:
    """Whether this takes the first tokens of integers or bfloat16 as they are."""
    first = is_call(call, dialect.POOL) and attributes(call)["mode"] == "cls"
    return first and _rounds_itself(graph.producer(call.args[0]))


def _demands(graph: Graph) -> dict[relax.Var, Demand]:
    """Which forms every value is wanted in."""
    demands = {binding.var: Demand() for binding in graph.bindings}

    def want(value: relax.Expr, form: Form, scale: float = 1.0, zero: int = 0, factors: Array | None = None) -> None:
        var = graph.source(value)
        demand = demands.get(var)
        if demand is None:
            return  # an input or a constant
        same = (scale, zero) == (demand.scale, demand.zero) and factors is demand.factors
        if form == "quads" and "quads" in demand.forms and not same:
            raise ValueError(
                f"{var.name} is wanted with scales {demand.scale} and {scale}; quantise gives one per value"
            )
        demand.forms.add(form)
        if form == "quads":
            demand.scale, demand.zero, demand.factors = scale, zero, factors

    for binding in graph.bindings:
        call = binding.value
        if not isinstance(call, relax.Call) or is_call(call, dialect.QUANTIZED_WEIGHT):
            continue
        if is_call(call, dialect.SCALE_CHANNELS):
            continue  # it hands on what is wanted of it
        attrs = attributes(call)
        if is_call(call, dialect.DENSE):
            want(call.args[0], _input_form(attrs), float(attrs.get("x_scale", 1.0)), int(attrs.get("x_zero", 0)))
            for residual in call.args[3:]:
                want(residual, "tiles")
        elif is_call(call, dialect.SELF_ATTENTION) and _rounds_itself(call):
            want(call.args[0], "heads")
        elif is_call(call, dialect.MEMOIZED_ATTENTION):
            want(call.args[0], "heads")
            want(call.args[2], "values")
        elif is_call(call, dialect.PART) or _takes_rounded(graph, call):
            pass  # its readers are looked at first
        else:
            for argument in call.args:
                if isinstance(argument, relax.Var):
                    want(argument, "tiles")
    want(graph.result, "tiles")
    for binding in reversed(graph.bindings):
        wanted = demands[binding.var]
        call = binding.value
        if is_call(call, dialect.SCALE_CHANNELS):
            x, factors = call.args
            if wanted.forms != {"quads"}:
                raise ValueError(f"{binding.var.name} scales channels, so it can only be read as static integers")
            want(x, "quads", wanted.scale, wanted.zero, graph.constant(factors))
        elif is_call(call, dialect.MOVE) or is_call(call, dialect.PART) or _takes_rounded(graph, call):
            for form in wanted.forms:
                want(call.args[0], form, wanted.scale, wanted.zero, wanted.factors)
    return demands
