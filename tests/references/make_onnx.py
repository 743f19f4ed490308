"""Makes the ONNX files in onnx/; run by hand, needs onnxruntime, onnxscript and what make_references.py needs.

Seeded tiny models as different exporters and quantisers write them: torch's TorchScript exporter (``ts`` and the
opset), its newer one (``dynamo``), ONNX Runtime's transformer optimiser, its dynamic and static quantisation, and what
an ONNX Runtime session saves after its own optimisations. Expected outputs are ONNX Runtime's, computed in the tests.

    python tests/references/make_onnx.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from make_references import BERT, DISTILBERT, POSITIONS, VOCAB, randomize
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions

HERE = Path(__file__).parent / "onnx"
NAMES = ("input_ids", "attention_mask", "token_type_ids")


class Outputs(torch.nn.Module):
    """A transformers model that takes its inputs in order and returns what ``get`` makes of its output and the mask."""

    def __init__(self, model: torch.nn.Module, get: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.model = model
        self.get = get

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.get(self.model(**dict(zip(NAMES, inputs, strict=False))), inputs[1])


def mean_normalized(output: Any, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooling as sentence-transformers writes it."""
    hidden = output[0]
    weights = mask.unsqueeze(-1).expand(hidden.size()).float()
    pooled = (hidden * weights).sum(1) / torch.clamp(weights.sum(1), min=1e-9)
    return hidden, torch.nn.functional.normalize(pooled, p=2, dim=1)


def export(name: str, architecture: str, config: dict[str, Any], get: Any, outputs: list[str], **options: Any) -> Path:
    torch.manual_seed(len(name))
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**config))
    randomize(model)
    inputs = NAMES[: 3 if config.get("type_vocab_size", 0) > 1 else 2]
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    arrays = (torch.randint(5, VOCAB, (2, 9)), mask, torch.zeros_like(mask))[: len(inputs)]
    path = HERE / f"{name}.onnx"
    if options.pop("static", False):
        extra: dict[str, Any] = {"dynamo": False}
    elif options.get("dynamo", False):
        batch, sequence = (
            torch.export.Dim("batch", min=1, max=64),
            torch.export.Dim("sequence", min=2, max=POSITIONS - 4),
        )
        extra = {"dynamic_shapes": (tuple({0: batch, 1: sequence} for _ in inputs),), "external_data": False}
    else:
        extra = {"dynamo": False, "dynamic_axes": {n: {0: "batch", 1: "sequence"} for n in inputs}}
    wrapped = Outputs(model.eval(), get)
    torch.onnx.export(wrapped, arrays, path, input_names=list(inputs), output_names=outputs, **options, **extra)
    return strip(path)


def strip(path: Path) -> Path:
    """Drop what only describes: it is half of a tiny file."""
    model = onnx.load(path)
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for part in (*model.graph.value_info, *model.graph.initializer, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    model.graph.ClearField("metadata_props")
    onnx.save(model, path)
    return path


class Batches(CalibrationDataReader):
    """A few random batches."""

    def __init__(self, path: Path) -> None:
        rng = np.random.default_rng(9)
        inputs = {value.name for value in onnx.load(path).graph.input}
        arrays = {"input_ids": (5, VOCAB), "attention_mask": (1, 2), "token_type_ids": (0, 2)}
        batches = [{n: rng.integers(*arrays[n], (2, 12)) for n in inputs} for _ in range(4)]
        self.batches: Iterator[dict[str, np.ndarray]] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def fuse(path: Path, name: str, **options: bool) -> Path:
    choices = FusionOptions("bert")
    for option, value in options.items():
        setattr(choices, option, value)
    fused = optimizer.optimize_model(
        str(path), model_type="bert", num_heads=4, hidden_size=32, opt_level=0, optimization_options=choices
    )
    fused.save_model_to_file(str(HERE / f"{name}.onnx"))
    return HERE / f"{name}.onnx"


def session(path: Path, name: str) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(HERE / f"{name}.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def quantise_statically(path: Path, name: str, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "model.onnx"
        onnx.save(SymbolicShapeInference.infer_shapes(onnx.load(path), auto_merge=True), prepared)
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(str(prepared), str(HERE / f"{name}.onnx"), Batches(path), **types, **options)


def main() -> None:
    HERE.mkdir(exist_ok=True)
    pooled = ["token_embeddings", "sentence_embedding"]
    eager, sdpa = {"attn_implementation": "eager"}, {"attn_implementation": "sdpa"}
    embedding = export("embedding-ts17", "BertModel", BERT | sdpa, mean_normalized, pooled, opset_version=17)
    logits = (lambda output, mask: output.logits), ["logits"]
    sequence = {"num_labels": 3, "hidden_act": "gelu_new"}
    export("sequence-ts11", "BertForSequenceClassification", BERT | eager | sequence, *logits, opset_version=11)
    token = DISTILBERT | sdpa | {"num_labels": 4}
    token_path = export("token-ts14", "DistilBertForTokenClassification", token, *logits, opset_version=14)
    ends = (lambda output, mask: (output.start_logits, output.end_logits)), ["start_logits", "end_logits"]
    export("question-dynamo18", "DistilBertForQuestionAnswering", DISTILBERT, *ends, opset_version=18, dynamo=True)
    hidden = (lambda output, mask: (output[0], output[1])), ["last_hidden_state", "pooler_output"]
    export("hidden-dynamo20", "BertModel", BERT | sdpa, *hidden, opset_version=20, dynamo=True)
    last = (lambda output, mask: output[0]), ["last_hidden_state"]
    export("hidden-static17", "BertModel", BERT, *last, opset_version=17, static=True)
    roberta = BERT | {"type_vocab_size": 1}
    export("roberta-ts17", "RobertaModel", roberta, *last, opset_version=17)
    mpnet = {key: value for key, value in BERT.items() if key != "type_vocab_size"}
    export("mpnet-ts17", "MPNetModel", mpnet, *last, opset_version=17)

    eager_path = export("embedding-eager-ts17", "BertModel", BERT | eager, mean_normalized, pooled, opset_version=17)
    fuse(eager_path, "embedding-attention")
    fuse(eager_path, "embedding-multi-head", use_multi_head_attention=True, enable_gelu_approximation=True)
    eager_path.unlink()

    quantize_dynamic(str(token_path), str(HERE / "token-dynamic-u8.onnx"), weight_type=QuantType.QUInt8)
    quantize_dynamic(str(embedding), str(HERE / "dynamic.onnx"), weight_type=QuantType.QInt8, per_channel=True)
    session(HERE / "dynamic.onnx", "embedding-session-dynamic-channel")
    (HERE / "dynamic.onnx").unlink()
    matrices = {"op_types_to_quantize": ["MatMul", "Gemm"]}
    quantise_statically(embedding, "embedding-qdq-channel", quant_format=QuantFormat.QDQ, per_channel=True, **matrices)
    quantise_statically(token_path, "token-qdq-tensor", quant_format=QuantFormat.QDQ, **matrices)
    quantise_statically(embedding, "embedding-qlinear", quant_format=QuantFormat.QOperator)


if __name__ == "__main__":
    main()
