"""The command line: parses, calls the public functions, prints. Results go to standard output, all else to error.

Exit codes: 0 done, 1 what was asked can't be done (one line says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from whet.datasets import FORMATS, Text, read_dataset, read_texts, split_pair
from whet.peers import PEERS
from whet.progress import TerminalProgress

if TYPE_CHECKING:
    import numpy as np

_COMPILER_PACKAGES = ("tvm", "onnx", "safetensors")
_TUNING_PACKAGES = ("xgboost", "psutil", "cloudpickle")
_TRAINING_PACKAGES = ("torch", "transformers", "tomli")
_SOURCE = ("task", "pooling", "tokenizer", "sparsity", "block_rows", "tokens")
"""Options that say what the model is and what is made of it."""
_RECIPE = (
    "model",
    "task",
    "teacher",
    "data",
    "unlabelled",
    "development",
    "format",
    "sparsity",
    "block",
    "method",
    "budget",
    "steps",
    "seed",
)
"""Options that are fields of a recipe."""
_FOR_ENCODERS = (
    "precision",
    "calibration",
    "calibration_method",
    "activations",
    "max_error",
    "sparsity",
    "block_rows",
    "tokens",
    "dump_ir",
)
"""Options that do nothing for a model that is not recognised as an encoder."""
_TWO_WORDS = (
    "tune report",
    "tune merge",
    "tune worker",
    "freeze fit",
    "freeze inspect",
    "memo build",
    "memo inspect",
)
_MATRIX = 10
"""Texts whose similarities fit a terminal."""


class _Names:
    """Names from a registry of the compiler, read when they are needed: a machine may have no compiler."""

    def __init__(self, module: str, attribute: str, *more: str) -> None:
        self.module, self.attribute, self.more = module, attribute, more

    def _names(self) -> list[str]:
        value = getattr(import_module(self.module), self.attribute)
        return [*self.more, *(get_args(value) or value)]

    def __contains__(self, given: object) -> bool:
        """Whether a name, or every one of a list of names, is one of these."""
        return all(name in self._names() for name in (given if isinstance(given, list) else [given]))

    def __iter__(self) -> Iterator[str]:
        try:
            return iter(self._names())
        except ModuleNotFoundError:
            return iter(["names that the compiler knows"])


class _Parser(argparse.ArgumentParser):
    """Knows commands of two words; a model of such a name is ./report."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        if " ".join(args[:2]) in _TWO_WORDS:
            args[:2] = [" ".join(args[:2])]
        return super().parse_known_args(args, namespace)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments or os.environ.get("WHET_DEBUG", "") not in ("", "0")
    try:
        args = _parser().parse_args(arguments)
        args.command(args)
        sys.stdout.flush()
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print("whet: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `whet run … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"whet: error: {_message(error)}", file=sys.stderr)
        return 1
    return 0


def _message(error: Exception) -> str:
    """One line for people."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _COMPILER_PACKAGES:
        return f"this needs the compiler ({error.name} is not installed): pip install '.[compile]' in a clone of Whet"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _TUNING_PACKAGES:
        return f"tuning needs {error.name}, which is not installed: pip install '.[tune]' in a clone of Whet"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _TRAINING_PACKAGES:
        needed = f"compressing needs {error.name}, which is not installed"
        return f"{needed}: pip install '.[compile,compress]' in a clone of Whet"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, ValueError | OSError | ImportError):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _compile(args: argparse.Namespace) -> None:
    import whet  # noqa: PLC0415 -- here and below: a command imports what it needs

    options = _given(args, *_SOURCE, "precision", "isa", "max_length", "dump_ir", "records", "freeze", "memo")
    if settings := _given(args, "calibration_method", "activations", "max_error"):
        given = {name.removeprefix("calibration_"): value for name, value in settings.items()}
        options["quantisation"] = whet.QuantisationConfig(**given)
    if args.calibration is not None:
        options["calibration"] = read_texts(args.calibration, pairs=True)
    report = whet.compile(args.model, args.output, progress=TerminalProgress(), **options)
    ignored = [name for name, value in _given(args, *_FOR_ENCODERS).items() if value != "fp32"]
    if ignored and not report.recognised:
        flags = ", ".join("--" + name.replace("_", "-") for name in ignored)
        print(f"whet: warning: no encoder was recognised in {args.model}; without effect: {flags}", file=sys.stderr)
    if args.json:
        print(report.to_json())
    elif args.explain:
        print(report)
    else:
        print(str(report).partition("\n")[0])
        for note in report.notes:
            print(f"note: {note}")


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of these options that stand on the command line."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _run(args: argparse.Namespace) -> None:
    from whet.answers import answer_question, answer_texts  # noqa: PLC0415
    from whet.runtime import load  # noqa: PLC0415

    session = load(args.module, args.threads, **_given(args, "memo", "memo_level"))
    if args.question is not None:
        records = answer_question(session, args.question, _context(args), args.top_k)
    else:
        if args.context is not None:
            raise ValueError("--context is given without a --question")
        records = answer_texts(session, _texts(args), args.top_k)
    if args.json:
        for record in records:
            print(json.dumps(record, ensure_ascii=False), flush=True)
    else:
        _print_answers(list(records))


def _texts(args: argparse.Namespace) -> Iterable[Text]:
    """Texts of the arguments, else of the file, else of standard input."""
    given: list[Text] = [*args.text, *(tuple(pair) for pair in args.pair)]
    if given and args.file:
        raise ValueError("texts are given both as arguments and by --file; leave one of them out")
    if given:
        return given
    if args.file:
        return read_texts(args.file, pairs=args.tab_pairs)
    lines = (line.rstrip("\r\n") for line in sys.stdin)
    kept = (line for line in lines if line.strip())
    return (split_pair(line, "standard input") if args.tab_pairs and "\t" in line else line for line in kept)


def _context(args: argparse.Namespace) -> str:
    given = [*args.text, *([args.context] if args.context is not None else [])]
    if len(given) + bool(args.file) > 1:
        raise ValueError("several contexts are given; expected one: --context, --file, or standard input")
    if given:
        return str(given[0])
    return Path(args.file).read_text(encoding="utf-8") if args.file else sys.stdin.read()


def _print_answers(records: list[dict[str, Any]]) -> None:
    from whet.answers import similarities  # noqa: PLC0415

    vectors = [r["vector"] for r in records if "vector" in r]
    for i, record in enumerate(records, 1):
        if "vector" in record:
            start = " ".join(f"{value:+.4f}" for value in record["vector"][:4])
            print(f"{i:3}  [{start} … {len(record['vector'])} values]  {record['text']}")
        elif "similarity" in record:
            print(f"{record['similarity']:7.4f}  {' | '.join(record['text'])}")
        elif "tags" in record:
            print("  ".join(f"{tag['text']}/{tag['label']}" for tag in record["tags"]))
        elif "answer" in record:
            print(f"{record['score']:7.4f}  {record['answer']}  [{record['start']}:{record['end']}]")
        else:
            labels = [f"{label['label']} {label['score']:.4f}" for label in record.get("labels", [record])]
            text = record["text"] if isinstance(record["text"], str) else " | ".join(record["text"])
            print(f"{', '.join(labels)}  {text}")
    if 2 <= len(vectors) <= _MATRIX:
        _print_matrix(similarities(vectors))


def _print_matrix(values: np.ndarray[Any, Any]) -> None:
    print("\ncosine similarity")
    print("     " + " ".join(f"{i:7}" for i in range(1, len(values) + 1)))
    for i, row in enumerate(values, 1):
        print(f"{i:3}  " + " ".join(f"{value:7.4f}" for value in row))


def _inspect(args: argparse.Namespace) -> None:
    from whet.describe import describe  # noqa: PLC0415

    _print(describe(args.module, verify=args.verify), args.json)


def _explain(args: argparse.Namespace) -> None:
    from whet.explain import explain  # noqa: PLC0415

    options = _given(args, "isa", *_SOURCE)
    if options and Path(args.model).suffix == ".so":
        flag = next(iter(options)).replace("_", "-")
        raise ValueError(f"{args.model} is compiled: --{flag} can't change it; leave it out, or name the model")
    if Path(args.model).suffix != ".so":
        options["progress"] = TerminalProgress()
    _print(explain(args.model, **options), args.json)


def _bench(args: argparse.Namespace) -> None:
    if args.plain is None and args.data is not None:
        raise ValueError("--data are the requests for --plain; name the module without caches too, or leave them out")
    if args.memo is not None:
        if args.plain is not None:
            raise ValueError("--memo and --plain are two comparisons; make one at a time")
        _bench_memo(args)
        return
    if args.texts is not None:
        raise ValueError("--texts are the requests for --memo; name a memo file too, or leave them out")
    report: Any
    if args.plain is None:
        from whet.bench import bench  # noqa: PLC0415

        report = bench(
            args.module,
            batches=args.batch,
            sequences=args.seq,
            threads=args.threads,
            min_seconds=args.min_seconds,
            against=args.against,
            source=args.model,
            progress=TerminalProgress(),
        )
    else:
        from whet.bench_exits import bench_exits  # noqa: PLC0415

        if args.data is None:
            raise ValueError("--plain is given, but no requests to compare on; name them with --data")
        report = bench_exits(args.module, args.plain, _requests_of(args.data, args.format), progress=TerminalProgress())
    if args.output:
        Path(args.output).write_text(report.to_json() + "\n", encoding="utf-8")
    _print(report, args.json)


def _bench_memo(args: argparse.Namespace) -> None:
    from whet.memoizing import measure  # noqa: PLC0415

    if args.texts is None:
        raise ValueError("--memo needs requests like those that will come: name them by --texts, one per line")
    texts = list(read_texts(args.texts, pairs=True))
    report = measure(args.module, args.memo, texts, progress=TerminalProgress(), **_level(args))
    if args.output:
        Path(args.output).write_text(report.to_json() + "\n", encoding="utf-8")
    _print(report, args.json)


def _level(args: argparse.Namespace) -> dict[str, Any]:
    return {} if args.memo_level is None else {"level": args.memo_level}


def _eval(args: argparse.Namespace) -> None:
    from whet.evaluate import evaluate  # noqa: PLC0415
    from whet.runtime import load  # noqa: PLC0415

    data = read_dataset(args.data, args.format, args.limit)
    other = None if args.against_fp32 is None else load(args.against_fp32, args.threads)
    session = load(args.module, args.threads, **_given(args, "memo", "memo_level"))
    _print(evaluate(session, data, TerminalProgress(), other), args.json)


def _tune(args: argparse.Namespace) -> None:
    from whet.tuning import tune  # noqa: PLC0415

    options = _given(args, *_SOURCE, "isa", "max_length", "trials", "minutes", "tracker", "key")
    if args.activations is not None:
        from whet import QuantisationConfig  # noqa: PLC0415

        options["quantisation"] = QuantisationConfig(method="minmax", activations=args.activations)
    _print(tune(args.model, args.records, progress=TerminalProgress(), **options), args.json)


def _freeze_fit(args: argparse.Namespace) -> None:
    from whet.freezing import fit  # noqa: PLC0415

    options = _given(args, "kind", "precision", "budget", "served", "tokenizer", "task")
    if args.unlike is not None:
        options["unlike"] = read_texts(args.unlike, pairs=True)
    if args.calibration is not None:
        options["calibration"] = read_texts(args.calibration, pairs=True)
    if args.held_out is not None:
        options["held_out"] = _requests_of(args.held_out, args.format)
    data = _requests_of(args.data, args.format)
    _print(fit(args.model, args.output, data, progress=TerminalProgress(), **options), args.json)


def _requests_of(path: str, format: str | None) -> list[Any]:
    """Rows of labelled data; without a format, texts, one per line."""
    return list(read_dataset(path, format).rows) if format else list(read_texts(path, pairs=True))


def _freeze_inspect(args: argparse.Namespace) -> None:
    from whet.freezing import inspect  # noqa: PLC0415

    _print(inspect(args.file), args.json)


def _memo_build(args: argparse.Namespace) -> None:
    from whet.memoizing import build  # noqa: PLC0415

    options = _given(args, "memory", "max_loss")
    if args.held_out is not None:
        options["held_out"] = list(read_texts(args.held_out, pairs=True))
    corpus = list(read_texts(args.corpus, pairs=True))
    _print(build(args.module, args.output, corpus, progress=TerminalProgress(), **options), args.json)


def _memo_inspect(args: argparse.Namespace) -> None:
    from whet.memoizing import inspect  # noqa: PLC0415

    _print(inspect(args.file, verify=args.verify), args.json)


def _tune_report(args: argparse.Namespace) -> None:
    from whet.tune.report import report  # noqa: PLC0415

    found = report(args.records)
    if args.picture is not None:
        from whet.tune.picture import draw  # noqa: PLC0415

        Path(args.picture).write_text(draw(found), encoding="utf-8")
    _print(found, args.json)


def _tune_worker(args: argparse.Namespace) -> None:
    from whet.tune.worker import address, serve  # noqa: PLC0415

    serve(address(args.tracker), args.key)


def _tune_merge(args: argparse.Namespace) -> None:
    from whet.tune.records import merge  # noqa: PLC0415

    added = merge(args.into, args.sources)
    print(
        json.dumps(added) if args.json else "\n".join(f"{name}: {count} records added" for name, count in added.items())
    )


def _compress(args: argparse.Namespace) -> None:
    from whet.compressing import compress, make_recipe, measure_folder  # noqa: PLC0415

    test: dict[str, Any] = {"test": args.test, "test_format": args.test_format or "", "progress": TerminalProgress()}
    if args.measure_only:
        _print(measure_folder(args.output, **test), args.json)
        return
    recipe = make_recipe(args.recipe, _given(args, *_RECIPE), args.set)
    print(recipe.to_toml(), file=sys.stderr)
    report = compress(
        recipe,
        args.output,
        **test,
        measure=not args.no_measure,
        isa=args.isa or "host",
        log=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
    )
    _print(report, args.json)


def _print(result: Any, as_json: bool) -> None:
    print(result.to_json() if as_json else result)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="whet",
        description="Compiles a transformer encoder into one .so that runs on a CPU as block-sparse int8.",
        epilog="Exit codes: 0 done, 1 it can't be done (one line says why), 2 wrong usage, 130 interrupted. "
        "WHET_DEBUG=1, or --debug, adds the traceback.",
    )
    parser.add_argument("--version", action="version", version=f"whet {version('whet')}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=argparse.ArgumentParser
    )

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(command=run)
        sub.add_argument("--json", action="store_true", help="print JSON, for scripts")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    _add_compile(command("compile", _compile, "compile a model to one .so"))
    _add_run(command("run", _run, "run a compiled module on texts: encode, classify, tag or answer, as its task is"))
    _add_inspect(command("inspect", _inspect, "show what a compiled module is, and whether this CPU can run it"))
    _add_explain(command("explain", _explain, "show which layers run how, and why"))
    _add_bench(command("bench", _bench, "time a compiled module, beside the same model in other engines"))
    _add_eval(command("eval", _eval, "score a compiled module on labelled data"))
    _add_tune(
        command("tune", _tune, "search the best settings of a model's kernels on this CPU, for compile --records")
    )
    _add_compress(command("compress", _compress, "make a block-sparse model of a dense one: prune, distil, measure"))
    _add_freeze_fit(command("freeze fit", _freeze_fit, "fit caches at which a classifier's requests may leave early"))
    sub = command("freeze inspect", _freeze_inspect, "show who leaves where, and how right they are")
    sub.add_argument("file", metavar="FILE.freeze", help="file that whet freeze fit wrote")
    _add_memo_build(command("memo build", _memo_build, "keep the attention of a corpus, for requests that resemble it"))
    sub = command("memo inspect", _memo_inspect, "show what a memo file holds and what it gains")
    sub.add_argument("file", metavar="FILE.memo", help="file that whet memo build wrote")
    sub.add_argument("--verify", action="store_true", help="compare all records with their checksums, too")
    sub = command("tune report", _tune_report, "show what tuning gained, kernel by kernel")
    sub.add_argument("records", metavar="DIR", help="folder that whet tune wrote")
    sub.add_argument("--picture", metavar="FILE.svg", help="draw it as well")
    sub = command("tune merge", _tune_merge, "add records of other folders to one")
    sub.add_argument("into", metavar="DIR", help="the folder that they are added to")
    sub.add_argument("sources", metavar="FROM", nargs="+", help="folders that whet tune wrote")
    sub = command("tune worker", _tune_worker, "time kernels for tuning jobs on other machines, until interrupted")
    sub.add_argument("--tracker", metavar="HOST:PORT", required=True, help="TVM's RPC tracker, which it joins")
    sub.add_argument("--key", metavar="KEY", required=True, help="name of this type of CPU, by which jobs ask for it")
    return parser


def _add_compile(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="Hugging Face folder (config.json, safetensors) or .onnx file")
    sub.add_argument("-o", "--output", metavar="FILE.so", required=True, help="the file to write")
    sub.add_argument(
        "--precision",
        metavar="PRECISION",
        choices=_Names("whet.compiler", "Precision"),
        help="%(choices)s; default int8. bf16 is as accurate as fp32, the reference to compare with, and faster, on "
        "CPUs that have it",
    )
    sub.add_argument(
        "--isa",
        metavar="ISA,…",
        type=lambda text: text.split(","),
        choices=_Names("whet.schedules.isa", "EVERY_ISA", "host", "all"),
        help="instruction sets to compile for, of which loading takes the fastest that the CPU has: %(choices)s; "
        "default host, the best of this machine",
    )
    _add_source(sub)
    sub.add_argument("--max-length", metavar="TOKENS", type=_positive, help="a shorter limit than the model's own")
    sub.add_argument(
        "--records",
        metavar="DIR",
        help="folder that whet tune wrote: use the settings that it found; one file of it: those for that type of CPU",
    )
    sub.add_argument(
        "--freeze",
        metavar="FILE.freeze",
        help="file that whet freeze fit wrote for this model: requests that its caches recognise leave early",
    )
    sub.add_argument(
        "--memo",
        action="store_const",
        const=True,
        help="let the module use attention of earlier requests, from a file of whet memo build (int8 only)",
    )
    quantisation = sub.add_argument_group("int8")
    quantisation.add_argument(
        "--calibration",
        metavar="FILE",
        help="texts like the ones the model will see, one per line, a tab between the texts of a pair; default: "
        "English sentences that ship with Whet",
    )
    quantisation.add_argument(
        "--calibration-method",
        metavar="METHOD",
        choices=_Names("whet.passes.calibrate", "Method"),
        help="how ranges are chosen: %(choices)s; default mse",
    )
    _add_activations(quantisation)
    quantisation.add_argument(
        "--max-error",
        metavar="SHARE",
        type=float,
        help="most squared error of the outputs on the calibration texts, as a share of their variance: layers that "
        "cost most of it get a scale per token, or stay float32; default: no limit",
    )
    sub.add_argument("--explain", action="store_true", help="print the decision for every layer")
    sub.add_argument("--dump-ir", metavar="DIR", help="write the graph after each pass, for people who work on Whet")


def _add_freeze_fit(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="Hugging Face folder or .onnx file of a sequence classifier")
    sub.add_argument("-o", "--output", metavar="FILE.freeze", required=True, help="the file to write")
    sub.add_argument("--data", metavar="FILE", required=True, help="requests to learn from, as --format says")
    sub.add_argument(
        "--held-out", metavar="FILE", help="requests to choose layers and thresholds on; default: a fifth of --data"
    )
    sub.add_argument(
        "--served",
        metavar="FILE.audit",
        help="requests that audits kept: half of them are learned from, half chosen on, in place of --held-out",
    )
    sub.add_argument(
        "--unlike",
        metavar="FILE",
        help="requests that belong to no class, a text per line: caches learn to pass them on",
    )
    sub.add_argument(
        "--format",
        choices=["csv", "sst2"],
        help="CSV with text,label or text_a,text_b,label, or SST-2 as published; default: a text per line, whose right "
        "answer is the model's own",
    )
    sub.add_argument(
        "--kind",
        metavar="KIND",
        choices=_Names("whet.freezing", "Kind"),
        help="of the caches: %(choices)s; small predictors of the answer (default), or the nearest of many earlier "
        "requests",
    )
    sub.add_argument(
        "--budget", metavar="SHARE", type=float, help="most accuracy to lose, of all requests; default 0.005"
    )
    sub.add_argument(
        "--precision",
        metavar="PRECISION",
        choices=_Names("whet.compiler", "Precision"),
        help="that the model will be compiled with: %(choices)s; default int8",
    )
    for name in ("--calibration", "--tokenizer", "--task"):
        sub.add_argument(name, metavar=name[2:].upper(), help="as for compile")


def _add_memo_build(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("module", metavar="FILE.so", help="module of whet compile --memo")
    sub.add_argument("-o", "--output", metavar="FILE.memo", required=True, help="the file to write")
    sub.add_argument("--corpus", metavar="FILE", required=True, help="requests, one per line; a tab makes a pair")
    sub.add_argument("--held-out", metavar="FILE", help="requests to choose distances on; default: a fifth of --corpus")
    sub.add_argument("--memory", metavar="SIZE", type=_size, help="of the file, such as 500MiB or 4GiB; default 1GiB")
    sub.add_argument(
        "--max-loss",
        metavar="POINTS",
        type=float,
        help="what answers may lose on average: of a classifier 100 times the total variation of the probabilities, "
        "100 where the class changes; of embeddings 100 (1 - cosine). Default 0.5. Four times as much at the loose "
        "level; at the strict one a fifth, of the requests that hit alone",
    )


def _add_memo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--memo", metavar="FILE.memo", help="file that whet memo build wrote for this module")
    sub.add_argument(
        "--memo-level",
        metavar="LEVEL",
        choices=_Names("whet.runtime.memo", "LEVELS"),
        help="how near a request must be to use another's attention: %(choices)s; default default",
    )


def _add_tune(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="Hugging Face folder (config.json, safetensors) or .onnx file")
    sub.add_argument("--records", metavar="DIR", required=True, help="folder to keep what is found; it can be shared")
    sub.add_argument(
        "--trials", metavar="N", type=_positive, help="settings to measure over all kernels, with those on record"
    )
    sub.add_argument("--minutes", metavar="M", type=float, help="time to search; --trials, --minutes, or both")
    sub.add_argument(
        "--isa",
        metavar="ISA",
        choices=_Names("whet.schedules.isa", "ISAS", "host"),
        help="instruction set to tune for: %(choices)s; default host, the best of the machine that times kernels",
    )
    sub.add_argument(
        "--tracker", metavar="HOST:PORT", help="time kernels on the workers of TVM's RPC tracker, not on this machine"
    )
    sub.add_argument("--key", metavar="KEY", help="the workers of the tracker that are meant, all of one CPU type")
    _add_source(sub)
    sub.add_argument("--max-length", metavar="TOKENS", type=_positive, help="as for compile")
    _add_activations(sub)


def _add_activations(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--activations",
        choices=["static", "per_token"],
        help="per token: inputs that come from a layer norm have a scale per token (default, closer to fp32); "
        "static: one calibrated scale per layer (about 1 %% faster)",
    )


def _add_source(sub: argparse.ArgumentParser) -> None:
    """Options that say what the model is and what is made of it, for commands that import one."""
    sub.add_argument(
        "--task",
        metavar="TASK",
        choices=_Names("whet.frontend.model", "Task"),
        help="what the model does, where an .onnx file does not say: %(choices)s",
    )
    sub.add_argument(
        "--pooling",
        metavar="POOLING",
        choices=_Names("whet.passes.dialect", "Pooling"),
        help="make an embedding model of an encoder without a head: %(choices)s",
    )
    sub.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer.json, for .onnx files")
    sub.add_argument(
        "--sparsity",
        metavar="SHARE",
        type=float,
        help="prune this share of the weights by magnitude, to try its speed; it costs accuracy",
    )
    sub.add_argument(
        "--block-rows",
        metavar="R",
        type=_positive,
        help="height of the R x 4 blocks that --sparsity prunes; default 4",
    )
    sub.add_argument(
        "--tokens",
        metavar="N",
        type=_positive,
        help="tokens of a typical call, all its requests together, for which kernels are chosen; default 64",
    )


def _add_compress(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", nargs="?", help="Hugging Face folder; with --recipe it may be left out")
    sub.add_argument("-o", "--output", metavar="DIR", required=True, help="the Hugging Face folder to write")
    sub.add_argument("--recipe", metavar="FILE.toml", help="start from this recipe; the options below change it")
    sub.add_argument(
        "--task",
        metavar="TASK",
        choices=_Names("whet.compress.recipe", "Task"),
        help="what the model does: %(choices)s",
    )
    sub.add_argument(
        "--data",
        metavar="FILE",
        action="append",
        help="training data: .txt (a text per line), .csv, .tsv, .jsonl, SQuAD .json, .conll; may be given again",
    )
    sub.add_argument(
        "--unlabelled", metavar="FILE", action="append", help="more to distil from, by the teacher's answers alone"
    )
    sub.add_argument("--format", metavar="FORMAT", help="of --data, where the ending does not tell: also stsb, sst2")
    sub.add_argument("--development", metavar="FILE", action="append", help="scored while training; default: held out")
    sub.add_argument("--block", metavar="RxC", help="1x4, 2x4, 4x4, 8x4 or 16x4; default 4x4")
    sub.add_argument("--sparsity", metavar="SHARE", type=float, help="of the blocks; default 0.8; 0 only trains")
    sub.add_argument(
        "--method",
        metavar="METHOD",
        choices=_Names("whet.compress.recipe", "Method"),
        help="how blocks are chosen: %(choices)s; default reconstruct",
    )
    sub.add_argument(
        "--budget",
        metavar="BUDGET",
        choices=_Names("whet.compress.recipe", "Budget"),
        help="whether each layer loses its share (layer, default), or the least needed does, of all blocks (global) "
        "or of the time that --sparsity in all layers would take (latency)",
    )
    sub.add_argument(
        "--isa",
        metavar="ISA",
        choices=_Names("whet.schedules.isa", "ISAS", "host"),
        help="instruction set whose kernels that time is counted for: %(choices)s; default host",
    )
    sub.add_argument(
        "--teacher",
        metavar="MODEL",
        help="model to distil from; default: MODEL, if it has a head for the task; none: ''",
    )
    sub.add_argument("--steps", metavar="N", type=int, help="training steps; default 0: prune after training only")
    sub.add_argument("--seed", metavar="N", type=int)
    sub.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="any other field of the recipe, such as training.batch=32 or data.columns.label=intent",
    )
    sub.add_argument("--test", metavar="FILE", help="labelled data for the measured table; default: development data")
    sub.add_argument("--test-format", metavar="FORMAT", help="of --test, where the ending does not tell")
    measure = sub.add_mutually_exclusive_group()
    measure.add_argument("--no-measure", action="store_true", help="do not compile, score and time the result")
    measure.add_argument(
        "--measure-only",
        action="store_true",
        help="only that, of what was made into DIR before, for instance on a machine with a GPU",
    )


def _add_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("module", metavar="FILE.so", help="compiled module; it is code: run only files that you trust")
    sub.add_argument("text", metavar="TEXT", nargs="*", help="texts; without any, --file or lines of standard input")
    sub.add_argument("--file", metavar="FILE", help="one text per line; with --question, the context")
    sub.add_argument("--pair", metavar=("A", "B"), nargs=2, action="append", default=[], help="two texts read together")
    sub.add_argument("--tab-pairs", action="store_true", help="lines with a tab are pairs")
    sub.add_argument("--question", metavar="TEXT", help="find its answer in the context")
    sub.add_argument("--context", metavar="TEXT", help="where the answer stands; else --file or standard input")
    sub.add_argument("--top-k", metavar="K", type=_positive, help="so many labels or answers, best first")
    _add_memo(sub)
    _add_threads(sub)


def _add_inspect(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("module", metavar="FILE.so")
    sub.add_argument("--verify", action="store_true", help="compare the weights with their checksum, too")


def _add_explain(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL|FILE.so", help="a model, or a compiled module, which holds its own report")
    sub.add_argument(
        "--isa",
        metavar="ISA",
        choices=_Names("whet.schedules.isa", "ISAS", "host"),
        help="instruction set to decide for: %(choices)s; default host, the best of this machine",
    )
    _add_source(sub)


def _add_bench(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("module", metavar="FILE.so")
    sub.add_argument("--batch", metavar="N,…", type=_numbers, default=[1], help="requests per call; default 1")
    sub.add_argument("--seq", metavar="N,…", type=_numbers, help="tokens per request; default 16,32,128")
    sub.add_argument("--threads", metavar="N,…", type=_numbers, default=[1], help="threads; default 1")
    sub.add_argument(
        "--min-seconds", metavar="S", type=float, default=1.0, help="time of each engine in each case; default 1"
    )
    sub.add_argument(
        "--against",
        metavar="ENGINE,…",
        type=_engines,
        default=[],
        help=f"the same model in {', '.join(PEERS)}, in turns with Whet; needs --model",
    )
    sub.add_argument("--model", metavar="MODEL", help="what the module was compiled from: the peers' weights")
    caches = sub.add_argument_group("modules compiled with --freeze")
    caches.add_argument(
        "--plain",
        metavar="PLAIN.so",
        help="the same model without caches: show where requests leave, times of single ones, and accuracy, of both",
    )
    caches.add_argument("--data", metavar="FILE", help="requests, as --format says")
    caches.add_argument(
        "--format",
        choices=["csv", "sst2"],
        help="CSV with text,label or text_a,text_b,label, or SST-2 as published; default: a text per line",
    )
    _add_memo(sub)
    sub.add_argument("--texts", metavar="FILE", help="with --memo: requests to run one by one, with it and without")
    sub.add_argument("-o", "--output", metavar="FILE", help="write the report as JSON, too")


def _add_eval(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("module", metavar="FILE.so")
    sub.add_argument("--data", metavar="FILE", required=True)
    sub.add_argument(
        "--format",
        choices=list(FORMATS),
        required=True,
        help="STS-B, SST-2, SQuAD or CoNLL as published, or a CSV with text,label or text_a,text_b,label|score",
    )
    sub.add_argument("--limit", metavar="N", type=_positive, help="only the first rows")
    sub.add_argument(
        "--against-fp32", metavar="OTHER.so", help="another build of the model, to show how far the answers agree"
    )
    _add_memo(sub)
    _add_threads(sub)


def _add_threads(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--threads", metavar="N", type=_positive, help="default: every CPU that this process may use")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _size(text: str) -> int:
    """Bytes of 500MiB, 4GiB, or a plain number."""
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
    number, unit = (text[:-3], units[text[-3:]]) if text[-3:] in units else (text, 1)
    try:
        size = int(float(number) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected bytes, or a number with {', '.join(units)}")
    return size


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _engines(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PEERS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
