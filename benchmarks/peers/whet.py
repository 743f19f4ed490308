"""Whet: by ``session.run``, and whole requests, tokenising included, by ``session.encode``.

Variants: those that the driver compiled, and "encode" (int8).
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import whet

from .protocol import Array, Bind, Step, serve


def load(folder: Path, variant: str, threads: int) -> Bind:
    """Load the module that the driver compiled."""
    session: Any = whet.load(folder / f"whet {variant}.so", threads)
    if variant == "encode":
        texts = (folder / "texts.txt").read_text(encoding="utf-8").splitlines()
        return lambda ids, _mask: lambda: session.encode(texts[: len(ids)])

    def bind(ids: Array, mask: Array) -> Step:
        return lambda: session.run(ids, mask)

    return bind


if __name__ == "__main__":
    serve(load, version("whet"))
