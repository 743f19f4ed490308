"""Where and in which precision models run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from whet.runtime.cpu import cpu_flags


def device() -> torch.device:
    """The GPU if torch sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> AbstractContextManager[Any]:
    """Multiply in bfloat16 where the machine does that fast."""
    kind = device().type
    fast = torch.cuda.is_bf16_supported() if kind == "cuda" else bool({"amx_bf16", "avx512_bf16"} & cpu_flags())
    context: AbstractContextManager[Any] = torch.autocast(kind, torch.bfloat16, enabled=fast)
    return context
