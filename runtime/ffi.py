"""Imports tvm_ffi without torch.

Where torch is installed tvm_ffi imports it, which takes seconds and hundreds of megabytes, only to convert its tensors
faster and to order two DLLs on Windows. A process that runs modules needs neither. A torch that is already imported
stays as it is, and one that is imported later works as usual.
"""

from __future__ import annotations

import sys

if "torch" in sys.modules or "tvm_ffi" in sys.modules:
    import tvm_ffi
else:
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` an ImportError
    try:
        import tvm_ffi
    finally:
        del sys.modules["torch"]

__all__ = ["tvm_ffi"]
