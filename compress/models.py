"""Hugging Face encoders for training: their layers by family, loading with a head for a task, and saving.

Only what the compiler imports is supported: the BERT family and DistilBERT, safetensors, a fast tokenizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from whet.tokenizer import read_tokenizer

from .folders import has_head, lowers, pooling_of, transformer_path
from .recipe import Task

AUTO = {
    "embedding": "AutoModel",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}
"""The class of transformers that has the task's head."""


LEFT_OUT = (
    *("*.safetensors*", "*.bin", "*.onnx", "*.h5", "*.ot", "*.msgpack", "README.md", ".*"),
    *("recipe.toml", "training.jsonl", "measured.json"),  # how an earlier one was made
)
"""Files of a model's folder that are not of the one made from it."""


@dataclass(frozen=True)
class Family:
    """Where the parts of an encoder stand in its transformers model, from a layer on."""

    layers: str
    groups: tuple[tuple[str, ...], ...]
    """The dense layers in the order of their inputs; those of a group share one. The first are query, key, value."""
    residual: dict[str, str | None]
    """Dense layers whose output is added to something: the dense layer whose input that is, or None for the layer's."""


FAMILIES = {
    "bert": Family(
        layers="encoder.layer",
        groups=(
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            ("attention.output.dense",),
            ("intermediate.dense",),
            ("output.dense",),
        ),
        residual={"attention.output.dense": "attention.self.query", "output.dense": "intermediate.dense"},
    ),
    "distilbert": Family(
        layers="transformer.layer",
        groups=(
            ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            ("attention.out_lin",),
            ("ffn.lin1",),
            ("ffn.lin2",),
        ),
        residual={"attention.out_lin": "attention.q_lin", "ffn.lin2": "ffn.lin1"},
    ),
}


@dataclass
class Encoder:
    """A transformers model in training, and what it was loaded from."""

    model: nn.Module
    family: Family
    tokenizer: Tokenizer
    """Without padding and truncation."""
    task: Task
    folder: Path
    """The Hugging Face folder, of a sentence-transformers folder the inner one."""
    root: Path
    """The folder that was named."""
    pooling: str = ""
    labels: tuple[str, ...] = field(default=())

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The transformer layers in order."""
        return list(self.model.base_model.get_submodule(self.family.layers))  # type: ignore[operator]

    @property
    def dense(self) -> dict[str, nn.Linear]:
        """The dense layers that may be pruned: all of the transformer layers, by name."""
        found = {}
        for i, layer in enumerate(self.layers):
            for name in (name for group in self.family.groups for name in group):
                found[f"{i}.{name}"] = layer.get_submodule(name)
        return found  # type: ignore[return-value]

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        return int(self.model.config.num_attention_heads)  # type: ignore[union-attr, arg-type]

    @property
    def positions(self) -> int:
        """Most tokens of a request."""
        return int(self.model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """Embeddings ``(batch, channels)`` of length 1 from states ``(batch, tokens, channels)``."""
        if self.pooling == "cls":
            pooled = states[:, 0]
        elif self.pooling == "max":
            pooled = states.masked_fill(~mask.bool()[..., None], -torch.inf).amax(1)
        else:
            weight = mask[..., None].to(states.dtype)
            pooled = (states * weight).sum(1) / weight.sum(1)
        return nn.functional.normalize(pooled.float(), dim=-1)

    def save(self, output: Path) -> None:
        """Write a folder like the one this was loaded from, with these weights.

        What sentence-transformers keeps beside the transformer is part of an embedding model only.
        """
        if self.task == "embedding":
            shutil.copytree(self.root, output, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
            self.model.save_pretrained(output / self.folder.relative_to(self.root))  # type: ignore[operator]
            return
        output.mkdir(exist_ok=True)
        left_out = shutil.ignore_patterns(*LEFT_OUT, "modules.json", "*sentence*.json")
        files = {path.name for path in self.folder.iterdir() if path.is_file()}
        for name in files - set(left_out(str(self.folder), sorted(files))):
            shutil.copy(self.folder / name, output / name)
        self.model.save_pretrained(output)  # type: ignore[operator]


def load_encoder(folder: str | Path, task: Task, labels: Sequence[str] = ()) -> Encoder:
    """Load a Hugging Face or sentence-transformers folder with the head for ``task``, in evaluation mode.

    A head that the folder does not have is made new, with ``labels``, by the seed that is set; one that it has keeps
    its own labels. There is no dropout: a sparse model hardly overfits, and a distilled one should answer like its
    teacher. Raises ValueError where the model is of a family that the compiler does not know, or FileNotFoundError.
    """
    import transformers  # noqa: PLC0415 -- takes seconds

    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; expected a Hugging Face model with config.json")
    inner = root / transformer_path(root)
    if not (inner / "config.json").is_file():
        raise FileNotFoundError(f"{inner} has no config.json; expected a Hugging Face model folder")
    config = transformers.AutoConfig.from_pretrained(inner, local_files_only=True)
    if config.model_type not in FAMILIES:
        raise ValueError(f"{inner} is a {config.model_type} model; supported: {', '.join(FAMILIES)}")
    options: dict[str, Any] = {}
    if task.endswith("classification"):
        if has_head(root, task):
            labels = [config.id2label[i] for i in range(len(config.id2label))]
            if len(labels) < 2 or config.problem_type not in (None, "single_label_classification"):
                raise ValueError(f"{root} scores {len(labels)} labels independently; expected a choice of 2 or more")
        elif len(labels) < 2:
            raise ValueError(f"{root} has no head for {task}; give training data with labels")
        options = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = getattr(transformers, AUTO[task]).from_pretrained(
        inner,
        attn_implementation="eager",  # the fused one's backward takes several times as long on a CPU
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=not has_head(root, task),  # another task's head may have the names of the new one's
        **options,
    )
    text = read_tokenizer(inner, lowercase=lowers(root))
    if text is None:
        raise FileNotFoundError(f"{inner} has neither tokenizer.json nor vocab.txt; expected the model's tokenizer")
    pooling = pooling_of(root) if task == "embedding" else ""
    return Encoder(
        model.eval(), FAMILIES[config.model_type], Tokenizer.from_str(text), task, inner, root, pooling, tuple(labels)
    )


class Recorder:
    """What the layers of an encoder compute, noted while it runs: ``states`` per layer, and of some the projections."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.relations: list[Tensor] = []


@contextmanager
def record(encoder: Encoder, relations: bool = False) -> Iterator[Recorder]:
    """Note each layer's output, and with ``relations`` the last layer's queries, keys and values."""
    recorder = Recorder()

    def note(into: list[Tensor]) -> Any:
        return lambda _module, _inputs, output: into.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(note(recorder.states)) for layer in encoder.layers]
    if relations:
        last = encoder.layers[-1]
        names = encoder.family.groups[0]
        handles += [last.get_submodule(name).register_forward_hook(note(recorder.relations)) for name in names]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
