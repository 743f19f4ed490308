"""A worker process per contestant, stopped while others have their turn: its idle threads take no one's time."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATIENCE = 600.0
"""Seconds that a worker may take to answer: compiling a shape is the longest."""


class Failed(Exception):
    """What a worker reports, or why it does not answer."""


class Worker:
    """One engine with one model; see ``peers.protocol``."""

    def __init__(
        self, python: Path, engine: str, folder: Path, variant: str, threads: int, cpus: Sequence[int], log: Path
    ) -> None:
        """Start it and wait until the model is loaded.

        Raises:
            Failed: the engine refuses the model.

        """
        self.log = log
        command = [str(python), "-m", f"peers.{engine}", str(folder), variant, str(threads), ",".join(map(str, cpus))]
        limits = {"OMP_NUM_THREADS": str(threads), "TVM_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=HERE,
                env={**os.environ, **limits},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
            )
        self.received = b""
        self.version: str = self._answer()["version"]
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a message and wait for its answer. Raises Failed."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            return self._answer()
        except BrokenPipeError as error:
            raise Failed(self._last_words()) from error
        finally:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGSTOP)

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self.process.poll() is None

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while b"\n" not in self.received:
            if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
                self.process.kill()
                raise Failed(f"no answer in {PATIENCE:.0f} s")
            part = self.process.stdout.read(1 << 16)
            if not part:
                raise Failed(self._last_words())
            self.received += part
        line, _, self.received = self.received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _last_words(self) -> str:
        """Why it died, as far as it said."""
        code = self.process.wait()
        ending = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"the process ended with {ending}; the last it said: {' '.join(lines[-1:])[:150]}"
