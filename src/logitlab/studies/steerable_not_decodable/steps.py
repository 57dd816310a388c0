"""The steps of the study: from a run and the name of a unit to tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from logitlab.errors import InputError
from logitlab.intervals import bootstrap
from logitlab.interventions import Vectors, add, replace
from logitlab.interventions.trials import Trials
from logitlab.probes import probe_states
from logitlab.studies.steerable_not_decodable import audit, controls, ladder, neutral
from logitlab.studies.steerable_not_decodable.tasks import STYLES, TASKS, Task
from logitlab.vectors.heads import head_effects

if TYPE_CHECKING:
    from logitlab.lenses import Lens
    from logitlab.models.sites import Site
    from logitlab.studies import Run


# -- what steps share --------------------------------------------------------------------------


def tasks(run: Run) -> list[str]:
    """Names of the tasks of a run."""
    unknown = next((name for name in run.parameters.tasks if name not in TASKS), None)
    if unknown is not None:
        raise InputError(f"there is no task {unknown!r}; there are {', '.join(TASKS)}")
    return list(run.parameters.tasks)


def templates(run: Run) -> list[int]:
    """Numbers of the templates of a run, from 0."""
    bad = next((t for t in run.parameters.templates if not 1 <= t <= len(STYLES)), None)
    different = set(run.parameters.templates)
    if bad is not None or len(different) < 2 or len(different) < len(run.parameters.templates):
        raise InputError(
            f"templates are {list(run.parameters.templates)}; give at least two of 1 to {len(STYLES)}, each once"
        )
    return [t - 1 for t in run.parameters.templates]


def split_of(run: Run, task: Task) -> audit.Split:
    """The pairs of a task by their use."""
    p = run.parameters
    return audit.Split.of(task.pairs, (p.shown, p.queries, p.choosing, p.testing), run.rng("split", task.name))


def seed_of(run: Run, *names: str | int) -> int:
    """A seed for what is drawn elsewhere."""
    return int(run.rng(*names).integers(2**31))


def sites_of(run: Run) -> list[Site]:
    """The sites of the study."""
    return audit.sites_of(run.model, run.parameters.layer_step)


def kept_vectors(run: Run, task: str) -> list[Vectors]:
    """The function vectors of a task, by template."""
    model, arrays = run.model, run.arrays(f"vectors-{task}")
    names = [str(site) for site in sites_of(run)]
    recipe = {"study": run.study.name, "task": task}
    return [
        Vectors(dict(zip(names, arrays[f"template-{t + 1}"], strict=True)), "function vector", model.about, recipe)
        for t in templates(run)
    ]


def _asked(run: Run, task: Task) -> list[tuple[int, Any]]:
    split = split_of(run, task)
    return [(t, audit.examples_of(task, split, t)) for t in templates(run)]


def _by_sites(task: str, template: int, sites: Sequence[Site], columns: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """A row for each site, with values [sites] under their names; templates and layers count from 1."""
    where = {"task": task, "template": template + 1, "site": [str(s) for s in sites]}
    return pd.DataFrame({**where, "layer": [s.layer + 1 for s in sites], **columns})


def check(run: Run) -> None:
    """Say at once what would stop the run later.

    Raises:
        InputError: a parameter, or the model, cannot be used.
    """
    p = run.parameters
    names = tasks(run)
    if not names or len(set(names)) < len(names):
        raise InputError(f"tasks are {', '.join(names) or 'none'}; name at least one, each once")
    _ = templates(run)
    least = {"layer_step": 1, "shots": 1, "queries": 1, "choosing": 1, "randoms": 1, "neutral": 0, "heads": 1}
    least |= {"projected": 1, "control_seeds": 1, "control_steps": 20, "transfer_inputs": 1, "patched_inputs": 2}
    low = next((name for name, smallest in least.items() if p[name] < smallest), None)
    if low is not None:
        raise InputError(f"{low} is {p[low]}; it must be at least {least[low]}")
    if p.shown < p.shots + 1:
        raise InputError(
            f"shown is {p.shown} and shots is {p.shots}: examples are drawn from more pairs than they need"
        )
    if not p.strengths or not p.transfer_strengths:
        raise InputError("strengths and transfer_strengths need at least one number each")
    for name in names:
        _ = split_of(run, TASKS[name])
    if run.model.encoder_decoder or run.model.n_layers < 2:
        raise InputError(f"{run.model.name} is no decoder of at least two layers: the study steers what one writes")


# -- what the model can do ---------------------------------------------------------------------


def abilities(run: Run, unit: str) -> pd.DataFrame:
    """Which of the inputs for testing the model answers rightly, without and with examples."""
    task = TASKS[unit]
    split, rows = split_of(run, task), []
    for t, examples in _asked(run, task):
        seed = seed_of(run, "few shot", unit, t)
        bare = audit.written(run.model, task, [examples.bare(x) for x, _ in split.testing], split.testing)
        few = audit.written(
            run.model, task, audit.few_shot(examples, split.testing, run.parameters.shots, seed), split.testing
        )
        rows += [
            {"task": unit, "template": t + 1, "input": x, "answer": y[0], "bare": b, "few_shot": f}
            for (x, y), b, f in zip(split.testing, bare, few, strict=True)
        ]
    return pd.DataFrame(rows)


# -- vectors and steering ----------------------------------------------------------------------


def vectors(run: Run, unit: str) -> pd.DataFrame:
    """Function vectors of a task: for each template and site; what they say in the vocabulary."""
    task = TASKS[unit]
    split, sites = split_of(run, task), sites_of(run)
    kept: dict[str, torch.Tensor] = {}
    rows: list[dict[str, Any]] = []
    said = {i for _, y in task.pairs for i in audit.variants(run.model, task, y)[0]}
    outputs = {answer.casefold() for _, y in task.pairs for answer in y if len(answer) > 2}
    for t, examples in _asked(run, task):
        seed = seed_of(run, "examples", unit, t)
        found = audit.vectors_of(run.model, examples, split, sites, run.parameters.shots, seed)
        kept[f"template-{t + 1}"] = torch.stack([found[s] for s in sites])
        twin = found.random_twin(seed_of(run, "projection", unit, t))
        for site in sites:
            rows.append(
                {"task": unit, "template": t + 1, "site": str(site), "layer": site.layer + 1, "norm": found.norm(site)}
                | _projected(run, found[site], said, outputs)
                | {"random_fraction": _projected(run, twin[site], said, outputs)["correct_output_fraction"]}
            )
    run.keep(f"vectors-{unit}", kept)
    return pd.DataFrame(rows)


def _projected(run: Run, vector: torch.Tensor, said: set[int], outputs: set[str]) -> dict[str, Any]:
    """What the final norm and the unembedding make of a vector."""
    model, many = run.model, min(run.parameters.projected, run.model.vocab_size)
    with model.exclusive(), torch.no_grad():
        logits = model.tail.logits(vector.to(model.device, model.dtype).unsqueeze(0))[0]
    top = logits.topk(many).indices.tolist()
    bottom = logits.topk(many, largest=False).indices.tolist()
    words = [model.vocabulary.label(i).strip().casefold() for i in top]
    related = [len(w) > 2 and any(w in o or o in w for o in outputs) for w in words]
    return {
        "correct_output_fraction": float(np.mean([i in said for i in top])),
        "correct_output_fraction_bottom": float(np.mean([i in said for i in bottom])),
        "task_relevant": float(np.mean(related)),
        "top": " ".join(repr(model.vocabulary.label(i)) for i in top[:10]),
    }


def steering(run: Run, unit: str) -> Mapping[str, pd.DataFrame]:
    """Steering of bare questions: the sweep on the inputs for choosing, the effect on those for testing."""
    task = TASKS[unit]
    split, own = split_of(run, task), kept_vectors(run, unit)
    names = tasks(run)
    another = names[(names.index(unit) + 1) % len(names)]
    theirs: list[Vectors | None] = [*kept_vectors(run, another)] if another != unit else [None] * len(own)
    sweeps: list[pd.DataFrame] = []
    outcomes: list[pd.DataFrame] = []
    cells: list[dict[str, Any]] = []
    for i, (t, examples) in enumerate(_asked(run, task)):
        run.progress(i, len(own), f"template {t + 1}")
        found = audit.steered(
            run.model,
            task,
            examples,
            split,
            own[i],
            run.parameters.strengths,
            other=theirs[i],
            neutral=neutral.TEXTS[: run.parameters.neutral] or None,
            randoms=run.parameters.randoms,
            seed=seed_of(run, "steering", unit, t),
        )
        where = {"task": unit, "template": t + 1}
        tried = [(site, k) for site in found.sites for k in found.strengths]
        sweep = pd.DataFrame(tried, columns=["site", "strength"]).assign(accuracy=found.grid.reshape(-1), **where)
        sweeps.append(sweep)
        right = pd.DataFrame(found.correct)
        outcomes.append(right.assign(input=[x for x, _ in split.testing], **where))
        cells.append(
            where
            | {"site": found.site, "layer": int(found.site.split(".")[0]) + 1, "strength": found.strength}
            | {"best_choosing": float(found.grid.max()), "other_task": another}
            | {what: found.rate(what).value for what in found.correct}
            | {f"perplexity_{what}": found.perplexity(what) for what in found.nll}
        )
    return {"sweep": pd.concat(sweeps), "outcomes": pd.concat(outcomes), "cells": pd.DataFrame(cells)}


def heads(run: Run, unit: str) -> pd.DataFrame:
    """The other definition of function vectors (Todd et al. 2023), in the first template: how well it steers."""
    task, count = TASKS[unit], run.parameters.heads
    split, (t, examples) = split_of(run, task), _asked(run, task)[0]
    answered = tuple((x, y[0]) for x, y in (*split.shown, *split.queries))
    whole = type(examples)(answered, examples.template, examples.joint, examples.separator)
    seed = seed_of(run, "heads", unit)
    try:
        found = head_effects(run.model, whole, [x for x, _ in split.queries], shots=run.parameters.shots, seed=seed)
    except InputError as error:  # heads that were not verified: the rest of the study does not need them
        return pd.DataFrame([{"task": unit, "template": t + 1, "reason": str(error)}])
    count = min(count, len(found.sites))
    summed = found.vectors([str(s) for s in sites_of(run)], count)
    effect = audit.steered(
        run.model,
        task,
        examples,
        split,
        summed,
        run.parameters.strengths,
        other=None,
        neutral=None,
        randoms=1,
        seed=seed,
    )
    row = {
        "task": unit,
        "template": t + 1,
        "heads": " ".join(found.sites[i] for i in found.largest(count)),
        "largest_effect": float(found.average.max()),
        "site": effect.site,
        "strength": effect.strength,
        **{what: effect.rate(what).value for what in effect.correct},
    }
    return pd.DataFrame([row])


# -- reading -----------------------------------------------------------------------------------


def _read(run: Run, unit: str, lens: Lens | None) -> pd.DataFrame:
    task = TASKS[unit]
    split, sites = split_of(run, task), sites_of(run)
    rows: list[pd.DataFrame] = []
    for t, examples in _asked(run, task):
        states = audit.states_of(run.model, [examples.bare(x) for x, _ in split.testing], sites).stacked(sites)
        found = audit.readout(run.model, states, sites, task, split.testing, lens)
        columns = {f"top{k}": found.top(k) for k in (1, 5, 10)}
        columns |= {
            "mean_rank": found.rank.mean(1),
            "mean_logprob": found.logprob.mean(1),
            "spaced": found.spaced.mean(1),
        }
        rows.append(_by_sites(unit, t, sites, columns))
    return pd.concat(rows)


def decodability(run: Run, unit: str) -> pd.DataFrame:
    """The logit lens on bare questions: is the answer's first token among the first ones?"""
    return _read(run, unit, None)


def tuned_lens(run: Run, unit: str) -> pd.DataFrame:
    """The diagonal tuned lens, fitted on bare questions of all tasks and templates but those for testing."""
    sites = sites_of(run)
    states: list[torch.Tensor] = []
    final: list[torch.Tensor] = []
    for name in tasks(run):
        task = TASKS[name]
        split = split_of(run, task)
        for _, examples in _asked(run, task):
            prompts = [examples.bare(x) for x, _ in (*split.shown, *split.queries, *split.choosing)]
            kept = audit.states_of(run.model, prompts, [*sites, run.model.last_site])
            states.append(kept.stacked(sites).float().cpu())
            final.append(kept[run.model.last_site].float().cpu())
    p = run.parameters
    lens = ladder.fit_diagonal(
        run.model, torch.cat(states, 1), torch.cat(final), sites, seed=seed_of(run, "tuned lens"), epochs=p.lens_epochs
    )
    lens.save(run.folder / "arrays" / "tuned-lens")
    table = pd.DataFrame.from_dict(lens.metrics["validation squared error"], orient="index")
    return table.rename_axis("site").reset_index().assign(examples=sum(len(f) for f in final))


def tuned(run: Run, unit: str) -> pd.DataFrame:
    """The tuned lens on the same questions as the logit lens."""
    from logitlab.lenses.fitted import FittedLens

    return _read(run, unit, FittedLens.load(run.folder / "arrays" / "tuned-lens"))


def probe(run: Run, unit: str) -> pd.DataFrame:
    """An MLP probe on bare questions of all templates, split by input, with its control."""
    task, sites = TASKS[unit], sites_of(run)
    states: list[torch.Tensor] = []
    labels: list[str] = []
    groups: list[str] = []
    for _, examples in _asked(run, task):
        kept = audit.states_of(run.model, [examples.bare(x) for x, _ in task.pairs], sites)
        states.append(kept.stacked(sites).float().cpu())
        labels += [y[0] for _, y in task.pairs]
        groups += [x for x, _ in task.pairs]
    pooled = torch.cat(states, 1)
    report = probe_states(
        {str(site): pooled[i] for i, site in enumerate(sites)},
        labels,
        groups=groups,
        kind="mlp",
        folds=0.2,
        top_k=min(audit.TOP, len(set(labels))),
        unseen="count",
        seed=seed_of(run, "probe", unit),
        resamples=500,
        hidden=run.parameters.probe_hidden,
        epochs=run.parameters.probe_epochs,
    )
    return pd.DataFrame(report.rows()).assign(task=unit, labels=len(set(labels)))


# -- after steering ----------------------------------------------------------------------------


def after_steering(run: Run, unit: str) -> pd.DataFrame:
    """Whether the answer can be read once the vector has been added, beside a random vector."""
    task, cells = TASKS[unit], run.table("steering-cells")
    split, sites, own = split_of(run, task), sites_of(run), kept_vectors(run, unit)
    rows: list[pd.DataFrame] = []
    for i, (t, examples) in enumerate(_asked(run, task)):
        cell = cells[(cells["task"] == unit) & (cells["template"] == t + 1)].iloc[0]
        later = [s for s in sites if s.layer + 1 >= cell["layer"]]
        prompts = [examples.bare(x) for x, _ in split.testing]
        twin = own[i].random_twin(seed_of(run, "after steering", unit, t))
        found: dict[str, np.ndarray] = {}
        for what, vector in (("plain", None), ("steered", own[i]), ("random", twin)):
            changes = (
                []
                if vector is None
                else [add(cell["site"], vector[cell["site"]], strength=float(cell["strength"]), positions="last")]
            )
            states = audit.states_of(run.model, prompts, later, changes).stacked(later)
            found[what] = audit.readout(run.model, states, later, task, split.testing).top(audit.TOP)
        rows.append(_by_sites(unit, t, later, found))
    return pd.concat(rows)


# -- transfer between templates ----------------------------------------------------------------


def transfer(run: Run, unit: str) -> pd.DataFrame:
    """Steering questions of one template with vectors of another, at every site: the best of some strengths."""
    task = TASKS[unit]
    split, sites, own = split_of(run, task), sites_of(run), kept_vectors(run, unit)
    some = split.testing[: run.parameters.transfer_inputs]
    strengths, judge = run.parameters.transfer_strengths, audit.match_of(task)
    asked = _asked(run, task)
    rows: list[dict[str, Any]] = []
    for n, (target, examples) in enumerate(asked):
        run.progress(n, len(asked), f"into template {target + 1}")
        trials = Trials(run.model, [examples.bare(x) for x, _ in some])
        (plain,) = trials.write([[]], task.new_tokens)
        bare = float(np.mean([judge(text, y) for text, (_, y) in zip(plain, some, strict=True)]))
        places = [(s, site, k) for s in range(len(own)) for site in sites for k in strengths]
        texts = trials.write(
            [[add(site, own[s][site], strength=k, positions="each")] for s, site, k in places], task.new_tokens
        )
        right = [float(np.mean([judge(a, y) for a, (_, y) in zip(one, some, strict=True)])) for one in texts]
        for first in range(0, len(places), len(strengths)):
            s, site, _ = places[first]
            here = right[first : first + len(strengths)]
            one, other = own[s][site].double(), own[n][site].double()
            rows.append(
                {
                    "task": unit,
                    "source": asked[s][0] + 1,
                    "target": target + 1,
                    "same_style": STYLES[asked[s][0]] == STYLES[target],
                    "site": str(site),
                    "layer": site.layer + 1,
                    "norm": float(one.norm()),
                    "cosine": float(torch.nn.functional.cosine_similarity(one, other, dim=0)),
                    "strength": strengths[int(np.argmax(here))],
                    "accuracy": max(here),
                    "bare": bare,
                }
            )
    return pd.DataFrame(rows)


def patching(run: Run, unit: str) -> pd.DataFrame:
    """Pairs of templates whose vectors look alike and do not transfer: is the state of the source enough?

    Beside it stand what the bare target question gives, and what the state of another input's source prompt does.
    """
    cells, moved = run.table("steering-cells"), run.table("transfer")
    columns = ["task", "source", "target", "site", "cosine", "accuracy"]
    names = ["task", "source", "target", "cosine", "transfer", "iid", "site", "layer", "recovery", "other", "bare"]
    empty = pd.DataFrame(columns=names)
    other = moved[moved["source"] != moved["target"]][columns]
    best = other.groupby(["task", "source", "target"], sort=False).agg(
        cosine=("cosine", "mean"), transfer=("accuracy", "max")
    )
    best = best.reset_index()
    iid = cells.set_index(["task", "template"])["steered"]
    best["iid"] = [float(iid[task, source]) for task, source in zip(best["task"], best["source"], strict=True)]
    p = run.parameters
    alike = best["cosine"] >= best["cosine"].quantile(0.75)
    chosen = best[alike & (best["transfer"] < p.failed_transfer) & (best["iid"] >= p.threshold)]
    chosen = chosen.assign(gap=chosen["cosine"] - chosen["transfer"]).sort_values("gap", ascending=False)
    chosen = chosen.groupby("task", sort=False).head(p.patched_per_task).head(p.patched_pairs)
    rows: list[dict[str, Any]] = []
    for done, row in enumerate(chosen.to_dict("records")):
        run.progress(done, len(chosen), f"{row['task']}, template {row['source']} into {row['target']}")
        rows += _patched(run, row)
    return pd.DataFrame(rows) if rows else empty


def _patched(run: Run, row: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Put states of prompts with examples, in the source template, into bare questions in the target template."""
    task, sites = TASKS[row["task"]], sites_of(run)
    split = split_of(run, task)
    some = split.testing[: run.parameters.patched_inputs]
    source = audit.examples_of(task, split, row["source"] - 1)
    target = audit.examples_of(task, split, row["target"] - 1)
    seed = seed_of(run, "patching", row["task"], row["source"])
    kept = audit.states_of(run.model, audit.few_shot(source, some, run.parameters.shots, seed), sites)
    right, other, bare = np.zeros((2 * len(sites) + 1, len(some))), len(sites), 2 * len(sites)
    for n, (x, y) in enumerate(some):
        own = [[replace(site, kept[site][n], positions="last")] for site in sites]
        theirs = [[replace(site, kept[site][(n + 1) % len(some)], positions="last")] for site in sites]
        ids, _ = audit.variants(run.model, task, y)
        _, top = Trials(run.model, [target.bare(x)]).next_tokens([*own, *theirs, []], [ids])
        right[:, n] = np.isin(top[:, 0], ids)
    return [
        {k: row[k] for k in ("task", "source", "target", "cosine", "transfer", "iid")}
        | {"site": str(site), "layer": site.layer + 1, "recovery": float(right[i].mean())}
        | {"other": float(right[other + i].mean()), "bare": float(right[bare].mean())}
        for i, site in enumerate(sites)
    ]


# -- the table ---------------------------------------------------------------------------------


def summary(run: Run, unit: str) -> pd.DataFrame:
    """For each task its cell, and the lowest rung of the ladder that reads it.

    ``paper_cell`` is by the paper's rule: the best template steers more than the threshold of the test inputs. ``cell``
    asks for more: the model can do the task from examples; and in the template that steers best on the inputs for
    choosing, steering gains over the bare question, over random vectors, and over what its texts score against other
    inputs' answers, each with an interval above 0. Reading is the best of all templates and layers in both: what is
    then not decodable is so although the lens had its choice.
    """
    p = run.parameters
    cells, plain, moved, probes = (run.table(n) for n in ("steering-cells", "decodability", "tuned", "probe"))
    measured = gains(run)
    rows: list[dict[str, Any]] = []
    for gain in measured.to_dict("records"):
        name = str(gain["task"])
        mine = cells[cells["task"] == name]
        best = probes[probes["task"] == name].sort_values("accuracy", ascending=False, kind="stable").iloc[0]
        reads = {
            "logit lens": float(plain[plain["task"] == name]["top10"].max()),
            "tuned lens": float(moved[moved["task"] == name]["top10"].max()),
        }
        by_probe = best["accuracy"] >= p.threshold and best["selectivity"] >= p.selectivity
        rung = next((lens for lens, value in reads.items() if value > p.threshold), None)
        if rung is None:
            known = best["label_overlap"] >= 0.5
            rung = (
                "no lens; the probe cannot know the labels" if not known else "MLP probe" if by_probe else "invisible"
            )
        told = audit.one_token_tells(TASKS[name])
        cell = audit.cell(1.0 if gain["steers"] else 0.0, reads["logit lens"], p.threshold)
        rows.append(
            {
                "task": name,
                "category": TASKS[name].category,
                **{k: gain[k] for k in ("template", "bare", "few_shot", "steered", "random", "permuted", "other")},
                "steered_best": float(mine["steered"].max()),
                "logit_lens": reads["logit lens"],
                "tuned_lens": reads["tuned lens"],
                "mlp_probe": float(best["accuracy"]),
                "mlp_control": float(best["control"]),
                "mlp_selectivity": float(best["selectivity"]),
                "label_overlap": float(best["label_overlap"]),
                "steers": gain["steers"],
                "paper_cell": audit.cell(float(mine["steered"].max()), reads["logit lens"], p.threshold),
                "cell": cell
                if told and gain["able"]
                else "one token does not tell"
                if not told
                else "the model cannot do it",
                "rung": rung,
            }
        )
    return pd.DataFrame(rows)


def gains(run: Run) -> pd.DataFrame:
    """For each task, in the template that steers best on the inputs for choosing: what steering gains over controls."""
    cells = run.table("steering-cells")
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(cells["task"]):
        mine = cells[cells["task"] == name]
        rows.append(gain_of(run, str(name), int(mine.loc[mine["best_choosing"].idxmax()]["template"])))
    return pd.DataFrame(rows)


def gain_of(run: Run, task: str, template: int) -> dict[str, Any]:
    """What the model can do in a template, and what steering gains there over each control."""
    outcomes, able = run.table("steering-outcomes"), run.table("abilities")
    here = outcomes[(outcomes["task"] == task) & (outcomes["template"] == template)]
    seen = able[(able["task"] == task) & (able["template"] == template)]
    row: dict[str, Any] = {"task": task, "template": template}
    row |= {k: float(seen[k].mean()) for k in ("bare", "few_shot")}
    row["able"] = row["few_shot"] - row["bare"] >= run.parameters.gate
    row["steered"] = float(here["steered"].mean())
    for over in ("plain", "random", "permuted", "other"):
        if over not in here:
            row[over] = float("nan")
            continue
        gain = bootstrap(here["steered"].to_numpy() - here[over].to_numpy(), seed=run.seed)
        row[over] = float(here[over].mean())
        row |= {f"over_{over}": gain.value, f"over_{over}_low": gain.low, f"over_{over}_high": gain.high}
    beaten = [row[f"over_{over}_low"] > 0 for over in ("plain", "random", "permuted")]
    row["steers"] = bool(row["steered"] > run.parameters.threshold and all(beaten))
    return row


def polarity(run: Run, unit: str) -> pd.DataFrame:
    """After the paper's measure for flipped sentiments: does the state lean to the polarity of the answer?

    The direction is the mean row of the unembedding over words that only positive answers have and their inputs have
    not, minus that over words of negative ones. Half of the answers lean each way, so chance is a half.
    """
    name = "sentiment_flip"
    if name not in tasks(run):
        return pd.DataFrame(columns=["task", "template", "site", "layer", "accuracy"])
    task, model, sites = TASKS[name], run.model, sites_of(run)
    split = split_of(run, task)
    sign = {x: s for (x, _), s in zip(task.pairs, task.polarity, strict=True)}
    tested = {x for x, _ in split.testing}
    words: dict[int, set[str]] = {-1: set(), 1: set()}
    for x, y in task.pairs:
        if x not in tested:
            words[sign[x]] |= set(y[0].casefold().split()) - set(x.casefold().split())
    head = model.tail.head
    if head is None:  # words have no direction of their own
        return pd.DataFrame(columns=["task", "template", "site", "layer", "accuracy"])
    means: dict[int, torch.Tensor] = {}
    for way in (-1, 1):
        only = sorted(words[way] - words[-way])
        ids = sorted({i for w in only for i in audit.variants(model, task, (w,))[0]})
        means[way] = head.weight[ids].float().mean(0)
    along = torch.nn.functional.normalize(means[1] - means[-1], dim=0)
    rows: list[pd.DataFrame] = []
    for t, examples in _asked(run, task):
        prompts = [examples.bare(x) for x, _ in split.testing]
        states = audit.states_of(model, prompts, sites).stacked(sites)
        with model.exclusive(), torch.no_grad():
            given = model.tail.prepare(states.reshape(-1, states.shape[-1])).reshape(*states.shape[:2], -1)
        leans = torch.sign(given.float() @ along).cpu().numpy()  # [sites, prompts]
        right = leans == np.array([sign[x] for x, _ in split.testing])
        rows.append(_by_sites(name, t, sites, {"accuracy": right.mean(1)}))
    return pd.concat(rows)


# -- positive controls -------------------------------------------------------------------------


def control_units(run: Run) -> Sequence[str]:
    """One model a unit."""
    check(run)  # these are the first units of the study
    return [f"{kind} {seed}" for seed in range(run.parameters.control_seeds) for kind in controls.KINDS]


def constructed(run: Run, unit: str) -> pd.DataFrame:
    """A constructed model, trained and audited."""
    kind, _, number = unit.partition(" ")
    seed = seed_of(run, "constructed", unit)
    model, loss = controls.train(kind, seed, run.parameters.control_steps)
    rows: list[dict[str, Any]] = []
    for task in controls.tasks(kind):
        found = controls.audited(model, task, tuple(run.parameters.strengths), run.parameters.threshold, seed)
        rows.append(
            {"model": kind, "seed": int(number), "task": task.name, "loss": loss}
            | vars(found)
            | {"expected": controls.KINDS[kind]}
        )
    return pd.DataFrame(rows)


# -- regressions -------------------------------------------------------------------------------


def regression(run: Run, unit: str) -> pd.DataFrame:
    """What tells whether vectors transfer."""
    from logitlab.studies.steerable_not_decodable.regression import regressions

    table = run.table("transfer")
    shares: list[dict[str, Any]] = []
    for name in tasks(run):
        for site, rows in _by_site(run, name).items():
            _, sizes, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
            total = float((sizes**2).sum())
            shares.append({"task": name, "site": site, "share": float(sizes[0] ** 2) / total if total else 1.0})
    other = with_difficulty(run, table[table["source"] != table["target"]])
    return regressions(other, pd.DataFrame(shares), run.parameters.permutations, seed_of(run, "permutations"))


def with_difficulty(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """Transfers with their task's difficulty: 1 minus the mean accuracy of steering in the vectors' own templates."""
    mean = run.table("steering-cells").groupby("task")["steered"].mean()
    return table.assign(difficulty=[1.0 - float(mean[name]) for name in table["task"]])


def _by_site(run: Run, task: str) -> dict[str, np.ndarray]:
    """The vectors of all templates, [templates, width], by site."""
    kept = kept_vectors(run, task)
    return {site: np.stack([v[site].numpy().astype(np.float64) for v in kept]) for site in kept[0].sites}
