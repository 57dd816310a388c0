"""What a sweep has found: means with intervals, histograms, calibration; by lens, group and site."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logitlab.errors import InputError
from logitlab.files import write_text
from logitlab.sweeps.sums import MEASURES, Sums

if TYPE_CHECKING:
    import pandas as pd

REPORT = "report.json"
FORMAT = 1
ALL = "all"
"""The group that every token is in."""


@dataclass(frozen=True)
class Measure:
    """A mean over tokens.

    Attributes:
        mean: the mean; NaN of no token.
        low: lower end of the 95 % interval.
        high: upper end of it.
        tokens: how many tokens.
    """

    mean: float
    low: float
    high: float
    tokens: int


@dataclass
class SweepReport:
    """What a sweep has found.

    Intervals are of 95 % and take windows, not tokens, as independent: the mean is a ratio of two sums over windows,
    whose variance is estimated from how the windows differ, and Student's t with one degree of freedom less than
    windows gives the width.

    Attributes:
        sites: the sites, in order of depth.
        sums: by lens and group (``all`` has every token), the sums.
        about: how it came about: model, lenses, corpus, settings, counts. Plain values.

    Example:
        ``report.measure("kl", "logit lens", "12.resid_post").mean``
    """

    sites: list[str]
    sums: dict[str, dict[str, Sums]]
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def lenses(self) -> list[str]:
        """Names of the lenses."""
        return list(self.sums)

    @property
    def groups(self) -> list[str]:
        """Names of the groups, ``all`` first."""
        return list(next(iter(self.sums.values())))

    @property
    def measures(self) -> list[str]:
        """Names of the measures that there are."""
        total = next(iter(self.sums.values()))[ALL].moments
        return [name for m, name in enumerate(MEASURES) if total[m, 1].any()]

    def measure(self, name: str, lens: str | None = None, site: str | int = -1, group: str = ALL) -> Measure:
        """One mean with its interval.

        Args:
            name: one of `MEASURES`.
            lens: name of a lens; None for the first.
            site: name of a site, or its place among the sites.
            group: name of a group.

        Raises:
            InputError: there is no such thing in this report.
        """
        sums = self._of(lens, group)
        if name not in MEASURES:
            raise InputError(f"there is no measure {name!r}; there are {', '.join(MEASURES)}")
        return _measure(sums, MEASURES.index(name), self._site(site))

    def ranks(self, lens: str | None = None, site: str | int = -1, group: str = ALL) -> np.ndarray:
        """Tokens by the rank of the next token: bin i has the ranks from 2**i to 2**(i + 1) - 1."""
        return self._of(lens, group).ranks[self._site(site)]

    def depths(self, lens: str | None = None, group: str = ALL) -> np.ndarray:
        """Tokens by the site from which on their top token is the model's own (Belrose et al. 2023, section 5)."""
        return self._of(lens, group).depths

    def calibration(self, lens: str | None = None, site: str | int = -1, group: str = ALL) -> np.ndarray:
        """[15, 3]: by bins of confidence, tokens, their mean confidence, and the share that was right (NaN of none)."""
        count, sure, right = self._of(lens, group).calibration[self._site(site)].T
        with np.errstate(invalid="ignore"):
            return np.stack([count, sure / count, right / count], axis=1)

    def calibration_error(self, lens: str | None = None, site: str | int = -1, group: str = ALL) -> float:
        """Expected calibration error (Guo et al. 2017, equation 3), over 15 bins of the same width."""
        count, sure, right = self.calibration(lens, site, group).T
        return float(np.nansum(count * np.abs(sure - right)) / count.sum()) if count.sum() else math.nan

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each lens, group and site, with all means and intervals."""
        for lens, groups in self.sums.items():
            for group, sums in groups.items():
                for i, site in enumerate(self.sites):
                    row: dict[str, Any] = {"lens": lens, "group": group, "site": site}
                    for name in self.measures:
                        found = _measure(sums, MEASURES.index(name), i)
                        row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
                    row["calibration_error"] = self.calibration_error(lens, i, group)
                    row["tokens"] = int(sums.moments[MEASURES.index("agreement"), 1, i])
                    row["windows"] = sums.windows
                    yield row

    def to_pandas(self) -> pd.DataFrame:
        """`rows` as a table."""
        import pandas as pd

        return pd.DataFrame(list(self.rows()))

    def save(self, folder: str | Path) -> Path:
        """Write the report into a folder; the same numbers give the same bytes.

        Raises:
            InputError: it cannot be written.
        """
        record = {
            "format": FORMAT,
            "about": self.about,
            "sites": self.sites,
            "measures": list(MEASURES),
            "sums": {
                lens: {group: {k: v.tolist() for k, v in sums.arrays().items()} for group, sums in groups.items()}
                for lens, groups in self.sums.items()
            },
        }
        return write_text(Path(folder) / REPORT, json.dumps(record) + "\n")

    @staticmethod
    def load(folder: str | Path) -> SweepReport:
        """Read what `save` wrote.

        Raises:
            InputError: it is not there, or damaged.
        """
        file = Path(folder) / REPORT
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise TypeError("it is no object")
            if record["format"] != FORMAT or record["measures"] != list(MEASURES):
                raise InputError(f"{file} was written by another version of logitlab: run the sweep again")
            sums = {
                lens: {
                    group: Sums.of_arrays({k: np.array(v, dtype=_TYPES[k]) for k, v in arrays.items()})
                    for group, arrays in groups.items()
                }
                for lens, groups in record["sums"].items()
            }
            return SweepReport(record["sites"], sums, record["about"])
        except FileNotFoundError as error:
            raise InputError(f"there is no finished sweep in {folder}: {REPORT} is missing") from error
        except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error

    def _of(self, lens: str | None, group: str) -> Sums:
        lens = self.lenses[0] if lens is None else lens
        if lens not in self.sums:
            raise InputError(f"there is no lens {lens!r} in this sweep; there are {', '.join(self.lenses)}")
        if group not in self.sums[lens]:
            raise InputError(f"there is no group {group!r} in this sweep; there are {_some(self.groups)}")
        return self.sums[lens][group]

    def _site(self, site: str | int) -> int:
        if isinstance(site, int):
            if not -len(self.sites) <= site < len(self.sites):
                raise InputError(f"there is no site number {site}: this sweep has {len(self.sites)}")
            return site % len(self.sites)
        if site not in self.sites:
            raise InputError(f"there is no site {site!r} in this sweep; there are {_some(self.sites)}")
        return self.sites.index(site)


_TYPES = {
    "windows": np.int64,
    "moments": np.float64,
    "ranks": np.int64,
    "depths": np.int64,
    "calibration": np.float64,
}


def _measure(sums: Sums, measure: int, site: int) -> Measure:
    s, n, ss, sn, nn, windows = (float(v) for v in sums.moments[measure, :, site])
    if n == 0:
        return Measure(math.nan, math.nan, math.nan, 0)
    mean = s / n
    if windows < 2:
        return Measure(mean, math.nan, math.nan, int(n))
    spread = max(0.0, ss - 2 * mean * sn + mean * mean * nn)
    error = math.sqrt(windows / (windows - 1) * spread) / n
    width = student(int(windows) - 1) * error
    return Measure(mean, mean - width, mean + width, int(n))


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by its expansion in 1 / freedom (Abramowitz and Stegun, 26.7.5)."""
    few = (12.706204736, 4.302652730, 3.182446305, 2.776445105, 2.570581836)
    if freedom <= len(few):
        return few[freedom - 1]
    z, v = 1.959963984540054, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
