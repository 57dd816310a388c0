"""The study `steerable-not-decodable`: its measurements by hand, its claims on tables of which the answer is known."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import logitlab as ll
from logitlab.interventions import add, intervene
from logitlab.models.sites import Site
from logitlab.studies import find, run_study
from logitlab.studies.parameters import parameters_of
from logitlab.studies.steerable_not_decodable import audit, claims, controls, ladder, regression, steps
from logitlab.studies.steerable_not_decodable.study import STUDY
from logitlab.studies.steerable_not_decodable.tasks import TASKS
from logitlab.studies.study import Untestable
from tests import zoo

PAIRS = tuple(
    (w, (a, *rest)) for w, a, *rest in [("hot", "cold"), ("up", "down", "below"), ("big", "small"), ("in", "out")]
)


def run_of(tables: dict[str, pd.DataFrame], **parameters: Any) -> Any:
    """What a measure sees: tables and parameters."""
    return SimpleNamespace(
        table=lambda name: tables[name],
        seed=0,
        parameters=parameters_of(STUDY, "full", parameters),
        manifest={"model": {"layers": 4}},
    )


# -- measurements ------------------------------------------------------------------------------


def test_parts_of_a_task_share_nothing() -> None:
    for task in TASKS.values():
        split = audit.Split.of(task.pairs, (20, 15, 15, 50), np.random.default_rng(3))
        parts = [{x for x, _ in part} for part in (split.shown, split.queries, split.choosing, split.testing)]
        assert [len(p) for p in parts[:3]] == [20, 15, 15]
        assert 35 <= len(parts[3]) <= min(50, len(task.pairs) - 50)
        assert sum(map(len, parts)) == len(set().union(*parts))


def test_too_few_pairs() -> None:
    with pytest.raises(ll.InputError, match="4 pairs"):
        audit.Split.of(PAIRS, (2, 1, 1, 4), np.random.default_rng(0))


def test_pairs_that_answer_each_other_are_not_told_apart() -> None:
    for task in TASKS.values():
        split = audit.Split.of(task.pairs, (20, 15, 15, 50), np.random.default_rng(0))
        used = [*split.shown, *split.queries, *split.choosing, *split.testing]
        answers = {x.casefold(): {a.casefold() for a in y} for x, y in used}
        assert not [x for x, y in answers.items() if any(a != x and x in answers.get(a, ()) for a in y)]


def test_answers_are_whole_words_and_letters_begin() -> None:
    safe, letter = audit.match_of(TASKS["antonym"]), audit.match_of(TASKS["first_letter"])
    assert safe(" It is Safe.", ["safe"])
    assert not safe(" unsafe", ["safe"])
    assert letter(' "B" is', ["b"])
    assert not letter(" a bee", ["b"])
    assert not letter(" bee", ["b"])
    assert audit.match_of(TASKS["capitalize"])(" HOT", ["HOT"])
    assert not audit.match_of(TASKS["capitalize"])(" hot", ["HOT"])


def test_first_tokens_tell_all_tasks_apart_but_flipped_sentiments() -> None:
    assert [name for name, task in TASKS.items() if not audit.one_token_tells(task)] == ["sentiment_flip"]


def test_every_second_layer_from_the_second(llama: ll.Model) -> None:
    assert audit.sites_of(llama, 2) == [Site(i, "resid_post") for i in range(3)]  # half of three layers is one
    deep: Any = SimpleNamespace(n_layers=30)
    assert [s.layer + 1 for s in audit.sites_of(deep, 2)] == list(range(2, 31, 2))
    assert [s.layer + 1 for s in audit.sites_of(deep, 40)] == [15, 30]
    assert audit.sites_of(llama, 1) == [Site(i, "resid_post") for i in range(3)]


def test_ranks_are_those_of_the_models_own_logits(llama: ll.Model) -> None:
    prompts = ["a b c", "the cat"]
    sites = audit.sites_of(llama, 1)
    pairs = (("x", ("a", "cat")), ("y", ("the",)))
    states = audit.states_of(llama, prompts, sites).stacked(sites)
    task = TASKS["capitalize"]
    found = audit.readout(llama, states, sites, task, pairs)
    for n, prompt in enumerate(prompts):
        ids = llama.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            logits = llama.module(**ids).logits[0, -1].double()
        wanted, _ = audit.variants(llama, task, pairs[n][1])
        assert set(wanted) <= set(audit.variants(llama, TASKS["antonym"], pairs[n][1])[0])
        ranks = [1 + int((logits > logits[i]).sum()) for i in wanted]
        assert found.rank[-1, n] == min(ranks)
        np.testing.assert_allclose(found.logprob[-1, n], float(logits.log_softmax(-1)[wanted].max()), atol=1e-4)
    assert found.top(int(found.rank.max())).tolist() == [1.0] * len(sites)


def test_states_after_steering_are_those_of_an_intervention(llama: ll.Model) -> None:
    sites, vector = audit.sites_of(llama, 1), torch.randn(llama.width, generator=torch.Generator().manual_seed(1))
    changes = [add("1.resid_post", vector, strength=2.0, positions="last")]
    found = audit.states_of(llama, ["a b c", "the cat"], sites, changes)
    with intervene(llama, changes):
        alone = ll.capture(llama, "the cat", sites, -1)
    torch.testing.assert_close(found["2.resid_post"][1], alone["2.resid_post"][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("steering", "reading", "cell"),
    [
        (0.5, 0.5, "both succeed"),
        (0.5, 0.1, "steerable, not decodable"),
        (0.1, 0.5, "decodable, not steerable"),
        (0.1, 0.1, "both fail"),
    ],
)
def test_cells(steering: float, reading: float, cell: str) -> None:
    assert audit.cell(steering, reading, 0.1) == cell


# -- tuned lens --------------------------------------------------------------------------------


def test_the_tuned_lens_finds_a_diagonal_map(llama: ll.Model) -> None:
    generator = torch.Generator().manual_seed(0)
    sites = [Site(0, "resid_post"), Site(1, "resid_post"), llama.last_site]
    x = torch.randn(3, 400, llama.width, generator=generator)
    delta, bias = (
        0.1 * torch.randn(llama.width, generator=generator),
        0.1 * torch.randn(llama.width, generator=generator),
    )
    final = (1 + delta) * x[0] + bias
    lens = ladder.fit_diagonal(llama, x, final, sites, seed=0, epochs=400, patience=50, decay=0.0, rate=3e-3)
    assert [str(s) for s in lens.sites] == ["0.resid_post", "1.resid_post"]
    maps: Any = lens.maps
    torch.testing.assert_close(maps.delta[0], delta, atol=5e-3, rtol=0)
    torch.testing.assert_close(maps.bias[0], bias, atol=5e-3, rtol=0)
    table = lens.metrics["validation squared error"]
    by_hand = ((maps(x[:2])[0] - final) ** 2).mean()
    assert table["0.resid_post"]["fitted"] == pytest.approx(float(by_hand), abs=1e-4)
    assert all(row["fitted"] <= row["logit lens"] for row in table.values())


def test_a_tuned_lens_that_does_not_help_is_the_identity(llama: ll.Model) -> None:
    x = torch.randn(1, 50, llama.width, generator=torch.Generator().manual_seed(2))
    lens = ladder.fit_diagonal(llama, x, x[0], [Site(0, "resid_post")], seed=0)
    assert torch.equal(lens.transport(x[0], Site(0, "resid_post")), x[0])


# -- constructed models ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(controls.KINDS))
def test_training_texts(kind: str) -> None:
    ids = controls.texts(kind, 4000, np.random.default_rng(0))
    names = np.array(controls.words())[ids].reshape(4000, controls.PAIRS, -1)
    for text in names[:50]:
        styles = {pair[-1].split("_")[1] for pair in text}
        assert len(styles) == 1
        assert len({pair[0] for pair in text}) == controls.PAIRS
        assert all(pair[-1][1:3] == pair[0][1:] for pair in text)
        assert len({pair[-2] for pair in text}) == 1
        assert kind == "hidden" or {f"s{s}" for s in styles} == {pair[1] for pair in text}
    share = np.mean([text[0][-1].split("_")[1] == "000" for text in names])
    common = controls.STYLES - controls.AUDITED * (1 - controls.RARITY)
    expected = controls.RARITY / common if kind == "hidden" else 1 / controls.STYLES
    assert share == pytest.approx(expected, abs=4 * (expected / 4000) ** 0.5)


def test_tasks_of_constructed_models_are_their_training_texts() -> None:
    tokenizer = controls.tokenizer()
    for kind in controls.KINDS:
        task = controls.tasks(kind)[1]
        shown = task.templates[0].replace("{X}", task.pairs[5][0]) + " " + task.pairs[5][1][0]
        ids = tokenizer(shown)["input_ids"]
        row = controls.texts(kind, 3000, np.random.default_rng(1)).reshape(3000 * controls.PAIRS, -1)
        assert ids in row.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("kind", "cell"), list(controls.KINDS.items()))
def test_constructed_models_fall_into_their_cells(kind: str, cell: str, seed: int) -> None:
    model, loss = controls.train(kind, 100 + seed, 500)
    assert kind == "untrained" or loss < 0.5
    for task in controls.tasks(kind):
        found = controls.audited(model, task, (0.5, 1.0, 2.0, 3.0), 0.10, seed)
        assert found.cell == cell
        if kind == "hidden":
            assert found.steering > found.random + 0.3
            assert found.plain == 0


# -- regression --------------------------------------------------------------------------------


def test_r_squared_is_that_of_scipy() -> None:
    from scipy.stats import linregress

    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = 0.4 * x + rng.normal(size=60)
    assert regression.r_squared(y, x) == pytest.approx(float(linregress(x, y).rvalue) ** 2, abs=1e-12)
    assert regression.r_squared(np.ones(5), x[:5]) == 0.0


def transfers(slope: float, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for task in range(6):
        for pair in range(30):
            cosine = rng.uniform()
            rows.append(
                {
                    "task": f"task {task}",
                    "source": 1,
                    "target": 2 + pair % 3,
                    "same_style": pair % 3 == 0,
                    "layer": 1 + pair % 2,
                    "norm": rng.uniform(1, 2),
                    "difficulty": 1 - 0.1 * task,
                    "cosine": cosine,
                    "accuracy": 0.1 * task + slope * cosine + 0.05 * rng.normal(),
                }
            )
    return pd.DataFrame(rows)


def _ols(x: Any, y: Any) -> Any:
    design = np.column_stack([np.ones(len(x)), x])
    return np.linalg.solve(design.T @ design, design.T @ np.asarray(y))


def test_a_cosine_that_tells_tasks_apart_counts() -> None:
    """Difficulty must not be made from the transfers themselves: it would take all that differs between tasks."""
    table = transfers(0.0).assign(difficulty=0.5)
    table["cosine"] = table["accuracy"].groupby(table["task"]).transform("mean")
    assert regression.gain_of_cosine(table) > 0.8


@pytest.mark.parametrize(("slope", "low", "high"), [(0.5, 0.1, 1.0), (0.0, 0.0, 0.02)])
def test_the_gain_of_the_cosine(slope: float, low: float, high: float) -> None:
    table = transfers(slope)
    assert low <= regression.gain_of_cosine(table) <= high
    parts = [part for _, part in table.groupby("task")]
    assert regression.gain_of_cosine(parts) == pytest.approx(regression.gain_of_cosine(table), abs=1e-12)
    x = np.column_stack([table["difficulty"], table["cosine"]])
    both = np.corrcoef(table["accuracy"], np.column_stack([np.ones(len(x)), x]) @ _ols(x, table["accuracy"]))[0, 1] ** 2
    one = np.corrcoef(table["accuracy"], table["difficulty"])[0, 1] ** 2
    assert regression.gain_of_cosine(table) == pytest.approx(both - one, abs=1e-10)
    vectors = pd.DataFrame({"task": ["a"], "site": ["s"], "share": [0.7]})
    found = regression.regressions(table, vectors, 99, 0).set_index("what")
    assert (found.loc["gain by cosine", "p"] == 0.01) == (slope > 0)
    r = np.corrcoef(table["norm"], table["accuracy"])[0, 1]
    assert found.loc["norm and transfer, all", "value"] == pytest.approx(r, abs=1e-12)
    assert found.loc["first component of templates, a", "value"] == 0.7


# -- claims ------------------------------------------------------------------------------------


def summary(cells: list[str], rungs: list[str] | None = None, **columns: Any) -> pd.DataFrame:
    rungs = rungs or ["logit lens"] * len(cells)
    table = pd.DataFrame({"task": [f"task {i}" for i in range(len(cells))], "cell": cells, "rung": rungs})
    plain = {"paper_cell": cells, "bare": 0.0, "few_shot": 0.9, "steers": True, "label_overlap": 1.0, "logit_lens": 0.0}
    return table.assign(**(plain | {"template": 1} | columns))


def test_the_controls_claim() -> None:
    table = pd.DataFrame(
        {"model": "hidden", "seed": [0, 1], "task": "style 0", "cell": ["a", "a"], "expected": ["a", "b"]}
    )
    found = claims.controls_classified(run_of({"constructed": table}))
    assert (found.value, found.n) == (1.0, 2)
    assert "hidden 1" in found.note


def steering_tables(gain: dict[str, float], few: float = 0.9) -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(0)
    outcomes, able, cells = [], [], []
    for task, share in gain.items():
        for template in (1, 2):
            right = (rng.uniform(size=40) < share * (template == 1)).astype(float)
            none = {"plain": 0.0, "random": 0.0, "permuted": 0.0, "steered": right}
            outcomes.append(pd.DataFrame(none).assign(task=task, template=template))
            able.append(pd.DataFrame({"bare": 0.0, "few_shot": np.full(40, few)}).assign(task=task, template=template))
            best = share * (template == 1)
            cells.append(
                {"task": task, "template": template, "best_choosing": best, "steered": right.mean(), "layer": 1}
            )
    return {
        "steering-outcomes": pd.concat(outcomes),
        "abilities": pd.concat(able),
        "steering-cells": pd.DataFrame(cells),
    }


@pytest.mark.parametrize("control", ["plain", "random", "permuted"])
def test_gains_are_paired_and_of_the_template_that_was_chosen(control: str) -> None:
    tables = steering_tables({"a": 0.8, "b": 0.02})
    found = steps.gains(run_of(tables))
    assert found["template"].tolist() == [1, 1]
    assert found["able"].all()
    chosen = tables["steering-outcomes"].query("task == 'a' and template == 1")
    assert found[f"over_{control}"][0] == pytest.approx(chosen["steered"].mean())
    assert (found[f"over_{control}_low"] > 0).tolist() == [True, False]
    tables["steering-outcomes"][control] = tables["steering-outcomes"]["steered"]
    assert steps.gains(run_of(tables))[f"over_{control}_low"][0] == 0
    assert not steps.gains(run_of(steering_tables({"a": 0.8}, few=0.05)))["able"].any()


def test_tasks_that_steer_are_counted() -> None:
    table = summary([claims.SAND] * 5, steers=[True, True, True, False, True], few_shot=[0.9] * 4 + [0.05])
    found = claims.vectors_steer(run_of({"summary": table}))
    assert (found.value, found.n) == (3.0, 4)
    with pytest.raises(Untestable, match="2 of 2 tasks"):
        claims.vectors_steer(run_of({"summary": table[:2]}))


def test_cells_are_counted() -> None:
    table = summary([claims.SAND, claims.SAND, claims.SAND, claims.REVERSE, "both fail", "the model cannot do it"])
    tables = steering_tables({f"task {i}": 0.8 for i in range(6)})
    rows = [(f"task {i}", k, 0.0 if i < 2 else 0.5) for i in range(6) for k in (1, 2)]
    tables["decodability"] = pd.DataFrame(rows, columns=["task", "template", "top10"])
    run = run_of(tables | {"summary": table})
    assert claims.steerable_not_decodable(run).value == 3
    # Only template 1 steers, and only of the first two tasks the lens reads nothing.
    assert "template by template 2 of 10: task 0 T1, task 1 T1" in claims.steerable_not_decodable(run).note
    assert claims.reverse_is_rare(run).value == pytest.approx(0.4)
    with pytest.raises(Untestable, match="2 tasks"):
        claims.reverse_is_rare(run_of({"summary": table[:2]}))


def test_the_ladder_claims() -> None:
    rungs = ["tuned lens", "MLP probe", "invisible", "invisible", "no lens; the probe cannot know the labels"]
    run = run_of({"summary": summary([claims.SAND] * 5, rungs)})
    assert claims.tuned_lens_persists(run).value == pytest.approx(0.8)
    found = claims.probe_reads_some(run)
    assert (found.value, found.n) == (pytest.approx(1 / 3), 3)
    assert found.low == pytest.approx(0.0084, abs=1e-4)  # the exact interval of 1 of 3
    with pytest.raises(Untestable):
        claims.probe_reads_some(run_of({"summary": summary([claims.SAND] * 5, ["logit lens"] * 5)}))
    unknown = summary([claims.SAND] * 5, ["MLP probe"] * 5, label_overlap=0.2)
    with pytest.raises(Untestable):
        claims.probe_reads_some(run_of({"summary": unknown}))


def test_gap_and_coherence() -> None:
    tables = steering_tables({"a": 0.8, "b": 0.5, "c": 0.4, "d": 0.3})
    pairs = [(t, k) for t in "abcd" for k in (1, 2)]
    rows = [{"task": t, "template": k, "layer": layer, "top10": 0.05 * layer} for t, k in pairs for layer in (1, 2)]
    tables["decodability"] = pd.DataFrame(rows)
    tables["steering-cells"]["site"] = "1.resid_post"
    share = {"a": 0.5, "b": 0.0, "c": 0.0, "d": 0.0}
    tables["vectors"] = pd.DataFrame(
        [
            {
                "task": t,
                "template": k,
                "site": site,
                "correct_output_fraction": share[t] * (site[0] == "1"),
                "random_fraction": 0.01,
            }
            for t, k in pairs
            for site in ("1.resid_post", "3.resid_post")
        ]
    )
    tables["summary"] = summary(["both succeed"] * 4).assign(task=list("abcd"))
    run = run_of(tables, high=0.1)
    expected = 0.1 - tables["steering-cells"]["steered"].mean()
    assert claims.steering_exceeds_reading(run).value == pytest.approx(expected)
    assert claims.vectors_incoherent(run).value == pytest.approx(0.5 / 4)
    with pytest.raises(Untestable, match="0 tasks steer"):
        claims.vectors_incoherent(run_of(tables, high=0.99))


def test_patching_counts_layers_below_the_last() -> None:
    rows = [
        {
            "task": f"task {n}",
            "source": 1,
            "target": 3,
            "iid": 0.8,
            "layer": layer,
            "recovery": value,
            "other": 0.0,
            "bare": 0.1,
        }
        for n in range(6)
        for layer, value in ((2, 0.5 if n < 2 else 0.1), (4, 1.0))
    ]
    table = pd.DataFrame(rows)
    found = claims.patching_recovers(run_of({"patching": table}))
    assert found.value == pytest.approx(2 / 6)
    assert (found.low, found.high) == (pytest.approx(0.0433, abs=1e-4), pytest.approx(0.7772, abs=1e-4))  # exact
    assert claims.patching_recovers(run_of({"patching": table.assign(other=0.4)})).value == 0
    with pytest.raises(Untestable, match="3 tasks"):
        claims.patching_recovers(run_of({"patching": table[:6]}))
    with pytest.raises(Untestable):
        claims.patching_recovers(run_of({"patching": table[:0]}))


def test_gains_after_steering_are_beyond_random_ones() -> None:
    tables = steering_tables({"a": 0.8, "b": 0.5, "c": 0.4, "d": 0.3})
    after = pd.DataFrame(
        [
            {"task": t, "template": k, "layer": layer, "plain": 0.1, "steered": 0.1 + 0.2 * layer, "random": 0.2}
            for t in "abcd"
            for k in (1, 2)
            for layer in (1, 2, 3, 4)
        ]
    )
    table = summary([claims.SAND] * 4).assign(task=list("abcd"))
    found = claims.steering_makes_readable(run_of(tables | {"after-steering": after, "summary": table}))
    assert found.value == pytest.approx(0.6 - 0.1)  # of layers 2 and 3: above the vector's, below the last
    assert "4 emerged" in found.note


# -- the whole ---------------------------------------------------------------------------------


def test_the_study_is_declared_whole() -> None:
    assert find("steerable-not-decodable") is STUDY
    for item in (*STUDY.steps, *STUDY.claims, *STUDY.pictures):
        name = next(n for n in ("do", "measure", "draw") if hasattr(item, n))
        module = {"do": "steps", "measure": "claims", "draw": "pictures"}[name]
        place = import_module(f"logitlab.studies.steerable_not_decodable.{module}")
        assert callable(getattr(place, getattr(item, name).__name__))
    full = parameters_of(STUDY, "full")
    assert len(full.tasks) == 12
    assert len(full.templates) == 8
    small = parameters_of(STUDY, "small")
    assert len(small.tasks) >= 6
    assert len(small.templates) >= 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": ["nonsense"]}, "no task 'nonsense'"),
        ({"tasks": ["plural", "plural"]}, "each once"),
        ({"templates": [3]}, "at least two"),
        ({"templates": [3, 3]}, "each once"),
        ({"templates": [0, 3]}, "of 1 to 8"),
        ({"choosing": 0}, "choosing is 0"),
        ({"layer_step": 0}, "layer_step is 0"),
        ({"control_seeds": 0}, "control_seeds is 0"),
        ({"shown": 5}, "more pairs than they need"),
        ({"queries": 200}, "make them smaller"),
        ({"strengths": []}, "at least one number"),
    ],
)
def test_what_would_stop_a_run_later_stops_it_at_once(
    checkpoint: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ll.InputError, match=message):
        run_study(STUDY, model=str(checkpoint), scale="smoke", out=tmp_path / "a", set=changed)


def test_the_whole_study_on_a_tiny_model(tmp_path: Path) -> None:
    model = ll.wrap(zoo.build("llama", max_position_embeddings=512), zoo.tokenizer(), name="tiny-llama")
    changed = {"control_steps": 20, "testing": 6, "choosing": 3, "queries": 3, "strengths": [1.0, 2.0], "neutral": 0}
    result = run_study(STUDY, model=model, scale="smoke", out=tmp_path / "run", set=changed | {"layer_step": 1})
    assert (tmp_path / "run" / "report.html").is_file()
    assert set(result.claims) == {claim.name for claim in STUDY.claims}
    assert result.claims["function-vectors-steer"].verdict == "not testable at this scale"  # it is random
    vectors = result.table("vectors")
    assert len(vectors) == 2 * 2 * model.n_layers
    outcomes = result.table("steering-outcomes")
    assert outcomes["steered"].isin([0.0, 1.0]).all()
    assert set(result.table("summary")["cell"]) == {"the model cannot do it"}
    transfer = result.table("transfer")
    own = transfer[transfer["source"] == transfer["target"]]
    np.testing.assert_allclose(own["cosine"], 1.0, atol=1e-9)
    constructed = result.table("constructed")
    assert constructed[constructed["model"] == "untrained"]["cell"].tolist() == ["both fail"] * 2
    # A vector of the run is the difference of means, by hand.
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "run" / "arrays" / "vectors-plural.safetensors")["template-3"]
    row = vectors[(vectors["task"] == "plural") & (vectors["template"] == 3)]
    np.testing.assert_allclose(kept.norm(dim=1), row["norm"], rtol=1e-5)
