"""A sweep as curves over the layers, and as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from logitlab.errors import InputError
from logitlab.sweeps.report import ALL, Measure, SweepReport
from logitlab.views import colour
from logitlab.views.figure import LINES, STYLES, write_figure
from logitlab.views.tokens import site_names, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "kl": "KL from the model, nats",
    "entropy": "entropy, nats",
    "agreement": "same top token as the model",
    "overlap": "share of the model's top k",
    "confidence": "probability of the top token",
    "cross_entropy": "cross-entropy with the next token, nats",
    "accuracy": "top token is the next token",
}
"""What a measure is called in views."""

SHORT = {
    "kl": "KL",
    "entropy": "entropy",
    "agreement": "same top",
    "overlap": "top-k",
    "confidence": "confidence",
    "cross_entropy": "CE next",
    "accuracy": "accuracy",
}


def curves(report: SweepReport, path: str | Path, *, measures: Sequence[str] | None = None) -> Path:
    """Write `figure` to a file; the ending sets the format.

    Raises:
        InputError: another ending than .png, .svg or .pdf, no Matplotlib, or the file cannot be written.
    """
    return write_figure(path, lambda: figure(report, measures=measures))


def figure(report: SweepReport, *, measures: Sequence[str] | None = None) -> Figure:
    """Curves over the layers with their 95 % intervals, a panel a measure, a line a lens; and prediction depths.

    With groups and one lens, a line is a group.

    Args:
        report: the sweep.
        measures: which measures; by default KL, agreement, cross-entropy and entropy, as far as there are any.

    Raises:
        InputError: there is no such measure, or Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("a figure needs matplotlib: pip install 'logitlab[figures]'") from error
    wanted = [m for m in ("kl", "agreement", "cross_entropy", "entropy") if m in report.measures]
    if measures is not None:
        bad = next((m for m in measures if m not in report.measures), None)
        if bad is not None:
            raise InputError(f"this sweep has no measure {bad!r}; it has {', '.join(report.measures)}")
        wanted = list(measures)
    lines = _lines(report)
    depths = any(report.depths(lens, group).sum() for lens, group, _ in lines)
    panels = len(wanted) + int(depths)
    columns = min(panels, 2)
    rows = -(-panels // columns)
    drawn = Figure(figsize=(3.6 * columns, 2.5 * rows + 0.4), layout="constrained")
    axes = np.atleast_1d(drawn.subplots(rows, columns, squeeze=False).ravel())
    for ax, name in zip(axes, wanted, strict=False):
        _curve(ax, report, name, lines)
    if depths:
        _depths(axes[len(wanted)], report, lines)
    for ax in axes[panels:]:
        ax.set_axis_off()
    if len(lines) > 1:
        labels = [visible(label, space=" ") for _, _, label in lines]
        legend = drawn.legend(
            axes[0].lines, labels, loc="outside lower center", ncols=min(4, len(lines)), fontsize=7, frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    about = report.about.get("corpus", {})
    model = report.about.get("model", {}).get("name", "")
    title = f"{model}, {about.get('name', '')}, {about.get('tokens', 0):,} tokens; 95 % intervals over windows"
    drawn.suptitle(visible(title, space=" "), fontsize=8, parse_math=False)
    return drawn


def _lines(report: SweepReport) -> list[tuple[str, str, str]]:
    """Lens, group and label of every line."""
    if len(report.groups) > 1 and len(report.lenses) == 1:
        lens = report.lenses[0]
        return [(lens, group, "all" if group == ALL else group.partition("=")[2]) for group in report.groups]
    return [(lens, ALL, lens) for lens in report.lenses]


def _style(i: int) -> tuple[str, object]:
    return LINES[i % len(LINES)], STYLES[i // len(LINES) % len(STYLES)]


def _curve(ax: Axes, report: SweepReport, name: str, lines: Sequence[tuple[str, str, str]]) -> None:
    places = np.arange(len(report.sites))
    for i, (lens, group, _) in enumerate(lines):
        found = [report.measure(name, lens, int(site), group) for site in places]
        hue, style = _style(i)
        ax.plot(places, [m.mean for m in found], color=hue, linestyle=style, linewidth=1.2, label=f"line {i}")  # pyright: ignore[reportArgumentType]
        ax.fill_between(places, [m.low for m in found], [m.high for m in found], color=hue, alpha=0.2, linewidth=0)
    ax.set_title(TITLES[name], fontsize=8)
    ax.set_ylim(bottom=0)
    _layers(ax, report)


def _depths(ax: Axes, report: SweepReport, lines: Sequence[tuple[str, str, str]]) -> None:
    """Share of tokens by the site from which on their top token is the model's own."""
    places = np.arange(len(report.sites))
    for i, (lens, group, _) in enumerate(lines):
        counts = report.depths(lens, group)
        if counts.sum():
            hue, style = _style(i)
            share = counts / counts.sum()
            ax.step(places, share, where="mid", color=hue, linestyle=style, linewidth=1.2, label=f"line {i}")  # pyright: ignore[reportArgumentType]
    ax.set_title("prediction depth, share of tokens", fontsize=8)
    ax.set_ylim(bottom=0)
    _layers(ax, report)


def _layers(ax: Axes, report: SweepReport) -> None:
    names = site_names(report.sites)
    step = max(1, len(names) // 8)
    ax.set_xticks(range(0, len(names), step), names[::step], fontsize=7)
    ax.tick_params(axis="y", labelsize=7)
    ax.set_xlabel("layer", fontsize=7)
    ax.spines[["top", "right"]].set_visible(False)


# -- terminal ----------------------------------------------------------------------------------


def table(report: SweepReport, width: int) -> list[Table]:
    """A table for each lens and group: a row a site, shaded by value, with half of each interval's width."""
    found: list[Table] = []
    names = site_names(report.sites)
    measures = [m for m in SHORT if m in report.measures]
    room = max(1, (width - 12) // 16)
    for lens in report.lenses:
        for group in report.groups:
            about = report.about.get("corpus", {})
            count = report.measure("agreement", lens, 0, group).tokens
            title = f"{lens}, {about.get('name', '')}" + ("" if group == ALL else f", {group}") + f": {count:,} tokens"
            one = Table(title=Text(visible(title, space=" ")), box=None, pad_edge=False, title_justify="left")
            one.add_column("site", no_wrap=True)
            shown = measures[:room]
            for name in shown:
                one.add_column(SHORT[name], justify="right", no_wrap=True)
            columns = [[report.measure(m, lens, i, group) for i in range(len(names))] for m in shown]
            tops = [max((m.mean for m in column if m.mean == m.mean), default=1.0) or 1.0 for column in columns]
            for i, name in enumerate(names):
                cells = [_cell(column[i], top) for column, top in zip(columns, tops, strict=True)]
                one.add_row(Text(name), *cells)
            found.append(one)
    return found


def _cell(found: Measure, top: float) -> Text:
    if found.mean != found.mean:
        return Text("–")
    half = (found.high - found.low) / 2
    text = f"{found.mean:.3f}" + (f" ±{half:.3f}" if half == half else "")
    fraction = found.mean / top
    return Text(text, style=f"{colour.foreground(fraction)} on {colour.background(fraction)}")
