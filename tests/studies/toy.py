"""Small studies for the tests: one of numbers alone, one of a model. Nothing heavy is imported before they run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from logitlab.studies import Claim, Finding, Parameter, Run, Step, Study, Untestable

UNITS = ("red", "green → blue", "Red", "π/2")
"""Names that differ in case alone, and that are no names of files."""


def draw(run: Run, unit: str) -> Any:
    """Normal numbers around a mean; one file of arrays for each unit."""
    import numpy as np
    import pandas as pd

    _stop(unit)
    values = run.rng("draw", unit).normal(run.parameters.mean, 1.0, run.parameters.draws)
    run.keep(f"values-{UNITS.index(unit)}", {"values": values})
    run.progress(run.parameters.draws, run.parameters.draws, "numbers drawn")
    with (run.folder / "log").open("a", encoding="utf-8") as log:  # so that tests can count calls
        log.write(f"{unit}\n")
    return {
        "numbers": pd.DataFrame({"draw": np.arange(len(values)), "value": values}),
        "means": pd.DataFrame({"unit": [unit], "mean": [values.mean()], "spread": [values.std(ddof=1)]}),
    }


def _stop(unit: str) -> None:
    """What tests ask for by the environment: an error, Ctrl-C, or to be killed, at a unit."""
    how, _, where = os.environ.get("TOY_STOP", "").partition(" ")
    if where != unit:
        return
    if how == "error":
        raise RuntimeError("the cat pulled the plug")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "wait":
        time.sleep(60)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def squares(run: Run, unit: str) -> Any:
    """One table of one unit, made from a table and from arrays of the step before."""
    table = run.table("draw-numbers")
    table["square"] = table.value**2
    table["kept"] = [
        float(run.arrays(f"values-{UNITS.index(u)}")["values"][i]) for u, i in zip(table.unit, table.draw, strict=True)
    ]
    return table[["unit", "square", "kept"]]


def mean_is_positive(run: Run) -> Finding:
    """Normal interval over all draws."""
    values = run.table("draw-numbers").value
    width = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return Finding(values.mean(), values.mean() - width, values.mean() + width, len(values))


def never(run: Run) -> Finding:
    """What this run cannot test."""
    raise Untestable(f"{run.parameters.draws} draws are too few")


def picture(run: Run) -> Any:
    """A histogram."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(3, 2))
    drawn.subplots().hist(run.table("draw-numbers").value)
    return drawn


CLAIMS = (
    Claim("positive", "The mean is above 0.", "1.0 (table 1)", "normal interval", 0.0, mean_is_positive),
    Claim("small", "The mean is below 0.5.", "not given", "normal interval", 0.5, mean_is_positive, side="below"),
    Claim("rare", "Large numbers are rare.", "0.1 %", "exact interval", 0.01, never, side="below"),
)

STUDY = Study(
    name="toy",
    title="Numbers around a mean",
    paper="Nobody (2026). Numbers.",
    summary="Draws numbers and looks at them.",
    data="Drawn at random.",
    parameters={
        "draws": Parameter(1000, "numbers a unit", small=100, smoke=5),
        "mean": Parameter(1.0, "their mean (section 2)"),
        "label": Parameter("a", "some text"),
        "layers": Parameter((1, 2), "a list"),
        "quick": Parameter(False, "a switch"),
        "limit": Parameter(None, "none in the paper", small=3),
    },
    steps=[Step("draw", draw, units=lambda run: UNITS), Step("squares", squares)],
    claims=CLAIMS,
    defects=["The source draws the same numbers twice."],
    needs_model=False,
)


def log(folder: Path) -> list[str]:
    """For which units `draw` was called, in order."""
    file = folder / "log"
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
