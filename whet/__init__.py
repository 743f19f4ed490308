"""Whet compiles a distilled transformer encoder into one loadable ``.so`` that runs on a CPU as block-sparse int8.

>>> import whet
>>> whet.compile("path/to/model", output="model.so")  # needs the extra compile
>>> whet.load("model.so").encode(["one sentence", "another one"])  # needs nothing but whet
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from whet.runtime import MemoError, Session, load

if TYPE_CHECKING:
    from whet.compiler import Report, compile
    from whet.passes.quantise import QuantisationConfig

__all__ = ["MemoError", "QuantisationConfig", "Report", "Session", "compile", "load"]

_COMPILER = {"compile": "whet.compiler", "Report": "whet.compiler", "QuantisationConfig": "whet.passes.quantise"}


def __getattr__(name: str) -> Any:
    """Import the compiler when it is first asked for: a machine that only runs modules does not have it."""
    if name not in _COMPILER:
        raise AttributeError(f"module 'whet' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    try:
        return getattr(import_module(_COMPILER[name]), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("tvm", "onnx", "safetensors"):
            raise ImportError(
                f"whet.{name} needs the compiler ({error.name} is not installed): "
                "pip install '.[compile]' in a clone of Whet"
            ) from error
        raise
