"""Run a study: steps unit by unit, then claims, figures and the report; or the latter alone, from the tables."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from logitlab import __version__
from logitlab.errors import InputError
from logitlab.studies import folder as folders
from logitlab.studies.folder import RunFolder
from logitlab.studies.parameters import Parameters, parameters_of, scale_of
from logitlab.studies.registry import find
from logitlab.studies.run import Progress, Run
from logitlab.studies.study import Claim, Finding, Step, Study, Untestable
from logitlab.studies.verdict import FAILED, UNTESTABLE, Outcome, judge

if TYPE_CHECKING:
    import pandas as pd

    from logitlab.models.handle import Model

_LIBRARIES = ("torch", "transformers", "numpy", "pandas", "pyarrow", "scikit-learn", "scipy")


@dataclass(frozen=True)
class Result:
    """What a run has ended with.

    Attributes:
        study: the study.
        folder: where its files are; ``report.html`` is the place to begin.
        outcomes: what became of each claim, in order.
        manifest: plain values about how it came about.
    """

    study: Study
    folder: Path
    outcomes: tuple[Outcome, ...]
    manifest: Mapping[str, Any]

    @property
    def claims(self) -> dict[str, Outcome]:
        """What became of each claim, by its name."""
        return {outcome.claim.name: outcome for outcome in self.outcomes}

    @property
    def tables(self) -> list[str]:
        """Names of the tables."""
        return RunFolder.read(self.folder).tables

    def table(self, name: str) -> pd.DataFrame:
        """A table of the run; see `Run.table`.

        Raises:
            InputError: there is none of that name.
        """
        return RunFolder.read(self.folder).table(name)


def run_study(
    study: Study | str,
    *,
    model: str | Path | Model | Callable[[], Model] = "default",
    scale: str = "small",
    seed: int = 0,
    out: str | Path | None = None,
    set: Mapping[str, Any] | None = None,  # noqa: A002 - as on the command line
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Run a study, or go on with a run that was broken off, and check its claims.

    Args:
        study: a study, or the name of one (``logitlab study list``).
        model: a name for `logitlab.load`, a model, or a function that loads one. Left alone if the study needs none.
        scale: ``smoke``, ``small`` or ``full``; the last has the paper's parameters.
        seed: at least 0; all random numbers of the run derive from it.
        out: a new folder, or that of a run that was broken off; by default ``studies/NAME-SCALE-seedN``.
        set: parameters that replace those of the scale.
        progress: called as work goes on.

    Returns:
        What became of the claims. All of it is in the folder too.

    Raises:
        InputError: an argument cannot be used, an extra is missing, an intervention is active on the model, the folder
            holds another run or something else, or a step gives something that is no table.

    Example:
        ``run_study("steerable-not-decodable", scale="smoke", out="run").claims``
    """
    study = find(study) if isinstance(study, str) else study
    chosen = scale_of(scale)
    parameters = parameters_of(study, chosen, set)
    if isinstance(seed, bool) or not isinstance(cast("Any", seed), int) or seed < 0:
        raise InputError(f"seed is {seed!r}; it must be a whole number, at least 0")
    path = Path("studies") / f"{study.name}-{chosen}-seed{seed}" if out is None else out
    path = folders.place(path)
    _check_extras(study)
    with ExitStack() as held:
        new = not path.exists()
        folders.hold(path, held)
        try:
            handle = _loaded(model) if study.needs_model else None
        except BaseException:
            if new:  # nothing has begun
                with suppress(OSError):
                    (path / folders.LOCK).unlink(missing_ok=True)
                    path.rmdir()
            raise
        files = RunFolder.open(path, _record(study, parameters, chosen, seed, handle))
        files.clean()
        try:
            _do_steps(study, Run(study, parameters, chosen, seed, files, model=handle), files, progress)
            return _conclude(study, files)
        except BaseException:
            if files.record["state"] == "running":
                files.record["state"] = "interrupted"
                files.save()
            raise


def report(folder: str | Path, *, study: Study | None = None) -> Result:
    """Make claims, figures and the report of a finished run again, from its tables alone.

    Args:
        folder: of the run.
        study: the study; by default the one that the manifest names.

    Raises:
        InputError: there is no finished run, or it is of another study or version.
    """
    files = RunFolder.read(folder)
    name = str(files.record["study"])
    study = find(name) if study is None else study
    its, mine = (name, files.record["version"]), (study.name, study.version)
    if its != mine:
        raise InputError(
            f"{folder} holds a run of {its[0]}, version {its[1]}, and this is {mine[0]}, version {mine[1]}: "
            "run it again into another folder"
        )
    missing = [step.name for step in study.steps if not files.is_done(step.name)]
    if missing:
        raise InputError(
            f"the run in {folder} is not done: {len(missing)} of {len(study.steps)} steps are missing ({missing[0]} "
            "first); logitlab study run with the same arguments goes on"
        )
    _check_extras(study)
    with ExitStack() as held:
        folders.hold(files.path, held)
        return _conclude(study, files)


# -- steps -------------------------------------------------------------------------------------


def _do_steps(study: Study, run: Run, files: RunFolder, progress: Callable[[Progress], None] | None) -> None:
    """Do all that is not done yet."""
    left = [step for step in study.steps if not files.is_done(step.name)]
    for step in study.steps:
        if step not in left:
            files.remove_parts(step.name)
    if not left:
        return
    files.record["sessions"].append(_session(study))
    files.record["state"] = "running"
    files.save()
    for step in left:
        _do_step(step, run, files, progress)


def _do_step(step: Step, run: Run, files: RunFolder, progress: Callable[[Progress], None] | None) -> None:
    units = [""] if step.units is None else _units(step, step.units(run))
    tell = progress or _tell_nobody
    for number, unit in enumerate(units):
        if files.unit(step.name, unit) is not None:
            continue
        at = Progress(step.name, unit, number, len(units))
        tell(at)
        run._tell = partial(_tell_of_unit, tell, at)
        started, begin = _now(), time.perf_counter()
        tables = step.do(run, unit)
        run._tell = None
        files.keep_unit(step.name, unit, tables, step.units is not None, started, time.perf_counter() - begin)
    files.finish(step.name, units)
    tell(Progress(step.name, "", len(units), len(units)))


def _units(step: Step, given: Sequence[str]) -> list[str]:
    units = list(given)
    if not units:
        raise InputError(f"step {step.name!r} has no units: there is nothing to do")
    bad = next((unit for unit in units if not isinstance(cast("Any", unit), str) or not unit), None)
    if bad is not None:
        raise InputError(f"step {step.name!r} has a unit {bad!r}; units are names")
    twice = next((unit for unit in units if units.count(unit) > 1), None)
    if twice is not None:
        raise InputError(f"step {step.name!r} has the unit {twice!r} twice")
    return units


def _tell_of_unit(tell: Callable[[Progress], None], at: Progress, done: int, total: int | None, words: str) -> None:
    tell(replace(at, done=done, total=total, words=words))


def _tell_nobody(progress: Progress) -> None:
    pass


# -- claims, figures, report -------------------------------------------------------------------


def _conclude(study: Study, files: RunFolder) -> Result:
    """Judge the claims, draw the pictures, write the report; an error in one of the first two is raised after that."""
    from logitlab.studies.page import write_page
    from logitlab.views.figure import write_figure

    record = files.record
    scale = scale_of(record["scale"])
    values = {name: p["value"] for name, p in record["parameters"].items()}
    run = Run(study, Parameters(values), scale, record["seed"], files)
    failures: list[Exception] = []
    before = record.get("tests")
    outcomes = tuple(_compared(_judged(claim, run, failures), before) for claim in study.claims)
    figures = files.path / "figures"
    for picture in study.pictures:
        folders.make_folder(figures)
        file = figures / f"{picture.name}.png"
        try:
            write_figure(file, lambda draw=picture.draw: draw(run))
        except Exception as error:
            file.unlink(missing_ok=True)  # one of an earlier report would not show these tables
            error.add_note(f"while picture {picture.name!r} of study {study.name!r} was drawn")
            failures.append(error)
    record["claims"] = [outcome.record() for outcome in outcomes]
    if record["state"] != "done":
        record["state"] = "done"
        record["ended"] = _now()
    files.save()
    write_page(study, files, outcomes)
    if failures:
        failures[0].add_note(f"all else is in {files.path}; mend it, and logitlab study report {files.path} goes on")
        for other in failures[1:]:
            failures[0].add_note(f"and {type(other).__name__}: {other} ({'; '.join(other.__notes__)})")
        raise failures[0]
    return Result(study, files.path, outcomes, run.manifest)


def _judged(claim: Claim, run: Run, failures: list[Exception]) -> Outcome:
    try:
        finding = claim.measure(run)
        if not isinstance(cast("Any", finding), Finding):
            raise InputError(f"the measure of claim {claim.name!r} gives a {type(finding).__name__}, and no Finding")
        outcome = judge(claim, finding)
        outcome.record()  # whatever cannot be recorded fails here, as a bug of this claim alone
        return outcome
    except Untestable as reason:
        return Outcome(claim, UNTESTABLE, note=str(reason) or "the study gives no reason")
    except Exception as error:
        error.add_note(f"while claim {claim.name!r} of study {run.study.name!r} was measured")
        failures.append(error)
        return Outcome(claim, FAILED, note=f"{type(error).__name__}: {error}")


def _compared(outcome: Outcome, before: Mapping[str, Any] | None) -> Outcome:
    """The outcome with a note if the test is not the one that was fixed when the run began."""
    if before is None:  # of a version that did not record it
        return outcome
    claim = outcome.claim
    was = before.get(claim.name)
    if was == _test(claim):
        return outcome
    if was is None:
        note = "added since the run began"
    else:
        note = f"changed since the run began (was: {was['test']}, {was['side']} {was['threshold']:g})"
    return replace(outcome, note="; ".join([note, *([outcome.note] if outcome.note else [])]))


def _test(claim: Claim) -> dict[str, Any]:
    return {"test": claim.test, "side": claim.side, "threshold": float(claim.threshold)}


# -- what is recorded --------------------------------------------------------------------------


def _record(study: Study, parameters: Parameters, scale: str, seed: int, model: Model | None) -> dict[str, Any]:
    """The manifest of a run that has not begun."""
    paper = {name: parameter.at("full") for name, parameter in study.parameters.items()}
    return {
        "format": folders.FORMAT,
        "study": study.name,
        "version": study.version,
        "scale": scale,
        "seed": seed,
        "parameters": {name: {"value": value, "paper": paper[name]} for name, value in parameters.items()},
        "differs": [
            name for name, value in parameters.items() if value != paper[name] and not study.parameters[name].ours
        ],
        "tests": {claim.name: _test(claim) for claim in study.claims},
        "model": None if model is None else _about(model),
        "state": "running",
        "started": _now(),
        "ended": None,
        "sessions": [],
        "steps": {},
        "claims": [],
    }


def _about(model: Model) -> dict[str, Any]:
    return model.about | {
        "vocabulary": model.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "verification": model.verification.text,
    }


def _session(study: Study) -> dict[str, Any]:
    """One process that has worked on the run: several have, where it was broken off."""
    torch: Any = sys.modules.get("torch")
    return {
        "started": _now(),
        "python": platform.python_version(),
        "versions": {"logitlab": __version__}
        | {name: found for name in _LIBRARIES if (found := _version(name)) is not None},
        "source": _source(study),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": None if torch is None else torch.get_num_threads(),
    }


def _source(study: Study) -> str | None:
    """SHA-256 of the source files beside the functions of the steps; of a module without a package that file alone.

    None if there are none, as of functions that were typed in.
    """
    files: set[Path] = set()
    for step in study.steps:
        function: Any = step.do
        while isinstance(function, partial):
            function = cast("Any", function).func
        module = sys.modules.get(getattr(function, "__module__", None) or "")
        file = getattr(module, "__file__", None)
        if file is not None:
            package = bool(getattr(module, "__package__", None))
            files |= set(Path(file).parent.rglob("*.py")) if package else {Path(file)}
    digest = hashlib.sha256()
    there = sorted((file for file in files if file.is_file()), key=lambda file: (file.name, str(file)))
    for file in there:  # names without folders, so that another installation of the same code has the same sum
        for part in (file.name.encode("utf-8", "surrogateescape"), file.read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest() if there else None


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _loaded(model: str | Path | Model | Callable[[], Model]) -> Model:
    if isinstance(model, str | Path):
        from logitlab.models.load import load

        model = load(model)
    from torch import nn

    from logitlab.models.handle import Model
    from logitlab.models.interfere import active

    found: Any = model
    if not isinstance(found, Model | nn.Module) and callable(found):  # a module can be called, but loads nothing
        found = found()
    if not isinstance(found, Model):
        raise InputError(
            f"the model is a {type(found).__name__}; give a name, or logitlab.wrap(module, tokenizer), or a function "
            "that returns such"
        )
    if active(found.module):
        raise InputError(
            f"an intervention is active on {found.name}: run the study outside of intervene(), its steps change the "
            "model themselves where they need to"
        )
    return found


def _check_extras(study: Study) -> None:
    """Raise `InputError` if a library of an extra that the study needs is not installed.

    What an extra means is read from logitlab's own installation; one that it does not know cannot be checked here.
    """
    from packaging.requirements import Requirement

    wanted = dict.fromkeys([*study.requires, *(("figures",) if study.pictures else ())])
    try:
        declared = [Requirement(line) for line in requires("logitlab") or ()]
    except PackageNotFoundError:  # run from its sources, without an installation
        return
    for extra in wanted:
        for needed in declared:
            if (
                needed.marker is None
                or needed.marker.evaluate({"extra": ""})
                or not needed.marker.evaluate({"extra": extra})
            ):
                continue
            if _version(needed.name) is None:
                raise InputError(f"study {study.name} needs {needed.name}: pip install 'logitlab[{extra}]'")
