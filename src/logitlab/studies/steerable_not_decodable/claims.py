"""The measures of the claims: from the tables of a run to a finding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from logitlab.intervals import bootstrap, proportion
from logitlab.studies.steerable_not_decodable.regression import gain_of_cosine
from logitlab.studies.steerable_not_decodable.steps import gain_of, with_difficulty
from logitlab.studies.study import Finding, Untestable

if TYPE_CHECKING:
    from logitlab.studies.run import Run

SAND = "steerable, not decodable"
REVERSE = "decodable, not steerable"
CELLS = (SAND, REVERSE, "both succeed", "both fail")


FEWEST = 4
"""Tasks that an interval over tasks needs at least."""


def _enough(tasks: int) -> None:
    if tasks < FEWEST:
        raise Untestable(f"{tasks} tasks are too few for an interval over tasks; at least {FEWEST} are needed")


def controls_classified(run: Run) -> Finding:
    """Number of tasks of constructed models that are in a wrong cell."""
    table = run.table("constructed")
    wrong = table[table["cell"] != table["expected"]]
    note = "; ".join(f"{r.model} {r.seed}, {r.task}: {r.cell}" for r in wrong.itertuples())
    return _count(len(wrong), len(table), note or f"all of {len(table)} are right")


def vectors_steer(run: Run) -> Finding:
    """Number of tasks that the model can do and in which steering beats every control."""
    table = run.table("summary")
    able = table[table["few_shot"] - table["bare"] >= run.parameters.gate]
    if len(able) < 3:
        raise Untestable(f"the model can do {len(able)} of {len(table)} tasks from examples; at least 3 are needed")
    works = able[able["steers"]]
    return _count(len(works), len(able), f"of {len(able)} tasks that it can do: {', '.join(works['task'])}")


def steerable_not_decodable(run: Run) -> Finding:
    """Number of tasks in the cell."""
    table = run.table("summary")
    _enough(int(table["cell"].isin(CELLS).sum()))
    found = table[table["cell"] == SAND]
    by_paper = int((table["paper_cell"] == SAND).sum())
    named = f" ({', '.join(found['task'])})" if len(found) else ""
    note = (
        f"of {int(table['cell'].isin(CELLS).sum())} tasks{named}; {by_paper} by the paper's rule; {_by_template(run)}"
    )
    return _count(len(found), int(table["cell"].isin(CELLS).sum()), note)


def _by_template(run: Run) -> str:
    """The same cell template by template, where a lens has no choice among them; no claim rests on it."""
    cells, read, known = run.table("steering-cells"), run.table("decodability"), run.table("summary")
    best = read.groupby(["task", "template"])["top10"].max()
    able = set(known[known["cell"].isin(CELLS)]["task"])
    rows = [gain_of(run, r.task, r.template) for r in cells.itertuples() if r.task in able]  # pyright: ignore[reportArgumentType]
    rows = [row for row in rows if row["able"]]
    found = [r for r in rows if r["steers"] and best[r["task"], r["template"]] <= run.parameters.threshold]
    named = ", ".join(f"{r['task']} T{r['template']}" for r in found)
    return f"taken template by template {len(found)} of {len(rows)}" + (f": {named}" if found else "")


def reverse_is_rare(run: Run) -> Finding:
    """Share of the cell minus share of the reverse one."""
    table = run.table("summary")
    table = table[table["cell"].isin(CELLS)]
    _enough(len(table))
    lean = (table["cell"] == SAND).astype(float) - (table["cell"] == REVERSE).astype(float)
    note = f"{int((lean > 0).sum())} and {int((lean < 0).sum())} of {len(table)} tasks"
    return Finding(*bootstrap(lean, seed=run.seed), note)


def steering_exceeds_reading(run: Run) -> Finding:
    """Lens accuracy minus steering accuracy, over tasks and templates."""
    from scipy.stats import wilcoxon

    cells, read = run.table("steering-cells"), run.table("decodability")
    known = run.table("summary")
    cells = cells[cells["task"].isin(known[known["cell"].isin(CELLS)]["task"])]
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
    stay = int((cell["rung"] != "tuned lens").sum())
    return Finding(*proportion(stay, len(cell)), f"{stay} of {len(cell)} tasks")


def probe_reads_some(run: Run) -> Finding:
    """Share of steerable tasks beyond both lenses that the probe reads."""
    table = run.table("summary")
    beyond = table[(table["cell"] == SAND) & table["rung"].isin(["MLP probe", "invisible"])]
    beyond = beyond[beyond["label_overlap"] >= 0.5]
    if len(beyond) < 3:
        raise Untestable(
            f"{len(beyond)} steerable tasks are beyond both lenses and have labels that a probe can know; at least 3 "
            "are needed"
        )
    read = int((beyond["rung"] == "MLP probe").sum())
    return Finding(*proportion(read, len(beyond)), f"{read} of {len(beyond)} tasks")


def vectors_incoherent(run: Run) -> Finding:
    """Share of a vector's first tokens that begin an answer, where it steers well."""
    cells, vectors = run.table("steering-cells"), run.table("vectors")
    high = run.parameters.high
    well = cells[cells["steered"] >= high]
    if well["task"].nunique() < FEWEST:
        raise Untestable(
            f"vectors of {well['task'].nunique()} tasks steer at least {high:.2f} of the inputs; {FEWEST} are needed"
        )
    at = vectors.set_index(["task", "template", "site"])
    found = [float(at["correct_output_fraction"][r.task, r.template, r.site]) for r in well.itertuples()]
    chance = [float(at["random_fraction"][r.task, r.template, r.site]) for r in well.itertuples()]
    note = f"{len(well)} templates of {well['task'].nunique()} tasks; largest {max(found):.2f}; "
    note += f"random vectors {np.mean(chance):.3f}"
    return Finding(*bootstrap(found, groups=well["task"], seed=run.seed), note)


def cosine_says_little(run: Run) -> Finding:
    """Gain of R² by the cosine."""
    table = run.table("transfer")
    table = with_difficulty(run, table[table["source"] != table["target"]])
    names = sorted(table["task"].unique())
    _enough(len(names))
    value = gain_of_cosine(table)
    rng = np.random.default_rng(run.seed)
    by_task = {name: table[table["task"] == name] for name in names}
    drawn = [gain_of_cosine([by_task[names[i]] for i in rng.integers(len(names), size=len(names))]) for _ in range(500)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    tests = run.table("regression")
    p = tests[tests["what"] == "gain by cosine"]["p"].iloc[0]
    # A gain is never negative, so that resamples lie above it where there is nothing to gain.
    note = f"permutation p = {float(p):.3g}" + ("; the estimate lies outside of its interval" if value < low else "")
    return Finding(value, min(float(low), value), max(float(high), value), len(names), note)


def steering_makes_readable(run: Run) -> Finding:
    """Largest gain of the lens between the vector's site and the last layer, minus that after a random vector."""
    table, after, cells = run.table("summary"), run.table("after-steering"), run.table("steering-cells")
    last = int(run.manifest["model"]["layers"])
    found: list[float] = []
    kinds = {"emerged": 0, "partial": 0, "absent": 0, "amplified": 0}
    first: list[int] = []
    for r in table[table["steers"]].to_dict("records"):
        task, template = r["task"], r["template"]
        at = int(cells[(cells["task"] == task) & (cells["template"] == template)]["layer"].iloc[0])
        here = after[(after["task"] == task) & (after["template"] == template)]
        here = here[(here["layer"] > at) & (here["layer"] < last)].sort_values("layer")
        if not len(here):
            continue
        found.append(float((here["steered"] - here["plain"]).max()) - float((here["random"] - here["plain"]).max()))
        peak = float(here["steered"].max())
        known = r["logit_lens"] > run.parameters.threshold
        kinds["amplified" if known else "emerged" if peak >= 0.3 else "partial" if peak >= 0.1 else "absent"] += 1
        first += here[here["steered"] > run.parameters.threshold]["layer"].tolist()[:1]
    if len(found) < FEWEST:
        raise Untestable(f"{len(found)} tasks steer below the last two layers that are looked at; {FEWEST} are needed")
    note = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n) + f"; largest {max(found):+.2f}"
    if first:
        note += f"; first read at layers {', '.join(map(str, sorted(first)))} of {last}"
    return Finding(*bootstrap(found, seed=run.seed), note)


def patching_recovers(run: Run) -> Finding:
    """Share of failed transfers that the source's state recovers, beyond another input's state."""
    table = run.table("patching")
    table = table[table["layer"] < int(run.manifest["model"]["layers"])]
    if not len(table):
        raise Untestable("no transfer between templates with similar vectors failed while the source steers")
    _enough(table["task"].nunique())
    gain = table["recovery"] - table[["other", "bare"]].max(axis=1)
    good = table.assign(good=gain >= 0.5 * table["iid"])
    best = good.groupby(["task", "source", "target"], sort=False).agg(
        good=("good", "max"), recovery=("recovery", "max")
    )
    by_task = best["good"].astype(float).groupby("task").mean()
    return Finding(
        *proportion(int((by_task > 0.5).sum()), len(by_task)),
        f"{int(best['good'].sum())} of {len(best)} transfers; mean recovery {best['recovery'].mean():.2f}",
    )


def _count(found: int, n: int, note: str) -> Finding:
    """A number of things, which has no interval."""
    return Finding(float(found), float(found), float(found), n, f"a count, without an interval; {note}")
