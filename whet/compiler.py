"""``whet.compile``: from a model to one ``.so``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import tvm
from tokenizers import Tokenizer

from whet.codegen import generate_code
from whet.explain import describe_layer
from whet.frontend.model import Model, Task
from whet.host import host_isa
from whet.link import Blob, find_compiler, write_module
from whet.passes.assemble import assemble
from whet.passes.choose_kernels import TYPICAL_TOKENS, Choice
from whet.passes.dialect import Pooling, shape_of
from whet.passes.graph import digest_of
from whet.passes.pipeline import Compiled, Options, run_pipeline
from whet.passes.quantise import QuantisationConfig
from whet.passes.round_to_bf16 import SPARSE, share_of_zeros
from whet.progress import Progress, Silent
from whet.runtime.metadata import Metadata, Output, Records, Weight
from whet.schedules.isa import BF16_ISAS, ISAS, Isa
from whet.schedules.nearest_record import key, nearest
from whet.tune.records import TunedKnobs

if TYPE_CHECKING:
    from whet.caching.file import Freeze

Precision: TypeAlias = Literal["int8", "bf16", "fp32"]
Text: TypeAlias = "str | tuple[str, str]"
Requests: TypeAlias = list[np.ndarray[Any, Any]]

MAX_TOKENS = 1024
"""Tokens a call takes at once; larger batches are cut. Activations of so many tokens still fit the caches."""

_WITH_MEMO = "Attention of earlier requests can be used, from a file of whet memo build."

CALIBRATION_TOKENS = 128
"""Calibration texts are cut here: longer ones cost time and show nothing new."""


@dataclass(frozen=True)
class Report:
    """What was compiled and how; ``print(report)`` shows it, ``to_json`` gives it to scripts."""

    output: str
    size: int
    """Bytes of the file."""
    name: str
    task: str
    precision: str
    isa: str
    """The fastest instruction set that the file has code for."""
    recognised: bool
    """Whether the model became the encoder dialect; else it runs as plain fp32 ops."""
    layers: tuple[Choice, ...]
    notes: tuple[str, ...]
    seconds: dict[str, float]
    others: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)
    """The further instruction sets that the file has code for, with their layers, the fastest first."""

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        isas = ", ".join([self.isa, *self.others])
        lines = [f"{self.output}: {self.name}, {self.task}, {self.precision} for {isas}, {self.size / 1e6:.1f} MB"]
        lines += [describe_layer(asdict(layer)) for layer in self.layers]
        for isa, layers in self.others.items():
            lines += [f"for {isa}:", *(describe_layer(asdict(layer)) for layer in layers)]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def compile(
    source: str | PathLike[str] | object,
    output: str | PathLike[str],
    precision: Precision = "int8",
    *,
    calibration: Sequence[Text] | None = None,
    quantisation: QuantisationConfig | None = None,
    isa: str | Sequence[str] = "host",
    task: Task | None = None,
    pooling: Pooling | None = None,
    tokenizer: Any = None,
    sparsity: float = 0.0,
    block_rows: int = 4,
    tokens: int = TYPICAL_TOKENS,
    max_length: int | None = None,
    dump_ir: str | PathLike[str] | None = None,
    records: str | PathLike[str] | None = None,
    freeze: str | PathLike[str] | None = None,
    memo: bool = False,
    probe: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compile a transformer encoder to one loadable ``.so``.

    Args:
        source: a Hugging Face folder (config.json, safetensors), an ONNX file, or an in-memory transformers model.
        output: the file to write; it appears only when it is complete.
        precision: ``"int8"``; ``"bf16"``, which is as accurate as float32 and faster, on CPUs that have it; or
            ``"fp32"`` as the reference.
        calibration: texts, or pairs of texts, like the ones the model will see; default: texts that ship with Whet.
        quantisation: how activations become integers (int8 only).
        isa: ``"host"``, a name in ``whet.schedules.isa.ISAS`` (``BF16_ISAS`` for bf16), several of them, or
            ``"all"``. Of several the file holds code for each, and loading takes the fastest that the CPU runs.
        task: what an ONNX file is for, where its outputs do not say.
        pooling: makes an embedding model of a source that has no head.
        tokenizer: for an in-memory model its tokenizer, for an ONNX file the folder with ``tokenizer.json``.
        sparsity: share of blocks to prune by magnitude before quantisation, for experiments with speed.
        block_rows: height R of the R × 4 blocks of ``sparsity``.
        tokens: of a typical call, all its requests together. On AMX it depends on them which kernels use zeros best.
        max_length: shorter limit for a request than the model's, in tokens.
        dump_ir: folder for the module after each pass.
        records: folder that ``whet tune`` wrote, or one file of it, which is for one type of CPU: kernels take the
            settings that it found best. Those that it does not know take settings that ship with Whet for this CPU.
        freeze: file that ``whet freeze fit`` wrote for this model: requests that its caches recognise leave early.
        memo: let the module use the attention of earlier requests, a database of ``whet memo build`` (int8 only).
        probe: let the module return what its layers know of each request instead, which caches are fitted to.
        progress: told of every phase.

    Returns:
        What was decided per layer, notes, size and times.

    Raises:
        ValueError: an argument or the source can't be compiled; the message names the value and what was expected.
        FileNotFoundError: no such source, output folder or folder of records, or no C compiler.

    """
    _check_options(precision, quantisation, sparsity, tokens, memo)
    targets = _isas(isa, precision)
    output = Path(output)
    if not output.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent} does not exist; create it, or name another output")
    find_compiler()
    tuned = TunedKnobs(records, targets)
    clock = _Clock(progress or Silent())

    with clock.phase("import"):
        model = import_model(source, task=task, pooling=pooling, tokenizer=tokenizer)
        limit = length_limit(model, max_length)
    notes = model.notes + (_WITH_MEMO,) * (memo and model.dialect)
    if model.dialect and precision == "bf16" and (zeros := max(sparsity, share_of_zeros(model.module))) > SPARSE:
        notes += (f"{zeros:.0%} of the weights are 0, which bf16 multiplies too: precision 'int8' makes use of them.",)
    if not model.dialect:
        notes += _without_effect(memo, precision, calibration, quantisation, sparsity, dump_ir, records)
        precision = "fp32"
        if len(targets) > 1:
            targets = [ISAS["avx2"]]
            notes += ("Several instruction sets need a recognised encoder: this is for avx2, which all of them have.",)
    frozen = None if freeze is None else _frozen(model, freeze, precision, sparsity)
    if frozen:
        places = ", ".join(str(cache.layer) for cache in frozen.caches)
        notes += (f"Requests may leave early, after layer {places} of {frozen.layers}.",)
    weights = Blob()
    describe = partial(_metadata, model, notes, precision, limit, frozen)
    if model.dialect:
        requests, token_types = _requests(model, calibration, limit) if precision == "int8" else ([], [])
        options = Options(
            isas=tuple(targets),
            max_length=limit,
            quantisation=(quantisation or QuantisationConfig()) if precision == "int8" else None,
            bf16=precision == "bf16",
            sparsity=sparsity,
            block_rows=block_rows,
            tokens=tokens,
            dump_ir=Path(dump_ir) if dump_ir is not None else None,
            tuned=tuned,
            freeze=frozen.caches if frozen else (),
            memo=memo,
            probe=probe,
        )
        compiled = run_pipeline(model.module, options, requests, token_types, clock)
        layers = [tuple(variant.choices) for variant in compiled]
        notes += tuned.notes() + compiled[0].raised
        describe = partial(_metadata, model, notes, precision, limit, frozen)
        with clock.phase("6 assemble"):
            entries = [f"main_{target.name}" for target in targets] if len(targets) > 1 else ["main"]
            built = [_assemble(*each, weights, describe) for each in zip(compiled, targets, entries, strict=True)]
    else:
        from whet.passes.lift_constants import lift_constants  # noqa: PLC0415 - only plain graphs need it

        with clock.phase("lift constants"):
            module, constants = lift_constants(model.module)
            table = [weights.add(*constant) for constant in constants]
            built, layers = [(module, describe(module, targets[0], table, convention="padded"))], [()]

    with clock.phase("7 generate code"):
        executables = [generate_code(module, target) for (module, _), target in zip(built, targets, strict=True)]
    with clock.phase("8 link"):
        variants = [(executable, metadata) for executable, (_, metadata) in zip(executables, built, strict=True)]
        write_module(variants, weights, model.tokenizer_json, output)
    return Report(
        output=fspath(output),
        size=output.stat().st_size,
        name=model.name,
        task=model.task,
        precision=precision,
        isa=targets[0].name,
        recognised=model.dialect,
        layers=layers[0],
        notes=notes,
        seconds=clock.seconds,
        others={target.name: chosen for target, chosen in zip(targets[1:], layers[1:], strict=True)},
    )


def _check_options(
    precision: Precision, quantisation: QuantisationConfig | None, sparsity: float, tokens: int, memo: bool
) -> None:
    """Refuse what needs no look at the model to be wrong."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(get_args(Precision))}")
    if precision != "int8" and quantisation is not None:
        raise ValueError(f"quantisation is given, but precision is {precision!r}; leave one of them out")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity is {sparsity}; expected a share of at least 0 and below 1")
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; expected those of a typical call, at least 1")
    if memo and precision != "int8":
        raise ValueError(f"memo is for precision 'int8'; precision is {precision!r}: leave one of them out")


def import_model(
    source: str | PathLike[str] | object,
    *,
    task: Task | None = None,
    pooling: Pooling | None = None,
    tokenizer: Any = None,
) -> Model:
    """Import ``source`` with the frontend that knows its kind; an option that it has no use for is an error."""
    if not isinstance(source, str | PathLike):
        from whet.frontend.huggingface import from_transformers  # noqa: PLC0415 - one frontend is needed, not all

        _refuse("an in-memory model", task=task)
        return from_transformers(source, tokenizer, pooling=pooling)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face folder or an ONNX file")
    if path.is_dir():
        from whet.frontend.huggingface import from_folder  # noqa: PLC0415

        _refuse("a Hugging Face folder", task=task, tokenizer=tokenizer)
        return from_folder(path, pooling=pooling)
    if path.suffix == ".onnx":
        from whet.frontend.onnx import from_onnx  # noqa: PLC0415

        return from_onnx(path, tokenizer=tokenizer, task=task, pooling=pooling)
    raise ValueError(f"{path} is neither a folder nor an .onnx file; expected a Hugging Face folder or an ONNX file")


def _refuse(kind: str, **options: object) -> None:
    """Options that ``kind`` answers itself."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} is {value!r}, but {kind} brings its own; leave it out")


def default_calibration() -> list[str]:
    """The texts that ship with Whet: plain English sentences of many kinds and lengths."""
    return (files("whet") / "calibration.txt").read_text(encoding="utf-8").splitlines()


def _isas(names: str | Sequence[str], precision: Precision) -> list[Isa]:
    """The instruction sets of these names, the fastest first."""
    names = [names] if isinstance(names, str) else list(names)
    known = BF16_ISAS if precision == "bf16" else ISAS
    hint = "; CPUs without it take precision 'int8', or 'fp32'" if precision == "bf16" else ""
    wrong = [name for name in names if name not in ("host", "all", *known)]
    if wrong or not names:
        raise ValueError(
            f"isa is {wrong[0] if wrong else names!r}; expected 'host', 'all', or some of {', '.join(known)} for "
            f"precision {precision!r}{hint}"
        )
    try:
        wanted = {host_isa(known).name if name == "host" else name for name in names}
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    return [isa for isa in known.values() if not wanted.isdisjoint((isa.name, "all"))]


def _without_effect(
    memo: bool,
    precision: Precision,
    calibration: object,
    quantisation: object,
    sparsity: float,
    dump_ir: object,
    records: object,
) -> tuple[str, ...]:
    """A note on what was asked for and is not done, for a model that was not recognised."""
    given = {
        f"precision={precision!r}": precision != "fp32",
        "calibration": calibration is not None,
        "quantisation": quantisation is not None,
        f"sparsity={sparsity}": sparsity > 0,
        "dump_ir": dump_ir is not None,
        "records": records is not None,
        "memo": memo,
    }
    names = [name for name, is_given in given.items() if is_given]
    return (f"Without effect, because the model runs as plain fp32 operators: {', '.join(names)}.",) if names else ()


def length_limit(model: Model, max_length: int | None) -> int:
    """Most tokens of a request: the model's limit or a shorter one; ValueError if that is out of range."""
    if max_length is None:
        return model.max_length
    if not 2 <= max_length <= model.max_length:
        raise ValueError(f"max_length is {max_length}; expected 2 to {model.max_length}, the limit of {model.name}")
    return max_length


def _frozen(model: Model, freeze: str | PathLike[str], precision: Precision, sparsity: float) -> Freeze | None:
    """The contents of a freeze file, once it is sure that they are for this model; None if no cache pays there."""
    if sparsity:
        raise ValueError(
            f"sparsity is {sparsity}, but {fspath(freeze)} is for the weights as they are; leave one of them out, or "
            "prune with whet compress first"
        )
    from whet.caching import file  # noqa: PLC0415 - few modules have caches

    frozen = file.load(freeze)
    check_can_freeze(model)
    frozen.check(freeze, digest_of(model.module), precision)
    return frozen if frozen.caches else None


def check_can_freeze(model: Model) -> None:
    """Raise ValueError unless requests of the model can leave early."""
    if not model.dialect:
        raise ValueError(f"freezing needs a recognised encoder; {model.name} runs as plain operators")
    outputs = shape_of(model.module["main"].body)[1]
    if model.task != "sequence_classification" or model.multi_label or outputs < 2:
        kind = f"multi-label {model.task}" if model.multi_label else model.task
        raise ValueError(
            f"freezing is for sequence classification, so far, with classes of which one is right; {model.name} is "
            f"{kind} with {outputs} outputs per text or token"
        )


def _requests(model: Model, texts: Sequence[Text] | None, limit: int) -> tuple[Requests, Requests]:
    """Token ids and token types of the calibration texts; random ids where the model has no tokenizer."""
    if model.tokenizer_json is None:
        if texts is not None:
            raise ValueError(
                "calibration texts were given, but the model has no tokenizer to read them with; pass tokenizer="
            )
        random = np.random.default_rng(0)
        ids = [random.integers(0, model.vocab_size, n) for n in random.integers(4, min(limit, 64) + 1, 64)]
        return ids, [np.zeros_like(i) for i in ids]
    if texts is not None and not len(texts):
        raise ValueError("calibration is empty; give at least one text, or leave it out")
    tokenizer = Tokenizer.from_str(model.tokenizer_json)
    tokenizer.enable_truncation(min(limit, CALIBRATION_TOKENS))
    encoded = tokenizer.encode_batch(list(texts) if texts is not None else default_calibration())
    types = [np.asarray(e.type_ids) if model.type_vocab_size > 1 else np.zeros(len(e.ids), int) for e in encoded]
    return [np.asarray(e.ids) for e in encoded], types


def _assemble(
    compiled: Compiled, target: Isa, entry: str, weights: Blob, describe: Callable[..., Metadata]
) -> tuple[tvm.IRModule, Metadata]:
    """One variant: its code as the function ``entry``, with its weights added to those of the others.

    With records, two more functions find them.
    """
    table = [weights.add(*named) for named in compiled.lowered.weights]
    assembled = assemble(compiled.lowered.module, [weight.offset for weight in table], entry)
    if compiled.records:
        for function in (key(target), nearest(target)):
            name = f"{entry}_{function.attrs['global_symbol']}"
            assembled.module[name] = function.with_attr("global_symbol", name)
    report = tuple(asdict(choice) for choice in compiled.choices)
    metadata = describe(
        compiled.lowered.module,
        target,
        table,
        entry=entry,
        workspace_per_tile=assembled.workspace.per_tile,
        workspace_per_group=assembled.workspace.per_group,
        report=report,
        convention="recorded" if compiled.records else "packed",
        records=Records(**asdict(compiled.records)) if compiled.records else None,
    )
    return assembled.module, metadata


def _metadata(
    model: Model,
    notes: tuple[str, ...],
    precision: Precision,
    limit: int,
    frozen: Freeze | None,
    module: tvm.IRModule,
    target: Isa,
    weights: Sequence[Weight],
    **more: Any,
) -> Metadata:
    """What a variant says of itself; ``module`` is the lowered graph, ``more`` what only encoders have to say."""
    function = module["main"]
    first, channels = shape_of(function.body)[0], 1
    if model.dialect:
        channels = int(shape_of(function.body)[1]) - 2 * bool(frozen)
    per = "token" if first.same_as(function.params[0].ty.shape[0]) else "request"
    return Metadata(
        whet=version("whet"),
        tvm_ffi=version("apache-tvm-ffi"),
        name=model.name,
        task=model.task,
        inputs=model.inputs,
        vocab_size=model.vocab_size,
        max_length=limit,
        type_vocab_size=max(1, model.type_vocab_size),
        pad_token_id=model.pad_token_id,
        labels=model.labels,
        multi_label=model.multi_label,
        output=Output(per, channels),
        precision=precision,
        isa=target.name,
        cpu_flags=target.cpu_flags,
        max_tokens=max(MAX_TOKENS, limit),
        exits=(*(cache.layer for cache in frozen.caches), frozen.layers) if frozen else (),
        allowed_loss=frozen.allowed_loss if frozen else 0.0,
        budget=frozen.budget if frozen else 0.0,
        leave=frozen.leave if frozen else (),
        weights=tuple(weights),
        notes=notes,
        **more,
    )


class _Clock:
    """Passes phases on and notes how long each took."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        start = time.perf_counter()
        inner: AbstractContextManager[Callable[[int], None]] = self.progress.phase(name, total)
        with inner as advance:
            yield advance
        self.seconds[name] = time.perf_counter() - start
