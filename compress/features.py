"""From examples to what a model takes: token ids with targets, batches of similar lengths in a seeded order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from whet.datasets import LabelledText, TaggedWords

from .data import Example, Span, texts_of
from .models import Encoder

Batch: TypeAlias = "dict[str, Tensor]"

IGNORED = -100
"""Target of tokens and texts that have none; torch's cross entropy leaves it out."""
STRIDE = 128
"""Tokens that the windows of a long context share."""
WINDOW = 32
"""Batches whose texts are sorted by length together."""


@dataclass(frozen=True)
class Feature:
    """One request and what the model should answer."""

    ids: list[int]
    types: list[int]
    target: Any = None
    """A class; a class per token; first and last token of an answer; or nothing."""
    context: int = 0
    """The first token of the text that holds the answer."""


def make_features(encoder: Encoder, examples: Sequence[Example], max_length: int) -> list[Feature]:
    """Tokenise examples for the encoder's task. Raises ValueError for a label that the model does not have."""
    tokenizer = encoder.tokenizer
    length = min(max_length, encoder.positions)
    if encoder.task == "question_answering":
        return _windows(tokenizer, [e for e in examples if isinstance(e, Span | tuple)], length)
    tokenizer.enable_truncation(length)
    try:
        match encoder.task:
            case "embedding":
                return [Feature(e.ids, e.type_ids) for e in tokenizer.encode_batch(texts_of(examples))]
            case "sequence_classification":
                rows = [e for e in examples if isinstance(e, LabelledText | str | tuple)]
                numbers = {label: i for i, label in enumerate(encoder.labels)}
                encodings = tokenizer.encode_batch([e.text if isinstance(e, LabelledText) else e for e in rows])
                return [
                    Feature(
                        e.ids, e.type_ids, _number(numbers, row.label) if isinstance(row, LabelledText) else IGNORED
                    )
                    for e, row in zip(encodings, rows, strict=True)
                ]
            case _:
                unlabelled = tokenizer.encode_batch([e for e in examples if isinstance(e, str)])
                return _tagged(encoder, [e for e in examples if isinstance(e, TaggedWords)]) + [
                    Feature(e.ids, e.type_ids, [IGNORED] * len(e.ids)) for e in unlabelled
                ]
    finally:
        tokenizer.no_truncation()


def _number(numbers: dict[str, int], label: str) -> int:
    if label not in numbers:
        known = ", ".join(list(numbers)[:8])
        raise ValueError(f"label {label!r} is none of the model's {len(numbers)} ({known}, …)")
    return numbers[label]


def _tagged(encoder: Encoder, rows: Sequence[TaggedWords]) -> list[Feature]:
    """The first token of a word has its tag."""
    numbers = {label: i for i, label in enumerate(encoder.labels)}
    features = []
    encodings = encoder.tokenizer.encode_batch([list(row.words) for row in rows], is_pretokenized=True)
    for encoding, row in zip(encodings, rows, strict=True):
        target, last = [], None
        for word in encoding.word_ids:
            target.append(IGNORED if word is None or word == last else _number(numbers, row.tags[word]))
            last = word
        features.append(Feature(encoding.ids, encoding.type_ids, target))
    return features


def _windows(tokenizer: Any, rows: Sequence[Span | tuple[str, str]], length: int) -> list[Feature]:
    """Windows of contexts that hold the whole answer (Devlin et al. 2019, section 4.2); without an answer, all."""
    features = []
    for row in rows:
        texts = (row.question, row.context) if isinstance(row, Span) else row
        question = len(tokenizer.encode(texts[0]).ids)
        if question + 16 > length:
            raise ValueError(f"a question has {question} tokens, of {length} that max_length leaves; raise it")
        stride = min(STRIDE, (length - question) // 2)
        tokenizer.enable_truncation(length, stride=stride, strategy="only_second")
        whole = tokenizer.encode(*texts)
        tokenizer.no_truncation()
        for window in (whole, *whole.overflowing):
            inside = [i for i, s in enumerate(window.sequence_ids) if s == 1]
            if not isinstance(row, Span):
                if inside:  # a context may have no token at all
                    features.append(Feature(window.ids, window.type_ids, (IGNORED, IGNORED), inside[0]))
                continue
            offsets = window.offsets  # each access makes the whole list
            first = [i for i in inside if offsets[i][0] <= row.start < offsets[i][1]]
            last = [i for i in inside if offsets[i][0] < row.end <= offsets[i][1]]
            if first and last:
                features.append(Feature(window.ids, window.type_ids, (first[0], last[-1]), inside[0]))
    return features


def collate(features: Sequence[Feature], encoder: Encoder) -> Batch:
    """Pad to the longest: int64 ``(batch, tokens)`` ids, mask, token types where the model has them, and targets."""
    length = max(len(f.ids) for f in features)
    shape = (len(features), length)
    batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "token_type_ids")}
    batch["input_ids"] += int(getattr(encoder.model.config, "pad_token_id", 0) or 0)
    for i, f in enumerate(features):
        n = len(f.ids)
        batch["input_ids"][i, :n] = torch.tensor(f.ids)
        batch["attention_mask"][i, :n] = 1
        batch["token_type_ids"][i, :n] = torch.tensor(f.types)
    if not getattr(encoder.model.config, "type_vocab_size", 0):
        del batch["token_type_ids"]
    if isinstance(features[0].target, list):
        batch["target"] = torch.full(shape, IGNORED)
        for i, f in enumerate(features):
            batch["target"][i, : len(f.target)] = torch.tensor(f.target)
    elif features[0].target is not None:
        batch["target"] = torch.tensor([f.target for f in features])
    device = next(encoder.model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def in_order(features: Sequence[Feature], size: int, encoder: Encoder) -> list[tuple[list[int], Batch]]:
    """Every feature once, similar lengths together: numbers of the features, and their batch."""
    order = sorted(range(len(features)), key=lambda i: len(features[i].ids))
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    return [(part, collate([features[i] for i in part], encoder)) for part in parts]


class Batches:
    """An endless sequence of training batches, any of which can be had by its number: a resumed run has the same."""

    def __init__(self, features: Sequence[Feature], size: int, seed: int) -> None:
        self.features = features
        self.size = min(size, len(features))
        self.seed = seed
        self.per_epoch = len(features) // self.size
        self._epoch = -1
        self._plan: list[list[int]] = []

    def __getitem__(self, step: int) -> list[Feature]:
        """The features of a step."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._shuffle(epoch)
        return [self.features[i] for i in self._plan[place]]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.features), generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, self.per_epoch * self.size, WINDOW * self.size):
            part = order[start : min(start + WINDOW * self.size, self.per_epoch * self.size)]
            part.sort(key=lambda i: len(self.features[i].ids))
            batches += [part[i : i + self.size] for i in range(0, len(part), self.size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
