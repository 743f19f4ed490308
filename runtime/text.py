"""Texts to tokens with the tokenizer that travels in the module."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

Text: TypeAlias = str | tuple[str, str]
"""A text, or a pair of texts that the model reads together."""


@dataclass(frozen=True)
class Window:
    """A part of a long text with the model's special tokens around it."""

    encoding: Encoding
    start: int
    """Number, within the text, of the first token that is not special; the others follow."""


class Tokenizer:
    """Wraps the Rust tokenizer.

    Args:
        json: contents of ``tokenizer.json``.
        max_length: longest request in tokens, special tokens included.
        threads: 1 tokenizes batches in the calling thread.

    """

    def __init__(self, json: str, max_length: int, threads: int) -> None:
        # Its workers are started once in a process, with the first batch.
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
        self._json = json
        self._parallel = threads > 1
        self.max_length = max_length

    @cached_property
    def _whole(self) -> Backend:
        from tokenizers import Tokenizer as Backend  # noqa: PLC0415 -- time that token ids need not pay

        backend = Backend.from_str(self._json)
        backend.no_padding()
        backend.no_truncation()
        return backend

    @cached_property
    def _truncating(self) -> Backend:
        from tokenizers import Tokenizer as Backend  # noqa: PLC0415

        backend = Backend.from_str(self._json)
        backend.no_padding()
        backend.enable_truncation(self.max_length)
        return backend

    def encode(self, texts: Sequence[Text]) -> list[Encoding]:
        """Encode texts and pairs, truncated to ``max_length`` (of pairs, the longer text first): ids and types only."""
        if self._parallel:
            return list(self._truncating.encode_batch_fast(texts))
        return [self._truncating.encode_batch_fast([text])[0] for text in texts]

    def windows(self, text: str, overlap: int) -> tuple[Encoding, list[Window]]:
        """Encode a text of any length: the whole without special tokens, and windows that overlap by some tokens."""
        whole = self._whole.encode(text, add_special_tokens=False)
        room = self.max_length - self._whole.num_special_tokens_to_add(False)
        return whole, [Window(self._whole.post_process(p), s) for p, s in _parts(whole, room, overlap)]

    def pair_windows(self, first: str, second: str, length: int, overlap: int) -> tuple[Encoding, list[Window]]:
        """Encode a pair whose second text has any length: that text, and windows of at most ``length`` tokens.

        Raises:
            ValueError: the first text leaves no room for the second.

        """
        head = self._whole.encode(first, add_special_tokens=False)
        whole = self._whole.encode(second, add_special_tokens=False)
        room = length - len(head) - self._whole.num_special_tokens_to_add(True)
        if room < 1:
            raise ValueError(f"the question has {len(head)} tokens, which leaves no room in {length}; shorten it")
        return whole, [Window(self._whole.post_process(head, p), s) for p, s in _parts(whole, room, overlap)]


def check_texts(texts: object, pairs: bool) -> list[Text]:
    """Return texts, or pairs of texts where ``pairs`` allows them, as a list; one text alone is a list of one.

    Raises:
        ValueError: something is neither.

    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        texts = [texts]
    checked: list[Text] = []
    for i, text in enumerate(texts):
        if pairs and isinstance(text, tuple | list) and len(text) == 2:
            checked.append((check_text(f"text {i}", text[0]), check_text(f"text {i}", text[1])))
        else:
            checked.append(check_text(f"text {i}", text))
    return checked


def check_text(name: str, text: object) -> str:
    """Return ``text`` if it is one that the tokenizer takes.

    Raises:
        ValueError: it is no str, or (UnicodeEncodeError) holds half of a surrogate pair.

    """
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r}, a {type(text).__name__}; expected a str")
    if not text.isascii():
        text.encode("utf-8")
    return text


def _parts(whole: Encoding, room: int, overlap: int) -> list[tuple[Encoding, int]]:
    """Cut an encoding into parts of ``room`` tokens that share ``overlap``, each with the number of its first."""
    if len(whole) <= room:
        return [(whole, 0)]
    from tokenizers import Encoding  # noqa: PLC0415

    overlap = min(overlap, room // 2)
    first = Encoding.merge([whole], False)  # a copy: truncation is in place
    first.truncate(room, overlap)
    return [(part, i * (room - overlap)) for i, part in enumerate([first, *first.overflowing])]
