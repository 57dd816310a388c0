"""Curves and tables of a sweep show its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import logitlab as ll
from logitlab.errors import InputError
from logitlab.lenses import LogitLens
from logitlab.sweeps import SweepReport, sweep
from logitlab.views.curves import curves, figure, table
from tests import zoo
from tests.lenses.test_fitted import changed
from tests.words import rows as texts


@pytest.fixture(scope="module")
def report() -> SweepReport:
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
    return sweep(model, texts(), lens={"logit lens": LogitLens(), "bias lens": changed(model, "bias")}, length=16)


def test_lines_are_the_means_and_bands_the_intervals(report: SweepReport) -> None:
    drawn = figure(report, measures=["kl", "accuracy"])
    ax = drawn.axes[0]
    assert [t.get_text() for t in drawn.legends[0].get_texts()] == ["logit lens", "bias lens"]
    for line, lens in zip(ax.lines, report.lenses, strict=True):
        means = [report.measure("kl", lens, i).mean for i in range(len(report.sites))]
        np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), means)
    low = report.measure("kl", "logit lens", 1).low
    corners = ax.collections[0].get_paths()[0].vertices
    assert np.isclose(np.asarray(corners), [1.0, low]).all(axis=1).any()
    shares = np.asarray(drawn.axes[2].lines[0].get_ydata(), dtype=float)
    np.testing.assert_allclose(shares.sum(), 1.0)


def test_groups_are_lines_too() -> None:
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
    found = sweep(model, texts(), group="lang", length=16)
    assert {t.get_text() for t in figure(found).legends[0].get_texts()} == {"all", "en", "de"}


def test_labels_are_no_formulas(tmp_path: Path) -> None:
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
    rows = [{"text": t["text"], "lang": r"$\frac$" if n % 2 else "_x"} for n, t in enumerate(texts())]
    found = sweep(model, rows, group="lang", length=16)
    curves(found, tmp_path / "x.png")
    assert {t.get_text() for t in figure(found).legends[0].get_texts()} == {"all", "_x", r"$\frac$"}


def test_parts_of_blocks_have_no_depth() -> None:
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
    found = sweep(model, texts(), sites="mlp_out", length=16)
    assert len([ax for ax in figure(found, measures=["kl"]).axes if ax.axison]) == 1


def test_the_same_report_gives_the_same_file(report: SweepReport, tmp_path: Path) -> None:
    for ending in ("png", "svg", "pdf"):
        one, other = (curves(report, tmp_path / f"{n}.{ending}") for n in "ab")
        assert one.read_bytes() == other.read_bytes()
    with pytest.raises(InputError, match=r"must end in \.png"):
        curves(report, tmp_path / "x.gif")
    with pytest.raises(InputError, match="no measure 'loss'"):
        figure(report, measures=["loss"])


def test_the_table_has_a_row_for_each_site(report: SweepReport) -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    for one in table(report, 120):
        console.print(one)
    text = console.export_text()
    found = report.measure("kl", "bias lens", 0)
    assert f"{found.mean:.3f} ±{(found.high - found.low) / 2:.3f}" in text
    assert text.count("\n") >= 2 * (len(report.sites) + 2)
    narrow = table(report, 30)
    assert len(narrow[0].columns) == 2
