"""A stream of requests with repeats: classes by Zipf's law, and of each any of its texts; CSV to standard output.

python benchmarks/zipf.py test.csv > stream.csv      # text,label
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict

import numpy as np

from whet.datasets import LabelledText, read_dataset

REQUESTS, EXPONENT = 3000, 1.0


def main() -> None:
    """Draw the stream."""
    texts = defaultdict(list)
    for row in read_dataset(sys.argv[1], "csv").rows:
        if isinstance(row, LabelledText):
            texts[row.label].append(row.text)
    rng = np.random.default_rng(0)
    labels = rng.permutation(sorted(texts)).tolist()
    weights = 1 / np.arange(1, len(labels) + 1) ** EXPONENT
    out = csv.writer(sys.stdout)
    out.writerow(["text", "label"])
    for label in rng.choice(labels, size=REQUESTS, p=weights / weights.sum()).tolist():
        out.writerow([texts[label][rng.integers(len(texts[label]))], label])


if __name__ == "__main__":
    main()
