"""What tells whether a vector of one template steers another: its length, its cosine, the task's difficulty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def gain_of_cosine(table: pd.DataFrame | Sequence[pd.DataFrame]) -> float:
    """R² of transfer accuracy by difficulty and cosine, minus that by difficulty alone.

    Args:
        table: transfers with ``difficulty``, ``accuracy`` and ``cosine``; or several such tables, of which one may come
            several times.
    """
    parts = [table] if isinstance(table, pd.DataFrame) else list(table)
    y, hard, cosine = (
        np.concatenate([part[name].to_numpy(float) for part in parts]) for name in ("accuracy", "difficulty", "cosine")
    )
    return r_squared(y, hard, cosine) - r_squared(y, hard)


def r_squared(y: NDArray[np.float64], *columns: NDArray[np.float64]) -> float:
    """Share of the variance that ordinary least squares with an intercept explains; 0 where there is none."""
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0:
        return 0.0
    design = np.column_stack([np.ones_like(y), *columns])
    fit, *_ = np.linalg.lstsq(design, y, rcond=None)
    return 1.0 - float(((y - design @ fit) ** 2).sum()) / total


def regressions(table: pd.DataFrame, vectors: pd.DataFrame, permutations: int, seed: int) -> pd.DataFrame:
    """Correlations and the hierarchical regression, a row each.

    Args:
        table: transfers between different templates.
        vectors: for each task and site the share of variance of the templates' vectors along their first component.
        permutations: of the cosine within tasks, for the p-value of its gain.
        seed: of the permutations.
    """
    from scipy.stats import pearsonr, ttest_ind

    rows: list[dict[str, Any]] = []

    def correlation(what: str, x: pd.Series, y: pd.Series) -> None:
        if len(x) > 2 and x.nunique() > 1 and y.nunique() > 1:
            found: Any = pearsonr(x, y)
            low, high = found.confidence_interval()
            row = {"value": float(found.statistic), "low": float(low), "high": float(high), "p": float(found.pvalue)}
            rows.append({"what": what, **row, "n": len(x)})

    correlation("norm and transfer, all", table["norm"], table["accuracy"])
    correlation("cosine and transfer, all", table["cosine"], table["accuracy"])
    for task, part in table.groupby("task", sort=False):
        correlation(f"cosine and transfer, {task}", part["cosine"], part["accuracy"])
    for layer, part in table.groupby("layer"):
        correlation(f"cosine and transfer, layer {layer}", part["cosine"], part["accuracy"])
    y = table["accuracy"].to_numpy(float)
    hard = table["difficulty"].to_numpy(float)
    task = table.groupby("task")["accuracy"].transform("mean").to_numpy(float)
    cosine = table["cosine"].to_numpy(float)
    first, second = r_squared(y, hard), r_squared(y, hard, cosine)
    third = r_squared(y, hard, cosine, hard * cosine)
    rng = np.random.default_rng(seed)
    own = table.groupby("task").indices
    more = 0
    for _ in range(permutations):
        mixed = cosine.copy()
        for index in own.values():
            mixed[index] = cosine[rng.permutation(index)]
        more += r_squared(y, hard, mixed) - first >= second - first
    rows += [
        {"what": "R² by difficulty", "value": first, "n": len(y)},
        {"what": "gain by cosine", "value": second - first, "p": (1 + more) / (1 + permutations), "n": len(y)},
        {"what": "gain by their product", "value": third - second, "n": len(y)},
        {"what": "gain by cosine within tasks", "value": r_squared(y, task, cosine) - r_squared(y, task), "n": len(y)},
    ]
    same, other = (table[table["same_style"] == flag]["accuracy"] for flag in (True, False))
    if len(same) > 1 and len(other) > 1:
        found: Any = ttest_ind(same, other, equal_var=False)
        gap = float(same.mean() - other.mean())
        rows.append({"what": "within minus across styles", "value": gap, "p": float(found.pvalue), "n": len(y)})
    for task, part in vectors.groupby("task", sort=False):
        share = float(part["share"].mean())
        rows.append({"what": f"first component of templates, {task}", "value": share, "n": len(part)})
    return pd.DataFrame(rows, columns=["what", "value", "low", "high", "p", "n"])
