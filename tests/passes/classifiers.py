"""A small classifier that requests can leave early and that can use records: compiled once for all tests."""

from __future__ import annotations

import functools

import numpy as np
from execute import Program, program
from graphs import build, requests
from tvm import relax

from whet.caching.cache import Cache
from whet.caching.learn import perceptron
from whet.passes import dialect
from whet.passes.lower import Lowered
from whet.passes.pipeline import Options, run_pipeline
from whet.passes.quantise import QuantisationConfig
from whet.progress import Silent
from whet.schedules.isa import isa

CHANNELS, LABELS, LAYERS, HEADS = 32, 5, 3, 2
ISA = isa("avx2")
BATCH = requests(20, 3, 16, 1, 33, 5, 16, 16, 7, 50, 2, 12, 40, 9, 4, 18, 6, 31, 8)
PLACES = ((0, 0.25), (2, 0.65))
"""Layers and thresholds where some leave and some do not."""


def classifier(b):
    h = b.embed(CHANNELS)
    norm = [relax.const(np.ones(CHANNELS, np.float32)), relax.const(np.zeros(CHANNELS, np.float32))]
    for i in range(LAYERS):
        qkv = b.dense(h, 3 * CHANNELS, f"qkv{i}")
        context = b.emit(dialect.self_attention(qkv, b.segments, heads=HEADS, scale=0.2), f"context{i}")
        out = b.emit(dialect.dense(context, b.const(CHANNELS, CHANNELS), b.const(CHANNELS), h), f"out{i}")
        h = b.emit(dialect.layer_norm(out, *norm, eps=1e-5), f"norm1.{i}")
        up = b.dense(h, 2 * CHANNELS, f"up{i}", activation="gelu")
        down = b.emit(dialect.dense(up, b.const(CHANNELS, 2 * CHANNELS), b.const(CHANNELS), h), f"down{i}")
        h = b.emit(dialect.layer_norm(down, *norm, eps=1e-5), f"norm2.{i}")
    pooled = b.emit(dialect.pool(h, b.segments, mode="cls"), "pooled")
    return b.dense(b.dense(pooled, CHANNELS, "pooler", activation="tanh"), LABELS, "logits")


def cache(layer: int, threshold: float, channels: int = CHANNELS) -> Cache:
    rng = np.random.default_rng(layer)
    numbers = ((0.3, (8, channels)), (1, 8), (0.5, (LABELS, 8)), (1, LABELS), (1, channels), (0.1, channels))
    first, first_bias, second, second_bias, *standard = (rng.normal(0, r, s).astype("float32") for r, s in numbers)
    arrays = perceptron((first, first_bias), (second, second_bias), *standard)
    return Cache(layer, "perceptron", arrays, threshold)


def lowered(precision: str, *, freeze: bool = False, isas=(ISA,), **options) -> Lowered:
    """``precision``: ``"fp32"``, or the activations of int8. Of several instruction sets, the first."""
    config = None if precision == "fp32" else QuantisationConfig(precision)
    caches = tuple(cache(*place) for place in PLACES) if freeze else ()
    batch = requests(20, 30)
    chosen = Options(tuple(isas), max_length=64, quantisation=config, freeze=caches, **options)
    return run_pipeline(build(classifier), chosen, batch, [b * 0 for b in batch], Silent())[0].lowered


@functools.cache
def compiled(precision: str, **options) -> Program:
    return program(lowered(precision, **options), ISA)


def exits(**thresholds: float) -> np.ndarray:
    """The caches' numbers with these thresholds in place of ``PLACES``."""
    wanted = [thresholds.get(f"after{layer}", threshold) for layer, threshold in PLACES]
    return np.array([[layer for layer, _ in PLACES], wanted], "float32")


def trust(logits: np.ndarray) -> np.ndarray:
    *_, second, largest = np.sort(np.exp(logits - logits.max(1, keepdims=True)), axis=1).T
    return (largest - second) / np.exp(logits - logits.max(1, keepdims=True)).sum(1)


def leavers(told: dict[int, np.ndarray], numbers: np.ndarray) -> np.ndarray:
    """After how many layers each request leaves, by what every cache says of it, ``(requests, LABELS)``."""
    left = np.full(len(told[LAYERS]), LAYERS)
    for layer, threshold in numbers.T[::-1]:
        left[trust(told[int(layer)]) >= threshold] = layer
    return left


def halving(told: dict[int, np.ndarray]) -> np.ndarray:
    """Exits at which some leave, and of those that stay half leave later."""
    late = np.sort(trust(told[2])[trust(told[0]) < PLACES[0][1]])
    return exits(after2=late[len(late) // 2 - 1 :][:2].mean())
