"""Writes requests that resemble one another, as filled-in templates do: paragraphs with some words replaced.

    python benchmarks/templated_texts.py wiki.train.tokens.gz MODULE.so TOKENS FOLDER    # corpus.txt and stream.txt

Each template is a paragraph of WikiText-2 (raw, gzip); a request replaces a few of its words by others that are one token
as well, at places that belong to the template, so that all requests of a template have the same number of tokens.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np

import whet

TEMPLATES, OF_CORPUS, OF_STREAM, FIELDS = 24, 8, 4, 6


def main() -> None:
    """Write both files."""
    source, module, tokens, folder = sys.argv[1:]
    session = whet.load(module, threads=1)
    random = np.random.default_rng(0)
    with gzip.open(source, "rt", encoding="utf-8") as file:
        paragraphs = [line.split() for line in file if len(line.split()) >= int(tokens)]
    words = sorted({w for p in paragraphs[:400] for w in p if w.isalpha() and w.islower() and len(w) > 3})
    fillers = [w for w, r in zip(words, session.requests(words), strict=True) if r.shape[1] == 3]
    single = set(fillers)
    templates = []
    for paragraph in paragraphs:
        cut = next(
            (p for n in range(int(tokens) // 2, len(paragraph)) if _length(session, p := paragraph[:n]) >= int(tokens)),
            None,
        )
        places = [i for i, w in enumerate(cut or []) if w in single]
        if cut is not None and _length(session, cut) == int(tokens) and len(places) >= FIELDS:
            templates.append((cut, random.choice(places, FIELDS, replace=False)))
        if len(templates) == TEMPLATES:
            break
    for name, count in (("corpus", OF_CORPUS), ("stream", OF_STREAM)):
        filled = [_fill(template, places, fillers, random) for template, places in templates for _ in range(count)]
        lines = [filled[i] for i in random.permutation(len(filled))]
        (Path(folder) / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _length(session: whet.Session, words: list[str]) -> int:
    return int(session.requests([" ".join(words)])[0].shape[1])


def _fill(
    template: list[str], places: np.ndarray[tuple[int], np.dtype[np.int64]], fillers: list[str], random: np.random.Generator
) -> str:
    filled = list(template)
    for place in places:
        filled[place] = str(random.choice(fillers))
    return " ".join(filled)


if __name__ == "__main__":
    main()
