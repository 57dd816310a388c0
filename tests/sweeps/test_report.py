"""Sums and intervals against plain code over single tokens."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from logitlab.errors import InputError
from logitlab.sweeps.report import ALL, SweepReport, student
from logitlab.sweeps.sums import CONFIDENCES, MEASURES, RANKS, Adder, Sums, Tokens


def draw(windows: int, each: int, sites: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], Tokens]:
    generator = torch.Generator().manual_seed(seed)
    n = windows * each
    window = torch.arange(windows).repeat_interleave(each)
    next_id = torch.randint(0, 50, (n,), generator=generator)
    next_id[::each] = -1
    values = {
        name: torch.rand(sites, n, generator=generator, dtype=torch.float64)
        for name in ("kl", "entropy", "overlap", "confidence", "cross_entropy")
    }
    values["agreement"] = (torch.rand(sites, n, generator=generator) < 0.7).double()
    values["agreement"][-1] = 1.0
    values["accuracy"] = (torch.rand(sites, n, generator=generator) < 0.4).double()
    values["rank"] = torch.randint(1, 3000, (sites, n), generator=generator).double()
    for name in ("cross_entropy", "accuracy", "rank"):
        values[name][:, next_id < 0] = torch.nan
    return values, Tokens(window, next_id, torch.zeros(n, 1, dtype=torch.long))


def report_of(values: dict[str, torch.Tensor], tokens: Tokens, windows: int, sites: int) -> SweepReport:
    adder = Adder(windows, sites, stream=True)
    half = len(tokens.window) // 3  # a window comes in two pieces
    for rows in (slice(0, half), slice(half, None)):
        adder.add({k: v[:, rows] for k, v in values.items()}, tokens.at(rows))
    return SweepReport([f"{i}.resid_post" for i in range(sites)], {"lens": {ALL: adder.sums(list(range(windows)))}})


def test_means_and_intervals_are_those_of_a_ratio_over_windows() -> None:
    values, tokens = draw(12, 9, 4)
    report = report_of(values, tokens, 12, 4)
    for name in MEASURES:
        for site in range(4):
            value = values[name][site]
            known = ~value.isnan()
            found = report.measure(name, site=site)
            assert found.mean == pytest.approx(float(value[known].mean()), abs=1e-12)
            assert found.tokens == int(known.sum())
            s = torch.stack([value[known & (tokens.window == w)].sum() for w in range(12)])
            n = torch.stack([(known & (tokens.window == w)).sum() for w in range(12)]).double()
            error = math.sqrt(12 / 11 * float(((s - found.mean * n) ** 2).sum())) / float(n.sum())
            assert found.high - found.mean == pytest.approx(2.200985 * error, rel=1e-4, abs=1e-9)
            assert found.low - found.mean == pytest.approx(-(found.high - found.mean), abs=1e-12)


def test_the_interval_covers_the_truth() -> None:
    """95 % of the intervals of dependent tokens hold the mean that they were drawn around."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        level = torch.randn(10, generator=generator, dtype=torch.float64).repeat_interleave(20)  # a window's own level
        value = (level + torch.randn(200, generator=generator, dtype=torch.float64)).unsqueeze(0)
        tokens = Tokens(torch.arange(10).repeat_interleave(20), torch.full((200,), -1), torch.zeros(200, 1).long())
        adder = Adder(10, 1, stream=False)
        ones = torch.ones_like(value)
        adder.add({"kl": value, "agreement": ones, "confidence": ones, "accuracy": ones}, tokens)
        report = SweepReport(["0.resid_post"], {"lens": {ALL: adder.sums(list(range(10)))}})
        found = report.measure("kl")
        hits += found.low <= 0.0 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_windows_without_a_value_do_not_count() -> None:
    values, tokens = draw(6, 5, 2)
    for window in (1, 4):
        values["cross_entropy"][:, tokens.window == window] = torch.nan
    report = report_of(values, tokens, 6, 2)
    kept = ~torch.isin(tokens.window, torch.tensor([1, 4]))
    renumbered = torch.unique(tokens.window[kept], return_inverse=True)[1]
    some = {name: value[:, kept] for name, value in values.items()}
    alone = report_of(some, Tokens(renumbered, tokens.next_id[kept], tokens.final_ids[kept]), 4, 2)
    found, truth = (r.measure("cross_entropy", site=0) for r in (report, alone))
    assert (found.low, found.mean, found.high) == pytest.approx((truth.low, truth.mean, truth.high))
    for window in (0, 2, 3):
        values["cross_entropy"][:, tokens.window == window] = torch.nan
    single = report_of(values, tokens, 6, 2).measure("cross_entropy", site=0)
    assert not math.isnan(single.mean)
    assert math.isnan(single.low)


def test_ranks_depths_and_calibration() -> None:
    values, tokens = draw(5, 8, 3)
    report = report_of(values, tokens, 5, 3)
    has = tokens.next_id >= 0
    for site in range(3):
        ranks = values["rank"][site][has].numpy()
        bins = np.minimum(np.floor(np.log2(ranks)).astype(int), RANKS - 1)
        np.testing.assert_array_equal(report.ranks(site=site), np.bincount(bins, minlength=RANKS))
        sure, right = values["confidence"][site][has].numpy(), values["accuracy"][site][has].numpy()
        place = np.minimum((sure * CONFIDENCES).astype(int), CONFIDENCES - 1)
        error = 0.0
        for b in range(CONFIDENCES):
            mine = place == b
            if mine.any():
                row = report.calibration(site=site)[b]
                np.testing.assert_allclose(row, [mine.sum(), sure[mine].mean(), right[mine].mean()])
                error += mine.sum() * abs(sure[mine].mean() - right[mine].mean())
        assert report.calibration_error(site=site) == pytest.approx(error / has.sum().item())
    same = values["agreement"].bool().numpy()
    truth = [next(i for i in range(3) if same[i:, t].all()) for t in range(same.shape[1])]
    np.testing.assert_array_equal(report.depths(), np.bincount(truth, minlength=3))


def merged(pieces: list[dict[str, Sums]]) -> dict[str, Sums]:
    found: dict[str, Sums] = {}
    for piece in pieces:
        for group, sums in piece.items():
            found.setdefault(group, Sums.nothing(2)).add(sums)
    return found


def test_sums_merge_to_the_same_bits_and_come_back_from_disk(tmp_path: Path) -> None:
    pieces = []
    for seed in range(3):
        values, tokens = draw(4, 6, 2, seed)
        adder = Adder(4, 2, stream=True)
        adder.add(values, tokens)
        pieces.append({ALL: adder.sums([0, 1, 2, 3]), "lang=en": adder.sums([1, 3])})
    one, other = merged(pieces), merged(pieces)
    report = SweepReport(["a.resid_post", "b.resid_post"], {"lens": one}, {"corpus": {"name": "x"}})
    report.save(tmp_path)
    first = (tmp_path / "report.json").read_bytes()
    SweepReport(["a.resid_post", "b.resid_post"], {"lens": other}, {"corpus": {"name": "x"}}).save(tmp_path)
    assert (tmp_path / "report.json").read_bytes() == first
    back = SweepReport.load(tmp_path)
    assert back.about == report.about
    assert back.groups == [ALL, "lang=en"]
    for group in back.groups:
        for name, value in back.sums["lens"][group].arrays().items():
            np.testing.assert_array_equal(value, report.sums["lens"][group].arrays()[name])
    table = back.to_pandas()
    assert len(table) == 4
    assert table.loc[0, "kl"] == back.measure("kl", site=0).mean
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        SweepReport.load(tmp_path)
    with pytest.raises(InputError, match="is missing"):
        SweepReport.load(tmp_path / "no")


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (10, 2.22814), (30, 2.04227), (500, 1.96472)],
)
def test_students_t(freedom: int, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, rel=1e-5)


def test_what_is_not_there_is_said() -> None:
    values, tokens = draw(3, 4, 2)
    report = report_of(values, tokens, 3, 2)
    for call, match in (
        (lambda: report.measure("loss"), "no measure 'loss'"),
        (lambda: report.measure("kl", "tuned"), "no lens 'tuned' in this sweep; there are lens"),
        (lambda: report.measure("kl", site="9.resid_post"), r"no site '9\.resid_post'"),
        (lambda: report.measure("kl", site=5), "no site number 5"),
        (lambda: report.measure("kl", group="lang=fr"), "no group 'lang=fr'"),
    ):
        with pytest.raises(InputError, match=match):
            call()
    single = SweepReport(["0.resid_post"], {"lens": {ALL: Sums.nothing(1)}})
    assert math.isnan(single.measure("kl").mean)
    assert math.isnan(single.calibration_error())
