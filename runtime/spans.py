"""From scores per token to stretches of text: words with labels, and answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


def softmax(scores: NDArray[Any]) -> NDArray[np.float32]:
    """Softmax over the last axis."""
    e = np.exp(scores - scores.max(axis=-1, keepdims=True), dtype=np.float32)
    return np.asarray(e / e.sum(axis=-1, keepdims=True), np.float32)


def sigmoid(scores: NDArray[Any]) -> NDArray[np.float32]:
    """1 / (1 + exp(−x)), without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * scores)), np.float32)


def merge_windows(windows: Sequence[tuple[int, NDArray[np.float32]]], tokens: int) -> NDArray[np.float32]:
    """Values of every token of a text from windows that overlap: each from the window where it has most context.

    Args:
        windows: first token, and values ``(tokens of the window, channels)``, ascending; they cover the text.
        tokens: tokens of the text.

    """
    best = np.full(tokens, -1)
    out = np.empty((tokens, windows[0][1].shape[1]), np.float32)
    for start, values in windows:
        place = np.arange(len(values))
        # The ends of the text itself are no loss of context.
        before = place if start else np.full(len(values), tokens)
        after = place[::-1] if start + len(values) < tokens else np.full(len(values), tokens)
        context = np.minimum(before, after)
        here = slice(start, start + len(values))
        wins = context > best[here]
        out[here][wins] = values[wins]
        best[here][wins] = context[wins]
    return out


def words(word_ids: Sequence[int | None]) -> list[slice]:
    """Group consecutive tokens of the same word; a token that belongs to none stands alone."""
    starts = [i for i, w in enumerate(word_ids) if i == 0 or w is None or w != word_ids[i - 1]]
    return [slice(a, b) for a, b in pairwise([*starts, len(word_ids)])]


def best_answers(
    start: NDArray[np.float32], end: NDArray[np.float32], context: slice, max_length: int
) -> Iterator[tuple[int, int, float]]:
    """Answers in one window, as ``(first token, last token, probability)``, most probable first.

    The probability of a span is that of its start times that of its end, over the context and token 0, where models
    put what they find unanswerable (SQuAD 2.0; Devlin et al. 2019, section 4.3).

    Args:
        start: logits ``(tokens,)``.
        end: logits ``(tokens,)``.
        context: the tokens that may be part of an answer.
        max_length: most tokens of an answer.

    """
    size = context.stop - context.start
    p_start, p_end = (softmax(np.append(logits[context], logits[0]))[:size] for logits in (start, end))
    first, extra = np.indices((size, min(max_length, size))).reshape(2, -1)
    inside = first + extra < size
    first, last = first[inside], (first + extra)[inside]
    joint = p_start[first] * p_end[last]
    for i in np.argsort(-joint, kind="stable"):
        yield context.start + int(first[i]), context.start + int(last[i]), float(joint[i])
