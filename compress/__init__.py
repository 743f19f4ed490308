"""Makes block-sparse checkpoints of dense ones: prune, distil, fine-tune, with torch.

The public entry is :func:`whet.compressing.compress`, which also measures the result. This room needs the extra
``compress`` (torch, transformers) and knows nothing of the compiler.
"""
