"""More to distil a classifier from: texts that it labels itself, after the labelled ones.

    whet compile sst2-dense -o dense.so
    python benchmarks/label_texts.py dense.so train.tsv OUT/texts.txt 40000 more.tsv     # texts of compression_data.py

``train.tsv`` and ``more.tsv`` are as SST-2 is published, a header and then a text and 0 or 1 per line. The texts are
lower-cased, as SST-2 is, have 6 to 40 words, and are drawn by a fixed seed.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import whet

WORDS = (6, 40)


def main() -> None:
    """Draw, label, write."""
    module, train, texts, count, output = sys.argv[1:]
    lines = (line.strip().lower() for line in Path(texts).read_text(encoding="utf-8").splitlines())
    drawn = [text for text in lines if WORDS[0] <= len(text.split()) <= WORDS[1]]
    random.Random(0).shuffle(drawn)
    drawn = drawn[: int(count)]
    classes = whet.load(module).logits(drawn).argmax(axis=1)
    labelled = [f"{' '.join(text.split())}\t{c}" for text, c in zip(drawn, classes, strict=True)]
    known = Path(train).read_text(encoding="utf-8").rstrip("\n")
    Path(output).write_text("\n".join([known, *labelled]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
