"""A run as one page: claims first, then figures, tables, parameters and how it came about. It needs no script."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from logitlab.files import write_text
from logitlab.studies.folder import REPORT, RunFolder
from logitlab.studies.study import Parameter, Study
from logitlab.studies.verdict import NOT_REPRODUCED, REPRODUCED, UNTESTABLE, Outcome
from logitlab.views.tokens import visible

if TYPE_CHECKING:
    import pandas as pd

FIRST_ROWS = 12
"""Rows of a table that the page shows."""

LONGEST_CELL = 100

_CLASSES = {REPRODUCED: "good", NOT_REPRODUCED: "bad"}


def write_page(study: Study, files: RunFolder, outcomes: Sequence[Outcome]) -> Path:
    """Write ``report.html``: figures inside, nothing loaded from elsewhere, all text escaped.

    Raises:
        InputError: it cannot be written, or a table of the run is damaged.
    """
    return write_text(files.path / REPORT, page(study, files, outcomes))


def page(study: Study, files: RunFolder, outcomes: Sequence[Outcome]) -> str:
    """The page as text."""
    sections = [
        _head(study, files.record, outcomes),
        _warnings(study, files.record),
        _claims(outcomes),
        _figures(study, files),
        _tables(files),
        _parameters(study, files.record),
        _list("Defects of the source that this study avoids", study.defects),
        _manifest(files.record),
    ]
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    # A lone surrogate, which a claim's text may have, cannot be written: `visible` has escaped it.
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<meta name="generator" content="logitlab">\n'
        f'<link rel="icon" href="data:,">\n<title>{prose(study.title)}</title>\n<style>{style}</style>\n</head>\n'
        f"<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def tally(outcomes: Sequence[Outcome]) -> str:
    """How many claims have which verdict, in words."""
    verdicts = [outcome.verdict for outcome in outcomes]
    kinds = dict.fromkeys([REPRODUCED, NOT_REPRODUCED, UNTESTABLE, *verdicts])
    return ", ".join(f"{n} {kind}" for kind in kinds if (n := verdicts.count(kind))) or "no claims"


def number(value: float | None) -> str:
    """A number with four digits."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.4g}".replace("-", "−").replace("inf", "∞")


def estimate(outcome: Outcome) -> str:
    """What was found, with its interval and n; a dash if nothing was."""
    found = outcome.finding
    if found is None:
        return "–"
    return f"{number(found.value)} [{number(found.low)}, {number(found.high)}], n = {found.n}"


def needed(outcome: Outcome) -> str:
    """What the interval has to be for the claim to be reproduced."""
    return f"95 % interval {outcome.claim.side} {number(outcome.claim.threshold)}"


def prose(text: str) -> str:
    """Text of a study: escaped, lines and indentation gone."""
    return html.escape(visible(" ".join(text.split()), space=" "))


# -- sections ----------------------------------------------------------------------------------


def _head(study: Study, record: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    model = record["model"]
    about = f"scale {record['scale']}, seed {record['seed']}" + (f", model {model['name']}" if model else "")
    return (
        f"<header>\n<h1>{prose(study.title)}</h1>\n"
        f'<p class="soft">{prose(study.paper)}</p>\n<p>{prose(study.summary)}</p>\n'
        f"<p>Data: {prose(study.data)}</p>\n"
        f'<p><span class="tally">{prose(tally(outcomes))}</span> <span class="soft">({prose(about)})</span></p>\n'
        "</header>\n"
    )


def _warnings(study: Study, record: Mapping[str, Any]) -> str:
    """What a reader has to know before the claims are read."""
    found: list[str] = []
    if len({session.get("source") for session in record["sessions"]} - {None}) > 1:
        found.append("The code of the study was changed while it ran: its processes differ in the source below.")
    names = {claim.name for claim in study.claims}
    dropped = [name for name in record.get("tests") or {} if name not in names]
    if dropped:
        found.append(f"Claims that were there when the run began, and are no more: {', '.join(dropped)}.")
    return "".join(f'<p class="bad">{prose(text)}</p>\n' for text in found)


def _claims(outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return ""
    rows = [
        "<tr>"
        + f'<th scope="row">{prose(o.claim.statement)}<small><code>{prose(o.claim.name)}</code></small></th>'
        + _cell("paper", prose(o.claim.paper))
        + _cell("ours", _estimate(o))
        + _cell("test", f"{prose(o.claim.test)}<small>{prose(needed(o))}</small>")
        + _cell(
            "verdict",
            f'<span class="verdict {_CLASSES.get(o.verdict, "open")}">{prose(o.verdict)}</span>'
            + (f"<small>{prose(o.note)}</small>" if o.note else ""),
        )
        + "</tr>\n"
        for o in outcomes
    ]
    heads = ("claim", "paper", "ours, 95 % interval", "test", "verdict")
    return f"<h2>Claims</h2>\n{_table(heads, rows, 'cards')}"


def _estimate(outcome: Outcome) -> str:
    value, _, rest = estimate(outcome).partition(" ")
    return prose(value) + (f"<small>{prose(rest)}</small>" if rest else "")


def _figures(study: Study, files: RunFolder) -> str:
    found: list[str] = []
    for picture in study.pictures:
        file = files.path / "figures" / f"{picture.name}.png"
        if file.is_file():
            data = base64.b64encode(file.read_bytes()).decode()
            shown = f'<img alt="{prose(picture.caption)}" src="data:image/png;base64,{data}">'
        else:
            shown = '<p class="bad">It could not be drawn.</p>'
        found.append(f"<figure>\n{shown}\n<figcaption>{prose(picture.caption)}</figcaption>\n</figure>\n")
    return f"<h2>Figures</h2>\n{''.join(found)}" if found else ""


def _tables(files: RunFolder) -> str:
    found: list[str] = []
    for name in files.tables:
        frame = files.table(name)
        numeric = [np.issubdtype(t, np.number) if isinstance(t, np.dtype) else False for t in frame.dtypes]
        kinds = ["number" if n else "" for n in numeric]
        rows = [
            "<tr>" + "".join(f'<td class="{k}">{_value(v)}</td>' for k, v in zip(kinds, row, strict=True)) + "</tr>\n"
            for row in frame.head(FIRST_ROWS).itertuples(index=False, name=None)
        ]
        file = f"tables/{name}.parquet"
        found.append(
            f"<h3>{prose(name)}</h3>\n{_table(list(map(str, frame.columns)), rows, 'data', kinds)}"
            f'<p class="soft">{_extent(frame)}; <a href="{html.escape(quote(file))}">{prose(file)}</a></p>\n'
        )
    return f"<h2>Tables</h2>\n{''.join(found)}" if found else ""


def _extent(frame: pd.DataFrame) -> str:
    rows = f"{len(frame):,} row{'' if len(frame) == 1 else 's'}"
    return f"the first {FIRST_ROWS} of {rows}" if len(frame) > FIRST_ROWS else rows


def _parameters(study: Study, record: Mapping[str, Any]) -> str:
    if not study.parameters:
        return ""
    rows = [
        f'<tr class="{"changed" if name in record["differs"] else ""}">'
        + f"<td><code>{prose(name)}</code></td>"
        + _cell("here", f"<code>{_value(json.dumps(values['value'], ensure_ascii=False))}</code>")
        + _cell("paper", _papers(study.parameters.get(name), values["paper"]))
        + _cell("about", prose(study.parameters[name].about) if name in study.parameters else "")
        + "</tr>\n"
        for name, values in record["parameters"].items()
    ]
    note = '<p class="soft">* differs from the paper</p>\n' if record["differs"] else ""
    return f"<h2>Parameters</h2>\n{_table(('parameter', 'here', 'paper', 'about'), rows, 'cards')}{note}"


def _papers(parameter: Parameter | None, value: Any) -> str:
    if parameter is not None and parameter.ours:
        return "–"
    return f"<code>{_value(json.dumps(value, ensure_ascii=False))}</code>"


def _list(title: str, texts: Iterable[str]) -> str:
    items = "".join(f"<li>{prose(text)}</li>\n" for text in texts)
    return f"<h2>{title}</h2>\n<ul>\n{items}</ul>\n" if items else ""


def _manifest(record: Mapping[str, Any]) -> str:
    """Where the numbers are from, without what the other sections show."""
    facts: list[tuple[str, Any]] = [
        ("study", f"{record['study']}, version {record['version']}"),
        ("scale", record["scale"]),
        ("seed", record["seed"]),
        ("started", record["started"]),
        ("ended", record["ended"]),
    ]
    facts += [(f"model {key}", value) for key, value in (record["model"] or {}).items()]
    for name, step in record["steps"].items():
        units, seconds = len(step["units"]), sum(unit["seconds"] for unit in step["units"])
        facts.append((f"step {name}", f"{units} unit{'' if units == 1 else 's'}, {seconds:,.1f} s"))
    for i, session in enumerate(record["sessions"], start=1):
        versions = ", ".join(f"{name} {version}" for name, version in session["versions"].items())
        threads = "" if session["threads"] is None else f", {session['threads']} threads of torch"
        source = f", source {session['source'][:12]}" if session.get("source") else ""
        machine = f"{session['platform']}, {session['processors']} processors{threads}{source}"
        facts.append((f"process {i}, from {session['started']}", f"Python {session['python']}, {versions}; {machine}"))
    rows = [f"<tr><td>{prose(str(name))}</td>{_cell('', prose(str(value)))}</tr>\n" for name, value in facts]
    more = '<p class="soft">All of it: <a href="manifest.json">manifest.json</a></p>\n'
    return f"<h2>How it came about</h2>\n{_table(('', ''), rows, 'cards')}{more}"


# -- pieces ------------------------------------------------------------------------------------


def _table(heads: Sequence[str], rows: Sequence[str], kind: str, classes: Sequence[str] = ()) -> str:
    kinds = classes or [""] * len(heads)
    head = "".join(f'<th scope="col" class="{k}">{_value(h)}</th>' for h, k in zip(heads, kinds, strict=True))
    top = f"<thead><tr>{head}</tr></thead>\n" if any(heads) else ""
    return f'<div class="wide {kind}">\n<table>\n{top}<tbody>\n{"".join(rows)}</tbody>\n</table>\n</div>\n'


def _cell(label: str, markup: str) -> str:
    return f'<td data-label="{html.escape(label)}">{markup}</td>'


def _value(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, float | np.floating):
        return number(float(value))
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, str):
        value = str(value)
    short = value if len(value) <= LONGEST_CELL else value[: LONGEST_CELL - 1] + "…"
    return html.escape(visible(short, space=" "))


@cache
def _style() -> str:
    return resources.files("logitlab.studies").joinpath("report.css").read_text(encoding="utf-8")
