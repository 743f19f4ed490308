"""The freeze file: caches of one model, versioned; a NumPy archive without pickles, whose parts have checksums.

``header`` is JSON as bytes; ``0.scale``, ``0.shift``, … are the arrays of the first cache, by their names in
``whet.caching.cache.ARRAYS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from whet.caching.cache import ARRAYS, Cache
from whet.runtime.archive import DAMAGE, read_archive, write_archive

FORMAT = 5
_KIND = "whet freeze"


class FreezeError(ValueError):
    """A freeze file can't be used; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Freeze:
    """Caches and the model that they are for."""

    model: str
    """Its name, for people."""
    weights: str
    """SHA-256 of its weights, hexadecimal."""
    precision: str
    """That of the module whose hidden states the caches were fitted to."""
    layers: int
    """Of the model."""
    allowed_loss: float
    budget: float
    leave: tuple[float, ...]
    """For audits, see the same of ``whet.runtime.metadata.Metadata``."""
    caches: tuple[Cache, ...]
    fitted: dict[str, Any]
    """What fitting measured, for people."""

    def check(self, path: str | PathLike[str], weights: str, precision: str) -> None:
        """Raise FreezeError unless this is for a model of these weights in this precision."""
        if weights != self.weights:
            raise FreezeError(
                f"{path} is for the model {self.model} with other weights than these; fit it again: whet freeze fit"
            )
        if precision != self.precision:
            raise FreezeError(
                f"{path} was fitted to {self.precision}, the precision is {precision}; compile with precision "
                f"{self.precision}, or fit it again"
            )


def save(freeze: Freeze, path: str | PathLike[str]) -> None:
    """Write the file; it appears only when it is complete. Raises FileNotFoundError where its folder is absent."""
    path = Path(path)
    header = {"kind": _KIND, "format": FORMAT, **{k: v for k, v in vars(freeze).items() if k != "caches"}}
    header["caches"] = [{"layer": c.layer, "kind": c.kind, "threshold": c.threshold} for c in freeze.caches]
    arrays: dict[str, Any] = {
        f"{i}.{name}": array
        for i, cache in enumerate(freeze.caches)
        for name, array in zip(ARRAYS[cache.kind], cache.arrays, strict=True)
    }
    write_archive(path, header, arrays)


def load(path: str | PathLike[str]) -> Freeze:
    """Read a file. Raises FreezeError where it is damaged or of another kind or version, and FileNotFoundError."""
    try:
        header, arrays = read_archive(Path(path))
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        raise FreezeError(
            f"{path} is damaged or no freeze file ({type(error).__name__}: {error}); fit it again: whet freeze fit"
        ) from error
    if not isinstance(header, dict) or header.get("kind") != _KIND:
        raise FreezeError(f"{path} is no freeze file; make one: whet freeze fit")
    if header.get("format") != FORMAT:
        raise FreezeError(
            f"{path} has format {header.get('format')!r}, this whet reads format {FORMAT}; fit it again: "
            "whet freeze fit"
        )
    try:
        caches = tuple(
            Cache(
                int(c["layer"]), c["kind"], tuple(arrays[f"{i}.{n}"] for n in ARRAYS[c["kind"]]), float(c["threshold"])
            )
            for i, c in enumerate(header["caches"])
        )
        identity = header["model"], header["weights"], header["precision"]
        losses = float(header["allowed_loss"]), float(header["budget"])
        leave = tuple(float(share) for share in header["leave"])
        if leave and len(leave) != len(caches) + 1:
            raise ValueError(f"{len(leave)} shares of {len(caches)} caches and the end")
        return Freeze(*identity, int(header["layers"]), *losses, leave, caches, header["fitted"])
    except (KeyError, TypeError, ValueError) as error:
        raise FreezeError(f"{path} is malformed ({error}); fit it again: whet freeze fit") from error
