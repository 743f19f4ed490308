"""What MetaSchedule's workers do: build a few variants of a kernel into one module, and time them in turns.

A module says itself what it holds, so that whoever loads it, here or on another machine, can make the arguments. All
functions of this file run in worker processes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from whet.runtime.cpu import request_amx
from whet.schedules.gemm import parameter
from whet.tune.arguments import make_arguments
from whet.tune.instance import Instance, Knobs, generate
from whet.tune.version import kernel_version

OTHER_GENERATORS = "the kernel generators of a worker are not those of the job: is its Whet another, or edited?"
LABEL_BYTES = 8192
FAR_BYTES = 4 << 20
"""Weights of a model lie in the last-level cache, not nearer: so many bytes of copies are used in turn."""
MOST_COPIES = 32
SAMPLE_SECONDS = 1e-3
"""A sample is as many calls as take this long, of the calling thread: a share of the core that others take is no part
of it."""


@dataclass(frozen=True)
class Experiment:
    """Variants of one kernel, the first the default, to be timed ``rounds`` times each, in turns."""

    instance: Instance
    variants: tuple[Knobs, ...]
    rounds: int

    def to_json(self) -> str:
        """One line of JSON from which ``from_json`` makes an equal experiment."""
        value = {
            "version": kernel_version(self.instance),
            "kernel": self.instance.to_json(),
            "variants": [asdict(knobs) for knobs in self.variants],
            "rounds": self.rounds,
        }
        return json.dumps(value)

    @staticmethod
    def from_json(text: str) -> Experiment:
        """Read what ``to_json`` wrote. ValueError if that was a process with other kernel generators."""
        value = json.loads(text)
        instance = Instance.from_json(value["kernel"])
        if value["version"] != kernel_version(instance):
            raise ValueError(OTHER_GENERATORS)
        return Experiment(instance, tuple(instance.knobs(v) for v in value["variants"]), value["rounds"])


def start_worker() -> None:
    """Prepare a process: one thread, and the tile registers of AMX, which must be asked for before threads start."""
    os.environ["TVM_NUM_THREADS"] = "1"
    request_amx()


def build(module: tvm.IRModule, target: tvm.target.Target, _params: Any = None) -> Any:
    """Build the module of the experiment that stands in an attribute of ``module``'s function, as LocalBuilder asks."""
    text = str(module["main"].attrs["whet.experiment"])
    experiment = Experiment.from_json(text)
    functions = {"label": _label(text)}
    for i, knobs in enumerate(experiment.variants):
        functions[f"variant{i}"] = generate(experiment.instance, knobs)
    named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    return tvm.compile(tvm.IRModule(named), target=target).mod


def _label(text: str) -> Any:
    """Generate a function that writes ``text`` to its argument, uint8 (LABEL_BYTES,)."""
    data = text.encode()
    if len(data) > LABEL_BYTES:
        raise ValueError(f"an experiment of {len(data)} bytes; expected at most {LABEL_BYTES}: name fewer variants")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("label")
        out = parameter("out", (LABEL_BYTES,), "uint8")
        for i, byte in enumerate(data):
            T.buffer_store(out, tvm.tirx.const(byte, "uint8"), [i])
    return builder.get()


def read_label(module: Any) -> Experiment:
    """Ask a built module what it holds."""
    text = tvm.runtime.empty((LABEL_BYTES,), "uint8")
    text.copyfrom(np.zeros(LABEL_BYTES, np.uint8))
    module["label"](text)
    return Experiment.from_json(bytes(text.numpy()).rstrip(b"\0").decode())


def allocate_nothing(_device: Any, _infos: Any, _repeats: int) -> list[list[Any]]:
    """Stand in for LocalRunner's allocation: only ``evaluate`` knows what the variants take."""
    return [[]]


def evaluate(module: Any, _device: Any, _config: Any, _arguments: Any) -> list[float]:
    """Time a built experiment, as LocalRunner asks; ``unpack`` takes the result apart.

    Returns:
        Seconds of a call, ``(tokens, rounds, variants)`` flattened.

    """
    experiment = read_label(module)
    times = [_in_turns(module, experiment, tokens) for tokens in experiment.instance.tokens]
    return [float(t) for t in np.array(times).reshape(-1)]


def unpack(seconds: list[float], experiment: Experiment) -> np.ndarray[Any, Any]:
    """From the result of ``evaluate`` to ``(tokens, rounds, variants)``."""
    return np.array(seconds).reshape(len(experiment.instance.tokens), experiment.rounds, len(experiment.variants))


def ratios(seconds: np.ndarray[Any, Any]) -> list[tuple[float, ...]]:
    """Times over those of variant 0 of the same round, the median of the rounds: ``[variant][token count]``."""
    relative = np.median(seconds / seconds[:, :, :1], axis=1)
    return [tuple(float(r) for r in column) for column in relative.T]


def default_seconds(seconds: np.ndarray[Any, Any]) -> tuple[float, ...]:
    """Median time of variant 0 for each token count."""
    return tuple(float(s) for s in np.median(seconds[:, :, 0], axis=1))


def _in_turns(module: Any, experiment: Experiment, tokens: int) -> list[list[float]]:
    """Seconds of a call, for each round and variant. The variants start in another order in every round."""
    calls = [
        _calls(module[f"variant{i}"], experiment.instance, knobs, tokens) for i, knobs in enumerate(experiment.variants)
    ]
    for call in calls:
        call(1)
    once = calls[0](4)
    count = max(1, round(SAMPLE_SECONDS / once))
    rounds = []
    for r in range(experiment.rounds):
        times = [0.0] * len(calls)
        for i in range(len(calls)):
            which = (i + r) % len(calls)
            times[which] = calls[which](count)
        rounds.append(times)
    return rounds


def _calls(function: Any, instance: Instance, knobs: Knobs, tokens: int) -> Callable[[int], float]:
    """Return what calls a kernel so many times, on copies of its weights in turn; it gives the seconds of a call."""
    arguments = make_arguments(instance, knobs, tokens)
    size = sum(a.nbytes for a in arguments.weights)
    copies = min(MOST_COPIES, -(-FAR_BYTES // size)) if size else 1
    before, after = ([tvm.runtime.from_dlpack(a) for a in part] for part in (arguments.before, arguments.after))
    weights = [[_tensor(a) for a in arguments.weights] for _ in range(copies)]
    sets = [(*before, *w, *after) for w in weights]
    at = 0

    def call(count: int) -> float:
        nonlocal at
        start = time.thread_time()
        for _ in range(count):
            function(*sets[at])
            at = (at + 1) % copies
        return (time.thread_time() - start) / count

    return call


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    return tvm.runtime.tensor(array)
