"""Checkpoints of a training: one safetensors file, replaced in one step: a kill leaves the old or the new one."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .pruner import Pruner


def save_checkpoint(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
    """Write everything that the steps from ``step`` on depend on."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name.endswith(".bias"):
            tensors[f"model.{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    tensors |= {f"pruner.{name}": value for name, value in pruner.state().items()}
    part = path.with_suffix(".part")
    save_file({n: t.detach().contiguous() for n, t in tensors.items()}, part, metadata={"step": str(step)})
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> int:
    """Restore what :func:`save_checkpoint` wrote; returns the step to continue with."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is no mapping
        step = int(file.metadata()["step"])
    for name, parameter in model.named_parameters():
        if f"model.{name}" in tensors:
            parameter.data.copy_(tensors[f"model.{name}"])
        state = {
            key: tensors[f"optimizer.{key}.{name}"].to(parameter.device if key != "step" else "cpu")
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"optimizer.{key}.{name}" in tensors
        }
        if state:
            optimizer.state[parameter] = state
    prefix = "pruner."
    device = next(model.parameters()).device
    pruner.load({n.removeprefix(prefix): t.to(device) for n, t in tensors.items() if n.startswith(prefix)})
    return step
