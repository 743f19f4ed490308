"""Weights of a checkpoint: safetensors files (whole or sharded), or the state dict of a model in memory.

Tensors are read one by one when a graph asks for them, checked, and given as float32. Pickled checkpoints
(``pytorch_model.bin``) are refused: unpickling runs whatever code the file holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors then reads)
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from whet.files import read_json

Array = npt.NDArray[np.float32]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Weights:
    """Named tensors of one checkpoint; remembers which were used.

    ``read(name)`` returns the tensor as stored. Names that end in ``LayerNorm.gamma`` or ``LayerNorm.beta``, as
    checkpoints converted from TensorFlow have them, answer to ``LayerNorm.weight`` and ``LayerNorm.bias`` too.
    """

    def __init__(self, source: str, names: Iterable[str], read: Callable[[str], Any]) -> None:
        self.source = source
        self._stored = {_modern(name): name for name in names}
        self._read = read
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        """Return a tensor as contiguous float32; ValueError if it is missing, of another shape or not finite."""
        if name not in self._stored:
            raise ValueError(f"{self.source} has no tensor {name!r} (expected shape {shape})")
        self._used.add(name)
        stored = np.asarray(self._read(self._stored[name]))
        if stored.shape != shape:
            raise ValueError(f"{self.source}: {name} has shape {stored.shape}; the configuration says {shape}")
        if stored.dtype.kind != "f" and stored.dtype.name != "bfloat16":
            raise ValueError(f"{self.source}: {name} is {stored.dtype}; expected a floating-point tensor")
        with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes inf, which is refused below
            value = np.ascontiguousarray(stored, dtype=np.float32)
        if not np.isfinite(value).all():
            count = int(value.size - np.isfinite(value).sum())
            raise ValueError(f"{self.source}: {name} holds NaN or infinity in {count} of {value.size} places")
        return value

    def unused(self) -> list[str]:
        """Return the names that nothing has taken so far."""
        return sorted(set(self._stored) - self._used)


def open_weights(folder: Path) -> Weights:
    """Open the safetensors weights of a Hugging Face folder; ValueError if there are none or they can't be read."""
    if (folder / SINGLE).is_file():
        return _open_files(str(folder / SINGLE), [folder / SINGLE])
    if (folder / INDEX).is_file():
        return _open_files(str(folder / INDEX), _shards(folder))
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise ValueError(
            f"{folder} has only pickled weights ({', '.join(pickles)}); reading them can run code: convert them once "
            "where you trust them: AutoModel.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        )
    raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def state_weights(state: Mapping[str, Any], source: str) -> Weights:
    """Wrap a torch state dict, without importing torch."""
    return Weights(source, state, lambda name: _to_numpy(state[name]))


def _modern(name: str) -> str:
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith("LayerNorm" + old):
            return name.removesuffix(old) + new
    return name


def _to_numpy(tensor: Any) -> Any:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16 that torch would convert to.
    return (tensor.float() if tensor.dtype.is_floating_point else tensor).numpy()


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    content = read_json(index)
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    names = sorted({str(file) for file in mapping.values()})
    for name in names:
        if PurePath(name).name != name:
            raise ValueError(f"{index}: the shard {name!r} is not a plain file name")
        if not (folder / name).is_file():
            raise ValueError(f"{index} names the shard {name}, which is not in {folder}")
    return [folder / name for name in names]


def _open_files(source: str, paths: list[Path]) -> Weights:
    home: dict[str, Any] = {}
    for path in paths:
        try:
            file: Any = safe_open(str(path), framework="np")
            home.update(dict.fromkeys(file.keys(), file))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error

    def read(name: str) -> Any:
        try:
            return home[name].get_tensor(name)
        except (SafetensorError, TypeError) as error:  # TypeError: a dtype that NumPy lacks, such as float8
            raise ValueError(f"{source}: can't read {name}: {error}") from error

    return Weights(source, home, read)
