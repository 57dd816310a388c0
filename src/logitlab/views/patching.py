"""A patching as a heat map: sites by positions, coloured by the recovery."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from logitlab.errors import InputError
from logitlab.interventions.patching import Patching
from logitlab.views import overlay
from logitlab.views.figure import window, write_figure
from logitlab.views.tokens import site_names, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 40  # positions beyond which tokens are not written out


def save_figure(found: Patching, path: str | Path, *, pair: int | None = None) -> Path:
    """Write `figure` to a file; the ending sets the format.

    Raises:
        InputError: another ending than .png, .svg or .pdf, no such pair, no Matplotlib, or it cannot be written.
    """
    return write_figure(path, lambda: figure(found, pair=pair))


def figure(found: Patching, *, pair: int | None = None) -> Figure:
    """Sites by positions, the last layer at the top.

    Args:
        found: the patching.
        pair: number of the pair; by default the mean of all, whose prompts must have as many positions.

    Raises:
        InputError: there is no such pair, or the pairs have other numbers of positions.
    """
    count = len(found.clean)
    if pair is not None and not -count <= pair < count:
        raise InputError(f"pair {pair} is not in this patching: it has {count}")
    if pair is None and len(set(found.positions)) > 1:
        raise InputError("the pairs have other positions, so there is no mean of them: choose one with pair=")
    one = 0 if pair is None else pair % count
    positions = found.positions[one]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mean of empty slice")  # of pairs that do not differ
        values = np.nanmean(found.recovery, axis=0) if pair is None else found.recovery[one]
    values = values[:, : len(positions)]
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    drawn = window()
    sites = len(found.sites)
    drawn.set_size_inches(max(3.0, min(0.35 * len(positions), 14) + 1.5), max(2.0, min(0.17 * sites, 12)) + 1.4)
    axes = drawn.subplots()
    image = axes.imshow(
        values, cmap="RdBu", vmin=-max(1.0, largest), vmax=max(1.0, largest), aspect="auto", origin="lower"
    )
    tokens = [overlay.cut(visible(found.tokens[one][p]), 12) for p in positions]
    many = len(positions) > _MOST
    step = max(1, len(positions) // 12) if many else 1
    same = pair is not None or len(set(found.tokens)) == 1
    names = tokens if same and not many else [str(p) for p in positions]
    axes.set_xticks(range(0, len(positions), step), names[::step], rotation=90, fontsize=7)
    labels = site_names(found.sites)
    every = max(1, sites // 40)
    axes.set_yticks(range(0, sites, every), labels[::every], fontsize=7)
    for text in axes.get_xticklabels():
        text.set_parse_math(False)
    bar = drawn.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("recovery: 0 corrupted, 1 clean", fontsize=8)
    what = f"mean of {count} pairs" if pair is None and count > 1 else f"pair {one}" if count > 1 else ""
    title = ", ".join(part for part in (found.about.get("model", ""), found.about.get("mode", ""), what) if part)
    axes.set_title(title, fontsize=9, parse_math=False)
    return drawn
