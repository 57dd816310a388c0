"""Probes as a curve over the layers, and as a table in a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from logitlab.probes.report import ProbeReport
from logitlab.views import colour
from logitlab.views.figure import LINES, window, write_figure
from logitlab.views.tokens import site_names, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(report: ProbeReport, path: str | Path) -> Path:
    """Write `figure` to a file; the ending sets the format.

    Raises:
        InputError: another ending than .png, .svg or .pdf, no Matplotlib, or the file cannot be written.
    """
    return write_figure(path, lambda: figure(report))


def figure(report: ProbeReport) -> Figure:
    """Accuracy and that of the control task by site, with bands of 95 %, and the baseline as a line.

    Raises:
        InputError: Matplotlib is not installed.
    """
    drawn = window()
    drawn.set_size_inches(5.0, 3.0)
    axes = drawn.subplots()
    places = np.arange(len(report.sites))
    accuracy = _accuracy(report)
    curves = [(accuracy, report.accuracy, report.low, report.high, LINES[0], "-")]
    if np.isfinite(report.control).any():
        curves.append(("control task", report.control, report.control_low, report.control_high, LINES[1], "--"))
    for label, values, low, high, hue, style in curves:
        axes.plot(places, values, color=hue, linestyle=style, marker="o", markersize=2.5, linewidth=1.2, label=label)
        axes.fill_between(places, low, high, color=hue, alpha=0.2, linewidth=0)
    axes.axhline(report.baseline, color="#8c8c8c", linestyle=":", linewidth=1.0, label="most frequent class")
    axes.set_ylim(0, 1.03)
    names = site_names(report.sites)
    step = max(1, len(names) // 10)
    short = "." not in names[-1]
    axes.set_xticks(range(0, len(names), step), names[::step], fontsize=7, rotation=0 if short else 90)
    axes.set_xlabel("layer" if short else "site", fontsize=8)
    axes.set_ylabel(f"held-out {accuracy}", fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    axes.set_title(_title(report), fontsize=8, parse_math=False)
    return drawn


def table(report: ProbeReport) -> Table:
    """A row a site: accuracy, shaded, with its interval; control, selectivity and p as far as there are any."""
    control, permuted = bool(np.isfinite(report.control).any()), bool(np.isfinite(report.p).any())
    found = Table(title=Text(_title(report)), box=None, pad_edge=False, title_justify="left")
    found.add_column("site", no_wrap=True)
    names = [_accuracy(report), *(("control", "selectivity") if control else ()), *(("p",) if permuted else ())]
    for name in names:
        found.add_column(name, justify="right", no_wrap=True)
    for i, site in enumerate(report.sites):
        value = float(report.accuracy[i])
        style = f"{colour.foreground(value)} on {colour.background(value)}"
        cells = [Text(_interval(value, report.low[i], report.high[i]), style=style)]
        if control:
            cells += [
                Text(_interval(report.control[i], report.control_low[i], report.control_high[i])),
                Text(_interval(report.selectivity[i], report.selectivity_low[i], report.selectivity_high[i])),
            ]
        if permuted:
            cells.append(Text(f"{report.p[i]:.3f}"))
        found.add_row(Text(visible(site, space=" ")), *cells)
    found.caption = Text(_caption(report))
    found.caption_justify = "left"
    return found


def table_text(report: ProbeReport, width: int = 120) -> str:
    """The table as plain text without colours."""
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, force_jupyter=False, legacy_windows=False)
    console.print(table(report))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _accuracy(report: ProbeReport) -> str:
    top = int(report.about.get("top_k", 1))
    return "accuracy" if top == 1 else f"top-{top} accuracy"


def _title(report: ProbeReport) -> str:
    about = report.about
    parts = [str(about.get("model", "")), f"{about.get('kind', '')} probe", f"{about.get('held_out', 0):,} held out"]
    return visible(", ".join(part for part in parts if part), space=" ")


def _caption(report: ProbeReport) -> str:
    groups = f"{report.about.get('held_out_groups', 0):,} held-out groups"
    words = f"most frequent class: {report.baseline:.3f}; 95 % intervals over {groups}"
    if report.label_overlap < 1:
        words += f"; {1 - report.label_overlap:.1%} of the rows held out have a label that was not trained on"
    return words


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
