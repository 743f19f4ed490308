"""Requests that resemble a record and mean something else: how many hit, and what their answers lose.

    python benchmarks/near_duplicates.py pairs.json.tar.gz fp32.so int8.so memo.so     # the last compiled with --memo

``pairs.json.tar.gz`` are Quora's question pairs as published. Of those labelled as different, with as many tokens on
both sides, one question is a record and the other asked; distances are chosen on other questions. Points are 100 · (1 −
cosine). Looks up at all lengths, whether it pays or not. Prints what `build` says of the held-out
questions, and a table.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from compression_data import quora_pairs
from numpy.typing import NDArray
from report import table

import whet
from whet.memoizing import build
from whet.metrics import cosines
from whet.runtime.memo import LEVELS
from whet.runtime.memo_file import MemoFile, describe

PAIRS, HELD_OUT = 2000, 2000
"""At most, of those drawn, and of other questions."""
MUCH = 5
"""Points."""


def main() -> None:
    """Build a memo of one side, ask the other at each level."""
    archive, fp32, int8, module = sys.argv[1:]
    session = whet.load(module, threads=1)
    records, asked, others = questions(archive, session)
    plain = session.encode(asked)
    rows = [["int8 against fp32", "–", "–", *lost(whet.load(fp32).encode(asked), whet.load(int8).encode(asked))]]
    with TemporaryDirectory(prefix="whet-near-duplicates-") as folder:
        path = Path(folder) / "a.memo"
        report = build(module, path, records, others, memory=2 << 30)
        look_up_everywhere(path)
        for level in LEVELS:
            with_memo = whet.load(module, threads=1, memo=path, memo_level=level)
            assert with_memo.memo is not None
            answers = with_memo.encode(asked)
            hits = with_memo.memo.hits / len(asked)
            rows.append([level, report.keys_of[level], f"{hits:.1%}", *lost(plain, answers)])
    print(f"{len(asked)} pairs\n\n{report}\n")
    print(table(["", "key", "hit", "points lost, mean", f"requests that lose more than {MUCH} points"], rows))


def look_up_everywhere(memo: Path) -> None:
    """Have a file used at all lengths, whether it pays on this machine or not."""
    describe(memo, replace(MemoFile(memo).description, pays={level: [[1, 1 << 15]] for level in LEVELS}))


def questions(archive: str, session: whet.Session) -> tuple[list[str], list[str], list[str]]:
    """Records and what is asked, in pairs, and other questions."""
    pairs = [(first, second) for first, second, same in quora_pairs(Path(archive)) if not same]
    random.Random(0).shuffle(pairs)
    lengths = [[tokens.shape[1] for tokens in session.requests([p[i] for p in pairs])] for i in (0, 1)]
    alike = [pair for pair, a, b in zip(pairs, *lengths, strict=True) if a == b][:PAIRS]
    used = {text for pair in alike for text in pair}
    others = sorted({text for pair in pairs for text in pair} - used)
    return [a for a, _ in alike], [b for _, b in alike], random.Random(0).sample(others, HELD_OUT)


def lost(wanted: NDArray[np.float32], got: NDArray[np.float32]) -> list[str]:
    """Mean points, and the share of the requests that lose many."""
    points = 100 * (1 - cosines(wanted, got))
    return [f"{points.mean():.2f}", f"{(points > MUCH).mean():.1%}"]


if __name__ == "__main__":
    main()
