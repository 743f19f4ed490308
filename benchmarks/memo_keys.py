"""Which key finds the record whose attention a request can use, and in which layers: what each loses by what it saves.

    python benchmarks/memo_keys.py NAME MODEL RECORDS QUERIES      # text,label in .csv, or a text per line in .txt

In fp32 and torch (BERT's layers), so that keys alone differ. A request's attention probabilities are replaced by those
of the nearest record of the same number of tokens, for the share of the requests that is nearest. Saved work is the
share of all requests' layers that take their probabilities from a record. The nearest are found by exact search. Writes
results/NAME.md and .json.

Keys, all compared place by place (Euclidean distance): *words*, word embeddings on their principal axes; *normalised
words*, the same after the embeddings' layer norm, at the mean position; *unit words*, after a layer norm without
weights; *learned words*, an MLP of word embeddings; *hidden*, the hidden state before the layer; *learned*, an MLP of
that; *true*, the total-variation distance of the attention probabilities itself, which no key can know. The MLPs are
trained as Siamese networks (AttMemo, arXiv 2301.09262) on pairs of records so that the distance is the true one. With
one look-up it serves all the layers that are named, with one per layer each layer has its own key, of the hidden state
that the replaced layers before it have made.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memo_encoder import BATCH, Encoder, Lengths, Requests, in_order, run
from numpy.typing import NDArray
from report import table

from whet.datasets import LabelledText, read_dataset, read_texts

RESULTS = Path(__file__).parent / "results"
SAVED = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
MOST_LOST = 0.05
"""Of the answers, beyond which no more is saved."""
AXES = 64
"""Of word embeddings, and of what the MLP makes of a place."""
WIDTH, STEPS, PAIRS, NEAR = 128, 1500, 64, 8
"""Of the MLP's hidden layer; steps of training, pairs in each; half of these are of the so many nearest by words."""
PLACES = 1024
"""Tokens of a step's pairs, at most: long records come in fewer pairs."""
TRAINED_ON = 512
"""Records of each number of tokens, at most."""
QUERIES = 2000
"""At most: every second, or third, … of the file."""

Key = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Features ``(requests, features)`` of a layer's number, the hidden state before it, and token ids."""


def words(vectors: torch.Tensor) -> Key:
    """A vector per token of the vocabulary, such as Whet's key has."""

    def key(layer: int, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return vectors[ids].flatten(1) / ids.shape[1] ** 0.5

    return key


def projected(table: torch.Tensor) -> torch.Tensor:
    """Word embeddings on their principal axes: Whet's vectors."""
    centred = table - table.mean(dim=0)
    return centred @ torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :AXES]


def hidden(layer: int, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The hidden state as it is."""
    return x.flatten(1) / x.shape[1] ** 0.5


class Pairs:
    """Pairs of records to train on."""

    def __init__(self, records: Requests, near: Key) -> None:
        self.ids = {n: ids[:TRAINED_ON] for n, ids in records.ids.items() if len(ids) > NEAR + 1}
        self.hidden = [{n: of[n][:TRAINED_ON] for n in self.ids} for of in records.hidden]
        self._neighbours: Lengths = {}
        self._true: list[Lengths] = [{} for _ in records.probabilities]
        for n, ids in self.ids.items():
            features = near(0, self.hidden[0][n], ids)
            distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
            self._neighbours[n] = distances.topk(NEAR, largest=False).indices
            for true, of in zip(self._true, records.probabilities, strict=True):
                p = of[n][:TRAINED_ON]
                true[n] = torch.cdist(p, p, p=1) / 2 / (p.shape[1] // n)

    def batches(self, targets: Sequence[int]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Number of tokens, which records ``(2, pairs)``, and their true distance in the target layers."""
        torch.manual_seed(0)
        shares = np.array([len(ids) for ids in self.ids.values()])
        lengths = np.random.default_rng(0).choice(list(self.ids), STEPS, p=shares / shares.sum())
        for n in lengths.tolist():
            size = max(2, min(PAIRS, PLACES // n))
            half = size // 2
            a, b = torch.randint(len(self.ids[n]), (2, size))
            b[:half] = self._neighbours[n][a[:half], torch.randint(NEAR, (half,))]
            yield n, torch.stack([a, b]), torch.stack([self._true[i][n][a, b] for i in targets]).mean(dim=0)


def trained(pairs: Pairs, targets: Sequence[int], state: Callable[[int], torch.Tensor], size: int) -> torch.nn.Module:
    """Train an MLP of what ``state`` has at each place of the records of a number of tokens."""
    mlp = torch.nn.Sequential(torch.nn.Linear(size, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, AXES))
    optimiser = torch.optim.AdamW(mlp.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=STEPS)
    for n, of, true in pairs.batches(targets):
        a, b = (mlp(state(n)[rows]).flatten(1) / n**0.5 for rows in of)
        loss = torch.nn.functional.mse_loss(torch.nn.functional.pairwise_distance(a, b), true)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return mlp.requires_grad_(False)


def learned(pairs: Pairs, layer: int, targets: Sequence[int]) -> Key:
    """The key of an MLP of the hidden state before a layer."""
    states = pairs.hidden[layer]
    mlp = trained(pairs, targets, states.__getitem__, next(iter(states.values())).shape[2])

    def key(layer: int, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return mlp(x).flatten(1) / x.shape[1] ** 0.5  # type: ignore[no-any-return]

    return key


def _variation(a: torch.Tensor, b: torch.Tensor, tokens: int) -> torch.Tensor:
    """Mean total-variation distance of rows of probabilities, each of ``tokens``."""
    return (a - b).abs().sum(dim=-1) / 2 / (a.shape[-1] // tokens)


@dataclass
class Nearest:
    """Of every request the nearest record of the same number of tokens, and how far it is."""

    record: dict[int, torch.Tensor]
    distance: dict[int, torch.Tensor]

    def hits(self, share: float, count: int) -> Lengths:
        """The requests that are nearest, such a share of all ``count``, as masks."""
        flat = torch.cat(list(self.distance.values()))
        used = torch.zeros(len(flat), dtype=torch.bool)
        used[flat.argsort(stable=True)[: round(share * count)]] = True
        used &= flat.isfinite()
        parts = used.split([len(d) for d in self.distance.values()])
        return dict(zip(self.distance, parts, strict=True))


def search(
    of: Callable[[int], torch.Tensor], among: Callable[[int], torch.Tensor], lengths: Lengths, p: int
) -> Nearest:
    """Search by features of requests and records."""
    found = Nearest({}, {})
    for n, ids in lengths.items():
        try:
            others = among(n)
        except KeyError:  # no record has so many tokens
            found.distance[n] = torch.full((len(ids),), torch.inf)
            found.record[n] = torch.zeros(len(ids), dtype=torch.int64)
            continue
        found.distance[n], found.record[n] = torch.cdist(of(n), others, p=p).min(dim=1)
    return found


@dataclass(frozen=True)
class Result:
    """What replacing attention did to the queries."""

    key: str
    look_ups: str
    layers: tuple[int, ...]
    saved: float
    """Share of all requests' layers."""
    hits: float
    """Share of the requests, in each of the layers."""
    variation: float
    """Mean total-variation distance of the probabilities that were used from those of the plain model, at hits."""
    changed: float
    """Share of the requests that get another class; NaN where there are none."""
    accuracy: float
    distance: float
    """1 − cosine of the answers, mean over all requests."""


class Study:
    """Records, queries, and what to do with them."""

    def __init__(
        self, encoder: Encoder, records: Sequence[str], queries: Sequence[str], truth: NDArray[Any] | None
    ) -> None:
        self.encoder, self.truth = encoder, truth
        self.queries = run(encoder, queries)
        self.records = run(encoder, records, self.queries.ids)
        self.results: list[Result] = []

    def once(self, name: str, key: Key, layers: Sequence[int], look: int = 0) -> None:
        """One look-up before layer ``look`` for some layers."""
        r, q = self.records, self.queries
        found = search(
            lambda n: key(look, q.hidden[look][n], q.ids[n]),
            lambda n: key(look, r.hidden[look][n], r.ids[n]),
            q.ids,
            2,
        )
        where = "one" if look == 0 else f"one, before layer {look + 1}"
        self._sweep(name, where, layers, lambda layer, x: found)

    def once_true(self, layers: Sequence[int]) -> None:
        """The same by the true distance."""

        def features(of: Requests, n: int) -> torch.Tensor:
            return torch.cat([of.probabilities[i][n] for i in layers], dim=1)

        found = search(partial(features, self.queries), partial(features, self.records), self.queries.ids, 1)
        found.distance = {n: d / n for n, d in found.distance.items()}
        self._sweep("true", "one", layers, lambda layer, x: found)

    def each(self, name: str, keys: Sequence[Key], layers: Sequence[int]) -> None:
        """A look-up per layer."""
        r, q = self.records, self.queries

        def find(layer: int, x: Lengths) -> Nearest:
            key = keys[layer]
            return search(
                lambda n: key(layer, x[n], q.ids[n]), lambda n: key(layer, r.hidden[layer][n], r.ids[n]), q.ids, 2
            )

        self._sweep(name, "one per layer", layers, find)

    def each_true(self, layers: Sequence[int]) -> None:
        """The same by the true distance."""

        def find(layer: int, x: Lengths) -> Nearest:
            found = search(
                lambda n: self.encoder.probabilities(layer, x[n]).flatten(1),
                lambda n: self.records.probabilities[layer][n],
                self.queries.ids,
                1,
            )
            found.distance = {n: d / n for n, d in found.distance.items()}
            return found

        self._sweep("true", "one per layer", layers, find)

    def _sweep(self, name: str, look_ups: str, layers: Sequence[int], find: Callable[[int, Lengths], Nearest]) -> None:
        total = len(self.encoder.layers)
        for saved in SAVED:
            share = saved * total / len(layers)
            if share <= 1:
                result = Result(name, look_ups, tuple(layers), saved, share, *self._replace(layers, share, find))
                self.results.append(result)
                print(result, file=sys.stderr)
                if max(result.distance, 0 if self.truth is None else result.changed) > MOST_LOST:
                    return

    def _replace(
        self, layers: Sequence[int], share: float, find: Callable[[int, Lengths], Nearest]
    ) -> tuple[float, float, float, float]:
        q, heads = self.queries, self.encoder.layers[0].attention.self.num_attention_heads
        x = dict(q.hidden[0])
        differ = {n: torch.zeros(len(of), dtype=torch.bool) for n, of in x.items()}
        variations = []
        for layer in range(len(self.encoder.layers)):
            found = find(layer, x) if layer in layers else None
            hits = found.hits(share, q.count) if found is not None else {}
            for n, before in x.items():
                used = hits.get(n, torch.zeros(len(before), dtype=torch.bool))
                differ[n] = differ[n] | used
                x[n] = q.hidden[layer + 1][n].clone()
                if not differ[n].any():
                    continue
                for rows in differ[n].nonzero().flatten().split(BATCH):
                    if found is None:
                        x[n][rows] = self.encoder.layer(layer, before[rows])[0]
                    else:
                        stored = self.records.probabilities[layer][n][found.record[n][rows]].reshape(-1, heads, n, n)
                        x[n][rows] = self.encoder.layer(layer, before[rows], stored, used[rows])[0]
                if found is not None and used.any():
                    stored = self.records.probabilities[layer][n][found.record[n][used]]
                    variations.append(_variation(stored, q.probabilities[layer][n][used], n))
        answers = in_order({n: self.encoder.answer(h) for n, h in x.items()}, q.rows, q.count)
        norms = np.linalg.norm(answers, axis=1) * np.linalg.norm(q.answers, axis=1)
        distance = 1 - ((answers * q.answers).sum(axis=1) / norms)
        changed = accuracy = float("nan")
        if self.truth is not None:
            classes = answers.argmax(axis=1)
            changed = float((classes != q.answers.argmax(axis=1)).mean())
            accuracy = float((classes == self.truth).mean())
        return float(torch.cat(variations).mean()), changed, accuracy, float(distance.mean())


def study(of: Study) -> Iterator[None]:
    """Run everything that is compared; stops after each part of it."""
    embeddings = of.encoder.words
    total = len(of.encoder.layers)
    every = range(total)
    vectors = projected(embeddings)
    by_words = words(vectors)
    pairs = Pairs(of.records, by_words)
    of.once("words", by_words, every)
    of.once("normalised words", words(projected(of.encoder.normalised())), every)
    of.once("unit words", words(projected(torch.nn.functional.layer_norm(embeddings, embeddings.shape[1:]))), every)
    mlp = trained(pairs, every, lambda n: embeddings[pairs.ids[n]], embeddings.shape[1])
    of.once("learned words", words(mlp(embeddings)), every)
    of.once("hidden", hidden, every)
    of.once("learned", learned(pairs, 0, every), every)
    of.once_true(every)
    yield
    of.each("hidden", [hidden] * total, every)
    of.each("learned", [learned(pairs, i, [i]) for i in every], every)
    of.each_true(every)
    yield
    for k in range(1, total):
        of.once("words", by_words, range(k))
        of.once("words", by_words, range(k, total))
    yield
    of.once("hidden", hidden, range(1, total), look=1)
    of.once("learned", learned(pairs, 1, range(1, total)), range(1, total), look=1)
    yield


def read(path: str) -> tuple[list[str], list[str] | None]:
    """Texts, and their labels where there are some."""
    if Path(path).suffix != ".csv":
        return [str(text) for text in read_texts(path)], None
    rows = [row for row in read_dataset(path, "csv").rows if isinstance(row, LabelledText)]
    return [str(row.text) for row in rows], [row.label for row in rows]


def markdown(results: Sequence[Result], about: str) -> str:
    """The tables."""
    labelled = not np.isnan(results[0].changed)
    measures: list[tuple[str, Callable[[Result], str]]] = [
        ("Mean total-variation distance at hits", lambda r: f"{r.variation:.3f}"),
        ("Points lost: 100 · (1 − cosine) of the answers, mean over all requests", lambda r: f"{100 * r.distance:.2f}"),
    ]
    if labelled:
        measures[:0] = [
            ("Answers changed, % of all requests", lambda r: f"{100 * r.changed:.2f}"),
            ("Accuracy, %", lambda r: f"{100 * r.accuracy:.2f}"),
        ]
    parts = ["# Keys and layers of memoized attention", about]
    for title, show in measures:
        rows: dict[tuple[str, str, str], dict[float, str]] = {}
        for r in results:
            layers = ", ".join(str(i + 1) for i in r.layers)
            rows.setdefault((r.key, r.look_ups, layers), {})[r.saved] = show(r)
        body = [[*key, *(cells.get(saved, "–") for saved in SAVED)] for key, cells in rows.items()]
        parts += [f"## {title}", table(["key", "look-ups", "layers", *(f"{s:.0%} saved" for s in SAVED)], body)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run, write."""
    name, model, *files = sys.argv[1:]
    (records, _), (queries, labels) = map(read, files)
    step = -(-len(queries) // QUERIES)
    queries, labels = queries[::step], labels and labels[::step]
    encoder = Encoder(model, labels)
    config = encoder._model.config
    truth = None if labels is None else np.array([config.label2id[label] for label in labels])
    start = time.perf_counter()
    of = Study(encoder, records, queries, truth)
    plain = "" if truth is None else f" plain accuracy {100 * (of.queries.answers.argmax(1) == truth).mean():.2f} %;"
    command = " ".join(["python benchmarks/memo_keys.py", name, *(Path(p).name for p in (model, *files))])
    for _ in study(of):
        minutes = (time.perf_counter() - start) / 60
        about = f"`{command}`; {len(records)} records, {len(queries)} queries;{plain} {minutes:.0f} minutes."
        document = {"command": command, "results": [asdict(r) for r in of.results]}
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (RESULTS / f"{name}.md").write_text(markdown(of.results, about), encoding="utf-8")


if __name__ == "__main__":
    main()
