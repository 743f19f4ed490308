"""Progress on a terminal: one line per phase with the time it took, a bar where the phase is counted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class TerminalProgress:
    """Writes to a terminal, or plain lines where the stream is none; implements ``whet.passes.pipeline.Progress``.

    Standard error by default, so that results on standard output can be piped.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show a phase while it runs, and its time when it is done; a phase that fails is shown as such."""
        start = time.perf_counter()
        bar = self._bar(name, total) if self.terminal and total else None
        if self.terminal and bar is None:
            self._write(f"  … {name}")
        outcome = "failed"
        try:
            yield (lambda done: None) if bar is None else (lambda done: _advance(bar, done))
            outcome = ""
        finally:
            if bar is not None:
                bar.close()
            counted = f", {total}" if total else ""
            clear = "\r\x1b[K" if self.terminal else ""
            self._write(f"{clear}  {name:44} {time.perf_counter() - start:7.1f} s{counted} {outcome}".rstrip() + "\n")

    def _bar(self, name: str, total: int | None) -> Any:
        try:
            from tqdm import tqdm  # noqa: PLC0415 -- a machine that only runs modules may not have it
        except ModuleNotFoundError:
            return None
        return tqdm(total=total, desc=f"  {name}", file=self.stream, leave=False, unit="")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def _advance(bar: Any, done: int) -> None:
    bar.update(done - bar.n)
