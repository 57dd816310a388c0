"""The figures of the report, from the tables of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from logitlab.intervals import bootstrap
from logitlab.views.figure import LINES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from logitlab.studies.run import Run

GREY = "#8a8a8a"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)


def cells(run: Run) -> Figure:
    """The 2 x 2 table as a picture."""
    table, threshold = run.table("summary"), run.parameters.threshold
    figure = _figure(5.6, 4.8)
    ax = figure.subplots()
    ax.axhline(threshold, color=GREY, lw=0.8)
    ax.axvline(threshold, color=GREY, lw=0.8)
    ax.plot(table["logit_lens"], table["steered"], "o", color=LINES[0], ms=5)
    taken: list[tuple[float, float]] = []
    for row in table.sort_values("steered").itertuples():
        x, y = float(row.logit_lens), float(row.steered)  # pyright: ignore[reportArgumentType]
        level = y
        while any(abs(level - b) < 0.04 and abs(x - a) < 0.3 for a, b in taken):
            level += 0.04
        taken.append((x, level))
        ax.annotate(
            str(row.task), (x, y), (x + 0.02, level), fontsize=8, va="center", arrowprops={"arrowstyle": "-", "lw": 0.3}
        )
    ax.set(xlim=(-0.03, 1.25), ylim=(-0.03, 1.08), xlabel="logit lens, top 10", ylabel="steered, right answers")
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    _plain(ax)
    return figure


def _best(run: Run) -> pd.DataFrame:
    table = run.table("steering-cells")
    return table.loc[table.groupby("task", sort=False)["best_choosing"].idxmax()]


KINDS = {
    "plain": ("bare", GREY),
    "random": ("random vectors", LINES[1]),
    "permuted": ("its texts, others' answers", LINES[2]),
    "other": ("another task's vector", LINES[3]),
    "steered": ("function vector", LINES[0]),
    "few_shot": ("after examples", LINES[4]),
}
"""What was done: label and colour."""


def steering(run: Run) -> Figure:
    """Right answers by what was done."""
    best, outcomes, able = _best(run), run.table("steering-outcomes"), run.table("abilities")
    kinds = [k for k in KINDS if k in outcomes or k == "few_shot"]
    figure = _figure(max(6.0, 0.75 * len(best) + 2.2), 3.6)
    ax = figure.subplots()
    width = 0.84 / len(kinds)
    for i, kind in enumerate(kinds):
        table = able if kind == "few_shot" else outcomes
        rows = [table[(table["task"] == r.task) & (table["template"] == r.template)][kind] for r in best.itertuples()]
        found = [bootstrap(row, seed=run.seed) for row in rows]
        x = np.arange(len(best)) + (i - (len(kinds) - 1) / 2) * width
        label, colour = KINDS[kind]
        values = np.array([m.value for m in found])
        spread = np.abs(np.array([[m.value - m.low, m.high - m.value] for m in found]).T)
        ax.bar(x, values, width * 0.92, color=colour, label=label)
        ax.errorbar(x, values, spread, fmt="none", ecolor="#333333", elinewidth=0.7)
    ax.set_xticks(range(len(best)), list(best["task"]), rotation=30, ha="right")
    ax.set(ylabel="right answers", ylim=(0, 1.02))
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    _plain(ax)
    return figure


def ladder(run: Run) -> Figure:
    """What reads each task."""
    table, threshold = run.table("summary"), run.parameters.threshold
    kinds = {
        "logit_lens": "logit lens",
        "tuned_lens": "tuned lens",
        "mlp_probe": "MLP probe",
        "mlp_control": "its control",
    }
    figure = _figure(max(6.0, 0.75 * len(table) + 2.2), 3.2)
    ax = figure.subplots()
    for i, (kind, label) in enumerate(kinds.items()):
        colour = GREY if kind == "mlp_control" else LINES[i]
        ax.bar(np.arange(len(table)) + (i - 1.5) * 0.2, table[kind], 0.18, color=colour, label=label)
    ax.axhline(threshold, color="#333333", lw=0.8)
    ax.set_xticks(range(len(table)), list(table["task"]), rotation=30, ha="right")
    ax.set(ylabel="answer among the first tokens", ylim=(0, 1.02))
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    _plain(ax)
    return figure


def sweep(run: Run) -> Figure:
    """Layers by strengths."""
    table = run.table("steering-sweep").assign(layer=lambda t: t["site"].str.split(".").str[0].astype(int) + 1)
    names = list(dict.fromkeys(table["task"]))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(2.3 * columns + 0.6, 2.3 * rows)
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel())
    image = None
    for ax, name in zip(axes, names, strict=False):
        grid = table[table["task"] == name].pivot_table(index="layer", columns="strength", values="accuracy")
        image = ax.imshow(grid.to_numpy(), vmin=0, vmax=1, origin="lower", aspect="auto", cmap="cividis")
        ax.set_title(name, fontsize=9)
        ax.set_xticks(range(grid.shape[1]), [f"{k:g}" for k in grid.columns], fontsize=7)
        some = range(0, len(grid), max(1, len(grid) // 5))
        ax.set_yticks(list(some), [str(grid.index[i]) for i in some], fontsize=7)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    figure.supxlabel("strength", fontsize=9)
    figure.supylabel("after layer", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=list(axes), shrink=0.6, label="right answers")
    return figure


def after_steering(run: Run) -> Figure:
    """Gains of the lens."""
    best, table = _best(run), run.table("after-steering")
    figure = _figure(7.2, 3.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for i, row in enumerate(best.itertuples()):
        here = table[(table["task"] == row.task) & (table["template"] == row.template)]
        style: Any = {"color": LINES[i % len(LINES)], "ls": ("-", "--", ":")[i // len(LINES) % 3], "lw": 1.4}
        left.plot(here["layer"], here["steered"] - here["plain"], label=str(row.task), **style)
        right.plot(here["layer"], here["random"] - here["plain"], **style)
    left.set(title="function vector", xlabel="layer", ylabel="gain of lens top-10 accuracy")
    right.set(title="random vector", xlabel="layer")
    for ax in (left, right):
        ax.axhline(0, color=GREY, lw=0.8)
        _plain(ax)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def transfer(run: Run) -> Figure:
    """Accuracy by norm and cosine."""
    table = run.table("transfer")
    table = table[table["source"] != table["target"]]
    figure = _figure(7.2, 3.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for i, name in enumerate(dict.fromkeys(table["task"])):
        here = table[table["task"] == name]
        style: Any = {
            "color": LINES[i % len(LINES)],
            "marker": "osv^"[i // len(LINES) % 4],
            "ls": "",
            "ms": 3,
            "alpha": 0.6,
        }
        left.plot(here["norm"], here["accuracy"], label=name, **style)
        right.plot(here["cosine"], here["accuracy"], **style)
    left.set(xscale="log", xlabel="length of the vector", ylabel="right answers in the other template")
    right.set(xlabel="cosine with the other template's vector")
    for ax in (left, right):
        _plain(ax)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def matrices(run: Run) -> Figure:
    """Transfers, the best site and strength, by task."""
    table = run.table("transfer").groupby(["task", "source", "target"], sort=False)["accuracy"].max().reset_index()
    names = list(dict.fromkeys(table["task"]))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(2.1 * columns + 0.8, 2.1 * rows + 0.2)
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel())
    image = None
    for ax, name in zip(axes, names, strict=False):
        grid = table[table["task"] == name].pivot(index="source", columns="target", values="accuracy")
        image = ax.imshow(grid.to_numpy(), vmin=0, vmax=1, cmap="cividis")
        ax.set_title(name, fontsize=9)
        ax.set_xticks(range(grid.shape[1]), [f"T{k}" for k in grid.columns], fontsize=7)
        ax.set_yticks(range(grid.shape[0]), [f"T{k}" for k in grid.index], fontsize=7)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    figure.supxlabel("into template", fontsize=9)
    figure.supylabel("vector of template", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=list(axes), shrink=0.6, label="right answers")
    return figure
