"""Questions about paragraphs of which other questions have been asked: files for a memo of extractive QA.

    python benchmarks/compression_data.py DATA OUT                               # OUT/squad-test.json
    python benchmarks/memo_questions.py OUT/squad-test.json FOLDER
    whet memo build memo.so --corpus FOLDER/corpus.txt --held-out FOLDER/held-out.txt --memory 4GiB -o m.memo
    python benchmarks/memo_accuracy.py m.memo memo.so FOLDER/test.json squad

Two questions in four become records, one is held out, one is asked.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Deal the questions."""
    articles = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["data"]
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[str]] = {"corpus": [], "held-out": []}
    asked: list[dict[str, Any]] = []
    dealt = 0
    for paragraph in (p for article in articles for p in article["paragraphs"]):
        kept = []
        for question in paragraph["qas"]:
            if dealt % 4 == 3:
                kept.append(question)
            else:
                pair = "\t".join(" ".join(text.split()) for text in (question["question"], paragraph["context"]))
                texts["held-out" if dealt % 4 == 2 else "corpus"].append(pair)
            dealt += 1
        asked.append({**paragraph, "qas": kept})
    for name, lines in texts.items():
        (out / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "test.json").write_text(json.dumps({"data": [{"title": "asked", "paragraphs": asked}]}), encoding="utf-8")


if __name__ == "__main__":
    main()
