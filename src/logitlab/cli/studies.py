"""Commands about studies: ``study list``, ``study show``, ``study run`` and ``study report``."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from logitlab.cli.app import app
from logitlab.cli.options import (
    Device,
    DeviceMap,
    Dtype,
    InterruptedWorkError,
    ModelName,
    Offload,
    Pickle,
    Placed,
    Quantize,
    Remote,
    StackName,
    load,
    status,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from logitlab.models.handle import Model
    from logitlab.studies import Outcome, Progress

studies = typer.Typer(
    name="study",
    help="Run a paper's experiment, and check its claims.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(studies)


class Scale(StrEnum):
    """The names in `logitlab.studies.study.SCALES`."""

    SMOKE = "smoke"
    SMALL = "small"
    FULL = "full"


AsJson = Annotated[bool, typer.Option("--json", help="Print the claims as JSON.")]
StudyName = Annotated[str, typer.Argument(help="Name of the study, see logitlab study list.", show_default=False)]


@studies.command("list")
def list_studies() -> None:
    """Name all studies: those of logitlab, and those of other packages that are installed.

    Example: logitlab study list
    """
    from logitlab.studies.registry import entries
    from logitlab.studies.terminal import listed

    _print(listed(entries()))


@studies.command()
def show(name: StudyName) -> None:
    """Tell what a study does: parameters at each scale, claims and their tests, defects of the source.

    Example: logitlab study show steerable-not-decodable
    """
    from logitlab.studies.registry import find
    from logitlab.studies.terminal import described

    _print(described(find(name)))


@studies.command("run")
def run_one(
    name: StudyName,
    model: ModelName = "default",
    scale: Annotated[
        Scale, typer.Option(help="full has the paper's parameters; smoke takes a minute or two at most.")
    ] = Scale.SMALL,
    seed: Annotated[int, typer.Option(min=0, help="All random numbers derive from it.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the run (studies/NAME-SCALE-seedN).")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a parameter; repeat.")
    ] = None,
    as_json: AsJson = False,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    offload_folder: Offload = None,
    quantize: Quantize = None,
    stack: StackName = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
) -> None:
    """Run a study. Broken off, the same command goes on where it was.

    Example: logitlab study run steerable-not-decodable --scale smoke
    """
    from logitlab.studies import find, run_study
    from logitlab.studies.folder import MANIFEST, place
    from logitlab.studies.parameters import setting_of

    study = find(name)
    changed = dict(setting_of(study, text) for text in settings or ())
    out = place(Path("studies") / f"{study.name}-{scale.value}-seed{seed}" if out is None else out)

    with status("starting") as say:

        def loaded() -> Model:
            say("loading the model")
            placed = Placed(device, device_map, offload_folder, quantize)
            return load(model, dtype, placed, stack, allow_pickle, trust_remote_code, say)

        def progress(p: Progress) -> None:
            if sys.stderr.isatty():
                say(_words(p))
            else:
                print(_words(p), file=sys.stderr, flush=True)

        try:
            result = run_study(
                study, model=loaded, scale=scale.value, seed=seed, out=out, set=changed, progress=progress
            )
        except KeyboardInterrupt:
            if not (out / MANIFEST).is_file():  # it has not begun
                raise
            raise InterruptedWorkError(f"interrupted; the same command goes on from what is in {out}") from None
    _tell(result.outcomes, result.folder, as_json)


@studies.command("report")
def report_one(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Make claims, figures and report.html of a run again, from its tables alone.

    Example: logitlab study report studies/steerable-not-decodable-small-seed0
    """
    from logitlab.studies import report

    result = report(folder)
    _tell(result.outcomes, result.folder, as_json)


def _words(p: Progress) -> str:
    """Progress in one line."""
    inside = f"{p.done:,}" + ("" if p.total is None else f" of {p.total:,}") if p.done or p.total else ""
    more = " ".join(text for text in (p.unit, inside, p.words) if text)
    return f"{p.step}: {p.units_done:,} of {p.units:,} units" + (f", {more}" if more else "")


def _tell(outcomes: tuple[Outcome, ...], folder: Path, as_json: bool) -> None:
    if as_json:
        from logitlab.reading import to_json

        print(to_json([outcome.record() for outcome in outcomes], indent=1))
    else:
        from logitlab.studies.terminal import claims

        _print(claims(outcomes))
    print(f"wrote {folder / 'report.html'}", file=sys.stderr)


def _print(what: RenderableType) -> None:
    from rich.console import Console

    Console(highlight=False).print(what)
