"""Scores an encoder in torch while it is trained, as its task is scored elsewhere (:mod:`whet.evaluate`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from whet.datasets import ScoredPair
from whet.metrics import spearman
from whet.runtime.spans import best_answers

from .data import Example, texts_of
from .features import IGNORED, Feature, in_order, make_features
from .losses import run
from .models import Encoder

BATCH = 64
ANSWER = 30
"""Most tokens of an answer."""


class Scorer:
    """Development examples, tokenised once; calling it with an encoder gives its score, between −1 and 1.

    ``name`` says which: the Spearman correlation of pairs with scores, for other texts the mean cosine to the reference
    model's embeddings, accuracy of classes and tags, token F1 of answers.
    """

    def __init__(self, encoder: Encoder, examples: Sequence[Example], reference: Encoder, max_length: int) -> None:
        self.examples = list(examples)
        self.max_length = max_length
        self.features = make_features(encoder, self.examples, max_length)
        self.name = {"sequence_classification": "accuracy", "token_classification": "tag accuracy"}.get(
            encoder.task, "token F1"
        )
        if encoder.task == "embedding":
            pairs = [e for e in self.examples if isinstance(e, ScoredPair) and not math.isnan(e.score)]
            self.pairs = pairs if len({e.score for e in pairs}) > 1 else []
            self.name = "Spearman" if self.pairs else "cosine to the teacher"
            self.reference = _outputs(reference, self.features)

    def __call__(self, encoder: Encoder) -> float:
        """Score an encoder for the same task and with the same tokenizer."""
        match encoder.task:
            case "embedding":
                return self._embedding(_outputs(encoder, self.features))
            case "question_answering":
                return self._answers(_outputs(encoder, self.features))
            case _:
                right = total = 0
                for output, feature in zip(_outputs(encoder, self.features), self.features, strict=True):
                    target = np.atleast_1d(feature.target)
                    found = np.atleast_1d(output.argmax(-1))[: len(target)]
                    counted = target != IGNORED
                    right += int((found == target)[counted].sum())
                    total += int(counted.sum())
                return right / max(1, total)

    def _embedding(self, vectors: list[np.ndarray]) -> float:
        if not self.pairs:
            return float(np.mean([a @ b for a, b in zip(vectors, self.reference, strict=True)]))
        place = {text: i for i, text in enumerate(texts_of(self.examples))}
        cosines = np.array([vectors[place[p.first]] @ vectors[place[p.second]] for p in self.pairs])
        return spearman(cosines, np.array([p.score for p in self.pairs]))

    def _answers(self, outputs: list[np.ndarray]) -> float:
        """F1 of the tokens found with those wanted, in the window of the question that shows the answer."""
        total = 0.0
        for output, feature in zip(outputs, self.features, strict=True):
            context = slice(feature.context, len(feature.ids) - 1)
            first, last, _ = next(best_answers(output[:, 0], output[:, 1], context, ANSWER))
            wanted = range(feature.target[0], feature.target[1] + 1)
            shared = len(set(wanted) & set(range(first, last + 1)))
            total += 2 * shared / (len(wanted) + last - first + 1)
        return total / max(1, len(outputs))


def _outputs(encoder: Encoder, features: Sequence[Feature]) -> list[np.ndarray]:
    """Output of each feature, padding included."""
    found: list[np.ndarray] = [np.empty(0)] * len(features)
    for numbers, batch in in_order(features, BATCH, encoder):
        with torch.no_grad():
            output = run(encoder, batch).output.cpu().numpy()
        for i, row in zip(numbers, output, strict=True):
            found[i] = row
    return found
