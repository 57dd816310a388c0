"""What probes have found, by site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import xarray as xr
    from rich.table import Table

Array = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class ProbeReport:
    """Held-out accuracy of a probe at each site, and what it is held against.

    Intervals are 95 % percentile intervals over bootstrap resamples of the held-out groups. They say how far other
    held-out groups would change the numbers, not what another draw of control labels or other training rows would.
    Folds share training rows, so with ``folds=5`` the intervals are a little narrow (on noise about nine of ten hold
    the truth). With one held-out share, ``folds=0.3``, about 0.95 of them hold it only from 20 held-out groups on;
    with fewer groups they are too narrow: in simulations of several kinds of groups 0.77 to 0.87 held it with 4 groups,
    0.84 to 0.92 with 6, and 0.88 to 0.92 with 12.

    Attributes:
        sites: names of the sites, in order of depth.
        accuracy: [sites], share of held-out rows whose label is among the probe's first ``top_k``.
        low: [sites], lower end of its interval.
        high: [sites], upper end.
        control: [sites], the same for the control task; NaN without one.
        control_low: [sites].
        control_high: [sites].
        selectivity: [sites], accuracy less control; its interval is paired.
        selectivity_low: [sites].
        selectivity_high: [sites].
        p: [sites], ``(1 + n) / (1 + permutations)``, with n the permutations of the labels with which the probe did
            as well or better; NaN without permutations, or where labels cannot be permuted. ``about["permuted"]``
            says what was permuted. It is not corrected for the number of sites.
        baseline: accuracy of always naming the ``top_k`` most frequent labels of the held-out rows.
        label_overlap: share of held-out rows whose label occurs in the training part; others cannot be right.
        about: how it came about: kind, options, splits, seed, model, versions. Plain values.

    Example:
        ``report = ll.probe(model, texts, labels); report.best, report.figure("probe.png")``
    """

    sites: tuple[str, ...]
    accuracy: Array
    low: Array
    high: Array
    control: Array
    control_low: Array
    control_high: Array
    selectivity: Array
    selectivity_low: Array
    selectivity_high: Array
    p: Array
    baseline: float
    label_overlap: float
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def best(self) -> str:
        """The site with the highest accuracy, of equal ones the first.

        Its accuracy is the largest of several, and so a little too high: check it on other data.
        """
        return self.sites[int(self.accuracy.argmax())]

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each site, with all numbers."""
        for i, site in enumerate(self.sites):
            row: dict[str, Any] = {"site": site}
            row |= {name: float(getattr(self, name)[i]) for name in BY_SITE}
            yield row | {"baseline": self.baseline, "label_overlap": self.label_overlap}

    def data(self) -> xr.Dataset:
        """All numbers as labelled arrays over ``site``; ``baseline`` and ``label_overlap`` have no dimension."""
        import xarray as xr

        found: dict[str, Any] = {name: ("site", getattr(self, name)) for name in BY_SITE}
        found |= {"baseline": self.baseline, "label_overlap": self.label_overlap}
        return xr.Dataset(found, coords={"site": list(self.sites)}, attrs=dict(self.about))

    def table(self) -> Table:
        """A row for each site, for a terminal."""
        from logitlab.views.probes import table

        return table(self)

    def figure(self, path: str | Path) -> Path:
        """Write accuracy, control and baseline over the sites; the ending (.png, .svg, .pdf) sets the format.

        Raises:
            InputError: another ending, Matplotlib is not installed, or the file cannot be written.
        """
        from logitlab.views.probes import save_figure

        return save_figure(self, path)

    def __rich__(self) -> Table:
        return self.table()

    def __repr__(self) -> str:
        from logitlab.views.probes import table_text

        return table_text(self)


BY_SITE = (
    "accuracy",
    "low",
    "high",
    "control",
    "control_low",
    "control_high",
    "selectivity",
    "selectivity_low",
    "selectivity_high",
    "p",
)
"""The numbers that there are for each site."""
