"""Finds the record that a request can use: of an earlier one with the same tokens, or of the nearest in a memo file.

One look-up serves all layers, before the first of them. The distance of two requests of the same number of tokens is
that of the vectors of their words, place by place: the root of the mean over places of the squared distance. A key of a
fixed size, a sum of the vectors with signs that belong to the places, has nearly the same distances and finds the
nearest; whether it is near enough its tokens say. There are two kinds of vectors, ``memo_file.KEYS``.
"""

from __future__ import annotations

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

from whet.runtime.memo_file import KEYS, MemoError, MemoFile, hash_of
from whet.runtime.metadata import Metadata

KEPT = 0.75
"""Share of a full file, in bytes and in records, that is kept."""

LOOK_EVERY = 0.1
"""Seconds after which it is asked again whether another file has the name: that takes as long as a search."""

LEVELS = ("strict", "default", "loose")
"""Names of how near is near enough, each with a distance of its own in the file."""


class Keys:
    """Keys and distances of requests, by the vectors of tokens."""

    def __init__(self, vectors: NDArray[np.float32], max_length: int) -> None:
        self._vectors = vectors
        dimensions = vectors.shape[1]
        bits = np.frombuffer(hashlib.shake_256(b"whet").digest(max_length * dimensions // 8), np.uint8)
        self._signs = np.unpackbits(bits).reshape(max_length, dimensions).astype(np.float32) * 2 - 1

    def key(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Of token ids ``(length,)``; float32 ``(dimensions,)``."""
        rows = self._vectors[ids]
        rows *= self._signs[: len(ids)]
        key: NDArray[np.float32] = rows.sum(axis=0)
        key *= len(ids) ** -0.5
        return key

    def distance(self, a: NDArray[np.int32], b: NDArray[np.int32]) -> float:
        """Of two requests' token ids ``(length,)``."""
        other = np.flatnonzero(a != b)
        difference = (self._vectors[a[other]] - self._vectors[b[other]]).reshape(-1)
        return float(np.sqrt(difference @ difference / len(a)))


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


class _Index:
    """The records of one file by their tokens, and when they were last used."""

    def __init__(self, file: MemoFile, max_length: int, kind: str) -> None:
        self.file = file
        self.max_length = max_length
        self.kind = kind
        """Of the keys by which the nearest is found."""
        self._every = [Keys(vectors, max_length) for vectors in file.vectors]
        self._keys, self._stored = self._every[KEYS.index(kind)], file.keys[KEYS.index(kind)]
        self._lock = threading.RLock()
        self._known = 0
        self._by_hash: dict[int, int] = {}
        self._by_length: dict[int, list[int]] = {}
        self._of_length: dict[int, tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]] = {}
        self.used: dict[int, None] = {}
        """Records that were of use, the latest last."""
        self.take_in_new()

    def nearest(self, tokens: NDArray[np.int32], within: float) -> tuple[int | None, float]:
        """Record of the same tokens, or of the nearest ones; None where that is farther than ``within``."""
        same = self._by_hash.get(hash_of(tokens))
        if same is not None and (self.file.tokens(same) == tokens).all():
            return same, 0.0
        length = tokens.shape[1]
        if within <= 0 or length not in self._by_length:
            return None, np.inf
        indices, keys, norms = self._of_length.get(length) or self._gather(length)
        index = int(indices[(norms - 2 * (keys @ self._keys.key(tokens[0]))).argmin()])
        other = self.file.tokens(index)
        if (other[1] != tokens[1]).any():
            return None, np.inf
        distance = self._keys.distance(tokens[0], other[0])
        return (index if distance <= within else None), distance

    def keys_of(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Of each kind the key of a request's ``tokens`` ``(2, length)``."""
        return np.stack([keys.key(tokens[0]) for keys in self._every])

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
        index = _Index(self.file.thinned(keep), self.max_length, self.kind)
        new = {old: number for number, old in enumerate(keep)}
        index.used = {new[old]: None for old in used if old in new}
        return index

    def take_in_new(self) -> None:
        """Learn of records that were added, if there are any."""
        if self.file.count == self._known:
            return
        with self._lock:
            count = self.file.count
            entries = self.file.entries[self._known : count]
            new = list(zip(entries["hash"].tolist(), entries["length"].tolist(), strict=True))
            for i, (hashed, length) in enumerate(new, self._known):
                self._by_hash[hashed] = i
                self._by_length.setdefault(length, []).append(i)
                self._of_length.pop(length, None)
            self._known = count

    def _gather(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Collect the records of a length: their numbers, keys and squared norms of these."""
        indices = np.array(self._by_length[length], np.int64)
        first, last = int(indices[0]), int(indices[-1])
        # Where they stand together, as building puts them, the keys are pages of the file.
        together = last - first + 1 == len(indices)
        keys = self._stored[first : last + 1] if together else self._stored[indices]
        self._of_length[length] = indices, keys, np.einsum("nd,nd->n", keys, keys)
        return self._of_length[length]


class Memo:
    """Records of a memo file, for the module that made them."""

    def __init__(
        self, path: str | PathLike[str], metadata: Metadata, *, level: str = "default", grow: bool = False
    ) -> None:
        """Open a file for a module.

        Args:
            path: file that ``whet memo build`` wrote.
            metadata: the module's.
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
        file = MemoFile(path, writable=grow)
        description = file.description
        if description.records != metadata.records:
            raise MemoError(
                f"{path} was built for another model, or another build of it ({description.name}); build one for this "
                "module: whet memo build"
            )
        self._index = _Index(file, metadata.max_length, description.keys_of[level])
        self._nearest = description.levels[level]
        ranges = description.pays[level]
        self._pays = [any(first <= n <= last for first, last in ranges) for n in range(metadata.max_length + 1)]

    @property
    def file(self) -> MemoFile:
        """The file as it is mapped now."""
        return self._index.file

    def nearest(self, tokens: NDArray[np.int32], within: float) -> tuple[int | None, float]:
        """Record of the same tokens, or of the nearest ones; None where that is farther than ``within``."""
        return self._index.nearest(tokens, within)

    def find(self, ids: NDArray[Any], types: NDArray[Any] | None, lengths: NDArray[np.int64]) -> Found | None:
        """Records that requests can use; None if none can, unless records are to be added."""
        sizes = lengths.tolist()
        wanted = sum(self._pays[n] for n in sizes)
        if not wanted:
            return None
        index = self._current()
        found = np.zeros((len(sizes), 2), np.int64)
        start = hits = 0
        for i, n in enumerate(sizes):
            if self._pays[n]:
                record = index.nearest(self.tokens(ids, types, slice(start, start + n)), self._nearest)[0]
                if record is not None:
                    found[i, 0] = index.file.address(record)
                    hits += 1
                    if self.grows:
                        index.use(record)
            start += n
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
                index.file.add(tokens, index.keys_of(tokens))
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
            self._index = _Index(file, self._index.max_length, self._index.kind)
        except (MemoError, OSError) as error:
            self._follows = False
            warnings.warn(f"the memo file that was opened stays in use: {error}", stacklevel=2)

    @staticmethod
    def tokens(ids: NDArray[Any], types: NDArray[Any] | None, span: slice) -> NDArray[np.int32]:
        """Token ids and types of one request, ``(2, length)``."""
        tokens = np.zeros((2, span.stop - span.start), np.int32)
        tokens[0] = ids[span]
        if types is not None:
            tokens[1] = types[span]
        return tokens
