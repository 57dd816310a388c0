"""The measures of the claims: from the tables of a run to a finding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from logitlab.intervals import bootstrap
from logitlab.studies.steerable_not_decodable.regression import gain_of_cosine
from logitlab.studies.study import Finding, Untestable

if TYPE_CHECKING:
    import pandas as pd

    from logitlab.studies.run import Run

SAND = "steerable, not decodable"
REVERSE = "decodable, not steerable"


FEWEST = 4
"""Tasks that an interval over tasks needs at least."""


def _enough(tasks: int) -> None:
    if tasks < FEWEST:
        raise Untestable(f"{tasks} tasks are too few for an interval over tasks; at least {FEWEST} are needed")


def controls_classified(run: Run) -> Finding:
    """Share of tasks of constructed models that are in the right cell."""
    table = run.table("constructed")
    right = (table["cell"] == table["expected"]).astype(float)
    wrong = table[right == 0]
    note = "; ".join(f"{r.model} {r.seed}, {r.task}: {r.cell}" for r in wrong.itertuples())
    return Finding(*bootstrap(right, seed=run.seed), note)


def gains(run: Run) -> pd.DataFrame:
    """For each task, in the template that steers best: what it can do from examples, and what steering gains."""
    import pandas as pd

    cells, outcomes, able = run.table("steering-cells"), run.table("steering-outcomes"), run.table("abilities")
    rows: list[dict[str, Any]] = []
    for name in cells["task"].unique():
        mine = cells[cells["task"] == name]
        best = int(mine.loc[mine["best_choosing"].idxmax()]["template"])
        here = outcomes[(outcomes["task"] == name) & (outcomes["template"] == best)]
        seen = able[(able["task"] == name) & (able["template"] == best)]
        row: dict[str, Any] = {"task": name, "template": best}
        row |= {"few_shot": float(seen["few_shot"].mean()), "bare": float(seen["bare"].mean())}
        for over in ("plain", "random", *(["other"] if "other" in here else [])):
            gain = bootstrap(here["steered"].to_numpy() - here[over].to_numpy(), seed=run.seed)
            row |= {f"over_{over}": gain.value, f"over_{over}_low": gain.low, f"over_{over}_high": gain.high}
        rows.append(row)
    return pd.DataFrame(rows)


def vectors_steer(run: Run) -> Finding:
    """Number of tasks that the model can do and in which steering beats both controls."""
    table = gains(run)
    able = table[table["few_shot"] - table["bare"] >= 0.10]
    if len(able) < 3:
        raise Untestable(f"the model can do {len(able)} of {len(table)} tasks from examples; at least 3 are needed")
    works = able[(able["over_plain_low"] > 0) & (able["over_random_low"] > 0)]
    count = float(len(works))
    return Finding(count, count, count, len(able), f"of {len(able)} tasks that it can do: {', '.join(works['task'])}")


def steerable_not_decodable(run: Run) -> Finding:
    """Number of tasks in the cell."""
    table = run.table("summary")
    found = table[table["cell"] == SAND]
    count = float(len(found))
    return Finding(count, count, count, len(table), ", ".join(found["task"]))


def reverse_is_rare(run: Run) -> Finding:
    """Share of the cell minus share of the reverse one."""
    table = run.table("summary")
    _enough(len(table))
    lean = (table["cell"] == SAND).astype(float) - (table["cell"] == REVERSE).astype(float)
    note = f"{int((lean > 0).sum())} and {int((lean < 0).sum())} of {len(table)} tasks"
    return Finding(*bootstrap(lean, seed=run.seed), note)


def steering_exceeds_reading(run: Run) -> Finding:
    """Lens accuracy minus steering accuracy, over tasks and templates."""
    from scipy.stats import wilcoxon

    cells, read = run.table("steering-cells"), run.table("decodability")
    _enough(cells["task"].nunique())
    best = read.groupby(["task", "template"])["top10"].max()
    pairs = list(zip(cells["task"], cells["template"], strict=True))
    gap = np.array([float(best[pair]) for pair in pairs]) - cells["steered"].to_numpy(float)
    low = int(gap.argmin())
    note = f"lowest {gap[low]:.2f} ({pairs[low][0]}, template {pairs[low][1]})"
    if np.any(gap != 0):
        test: Any = wilcoxon(gap)
        note += f"; Wilcoxon over {len(gap)} tasks and templates, p = {float(test.pvalue):.2g}"
    return Finding(*bootstrap(gap, groups=cells["task"], seed=run.seed), note)


def tuned_lens_persists(run: Run) -> Finding:
    """Share of the cell's tasks that the tuned lens does not read."""
    table = run.table("summary")
    cell = table[table["cell"] == SAND]
    if len(cell) < 3:
        raise Untestable(f"{len(cell)} tasks are steerable and not decodable; at least 3 are needed")
    stay = cell["rung"] != "tuned lens"
    return Finding(*bootstrap(stay.astype(float), seed=run.seed), f"{int(stay.sum())} of {len(cell)} tasks")


def probe_reads_some(run: Run) -> Finding:
    """Share of steerable tasks beyond both lenses that the probe reads."""
    table = run.table("summary")
    beyond = table[table["rung"].isin(["MLP probe", "invisible"])]
    if len(beyond) < 3:
        raise Untestable(
            f"{len(beyond)} steerable tasks are beyond both lenses and have labels that a probe can know; at least 3 "
            "are needed"
        )
    read = beyond["rung"] == "MLP probe"
    return Finding(*bootstrap(read.astype(float), seed=run.seed), f"{int(read.sum())} of {len(beyond)} tasks")


def vectors_incoherent(run: Run) -> Finding:
    """Share of a vector's first tokens that begin an answer, where it steers well."""
    cells, vectors = run.table("steering-cells"), run.table("vectors")
    high = run.parameters.high
    well = cells[cells["steered"] >= high]
    if not len(well):
        raise Untestable(f"no vector steers at least {high:.2f} of the inputs; the best {cells['steered'].max():.2f}")
    said = vectors.set_index(["task", "template", "site"])["correct_output_fraction"]
    found = [float(said[r.task, r.template, r.site]) for r in well.itertuples()]
    note = f"{len(well)} templates of {well['task'].nunique()} tasks; largest {max(found):.2f}"
    return Finding(*bootstrap(found, groups=well["task"], seed=run.seed), note)


def cosine_says_little(run: Run) -> Finding:
    """Gain of R² by the cosine."""
    table = run.table("transfer")
    table = table[table["source"] != table["target"]]
    names = sorted(table["task"].unique())
    _enough(len(names))
    value = gain_of_cosine(table)
    rng = np.random.default_rng(run.seed)
    by_task = {name: table[table["task"] == name] for name in names}
    drawn: list[float] = []
    for _ in range(500):
        drawn.append(gain_of_cosine([by_task[names[i]] for i in rng.integers(len(names), size=len(names))]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    tests = run.table("regression")
    p = tests[tests["what"] == "gain by cosine"]["p"].iloc[0]
    # A gain is never negative, so resamples lie above it where there is nothing to gain.
    note = f"permutation p = {float(p):.3g}" + ("; the estimate lies outside of its interval" if value < low else "")
    return Finding(value, min(float(low), value), max(float(high), value), len(names), note)


def steering_makes_readable(run: Run) -> Finding:
    """Largest gain of the lens after the vector minus that after a random one."""
    cells, after = run.table("steering-cells"), run.table("after-steering")
    best = cells.loc[cells.groupby("task", sort=False)["best_choosing"].idxmax()]
    found: list[float] = []
    peaks: dict[str, float] = {}
    for r in best.itertuples():
        if not float(str(r.steered)) > run.parameters.threshold:
            continue
        here = after[(after["task"] == r.task) & (after["template"] == r.template)]
        gain = float((here["steered"] - here["plain"]).max())
        found.append(gain - float((here["random"] - here["plain"]).max()))
        peaks[str(r.task)] = float(here["steered"].max())
    if len(found) < 3:
        raise Untestable(f"{len(found)} tasks are steerable in their best template; at least 3 are needed")
    kinds = {"emerged": 0, "partial": 0, "absent": 0}
    for peak in peaks.values():
        kinds["emerged" if peak >= 0.3 else "partial" if peak >= 0.1 else "absent"] += 1
    note = (
        "after steering " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()) + f"; largest gain {max(found):+.2f}"
    )
    return Finding(*bootstrap(found, seed=run.seed), note)


def patching_recovers(run: Run) -> Finding:
    """Share of failed transfers that the source's state recovers."""
    table = run.table("patching")
    if not len(table):
        raise Untestable("no transfer between templates with similar vectors failed while the source steers")
    best = table.groupby(["task", "source", "target"], sort=False).agg(
        recovery=("recovery", "max"), iid=("iid", "first")
    )
    if len(best) < 5:
        raise Untestable(f"{len(best)} such transfers; at least 5 are needed")
    good = (best["recovery"] >= 0.5 * best["iid"]).astype(float)
    return Finding(
        *bootstrap(good, groups=best.index.get_level_values("task"), seed=run.seed),
        f"{int(good.sum())} of {len(best)} transfers; mean recovery {best['recovery'].mean():.2f}",
    )
