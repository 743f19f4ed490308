"""Finds the record that a request can use: the one with the nearest key, if its tokens are near enough.

One look-up serves all layers, before the first of them. Compiled code does it, see whet.schedules.nearest_record, by
one of two kinds of vectors of words, ``memo_file.KEYS``.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.runtime.ffi import tvm_ffi
from whet.runtime.memo_file import KEYS, MemoError, MemoFile
from whet.runtime.metadata import Metadata
from whet.runtime.packing import aligned, starts

KEPT = 0.75
"""Share of a full file, in bytes and in records, that is kept."""

LOOK_EVERY = 0.1
"""Seconds after which it is asked again whether another file has the name: that takes as long as a search."""

LEVELS = ("strict", "default", "loose")
"""Names of how near is near enough, each with a distance of its own in the file."""


@dataclass
class Room:
    """Where a record is to be written."""

    address: int
    """0 if it does not fit any more."""
    complete: bool = True
    """Set to False, the record is not added."""


@dataclass(frozen=True)
class Found:
    """What a look-up found."""

    records: NDArray[np.int64]
    """Addresses ``(requests, 2)``: of the record that a request can use, 0 where there is none, and 0."""
    file: MemoFile
    """Where they are; its memory is there as long as this is."""


class _Asked:
    """Requests as compiled code takes them, and where it writes what it found."""

    def __init__(self, tokens: int, requests: int) -> None:
        self.tokens = aligned((2, tokens), np.int32)
        self.segments = aligned((requests, 2), np.int32)
        self.number: NDArray[np.int64] = aligned((requests,), np.int64)
        self.distance: NDArray[np.float32] = aligned((requests,), np.float32)
        self.given = [tvm_ffi.from_dlpack(array) for array in (self.tokens, self.segments)]
        self.found = [tvm_ffi.from_dlpack(array) for array in (self.number, self.distance)]


class _Code:
    """The functions of a module that look up, and what they take besides a file."""

    def __init__(self, metadata: Metadata, library: Any, dimensions: int) -> None:
        self.key = library[f"{metadata.entry}_key"]
        self.nearest = library[f"{metadata.entry}_nearest"]
        self.max_length = metadata.max_length
        self.dimensions = dimensions
        bits = hashlib.shake_256(b"whet").digest(-(-self.max_length * self.dimensions // 8))
        signs = np.unpackbits(np.frombuffer(bits, np.uint8))[: self.max_length * self.dimensions]
        self.signs = _own(signs.reshape(self.max_length, self.dimensions).astype(np.int8) * 2 - 1)


class _Index:
    """The records of one file by their lengths, and when they were last used."""

    def __init__(self, file: MemoFile, code: _Code, kind: str) -> None:
        self.file = file
        self.kind = kind
        """Of the keys by which the nearest is found."""
        self._code = code
        vectors, keys = file.vectors[KEYS.index(kind)], file.keys[KEYS.index(kind)]
        self._vectors = [_of_file(vectors) for vectors in file.vectors]
        self._before = [_of_file(vectors), code.signs, _of_file(keys)]
        entries = file.entries.view(np.int64).reshape(len(file.entries), -1)
        self._after = [_of_file(entries), _of_file(file.words)]
        self._lock = threading.RLock()
        self._known = -1
        self._by_length: list[Any] = []
        self.used: dict[int, None] = {}
        """Records that were of use, the latest last."""
        self.take_in_new()

    def of(self, file: MemoFile) -> _Index:
        """The same of another file."""
        return _Index(file, self._code, self.kind)

    def search(self, asked: _Asked) -> None:
        """Find the record nearest to each request; requests of length 0 have none."""
        self._code.nearest(*asked.given, *self._before, *self._by_length, *self._after, *asked.found)

    def keys_of(self, asked: _Asked) -> NDArray[np.float32]:
        """Of each kind the keys of requests, ``(2, requests, dimensions)``."""
        keys = aligned((len(KEYS), len(asked.segments), self._code.dimensions), np.float32)
        for vectors, out in zip(self._vectors, keys, strict=True):
            self._code.key(*asked.given, vectors, self._code.signs, tvm_ffi.from_dlpack(out))
        return keys

    def use(self, index: int) -> None:
        """Note that a record is of use."""
        with self._lock:
            self.used.pop(index, None)
            self.used[index] = None

    def thinned(self) -> _Index:
        """Put a file of the records that were of use last in place of this one. Raises as ``MemoFile.thinned``."""
        d = self.file.description
        sizes = [d.record_size(int(n)) for n in self.file.entries["length"][: self.file.count]]
        with self._lock:
            used = list(self.used)
        others = sorted(set(range(len(sizes))) - set(used))
        latest = [*others, *used][::-1][: int(KEPT * d.capacity)]
        fit = np.searchsorted(np.cumsum([sizes[i] for i in latest]), KEPT * (d.size - d.first_record), side="right")
        keep = sorted(latest[: int(fit)])
        index = self.of(self.file.thinned(keep))
        new = {old: number for number, old in enumerate(keep)}
        index.used = {new[old]: None for old in used if old in new}
        return index

    def take_in_new(self) -> None:
        """Learn of records that were added, if there are any."""
        if self.file.count == self._known:
            return
        with self._lock:
            count = self.file.count
            lengths = self.file.entries["length"][:count].astype(np.uint16)
            order = np.argsort(lengths, kind="stable")
            begin = np.searchsorted(lengths[order], np.arange(self._code.max_length + 2))
            # An array has a place in memory only if it has an element.
            self._by_length = [_own(array.astype(np.int64)) for array in (np.append(order, 0), begin)]
            self._known = count


class Memo:
    """Records of a memo file, for the module that made them."""

    def __init__(
        self,
        path: str | PathLike[str],
        metadata: Metadata,
        library: Any,
        *,
        level: str = "default",
        grow: bool = False,
    ) -> None:
        """Open a file for a module.

        Args:
            path: file that ``whet memo build`` wrote.
            metadata: the module's.
            library: its code.
            level: how near is near enough: ``"strict"``, ``"default"`` or ``"loose"``.
            grow: let requests that find nothing add records. One process at a time may.

        Raises:
            FileNotFoundError: there is no such file.
            MemoError: it is damaged, or for another module.
            ValueError: no such level.

        """
        if level not in LEVELS:
            raise ValueError(f"memo_level is {level!r}; expected one of {', '.join(LEVELS)}")
        if metadata.records is None:
            raise MemoError(f"{metadata.name} was compiled without the use of records; compile it with --memo")
        self.grows = grow
        self.hits = self.misses = 0
        self._lock = threading.RLock()
        self._follows = True
        self._look_again = 0.0
        self._local = threading.local()
        self._max_length = metadata.max_length
        file = MemoFile(path, writable=grow)
        description = file.description
        if description.records != metadata.records:
            raise MemoError(
                f"{path} was built for another model, or another build of it ({description.name}); build one for this "
                "module: whet memo build"
            )
        self._index = _Index(file, _Code(metadata, library, description.records.dimensions), description.keys_of[level])
        self._within = description.levels[level]
        ranges = description.pays[level]
        self._pays = [any(first <= n <= last for first, last in ranges) for n in range(metadata.max_length + 1)]

    @property
    def file(self) -> MemoFile:
        """The file as it is mapped now."""
        return self._index.file

    def nearest(self, tokens: NDArray[np.int32]) -> tuple[int | None, float]:
        """Record nearest to a request, and how far it is; ``tokens`` are ``(2, length)``."""
        asked = self._ask(tokens[0], tokens[1], np.array([tokens.shape[1]]))
        self._current().search(asked)
        number = asked.number.item(0)
        return (None if number < 0 else number), asked.distance.item(0)

    def keys_of(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Of each kind the key of a request, ``(2, dimensions)``; ``tokens`` are ``(2, length)``."""
        asked = self._ask(tokens[0], tokens[1], np.array([tokens.shape[1]]))
        return self._index.keys_of(asked)[:, 0]

    def find(self, ids: NDArray[Any], types: NDArray[Any] | None, lengths: NDArray[np.int64]) -> Found | None:
        """Records that requests can use; None if none can, unless records are to be added."""
        pays = [self._pays[n] for n in lengths.tolist()]
        wanted = sum(pays)
        if not wanted:
            return None
        index = self._current()
        asked = self._ask(ids, types, lengths)
        if wanted < len(pays):
            asked.segments[:, 1] *= pays
        index.search(asked)
        found = np.zeros((len(lengths), 2), np.int64)
        hits = 0
        for i, (number, distance) in enumerate(zip(asked.number.tolist(), asked.distance.tolist(), strict=True)):
            if distance <= self._within:
                found[i, 0] = index.file.address(number)
                hits += 1
                if self.grows:
                    index.use(number)
        self.hits += hits
        self.misses += wanted - hits
        return Found(found, index.file) if hits or self.grows else None

    def wants(self, length: int) -> bool:
        """Whether a record of so many tokens is of use and fits, at least once others have left."""
        d = self.file.description
        freed = (1 - KEPT) * (d.size - d.first_record)
        return self._pays[length] and (d.record_size(length) <= freed or self.file.room(length) is not None)

    @contextmanager
    def adding(self, tokens: NDArray[np.int32]) -> Iterator[Room]:
        """Give room where a record is to be written, and then add it. In a full file, records leave for it."""
        with self._lock:
            if self.file.room(tokens.shape[1]) is None:
                self._evict()
            index = self._index
            address = index.file.room(tokens.shape[1])
            room = Room(address or 0)
            yield room
            if room.complete and address is not None:
                index.file.add(tokens, self.keys_of(tokens))
                index.take_in_new()
                index.use(index.file.count - 1)

    def _evict(self) -> None:
        """Keep the records that were used last; where the disk has no room to write them, nothing is added any more."""
        try:
            self._index = self._index.thinned()
        except (MemoError, OSError) as error:
            self.grows = False
            warnings.warn(f"{self.file.path} is full, and no records can leave it: {error}", stacklevel=2)

    def _current(self) -> _Index:
        """Of the file that has the name now, with all its records."""
        now = time.monotonic()
        if not self.grows and self._follows and now >= self._look_again:
            self._look_again = now + LOOK_EVERY
            with self._lock:
                if self.file.replaced:
                    self._follow()
        index = self._index
        index.take_in_new()
        return index

    def _follow(self) -> None:
        """Use the file that took the place of the one that was opened, unless it is another one altogether."""
        try:
            file = MemoFile(self.file.path)
            if file.description != self.file.description:
                raise MemoError(f"{file.path} was built anew; load the module again to use that")
            self._index = self._index.of(file)
        except (MemoError, OSError) as error:
            self._follows = False
            warnings.warn(f"the memo file that was opened stays in use: {error}", stacklevel=2)

    def _ask(self, ids: NDArray[Any], types: NDArray[Any] | None, lengths: NDArray[np.int64]) -> _Asked:
        """Requests as compiled code takes them; a thread's single ones have the same memory again and again."""
        asked: _Asked | None = getattr(self._local, "asked", None) if len(lengths) == 1 else None
        if asked is None:
            asked = _Asked(max(len(ids), self._max_length), len(lengths))
            asked.segments[:, 0] = starts(lengths)
            if len(lengths) == 1:
                self._local.asked = asked
        asked.segments[:, 1] = lengths
        asked.tokens[0, : len(ids)] = ids
        asked.tokens[1, : len(ids)] = 0 if types is None else types
        return asked

    @staticmethod
    def tokens(ids: NDArray[Any], types: NDArray[Any] | None, span: slice) -> NDArray[np.int32]:
        """Token ids and types of one request, ``(2, length)``."""
        tokens = np.zeros((2, span.stop - span.start), np.int32)
        tokens[0] = ids[span]
        if types is not None:
            tokens[1] = types[span]
        return tokens


def _own(array: NDArray[Any]) -> Any:
    """A copy as compiled code takes it."""
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return tvm_ffi.from_dlpack(copy)


def _of_file(array: NDArray[Any]) -> Any:
    """Pages of a file as compiled code takes them, which only reads: they may be such as can't be written."""
    pages = (ctypes.c_uint8 * array.nbytes).from_address(array.__array_interface__["data"][0])
    return tvm_ffi.from_dlpack(np.ctypeslib.as_array(pages).view(array.dtype).reshape(array.shape))
