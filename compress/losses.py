"""What training minimises: the task's own loss, and the distances of a student from its teacher.

Hidden states as in DistilBERT and TinyBERT (Sanh et al. 2019, Jiao et al. 2020), relations as in MiniLMv2 (Wang et al.
2021), logits as by Hinton et al. 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .features import IGNORED, Batch
from .models import Encoder, record
from .post_training import inputs_of
from .recipe import Distillation

SIMILARITY_TEMPERATURE = 0.05
"""Of the softmax over the texts of a batch, the usual one of contrastive learning."""


@dataclass(frozen=True)
class Outputs:
    """What an encoder computed for a batch."""

    output: Tensor
    """Float32: logits ``(batch, …, classes)``, of answers ``(batch, tokens, 2)``, embeddings ``(batch, channels)``."""
    states: Sequence[Tensor]
    """Each layer's output ``(batch, tokens, channels)``."""
    relations: Sequence[Tensor]
    """Queries, keys and values of the last layer, if asked for."""


def run(encoder: Encoder, batch: Batch, relations: bool = False) -> Outputs:
    """Run an encoder with its head."""
    with record(encoder, relations) as recorder:
        result = encoder.model(**inputs_of(batch))
    if encoder.task == "embedding":
        output = encoder.pool(result.last_hidden_state, batch["attention_mask"])
    elif encoder.task == "question_answering":
        output = torch.stack([result.start_logits, result.end_logits], dim=-1).float()
    else:
        output = result.logits.float()
    return Outputs(output, recorder.states, recorder.relations)


def distance(
    student: Outputs, teacher: Outputs | None, batch: Batch, encoder: Encoder, weights: Distillation
) -> dict[str, Tensor]:
    """The weighted parts of the loss, by name; their sum is minimised."""
    mask = batch["attention_mask"].bool()
    parts = {}
    if weights.labels:
        parts["labels"] = weights.labels * label_loss(student.output, batch, encoder.task)
    if teacher is not None and weights.outputs:
        parts["outputs"] = weights.outputs * (
            embedding_loss(student.output, teacher.output)
            if encoder.task == "embedding"
            else logits_loss(student.output, teacher.output, mask, encoder.task, weights.temperature)
        )
    if teacher is not None and weights.states:
        parts["states"] = weights.states * states_loss(student.states, teacher.states, mask)
    if teacher is not None and weights.relations:
        parts["relations"] = weights.relations * relations_loss(
            student.relations, teacher.relations, mask, encoder.heads
        )
    return parts


def label_loss(output: Tensor, batch: Batch, task: str) -> Tensor:
    """Cross entropy with the targets: of a class, of a class per token, or of an answer's first and last token.

    It is the mean of the targets there are, times the share of the requests that have any.
    """
    target = batch["target"]
    known = target.reshape(len(target), -1) != IGNORED
    if task == "question_answering":
        output = output.masked_fill(~batch["attention_mask"].bool()[..., None], -1e4).transpose(1, 2)
    if task != "sequence_classification":
        output, target = output.flatten(0, 1), target.flatten()
    total = F.cross_entropy(output, target, ignore_index=IGNORED, reduction="sum")
    return total / known.sum().clamp(min=1) * known.any(dim=1).float().mean()


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cosine, and the Kullback-Leibler divergence of the similarities among the texts of the batch."""
    cosine = 1 - (student * teacher).sum(-1).mean()
    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)
    ours, theirs = (
        (x @ x.T / SIMILARITY_TEMPERATURE).masked_fill(itself, -1e4).log_softmax(-1) for x in (student, teacher)
    )
    return cosine + F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def logits_loss(student: Tensor, teacher: Tensor, mask: Tensor, task: str, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the classes' (an answer's ends': the tokens') probabilities at ``temperature``."""
    if task == "question_answering":
        student, teacher = (
            x.masked_fill(~mask[..., None], -1e4).transpose(1, 2).flatten(0, 1) for x in (student, teacher)
        )
    elif task == "token_classification":
        student, teacher = student[mask], teacher[mask]
    ours, theirs = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2


def states_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Squared error of each layer's output over its variance, mean of the layers."""
    total = student[0].new_zeros((), dtype=torch.float32)
    for own, other in zip(student, teacher, strict=True):
        ours, theirs = own[mask].float(), other[mask].float()
        variance = (theirs - theirs.mean(0)).square().mean()
        total = total + (ours - theirs).square().mean() / variance
    return total / len(student)


def relations_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, heads: int) -> Tensor:
    """Kullback-Leibler divergence of the tokens' scaled products: the mean of those of queries, keys and values."""
    total = mask.new_zeros((), dtype=torch.float32)
    for own, other in zip(student, teacher, strict=True):
        ours, theirs = (_relations(x, mask, heads) for x in (own, other))
        divergence = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)  # (batch, heads, tokens)
        rows = mask[:, None].expand_as(divergence)
        total = total + divergence[rows].mean()
    return total / len(student)


def _relations(x: Tensor, mask: Tensor, heads: int) -> Tensor:
    batch, tokens, channels = x.shape
    split = x.float().view(batch, tokens, heads, channels // heads).transpose(1, 2)
    products = split @ split.transpose(2, 3) / (channels // heads) ** 0.5
    return products.masked_fill(~mask[:, None, None], -1e4).log_softmax(-1)
