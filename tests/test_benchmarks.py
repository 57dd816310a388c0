"""What the benchmarks write is what they found, and they start; nothing is measured here."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(p.name for p in FOLDER.glob("*.py") if "__main__" in p.read_text(encoding="utf-8"))
SCRIPTS.remove("gpu.py")  # it takes no options, and measures where there is a GPU


@pytest.fixture(scope="module", autouse=True)
def folder() -> Iterator[None]:
    """benchmarks/ is no package: its scripts find each other beside themselves."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and FOLDER in Path(file).parents:
            del sys.modules[name]


@pytest.fixture
def run() -> ModuleType:
    return importlib.import_module("run")


@pytest.fixture
def results(run: ModuleType) -> dict[str, Any]:
    return json.loads(run.RESULTS.read_text(encoding="utf-8"))


def made(seconds: dict[str, float], unfit: tuple[str, ...] = ()) -> dict[str, Any]:
    """Results of one length of `compare`."""
    times = {"by_hand: forward": 1.0, "by_hand: product": 0.5, "by_hand: product torch.mm": 1.0}
    times |= {"by_hand: product bfloat16": 0.5} | seconds
    return {
        "seconds": {key: [value] for key, value in times.items()},
        "memory": {key: [100 * value] for key, value in times.items()},
        "does_not_fit": list(unfit),
        "ways": {key: "uncut" for key in times if "product" in key},
    }


def test_page_is_written_from_the_results(run: ModuleType, results: dict[str, Any]) -> None:
    assert run.page(results) == run.PAGE.read_text(encoding="utf-8"), "run `python benchmarks/run.py --page`"


def test_readme_has_the_numbers_of_the_results(run: ModuleType, results: dict[str, Any]) -> None:
    numbers = run.summary(results)
    if numbers is None:
        pytest.skip("256 tokens have not been measured beside others")
    readme = run.README.read_text(encoding="utf-8")
    assert readme.partition(run.BEFORE)[2].partition(run.AFTER)[0] == f"\n{numbers}\n\n"


def test_summary_says_what_does_not_fit(run: ModuleType) -> None:
    part = made({"by_hand: top": 4.0, "interpreto: top": 3.0}, ("by_hand: all", "tuned_lens: top", "tuned_lens: all"))
    lines = run.summary({"compare": {"found": {"lengths": {"256": part}}}}).splitlines()
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)}
    assert rows["the usual loop, written by hand"] == ["2.00", "+300 MB", "does not fit", "does not fit"]
    assert rows["tuned-lens"] == ["does not fit"] * 4
    assert rows["interpreto"] == ["1.50", "+200 MB", "not offered", ""]


def test_page_says_where_a_section_was_measured_otherwise(run: ModuleType) -> None:
    about = importlib.import_module("machine").described()
    first, other = (dict(about, commit=c) for c in ("aaa1111", "bbb2222 with local changes"))
    memory = {"256": dict.fromkeys(importlib.import_module("memory").CASES, 100.0)}
    two = {
        "compare": {"machine": first, "found": {"lengths": {"16": made({"by_hand: top": 4.0})}}},
        "memory": {"machine": other, "found": memory},
    }
    text = run.page(two)
    assert f"{first['date']}, commit aaa1111." in text
    assert text.count("*This section:") == 1
    assert "*This section: commit bbb2222 with local changes.*" in text.partition("## Memory")[2]
    assert run.summary(two) is None


def test_threads_and_weights_that_differ_stop_the_comparison() -> None:
    compare = importlib.import_module("compare")

    class Fake:
        def __init__(self, name: str, threads: int, dtype: str) -> None:
            self.name, self.threads, self.dtypes = name, threads, [dtype]

    same = Fake("a", 2, "torch.float32")
    compare.check_alike([same, Fake("b", 2, "torch.float32")])
    with pytest.raises(SystemExit, match=r"threads differ.*a: 2; b: 1"):
        compare.check_alike([same, Fake("b", 1, "torch.float32")])
    with pytest.raises(SystemExit, match="weights differ"):
        compare.check_alike([same, Fake("b", 2, "torch.bfloat16")])


def test_every_way_of_the_floor_visits_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    floor = importlib.import_module("floor")
    rows, head = torch.randn(5, 8), torch.randn(11, 8)
    seen: list[torch.Tensor] = []
    multiply, linear = torch.mm, torch.nn.functional.linear

    def kept(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(multiply(a, b, **options).clone())
        return seen[-1]

    def also_kept(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(linear(a, b).to_dense())
        return seen[-1]

    monkeypatch.setattr(torch, "mm", kept)
    monkeypatch.setattr(torch.nn.functional, "linear", also_kept)
    want = rows @ head.T
    libraries = floor.LIBRARIES if torch.backends.mkldnn.is_available() else ("mm",)
    for library in libraries:
        for block in (0, 2):
            for part in (0, 4):
                for transposed in (False, True):
                    seen.clear()
                    floor.Product(rows, head, floor.Way(library, block, part, transposed))()
                    pieces = [piece.T if transposed else piece for piece in seen]
                    across = 3 if part else 1
                    whole = torch.cat([torch.cat(pieces[i : i + across], 1) for i in range(0, len(pieces), across)])
                    torch.testing.assert_close(whole, want)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_explain_themselves(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert ended.value.code == 0
    assert f"benchmarks/{script}" in capsys.readouterr().out
