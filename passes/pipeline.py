"""The order of the passes: a table of contents of what Whet does to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import IRModule

from whet.progress import Progress
from whet.schedules.isa import Isa

from .choose_kernels import TYPICAL_TOKENS, Choice, choose_kernels
from .correct_biases import correct_biases
from .freeze_layers import freeze_layers
from .fuse_activations import fuse_activations
from .fuse_qkv import fuse_qkv
from .fuse_residuals import fuse_residuals
from .graph import Graph
from .hoist_pooling import hoist_pooling
from .lower import Lowered, Tuned, lower, untuned
from .memoize_attention import Records, memoize_attention, records_of
from .pad_heads import pad_heads
from .probe_layers import probe_layers
from .prune_blocks import prune_blocks
from .quantise import QuantisationConfig, integer_layers, quantise, raised_layers
from .round_to_bf16 import round_to_bf16
from .smooth_outliers import smooth_outliers

if TYPE_CHECKING:
    from whet.caching.cache import Cache


@dataclass(frozen=True)
class Options:
    """What a user decides about the passes."""

    isas: tuple[Isa, ...]
    """The graph is specialised for each of these."""
    max_length: int
    quantisation: QuantisationConfig | None
    """None leaves everything in float32."""
    bf16: bool = False
    """Let dense layers multiply in bfloat16 instead."""
    sparsity: float = 0.0
    """One-shot block pruning before quantisation, for experiments."""
    block_rows: int = 4
    tokens: int = TYPICAL_TOKENS
    """Of a call, for which kernels are chosen."""
    dump_ir: Path | None = None
    freeze: tuple[Cache, ...] = ()
    """Where requests may leave early."""
    memo: bool = False
    """Let attention use records of earlier requests."""
    probe: bool = False
    """Let the module show its hidden states, for caches to be fitted to."""
    tuned: Tuned = untuned
    """Where kernels get their knobs from."""


@dataclass(frozen=True)
class Compiled:
    """The module lowered for one instruction set, and what was decided on the way."""

    lowered: Lowered
    choices: list[Choice]
    raised: tuple[str, ...] = ()
    """Layers that the budget of error gave more precision, and why."""
    records: Records | None = None
    """Of its attention, with ``Options.memo``."""


def run_pipeline(
    module: IRModule,
    options: Options,
    requests: Sequence[np.ndarray[Any, Any]],
    token_types: Sequence[np.ndarray[Any, Any]],
    progress: Progress,
) -> list[Compiled]:
    """From a dialect graph to kernel calls, for each of ``options.isas``.

    Only the last two steps look at the instruction set. ``requests`` (1-D token ids) are what calibration runs.
    """
    dump = _Dump(options.dump_ir)
    dump(module, "imported")

    with progress.phase("1 fuse"):
        for fuse in (fuse_qkv, fuse_activations, fuse_residuals, pad_heads):
            module = fuse(module)
            dump(module, fuse.__name__)

    if options.sparsity:
        with progress.phase(f"2 prune {options.sparsity:.0%} in {options.block_rows} × 4 blocks"):
            module = prune_blocks(module, options.sparsity, options.block_rows)
            dump(module, "prune_blocks")

    if options.quantisation is not None:
        with progress.phase("3 smooth outliers", len(requests)) as advance:
            module = smooth_outliers(module, options.quantisation, requests, token_types, advance)
            dump(module, "smooth_outliers")
        judged = len(integer_layers(Graph(module))) if options.quantisation.max_error is not None else 0
        with progress.phase("3 calibrate and quantise", len(requests) + judged) as advance:
            quantised = quantise(module, options.quantisation, requests, token_types, advance)
            dump(quantised, "quantise")
        with progress.phase("3 correct biases"):
            module = correct_biases(quantised, module, requests, token_types)
            dump(module, "correct_biases")

    if options.bf16:
        with progress.phase("3 round to bfloat16"):
            module = round_to_bf16(module)
            dump(module, "round_to_bf16")

    records = records_of(module) if options.memo else None  # the same with caches and without

    if options.freeze:
        with progress.phase("3 insert caches"):
            module = freeze_layers(module, options.freeze)
            dump(module, "freeze_layers")

    if options.memo:
        with progress.phase("3 memoize attention"):
            module = memoize_attention(module)
            dump(module, "memoize_attention")

    with progress.phase("3 hoist pooling"):
        module = hoist_pooling(module)
        dump(module, "hoist_pooling")

    modules, choices = [module] * len(options.isas), [list[Choice]()] * len(options.isas)
    if options.quantisation is not None:
        with progress.phase("4 choose kernels"):
            for i, isa in enumerate(options.isas):
                modules[i], choices[i] = choose_kernels(module, isa, options.tokens)
                dump(modules[i], f"choose_kernels_{isa.name}")

    if options.probe:
        with progress.phase("5 show hidden states"):
            modules = [probe_layers(module) for module in modules]

    compiled = []
    with progress.phase("5 lower to kernels"):
        for chosen, made, isa in zip(modules, choices, options.isas, strict=True):
            lowered = lower(chosen, isa, options.max_length, options.tuned)
            dump(lowered.module, f"lower_{isa.name}")
            compiled.append(Compiled(lowered, made, raised_layers(module), records))
    return compiled


class _Dump:
    """Writes the module after each step, numbered, if a folder was given."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.count = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, module: IRModule, name: str) -> None:
        if self.folder is not None:
            (self.folder / f"{self.count:02d}_{name}.py").write_text(module.script(show_meta=False))
            self.count += 1
