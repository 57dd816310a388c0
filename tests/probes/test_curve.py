"""Held-out accuracy and its controls, on states in which it is known what can be told, and on a model."""

from __future__ import annotations

import json
from math import erf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import logitlab as ll
from logitlab import interventions as iv
from logitlab.errors import InputError
from logitlab.probes import KINDS, chance, fit_probe, probe, probe_states
from logitlab.probes.report import BY_SITE
from logitlab.probes.splits import split
from tests import zoo
from tests.probes import planted

LINEAR = tuple(kind for kind in KINDS if kind != "mlp")


@pytest.mark.parametrize("kind", LINEAR)
def test_planted_classes_are_told_as_well_as_can_be(kind: str) -> None:
    """Two Gaussians two deviations apart: the Bayes accuracy is Phi(1)."""
    draw = np.random.default_rng(0)
    y = draw.integers(0, 2, 1500)
    x = draw.normal(size=(1500, 6))
    x[:, 0] += 2 * y - 1
    found = probe_states({"a": x, "b": draw.normal(size=(1500, 6))}, y, kind=kind)
    bayes = 0.5 * (1 + erf(1 / sqrt(2)))
    assert found.low[0] < bayes < found.high[0]
    assert found.high[0] - found.low[0] == pytest.approx(2 * 1.96 * sqrt(bayes * (1 - bayes) / 1500), rel=0.15)
    assert found.low[1] < 0.5 < found.high[1]
    assert found.best == "a"
    assert found.selectivity_low[0] > 0.2
    assert found.baseline == pytest.approx(max(y.mean(), 1 - y.mean()), abs=0.02)
    assert found.label_overlap == 1


def test_xor() -> None:
    x, y = planted.xor(300)
    for kind in ("logistic", "lda"):
        found = probe_states({"a": x}, y, kind=kind, control=False)
        assert abs(found.accuracy[0] - 0.5) < 0.2, kind
    found = probe_states({"a": x}, y, kind="mlp", hidden=128, epochs=60, folds=0.3, control=False)
    assert found.accuracy[0] > 0.95
    assert np.isnan(found.control).all()
    assert np.isnan(found.p).all()


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_is_that_of_probes_fitted_by_hand_on_the_other_folds(kind: str) -> None:
    """Sums of folds, shared by all labellings, are the same as fits on the states; also for top 2."""
    x, y = planted.linear(120, gap=2)
    groups = np.arange(120) // 3
    options = {"hidden": 16, "epochs": 5} if kind == "mlp" else {}
    for folds in (4, 0.3):
        for top_k in (1, 2):
            found = probe_states({"a": x}, y, groups=groups, kind=kind, folds=folds, top_k=top_k, seed=3, **options)
            parts = split(groups, y, folds, 3)
            right: list[bool] = []
            for fold in parts.held:
                train, test = parts.part != fold, parts.part == fold
                scores = fit_probe(kind, x[train], y[train], seed=3, **options).scores(x[test])
                right += [c in row for c, row in zip(y[test], np.argsort(-scores)[:, :top_k], strict=True)]
            assert found.accuracy[0] == pytest.approx(np.mean(right), abs=1e-12)
            assert found.about["held_out"] == len(right)


def words(rows: int, kinds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """States of words in context, each word's own vector and a little noise; and which word each is."""
    draw = np.random.default_rng(seed)
    types = draw.integers(0, kinds, rows)
    return 2 * draw.normal(size=(kinds, 64))[types] + 0.5 * draw.normal(size=(rows, 64)), types


def test_what_is_memorised_is_not_selective() -> None:
    x, types = words(500, 40, 0)
    labels = np.random.default_rng(1).permutation(np.arange(40) % 2)[types]
    for kind in ("logistic", "ridge"):
        found = probe_states({"a": x}, labels, types=types, kind=kind)
        assert found.accuracy[0] > 0.9, kind
        assert found.control[0] > 0.9, kind
        assert abs(found.selectivity[0]) < 0.06, kind
    # Words that are held out cannot be memorised: neither task is above chance.
    found = probe_states({"a": x}, labels, groups=types, kind="ridge")
    assert found.accuracy[0] < 0.75
    assert found.selectivity_low[0] < 0 < found.selectivity_high[0]


def test_what_is_in_the_states_is_selective() -> None:
    draw = np.random.default_rng(0)
    _, types = words(600, 300, 0)
    labels = (np.arange(300) % 2)[types]
    x = draw.normal(size=(600, 8))
    x[:, 0] += 3 * labels
    found = probe_states({"a": x}, labels, types=types, kind="lda")
    assert found.accuracy[0] > 0.85
    assert found.selectivity_low[0] > 0.2
    assert found.selectivity[0] == pytest.approx(found.accuracy[0] - found.control[0])
    width = found.selectivity_high[0] - found.selectivity_low[0]
    assert 0.02 < width < 0.3


@pytest.mark.parametrize(("folds", "least"), [(5, 31), (0.3, 34)])
def test_noise_is_at_chance_and_mostly_within_its_intervals(folds: float, least: int) -> None:
    """Folds share training rows, so that with five of them fewer than 95 % of the intervals hold the truth."""
    accuracies: list[float] = []
    held = selective = 0
    for seed in range(40):
        x, y = planted.noise(200, seed=seed)
        found = probe_states({"a": x}, y, kind="ridge", folds=folds, seed=seed, resamples=300)
        accuracies.append(float(found.accuracy[0]))
        held += found.low[0] <= 0.5 <= found.high[0]
        selective += found.selectivity_low[0] <= 0 <= found.selectivity_high[0]
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.03)
    assert held >= least
    assert selective >= least


def test_groups_do_not_leak() -> None:
    """Pure noise, each row five times: told by heart if its copies are trained on, and not otherwise."""
    x, y = planted.noise(100, width=150)
    x, y, groups = np.repeat(x, 5, axis=0), np.repeat(y, 5), np.repeat(np.arange(100), 5)
    for kind in ("ridge", "logistic"):
        honest = probe_states({"a": x}, y, groups=groups, kind=kind, control=False)
        leaky = probe_states({"a": x}, y, kind=kind, control=False)
        assert abs(honest.accuracy[0] - 0.5) < 0.2, kind
        assert honest.low[0] < 0.5 < honest.high[0], kind
        assert leaky.accuracy[0] > 0.95, kind


def test_permutation_p_values() -> None:
    x, y = planted.linear(80, classes=2, gap=2)
    there = probe_states({"a": x}, y, kind="ridge", permutations=49, control=False)
    assert there.p[0] == pytest.approx(1 / 50)
    ps: list[float] = []
    for seed in range(60):
        x, y = planted.noise(40, width=5, seed=seed)
        found = probe_states({"a": x}, y, kind="mean-difference", permutations=19, control=False, seed=seed, folds=4)
        ps.append(float(found.p[0]))
    assert min(ps) >= 1 / 20
    # Uniform on 1/20 ... 1, or larger because of ties: the mean is 0.525 + ties, and few are small.
    assert 0.43 < np.mean(ps) < 0.68
    assert np.mean(np.array(ps) <= 0.1) < 0.2
    assert np.mean(np.array(ps) <= 0.5) > 0.3


def test_permutations_by_groups_are_not_fooled_by_copies() -> None:
    x, y = planted.noise(24, width=4, seed=5)
    x, y, groups = np.repeat(x, 10, axis=0), np.repeat(y, 10), np.repeat(np.arange(24), 10)
    found = probe_states({"a": x}, y, groups=groups, kind="ridge", permutations=39, control=False, folds=4)
    assert found.p[0] > 0.05


def test_a_perfect_probe_where_one_group_at_a_time_is_held_out() -> None:
    """Each part has one label to permute, so labels have to move between parts."""
    draw = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 3)
    y = groups % 2
    x = draw.normal(size=(36, 4))
    x[:, 0] += 20 * y
    for kind in ("ridge", "logistic"):
        found = probe_states({"a": x}, y, groups=groups, kind=kind, folds=12, permutations=39, control=False)
        assert found.accuracy[0] == 1
        assert found.p[0] <= 2 / 40, kind
        assert found.about["permuted"] == "labels among groups"
        assert found.about["held_out_groups"] == 12
        assert found.baseline == 0.5


def test_permutations_are_split_and_fitted_as_the_labels_are() -> None:
    x, y = planted.linear(60, gap=1)
    groups = np.arange(60) // 2
    y = y[2 * groups]
    for folds in (5, 0.3):
        found = probe_states(
            {"a": x}, y, groups=groups, kind="lda", folds=folds, permutations=9, unseen="count", control=False
        )
        alone = [
            probe_states({"a": x}, codes, groups=groups, kind="lda", folds=folds, unseen="count", control=False)
            for codes in chance.permuted_codes(groups, y, 9, 0)[0]
        ]
        better = sum(other.accuracy[0] >= found.accuracy[0] - 1e-12 for other in alone)
        assert found.p[0] == (1 + better) / 10


def test_one_row_with_another_label_does_not_make_p_small() -> None:
    """States and labels of groups have nothing to do with each other; rows of a group are all alike."""
    small = 0
    for seed in range(60):
        draw = np.random.default_rng(seed)
        groups = np.repeat(np.arange(20), 8)
        y = draw.permutation(np.arange(20) % 2)[groups]
        y[0] = 1 - y[0]
        x = draw.normal(size=(20, 3))[groups] + 0.1 * draw.normal(size=(160, 3))
        found = probe_states(
            {"a": x}, y, groups=groups, kind="mean-difference", permutations=19, control=False, seed=seed, folds=4
        )
        small += found.p[0] <= 0.05
    assert small <= 8  # 3 on average; P(more than 8) is 0.003


def test_p_is_missing_where_labels_cannot_be_permuted() -> None:
    draw = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), np.arange(1, 7))
    y = groups % 2
    y[-1] = 0
    found = probe_states(
        {"a": draw.normal(size=(21, 3))}, y, groups=groups, kind="ridge", permutations=99, folds=2, control=False
    )
    assert np.isnan(found.p).all()
    assert found.about["permuted"].startswith("nothing: ")


def test_labels_that_are_not_trained_on() -> None:
    x, y = planted.linear(100)
    y[7], y[8] = 3, 3
    groups = np.arange(100)
    groups[8] = 7
    with pytest.raises(InputError, match=r"no row of the training part of fold \d has the label 3, which 1 group has"):
        probe_states({"a": x}, y, groups=groups)
    found = probe_states({"a": x}, y, groups=groups, unseen="count", kind="lda")
    assert found.label_overlap == pytest.approx(0.98)
    assert found.accuracy[0] <= 0.98
    assert "2.0% of the rows held out" in " ".join(repr(found).split())


def test_one_seed_one_report() -> None:
    x, y = planted.linear(90, gap=1)
    one, same, other = (probe_states({"a": x}, y, kind="ridge", permutations=5, seed=seed) for seed in (0, 0, 1))
    assert one.data().identical(same.data())
    assert not one.data().identical(other.data())
    state = np.random.get_state()[1]
    probe_states({"a": x}, y, kind="ridge")
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]


def test_states_are_read_as_they_are(llama: ll.Model) -> None:
    """Arrays, tensors, mapped files and activations of the same numbers give the same report."""
    prompts = [zoo.ids(5, seed=s) for s in range(20)]
    kept = ll.capture(llama, prompts, positions=-1)
    y = np.arange(20) % 2
    arrays = {str(s): kept[s].numpy() for s in kept.sites}
    tensors = {str(s): kept[s] for s in kept.sites}
    reports = [probe_states(given, y, kind="ridge").data() for given in (kept, arrays, tensors)]
    assert reports[0].identical(reports[1])
    assert reports[0].identical(reports[2])
    two = ll.capture(llama, prompts, positions=[1, -1])
    assert probe_states(two, np.repeat(y, 2), kind="ridge").about["groups"] == 20
    again = ll.capture(llama, [*prompts, *prompts], positions=-1)
    assert probe_states(again, np.tile(y, 2), kind="ridge").about["groups"] == 20


# -- a model -------------------------------------------------------------------------------------


def last_tokens(rows: int = 60, seed: int = 0) -> tuple[list[list[int]], list[str], np.ndarray]:
    """Prompts that end in one of six tokens, a label that is a function of it, and the token."""
    draw = np.random.default_rng(seed)
    ends = draw.permutation(np.arange(rows) % 6) + 20
    prompts = [[*draw.integers(30, 290, 4).tolist(), int(end)] for end in ends]
    return prompts, ["odd" if end % 2 else "even" for end in ends], ends


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_of_the_last_token_is_told_at_the_embedding(llama: ll.Model, kind: str) -> None:
    """But so is the control task, since tokens are seen again: what is told there is the token."""
    prompts, labels, ends = last_tokens()
    options = {"hidden": 32, "rate": 0.03, "epochs": 15} if kind == "mlp" else {}
    found = probe(llama, prompts, labels, types=ends, kind=kind, sites="0.resid_pre", **options)
    if kind != "mean-difference":  # six points, whose means need not lie on the right sides
        assert found.accuracy[0] == found.control[0] == 1
        assert found.selectivity[0] == 0
    assert found.about["groups"] == 60
    assert found.about["types"] == 6
    assert found.sites == ("0.resid_pre",)
    token = probe(llama, prompts, ends, kind=kind, sites="0.resid_pre", control=False, **options)
    assert token.accuracy[0] == 1  # which token it is, every kind tells


def test_probe_is_capture_and_probe_states(llama: ll.Model) -> None:
    prompts, labels, _ = last_tokens()
    seen: list[tuple[int, int]] = []
    places = [n % 3 for n in range(60)]
    found = probe(llama, prompts, labels, position=places, kind="lda", progress=lambda *p: seen.append(p))
    kept = [ll.capture(llama, p, positions=at) for p, at in zip(prompts, places, strict=True)]
    states = {str(s): torch.cat([k[s] for k in kept]) for s in kept[0].sites}
    expected = probe_states(states, labels, kind="lda")
    for name in BY_SITE:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert seen[-1] == (64, 64)
    assert found.about["model"] == "tiny-llama"
    assert found.about["fingerprint"] == llama.fingerprint
    assert found.about["position"] == places
    assert found.about["versions"]["logitlab"] == ll.__version__
    assert zoo.hooks(llama.module) == 0


def test_equal_prompts_are_one_group(llama: ll.Model) -> None:
    """Labels at random: told by heart row by row, but not prompt by prompt."""
    few = [zoo.ids(6, seed=s) for s in range(12)]
    labels = np.random.default_rng(0).permutation(np.arange(12) % 2)
    prompts, y = few * 5, np.tile(labels, 5)
    leaky = probe(llama, prompts, y, groups=range(60), sites="2.resid_post", kind="ridge", control=False)
    assert leaky.accuracy[0] > 0.95
    honest = probe(llama, prompts, y, sites="2.resid_post", kind="ridge", control=False)
    assert honest.about["groups"] == 12
    assert honest.accuracy[0] < 0.85


def test_states_of_changed_models(llama: ll.Model) -> None:
    prompts, labels, _ = last_tokens()
    with iv.intervene(llama, iv.ablate("0.resid_pre", positions="last")):
        found = probe(llama, prompts, labels, kind="ridge", sites="0.resid_pre", control=False)
        with pytest.raises(InputError, match="folder= is for a model as it is"):
            probe(llama, prompts, labels, kind="ridge", folder="unused")
    assert found.accuracy[0] < 0.7
    assert found.about["interventions"][0]["change"]


@pytest.mark.parametrize("kind", ["lda", "logistic"])
def test_a_file_gives_the_same_and_goes_on(
    llama: ll.Model, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitlab.probes import states

    monkeypatch.setattr(states, "CHUNK", 16)
    prompts, labels, ends = last_tokens()
    sites = ["0.resid_pre", "1.head_out.2", "resid_post"]
    options: dict[str, Any] = {"kind": kind, "sites": sites, "types": ends}
    plain = probe(llama, prompts, labels, **options).data()

    calls: list[int] = []
    real = states.capture_encoded

    def broken(model: Any, some: Any, *rest: Any, **more: Any) -> Any:
        calls.append(len(some))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, some, *rest, **more)

    monkeypatch.setattr(states, "capture_encoded", broken)
    with pytest.raises(KeyboardInterrupt):
        probe(llama, prompts, labels, folder=tmp_path / "states", **options)
    found = probe(llama, prompts, labels, folder=tmp_path / "states", **options).data()
    assert calls == [16, 16, 16, 16, 12]
    for name in BY_SITE:
        np.testing.assert_allclose(found[name], plain[name], atol=1e-9)
    probe(llama, prompts, labels, folder=tmp_path / "states", **options)
    assert len(calls) == 5
    stored = np.load(tmp_path / "states" / "states.npy", mmap_mode="r")
    assert stored.shape == (5, 60, llama.width)
    assert stored.dtype == np.float32
    kept = ll.capture(llama, prompts, sites, positions=-1)
    for i, site in enumerate(kept.sites):
        np.testing.assert_allclose(stored[i], kept[site].numpy(), atol=1e-5)
    with pytest.raises(InputError, match=r"holds states of something else \(sites: "):
        probe(llama, prompts, labels, folder=tmp_path / "states", **(options | {"sites": "0.resid_pre"}))
    with pytest.raises(InputError, match="holds states of something else"):
        probe(llama, prompts, labels, folder=tmp_path / "states", position=0, **options)
    (tmp_path / "states" / "states.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        probe(llama, prompts, labels, folder=tmp_path / "states", **options)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="cannot write states to"):
        probe(llama, prompts, labels, folder=tmp_path / "file", **options)


def test_two_runs_do_not_write_into_one_folder(llama: ll.Model, tmp_path: Path) -> None:
    prompts, labels, _ = last_tokens()
    options: dict[str, Any] = {"kind": "ridge", "sites": "0.resid_pre", "control": False, "folder": tmp_path}
    refused: list[str] = []

    def second(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(InputError, match=r"another probe \(process \d+\) is at work in") as caught:
                probe(llama, prompts, labels, **options)
            refused.append(str(caught.value))

    first = probe(llama, prompts, labels, progress=second, **options)
    assert "\n" not in refused[0]
    assert probe(llama, prompts, labels, **options).data().identical(first.data())  # and the lock is gone


def test_states_that_are_gone_are_captured_anew(
    llama: ll.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitlab.probes import states

    prompts, labels, _ = last_tokens()
    options: dict[str, Any] = {"kind": "ridge", "sites": "0.resid_pre", "control": False, "folder": tmp_path}
    first = probe(llama, prompts, labels, **options)
    record = json.loads((tmp_path / "states.json").read_text(encoding="utf-8"))
    assert record["done"] == 60
    assert record["states"]["stack"] == llama.stack.name
    (tmp_path / "states.npy").unlink()

    def broken(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(states, "capture_encoded", broken)
        with pytest.raises(KeyboardInterrupt):
            probe(llama, prompts, labels, **options)
    # The file is there again, empty: the record must not call it done.
    assert json.loads((tmp_path / "states.json").read_text(encoding="utf-8"))["done"] == 0
    assert probe(llama, prompts, labels, **options).data().identical(first.data())
    record["states"]["stack"] = "another.stack"
    (tmp_path / "states.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match=r"holds states of something else \(stack: another.stack there"):
        probe(llama, prompts, labels, **options)


@pytest.mark.parametrize("kind", ["lda", "logistic"])
def test_memory_is_that_of_one_site(kind: str, tmp_path: Path) -> None:
    import tracemalloc

    draw = np.random.default_rng(0)
    file: Any = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", dtype=np.float32, shape=(12, 6000, 32))
    file[:] = draw.normal(size=file.shape)
    y = draw.integers(0, 2, 6000)
    one = 6000 * 32 * 8  # a site in float64
    probe_states({"warm": file[0, :50]}, y[:50], kind=kind)
    tracemalloc.start()
    probe_states({str(i): file[i] for i in range(12)}, y, kind=kind, resamples=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * one + 5 * 12 * 6000 * 8  # and which rows were right, at every site
    assert peak < 12 * one


def test_half_precision_models(llama: ll.Model) -> None:
    model = ll.wrap(zoo.build("llama").bfloat16(), zoo.tokenizer(), name="half")
    prompts, labels, _ = last_tokens()
    found = probe(model, prompts, labels, sites="0.resid_pre", kind="ridge", control=False)
    assert found.accuracy[0] == 1


def test_bad_input(llama: ll.Model) -> None:
    x, y = planted.linear(30)
    nan = x.copy()
    nan[4, 2] = np.inf
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        ({"a": x}, y[:-1], {}, "there are 29 labels for 30 rows"),
        ({"a": x}, np.ones(30), {}, "all labels are 1.0"),
        ({"a": x}, [*y[:-1], pd.NA], {}, "label 29 is missing"),
        ({"a": x}, [*y[:-1], None], {}, "label 29 is missing"),
        ({"a": x}, [y[:3]] * 30, {}, "label 0 is a ndarray: give texts or whole numbers"),
        ({"a": x}, [torch.zeros(3)] * 30, {}, "label 0 is a Tensor: give texts or whole numbers"),
        ({"a": x}, [(0, [1])] * 30, {}, "label 0 is a tuple: give texts or whole numbers"),
        ({"a": x}, y, {"groups": [pd.NA] * 30}, "entry of groups= 0 is missing"),
        ({"a": x}, y, {"classes": 5}, "classes= is 5: give a list of all labels"),
        ({"a": x}, y, {"classes": "012"}, "classes= is '012': give a list of all labels"),
        ({"a": x}, y, {"classes": [0, 1, [2]]}, "entry of classes= 2 is a list"),
        ({"a": x}, y, {"classes": [0, 1, 2, 3]}, "no row has the label 3"),
        ({"a": x}, y, {"groups": [0, 1]}, "there are 2 groups= for 30 rows"),
        ({"a": x}, y, {"types": [0, 1]}, "there are 2 types= for 30 rows"),
        ({"a": x}, y, {"groups": np.arange(30) % 4}, "there are 4 groups for 5 folds"),
        ({"a": x}, y, {"types": [0] * 30}, "all rows are of one type"),
        ({"a": nan}, y, {}, "the states of a are NaN or infinite in row 4"),
        ({"a": x}, y, {"kind": "svm"}, "kind is 'svm'"),
        ({"a": x}, y, {"hidden": 3}, "'logistic' has no option 'hidden'"),
        ({"a": x}, y, {"top_k": 4}, "top_k is 4, and there are 3 classes"),
        ({"a": x}, y, {"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"a": x}, y, {"folds": 31}, "there are 30 groups for 31 folds"),
        ({"a": x}, y, {"permutations": -1}, "permutations is -1"),
        ({"a": x}, y, {"resamples": 0}, "resamples is 0"),
        ({"a": x}, y, {"seed": -1}, "seed is -1"),
        ({"a": x}, y, {"unseen": "skip"}, "unseen is 'skip'"),
        ({"a": x, "b": x[:4]}, y, {}, r"the states of b have the shape \[4, 16\]"),
        ({"a": x[0]}, y, {}, r"the states of a have the shape \[16\]"),
        ({}, y, {}, "give Activations"),
        (x, y, {}, "give Activations"),
    ]
    for states, labels, options, match in cases:
        with pytest.raises(InputError, match=match) as caught:
            probe_states(states, labels, **options)
        assert "\n" not in str(caught.value)
    prompts, labels, _ = last_tokens(12)
    prompts[5] = prompts[5][:2]
    given: list[tuple[dict[str, Any], str]] = [
        ({"position": 3}, "position 3 is out of range: prompt 5 has 2 tokens"),
        ({"position": [0, 1]}, "there are 2 positions for 12 prompts"),
        ({"position": 0.5}, "position 0.5 is not a whole number"),
        ({"sites": "7.resid_post"}, "layer 7 is out of range"),
    ]
    for options, match in given:
        with pytest.raises(InputError, match=match):
            probe(llama, prompts, labels, **options)
    vit = ll.wrap(__import__("logitlab.zoo", fromlist=["build"]).build("image-classification", "vit"), name="vit")
    pixels = {"pixel_values": torch.zeros(vit.template.inputs["pixel_values"].shape)}
    with pytest.raises(InputError, match=r"probe\(\) is for models that are read token by token"):
        probe(vit, pixels, ["a"])
