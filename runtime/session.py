"""A loaded module: texts in, answers out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import numpy as np
from numpy.typing import NDArray

from whet.runtime.artifact import Artifact
from whet.runtime.engine import Engine
from whet.runtime.spans import best_answers, merge_windows, sigmoid, softmax, words
from whet.runtime.text import Text, Tokenizer, check_text, check_texts

if TYPE_CHECKING:
    from tokenizers import Encoding

_METHODS = {
    "embedding": "encode",
    "sequence_classification": "classify",
    "token_classification": "tag",
    "question_answering": "answer",
    "hidden_states": "run",
}
_TEXTS_AT_ONCE = 256
_TAG_OVERLAP = 64
_ANSWER_WINDOW = 384
"""Question answering models are fine-tuned on windows of this many tokens; longer ones make them worse."""


class Label(TypedDict):
    """A class and its probability."""

    label: str
    score: float


class Tag(TypedDict):
    """A stretch ``text[start:end]`` of the input with its most probable label."""

    start: int
    end: int
    text: str
    label: str
    score: float


class Answer(TypedDict):
    """A stretch ``answer = context[start:end]`` with its probability."""

    answer: str
    start: int
    end: int
    score: float


class Trace(NamedTuple):
    """Where requests of a module with caches were answered."""

    answers: NDArray[np.float32]
    """Logits ``(texts, labels)``."""
    layers: NDArray[np.int64]
    """``(texts,)``: how many layers ran."""
    trust: NDArray[np.float32]
    """``(texts,)``: in the cache that answered, in its own units; 1 of requests that ran to the end."""


class Session(Engine):
    """A loaded module, made by :func:`whet.runtime.load`.

    Token ids go to :meth:`run` and :meth:`run_packed`, texts to the method of the model's task: :meth:`encode`,
    :meth:`classify` or :meth:`score`, :meth:`tag`, :meth:`answer`; any other raises ValueError. Nothing is padded:
    the answer to a text does not depend on the texts beside it.

    One session may be used from several threads, and in forked children. Its memory is freed when it is deleted, its
    code stays loaded until the process ends. The weights are pages of the file: all processes that load it share them,
    and the file must not be overwritten in place while it is in use (``whet.compile`` replaces it instead).
    """

    def __init__(self, artifact: Artifact, threads: int | None = None, isa: str | None = None) -> None:
        super().__init__(artifact, threads, isa)
        self._tokenizer_json = artifact.tokenizer_json

    def encode(self, texts: str | Iterable[str]) -> NDArray[np.float32]:
        """Embed texts; longer ones are truncated to ``metadata.max_length`` tokens.

        Args:
            texts: a text, or any number of them.

        Returns:
            float32 ``(texts, channels)``.

        """
        self._expect("encode", "embedding")
        return self._rows(check_texts(texts, pairs=False))

    @overload
    def classify(self, texts: Text | Iterable[Text]) -> list[Label]: ...
    @overload
    def classify(self, texts: Text | Iterable[Text], top_k: int) -> list[list[Label]]: ...
    def classify(self, texts: Text | Iterable[Text], top_k: int | None = None) -> list[Label] | list[list[Label]]:
        """Classify texts or pairs of texts; longer ones are truncated.

        Args:
            texts: a text, or any number of texts or pairs ``(first, second)``. One pair is a list of one.
            top_k: None gives the best label of each text; a number that many, best first.

        Returns:
            ``{"label", "score"}`` per text, or a list of them. Scores are softmax probabilities, or sigmoids where the
            model has a single label, or labels that do not exclude one another.

        """
        logits = self.logits(texts)
        scores = sigmoid(logits) if self.metadata.multi_label else softmax(logits)
        if top_k is None:
            return [self._label(row, int(row.argmax())) for row in scores]
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; expected at least 1")
        return [[self._label(row, int(i)) for i in np.argsort(-row, kind="stable")[:top_k]] for row in scores]

    def logits(self, texts: Text | Iterable[Text]) -> NDArray[np.float32]:
        """Return what :meth:`classify` computes its scores from, float32 ``(texts, labels)``."""
        self._expect("classify", "sequence_classification")
        return self._rows(check_texts(texts, pairs=True))

    def trace(self, texts: Text | Iterable[Text]) -> Trace:
        """Answer texts, or pairs, and say where each was answered; for modules compiled with caches."""
        if not self.metadata.exits:
            raise ValueError(f"{self.path} has no caches; compile the model with freeze=")
        checked = check_texts(texts, pairs=True)
        parts = []
        for chunk in self._chunks(checked):
            ids, lengths, types = self._ids(self._tokenizer.encode(chunk))
            parts.append(self.traced(ids, lengths, None, types))
        rows = np.concatenate(parts)
        return Trace(rows[:, :-2], rows[:, -2].astype(np.int64), rows[:, -1])

    def score(self, pairs: Iterable[tuple[str, str]]) -> NDArray[np.float32]:
        """Score how well each second text answers the first, with a reranker (a classifier with a single label).

        Returns:
            float32 ``(pairs,)`` between 0 and 1.

        """
        self._expect("score", "sequence_classification")
        if self.metadata.output.channels != 1:
            raise ValueError(
                f"the model has {self.metadata.output.channels} labels, score() is for one; use classify()"
            )
        checked = check_texts(pairs, pairs=True)
        for i, pair in enumerate(checked):
            if isinstance(pair, str):
                raise ValueError(f"entry {i} is the text {pair!r}; expected a pair of texts")
        return sigmoid(self._rows(checked)[:, 0])

    def tag(self, texts: str | Iterable[str], level: Literal["word", "token"] = "word") -> list[list[Tag]]:
        """Label the words of texts of any length; a text longer than the model takes is read in overlapping windows.

        Args:
            texts: a text, or any number of them.
            level: ``"word"`` gives each word the label of its first token, ``"token"`` each token its own.

        Returns:
            Per text, in order, ``{"start", "end", "text", "label", "score"}`` with offsets in characters.

        """
        self._expect("tag", "token_classification")
        if level not in ("word", "token"):
            raise ValueError(f"level is {level!r}; expected 'word' or 'token'")
        return [self._tag(str(text), level) for text in check_texts(texts, pairs=False)]

    @overload
    def answer(self, question: str, context: str, *, max_answer_length: int = 30, doc_stride: int = 128) -> Answer: ...
    @overload
    def answer(
        self, question: str, context: str, *, top_k: int, max_answer_length: int = 30, doc_stride: int = 128
    ) -> list[Answer]: ...
    def answer(
        self,
        question: str,
        context: str,
        *,
        top_k: int | None = None,
        max_answer_length: int = 30,
        doc_stride: int = 128,
    ) -> Answer | list[Answer]:
        """Find the answer to a question in a context of any length.

        Args:
            question: must leave room in the model's window.
            context: read in windows of at most 384 tokens.
            top_k: None gives the best answer; a number a list of at most that many, best first.
            max_answer_length: most tokens of an answer.
            doc_stride: tokens that neighbouring windows share, at most half a window.

        Returns:
            ``{"answer", "start", "end", "score"}`` with offsets in characters, widened to whole words. An empty
            context gives the empty answer with score 0.

        """
        self._expect("answer", "question_answering")
        check_text("question", question)
        check_text("context", context)
        for name, value, least in (
            ("top_k", 1 if top_k is None else top_k, 1),
            ("max_answer_length", max_answer_length, 1),
            ("doc_stride", doc_stride, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        found = self._answers(question, context, top_k or 1, max_answer_length, doc_stride)
        return found if top_k is not None else found[0]

    def _expect(self, method: str, task: str) -> None:
        if self.metadata.task != task:
            raise ValueError(
                f"{method}() is for {task} models; {self.metadata.name} is a {self.metadata.task} model: "
                f"use {_METHODS.get(self.metadata.task, 'run')}()"
            )

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if self._tokenizer_json is None:
            raise ValueError(f"{self.path} was compiled without a tokenizer; give token ids to run()")
        return Tokenizer(self._tokenizer_json, self.metadata.max_length, self.threads)

    def requests(self, texts: Iterable[Text]) -> list[NDArray[np.int32]]:
        """Token ids and types of texts or pairs as the model gets them, int32 ``(2, tokens)`` each."""
        typed = self.metadata.type_vocab_size > 1
        encodings = self._tokenizer.encode(check_texts(texts, pairs=True))
        return [np.array([e.ids, e.type_ids if typed else [0] * len(e)], np.int32) for e in encodings]

    def _rows(self, texts: list[Text]) -> NDArray[np.float32]:
        """One row of output per text or pair."""
        return np.concatenate([self._run_encodings(self._tokenizer.encode(chunk)) for chunk in self._chunks(texts)])

    def _chunks(self, texts: list[Text]) -> list[list[Text]]:
        return [texts[i : i + _TEXTS_AT_ONCE] for i in range(0, len(texts), _TEXTS_AT_ONCE)] or [texts]

    def _run_encodings(self, encodings: Sequence[Encoding]) -> NDArray[np.float32]:
        ids, lengths, types = self._ids(encodings)
        return self._run_requests(ids, lengths, types)

    def _ids(
        self, encodings: Sequence[Encoding]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32] | None]:
        """Token ids, lengths and token types, as ``run_packed`` takes them."""
        ids = np.array([i for e in encodings for i in e.ids], np.int32)
        # Models without token types have one, 0, whatever the tokenizer says.
        types = None
        if self.metadata.type_vocab_size > 1:
            types = np.array([i for e in encodings for i in e.type_ids], np.int32)
        return ids, np.array([len(e) for e in encodings], np.int64), types

    def _windows(self, encodings: Sequence[Encoding]) -> Iterator[NDArray[np.float32]]:
        """Rows per token of each encoding."""
        values = self._run_encodings(encodings)
        yield from np.split(values, np.cumsum([len(e) for e in encodings])[:-1])

    def _label(self, scores: NDArray[np.float32], index: int) -> Label:
        names = self.metadata.labels
        return Label(label=names[index] if index < len(names) else f"LABEL_{index}", score=float(scores[index]))

    def _tag(self, text: str, level: str) -> list[Tag]:
        whole, windows = self._tokenizer.windows(text, _TAG_OVERLAP)
        if not len(whole):
            return []
        rows = self._windows([w.encoding for w in windows])
        inner = [(w.start, values[_tokens_of(w.encoding, 0)]) for w, values in zip(windows, rows, strict=True)]
        scores = softmax(merge_windows(inner, len(whole)))
        groups = words(whole.word_ids) if level == "word" else [slice(i, i + 1) for i in range(len(whole))]
        offsets = whole.offsets
        tags = []
        for group in groups:
            start, end = offsets[group.start][0], offsets[group.stop - 1][1]
            best = self._label(scores[group.start], int(scores[group.start].argmax()))
            tags.append(Tag(start=start, end=end, text=text[start:end], **best))
        return tags

    def _answers(self, question: str, context: str, top_k: int, most: int, overlap: int) -> list[Answer]:
        length = min(_ANSWER_WINDOW, self.metadata.max_length)
        whole, windows = self._tokenizer.pair_windows(question, context, length, overlap)
        offsets = whole.offsets
        groups = {i: group for group in words(whole.word_ids) for i in range(group.start, group.stop)}
        found: dict[tuple[int, int], float] = {}
        for window, values in zip(windows, self._windows([w.encoding for w in windows]), strict=True):
            where = _tokens_of(window.encoding, 1)
            shift = window.start - where.start
            here: dict[tuple[int, int], float] = {}
            for first, last, score in best_answers(values[:, 0], values[:, 1], where, most):
                start = offsets[groups[first + shift].start][0]
                end = offsets[groups[last + shift].stop - 1][1]
                here.setdefault((start, end), score)
                if len(here) == top_k:
                    break
            found.update({span: max(score, found.get(span, 0.0)) for span, score in here.items()})
        best = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:top_k]
        answers = [Answer(answer=context[a:b], start=a, end=b, score=score) for (a, b), score in best]
        return answers or [Answer(answer="", start=0, end=0, score=0.0)]


def _tokens_of(encoding: Encoding, sequence: int) -> slice:
    """Where the tokens of the first (0) or second (1) text stand between the special ones."""
    sequences = encoding.sequence_ids
    start = sequences.index(sequence) if sequence in sequences else 0
    return slice(start, start + sequences.count(sequence))
