"""What a module says about texts, as records that JSON can hold: one per text, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeAlias

import numpy as np

from whet.datasets import Text
from whet.runtime import Session

Record: TypeAlias = dict[str, Any]

BATCH = 64
"""Texts read before the first answer: enough for fast batches, and little to wait for in a pipe."""


def answer_texts(session: Session, texts: Iterable[Text], top_k: int | None = None) -> Iterator[Record]:
    """Do what the module's task is with each text or pair.

    =======================  =================================================================
    embedding                ``text``, ``vector``; of a pair ``text``, ``similarity`` (cosine)
    sequence_classification  ``text``, ``label``, ``score``; with ``top_k``: ``text``, ``labels``
    token_classification     ``text``, ``tags``
    =======================  =================================================================

    Raises:
        ValueError: the task needs more than texts, or takes no pairs.

    """
    task = session.metadata.task
    if task == "question_answering":
        raise ValueError(f"{session.path} answers questions: give --question, and the context as text or --file")
    if task == "hidden_states":
        raise ValueError(
            f"{session.path} gives a vector per token, which run() returns in Python; compile the model with "
            "--pooling mean for a vector per text"
        )
    stream = iter(texts)
    while batch := list(islice(stream, BATCH)):
        if task == "embedding":
            yield from _embedded(session, batch)
        elif task == "sequence_classification":
            yield from _classified(session, batch, top_k)
        else:
            yield from _tagged(session, batch)


def answer_question(session: Session, question: str, context: str, top_k: int | None = None) -> Iterator[Record]:
    """The answers to a question, best first, as ``answer``, ``start``, ``end`` and ``score``."""
    yield from (dict(a) for a in session.answer(question, context, top_k=top_k or 1))


def similarities(vectors: Iterable[Any]) -> np.ndarray[Any, Any]:
    """Cosine of every vector with every other, float32 ``(texts, texts)``."""
    rows = np.array(list(vectors), np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return np.asarray(rows @ rows.T)


def _embedded(session: Session, batch: list[Text]) -> Iterator[Record]:
    flat = [text for item in batch for text in ([item] if isinstance(item, str) else item)]
    vectors = iter(session.encode(flat))
    for item in batch:
        if isinstance(item, str):
            yield {"text": item, "vector": next(vectors).tolist()}
        else:
            yield {"text": item, "similarity": float(similarities([next(vectors), next(vectors)])[0, 1])}


def _classified(session: Session, batch: list[Text], top_k: int | None) -> Iterator[Record]:
    if top_k is None:
        yield from ({"text": text, **label} for text, label in zip(batch, session.classify(batch), strict=True))
    else:
        found = session.classify(batch, top_k)
        yield from ({"text": text, "labels": labels} for text, labels in zip(batch, found, strict=True))


def _tagged(session: Session, batch: list[Text]) -> Iterator[Record]:
    texts = [text for text in batch if isinstance(text, str)]
    if len(texts) < len(batch):
        raise ValueError(f"{session.path} tags single texts; pairs were given")
    yield from ({"text": text, "tags": tags} for text, tags in zip(texts, session.tag(texts), strict=True))
