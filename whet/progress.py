"""Progress of commands that take long: the protocol, nobody who listens, and a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    """Told of every phase as it runs; the same as ``whet.passes.pipeline.Progress``, which needs the compiler."""

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """Enter a phase; the value it gives takes the count done so far, up to ``total``."""


class Silent:
    """Progress that tells nobody."""

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Run the phase."""
        del name, total
        yield lambda _done: None


class TerminalProgress:
    """One line per phase with the time it took, and a bar where it is counted; plain lines where there is no terminal.

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
