"""Modules that several tests load, each compiled once."""

import pytest
import tiny_module


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    tokenizer = tiny_module.tokenizer_json()
    return {
        "token": tiny_module.write(folder / "token.so"),
        "request": tiny_module.write(folder / "request.so", "request"),
        "variants": tiny_module.write_variants(
            folder / "variants.so",
            [
                {"isa": "future", "cpu_flags": ("sve9",), "entry": "main_future"},
                {"isa": "second", "entry": "main_second"},
                {"isa": "third", "entry": "main_third"},
            ],
        ),
        "padded": tiny_module.write(
            folder / "padded.so", convention="padded", inputs=("input_ids", "attention_mask")
        ),
        "embedding": tiny_module.write(folder / "embedding.so", "request", tokenizer, task="embedding"),
        "classifier": tiny_module.write(
            folder / "classifier.so", "request", tokenizer, 3, task="sequence_classification", labels=("x", "y", "z")
        ),
        "reranker": tiny_module.write(
            folder / "reranker.so", "request", tokenizer, 1, task="sequence_classification", labels=("relevant",),
            multi_label=True,
        ),
        "tagger": tiny_module.write(
            folder / "tagger.so", "token", tokenizer, 4, task="token_classification", labels=("O", "B", "I", "E"),
            max_length=16,
        ),
        "answerer": tiny_module.write(
            folder / "answerer.so", "token", tokenizer, 2, task="question_answering", max_length=16
        ),
    }  # fmt: skip
