"""The file format: one x86-64 ELF shared object that carries code, weights, tokenizer and metadata.

======================  =====================  ==========================================================
section                 symbol                 contents
======================  =====================  ==========================================================
``.whet.metadata``      ``whet_metadata``      JSON, see :mod:`whet.runtime.metadata`
``.whet.weights``       ``whet_weights``       arrays at 64-byte multiples; the section starts on a page
``.whet.tokenizer``     ``whet_tokenizer``     ``tokenizer.json``, or empty
``.whet.digest``        ``whet_digest``        SHA-256 of all but the weights, then SHA-256 of the weights
======================  =====================  ==========================================================

Each symbol but the last has a ``<symbol>_size``, unsigned 64-bit, for programs that find them with ``dlsym``, and ends
with a zero byte that the size does not count. This module reads the sections from the mapped file instead: nothing of
the file runs before it has been checked, a module for another CPU can be inspected, and the weights live as long as any
array that looks at them.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from whet.runtime.metadata import ALIGNMENT, ArtifactError, Metadata, Weight, from_json

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_EM_X86_64 = 62
_SHT_NOBITS = 8


@dataclass(frozen=True)
class Span:
    """Where a section lies in the file."""

    offset: int
    size: int

    @property
    def text(self) -> slice:
        """The bytes without the zero at the end."""
        return slice(self.offset, self.end - 1)

    @property
    def end(self) -> int:
        """First byte after the section."""
        return self.offset + self.size


@dataclass(frozen=True)
class Artifact:
    """A checked, memory-mapped module file; see :func:`open_artifact`."""

    path: Path
    variants: tuple[Metadata, ...]
    """One per instruction set, the fastest first; a file has at least one."""
    digest: bytes
    _pages: mmap.mmap
    _sections: dict[str, Span]

    @property
    def metadata(self) -> Metadata:
        """What the fastest variant says; the model's own properties are the same in all."""
        return self.variants[0]

    @property
    def tokenizer_json(self) -> str | None:
        """The embedded ``tokenizer.json``, or None."""
        return self._pages[self._sections[".whet.tokenizer"].text].decode("utf-8") or None

    def blob(self) -> NDArray[np.uint8]:
        """Return a view of all weights' mapped pages, uint8 ``(bytes,)``; it keeps the mapping alive."""
        span = self._sections[".whet.weights"]
        return np.frombuffer(self._pages, np.uint8, span.size, span.offset)

    def weights(self, variant: Metadata | None = None) -> list[NDArray[np.generic]]:
        """Return views of the mapped pages, in the order of the variant's weights table; they keep the mapping alive.

        Without a variant they are the fastest one's.
        """
        blob = self._sections[".whet.weights"]
        return [_view(self._pages, blob, weight) for weight in (variant or self.metadata).weights]

    def verify(self) -> None:
        """Compare the weights with the checksum taken when the file was written (everything else is checked on open).

        Raises:
            ArtifactError: they differ.

        """
        span = self._sections[".whet.weights"]
        with memoryview(self._pages) as view:
            actual = hashlib.sha256(view[span.offset : span.end]).digest()
        if actual != self.digest[32:]:
            raise ArtifactError(f"{self.path}: the weights differ from their checksum; copy or compile the file again")


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Map a module file and check it without running any of it.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: it is truncated, corrupt, no x86-64 ELF file, no Whet module, or of another format version.

    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is {'not a file' if path.exists() else 'missing'}; expected a compiled module")
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < _HEADER.size:
            raise ArtifactError(f"{path} is not a compiled module: it is shorter than an ELF header")
        # A private mapping is writable, which DLPack wants of an array, yet shares its pages with every process that
        # maps the file, for as long as nobody writes; nobody does.
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    sections = _sections(path, pages)
    digest = pages[sections[".whet.digest"].offset : sections[".whet.digest"].end]
    if code_digest(pages, sections) != digest[:32]:
        raise ArtifactError(f"{path} is corrupt: its contents differ from their checksum; copy or compile it again")
    try:
        variants = from_json(pages[sections[".whet.metadata"].text])
        for weight in (weight for variant in variants for weight in variant.weights):
            _view(pages, sections[".whet.weights"], weight)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    return Artifact(path, variants, digest, pages, sections)


def code_digest(pages: mmap.mmap, sections: dict[str, Span]) -> bytes:
    """SHA-256 of the file without its weights and its digest."""
    sha = hashlib.sha256()
    start = 0
    with memoryview(pages) as view:
        for span in sorted((sections[".whet.weights"], sections[".whet.digest"]), key=lambda s: s.offset):
            sha.update(view[start : span.offset])
            start = span.end
        sha.update(view[start:])
    return sha.digest()


def find_sections(path: Path, pages: mmap.mmap) -> dict[str, Span]:
    """Find the sections of an ELF file that have contents, by name.

    Raises:
        ArtifactError: not an x86-64 ELF file, or cut off.

    """
    magic, _, machine, _, _, _, table, _, _, _, _, entry_size, entries, names = _HEADER.unpack_from(pages)
    if magic[:4] != b"\x7fELF":
        raise ArtifactError(f"{path} is not a compiled module: it is no ELF file")
    if magic[4:6] != b"\x02\x01" or machine != _EM_X86_64:
        raise ArtifactError(f"{path} is not a compiled module for x86-64: its ELF header names another machine")
    truncated = ArtifactError(f"{path} is truncated ({len(pages)} bytes): copy or compile it again")
    # The section table is the last thing linkers write, so a cut file lacks it.
    if entry_size != _SECTION.size or not table or table + entries * entry_size > len(pages) or names >= entries:
        raise truncated
    headers = [_SECTION.unpack_from(pages, table + i * entry_size) for i in range(entries)]
    spans = [Span(offset, size) for _, kind, _, _, offset, size, *_ in headers if kind != _SHT_NOBITS]
    if any(span.end > len(pages) for span in spans):
        raise truncated
    strings = pages[headers[names][4] : headers[names][4] + headers[names][5]]
    return {
        strings[h[0] : strings.find(b"\0", h[0])].decode("ascii", "replace"): Span(h[4], h[5])
        for h in headers
        if h[1] != _SHT_NOBITS
    }


def _sections(path: Path, pages: mmap.mmap) -> dict[str, Span]:
    sections = find_sections(path, pages)
    for name in (".whet.metadata", ".whet.weights", ".whet.tokenizer", ".whet.digest"):
        if name not in sections or not sections[name].size:
            raise ArtifactError(f"{path} is a shared object but not a Whet module: it has no section {name}")
    return sections


def _view(pages: mmap.mmap, blob: Span, weight: Weight) -> NDArray[np.generic]:
    try:
        dtype = np.dtype(weight.dtype)
    except TypeError as error:
        raise ArtifactError(f"weight {weight.name} has the unknown dtype {weight.dtype!r}") from error
    count = math.prod(weight.shape)
    fits = 0 <= weight.offset <= blob.size - count * dtype.itemsize and min(weight.shape, default=0) >= 0
    if not fits or weight.offset % ALIGNMENT or dtype.hasobject:
        raise ArtifactError(
            f"weight {weight.name} at {weight.offset} with shape {weight.shape} {weight.dtype} does not fit "
            f"the blob of {blob.size} bytes: the file is corrupt"
        )
    return np.frombuffer(pages, dtype, count, blob.offset + weight.offset).reshape(weight.shape)
