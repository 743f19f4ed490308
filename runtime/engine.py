"""Runs a loaded module on token ids: checks what it is given, packs it, calls the code, unpacks the result."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from whet.runtime.artifact import Artifact
from whet.runtime.audit import Auditor
from whet.runtime.cpu import choose_variant
from whet.runtime.ffi import tvm_ffi
from whet.runtime.library import load_runtime
from whet.runtime.memo import Memo
from whet.runtime.metadata import ArtifactError, Metadata
from whet.runtime.packing import Packed, aligned, positions_within, split, starts, tiles_of, unpack
from whet.runtime.threads import available_cpus, use_threads

T = TypeVar("T")

# The virtual machine's pooled allocator (2) would keep a buffer for every size that it ever saw.
_CPU, _DEVICE, _NOT_POOLED = 1, 0, 1

_KEPT = 8
"""Tiles of a call of one group whose arrays a thread keeps for the next: making them takes longer than filling them."""


class Engine:
    """A module ready to run token ids; :class:`whet.runtime.session.Session` adds texts to it.

    May be called from several threads at once: each gets its own scratch memory, and all share the code and the
    weights. May be used after a fork. Results are the caller's own arrays and outlive the engine.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None, isa: str | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; expected at least 1, or None for all CPUs the process may use")
        self.metadata: Metadata = choose_variant(artifact.variants, isa)
        self.path: Path = artifact.path
        self.threads: int = threads or available_cpus()
        self._runtime = load_runtime(self.path.resolve().parent)
        self._library = _load_library(artifact)
        packed = self.metadata.convention != "padded"
        self._main: Any = self._library[self.metadata.entry] if packed else None
        self._weights = (
            tvm_ffi.from_dlpack(artifact.blob())
            if packed
            else tvm_ffi.convert([tvm_ffi.from_dlpack(array) for array in artifact.weights(self.metadata)])
        )
        # Views of this session's own mapping: what is written there no other session sees.
        named = zip(self.metadata.weights, artifact.weights(self.metadata), strict=True) if self.metadata.exits else ()
        exits = next((array for weight, array in named if weight.name.startswith("exits.")), None)
        self.thresholds: NDArray[Any] | None = None if exits is None else exits[1]
        """Trust from which each cache answers, float32 ``(caches,)``, in the order of ``metadata.exits``; None without
        caches. Writing to it changes this session alone, from its next call on."""
        self.auditor: Auditor | None = None
        """What watches the caches, if anything does."""
        self.memo: Memo | None = None
        """Records of earlier requests' attention, if there are any."""
        self._local = threading.local()
        self._helpers: dict[int, ThreadPoolExecutor] = {}

    def __repr__(self) -> str:
        m = self.metadata
        return f"<{type(self).__name__} {m.name}: {m.task}, {m.precision} for {m.isa}, {self.threads} threads>"

    @property
    def _channels(self) -> int:
        """What the code writes of each request or token: with caches two more than the output has."""
        return self.metadata.output.channels + 2 * bool(self.metadata.exits)

    def run(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, token_type_ids: ArrayLike | None = None
    ) -> NDArray[np.float32]:
        """Run a padded batch as Hugging Face models take it.

        The mask may have any shape of zeros: padding on either side, or holes. Tokens where it is 0 are neither
        computed nor seen by others; the position of a token is its column. Pooling by the first token takes the first
        one that is kept.

        Args:
            input_ids: integers ``(batch, sequence)``.
            attention_mask: 0 or 1, ``(batch, sequence)``; all 1 if None.
            token_type_ids: integers ``(batch, sequence)``; all 0 if None.

        Returns:
            float32 ``(batch, channels)``, or ``(batch, sequence, channels)`` with zeros where the mask is 0.

        Raises:
            ValueError: wrong dtype or shape, an id outside the vocabulary, a row that is empty or too long.

        """
        ids = _integers("input_ids", input_ids, 2)
        batch, sequence = ids.shape
        mask = _like(ids, "attention_mask", attention_mask)
        types = _like(ids, "token_type_ids", token_type_ids)
        if mask is not None:
            _check_range("attention_mask", mask, 2)
        kept = None if mask is None else mask.astype(np.bool_)
        lengths = np.full(batch, sequence) if kept is None else kept.sum(axis=1)
        if batch and not lengths.all():
            raise ValueError(f"row {np.argmin(lengths)} is empty; expected a token (mask 1) in every row")
        if self.metadata.convention == "padded":
            return self._run_padded(ids, kept, types)
        if kept is None:
            rows = self._run_requests(ids.reshape(-1), lengths, None if types is None else types.reshape(-1))
            return rows if self.metadata.output.per == "request" else rows.reshape(batch, sequence, rows.shape[1])
        columns = np.broadcast_to(np.arange(sequence), ids.shape)[kept]
        self._check_positions(columns)
        rows = self._run_packed(ids[kept], lengths, columns, None if types is None else types[kept])
        if self.metadata.output.per == "request":
            return rows
        out = np.zeros((batch, sequence, rows.shape[1]), np.float32)
        out[kept] = rows
        return out

    def run_packed(
        self,
        ids: ArrayLike,
        lengths: ArrayLike,
        positions: ArrayLike | None = None,
        token_types: ArrayLike | None = None,
    ) -> NDArray[np.float32]:
        """Run requests that stand one after the other, without padding.

        Args:
            ids: integers ``(tokens,)``, the requests' token ids.
            lengths: integers ``(requests,)``, each at least 1; their sum is ``tokens``.
            positions: integers ``(tokens,)``; 0, 1, 2 … within each request if None.
            token_types: integers ``(tokens,)``; all 0 if None.

        Returns:
            float32 ``(tokens, channels)`` or ``(requests, channels)``, by ``metadata.output.per``.

        Raises:
            ValueError: as :meth:`run`.

        """
        tokens = _integers("ids", ids, 1)
        sizes = _integers("lengths", lengths, 1).astype(np.int64, copy=False)
        counts = sizes.tolist()  # of few numbers Python knows the least and the sum sooner than NumPy
        if counts and min(counts) < 1:
            raise ValueError(f"request {np.argmin(sizes)} has length {min(counts)}; expected at least 1")
        if sum(counts) != tokens.size:
            raise ValueError(f"lengths sum to {sum(counts)}, there are {tokens.size} ids; expected the same")
        places = _like(tokens, "positions", positions)
        types = _like(tokens, "token_types", token_types)
        if places is None:
            return self._run_requests(tokens, sizes, types)
        if self.metadata.convention == "padded":
            raise ValueError(f"{self.path} takes padded batches, so positions cannot be chosen; leave them out")
        self._check_positions(places)
        return self._run_packed(tokens, sizes, places, types)

    def _run_requests(
        self, ids: NDArray[Any], lengths: NDArray[np.int64], types: NDArray[Any] | None
    ) -> NDArray[np.float32]:
        if self.metadata.convention != "padded":
            return self._run_packed(ids, lengths, None, types)
        # Batches of one: without padding no answer can depend on its neighbours.
        first = starts(lengths)
        spans = [slice(a, a + n) for a, n in zip(first, lengths, strict=True)]
        rows = [self.run(ids[None, s], None, None if types is None else types[None, s]) for s in spans]
        rows = rows or [np.empty((0, self.metadata.output.channels), np.float32)]
        return np.concatenate([row.reshape(-1, row.shape[-1]) for row in rows])

    def _run_packed(
        self, ids: NDArray[Any], lengths: NDArray[np.int64], positions: NDArray[Any] | None, types: NDArray[Any] | None
    ) -> NDArray[np.float32]:
        """Run whole requests. Positions have been checked, or count from 0 if None."""
        rows = self.traced(ids, lengths, positions, types)
        if self.auditor is not None:
            places = positions_within(lengths) if positions is None else positions
            self.auditor.offer(ids, lengths, places, types, rows[:, -2])
        return np.ascontiguousarray(rows[:, : self.metadata.output.channels]) if self.metadata.exits else rows

    def traced(
        self, ids: NDArray[Any], lengths: NDArray[np.int64], positions: NDArray[Any] | None, types: NDArray[Any] | None
    ) -> NDArray[np.float32]:
        """Rows as :meth:`run_packed` gives them; with caches two more channels: after how many layers, and the trust.

        Not audited. Arguments as of ``run_packed``, which have been checked.
        """
        self._check_tokens(ids, types)
        if (longest := max(lengths.tolist(), default=0)) > self.metadata.max_length:
            raise ValueError(self._too_long(f"request {np.argmax(lengths)} has {longest} tokens"))
        # Records are of requests whose positions count from 0.
        if self.memo is not None and (positions is None or np.array_equal(positions, positions_within(lengths))):
            found = self.memo.find(ids, types, lengths)
            if found is not None:
                return self._run_with_memo(self.memo, ids, lengths, types, found.records)
        return self.run_recorded(ids, lengths, positions, types)

    def _run_with_memo(
        self,
        memo: Memo,
        ids: NDArray[Any],
        lengths: NDArray[np.int64],
        types: NDArray[Any] | None,
        records: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Run requests without records before those with, so that both have tiles of their own."""
        if len(lengths) == 1 and not memo.grows:
            return self.run_recorded(ids, lengths, None, types, records)
        first = starts(lengths)
        spans = [slice(a, a + n) for a, n in zip(first.tolist(), lengths.tolist(), strict=True)]
        per_token = self.metadata.output.per == "token"
        out = np.empty((len(ids) if per_token else len(lengths), self._channels), np.float32)
        order = np.argsort(records[:, 0] != 0, kind="stable").tolist()
        if memo.grows:
            alone = [i for i in order if not records[i, 0] and memo.wants(int(lengths[i]))]
            for i in alone:
                s = spans[i]
                tokens = memo.tokens(ids, types, s)
                with memo.adding(tokens) as room:
                    rows = self.run_recorded(
                        ids[s],
                        lengths[i : i + 1],
                        None,
                        None if types is None else types[s],
                        np.array([[0, room.address]]),
                    )
                    # Of a request that left early, the record has the first layers alone.
                    room.complete = not self.metadata.exits or rows[0, -2] == self.metadata.exits[-1]
                out[s if per_token else slice(i, i + 1)] = rows
            order = [i for i in order if i not in set(alone)]
        if order:
            tokens = np.concatenate([np.arange(spans[i].start, spans[i].stop) for i in order])
            out[tokens if per_token else order] = self.run_recorded(
                ids[tokens],
                lengths[order],
                None,
                None if types is None else types[tokens],
                records[order],
            )
        return out

    def run_recorded(
        self,
        ids: NDArray[Any],
        lengths: NDArray[np.int64],
        positions: NDArray[Any] | None,
        types: NDArray[Any] | None,
        records: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Run checked requests in calls of at most ``max_tokens`` tokens; ``records`` are what the module takes.

        They are ``(requests, 2)``, see whet.schedules.attention_memoized: requests without a record to use come first,
        and one whose record is made is alone.
        """
        if 0 < len(ids) <= self.metadata.max_tokens:
            return self._call(self._invoke_packed, ids, positions, types, lengths, records)
        per_token = self.metadata.output.per == "token"
        out = np.empty((len(ids) if per_token else len(lengths), self._channels), np.float32)
        start = 0
        for requests in split(lengths, self.metadata.max_tokens):
            tokens = slice(start, start + int(lengths[requests].sum()))
            rows = tokens if per_token else requests
            out[rows] = self._call(
                self._invoke_packed,
                ids[tokens],
                None if positions is None else positions[tokens],
                None if types is None else types[tokens],
                lengths[requests],
                None if records is None else records[requests],
            )
            start = tokens.stop
        return out

    def open_memo(self, path: str | os.PathLike[str], *, level: str = "default", grow: bool = False) -> Memo:
        """Open a memo file for this module, as :class:`Memo` does; it is used from where ``memo`` is set to it."""
        return Memo(path, self.metadata, self._library, level=level, grow=grow)

    def _run_padded(
        self, ids: NDArray[Any], kept: NDArray[np.bool_] | None, types: NDArray[Any] | None
    ) -> NDArray[np.float32]:
        self._check_tokens(ids if kept is None else ids[kept], types if kept is None or types is None else types[kept])
        if ids.shape[1] > self.metadata.max_length:
            raise ValueError(self._too_long(f"the rows have {ids.shape[1]} tokens"))
        per_token = self.metadata.output.per == "token"
        if not len(ids):
            return np.empty((0, *ids.shape[1:][:per_token], self.metadata.output.channels), np.float32)
        given = {
            "input_ids": ids if kept is None else np.where(kept, ids, self.metadata.pad_token_id),
            "attention_mask": 1 if kept is None else kept,
            "token_type_ids": 0 if types is None else types if kept is None else np.where(kept, types, 0),
        }
        args = []
        for name in self.metadata.inputs:
            if name not in given:
                raise ValueError(
                    f"the model wants the input {name!r}, which run() cannot give: only {', '.join(given)}"
                )
            args.append(aligned(ids.shape, np.int64))
            args[-1][...] = given[name]
        values = self._call(self._invoke_padded, *args)
        # Question answering graphs return start and end logits apart; elsewhere the first output is the answer.
        pair = self.metadata.task == "question_answering" and len(values) > 1
        out = np.stack(values[:2], axis=-1) if pair else values[0]
        if per_token and kept is not None:
            out[~kept] = 0
        return out

    # Kernels do not check bounds: every index into a table is checked here.

    def _check_tokens(self, ids: NDArray[Any], types: NDArray[Any] | None) -> None:
        _check_range("input_ids", ids, self.metadata.vocab_size)
        if types is not None:
            _check_range("token_type_ids", types, self.metadata.type_vocab_size)

    def _check_positions(self, positions: NDArray[Any]) -> None:
        if positions.size and positions.max() >= self.metadata.max_length:
            raise ValueError(self._too_long(f"a token stands at position {positions.max()}"))
        if positions.size and positions.min() < 0:
            raise ValueError(f"positions contains {positions.min()}; expected at least 0")

    def _too_long(self, what: str) -> str:
        return f"{what}; this model takes at most {self.metadata.max_length} tokens: truncate the input"

    def _call(self, invoke: Callable[..., T], *args: Any) -> T:
        """Run compiled code with as many threads as the engine has."""
        if use_threads(self.threads, self._runtime):
            return invoke(*args)
        return self._helper().submit(self._invoke_elsewhere, invoke, *args).result()

    def _invoke_elsewhere(self, invoke: Callable[..., T], *args: Any) -> T:
        use_threads(self.threads, self._runtime)
        return invoke(*args)

    def _invoke_packed(
        self,
        ids: NDArray[Any],
        positions: NDArray[Any] | None,
        types: NDArray[Any] | None,
        lengths: NDArray[np.int64],
        records: NDArray[np.int64] | None,
    ) -> NDArray[np.float32]:
        """Call the compiled function on what fits one call; arguments as of :meth:`Packed.fill`."""
        tiles, groups = tiles_of(len(ids)), tiles_of(len(lengths))
        packed, inputs, out = self._arguments(tiles, groups)
        packed.fill(ids, positions, types, lengths, records)
        self._main(*inputs, self._weights, self._workspace(tiles, groups), out)
        return unpack(packed.out, len(ids) if self.metadata.output.per == "token" else len(lengths))

    def _arguments(self, tiles: int, groups: int) -> tuple[Packed, list[Any], Any]:
        """Arrays for a call of this size, and what compiled code takes for them; the calling thread's own."""
        kept: dict[tuple[int, int], tuple[Packed, list[Any], Any]] = self._local.__dict__.setdefault("arguments", {})
        found = kept.get((tiles, groups))
        if found is None:
            per_token, recorded = self.metadata.output.per == "token", self.metadata.records is not None
            packed = Packed(tiles, groups, self._channels, per_token=per_token, recorded=recorded)
            found = packed, list(map(tvm_ffi.from_dlpack, packed.arrays)), tvm_ffi.from_dlpack(packed.out)
            if tiles <= _KEPT and groups == 1:
                kept[tiles, groups] = found
        return found

    def _workspace(self, tiles: int, groups: int) -> Any:
        """Scratch memory of the calling thread; it grows with the largest call, which ``max_tokens`` bounds."""
        size = max(1, tiles * self.metadata.workspace_per_tile + groups * self.metadata.workspace_per_group)
        held = getattr(self._local, "workspace", None)
        if held is None or held.shape[0] < size:
            held = self._local.workspace = tvm_ffi.from_dlpack(aligned((size,), np.uint8))
        return held

    def _invoke_padded(self, *args: NDArray[Any]) -> list[NDArray[Any]]:
        """Call ``main`` of a Relax VM; the results are copies."""
        main = getattr(self._local, "main", None)
        if main is None:
            # A virtual machine belongs to one thread; the executable and the weights are shared.
            machine = self._library["vm_load_executable"]()
            machine["vm_initialization"](_CPU, _DEVICE, _NOT_POOLED)
            main = self._local.main = machine["main"]
        result = main(*map(tvm_ffi.from_dlpack, args), self._weights)
        tensors = [result] if isinstance(result, tvm_ffi.Tensor) else list(result)
        return [np.array(np.from_dlpack(tensor)) for tensor in tensors]

    def _helper(self) -> ThreadPoolExecutor:
        """Return a thread with a pool of its own, for callers whose pool is too small or was lost in a fork."""
        here = os.getpid()
        return self._helpers.get(here) or self._helpers.setdefault(here, ThreadPoolExecutor(1, "whet"))


def _integers(name: str, value: ArrayLike, dimensions: int) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is ragged; expected rows of equal length, padded, and an attention_mask") from error
    if array.ndim != dimensions:
        raise ValueError(f"{name} has shape {array.shape}; expected {dimensions} dimension{'s' * (dimensions > 1)}")
    if array.size == 0 and array.dtype == np.float64:
        return array.astype(np.int64)  # NumPy's guess for empty lists
    if array.dtype.kind not in "iub":
        raise ValueError(f"{name} has dtype {array.dtype}; expected integers")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _like(ids: NDArray[Any], name: str, value: ArrayLike | None) -> NDArray[Any] | None:
    if value is None:
        return None
    array = _integers(name, value, ids.ndim)
    if array.shape != ids.shape:
        raise ValueError(f"{name} has shape {array.shape}, the ids have {ids.shape}; expected the same")
    return array


def _check_range(name: str, values: NDArray[Any], size: int) -> None:
    # As unsigned, negative values are too large as well: one pass instead of two.
    if values.size and values.view(f"u{values.itemsize}").max() >= size:
        wrong = values.min() if values.min() < 0 else values.max()
        raise ValueError(f"{name} contains {wrong}; expected values from 0 to {size - 1}")


_loaded: dict[bytes, Any] = {}
"""Code by digest, for all sessions of a file. It stays loaded, so that nothing it made can outlive it."""


def _load_library(artifact: Artifact) -> Any:
    """Load the code, or give what is loaded already."""
    if artifact.digest in _loaded:
        return _loaded[artifact.digest]
    folder, name = artifact.path.resolve().parent, artifact.path.resolve().name
    for slashes in range(1, 100):
        # dlopen gives back what is loaded under the same name even if the file has been replaced since; spelled
        # differently, it looks at the file.
        spelling = f"{folder}{'/' * slashes}{name}"
        try:
            library = ctypes.CDLL(spelling, ctypes.RTLD_LOCAL)
            digest = bytes((ctypes.c_char * len(artifact.digest)).in_dll(library, "whet_digest"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{artifact.path} does not load: {error}") from error
        if digest == artifact.digest:
            try:
                return _loaded.setdefault(digest, tvm_ffi.load_module(spelling))
            except RuntimeError as error:
                raise ArtifactError(
                    f"{artifact.path} does not load in this TVM runtime ({error}); it was compiled with apache-tvm-ffi "
                    f"{artifact.metadata.tvm_ffi}: install that one, or compile the model again"
                ) from error
    raise ArtifactError(
        f"{artifact.path} was replaced while it was loaded, or too often in this process; load it again"
    )
