"""A loaded module: checks what it is given, packs tokens into tiles, runs, unpacks."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi
from numpy.typing import ArrayLike, NDArray

from whet.runtime.artifact import Artifact
from whet.runtime.cpu import check_cpu, request_amx
from whet.runtime.library import load_runtime
from whet.runtime.metadata import ALIGNMENT, ArtifactError, Metadata
from whet.runtime.threads import available_cpus, use_threads

TILE = 16
"""Tokens in a tile, requests in a group; see whet.passes.dialect."""

_CPU, _DEVICE, _POOLED = 1, 0, 2

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


class Session:
    """A module ready to run, made by :func:`whet.runtime.load`.

    May be called from several threads at once: each gets its own virtual machine, and all share the code and the
    weights. May be used after a fork. Results are the caller's own arrays; they outlive the session.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(
                f"threads is {threads}; expected at least 1, or None for all CPUs that the process may use"
            )
        self.metadata: Metadata = artifact.metadata
        self.path: Path = artifact.path
        self.threads: int = threads or available_cpus()
        check_cpu(self.metadata.cpu_flags, self.metadata.isa)
        self._runtime = load_runtime(self.path.resolve().parent)
        if "amx_int8" in self.metadata.cpu_flags:
            request_amx()
        self._artifact = artifact
        self._module = _load_library(artifact)
        self._weights = tvm_ffi.convert([_tensor(array) for array in artifact.weights()])
        self._local = threading.local()
        self._executor: tuple[int, ThreadPoolExecutor] | None = None
        self._executor_lock = threading.Lock()

    def __repr__(self) -> str:
        m = self.metadata
        return f"<whet.Session {m.name}: {m.task}, {m.precision} for {m.isa}, {self.threads} threads>"

    def run(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, token_type_ids: ArrayLike | None = None
    ) -> Floats:
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
        mask = np.ones_like(ids) if attention_mask is None else _integers("attention_mask", attention_mask, 2)
        types = np.zeros_like(ids) if token_type_ids is None else _integers("token_type_ids", token_type_ids, 2)
        for name, array in (("attention_mask", mask), ("token_type_ids", types)):
            if array.shape != ids.shape:
                raise ValueError(f"{name} has shape {array.shape}, input_ids {ids.shape}; expected the same")
        _check_range("attention_mask", mask, 2)
        kept = mask.astype(np.bool_)
        lengths = kept.sum(axis=1)
        if len(ids) and not lengths.all():
            raise ValueError(f"row {int(np.argmin(lengths))} has no token; expected at least one where the mask is 1")
        columns = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)[kept]
        self._check_tokens(ids[kept], columns, types[kept])
        if self.metadata.convention == "padded":
            return self._run_padded({"input_ids": ids, "attention_mask": mask, "token_type_ids": types}, kept)
        packed = self._run_split(ids[kept], lengths, columns, types[kept])
        if self.metadata.output.per == "request":
            return packed
        out = np.zeros((*ids.shape, packed.shape[1]), np.float32)
        out[kept] = packed
        return out

    def run_packed(
        self,
        ids: ArrayLike,
        lengths: ArrayLike,
        positions: ArrayLike | None = None,
        token_types: ArrayLike | None = None,
    ) -> Floats:
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
        flat = _integers("ids", ids, 1)
        sizes = _integers("lengths", lengths, 1)
        if len(sizes) and sizes.min() < 1:
            raise ValueError(f"request {int(np.argmin(sizes))} has length {sizes.min()}; expected at least 1")
        if sizes.sum() != len(flat):
            raise ValueError(f"the lengths sum to {sizes.sum()}, there are {len(flat)} ids")
        if positions is None:
            where = np.arange(len(flat)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        else:
            where = _integers("positions", positions, 1)
        types = np.zeros_like(flat) if token_types is None else _integers("token_types", token_types, 1)
        for name, array in (("positions", where), ("token_types", types)):
            if array.shape != flat.shape:
                raise ValueError(f"{name} has shape {array.shape}, ids {flat.shape}; expected the same")
        self._check_tokens(flat, where, types)
        if len(sizes) and sizes.max() > self.metadata.max_length:
            raise ValueError(self._too_long(int(np.argmax(sizes)), int(sizes.max())))
        return self._run_split(flat, sizes, where, types)

    def _check_tokens(self, ids: NDArray[Any], positions: NDArray[Any], types: NDArray[Any]) -> None:
        """Kernels do not check bounds; every index into a table is checked here."""
        _check_range("input_ids", ids, self.metadata.vocab_size, "the vocabulary")
        _check_range("token_type_ids", types, self.metadata.type_vocab_size, "the token types")
        if positions.size and not 0 <= positions.min() <= positions.max() < self.metadata.max_length:
            raise ValueError(
                f"a token stands at position {positions.max()}; this model takes at most {self.metadata.max_length} "
                "tokens: truncate the input"
            )

    def _too_long(self, row: int, length: int) -> str:
        return f"request {row} has {length} tokens; this model takes at most {self.metadata.max_length}: truncate it"

    def _run_split(
        self, ids: NDArray[Any], lengths: NDArray[Any], positions: NDArray[Any], types: NDArray[Any]
    ) -> Floats:
        """Run in calls of at most ``max_tokens`` tokens, whole requests each."""
        if self.metadata.convention == "padded":
            raise ValueError(
                f"{self.path} was compiled from an unrecognised source and takes padded batches: use run()"
            )
        per_token = self.metadata.output.per == "token"
        out = np.empty((len(ids) if per_token else len(lengths), self.metadata.output.channels), np.float32)
        ends = np.cumsum(lengths)
        for first, last in _calls(lengths, self.metadata.max_tokens):
            start, end = ends[first] - lengths[first], ends[last - 1]
            tokens = slice(start, end)
            args = _pack(ids[tokens], positions[tokens], types[tokens], lengths[first:last])
            columns = self._call(args)[0].swapaxes(1, 2)
            out[tokens if per_token else slice(first, last)] = columns.reshape(-1, out.shape[1])[
                : end - start if per_token else last - first
            ]
        return out

    def _run_padded(self, given: dict[str, NDArray[Any]], kept: NDArray[np.bool_]) -> Floats:
        unknown = [name for name in self.metadata.inputs if name not in given]
        if unknown:
            raise ValueError(
                f"the model takes {', '.join(unknown)}, which run() cannot give; it takes {', '.join(given)}"
            )
        if not len(kept):
            return np.empty(
                (0, *kept.shape[1:][: self.metadata.output.per == "token"], self.metadata.output.channels), "f4"
            )
        args = []
        for name in self.metadata.inputs:
            args.append(aligned(kept.shape, np.dtype(np.int64)))
            args[-1][...] = given[name]
        values = self._call(args)
        # Question answering graphs return start and end logits apart; of other graphs the first output is the answer.
        out = (
            np.stack(values[:2], -1)
            if self.metadata.task == "question_answering" and len(values) > 1
            else values[0].copy()
        )
        if self.metadata.output.per == "token":
            out[~kept] = 0
        return out.astype(np.float32, copy=False)

    def _call(self, args: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Call ``main`` with as many threads as this session has; the results are copies."""
        if use_threads(self.threads, self._runtime):
            return self._invoke(args)
        return self._helper().submit(self._call, args).result()

    def _invoke(self, args: list[NDArray[Any]]) -> list[NDArray[Any]]:
        main: Callable[..., Any] | None = getattr(self._local, "main", None)
        if main is None:
            # A virtual machine belongs to one thread; the executable and the weights are shared.
            machine = self._module["vm_load_executable"]()
            machine["vm_initialization"](_CPU, _DEVICE, _POOLED)
            main = self._local.main = machine["main"]
        result = main(*(_tensor(array) for array in args), self._weights)
        tensors = [result] if isinstance(result, tvm_ffi.Tensor) else list(result)
        # The tensors' memory belongs to the machine's pool and goes back to it here.
        return [np.array(np.from_dlpack(tensor)) for tensor in tensors]

    def _helper(self) -> ThreadPoolExecutor:
        """A thread that starts a pool of its own, for callers whose pool is too small or was lost in a fork."""
        with self._executor_lock:
            if self._executor is None or self._executor[0] != os.getpid():
                self._executor = (os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="whet"))
            return self._executor[1]


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Uninitialised array at a 64-byte boundary, which compiled code relies on and NumPy does not give."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _tensor(array: NDArray[Any]) -> Any:
    return tvm_ffi.from_dlpack(array)


def _pack(
    ids: NDArray[Any], positions: NDArray[Any], types: NDArray[Any], lengths: NDArray[Any]
) -> list[NDArray[np.int32]]:
    """ids, positions, token types ``(tiles, 16)`` and segments ``(groups, 16, 2)``; what is left of the last tile is 0."""
    tiles, groups = -(-len(ids) // TILE), -(-len(lengths) // TILE)
    tokens = aligned((3, tiles, TILE), np.dtype(np.int32))
    for plane, values in zip(tokens.reshape(3, -1), (ids, positions, types), strict=True):
        plane[: len(ids)] = values
        plane[len(ids) :] = 0
    segments = aligned((groups, TILE, 2), np.dtype(np.int32))
    flat = segments.reshape(-1, 2)
    flat[: len(lengths), 0] = np.cumsum(lengths) - lengths
    flat[: len(lengths), 1] = lengths
    flat[len(lengths) :] = 0
    return [*tokens, segments]


def _calls(lengths: NDArray[Any], most: int) -> Iterator[tuple[int, int]]:
    """Split requests into consecutive ranges of at most ``most`` tokens; a longer single request stands alone."""
    first = tokens = 0
    for i, length in enumerate(lengths.tolist()):
        if tokens + length > most and i > first:
            yield first, i
            first, tokens = i, 0
        tokens += length
    if first < len(lengths):
        yield first, len(lengths)


def _integers(name: str, value: ArrayLike, dimensions: int) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is ragged; expected rows of equal length, padded, with an attention_mask") from error
    if array.size == 0 and array.dtype == np.float64:
        array = array.astype(np.int32)  # what an empty list becomes
    if array.ndim != dimensions:
        raise ValueError(f"{name} has shape {array.shape}; expected {dimensions} dimension{'s' * (dimensions > 1)}")
    if array.dtype.kind not in "iub":
        raise ValueError(f"{name} has dtype {array.dtype}; expected integers")
    return array


def _check_range(name: str, values: NDArray[Any], size: int, what: str = "") -> None:
    if values.size and not 0 <= values.min() <= values.max() < size:
        wrong = values.min() if values.min() < 0 else values.max()
        raise ValueError(f"{name} contains {wrong}, outside {what + ', ' if what else ''}0 to {size - 1}")


def _load_library(artifact: Artifact) -> Any:
    """dlopen the module. The library stays loaded: tensors that its code made may outlive every reference to it."""
    for slashes in itertools.count(1):
        # dlopen returns a library already loaded under the same name even if the file has been replaced since;
        # another spelling of the name makes it look at the file.
        name = f"{artifact.path.resolve().parent}{'/' * slashes}{artifact.path.name}"
        try:
            library = ctypes.CDLL(name, ctypes.RTLD_LOCAL)
            digest = bytes((ctypes.c_char * len(artifact.digest)).in_dll(library, "whet_digest"))
            if digest == artifact.digest:
                return tvm_ffi.load_module(name)
        except (OSError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{artifact.path} does not load ({error}); compile it again") from error
        if slashes > 1000:
            break
    raise ArtifactError(f"{artifact.path} changes while it is being loaded")
