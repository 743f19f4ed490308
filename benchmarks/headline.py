"""The README's table of speed for one machine, from what ``compare.py`` measured there.

python benchmarks/headline.py benchmarks/results/comparison-….json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

from report import Cell, engine, ms, quickest, ratios, table, times

SHAPES = {"distilbert-base": "DistilBERT-base", "minilm-l6": "MiniLM-L6"}
CASES = {"b1-s16": "16", "b1-s32": "32", "b1-s128": "128", "b1-s384": "384", "b8-s128": "8 × 128"}
VARIANTS = {
    "int8, 80% 4x4": "int8, 80 % zeros in 4 × 4",
    "int8, dense": "int8, dense",
    "bf16, dense": "bf16",
    "fp32, dense": "fp32",
}
TITLES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "deepsparse": "DeepSparse",
    "neural_engine": "Neural Engine",
}


def main() -> None:
    """Print the table."""
    document = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    cells = {
        (title, tokens): document["cells"][shape][case]
        for shape, title in SHAPES.items()
        for case, tokens in CASES.items()
    }
    measured = [variant for variant in VARIANTS if all(times(cell, f"whet {variant}") for cell in cells.values())]
    head = ["shape", "tokens"]
    for variant in measured:
        head += [VARIANTS[variant], "fastest other", *(["ONNX Runtime int8"] if variant.startswith("int8") else [])]
    print(table(head, [[*key, *(text for v in measured for text in columns(cell, v))] for key, cell in cells.items()]))


def columns(cell: Cell, variant: str) -> list[str]:
    """Whet's time, the fastest other engine, and of int8 ONNX Runtime: with the same weights, of zeros also without."""
    own = f"whet {variant}"
    precision, weights = variant.split(", ")
    rivals = [
        contestant
        for contestant in cell
        if engine(contestant) != "whet"
        and contestant.split()[1].rstrip(",") == precision
        and contestant.rsplit(", ", 1)[1] in (weights, "dense")
        and times(cell, contestant)
    ]
    first = quickest(cell, rivals)
    texts = [ms(cell, own), f"{TITLES.get(engine(first), engine(first))} ({longer(cell, first, own)})"]
    if precision == "int8":
        texts.append(f"({longer(cell, quickest(cell, [r for r in rivals if engine(r) == 'onnxruntime']), own)})")
    return texts


def longer(cell: Cell, other: str, own: str) -> str:
    """How many times longer it takes."""
    return f"{median(ratios(cell, other, own)):.1f}×"


if __name__ == "__main__":
    main()
