"""The table and the figure of probes show their numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from logitlab.errors import InputError
from logitlab.probes import ProbeReport, probe_states
from logitlab.views.probes import figure
from tests.probes import planted


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    x, y = planted.linear(150)
    noise = np.random.default_rng(0).normal(size=x.shape)
    states = {"0.resid_pre": noise, "0.resid_post": x + 3 * noise, "1.resid_post": x}
    return probe_states(states, y, kind="lda", permutations=9)


def test_lines_are_the_accuracies_and_bands_the_intervals(report: ProbeReport) -> None:
    axes = figure(report).axes[0]
    labels = ["accuracy", "control task", "most frequent class"]
    assert [line.get_label() for line in axes.lines] == labels
    np.testing.assert_array_equal(np.asarray(axes.lines[0].get_ydata()), report.accuracy)
    np.testing.assert_array_equal(np.asarray(axes.lines[1].get_ydata()), report.control)
    assert np.asarray(axes.lines[2].get_ydata())[0] == report.baseline
    corners = np.asarray(axes.collections[0].get_paths()[0].vertices)
    for end in (report.low[1], report.high[1]):
        assert np.isclose(corners, [1.0, end]).all(axis=1).any()
    assert [t.get_text() for t in axes.get_xticklabels()] == ["in", "0", "1"]


def test_the_table_has_a_row_for_each_site(report: ProbeReport) -> None:
    text = repr(report)
    for row in report.rows():
        (line,) = (t for t in text.splitlines() if t.startswith(row["site"]))
        for name, low, high in (
            ("accuracy", "low", "high"),
            ("control", "control_low", "control_high"),
            ("selectivity", "selectivity_low", "selectivity_high"),
        ):
            assert f"{row[name]:.3f} [{row[low]:.3f}, {row[high]:.3f}]" in line
        assert line.endswith(f"{row['p']:.3f}")
    assert f"most frequent class: {report.baseline:.3f}; 95 % intervals over 150 held-out groups" in text
    data = report.data()
    assert float(data.accuracy.sel(site="1.resid_post")) == report.accuracy[2]
    assert float(data.baseline) == report.baseline
    assert data.attrs["kind"] == "lda"
    assert report.table().row_count == 3


def test_the_same_report_gives_the_same_file(report: ProbeReport, tmp_path: Path) -> None:
    for ending in ("png", "svg", "pdf"):
        one, other = (report.figure(tmp_path / f"{n}.{ending}") for n in "ab")
        assert one.read_bytes() == other.read_bytes()
    with pytest.raises(InputError, match=r"must end in \.png"):
        report.figure(tmp_path / "x.gif")


def test_names_are_no_markup(tmp_path: Path) -> None:
    x, y = planted.linear(60)
    found = probe_states({"[bold]$\\frac\x1b[31m": x}, y, kind="lda", control=False, top_k=2)
    assert "[bold]$\\frac\\x1b[31m" in repr(found)
    assert "top-2 accuracy" in repr(found)
    assert "control" not in repr(found)
    found.figure(tmp_path / "a.png")
