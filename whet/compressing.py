"""Compress a model: what ``whet compress`` runs. Prunes and trains by a recipe, then measures what came of it.

>>> from whet.compressing import Recipe, compress
>>> compress(Recipe(model="path/to/model", task="embedding", data=Data(train=("texts.txt",))), "sparse")
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from whet.compress.blocks import Block
from whet.compress.make_recipe import make_recipe
from whet.compress.recipe import Data, Distillation, Pruning, Recipe, Training
from whet.compression_report import CompressionReport, Measured
from whet.host import host_isa
from whet.measure_compressed import measure_folder, rows_to_score
from whet.passes.choose_kernels import TYPICAL_TOKENS
from whet.progress import Progress, Silent
from whet.schedules.cost import estimate_cycles
from whet.schedules.dense_spec import DenseSpec
from whet.schedules.isa import TILE, Isa
from whet.schedules.isa import isa as find_isa

if TYPE_CHECKING:
    from whet.compress.run import Compressed

__all__ = [
    "CompressionReport",
    "Data",
    "Distillation",
    "Measured",
    "Pruning",
    "Recipe",
    "Training",
    "compress",
    "make_recipe",
    "measure_folder",
    "plan",
]


def compress(
    recipe: Recipe,
    output: str | PathLike[str],
    *,
    test: str | PathLike[str] | None = None,
    test_format: str = "",
    measure: bool = True,
    isa: str = "host",
    progress: Progress | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> CompressionReport:
    """Prune and train the model of ``recipe``, and write an ordinary Hugging Face folder.

    The folder holds the weights, configuration and tokenizer, the recipe, the log of the training, and a model card
    with what was measured. It appears when all is done; until then the state is in ``output`` with the ending
    ``.partial``, and the same call continues an interrupted one, to the same weights.

    Args:
        recipe: everything that decides what is made.
        output: the folder to write; it must not exist.
        test: labelled data that neither training nor recipe has seen; default: the development data.
        test_format: of ``test``, by default told by its ending.
        isa: instruction set whose kernels the budget of time counts.
        measure: compile the dense and the sparse model as fp32 and int8, score and time them.
        progress: told of every phase.
        log: gets a line for people at every evaluation.

    Raises:
        ValueError: the recipe or the data can't be used.
        FileExistsError: ``output`` exists, or an unfinished run of another recipe.
        ImportError: torch or transformers is missing.

    """
    try:
        from whet.compress.run import run_recipe  # noqa: PLC0415 -- torch takes seconds
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(
                f"compressing needs {error.name}, which is not installed: "
                "pip install '.[compile,compress]' in a clone of Whet"
            ) from error
        raise
    progress = progress or Silent()
    if recipe.pruning.budget == "latency" and recipe.pruning.sparsity and not recipe.pruning.shares:
        recipe = plan(recipe, isa, progress)
    reports: list[CompressionReport] = []
    if measure and test is not None:
        rows_to_score(recipe, test, test_format)  # what is wrong with them is said before the training

    def finish(folder: Path, made: Compressed) -> None:
        report = CompressionReport(
            output=str(output),
            sparsity=made.sparsity,
            score=made.score,
            score_name=made.score_name,
            before=made.before,
            seconds=made.seconds,
        )
        report.write(folder, recipe)
        if measure:
            report = measure_folder(folder, test=test, test_format=test_format, progress=progress)
        reports.append(report)

    run_recipe(recipe, Path(output), progress, log, finish)
    return reports[0]


def plan(recipe: Recipe, isa: str = "host", progress: Progress | None = None) -> Recipe:
    """Choose a sparsity for every layer: as fast as ``pruning.sparsity`` in all of them, by the compiler's cost model.

    What a layer loses at each sparsity is measured on calibration texts (:mod:`whet.compress.sensitivity`), the cycles
    that its kernel takes are estimated for ``isa``; the sum of the losses is least at that sum of cycles.

    Returns:
        The recipe with ``pruning.shares``, which need no plan again.

    """
    from whet.compress.run import sensitivity_of  # noqa: PLC0415
    from whet.compress.sensitivity import allocate  # noqa: PLC0415

    pruning = recipe.pruning
    grid = sorted({*(round(0.05 * i, 2) for i in range(20)), pruning.sparsity})
    losses, shapes = sensitivity_of(recipe, grid, progress or Silent())
    rows = Block.parse(pruning.block).rows
    target = host_isa() if isa == "host" else find_isa(isa)
    cycles = {name: {s: _cycles(shapes[name], rows, 1 - s, target) for s in grid} for name in losses}
    limit = sum(curve[pruning.sparsity] for curve in cycles.values())
    return replace(recipe, pruning=replace(pruning, shares=allocate(losses, cycles, limit)))


def _cycles(shape: tuple[int, int], block_rows: int, density: float, isa: Isa) -> float:
    """Cycles of a layer, with the faster of the dense kernel and that of the blocks."""
    tiles = math.ceil(TYPICAL_TOKENS / TILE)
    dense = estimate_cycles(DenseSpec(*shape, "i8"), tiles, 1.0, isa)
    sparse = estimate_cycles(DenseSpec(*shape, "i8_sparse", block_rows), tiles, density, isa)
    return min(dense, max(sparse, density * dense))
