"""Studies in a terminal: the claims of a run, the list of studies, one of them in full."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from logitlab.errors import InputError
from logitlab.studies.page import estimate, needed, tally
from logitlab.studies.registry import Entry
from logitlab.studies.study import Study
from logitlab.studies.verdict import NOT_REPRODUCED, REPRODUCED, Outcome
from logitlab.views.tokens import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLES = {REPRODUCED: "green", NOT_REPRODUCED: "red"}


def claims(outcomes: Sequence[Outcome]) -> RenderableType:
    """The table of claims, and how many have which verdict."""
    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for name, ratio in (("claim", 5), ("paper", 3), ("ours, 95 % interval", 4), ("verdict", 4)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for outcome in outcomes:
        ours = f"{estimate(outcome)}; needed: {needed(outcome)}"
        verdict = Text(shown(outcome.verdict), style=_STYLES.get(outcome.verdict, "yellow"))
        if outcome.note:
            verdict.append(f" ({shown(outcome.note)})", style="dim")
        statement = Text(shown(outcome.claim.statement))
        table.add_row(statement, Text(shown(outcome.claim.paper)), Text(shown(ours)), verdict)
    total = Text(shown(tally(outcomes)), style="bold")
    return Group(table, total) if outcomes else total


def listed(entries: Sequence[Entry]) -> RenderableType:
    """All studies with their titles; what cannot be used is shown with its reason."""
    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for name in ("study", "title", "from"):
        table.add_column(name, overflow="fold", no_wrap=name == "study")
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1:
            what = Text(f"cannot be used: there are {names.count(entry.name)} of this name", style="red")
        else:
            try:
                what = Text(shown(entry.load().title))
            except InputError as error:
                what = Text(f"cannot be used: {shown(str(error))}", style="red")
        table.add_row(Text(shown(entry.name)), what, Text(shown(entry.package)))
    return table


def described(study: Study) -> RenderableType:
    """A study in full: what it is, parameters by scale, steps, claims, defects."""
    parts: list[RenderableType] = [
        Text(shown(study.title), style="bold"),
        Text(shown(study.paper), style="dim"),
        Text(f"\n{shown(study.summary)}"),
        Text(f"\nData: {shown(study.data)}"),
        Text(f"Steps: {', '.join(step.name for step in study.steps)}"),
    ]
    if study.requires or study.pictures:
        parts.append(
            Text(f"Extras: {', '.join(dict.fromkeys([*study.requires, *['figures'][: len(study.pictures)]]))}")
        )
    if study.parameters:
        table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
        for name in ("parameter", "smoke", "small", "full", "about"):
            table.add_column(name, overflow="fold")
        for name, parameter in study.parameters.items():
            values = [Text(shown(json.dumps(value, ensure_ascii=False))) for value in parameter.values]
            table.add_row(Text(name), *values, Text(shown(parameter.about)))
        parts += [Text("\nParameters", style="bold"), table]
    if study.claims:
        parts.append(Text("\nClaims", style="bold"))
        for claim in study.claims:
            parts.append(Text(f"{claim.name}: {shown(claim.statement)}"))
            test = f"paper: {claim.paper}; test: {claim.test} ({claim.side} {claim.threshold:g})"
            parts.append(Padding(Text(shown(test), style="dim"), (0, 0, 0, 2)))
    if study.defects:
        parts.append(Text("\nDefects of the source that are avoided", style="bold"))
        parts += [Padding(Text(shown(defect)), (0, 0, 0, 2)) for defect in study.defects]
    return Group(*parts)


def shown(text: str) -> str:
    """Text of a study on lines of the terminal's own."""
    return visible(" ".join(text.split()), space=" ")
