"""zentorch, AMD's backend of torch.compile; variants as in ``peers.torch``."""

from __future__ import annotations

from functools import partial

import torch
import zentorch  # type: ignore[import-not-found]

from .protocol import serve
from .torch import load

if __name__ == "__main__":
    serve(partial(load, backend="zentorch"), zentorch.__version__, forget=torch._dynamo.reset)
