"""What a Hugging Face or sentence-transformers folder says of itself, read without torch."""

from __future__ import annotations

from pathlib import Path

from whet.files import read_json

from .recipe import Task

ENDINGS = {
    "embedding": "Model",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}


def has_head(folder: str | Path, task: Task) -> bool:
    """Whether the folder's model was made for ``task``."""
    root = Path(folder)
    path = root / transformer_path(root) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{root} has no config.json; expected a Hugging Face model folder")
    architecture = str((read_json(path).get("architectures") or ["Model"])[0])
    return architecture.endswith(ENDINGS[task])


def transformer_path(root: Path) -> str:
    """Where a sentence-transformers folder keeps its transformer."""
    modules = root / "modules.json"
    if not modules.is_file():
        return "."
    listed = sorted(read_json(modules), key=lambda module: int(module["idx"]))
    if unknown := [
        m["type"] for m in listed if m["type"].rpartition(".")[2] not in ("Transformer", "Pooling", "Normalize")
    ]:
        raise ValueError(f"{modules}: {unknown[0]} is not supported; expected Transformer, Pooling and Normalize")
    return str(listed[0]["path"]) or "."


def pooling_of(root: Path) -> str:
    """``mean``, ``cls`` or ``max`` of a sentence-transformers folder; mean where there is none."""
    for path in sorted(root.glob("*_Pooling/config.json")):
        config = read_json(path)
        mode = config.get("pooling_mode")
        if mode is None:
            fields = {
                "pooling_mode_cls_token": "cls",
                "pooling_mode_max_tokens": "max",
                "pooling_mode_mean_tokens": "mean",
            }
            modes = [name for field, name in fields.items() if config.get(field)]
            mode = modes[0] if len(modes) == 1 else modes
        if mode not in ("mean", "cls", "max"):
            raise ValueError(f"{path}: pooling_mode is {mode!r}; supported: mean, cls, max")
        return str(mode)
    return "mean"


def lowers(root: Path) -> bool:
    """Whether a sentence-transformers folder lowers texts before its tokenizer."""
    settings = root / transformer_path(root) / "sentence_bert_config.json"
    return (root / "modules.json").is_file() and settings.is_file() and bool(read_json(settings).get("do_lower_case"))
