"""Prune a whole encoder without labels or training: layer after layer, each given what the pruned ones before it make.

Every dense layer is reconstructed (:mod:`.reconstruct`) from calibration texts so that its output, with the residual
it is added to, comes close to the dense model's, whatever the pruned layers before it have lost: their errors are
corrected on the way, which SparseGPT's layer-wise targets do not do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block
from .hardware import autocast
from .models import Encoder
from .reconstruct import Moments, reconstruct

Advance = Callable[[int], None]
Batch = Mapping[str, Tensor]


def prune_post_training(
    student: Encoder,
    teacher: Encoder,
    batches: Sequence[Batch],
    block: Block,
    sparsity: Mapping[str, float],
    damping: float,
    advance: Advance = lambda done: None,
) -> dict[str, float]:
    """Prune the student in place to the share of blocks that ``sparsity`` names for each dense layer.

    ``batches`` are calibration texts as the models take them: ``input_ids``, ``attention_mask`` and the like. A layer
    that whole blocks do not cover stays as it is, and so does one that ``sparsity`` leaves out. Returns the relative
    squared error of each pruned layer's output. ``advance`` is told the number of dense layers done.
    """
    with torch.no_grad():
        return _prune(student, teacher, batches, block, sparsity, damping, advance)


def _prune(
    student: Encoder,
    teacher: Encoder,
    batches: Sequence[Batch],
    block: Block,
    sparsity: Mapping[str, float],
    damping: float,
    advance: Advance,
) -> dict[str, float]:
    masks = [batch["attention_mask"].bool() for batch in batches]
    calls = [(first_call(student, batch), first_call(teacher, batch)) for batch in batches]
    errors: dict[str, float] = {}
    done = 0
    for i, (layer, wanted) in enumerate(zip(student.layers, teacher.layers, strict=True)):
        for group in student.family.groups:
            moments = moments_of(layer, wanted, group, student.family.residual, calls, masks)
            for name in group:
                dense = layer.get_submodule(name)
                full = f"{i}.{name}"
                if full in sparsity and block.divides(dense.weight):
                    made = reconstruct(dense.weight, moments[name], block, sparsity[full], damping)
                    dense.weight.copy_(made.weight)
                    dense.bias.copy_(made.bias)
                    errors[full] = made.error
                done += 1
                advance(done)
        with autocast():
            calls = [(next_call(layer, own), next_call(wanted, other)) for own, other in calls]
    return errors


Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Enough(Exception):
    """Ends a run of a layer whose rest nobody needs."""


def first_call(encoder: Encoder, batch: Batch) -> Call:
    """What the first layer is called with."""
    found: list[Call] = []

    def take(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Enough

    handle = encoder.layers[0].register_forward_pre_hook(take, with_kwargs=True)
    try:
        encoder.model.base_model(**inputs_of(batch))
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """The part of a batch that an encoder takes."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


def next_call(layer: nn.Module, call: Call) -> Call:
    """What the next layer is called with."""
    args, kwargs = call
    return (_run(layer, call), *args[1:]), kwargs


def _run(layer: nn.Module, call: Call) -> Tensor:
    output = layer(*call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output


def moments_of(
    layer: nn.Module,
    wanted: nn.Module,
    group: tuple[str, ...],
    residuals: Mapping[str, str | None],
    calls: Sequence[tuple[Call, Call]],
    masks: Sequence[Tensor],
) -> dict[str, Moments]:
    """Of each dense layer of a group: its input in the pruned model, and what it should add to its residual."""
    found: dict[str, Moments] = {}
    sources = {name: residuals.get(name) for name in group}
    streams = {source for source in sources.values() if source}
    for (own, other), mask in zip(calls, masks, strict=True):
        with autocast():
            mine, _ = _watch(layer, own, inputs={*group, *streams}, outputs=set())
            before, theirs = _watch(wanted, other, inputs=streams, outputs=set(group))
        for name in group:
            x, target = mine[name][mask], theirs[name][mask].float()
            if source := sources[name]:
                target = target + before[source][mask].float() - mine[source][mask].float()
            if name not in found:
                found[name] = Moments(x.shape[1], target.shape[1], x.device)
            found[name].add(x, target)
    return found


def _watch(
    layer: nn.Module, call: Call, inputs: set[str], outputs: set[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of these dense layers in a run that ends when all are seen."""
    seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def note(side: int, name: str, value: Tensor) -> None:
        seen[side][name] = value
        if len(seen[0]) == len(inputs) and len(seen[1]) == len(outputs):
            raise _Enough

    def before(name: str) -> Any:
        return lambda _module, args: note(0, name, args[0])

    def after(name: str) -> Any:
        return lambda _module, _args, output: note(1, name, output)

    handles = [layer.get_submodule(name).register_forward_pre_hook(before(name)) for name in inputs]
    handles += [layer.get_submodule(name).register_forward_hook(after(name)) for name in outputs]
    try:
        _run(layer, call)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen
