"""Progress of commands that take long: the protocol, nobody who listens, and a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TextIO


class Board(Protocol):
    """Told of tasks that run side by side within a phase."""

    def task(self, index: int, done: int, what: str) -> None:
        """Say how much of a task is done, and what came of it so far."""

    def all(self, done: int, what: str) -> None:
        """Say the same of all tasks together."""


class Progress(Protocol):
    """Told of every phase as it runs; the same as ``whet.passes.pipeline.Progress``, which needs the compiler."""

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """Enter a phase; the value it gives takes the count done so far, up to ``total``."""


class TaskProgress(Progress, Protocol):
    """Told of phases, and of those that have tasks also how far each of these is."""

    def tasks(
        self, name: str, tasks: Sequence[str], totals: Sequence[int], total: int | None, seconds: float | None
    ) -> AbstractContextManager[Board]:
        """Enter a phase of several tasks, which ends when ``total`` are done in all, or after so many ``seconds``."""


class Silent:
    """Progress that tells nobody."""

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Run the phase."""
        del name, total
        yield lambda _done: None

    @contextmanager
    def tasks(
        self, name: str, tasks: Sequence[str], totals: Sequence[int], total: int | None, seconds: float | None
    ) -> Iterator[Board]:
        """Run the phase."""
        del name, tasks, totals, total, seconds
        yield _NoBoard()


class _NoBoard:
    def task(self, index: int, done: int, what: str) -> None:
        pass

    def all(self, done: int, what: str) -> None:
        pass


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
        with self._timed(name, total):
            bar = _bar(total=total, desc=f"  {name}", file=self.stream) if self.terminal and total else None
            if self.terminal and bar is None:
                self._write(f"  … {name}")
            try:
                yield (lambda done: None) if bar is None else (lambda done: _advance(bar, done))
            finally:
                if bar is not None:
                    bar.close()

    @contextmanager
    def tasks(
        self, name: str, tasks: Sequence[str], totals: Sequence[int], total: int | None, seconds: float | None
    ) -> Iterator[Board]:
        """Show a bar for each task and one for all of them, with the time left."""
        with self._timed(name, total):
            board = _Bars(self.stream, tasks, totals, total, seconds) if self.terminal and _tqdm() else _NoBoard()
            try:
                yield board
            finally:
                if isinstance(board, _Bars):
                    board.close()

    @contextmanager
    def _timed(self, name: str, total: int | None) -> Iterator[None]:
        """Say in the end how long a phase took, or that it failed."""
        start = time.perf_counter()
        outcome = "failed"
        try:
            yield
            outcome = ""
        finally:
            counted = f", {total}" if total else ""
            clear = "\r\x1b[K" if self.terminal else ""
            self._write(f"{clear}  {name:44} {time.perf_counter() - start:7.1f} s{counted} {outcome}".rstrip() + "\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


class _Bars:
    """Bars below each other, that of all tasks last; it counts trials, or the seconds where only those are given."""

    def __init__(
        self, stream: TextIO, tasks: Sequence[str], totals: Sequence[int], total: int | None, seconds: float | None
    ) -> None:
        self.start, self.total, self.seconds = time.monotonic(), total, seconds
        shape = "  {desc:52.52} {bar:12} {n_fmt:>4}/{total_fmt:4} {postfix}"
        self.bars = [
            _bar(total=most, desc=task, position=i, bar_format=shape, file=stream)
            for i, (task, most) in enumerate(zip(tasks, totals, strict=True))
        ]
        shape = "  {desc:52.52} {bar:12} {elapsed}<{remaining} {postfix}"
        most = total if total is not None else round(seconds or 0)
        self.sum = _bar(total=most, desc="all", position=len(tasks), bar_format=shape, file=stream)

    def task(self, index: int, done: int, what: str) -> None:
        bar = self.bars[index]
        bar.set_postfix_str(what, refresh=False)
        _advance(bar, done)
        bar.refresh()

    def all(self, done: int, what: str) -> None:
        past = time.monotonic() - self.start
        trials = f"{done} trials" if self.total is None else f"{max(0, self.total - done)} trials left"
        limit = "" if self.seconds is None else f", {max(0.0, self.seconds - past) / 60:.0f} min at most"
        self.sum.set_postfix_str(f"{what}, {trials}{limit}", refresh=False)
        _advance(self.sum, done if self.total is not None else min(round(past), self.sum.total))
        self.sum.refresh()

    def close(self) -> None:
        for bar in (*self.bars, self.sum):
            bar.close()


def _tqdm() -> Any:
    """The class that draws bars, or None: a machine that only runs modules may not have it."""
    try:
        from tqdm import tqdm  # noqa: PLC0415
    except ModuleNotFoundError:
        return None
    return tqdm


def _bar(**options: Any) -> Any:
    tqdm = _tqdm()
    return None if tqdm is None else tqdm(leave=False, unit="", **options)


def _advance(bar: Any, done: int) -> None:
    bar.update(done - bar.n)
