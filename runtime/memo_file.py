"""The memo file: records of attention, mapped and read in place, shared by all processes that open the file.

=============  ============================================================================================
at             contents
=============  ============================================================================================
0              magic, format, size and SHA-256 of the description, number of records; the description, JSON
``vectors``    float32 ``(2, vocabulary, dimensions)``: what a token adds to a request's keys, of each of ``KEYS``
``entries``    one for each record there is room for, see ``ENTRY``
``keys``       float32 ``(2, capacity, dimensions)``
``records``    per record its token ids and types, int32, then its attention (whet.schedules.attention_memoized)
=============  ============================================================================================

All parts start on pages, records at multiples of 64 bytes. A record counts from when the number of records says so,
which is written last: a process that is killed while it adds one leaves the file as it was before. One process at a
time may add.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.runtime.metadata import ALIGNMENT, Records

FORMAT = 3
_MAGIC = b"WHETMEMO"
_HEADER = struct.Struct("<8sII32s")
_COUNT = 56
"""Where the number of records stands, unsigned 64-bit."""
_PAGE = 4096

KEYS = ("words", "learned")
"""Kinds of keys: of word embeddings as they are, and of what was learned of them (whet.caching.word_key)."""

ENTRY = np.dtype([("offset", "<u8"), ("length", "<u4"), ("checksum", "<u4"), ("check", "<u8")])
"""Of a record: first byte; tokens; CRC-32 of its bytes; what these fields make, see ``_checks``."""


class MemoError(ValueError):
    """A memo file can't be used; the message says why and what to do."""


@dataclass(frozen=True)
class Description:
    """What a memo file is for and how it is used; it does not change."""

    name: str
    """Of the model, for people."""
    records: Records
    vocabulary: int
    capacity: int
    """Most records."""
    size: int
    """Bytes of the file."""
    levels: dict[str, float]
    """By name the largest distance of a hit."""
    keys_of: dict[str, str]
    """By name of a level the kind of keys that distances are of."""
    pays: dict[str, list[list[int]]]
    """By name of a level the lengths, first and last, at which looking up pays."""
    report: dict[str, Any]
    """What building measured, for people."""

    @property
    def vectors(self) -> int:
        """Where the parts start, in bytes."""
        return 4 * _PAGE

    @property
    def entries(self) -> int:  # noqa: D102
        return _page(self.vectors + 4 * len(KEYS) * self.vocabulary * self.records.dimensions)

    @property
    def keys(self) -> int:  # noqa: D102
        return _page(self.entries + ENTRY.itemsize * self.capacity)

    @property
    def first_record(self) -> int:  # noqa: D102
        return _page(self.keys + 4 * len(KEYS) * self.records.dimensions * self.capacity)

    def record_size(self, length: int) -> int:
        """Bytes of a record with its tokens."""
        return _tokens_size(length) + self.records.size(length)


class MemoFile:
    """A mapped memo file. ``vectors``, ``entries`` and ``keys`` are views of it; those past ``count`` are to come."""

    def __init__(self, path: str | PathLike[str], *, writable: bool = False) -> None:
        """Map and check the file; with ``writable`` this process may add records.

        Raises:
            FileNotFoundError: there is no such file.
            MemoError: it is damaged, no memo file, or of another version; or another process adds records already.

        """
        self.path = Path(path)
        with self.path.open("r+b" if writable else "rb") as file:
            self._file = _identity(os.fstat(file.fileno()))
            self._lock = _lock(file.fileno(), self.path) if writable else None
            if os.fstat(file.fileno()).st_size < 4 * _PAGE:
                raise MemoError(f"{path} is no memo file, or cut off; make one: whet memo build")
            self._pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        self.description = d = self._describe()
        self.vectors = self._view(np.float32, d.vectors, (len(KEYS), d.vocabulary, d.records.dimensions))
        self.entries = self._view(ENTRY, d.entries, (d.capacity,))
        self._lengths, self._offsets = self.entries["length"], self.entries["offset"]
        self.keys = self._view(np.float32, d.keys, (len(KEYS), d.capacity, d.records.dimensions))
        self.words = self._view(np.int32, 0, (d.size // 4,))
        """The whole file."""
        self._address = int(np.frombuffer(self._pages, np.uint8).__array_interface__["data"][0])
        self._check_entries()

    @property
    def count(self) -> int:
        """Records there are; grows while some process adds to the file."""
        return int(struct.unpack_from("<Q", self._pages, _COUNT)[0])

    @property
    def replaced(self) -> bool:
        """Whether another file has the name by now: see ``thinned``."""
        try:
            return _identity(self.path.stat()) != self._file
        except OSError:
            return False

    def address(self, index: int) -> int:
        """Where a record's attention is in memory."""
        return int(self._address + self._offsets.item(index) + _tokens_size(self._lengths.item(index)))

    def tokens(self, index: int) -> NDArray[np.int32]:
        """Token ids and types of a record, ``(2, length)``."""
        length = self._lengths.item(index)
        return np.frombuffer(self._pages, np.int32, 2 * length, self._offsets.item(index)).reshape(2, length)

    def attention(self, index: int) -> NDArray[np.uint8]:
        """Of a record, flat, as ``whet.schedules.attention_memoized`` lays it out."""
        length = self._lengths.item(index)
        offset = self._offsets.item(index) + _tokens_size(length)
        return np.frombuffer(self._pages, np.uint8, self.description.records.size(length), offset)

    def room(self, length: int) -> int | None:
        """Where the next record's attention would be in memory, if it fits: that is written, then ``add`` counts it."""
        offset, count = self._end(), self.count
        fits = offset + self.description.record_size(length) <= self.description.size
        return self._address + offset + _tokens_size(length) if fits and count < self.description.capacity else None

    def add(self, tokens: NDArray[np.int32], keys: NDArray[np.float32]) -> None:
        """Count the record whose attention is in the ``room``: its tokens, ``(2, length)``, and a key of each kind."""
        length = tokens.shape[1]
        offset = self._end()
        self._pages[offset : offset + tokens.nbytes] = np.ascontiguousarray(tokens).tobytes()
        self._count_one((offset, length, self._checksum(offset, length), 0), keys)

    def thinned(self, keep: Sequence[int]) -> MemoFile:
        """Put a file of these records alone, in this order, in place of this one, and map it; this one adds no more.

        The new file gets the name when it is complete, so a process that is killed leaves the old one. Who has the old
        one mapped can go on reading it, and sees by ``replaced`` that there is another. Raises OSError where the disk
        has no room for both, MemoError where the name is another file's.
        """
        assert self._lock is not None
        if self.replaced:
            raise MemoError(f"{self.path} is another file by now")
        path = self.path.with_name(f".{self.path.name}.thinned")
        try:
            create(path, self.description, self.vectors)
            size = sum(self.description.record_size(int(n)) for n in self.entries["length"][list(keep)])
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.description.first_record + size)
            new = MemoFile(path, writable=True)
            for i in keep:
                start, length, checksum, _ = self.entries[i].tolist()
                offset, size = new._end(), new.description.record_size(length)
                new._pages[offset : offset + size] = self._pages[start : start + size]
                new._count_one((offset, length, checksum, 0), self.keys[:, i])
            new.flush()
            path.replace(self.path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        new.path = self.path
        self.release()
        return new

    def _count_one(self, fields: tuple[int, ...], keys: NDArray[np.float32]) -> None:
        """Count one more record, which is written already."""
        index = self.count
        self.keys[:, index] = keys
        entry = np.array([fields], ENTRY)
        entry["check"] = _checks(entry)
        self.entries[index] = entry[0]
        struct.pack_into("<Q", self._pages, _COUNT, index + 1)

    def verify(self) -> None:
        """Compare all records with their checksums; MemoError where one differs."""
        for i in range(self.count):
            offset, length, checksum, _ = self.entries[i].tolist()
            if self._checksum(offset, length) != checksum:
                raise MemoError(f"{self.path}: record {i} differs from its checksum; build the file again")

    def release(self) -> None:
        """Let others add from now on, this one no more."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def flush(self) -> None:
        """Have everything on the disk."""
        self._pages.flush()

    def _checksum(self, offset: int, length: int) -> int:
        """CRC-32 of the record of so many tokens at ``offset``, bytes that nobody writes excepted."""
        attention, end = offset + _tokens_size(length), offset + self.description.record_size(length)
        with memoryview(self._pages) as view:
            return zlib.crc32(view[attention:end], zlib.crc32(view[offset : offset + 8 * length]))

    def _end(self) -> int:
        """Where the next record starts."""
        if not self.count:
            return self.description.first_record
        last = self.entries[self.count - 1]
        return int(last["offset"]) + self.description.record_size(int(last["length"]))

    def _view(self, dtype: Any, offset: int, shape: tuple[int, ...]) -> NDArray[Any]:
        return np.frombuffer(self._pages, dtype, int(np.prod(shape)), offset).reshape(shape)

    def _describe(self) -> Description:
        magic, version, size, digest = _HEADER.unpack_from(self._pages)
        if magic != _MAGIC:
            raise MemoError(f"{self.path} is no memo file; make one: whet memo build")
        if version != FORMAT:
            raise MemoError(f"{self.path} has format {version}, this whet reads format {FORMAT}; build it again")
        text = self._pages[64 : 64 + size]
        if hashlib.sha256(text).digest() != digest:
            raise MemoError(f"{self.path} is damaged: its description differs from its checksum; build it again")
        fields = json.loads(text)
        description = Description(**{**fields, "records": Records(**fields["records"])})
        if len(self._pages) != description.size:
            raise MemoError(
                f"{self.path} has {len(self._pages)} bytes, not {description.size}: it was cut off; build it again"
            )
        return description

    def _check_entries(self) -> None:
        """Raise MemoError unless all entries are whole and their records lie in the file."""
        count, d = self.count, self.description
        entries = self.entries[:count]
        wrong = count > d.capacity
        if count and not wrong:
            lengths = entries["length"].astype(np.int64)
            sizes = np.array(
                [d.record_size(n) for n in range(int(lengths.max()) + 1)] if lengths.max() < 1 << 16 else [0]
            )
            wrong = (
                (_checks(entries) != entries["check"]).any()
                or lengths.min() < 1
                or lengths.max() >= len(sizes)
                or entries["offset"][0] != d.first_record
                or (entries["offset"][1:] != (entries["offset"] + sizes[lengths].astype(np.uint64))[:-1]).any()
                or entries["offset"][-1] + np.uint64(sizes[lengths[-1]]) > d.size
            )
        if wrong:
            raise MemoError(f"{self.path} is damaged: its list of records is not what was written; build it again")


def create(path: str | PathLike[str], description: Description, vectors: NDArray[np.float32]) -> None:
    """Make a file without records. Its room is claimed from the disk only as records are added."""
    with Path(path).open("wb") as file:
        file.seek(description.vectors)
        file.write(np.ascontiguousarray(vectors).tobytes())
        file.truncate(description.size)
    describe(path, description)


def describe(path: str | PathLike[str], description: Description) -> None:
    """Write the description of a file, whose parts must stay where they are."""
    text = json.dumps(asdict(description)).encode()
    if 64 + len(text) > description.vectors:
        raise MemoError(f"the description of {path} has {len(text)} bytes; expected at most {description.vectors - 64}")
    with Path(path).open("r+b") as file:
        file.write(_HEADER.pack(_MAGIC, FORMAT, len(text), hashlib.sha256(text).digest()))
        file.seek(64)
        file.write(text)


def _checks(entries: NDArray[Any]) -> NDArray[np.uint64]:
    """A value of each entry that a change of a bit changes."""
    mixed = np.full(len(entries), 0x9E3779B97F4A7C15, np.uint64)
    for name in ("offset", "length", "checksum"):
        mixed = (mixed ^ entries[name].astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def _identity(status: os.stat_result) -> tuple[int, int]:
    """Of a file, whatever its name."""
    return status.st_dev, status.st_ino


def _lock(descriptor: int, path: Path) -> int:
    """Keep a lock until the descriptor that is returned is closed, or the process ends."""
    own = os.dup(descriptor)
    try:
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(own)
        raise MemoError(f"{path}: another process adds records already; open it without, or make a copy") from error
    return own


def _tokens_size(length: int) -> int:
    """Bytes that the tokens of a record take."""
    return _up(8 * length, ALIGNMENT)


def _up(size: int, multiple: int) -> int:
    return size + -size % multiple


def _page(size: int) -> int:
    return _up(size, _PAGE)
