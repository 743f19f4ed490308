"""Audits of early answers: a share of requests is answered again by all layers, and caches that err are trusted less.

What a request's caches would have said, each by itself, and what the model says, is kept for the last audited requests.
The loss of a request is what the model itself expects it to be: by how much the probability of the cache's class is
below that of its own. The thresholds are those that the module was compiled with until requests change. That shows in
two ways: the newest audits lose more than the module allows, by more than chance; or, sooner, since audits are few,
requests leave elsewhere than they did (``whet.runtime.change``).

After a change what was audited before is no evidence any more, and more requests are audited. The thresholds are raised
together, each to the same quantile of the trust that its cache gave, until the loss is within the budget, were one more
of the audited requests lost: so at first nothing is trusted. They are those of before again when with them the loss is
what the module allows. So caches that come to err answer less, and those that recover answer again; and nothing is ever
trusted more than when it was fitted.

Their token ids are kept, too, so that caches can be fitted again on what the module is asked: :func:`audited_requests`.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from pathlib import Path
from queue import Full, Queue
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from whet.runtime.archive import DAMAGE, read_archive, write_archive
from whet.runtime.change import ChangeDetector
from whet.runtime.metadata import ArtifactError

if TYPE_CHECKING:
    from whet.runtime.engine import Engine

_log = logging.getLogger(__name__)

WINDOW = 1000
"""Audited requests that thresholds follow from."""
KEPT = 4000
"""Audited requests that are kept, to fit caches again: a few hundred say too little of a loss below half a point."""
RECENT = (25, 100, WINDOW)
"""So many of the newest are judged by themselves: a change shows sooner."""
LEAST = 50
"""Audited requests, since requests changed, before thresholds can be lowered, or raised for the first time."""
ALARMED = 10
"""Times as many requests are audited while thresholds are raised: what to trust then must be learned soon."""
_ERRORS = 2.0
"""Standard errors by which a loss is above what is allowed by more than chance."""
_QUEUE = 256
"""Requests that wait for their audit; more are let go."""
_SAVE_EVERY = 32
_LEVELS = np.linspace(0.0, 1.0, 51)
_FORMAT = 3
_KIND = "whet audit"

NEVER = float(np.finfo(np.float32).max)


class Request(NamedTuple):
    """Token ids, positions and types, each ``(tokens,)``; types may be None."""

    ids: NDArray[Any]
    positions: NDArray[Any]
    types: NDArray[Any] | None


class Auditor:
    """Watches a session's requests and sets its thresholds; see the module docstring.

    The work is done by a thread of its own, one request at a time on one CPU; a request that is audited takes there as
    long as the caches' layers and all layers together. State is kept in ``path``, written whole every so many audits
    and whenever thresholds change, so that a crash loses little and damages nothing; of several processes with the same
    module the last to write wins.
    """

    def __init__(self, engine: Engine, twin: Engine, share: float, path: Path, digest: bytes) -> None:
        """``twin`` is a second engine of the same module, whose thresholds are the auditor's own to change."""
        if not 0 < share <= 1:
            raise ValueError(f"audit is {share}; expected a share of requests, above 0 and at most 1")
        if engine.thresholds is None or twin.thresholds is None:
            raise ValueError(f"{engine.path} has no caches to audit; leave audit out, or compile with freeze=")
        if not os.access(path.resolve().parent, os.W_OK):
            raise ValueError(f"audits of {engine.path} are kept in {path}, which can't be written; make it writable")
        self.share = share
        self.alarmed = False
        """Whether requests have changed, and thresholds are raised."""
        self.changes = 0
        """How often requests were found to have changed, in this process."""
        self.path = path
        self.count = 0
        """Requests audited by this process."""
        self.dropped = 0
        """Requests that were chosen, but came while too many waited."""
        self._engine, self._twin, self._digest = engine, twin, digest
        self._fitted: NDArray[Any] = twin.thresholds.copy()
        self._kept = np.empty((KEPT, 2, len(self._fitted)))
        """Trust and loss of each cache, of the newest requests, overwritten in turns."""
        self._requests: list[Request] = []
        """The same requests, in the same places."""
        self._added = 0
        self._change: int | None = None
        """How many had been added when requests last changed; None where they are those of the fit."""
        self._detector = ChangeDetector(engine.metadata.leave) if engine.metadata.leave else None
        self._places = {layers: place for place, layers in enumerate(engine.metadata.exits)}
        self._queue: Queue[Request] = Queue(_QUEUE)
        self._process = 0
        self._start = threading.Lock()
        if path.exists():
            self._load()
            self._apply()

    @property
    def loss(self) -> float:
        """Mean loss of the last 1000 audited requests, with the thresholds of now; NaN before the first."""
        if not self._added or self._engine.thresholds is None:
            return float("nan")
        return float(_losses(self._engine.thresholds, *self._seen()).mean())

    @property
    def _evidence(self) -> int:
        """How many of the newest requests say something about those that are to come."""
        return min(self._added - (self._change or 0), WINDOW)

    def _newest(self, count: int = WINDOW) -> NDArray[np.intp]:
        """The places of the newest requests, oldest first."""
        return np.arange(max(0, self._added - min(count, KEPT)), self._added) % KEPT

    def _seen(self, count: int = WINDOW) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Trust and loss ``(requests, caches)`` of the newest requests."""
        kept = self._kept[self._newest(count)]
        return kept[:, 0], kept[:, 1]

    def _add(self, request: Request, trust: NDArray[Any], loss: NDArray[Any]) -> None:
        place = self._added % KEPT
        self._kept[place] = trust, loss
        self._requests[place : place + 1] = [request]
        self._added += 1

    def offer(
        self, ids: NDArray[Any], lengths: NDArray[Any], positions: NDArray[Any], types: Any, left: NDArray[Any]
    ) -> None:
        """Take a share of the requests of a call, which left after so many layers ``(requests,)``."""
        self._watch(left)
        start = 0
        share = self.share * (ALARMED if self.alarmed else 1)
        for length in lengths.tolist():
            if random.random() < share:
                tokens = slice(start, start + length)
                self._run()
                of_types = None if types is None else types[tokens].copy()
                try:
                    self._queue.put_nowait(Request(ids[tokens].copy(), positions[tokens].copy(), of_types))
                except Full:
                    self.dropped += 1
            start += length

    def _watch(self, left: NDArray[Any]) -> None:
        """Trust nothing if requests have changed.

        Without a lock, which a fork could leave locked: an audit at the same moment may trust caches once more, the
        next one does not.
        """
        if self._detector is None or self.alarmed:  # where thresholds are raised others leave, elsewhere
            return
        if self._detector.saw(self._places[layers] for layers in left.tolist()):
            self._changed(self._added)
            self._set(np.full_like(self._fitted, NEVER))

    def wait(self) -> None:
        """Until all requests that were taken have been audited, and the state is written."""
        self._queue.join()
        self._save()

    def _run(self) -> None:
        """Start the thread, once in each process: a fork has none, and a queue that may be locked."""
        if self._process != os.getpid():
            with self._start:
                if self._process != os.getpid():
                    self._queue = Queue(_QUEUE)
                    self._process = os.getpid()
                    threading.Thread(target=self._work, name="whet-audit", daemon=True).start()

    def _work(self) -> None:
        queue = self._queue
        while True:
            request = queue.get()
            try:
                self._add(request, *self._ask(request))
                self.count += 1
                changed = self._apply()
                if changed or self.count % _SAVE_EVERY == 0:
                    self._save()
            except Exception:  # such as a full disk: the service goes on, and so does the thread
                _log.exception("an audit of %s failed", self._engine.path)
            finally:
                queue.task_done()

    def _ask(self, request: Request) -> tuple[NDArray[Any], NDArray[Any]]:
        """Trust in each cache's answer ``(caches,)``, and what is lost by it."""
        thresholds = self._twin.thresholds
        assert thresholds is not None
        rows = []
        length = np.array([len(request.ids)])
        for cache in range(len(thresholds) + 1):
            thresholds[:] = NEVER
            if cache < len(thresholds):
                thresholds[cache] = -NEVER
            rows.append(self._twin.traced(request.ids, length, request.positions, request.types)[0])
        answers, trust = np.array([row[:-2] for row in rows]), np.array([row[-1] for row in rows[:-1]])
        loss = expected_loss(answers[:-1].argmax(axis=1), answers[-1])
        return trust, loss

    def _apply(self) -> bool:
        """Set the session's thresholds by what audits have seen; returns whether they changed."""
        if not self.alarmed:
            shown = next((count for count in RECENT if self._loses(min(count, self._evidence))), None)
            if shown is None:
                self._expect()
                return self._set(self._fitted)
            self._changed(self._added - min(shown, self._evidence))
        if self._evidence < LEAST:
            return self._set(np.full_like(self._fitted, NEVER))
        metadata, seen = self._engine.metadata, self._seen(self._evidence)
        if _bound(self._fitted, *seen) > metadata.allowed_loss:
            return self._set(tightened(self._fitted, *seen, metadata.budget))
        self.alarmed = False
        self._expect()
        return self._set(self._fitted)

    def _expect(self) -> None:
        """After a change, take for granted where those leave that came since: they are others, and answered well."""
        if self._change is None or self._detector is None:
            return
        trust, _ = self._seen(self._evidence)
        trusted = np.column_stack([trust >= self._fitted, np.ones(len(trust), np.bool_)])
        places = np.bincount(trusted.argmax(axis=1), minlength=len(self._fitted) + 1)
        self._detector.expect((places / len(trust)).tolist())

    def _loses(self, count: int) -> bool:
        """Whether the newest requests lose more than is allowed, by more than chance."""
        if self._evidence < LEAST:
            return False
        lost = _losses(self._fitted, *self._seen(count))
        return bool(lost.mean() - _ERRORS * lost.std() / np.sqrt(count) > self._engine.metadata.allowed_loss)

    def _changed(self, since: int) -> None:
        """Take requests for others since so many had been added."""
        self._change = since
        self.changes += 1
        self.alarmed = True

    def _set(self, thresholds: NDArray[Any]) -> bool:
        """Serve by these thresholds; returns whether they are others than before."""
        now = self._engine.thresholds
        assert now is not None
        changed = not np.array_equal(thresholds, now)
        now[:] = thresholds
        return changed

    # The file.

    def _save(self) -> None:
        trust, loss = self._seen(KEPT)
        requests = [self._requests[place] for place in self._newest(KEPT)]
        changed = None if self._change is None else self._evidence
        header = {"kind": _KIND, "format": _FORMAT, "module": self._digest.hex()}
        header |= {"since_change": changed, "alarmed": self.alarmed}
        lengths = np.array([len(request.ids) for request in requests], np.int64)
        tokens = np.concatenate([np.zeros((3, 0), np.int32), *map(_tokens_of, requests)], axis=1)
        write_archive(self.path, header, {"trust": trust, "loss": loss, "lengths": lengths, "tokens": tokens})

    def _load(self) -> None:
        header, trust, loss, requests = _read(self.path)
        module, changed = header["module"], header["since_change"]
        if module != self._digest.hex():
            raise ArtifactError(
                f"{self.path} keeps audits of another module than {self._engine.path}, such as one that was compiled "
                "earlier; delete it to start anew"
            )
        if trust.shape[1:] != (len(self._fitted),):
            raise ArtifactError(f"{self.path} keeps audits of another number of caches; delete it to start anew")
        for one in zip(requests[-KEPT:], trust[-KEPT:], loss[-KEPT:], strict=True):
            self._add(*one)
        self._change = None if changed is None else self._added - changed
        self.alarmed = header["alarmed"]


def audited_requests(path: str | os.PathLike[str]) -> list[Request]:
    """The requests that audits kept in a file, oldest first. Raises ArtifactError, FileNotFoundError."""
    return _read(Path(path))[3]


def _read(path: Path) -> tuple[dict[str, Any], NDArray[np.float64], NDArray[np.float64], list[Request]]:
    """The header, trust and loss ``(requests, caches)``, and the requests."""
    try:
        header, parts = read_archive(path)
        kind = header["kind"], header["format"]
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        raise ArtifactError(
            f"{path} is damaged or keeps no audits ({type(error).__name__}: {error}); delete it to start anew"
        ) from error
    if kind != (_KIND, _FORMAT):
        raise ArtifactError(f"{path} keeps no audits that this runtime reads; delete it to start anew")
    try:
        trust, loss, lengths, tokens = (parts[name] for name in ("trust", "loss", "lengths", "tokens"))
        if trust.shape != loss.shape or trust.ndim != 2 or len(trust) != len(lengths):
            raise ValueError("its parts do not fit together")
        split = np.split(tokens.reshape(3, lengths.sum()), np.cumsum(lengths)[:-1], axis=1) if len(lengths) else []
        types = ("module", str), ("since_change", int | None), ("alarmed", bool)
        if not all(isinstance(header[name], kind) for name, kind in types):
            raise ValueError("its header does not")
        return header, trust.astype(np.float64), loss.astype(np.float64), [Request(*r) for r in split]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is malformed ({error}); delete it to start anew") from error


def _tokens_of(request: Request) -> NDArray[np.int32]:
    """Ids, positions and types, ``(3, tokens)``."""
    types = np.zeros_like(request.ids) if request.types is None else request.types
    return np.stack([request.ids, request.positions, types]).astype(np.int32)


def expected_loss(classes: NDArray[np.intp], logits: NDArray[Any]) -> NDArray[np.float64]:
    """What the model itself expects to lose if these classes ``(…,)`` are answered in place of its own.

    That is the difference of the probabilities that its logits ``(labels,)`` give them.
    """
    probabilities = np.exp(logits - logits.max(), dtype=np.float64)
    probabilities /= probabilities.sum()
    return np.asarray(probabilities.max() - probabilities[classes])


def tightened(fitted: NDArray[Any], trust: NDArray[Any], loss: NDArray[Any], allowed: float) -> NDArray[np.float32]:
    """The least raised thresholds ``(caches,)`` whose loss over audited requests is at most ``allowed``.

    That is their mean, were one more of them lost: few requests prove little. ``trust`` and ``loss`` are
    ``(requests, caches)``.
    """
    thresholds = fitted
    for level in _LEVELS:
        raised = np.quantile(trust, level, axis=0) if level < 1 else np.full(len(fitted), NEVER)
        thresholds = np.maximum(fitted, raised) if level > 0 else fitted
        if _bound(thresholds, trust, loss) <= allowed:
            break
    return thresholds.astype(np.float32)


def _bound(thresholds: NDArray[Any], trust: NDArray[Any], loss: NDArray[Any]) -> float:
    """The mean loss of requests with these thresholds, were one more of them lost."""
    return (float(_losses(thresholds, trust, loss).sum()) + 1) / len(trust)


def _losses(thresholds: NDArray[Any], trust: NDArray[Any], loss: NDArray[Any]) -> NDArray[np.float64]:
    """Of each request, with these thresholds."""
    requests = np.arange(len(trust))
    trusted = trust >= thresholds
    first = trusted.argmax(axis=1)
    return np.where(trusted.any(axis=1), loss[requests, first], 0.0)
