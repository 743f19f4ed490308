r"""Serve embeddings from a compiled module, on a machine without Whet's compiler.

What that machine needs:

    pip install .               # in a clone of Whet; brings numpy, tokenizers and apache-tvm-ffi, a few MB each
    model.so                    # what whet.compile wrote
    libtvm_runtime.so           # 3 MB, beside model.so; on the compiling machine it lies in the folder that
                                # python -c "import tvm; print(tvm.__path__[0] + '/lib')" prints

Use:

    $ printf 'A man plays a guitar.\nSomeone makes music.\n' | python deploy.py model.so
    {"text": "A man plays a guitar.", "embedding": [0.0182, ...]}
    {"text": "Someone makes music.", "embedding": [0.0437, ...]}
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from whet.runtime import load

LINES_AT_ONCE = 64


def main() -> int:
    """Embed the lines of standard input, one JSON object per line."""
    parser = argparse.ArgumentParser(description="Embed the lines of standard input with a compiled module.")
    parser.add_argument(
        "module", type=Path, help="the .so that whet.compile wrote; native code: only load what you trust"
    )
    parser.add_argument("--threads", type=int, help="threads per call (default: every CPU this process may use)")
    arguments = parser.parse_args()
    try:
        session = load(arguments.module, threads=arguments.threads)
        lines = (line.rstrip("\n") for line in sys.stdin)
        while batch := list(itertools.islice(lines, LINES_AT_ONCE)):
            for text, embedding in zip(batch, session.encode(batch), strict=True):
                print(json.dumps({"text": text, "embedding": [round(float(x), 6) for x in embedding]}))
    except (OSError, ValueError) as error:
        print(f"deploy.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
