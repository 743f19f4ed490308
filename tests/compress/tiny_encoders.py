"""Small seeded encoders and data for the tests of compress/, made in the test."""

import json
import random

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from whet.compress.models import load_encoder

TOPICS = {
    "food": ["bread", "cheese", "apple", "soup", "rice", "fish", "salt", "plate", "cook", "taste"],
    "music": ["piano", "song", "drum", "voice", "note", "chord", "band", "dance", "tune", "loud"],
    "sport": ["ball", "goal", "team", "race", "run", "jump", "coach", "score", "field", "win"],
}
GLUE = ["the", "a", "of", "with", "and", "is", "near", "some", "my", "good"]
WORDS = [*GLUE, *(word for words in TOPICS.values() for word in words), *(f"w{i}" for i in range(20))]
SIZES = {"hidden": 32, "layers": 2, "heads": 4, "inner": 64}


def sentences(count, seed=0):
    """(text, topic) pairs that a small model can learn to tell apart."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        topic = rng.choice(list(TOPICS))
        words = [rng.choice(TOPICS[topic] if rng.random() < 0.6 else GLUE) for _ in range(rng.randint(3, 9))]
        rows.append((" ".join(words), topic))
    return rows


def tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def make_model(folder, head="Model", family="bert", labels=()):
    """Write a Hugging Face folder with seeded random weights, large enough that layers differ."""
    torch.manual_seed(3)
    vocabulary = len(WORDS) + 4
    if family == "bert":
        config = transformers.BertConfig(
            vocab_size=vocabulary,
            hidden_size=SIZES["hidden"],
            num_hidden_layers=SIZES["layers"],
            num_attention_heads=SIZES["heads"],
            intermediate_size=SIZES["inner"],
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    else:
        config = transformers.DistilBertConfig(
            vocab_size=vocabulary,
            dim=SIZES["hidden"],
            n_layers=SIZES["layers"],
            n_heads=SIZES["heads"],
            hidden_dim=SIZES["inner"],
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: i for i, name in enumerate(labels)}
    prefix = {"bert": "Bert", "distilbert": "DistilBert"}[family]
    getattr(transformers, prefix + head)(config).eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def make_sentence_encoder(folder):
    """The same as sentence-transformers has it: mean pooling, vectors of length 1."""
    make_model(folder)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": SIZES["hidden"], "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def load(folder, task="embedding", labels=()):
    return load_encoder(folder, task, labels)
