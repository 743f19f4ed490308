"""The tokenizer of a Hugging Face folder as the text of a ``tokenizer.json``, without padding and truncation.

Models are trained (``whet.compress``) and compiled (``whet.frontend``) with this one: both see the same tokens.

The runtime pads nothing (requests are packed) and truncates to the model's ``max_length``, so both settings go.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from whet.files import read_json, read_text

_NORMALIZER_FIELDS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""Fields of tokenizer_config.json and what a BertNormalizer calls them."""


def read_tokenizer(folder: Path, *, lowercase: bool = False) -> str | None:
    """Read the folder's tokenizer; None where it has neither ``tokenizer.json`` nor ``vocab.txt``.

    ``tokenizer_config.json`` overrides what ``tokenizer.json`` says of case and accents, as transformers does.
    ``lowercase`` lowers all text first (the ``do_lower_case`` of sentence-transformers).
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}; expected an object")
    if (folder / "tokenizer.json").is_file():
        text = read_text(folder / "tokenizer.json")
        content = json.loads(clean_tokenizer(text, str(folder / "tokenizer.json")))
        _override_normalizer(content.get("normalizer"), settings)
        tokenizer = Tokenizer.from_str(json.dumps(content))
    elif (folder / "vocab.txt").is_file():
        tokenizer = _word_piece(folder / "vocab.txt", settings)
    else:
        return None
    if lowercase:
        first = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *first])
    return str(tokenizer.to_str())


def clean_tokenizer(text: str, source: str) -> str:
    """Return ``text`` without padding and truncation; ValueError naming ``source`` if it is no tokenizer."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the bindings raise plain Exception
        raise ValueError(f"{source} is not a tokenizer that the tokenizers library reads: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return str(tokenizer.to_str())


def _override_normalizer(normalizer: Any, settings: Mapping[str, Any]) -> None:
    if not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
        return
    for field, name in _NORMALIZER_FIELDS.items():
        if field in settings:
            normalizer[name] = settings[field]


def _word_piece(path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """BERT's WordPiece tokenizer from a vocabulary of one token per line."""
    tokens = [line.rstrip("\r") for line in read_text(path).removesuffix("\n").split("\n")]
    vocab = {token: i for i, token in enumerate(tokens)}
    told = {name: value for name, value in settings.items() if value is not None}
    special = {
        role: str(told.get(f"{role}_token", default))
        for role, default in (
            ("unk", "[UNK]"),
            ("cls", "[CLS]"),
            ("sep", "[SEP]"),
            ("pad", "[PAD]"),
            ("mask", "[MASK]"),
        )
    }
    for role in ("unk", "cls", "sep"):
        if special[role] not in vocab:
            raise ValueError(f"{path} has no {special[role]} token; it is not the vocabulary of a BERT tokenizer")
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=special["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=told.get("tokenize_chinese_chars", True),
        strip_accents=told.get("strip_accents"),
        lowercase=told.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls, sep = special["cls"], special["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in special.values() if token in vocab])
    return tokenizer
