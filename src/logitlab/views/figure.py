"""A Reading as a publication figure: layers by tokens, and the rank of the targets beside it.

A prompt whose picture was read is drawn by `logitlab.views.overlay` instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len

from logitlab.errors import InputError
from logitlab.files import write_atomically
from logitlab.reading import Reading
from logitlab.views import colour, overlay, pictures
from logitlab.views.tokens import cell_label, label_space, lens_name, model_name, noun, site_names, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# No date and a fixed salt: the same Reading gives the same file.
_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
_SETTINGS: dict[Any, Any] = {"svg.hashsalt": "logitlab", "svg.fonttype": "none", "pdf.fonttype": 42}
# Fonts for scripts that Matplotlib's own font lacks; those that are installed are used.
_SCRIPTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Hiragino Sans", "Microsoft YaHei", "Noto Emoji", "Noto Sans")
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
STYLES = ("-", "--", ":", "-.", (0, (1, 3)))
_SMALL, _TEXT = 6.5, 8.0  # points
_MOST_POSITIONS, _MOST_SITES = 40, 60  # beyond these a cell has no room for its token


def save_figure(reading: Reading, path: str | Path, *, prompt: int = 0) -> Path:
    """Write `figure` to a file; the ending sets the format.

    Args:
        reading: what to show.
        path: ends in .png, .svg or .pdf; its folder must exist.
        prompt: number of the prompt.

    Raises:
        InputError: another ending, no such prompt, Matplotlib is not installed, or the file cannot
            be written.
    """
    return write_figure(path, lambda: figure(reading, prompt=prompt))


def write_figure(path: str | Path, draw: Callable[[], Figure]) -> Path:
    """Write what ``draw`` draws; the same figure gives the same bytes.

    Raises:
        InputError: the name ends otherwise than in .png, .svg or .pdf, or the file cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in _METADATA:
        raise InputError(f"cannot write a figure to {path}: its name must end in .png, .svg or .pdf")
    drawn = draw()
    import matplotlib as mpl

    def write(temporary: Path) -> None:
        with mpl.rc_context(rc=_SETTINGS), warnings.catch_warnings():
            # A character that no installed font has is drawn as a box.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            drawn.savefig(temporary, format=ending[1:], dpi=200, metadata=_METADATA[ending])

    return write_atomically(path, write)


def figure(reading: Reading, *, prompt: int = 0) -> Figure:
    """A heat map of one prompt, the last layer at the top; with targets, their rank at the last position.

    A prompt with patches of a picture is drawn as that picture at up to twelve sites, evenly chosen, its
    patches coloured by their top label or, with targets, by the probability of each target. A detector's
    picture has the boxes of the queries whose best class is more probable than 0.5, else of the five best.

    Raises:
        InputError: no such prompt, nothing was read for it, its picture cannot be decoded, or Matplotlib is
            not installed.
    """
    drawn = window()
    prompt, (width, height), labels = panel_size(reading, prompt)
    if (pictured := overlay.figure(reading, prompt, _fonts())) is not None:
        return pictured
    beside = 1.9 if reading.targets else 0.0
    around = 2.0 + 0.13 * len(reading.targets)  # title, tokens, colour bar and the key of the targets
    drawn.set_size_inches(width + beside + 1.6, height + around)
    ratios = [width, beside] if beside else [1.0]
    axes = drawn.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]
    heat_map(axes[0], reading, prompt, labels)
    if beside:
        _ranks(axes[1], reading, prompt)
    title = " · ".join(part for part in (model_name(reading), lens_name(reading)) if part)
    drawn.suptitle(title, fontsize=_TEXT + 1, fontweight="bold", parse_math=False)
    return drawn


def window() -> Figure:
    """An empty figure.

    Raises:
        InputError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("a figure needs matplotlib: pip install 'logitlab[figures]'") from error
    return Figure(layout="constrained")


def panel_size(reading: Reading, prompt: int) -> tuple[int, tuple[float, float], list[list[str]] | None]:
    """Number of a prompt, from 0; inches that its heat map takes; labels of its cells, if they have room.

    Raises:
        InputError: no such prompt, or nothing was read for it.
    """
    if not -len(reading.prompts) <= prompt < len(reading.prompts):
        raise InputError(f"prompt {prompt} is not in this Reading: it has {len(reading.prompts)}")
    prompt %= len(reading.prompts)
    sites, positions = len(reading.sites), len(reading.prompts[prompt].positions)
    if not sites or not positions:
        raise InputError(f"there is nothing to draw: prompt {prompt} has no sites or no positions in this Reading")
    written = positions <= _MOST_POSITIONS and sites <= _MOST_SITES
    labels = _labels(reading, prompt) if written else None
    cell = _cell_width(labels) if labels else max(0.02, min(0.15, 9 / positions))
    height = 0.19 if written else max(0.05, min(0.15, 7 / sites))
    return prompt, (max(cell * positions, 1.5), max(height * sites, 1.2)), labels


def heat_map(axes: Axes, reading: Reading, n: int, labels: list[list[str]] | None, *, bar: bool = True) -> None:
    """Draw sites by tokens, with their ``labels`` if there is room, and a colour bar."""
    from matplotlib.colors import ListedColormap

    prompt, count = reading.prompts[n], len(reading.prompts[n].positions)
    values: NDArray[Any] = np.exp(reading.arrays["top_logprob"][n, :, :count, 0])
    shades = ListedColormap([back for back, _ in colour.table()])
    image = axes.pcolormesh(
        np.arange(count + 1) - 0.5,
        np.arange(len(values) + 1) - 0.5,
        values,
        cmap=shades,
        vmin=0,
        vmax=1,
        edgecolors="white" if labels else "face",
        linewidth=0.5 if labels else 0,
        rasterized=labels is None,  # a vector file would hold a path for each of very many cells
    )
    if count <= _MOST_POSITIONS:
        tokens = [_cut(name) for name in pictures.position_names(prompt)]
        _ticks(axes, "x", tokens, _MOST_POSITIONS)
        axes.tick_params(axis="x", rotation=0 if labels and max(map(cell_len, tokens)) < 10 else 90)
    else:
        _ticks(axes, "x", [str(p) for p in prompt.positions], 12)
        axes.set_xlabel("position", fontsize=_TEXT)
    _ticks(axes, "y", site_names(reading.sites), _MOST_SITES)
    axes.tick_params(length=0, labelsize=_SMALL)
    axes.set_ylabel("layer" if "." not in site_names(reading.sites)[-1] else "site", fontsize=_TEXT)
    axes.spines[:].set_visible(False)
    if labels is not None:
        fonts = _fonts()
        for (s, p), value in np.ndenumerate(values):
            axes.text(
                p,
                s,
                labels[s][p],
                ha="center",
                va="center",
                fontsize=_SMALL,
                family=fonts,
                color=colour.foreground(float(value)),
                parse_math=False,
            )
    if not bar:
        return
    assert axes.figure is not None
    scale = axes.figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.02)
    label = f"probability of the top {noun(reading)}"
    if reading.activation == "sigmoid":
        label += f"\n{pictures.INDEPENDENT}"
    scale.set_label(label, fontsize=_TEXT)
    scale.ax.tick_params(labelsize=_SMALL)
    scale.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _ranks(axes: Axes, reading: Reading, n: int) -> None:
    """Rank by site, 1 at the right; it shares its vertical axis with the heat map."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    last = len(reading.prompts[n].positions) - 1
    ranks = reading.arrays["target_rank"][n, :, last]
    for t, target in enumerate(reading.targets):
        shown = np.where(ranks[:, t] > 0, ranks[:, t], np.nan)
        style = STYLES[(t + t // len(LINES)) % len(STYLES)]  # when colours repeat, dashes differ
        axes.plot(shown, np.arange(len(shown)), color=LINES[t % len(LINES)], linestyle=style, marker="o", ms=2, lw=1.2)
        axes.lines[-1].set_label(str(target.id))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_whole))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.5, len(ranks) - 0.5)
    axes.set_xlim(max(10.0, float(ranks.max()) * 1.3), 0.8)
    axes.set_xlabel("rank at the last position", fontsize=_TEXT)
    axes.tick_params(axis="x", labelsize=_SMALL)
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.5)
    legend = axes.legend(fontsize=_SMALL, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    for text, target in zip(legend.get_texts(), reading.targets, strict=True):
        text.set_parse_math(False)
        text.set_text(
            _cut(visible(target.token, space=label_space(reading)))
        )  # only now: Matplotlib drops labels that begin with "_"
        text.set_fontfamily(_fonts())


def _whole(rank: float, _: int | None) -> str:
    return f"{rank:,.0f}"


def _ticks(axes: Axes, which: str, names: list[str], most: int) -> None:
    """At most ``most`` labelled ticks, always with the last one."""
    step = -(-len(names) // most)
    chosen = list(range(len(names) - 1, -1, -step))[::-1]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(chosen, [names[i] for i in chosen])
    for label in axis.get_ticklabels():
        label.set_parse_math(False)
        label.set_fontfamily(_fonts())


def _labels(reading: Reading, n: int) -> list[list[str]]:
    ids = reading.arrays["top_id"][n, :, : len(reading.prompts[n].positions), 0]
    return [[_cut(cell_label(reading, int(i), n, p)) for p, i in enumerate(row)] for row in ids]


def _cell_width(labels: list[list[str]]) -> float:
    """Inches for the longest label."""
    return max(0.35, 0.065 * max(cell_len(label) for row in labels for label in row) + 0.08)


def _cut(label: str) -> str:
    return overlay.cut(label, 12)


@cache
def _fonts() -> list[str]:
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in _SCRIPTS if name in installed)]
