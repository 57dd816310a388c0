"""A comparison of lenses: a grid of sites by lenses in a terminal, a panel for each lens in a figure."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from logitlab.comparison import Comparison
from logitlab.errors import InputError
from logitlab.reading import Reading
from logitlab.views import colour, overlay, pictures
from logitlab.views.figure import heat_map, panel_size, window, write_figure
from logitlab.views.tokens import cell_label, model_name, noun, percent, site_names, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def grid(comparison: Comparison, *, prompt: int = 0, position: int = -1) -> Group:
    """Sites by lenses at one position; the last layer is at the top, cells are shaded by probability.

    Args:
        comparison: what to show.
        prompt: number of the prompt.
        position: which of the read positions, -1 the last.

    Raises:
        InputError: there is no such prompt or position.
    """
    first = next(iter(comparison.readings.values()))
    if not -len(first.prompts) <= prompt < len(first.prompts):
        raise InputError(f"prompt {prompt} is not in this comparison: it has {len(first.prompts)}")
    prompt %= len(first.prompts)
    count = len(first.prompts[prompt].positions)
    if not -count <= position < count:
        raise InputError(f"position {position} is not among the {count} positions that were read")
    slot = position % count
    token = pictures.position_names(first.prompts[prompt])[slot]
    title = f"{visible(token)}, position {first.prompts[prompt].positions[slot]}"
    table = Table(box=None, pad_edge=False)
    table.add_column("site", style="dim", justify="right", no_wrap=True)
    for name in comparison.readings:
        table.add_column(Text(visible(name, space=" "), overflow="fold"))
    names = site_names(first.sites)
    for s in range(len(first.sites) - 1, -1, -1):
        table.add_row(names[s], *(_cell(reading, prompt, s, slot) for reading in comparison.readings.values()))
    unit = f"top {noun(first)}, its probability" + (", KL from the model in nats" if "kl" in first.arrays else "")
    return Group(Text(title, "bold"), table, Text(f"{model_name(first)}: {unit}", "dim"))


def _cell(reading: Reading, prompt: int, site: int, slot: int) -> Text:
    arrays = reading.arrays
    p = float(np.exp(arrays["top_logprob"][prompt, site, slot, 0]))
    label = cell_label(reading, int(arrays["top_id"][prompt, site, slot, 0]), prompt, slot)
    shade = Style(bgcolor=colour.background(p, dark=True), color=colour.foreground(p, dark=True))
    text = Text.assemble((f"{label} {percent(p)}", shade))
    if "kl" in arrays:
        text.append(f" {float(arrays['kl'][prompt, site, slot]):.2f}", "dim")
    return text


def grid_text(comparison: Comparison, width: int = 120) -> str:
    """The grid as plain text without colours."""
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, force_jupyter=False, legacy_windows=False)
    console.print(grid(comparison))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def save_figure(comparison: Comparison, path: str | Path, *, prompt: int = 0) -> Path:
    """Write `figure` to a file; the ending sets the format.

    Raises:
        InputError: another ending than .png, .svg or .pdf, no such prompt, no Matplotlib, or the file cannot be
            written.
    """
    return write_figure(path, lambda: figure(comparison, prompt=prompt))


def figure(comparison: Comparison, *, prompt: int = 0) -> Figure:
    """A heat map for each lens, sites by tokens, with one colour scale; the last layer is at the top.

    Raises:
        InputError: no such prompt, nothing was read for it, or Matplotlib is not installed.
    """
    readings = comparison.readings
    drawn = window()
    first = next(iter(readings.values()))
    prompt, _, _ = panel_size(first, prompt)
    sizes = [panel_size(reading, prompt) for reading in readings.values()]
    labels = [size[2] for size in sizes]
    widths = [max(size[1][0], 1.5) for size in sizes]
    drawn.set_size_inches(sum(widths) + 1.2 + 0.2 * len(widths), sizes[0][1][1] + 2.0)
    axes = drawn.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    for i, (name, reading) in enumerate(readings.items()):
        heat_map(axes[i], reading, prompt, labels[i], bar=False)
        axes[i].set_title(overlay.cut(visible(name, space=" "), 40), fontsize=8, parse_math=False)
        if i:
            axes[i].set_ylabel("")
            axes[i].tick_params(axis="y", labelleft=False)
    heat_map_bar = axes[0].collections[0]
    bar = drawn.colorbar(heat_map_bar, ax=list(axes), location="bottom", shrink=0.4, aspect=40, pad=0.02)
    bar.set_label(f"probability of the top {noun(first)}", fontsize=8)
    bar.ax.tick_params(labelsize=6.5)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    drawn.suptitle(model_name(first), fontsize=9, fontweight="bold", parse_math=False)
    return drawn
