"""Opens an ONNX file and looks at it: nodes with their attributes as Python values, and what an output depends on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper

from whet.passes.raise_facts import Array

MS = "com.microsoft."
"""What names of ONNX Runtime's own operators start with here: their domain."""


@dataclass(frozen=True)
class Node:
    """One operator: inputs that are left out have the name ''."""

    proto: onnx.NodeProto
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Any] = field(repr=False)

    @staticmethod
    def of(proto: onnx.NodeProto) -> Node:
        """Read a node; strings become str, tensors arrays, and graphs stay protos."""
        attrs: dict[str, Any] = {}
        for attribute in proto.attribute:
            value = onnx.helper.get_attribute_value(attribute)
            if isinstance(value, bytes):
                value = value.decode(errors="replace")
            elif isinstance(value, onnx.TensorProto):
                value = numpy_helper.to_array(value)
            attrs[attribute.name] = value
        domain = "" if proto.domain in ("", "ai.onnx") else proto.domain + "."
        return Node(proto, domain + proto.op_type, tuple(proto.input), tuple(proto.output), attrs)

    def __str__(self) -> str:
        name = self.proto.name or (self.outputs[0] if self.outputs else "")
        return f"node {name!r} ({self.op.removeprefix(MS)})"


def open_model(path: Path) -> onnx.ModelProto:
    """Read a model with its external data, local functions inlined; FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected an ONNX file")
    try:
        model = onnx.load(str(path))
    except DecodeError as error:
        raise ValueError(f"{path} is not an ONNX file, or is cut off: {error}") from error
    except (FileNotFoundError, onnx.checker.ValidationError) as error:
        raise ValueError(
            f"{path} keeps weights in another file that can't be read; it must lie beside it: {error}"
        ) from error
    if not model.graph.node or not model.graph.output:
        raise ValueError(f"{path} holds no graph; it is not an ONNX model, or is cut off")
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    return model


def constants(graph: onnx.GraphProto) -> dict[str, Array]:
    """The initialisers, float16 and bfloat16 as float32."""
    arrays = {}
    for tensor in graph.initializer:
        try:
            array = numpy_helper.to_array(tensor)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"the weight {tensor.name!r} can't be read: {error}") from error
        arrays[tensor.name] = as_float32(array)
    return arrays


def as_float32(array: Array) -> Array:
    """Half precision as float32; other dtypes as they are."""
    half = array.dtype == np.float16 or array.dtype.name == "bfloat16"
    return array.astype(np.float32) if half else array


def needed(graph: onnx.GraphProto, outputs: Iterable[str]) -> list[Node]:
    """The nodes that the given values depend on, in the graph's order."""
    wanted = set(outputs)
    found = []
    for proto in reversed(graph.node):
        if wanted & set(proto.output):
            wanted |= set(proto.input) | captured(proto)
            found.append(Node.of(proto))
    return found[::-1]


def captured(proto: onnx.NodeProto) -> set[str]:
    """Names that the sub-graphs of a node read; some may be their own."""
    names: set[str] = set()
    for attribute in proto.attribute:
        if attribute.HasField("g"):
            names |= {value.name for value in attribute.g.output}
            for inner in attribute.g.node:
                names |= set(inner.input) | captured(inner)
    return names


def static_dims(value: onnx.ValueInfoProto) -> list[int | None]:
    """Dimensions of a graph input; None where it is dynamic."""
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in dims]


def inputs_of(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The inputs that are not initialisers (old files list those too)."""
    stored = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in stored]
