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
from .models import Encoder, Family
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
    own, others = ([first_call(encoder, batch) for batch in batches] for encoder in (student, teacher))
    errors: dict[str, float] = {}
    done = 0
    for i, (layer, wanted) in enumerate(zip(student.layers, teacher.layers, strict=True)):
        targets, others = targets_of(wanted, student.family, others, masks)
        for group in student.family.groups:
            moments = moments_of(layer, group, student.family, own, targets, masks)
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
        own = [next_call(layer, call) for call in own]
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
    with autocast():
        return (_run(layer, call), *call[0][1:]), call[1]


def _run(layer: nn.Module, call: Call) -> Tensor:
    output = layer(*call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output


Targets = Mapping[str, Tensor]
"""By dense layer, float ``(tokens, N)``: its output, with the residual that this is added to."""


def targets_of(
    layer: nn.Module, family: Family, calls: Sequence[Call], masks: Sequence[Tensor]
) -> tuple[list[Targets], list[Call]]:
    """What every dense layer of a transformer layer should give, for each call, and the calls of the next layer."""
    names = {name for group in family.groups for name in group}
    streams = {source for source in family.residual.values() if source}
    targets: list[Targets] = []
    following: list[Call] = []
    for (args, kwargs), mask in zip(calls, masks, strict=True):
        inputs, outputs, result = _watch(layer, (args, kwargs), streams, names)
        found = {name: outputs[name][mask].float() for name in names}
        for name, source in family.residual.items():
            if source:
                found[name] += inputs[source][mask].float()
        targets.append(found)
        following.append(((result, *args[1:]), kwargs))
    return targets, following


def moments_of(
    layer: nn.Module,
    group: tuple[str, ...],
    family: Family,
    calls: Sequence[Call],
    targets: Sequence[Targets],
    masks: Sequence[Tensor],
) -> dict[str, Moments]:
    """Of the dense layers of a group: the input that they share, and what each should add to its residual."""
    sources = {name: source for name in group if (source := family.residual.get(name))}
    sizes = [targets[0][name].shape[1] for name in group]
    found: Moments | None = None
    for call, wanted, mask in zip(calls, targets, masks, strict=True):
        mine, _, _ = _watch(layer, call, {group[0], *sources.values()}, set())
        x = mine[group[0]][mask]
        parts = [wanted[n] - mine[sources[n]][mask].float() if n in sources else wanted[n] for n in group]
        found = found or Moments(x.shape[1], sum(sizes), x.device)
        found.add(x, torch.cat(parts, 1))
    if found is None:
        raise ValueError("there are no calibration texts; give at least one")
    return dict(zip(group, found.split(sizes), strict=True))


def _watch(
    layer: nn.Module, call: Call, inputs: set[str], outputs: set[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """Inputs and outputs of these dense layers, and the layer's output; for inputs alone a run ends with the last."""
    seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def before(name: str) -> Any:
        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[0][name] = args[0]
            if not outputs and len(seen[0]) == len(inputs):
                raise _Enough

        return note

    def after(name: str) -> Any:
        return lambda _module, _args, output: seen[1].update({name: output})

    handles = [layer.get_submodule(name).register_forward_pre_hook(before(name)) for name in inputs]
    handles += [layer.get_submodule(name).register_forward_hook(after(name)) for name in outputs]
    result = None
    try:
        with autocast():
            result = _run(layer, call)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return *seen, result
