"""Writes requests that resemble one another, as filled-in templates do: paragraphs with some words replaced.

    python benchmarks/templated_texts.py train.raw.gz MODULE.so TOKENS FOLDER    # corpus, held-out and stream .txt

Each template is a paragraph of WikiText-2 (raw, gzip); a request replaces three of its words, at places that belong to
the template, by some of six others, all of them one token: all requests of a template have the same number of tokens.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import whet

TEMPLATES, FIELDS, VALUES = 24, 3, 6
"""Templates, words of one that vary, and what each of them may be."""
REQUESTS = {"corpus": 8, "held-out": 5, "stream": 5}
"""Of each template, by file."""


def main() -> None:
    """Write the files."""
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
            values = random.choice(fillers, (FIELDS, VALUES))
            templates.append((cut, dict(zip(random.choice(places, FIELDS, replace=False), values, strict=True))))
        if len(templates) == TEMPLATES:
            break
    for name, count in REQUESTS.items():
        filled = [_fill(template, fields, random) for template, fields in templates for _ in range(count)]
        lines = [filled[i] for i in random.permutation(len(filled))]
        (Path(folder) / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _length(session: whet.Session, words: list[str]) -> int:
    return int(session.requests([" ".join(words)])[0].shape[1])


def _fill(template: list[str], fields: dict[int, NDArray[np.str_]], random: np.random.Generator) -> str:
    filled = list(template)
    for place, values in fields.items():
        filled[place] = str(random.choice(values))
    return " ".join(filled)


if __name__ == "__main__":
    main()
