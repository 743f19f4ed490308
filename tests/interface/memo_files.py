"""Texts for memo files, and files that look up whatever this machine's times were."""

from dataclasses import replace

import numpy as np
from tokenizers import Tokenizer

from whet.runtime.memo import LEVELS
from whet.runtime.memo_file import MemoFile, describe


def make_texts(references):
    """300 different ones, of words that the small models know."""
    vocabulary = Tokenizer.from_file(str(references / "bert-sequence" / "tokenizer.json")).get_vocab()
    words = sorted(w for w in vocabulary if w.isalpha())
    rng = np.random.default_rng(0)
    return list(dict.fromkeys(" ".join(rng.choice(words, n)) for n in rng.integers(2, 20, 400)))[:300]


def look_up_everywhere(path):
    """Look up at all lengths; strict and default find the same only, loose anything."""
    everywhere = {level: [[1, 1000]] for level in LEVELS}
    levels = {"strict": 0.0, "default": 0.0, "loose": 1e9}
    describe(path, replace(MemoFile(path).description, levels=levels, pays=everywhere))
