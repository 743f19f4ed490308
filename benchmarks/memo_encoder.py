"""A BERT in torch, layer by layer, whose attention probabilities can be read and replaced (for ``memo_keys.py``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

BATCH = 64
"""Requests that are run at once."""

Lengths = dict[int, torch.Tensor]
"""Of all requests of a number of tokens: a row each."""


class Encoder:
    """A BERT, layer by layer, whose attention probabilities can be read and replaced."""

    def __init__(self, folder: str, labels: Sequence[str] | None) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        AttentionInterface.register("memo", self._attend)
        of = AutoModel if labels is None else AutoModelForSequenceClassification
        self._model = of.from_pretrained(folder, attn_implementation="memo").eval().requires_grad_(False)
        self._base = self._model.base_model
        self.layers = self._base.encoder.layer
        self._stored: tuple[torch.Tensor, torch.Tensor] | None = None
        self._made = torch.zeros(0)
        self.words = self._base.embeddings.word_embeddings.weight

    def tokens(self, texts: Sequence[str]) -> tuple[Lengths, dict[int, NDArray[np.int64]]]:
        """Token ids by their number, and which texts these are."""
        ids = self._tokenizer(list(texts), truncation=True, max_length=self._model.config.max_position_embeddings)
        rows: dict[int, list[int]] = {}
        for i, tokens in enumerate(ids["input_ids"]):
            rows.setdefault(len(tokens), []).append(i)
        return (
            {n: torch.tensor([ids["input_ids"][i] for i in of]) for n, of in sorted(rows.items())},
            {n: np.array(of) for n, of in sorted(rows.items())},
        )

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """``(requests, tokens)`` to ``(requests, tokens, hidden)``."""
        return self._base.embeddings(input_ids=ids)  # type: ignore[no-any-return]

    def normalised(self) -> torch.Tensor:
        """Word embeddings after the layer norm, at the mean position."""
        of = self._base.embeddings
        more = of.position_embeddings.weight.mean(dim=0) + of.token_type_embeddings.weight[0]
        return of.LayerNorm(self.words + more)  # type: ignore[no-any-return]

    def layer(
        self, number: int, x: torch.Tensor, stored: torch.Tensor | None = None, used: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a layer: its output, and the probabilities that it would have without stored ones.

        Stored are ``(requests, heads, tokens, tokens)``; ``used`` says which requests take theirs.
        """
        self._stored = None if stored is None or used is None else (stored, used)
        return self.layers[number](x), self._made

    def probabilities(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Of a layer alone."""
        self._stored = None
        self.layers[number].attention.self(x)
        return self._made

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        """Logits; of a model without a head the normalised mean of the tokens."""
        if hasattr(self._model, "classifier"):
            return self._model.classifier(self._base.pooler(x))  # type: ignore[no-any-return]
        return torch.nn.functional.normalize(x.mean(dim=1))

    def _attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = query @ key.transpose(2, 3) * more.get("scaling", query.shape[-1] ** -0.5)
        self._made = used = scores.softmax(dim=-1)
        if self._stored is not None:
            stored, where = self._stored
            used = torch.where(where[:, None, None, None], stored, used)
        return (used @ value).transpose(1, 2).contiguous(), used


@dataclass
class Requests:
    """What a model does with requests, by their number of tokens."""

    ids: Lengths
    rows: dict[int, NDArray[np.int64]]
    """Which requests these are."""
    hidden: list[Lengths]
    """Before each layer, and after the last."""
    probabilities: list[Lengths]
    """Of each layer, ``(requests, heads · tokens · tokens)``."""
    answers: NDArray[np.float32]
    count: int


def run(encoder: Encoder, texts: Sequence[str], only: Iterable[int] | None = None) -> Requests:
    """Run texts; those of other numbers of tokens than ``only`` are left out."""
    ids, rows = encoder.tokens(texts)
    for n in set(ids) - set(ids if only is None else only):
        del ids[n], rows[n]
    hidden: list[Lengths] = [{n: torch.cat([encoder.embed(b) for b in of.split(BATCH)]) for n, of in ids.items()}]
    probabilities: list[Lengths] = []
    for i in range(len(encoder.layers)):
        ran = {n: [encoder.layer(i, b) for b in x.split(BATCH)] for n, x in hidden[i].items()}
        hidden.append({n: torch.cat([x for x, _ in of]) for n, of in ran.items()})
        probabilities.append({n: torch.cat([made.flatten(1) for _, made in of]) for n, of in ran.items()})
    answers = {n: encoder.answer(x) for n, x in hidden[-1].items()}
    return Requests(ids, rows, hidden, probabilities, in_order(answers, rows, len(texts)), len(texts))


def in_order(of: Lengths, rows: dict[int, NDArray[np.int64]], count: int) -> NDArray[np.float32]:
    """What each request has, by its number; NaN where there is none."""
    width = next(iter(of.values())).shape[1:]
    result = np.full((count, *width), np.nan, np.float32)
    for n, values in of.items():
        result[rows[n]] = values.numpy()
    return result
