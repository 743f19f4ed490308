"""The data of ``compression.py`` and ``memo_size.py``: files made of published data sets.

    python benchmarks/compression_data.py DATA OUT

``DATA`` holds the data sets as published, each in a folder: stsb, wikitext2, qqp, mrpc, clinc150, banking77, sst2,
snips, squad_v2_dev, xquad_en. Nothing that is tested on stands in a training file.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

SEED = 0
WORDS = (5, 40)
"""Sentences of running text are kept if they have so many words."""
QUESTIONS, SENTENCES = 20_000, 12_000
"""Quora's and WikiText-2's share of the texts near STS-B."""
FEW = 1500
"""Requests of CLINC150 in the file with few labels."""
CONTEXT, ASKED = range(60, 161), 4000
"""Words of a paragraph that a question is put to, and how many are."""
HELD_OUT = 5
"""One in so many articles of SQuAD is tested on; one in so many training rows of Banking77 is held out."""


def main() -> None:
    """Write all files below ``OUT``."""
    data, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    embedding_texts(data, out)
    write_texts(out / "questions.txt", set(quora(data / "qqp/pairs.json.tar.gz")) - {""})
    clinc150(data / "clinc150/data_full.json", out)
    banking77(data / "banking77", out)
    snips(data / "snips", out)
    squad(data, out)


def embedding_texts(data: Path, out: Path) -> None:
    """Sentences of WikiText-2, Quora's questions, MRPC and STS-B's training set, without any of STS-B's other sets.

    ``texts.txt`` has all of them; ``near.txt`` fewer of the first two, so that a third are of STS-B's kinds.
    """
    scored = {text for name in ("dev", "test") for text in stsb(data / f"stsb/sts-{name}.csv")}
    near = {*stsb(data / "stsb/sts-train.csv"), *mrpc(data / "mrpc/msr_paraphrase_train.txt")}
    far = set(quora(data / "qqp/pairs.json.tar.gz")), set(wikitext(data / "wikitext2/train.raw.gz"))
    found = {text for texts in (near, *far) for text in texts if text and "\n" not in text} - scored
    shuffled = write_texts(out / "texts.txt", found)
    questions, sentences = (
        [text for text in shuffled if text in texts][:count]
        for texts, count in ((far[0] - near, QUESTIONS), (far[1] - near - far[0], SENTENCES))
    )
    write_texts(out / "near.txt", (near & found).union(questions, sentences))


def write_texts(path: Path, found: set[str]) -> list[str]:
    """A text per line, shuffled; returns them."""
    texts = sorted(found)
    random.Random(SEED).shuffle(texts)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(texts)} texts")
    return texts


def wikitext(path: Path) -> Iterator[str]:
    """Sentences."""
    for paragraph in wikitext_paragraphs(path):
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph):
            if WORDS[0] <= len(sentence.split()) <= WORDS[1] and "<unk>" not in sentence:
                yield sentence


def wikitext_paragraphs(path: Path) -> Iterator[str]:
    """Paragraphs, with the spaces before punctuation taken out."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            text = line.strip()
            if text and not text.startswith("="):
                text = re.sub(r" @([-,.])@ ", r"\1", text)
                yield re.sub(r" ([,.;:!?)'’])", r"\1", text.replace("( ", "("))


def quora(path: Path) -> Iterator[str]:
    """Both questions of every pair."""
    for first, second, _ in quora_pairs(path):
        yield from (first, second)


def quora_pairs(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Two questions, and whether they ask the same."""
    with tarfile.open(path) as archive:
        member = archive.extractfile(archive.getmembers()[0])
        if member is None:
            raise ValueError(f"{path} holds no file")
        for pair in json.load(member):
            first, second = (" ".join(str(pair[name]).split()) for name in ("text_a", "text_b"))
            yield first, second, bool(int(pair["label"]))


def mrpc(path: Path) -> Iterator[str]:
    """Both sentences of every pair."""
    for line in path.read_text(encoding="utf-8-sig").splitlines()[1:]:
        yield from (text.strip() for text in line.split("\t")[3:5])


def stsb(path: Path) -> Iterator[str]:
    """Both sentences of every pair."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield from (text.strip() for text in line.split("\t")[5:7])


def clinc150(path: Path, out: Path) -> None:
    """Requests with an intent, without those out of scope; of the training set also few, and the other texts alone."""
    splits = json.loads(path.read_text(encoding="utf-8"))
    for split, name in (("train", "train"), ("val", "development"), ("test", "test")):
        write_csv(out / f"clinc150-{name}.csv", splits[split])
        print(f"clinc150-{name}.csv: {len(splits[split])} rows")
    shuffled = random.Random(SEED).sample(splits["train"], len(splits["train"]))
    write_csv(out / "clinc150-few.csv", shuffled[:FEW])
    write_texts(out / "clinc150-rest.txt", {text for text, _ in shuffled[FEW:]})


def banking77(folder: Path, out: Path) -> None:
    """One in so many of the training rows, which are sorted by intent, makes a development set."""
    published = {name: read_table(folder / f"{name}.csv", ",") for name in ("train", "test")}
    rows = {name: [(row["text"], row["category"]) for row in table] for name, table in published.items()}
    parts = {
        "train": [row for i, row in enumerate(rows["train"]) if i % HELD_OUT],
        "development": rows["train"][::HELD_OUT],
        "test": rows["test"],
    }
    for name, part in parts.items():
        write_csv(out / f"banking77-{name}.csv", part)
        print(f"banking77-{name}.csv: {len(part)} rows")


def snips(folder: Path, out: Path) -> None:
    """Words of requests with the slots that they fill, as CoNLL has them."""
    for split, name in (("train", "train"), ("valid", "development"), ("test", "test")):
        lines = ((folder / split / f"seq.{side}").read_text(encoding="utf-8").splitlines() for side in ("in", "out"))
        rows = [list(zip(words.split(), tags.split(), strict=True)) for words, tags in zip(*lines, strict=True)]
        text = "\n\n".join("\n".join(f"{word}\t{tag}" for word, tag in row) for row in rows)
        (out / f"snips-{name}.conll").write_text(text + "\n", encoding="utf-8")
        print(f"snips-{name}.conll: {len(rows)} rows")


def squad(data: Path, out: Path) -> None:
    """SQuAD's public development articles, divided; with XQuAD's other articles, from the same set, in the test.

    To distil from without answers: the questions that the training articles do not answer, and paragraphs of
    WikiText-2, each with some question of Quora's.
    """
    articles = json.loads((data / "squad_v2_dev/squad.json").read_text(encoding="utf-8"))["data"]
    known = {article["title"] for article in articles}
    others = json.loads((data / "xquad_en/xquad.en.json").read_text(encoding="utf-8"))["data"]
    test = articles[::HELD_OUT] + [article for article in others if article["title"] not in known]
    train = [article for i, article in enumerate(articles) if i % HELD_OUT]
    for name, part in (("train", train), ("test", test)):
        write_squad(out / f"squad-{name}.json", part, answered=True)
    write_squad(out / "squad-unanswered.json", train, answered=False)
    contexts = [p for p in wikitext_paragraphs(data / "wikitext2/train.raw.gz") if len(p.split()) in CONTEXT]
    questions = sorted({q for q in quora(data / "qqp/pairs.json.tar.gz") if "?" in q})
    draw = random.Random(SEED)
    pairs = zip(draw.sample(questions, ASKED), draw.sample(contexts, ASKED), strict=True)
    write_csv(out / "wikitext-questions.csv", pairs, ("text_a", "text_b"))
    print(f"wikitext-questions.csv: {ASKED} pairs")


def write_squad(path: Path, articles: list[dict[str, Any]], answered: bool) -> None:
    """The articles with those questions alone that they answer, or do not."""
    kept = [with_questions(article, answered) for article in articles]
    path.write_text(json.dumps({"data": kept}), encoding="utf-8")
    count = sum(len(paragraph["qas"]) for article in kept for paragraph in article["paragraphs"])
    print(f"{path.name}: {len(articles)} articles, {count} questions")


def with_questions(article: dict[str, Any], answered: bool) -> dict[str, Any]:
    """The article with one of the two kinds of its questions."""
    paragraphs = [{**p, "qas": [q for q in p["qas"] if bool(q["answers"]) == answered]} for p in article["paragraphs"]]
    return {**article, "paragraphs": [p for p in paragraphs if p["qas"]]}


def read_table(path: Path, delimiter: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV file with a header."""
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, delimiter=delimiter)


def write_csv(path: Path, rows: Iterable[Iterable[str]], header: Sequence[str] = ("text", "label")) -> None:
    """Rows under a header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
