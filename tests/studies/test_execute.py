"""Runs from end to end: what is written, and what is done again after a run was broken off."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import logitlab as ll
from logitlab.interventions import intervene, scale
from logitlab.studies import Claim, Finding, Parameter, Picture, Progress, Run, Step, Study, report, run_study
from logitlab.studies.execute import _source
from logitlab.studies.folder import RunFolder
from tests.commands import files
from tests.studies import toy
from tests.studies.toy import STUDY, UNITS, log

CODE = "from logitlab.studies import run_study; from tests.studies.toy import STUDY; run_study(STUDY, out={!r})"


def _bytes(folder: Path) -> dict[str, bytes]:
    """Tables and arrays of a run."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for d in ("tables", "arrays") for p in sorted((folder / d).iterdir())
    }


def _study(**changes: Any) -> Study:
    return dataclasses.replace(STUDY, **changes)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run_study(STUDY, out=folder)
    return folder


def _values(unit: str, seed: int = 0, draws: int = 100) -> np.ndarray:
    """What the toy study draws, by a run's generator and nothing else."""
    run = Run(STUDY, None, "small", seed, _Anywhere())  # type: ignore[arg-type]
    return run.rng("draw", unit).normal(1.0, 1.0, draws)


class _Anywhere:
    path = Path()


def test_tables_have_what_the_steps_gave(unbroken: Path) -> None:
    numbers = pd.read_parquet(unbroken / "tables" / "draw-numbers.parquet")
    assert list(numbers.columns) == ["unit", "draw", "value"]
    assert list(numbers.unit.unique()) == list(UNITS)
    for unit in UNITS:
        assert np.array_equal(numbers.value[numbers.unit == unit], _values(unit))
    means = pd.read_parquet(unbroken / "tables" / "draw-means.parquet")
    assert list(means.columns) == ["unit", "mean", "spread"]  # a column of the author's own is left alone
    assert np.array_equal(means["mean"], [_values(unit).mean() for unit in UNITS])
    squares = pd.read_parquet(unbroken / "tables" / "squares.parquet")
    assert np.array_equal(squares.square, numbers.value**2)
    assert np.array_equal(squares.kept, numbers.value)  # through the arrays


def test_what_a_run_leaves(unbroken: Path) -> None:
    arrays = [f"arrays/values-{i}.safetensors" for i in range(4)]
    tables = ["tables/draw-means.parquet", "tables/draw-numbers.parquet", "tables/squares.parquet"]
    names = ["arrays", *arrays, "log", "manifest.json", "report.html", "run.lock", "tables", *tables]
    assert files(unbroken) == sorted(names)


def test_the_manifest_says_how_it_came_about(unbroken: Path) -> None:
    record = json.loads((unbroken / "manifest.json").read_text())
    assert (record["study"], record["version"], record["scale"], record["seed"]) == ("toy", 1, "small", 0)
    assert record["parameters"]["draws"] == {"value": 100, "paper": 1000}
    assert record["parameters"]["layers"] == {"value": [1, 2], "paper": [1, 2]}
    assert record["differs"] == ["draws", "limit"]
    assert record["model"] is None
    assert record["state"] == "done"
    assert record["steps"]["draw"]["tables"] == ["draw-numbers", "draw-means"]
    assert [unit["unit"] for unit in record["steps"]["draw"]["units"]] == list(UNITS)
    assert all(unit["seconds"] >= 0 and unit["started"] for unit in record["steps"]["draw"]["units"])
    (session,) = record["sessions"]
    assert session["versions"]["logitlab"] == ll.__version__
    assert session["versions"]["numpy"] == np.__version__
    assert session["python"].split(".")[:2] == [str(n) for n in sys.version_info[:2]]
    assert [claim["verdict"] for claim in record["claims"]] == [
        "reproduced",
        "not reproduced",
        "not testable at this scale",
    ]


def test_claims_have_the_numbers_of_the_tables(unbroken: Path) -> None:
    result = report(unbroken, study=STUDY)
    values = np.concatenate([_values(unit) for unit in UNITS])
    found = result.claims["positive"].finding
    assert found is not None
    width = 1.96 * values.std(ddof=1) / 20
    assert (found.value, found.low, found.high, found.n) == pytest.approx(
        (values.mean(), values.mean() - width, values.mean() + width, 400)
    )
    assert result.claims["rare"].note == "100 draws are too few"
    assert result.claims["rare"].finding is None
    assert result.tables == ["draw-numbers", "draw-means", "squares"]
    assert len(result.table("squares")) == 400


@pytest.mark.parametrize(("scale", "draws"), [("smoke", 5), ("small", 100), ("full", 1000)])
def test_scales(scale: str, draws: int, tmp_path: Path) -> None:
    assert len(run_study(STUDY, scale=scale, out=tmp_path / "run").table("squares")) == 4 * draws


def test_seeds_and_settings(tmp_path: Path) -> None:
    result = run_study(STUDY, seed=3, out=tmp_path / "run", set={"draws": 7})
    numbers = result.table("draw-numbers")
    assert np.array_equal(numbers.value[numbers.unit == "red"], _values("red", seed=3, draws=7))
    assert result.manifest["parameters"]["draws"] == {"value": 7, "paper": 1000}


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_study(STUDY, scale="smoke", seed=2).folder == Path("studies/toy-smoke-seed2")
    assert (tmp_path / "studies" / "toy-smoke-seed2" / "report.html").is_file()


def test_progress_counts_units(tmp_path: Path) -> None:
    seen: list[Progress] = []
    run_study(STUDY, scale="smoke", out=tmp_path / "run", progress=seen.append)
    draws = [p for p in seen if p.step == "draw"]
    assert [p.units_done for p in draws] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert draws[1] == Progress("draw", "red", 0, 4, 5, 5, "numbers drawn")
    assert seen[-1] == Progress("squares", "", 1, 1)


# -- broken off --------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "error"), [("error", RuntimeError), ("interrupt", KeyboardInterrupt)])
@pytest.mark.parametrize("unit", [UNITS[0], UNITS[2]])
def test_goes_on_after_an_error(
    how: str, error: type[BaseException], unit: str, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv("TOY_STOP", f"{how} {unit}")
    with pytest.raises(error):
        run_study(STUDY, out=folder)
    assert json.loads((folder / "manifest.json").read_text())["state"] == "interrupted"
    assert log(folder) == list(UNITS[: UNITS.index(unit)])
    monkeypatch.delenv("TOY_STOP")
    run_study(STUDY, out=folder)
    assert log(folder) == list(UNITS)  # each once
    assert _bytes(folder) == _bytes(unbroken)
    record = json.loads((folder / "manifest.json").read_text())
    assert record["state"] == "done"
    assert len(record["sessions"]) == 2
    assert not (folder / "parts").exists()


def test_goes_on_after_it_was_killed(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", CODE.format(str(folder))]
    done = subprocess.run(command, env=os.environ | {"TOY_STOP": "kill π/2"}, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert json.loads((folder / "manifest.json").read_text())["state"] == "running"
    (folder / "tables").mkdir(exist_ok=True)
    (folder / "tables" / ".draw-numbers.parquet.x.part").write_bytes(b"half")  # as if it was killed while writing
    run_study(STUDY, out=folder)
    assert log(folder) == list(UNITS)
    assert _bytes(folder) == _bytes(unbroken)


@pytest.mark.parametrize("moment", range(1, 13))
def test_killed_at_any_write(moment: int, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends just before the n-th file is moved into place; nothing is cleaned up after it."""
    folder, real, count = tmp_path / "run", Path.replace, [0]

    class Killed(BaseException):
        pass

    def replace(self: Path, target: Path) -> Path:
        count[0] += 1
        if count[0] >= moment:
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Killed):
            run_study(STUDY, out=folder)
    run_study(STUDY, out=folder)
    assert _bytes(folder) == _bytes(unbroken)
    assert not (folder / "parts").exists()


@pytest.mark.parametrize("which", ["draw", "squares"])
def test_killed_between_putting_together_and_clearing_up(
    which: str, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "run", RunFolder.remove_parts

    def remove(self: RunFolder, step: str) -> None:
        real(self, step) if step != which else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "remove_parts", remove)
        with pytest.raises(ZeroDivisionError):
            run_study(STUDY, out=folder)
    assert (folder / "parts" / which).is_dir()
    run_study(STUDY, out=folder)
    assert log(folder) == list(UNITS)
    assert _bytes(folder) == _bytes(unbroken)
    assert not (folder / "parts").exists()


def test_a_lost_table_is_made_again(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_study(STUDY, out=folder)
    (folder / "tables" / "draw-means.parquet").unlink()
    run_study(STUDY, out=folder)
    assert _bytes(folder) == _bytes(unbroken)


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_study(STUDY, scale="smoke", out=folder)
    before = {p: p.stat().st_mtime_ns for p in (folder / "tables").iterdir()}
    record = json.loads((folder / "manifest.json").read_text())
    run_study(STUDY, scale="smoke", out=folder)
    assert log(folder) == list(UNITS)
    assert {p: p.stat().st_mtime_ns for p in (folder / "tables").iterdir()} == before
    assert json.loads((folder / "manifest.json").read_text()) == record


def test_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", CODE.format(str(folder))]
    with subprocess.Popen(command, env=os.environ | {"TOY_STOP": f"wait {UNITS[1]}"}) as other:
        try:
            deadline = time.monotonic() + 30
            while not list(folder.glob("parts/draw/*.json")) and time.monotonic() < deadline:
                time.sleep(0.05)
            with pytest.raises(ll.InputError) as error:
                run_study(STUDY, out=folder)
            who = f"another run (process {other.pid})"
            assert str(error.value) == f"{who} is at work in {folder}: wait for it, or give another folder"
        finally:
            other.kill()
    run_study(STUDY, out=folder)  # the lock of a dead process keeps nobody out
    assert log(folder) == list(UNITS)


# -- refused -----------------------------------------------------------------------------------


def _refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ll.InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"seed": 1}, "seed: 0 there, 1 here"),
        (
            {},
            {"scale": "full"},
            "scale: small there, full here; parameters: draws: 100 there, 1000 here, limit: 3 there, None here",
        ),
        ({}, {"set": {"draws": 8}}, "parameters: draws: 100 there, 8 here"),
        ({"version": 2}, {}, "version: 1 there, 2 here"),
        ({"name": "other"}, {}, "study: toy there, other here"),
    ],
)
def test_another_run_in_the_folder(
    changes: dict[str, Any], options: dict[str, Any], words: str, unbroken: Path
) -> None:
    before = _bytes(unbroken)
    message = _refused(lambda: run_study(_study(**changes), out=unbroken, **options))
    assert message == f"{unbroken} holds another run ({words}): give another folder with --out, or the same arguments"
    assert _bytes(unbroken) == before


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    message = _refused(lambda: run_study(STUDY, out=tmp_path))
    assert message == f"{tmp_path} is not empty and holds no run that could go on; give a new folder with --out"
    message = _refused(lambda: run_study(STUDY, out=tmp_path / "notes.txt"))
    assert message == f"{tmp_path / 'notes.txt'} is a file; give a folder for the run"
    assert files(tmp_path) == ["notes.txt"]
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    (tmp_path / ".mine.part").write_text("mine")
    message = _refused(lambda: run_study(STUDY, out=tmp_path))
    assert (
        message
        == f"{tmp_path / 'manifest.json'} is no manifest that this version of logitlab writes: give another folder"
    )
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest.json cannot be read: Expecting property name" in _refused(lambda: run_study(STUDY, out=tmp_path))
    assert files(tmp_path) == [".mine.part", "manifest.json", "notes.txt"]


def test_arguments_that_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert (
        _refused(lambda: run_study(STUDY, out=out, scale="huge"))
        == "there is no scale 'huge'; there are smoke, small, full"
    )
    assert _refused(lambda: run_study(STUDY, out=out, seed=-1)) == "seed is -1; it must be a whole number, at least 0"
    assert "seed is 0.5" in _refused(lambda: run_study(STUDY, out=out, seed=0.5))  # type: ignore[arg-type]
    assert "there is no study 'nothing'; there are " in _refused(lambda: run_study("nothing", out=out))
    assert not out.exists()


def test_a_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitlab.studies.execute._version", lambda name: None)
    message = _refused(lambda: run_study(_study(pictures=[Picture("p", "", toy.picture)]), out=tmp_path / "run"))
    assert message == "study toy needs matplotlib: pip install 'logitlab[figures]'"
    message = _refused(lambda: run_study(_study(requires=["vision"]), out=tmp_path / "run"))
    assert message == "study toy needs pillow: pip install 'logitlab[vision]'"
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, "step 'one' gives a int for 'its only unit'; it must give a DataFrame or several by name"),
        (None, "step 'one' gives a NoneType for 'its only unit'; it must give a DataFrame or several by name"),
        (
            {"../x": pd.DataFrame()},
            "step 'one' gives a table called '../x'; use lower-case letters, digits and hyphens",
        ),
        (pd.DataFrame({"a": [1, "b"]}), "step 'one' gives a table for 'its only unit' that no file can hold: "),
    ],
)
def test_what_is_no_table(given: Any, words: str, tmp_path: Path) -> None:
    study = _study(steps=[Step("one", lambda run, unit: given)], claims=[])
    assert _refused(lambda: run_study(study, out=tmp_path / "run")).startswith(words)


def test_units_that_do_not_fit(tmp_path: Path) -> None:
    def tables(run: Run, unit: str) -> pd.DataFrame:
        return pd.DataFrame({"a": [1 if unit == "x" else "text"]})

    study = _study(steps=[Step("one", tables, units=lambda run: ["x", "y"])], claims=[])
    assert "the units of step 'one' give tables 'one' that do not fit: " in _refused(
        lambda: run_study(study, out=tmp_path / "a")
    )
    for units, words in (
        ([], "step 'one' has no units: there is nothing to do"),
        (["x", "x"], "step 'one' has the unit 'x' twice"),
        (["x", ""], "step 'one' has a unit ''; units are names"),
    ):
        study = _study(steps=[Step("one", tables, units=lambda run, units=units: units)], claims=[])
        assert _refused(lambda study=study: run_study(study, out=tmp_path / "b")) == words


def test_two_steps_with_one_table(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1]})
    study = _study(steps=[Step("a", lambda run, unit: {"b": frame}), Step("a-b", lambda run, unit: frame)], claims=[])
    message = _refused(lambda: run_study(study, out=tmp_path / "run"))
    assert message == "steps 'a' and 'a-b' both give a table 'a-b': rename one"


def test_whole_numbers_and_gaps_come_back(tmp_path: Path) -> None:
    """Units may have no rows, other columns, or text that UTF-8 cannot hold."""
    given = {
        "x": pd.DataFrame({"n": [2**60 + 1], "text": pd.Series(["a\ud800b"], dtype=object)}),
        "y": pd.DataFrame({"n": [], "text": []}),
        "z": pd.DataFrame({"n": [3], "more": [0.5]}, index=[7]),
    }
    study = _study(steps=[Step("one", lambda run, unit: given[unit], units=lambda run: list(given))], claims=[])
    table = run_study(study, out=tmp_path / "run").table("one")
    assert list(table.unit) == ["x", "z"]
    assert table.n.tolist() == [2**60 + 1, 3]
    assert table.text[0] == "a?b"
    assert table.text.isna().tolist() == [False, True]
    assert table.more.isna().tolist() == [True, False]
    whole = _study(steps=[Step("one", lambda run, unit: given["x"])], claims=[])
    assert run_study(whole, out=tmp_path / "whole").table("one").n.tolist() == [2**60 + 1]
    empty = _study(steps=[Step("one", lambda run, unit: given["y"])], claims=[])
    assert run_study(empty, out=tmp_path / "empty").table("one").shape == (0, 2)


def test_named_indices_become_columns(tmp_path: Path) -> None:
    def counts(run: Run, unit: str) -> pd.DataFrame:
        frame = pd.DataFrame({"who": pd.Categorical([unit, "all", unit]), "n": [1, 2, 3]})
        return frame.groupby("who", observed=True).sum()

    study = _study(steps=[Step("one", counts, units=lambda run: ["x", "y"])], claims=[])
    table = run_study(study, out=tmp_path / "run").table("one")
    assert table.astype({"who": str}).to_numpy().tolist() == [
        ["x", "all", 2],
        ["x", "x", 4],
        ["y", "all", 2],
        ["y", "y", 4],
    ]


def test_broken_off_in_a_claim(tmp_path: Path) -> None:
    def slow(run: Run) -> Finding:
        raise KeyboardInterrupt

    study = _study(claims=[Claim("slow", "?", "?", "?", 0.0, slow)])
    with pytest.raises(KeyboardInterrupt):
        run_study(study, out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["state"] == "interrupted"
    run_study(STUDY, out=tmp_path / "run")
    assert log(tmp_path / "run") == list(UNITS)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["state"] == "done"


# -- what steps and claims are given -----------------------------------------------------------


def test_random_numbers_depend_on_names_alone(tmp_path: Path) -> None:
    run = Run(STUDY, None, "small", 0, _Anywhere())  # type: ignore[arg-type]
    first = run.rng("a", 1).random(3)
    run.rng("b").random(100)
    assert np.array_equal(run.rng("a", 1).random(3), first)
    others = [
        run.rng("a", "1"),
        run.rng("a1"),
        run.rng("a"),
        run.rng(),
        Run(STUDY, None, "small", 1, _Anywhere()).rng("a", 1),
    ]  # type: ignore[arg-type]
    assert len({first[0], *(rng.random() for rng in others)}) == 6


def test_tables_and_arrays_that_are_not_there(tmp_path: Path) -> None:
    def ask(run: Run, unit: str) -> pd.DataFrame:
        with pytest.raises(ll.InputError, match=r"there is no table 'two' in .* yet; there are none"):
            run.table("two")
        with pytest.raises(ll.InputError, match=r"there are no arrays 'v' in .*: no step has kept them"):
            run.arrays("v")
        with pytest.raises(ll.InputError, match=r"arrays are called '\.\./v'; use letters"):
            run.keep("../v", {})
        with pytest.raises(ll.InputError, match="study toy has no model here: needs_model is False"):
            _ = run.model
        with pytest.raises(AttributeError, match="there is no parameter 'nothing'; there are draws, mean"):
            _ = run.parameters.nothing
        assert run.parameters.layers == (1, 2)
        assert dict(run.parameters)["mean"] == 1.0
        return pd.DataFrame({"a": [1]})

    assert len(run_study(_study(steps=[Step("one", ask)], claims=[]), out=tmp_path / "run").table("one")) == 1


def test_an_error_in_a_claim_loses_nothing(tmp_path: Path) -> None:
    def broken(run: Run) -> Any:
        raise ZeroDivisionError("no numbers")

    claims = [
        Claim("broken", "?", "?", "?", 0.0, broken),
        Claim("wrong", "?", "?", "?", 0.0, lambda run: 3),  # type: ignore[arg-type, return-value]
        *toy.CLAIMS,
    ]
    pictures = [Picture("bad", "a bad one", broken), Picture("good", "a good one", toy.picture)]
    study = _study(claims=claims, pictures=pictures)
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError, match="no numbers") as error:
        run_study(study, out=folder)
    notes = "\n".join(error.value.__notes__)
    assert "while claim 'broken' of study 'toy' was measured" in notes
    assert f"all else is in {folder}" in notes
    assert "InputError: the measure of claim 'wrong' gives a int, and no Finding" in notes
    assert "picture 'bad'" in notes
    record = json.loads((folder / "manifest.json").read_text())
    assert [c["verdict"] for c in record["claims"]][:3] == ["the measure failed", "the measure failed", "reproduced"]
    text = (folder / "report.html").read_text()
    assert "ZeroDivisionError: no numbers" in text
    assert "It could not be drawn." in text
    assert (folder / "figures" / "good.png").read_bytes()[:4] == b"\x89PNG"
    mended = report(folder, study=_study(pictures=[pictures[1]]))
    assert [o.verdict for o in mended.outcomes] == ["reproduced", "not reproduced", "not testable at this scale"]


def test_reports_that_are_refused(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _refused(lambda: report(tmp_path)) == f"there is no run of a study in {tmp_path}: manifest.json is missing"
    message = _refused(lambda: report(unbroken, study=_study(version=2)))
    assert message == (
        f"{unbroken} holds a run of toy, version 1, and this is toy, version 2: run it again into another folder"
    )
    monkeypatch.setenv("TOY_STOP", "error Red")
    with pytest.raises(RuntimeError):
        run_study(STUDY, out=tmp_path / "run")
    message = _refused(lambda: report(tmp_path / "run", study=STUDY))
    assert message == (
        f"the run in {tmp_path / 'run'} is not done: 2 of 2 steps are missing (draw first); "
        "logitlab study run with the same arguments goes on"
    )


# -- with a model ------------------------------------------------------------------------------


def _entropies(run: Run, unit: str) -> pd.DataFrame:
    reading = ll.read(run.model, unit, top_k=1)
    return pd.DataFrame({"entropy": reading.entropy.to_numpy()[0, -1]})


def _sure(run: Run) -> Finding:
    with pytest.raises(ll.InputError, match="claims and pictures are made from tables"):
        _ = run.model
    values = run.table("read").entropy
    return Finding(values.mean(), values.min(), values.max(), len(values))


MODEL_STUDY = Study(
    name="sure",
    title="How sure a model is",
    paper="?",
    summary="?",
    data="?",
    parameters={"texts": Parameter(("hello world", "the sea"), "texts")},
    steps=[Step("read", _entropies, units=lambda run: run.parameters.texts)],
    claims=[Claim("unsure", "A random model is unsure.", "not given", "range", 0.1, _sure)],
)


def test_a_study_of_a_model(llama: ll.Model, tmp_path: Path) -> None:
    calls: list[int] = []

    def loaded() -> ll.Model:
        calls.append(1)
        return llama

    folder = tmp_path / "run"
    result = run_study(MODEL_STUDY, model=loaded, out=folder)
    assert calls == [1]
    expected = [ll.read(llama, text, top_k=1).entropy.to_numpy()[0, -1] for text in ("hello world", "the sea")]
    assert np.array_equal(result.table("read").entropy, np.concatenate(expected))
    about = result.manifest["model"]
    assert (about["name"], about["fingerprint"]) == ("tiny-llama", llama.fingerprint)
    assert (about["architecture"], about["dtype"]) == ("LlamaForCausalLM", "float32")
    assert result.claims["unsure"].verdict == "reproduced"
    assert report(folder, study=MODEL_STUDY).claims["unsure"].record() == result.claims["unsure"].record()


def test_another_model_is_refused(llama: ll.Model, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_study(MODEL_STUDY, model=llama, out=folder)
    other = ll.load(checkpoint)
    import torch

    with torch.no_grad():
        next(other.module.parameters()).add_(1)
    message = _refused(lambda: run_study(MODEL_STUDY, model=other, out=folder))
    assert message.startswith(f"{folder} holds another run (model: ")


def test_no_model_leaves_no_folder(tmp_path: Path) -> None:
    _refused(lambda: run_study(MODEL_STUDY, model=tmp_path / "nothing", out=tmp_path / "run"))
    assert files(tmp_path) == []


def test_the_stack_tells_runs_apart(llama: ll.Model, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_study(MODEL_STUDY, model=llama, out=folder)
    file = folder / "manifest.json"
    record = json.loads(file.read_text())
    assert record["model"]["stack"] == llama.stack.name
    record["model"]["stack"] = "elsewhere"
    file.write_text(json.dumps(record))
    words = f"model: stack: elsewhere there, {llama.stack.name} here"
    message = _refused(lambda: run_study(MODEL_STUDY, model=llama, out=folder))
    assert message == f"{folder} holds another run ({words}): give another folder with --out, or the same arguments"
    del record["model"]["stack"]  # an older version did not record it
    file.write_text(json.dumps(record))
    run_study(MODEL_STUDY, model=llama, out=folder)


def test_no_study_under_an_intervention(llama: ll.Model, tmp_path: Path) -> None:
    with intervene(llama, scale("0.resid_post", 0.5)):
        message = _refused(lambda: run_study(MODEL_STUDY, model=llama, out=tmp_path / "run"))
    assert message.startswith("an intervention is active on tiny-llama: run the study outside of intervene()")
    assert files(tmp_path) == []
    run_study(MODEL_STUDY, model=llama, out=tmp_path / "run")


def test_what_is_no_model(llama: ll.Model, tmp_path: Path) -> None:
    rest = "give a name, or logitlab.wrap(module, tokenizer), or a function that returns such"
    for given, kind in (
        (llama.module, "LlamaForCausalLM"),
        (5, "int"),
        (None, "NoneType"),
        (lambda: llama.module, "LlamaForCausalLM"),
    ):
        message = _refused(lambda given=given: run_study(MODEL_STUDY, model=given, out=tmp_path / "run"))  # type: ignore[arg-type]
        assert message == f"the model is a {kind}; {rest}"
    assert files(tmp_path) == []


# -- folders of others, and damage --------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        *(
            lambda r, key=key: r.pop(key)
            for key in ("steps", "sessions", "claims", "differs", "state", "model", "ended")
        ),
        lambda r: r["steps"]["squares"].update(tables=["../../secret"]),
        lambda r: r["steps"]["squares"].update(tables=['a"><script>']),
        lambda r: r["steps"]["squares"].update(tables=[3]),
        lambda r: r["steps"]["squares"].pop("units"),
        lambda r: r["steps"]["squares"].update(units=[{}]),
        lambda r: r["steps"].update({"../x": r["steps"]["squares"]}),
        lambda r: r.update(steps=[]),
        lambda r: r.update(parameters={"a": 1}),
        lambda r: r.update(model={}),
        lambda r: r.update(sessions=[{}]),
    ],
)
def test_manifests_of_others(change: Callable[[dict[str, Any]], Any], unbroken: Path, tmp_path: Path) -> None:
    record = json.loads((unbroken / "manifest.json").read_text())
    change(record)
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    words = f"{tmp_path / 'manifest.json'} is no manifest that this version of logitlab writes: give another folder"
    assert _refused(lambda: report(tmp_path, study=STUDY)) == words
    assert _refused(lambda: run_study(STUDY, out=tmp_path)) == words


def test_a_run_that_has_done_nothing_gives_way(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def units(run: Run) -> list[str]:
        if run.parameters.draws == 13:
            raise ll.InputError("13 brings bad luck")
        return list(UNITS)

    study = _study(steps=[Step("draw", toy.draw, units=units)])
    _refused(lambda: run_study(study, out=folder, set={"draws": 13}))
    assert json.loads((folder / "manifest.json").read_text())["state"] == "interrupted"
    result = run_study(study, out=folder, set={"draws": 12})
    assert result.manifest["parameters"]["draws"]["value"] == 12
    assert len(result.manifest["sessions"]) == 1
    message = _refused(lambda: run_study(study, out=folder, set={"draws": 13}))
    assert "holds another run (parameters: draws: 12 there, 13 here)" in message


@pytest.mark.parametrize("kept", ["parts/draw/a.json", "arrays/a.safetensors"])
def test_a_run_that_has_begun_to_keep_something_does_not(kept: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def units(run: Run) -> list[str]:
        raise ll.InputError("no")

    study = _study(steps=[Step("draw", toy.draw, units=units)])
    _refused(lambda: run_study(study, out=folder))
    (folder / kept).parent.mkdir(parents=True)
    (folder / kept).write_text("")
    assert "holds another run (seed: 0 there, 1 here)" in _refused(lambda: run_study(study, out=folder, seed=1))


@pytest.mark.parametrize("call", [lambda path: run_study(STUDY, out=path), lambda path: report(path, study=STUDY)])
def test_paths_that_cannot_be(call: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "File name too long; give another folder" in _refused(lambda: call(tmp_path / ("x" * 300)))
    assert "'~nosuchuser/run' is no path of a folder: " in _refused(lambda: call("~nosuchuser/run"))
    assert "is no path of a folder: " in _refused(lambda: call(5))
    _refused(lambda: call("a\0b"))

    def denied(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", denied)
    message = _refused(lambda: call(tmp_path / "run"))
    assert message == f"cannot look into {tmp_path / 'run'}: Permission denied; give another folder"
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_folder_has_to_be(tmp_path: Path) -> None:
    study = _study(pictures=[Picture("p", "", toy.picture)])
    folder = tmp_path / "run"
    run_study(STUDY, scale="smoke", out=folder)
    (folder / "figures").write_text("mine")
    assert _refused(lambda: report(folder, study=study)) == f"cannot make the folder {folder / 'figures'}: File exists"


def test_a_damaged_table(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_study(STUDY, out=folder)
    file = folder / "tables" / "draw-numbers.parquet"
    file.write_bytes(b"")
    study = _study(claims=[])
    for call in (lambda: run_study(study, out=folder), lambda: report(folder, study=study)):
        message = _refused(call)
        assert message.startswith(f"{file} cannot be read: ")
        assert message.endswith("; remove this file and run again: the same arguments make it anew")
    file.unlink()
    run_study(STUDY, out=folder)
    assert _bytes(folder) == _bytes(unbroken)


def test_tables_of_odd_names(tmp_path: Path) -> None:
    clash = pd.DataFrame({"a": [1]}, index=pd.Index([2], name="a"))
    for given, words in (
        (clash, "step 'one' gives a table for 'its only unit' whose index cannot become a column: "),
        ({7: pd.DataFrame({"a": [1]})}, "step 'one' gives a table called 7; use lower-case letters"),
    ):
        study = _study(steps=[Step("one", lambda run, unit, given=given: given)], claims=[])
        assert _refused(lambda study=study: run_study(study, out=tmp_path / "run")).startswith(words)


def test_a_finding_that_cannot_be_recorded(tmp_path: Path) -> None:
    claims = [Claim("odd", "?", "?", "?", 0.0, lambda run: Finding("x", 0, 1, 3)), *toy.CLAIMS]  # type: ignore[arg-type]
    folder = tmp_path / "run"
    message = _refused(lambda: run_study(_study(claims=claims), scale="smoke", out=folder))
    assert message == "a finding's value is 'x'; it must be a number"
    record = json.loads((folder / "manifest.json").read_text())
    assert [c["verdict"] for c in record["claims"]][:2] == ["the measure failed", "reproduced"]


def test_the_source_of_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Path) -> None:
    package = tmp_path / "abroad"
    package.mkdir()
    texts = {"__init__.py": "", "help.py": "x = 1", "steps.py": "def do(run, unit): ...", "notes.txt": "no code"}
    for name, text in texts.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    study = _study(steps=[Step("one", import_module("abroad.steps").do)])
    first = _source(study)
    digest = hashlib.sha256()
    for name in ("__init__.py", "help.py", "steps.py"):
        for part in (name.encode(), (package / name).read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    assert first == digest.hexdigest()
    (package / "help.py").write_text("x = 2")  # not the file of the step itself
    assert _source(study) != first
    assert _source(_study(steps=[Step("one", print)])) is None  # type: ignore[arg-type]
    (session,) = json.loads((unbroken / "manifest.json").read_text())["sessions"]
    assert session["source"] == _source(STUDY)
    assert {"scikit-learn", "scipy"} <= set(session["versions"])
