"""A patching as a heat map, coloured by the recovery: sites by positions, or senders by receivers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from logitlab.errors import InputError
from logitlab.interventions.patching import Patching
from logitlab.interventions.paths import Paths
from logitlab.views import overlay
from logitlab.views.figure import window, write_figure
from logitlab.views.tokens import site_names, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

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
    _check_pair(pair, count)
    if pair is None and len(set(found.positions)) > 1:
        raise InputError("the pairs have other positions, so there is no mean of them: choose one with pair=")
    one = 0 if pair is None else pair % count
    positions = found.positions[one]
    values = _values(found.recovery, pair)[:, : len(positions)]
    drawn = window()
    sites = len(found.sites)
    drawn.set_size_inches(max(3.0, min(0.35 * len(positions), 14) + 1.5), max(2.0, min(0.17 * sites, 12)) + 1.4)
    axes = drawn.subplots()
    image = _heat(axes, values, least=1.0)
    tokens = [overlay.cut(visible(found.tokens[one][p]), 12) for p in positions]
    many = len(positions) > _MOST
    step = max(1, len(positions) // 12) if many else 1
    same = pair is not None or len(set(found.tokens)) == 1
    names = tokens if same and not many else [str(p) for p in positions]
    axes.set_xticks(range(0, len(positions), step), names[::step], rotation=90, fontsize=7)
    labels = site_names(found.sites)
    every = max(1, sites // 40)
    axes.set_yticks(range(0, sites, every), labels[::every], fontsize=7)
    _finish(drawn, axes, image, found, pair)
    return drawn


def save_paths(found: Paths, path: str | Path, *, pair: int | None = None) -> Path:
    """Write `paths_figure` to a file; the ending sets the format.

    Raises:
        InputError: another ending than .png, .svg or .pdf, no such pair, no Matplotlib, or it cannot be written.
    """
    return write_figure(path, lambda: paths_figure(found, pair=pair))


def paths_figure(found: Paths, *, pair: int | None = None) -> Figure:
    """Senders by receivers, the last layer at the top and at the right; grey where there is no edge.

    The colours end at the largest value: one edge of many seldom recovers all.

    Args:
        found: the path patching.
        pair: number of the pair; by default the mean of all.

    Raises:
        InputError: there is no such pair.
    """
    _check_pair(pair, len(found.clean))
    drawn = window()
    senders, receivers = len(found.senders), len(found.receivers)
    drawn.set_size_inches(max(3.0, min(0.3 * receivers, 14) + 2.0), max(2.0, min(0.17 * senders, 12)) + 1.6)
    axes = drawn.subplots()
    axes.set_facecolor("0.85")
    image = _heat(axes, _values(found.recovery, pair))
    for names, axis in ((found.receivers, axes.xaxis), (found.senders, axes.yaxis)):
        every = max(1, len(names) // 40)
        axis.set_ticks(range(0, len(names), every), site_names(names)[::every], fontsize=7)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("receiver", fontsize=8)
    axes.set_ylabel("sender", fontsize=8)
    _finish(drawn, axes, image, found, pair)
    return drawn


def _check_pair(pair: int | None, count: int) -> None:
    if pair is not None and not -count <= pair < count:
        raise InputError(f"pair {pair} is not in this patching: it has {count}")


def _values(recovery: NDArray[np.float64], pair: int | None) -> NDArray[np.float64]:
    """Of one pair, or the mean of those that have a recovery."""
    if pair is not None:
        return recovery[pair]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mean of empty slice")  # of pairs that do not differ
        return np.nanmean(recovery, axis=0)


def _heat(axes: Axes, values: NDArray[np.float64], least: float = 0.0) -> AxesImage:
    """Coloured up to the largest value, or to ``least``."""
    largest = max(least, float(np.nanmax(np.abs(values)))) if np.isfinite(values).any() else least
    largest = largest or 1.0
    return axes.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto", origin="lower")


def _finish(drawn: Figure, axes: Axes, image: AxesImage, found: Patching | Paths, pair: int | None) -> None:
    """Plain labels, the scale and the title."""
    for text in axes.get_xticklabels():
        text.set_parse_math(False)
    bar = drawn.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("recovery: 0 corrupted, 1 clean", fontsize=8)
    count = len(found.clean)
    one = 0 if pair is None else pair % count
    what = f"mean of {count} pairs" if pair is None and count > 1 else f"pair {one}" if count > 1 else ""
    title = ", ".join(part for part in (found.about.get("model", ""), found.about.get("mode", ""), what) if part)
    axes.set_title(title, fontsize=9, parse_math=False)
