"""The commands ``study list``, ``show``, ``run`` and ``report``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import logitlab as ll
from logitlab.studies import registry
from tests.commands import COMMAND, files, refused, run, spawn
from tests.studies.test_registry import install
from tests.studies.toy import UNITS, log

ROOT = Path(__file__).parent.parent.parent

OUTSIDE = '''
"""A study of another package."""
from logitlab.studies import Claim, Finding, Parameter, Run, Step, Study


def lengths(run: Run, unit: str):
    import pandas as pd

    return pd.DataFrame({"length": [len(unit) + run.parameters.more]})


def mean(run: Run) -> Finding:
    found = run.table("lengths").length
    return Finding(found.mean(), found.min(), found.max(), len(found))


STUDY = Study(
    name="lengths",
    title="Words [bold]have[/bold] letters",
    paper="Someone (2026)",
    summary="Counts letters.",
    data="Two words.",
    parameters={"more": Parameter(0, "is added")},
    steps=[Step("lengths", lengths, units=lambda run: ["one", "three"])],
    claims=[Claim("long", "Words have letters.", "4", "range", 2.5, mean)],
    needs_model=False,
)
'''


@pytest.fixture(autouse=True)
def only_toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        registry, "BUILT_IN", {"toy": "tests.studies.toy:STUDY", "sure": "tests.studies.test_execute:MODEL_STUDY"}
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.chdir(tmp_path)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "study", "list")
    assert (code, err) == (0, "")
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert [line[0] for line in lines] == ["study", "toy", "sure"]
    assert lines[1][1].split("  ")[0] == "Numbers around a mean"


def test_list_goes_on_where_one_is_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BUILT_IN", {"bad": "no.such.module:STUDY", "toy": "tests.studies.toy:STUDY"})
    code, out, _ = run(capsys, "study", "list")
    assert code == 0
    assert (
        "bad    cannot be used: study 'bad' of logitlab (no.such.module:STUDY) cannot be imported: ModuleNotFoundError"
        in out
    )
    assert "Numbers around a mean" in out


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "study", "show", "toy")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    for shown in (
        "Numbers around a mean Nobody (2026). Numbers. Draws numbers and looks at them. Data: Drawn at random.",
        "Steps: draw, squares",
        "draws 5 100 1000 numbers a unit",
        "limit 3 3 null none in the paper",
        "positive: The mean is above 0. paper: 1.0 (table 1); test: normal interval (above 0)",
        "Defects of the source that are avoided The source draws the same numbers twice.",
    ):
        assert shown in text, shown


def test_run_and_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(
        capsys, "study", "run", "toy", "--scale", "smoke", "--seed", 1, "--set", "draws=50", "--set", "mean=2"
    )
    assert code == 0
    folder = Path("studies/toy-smoke-seed1")
    numbers = pd.read_parquet(folder / "tables" / "draw-numbers.parquet").value
    assert len(numbers) == 200
    half = 1.96 * numbers.std(ddof=1) / np.sqrt(200)
    ours = f"{numbers.mean():.4g} [{numbers.mean() - half:.4g}, {numbers.mean() + half:.4g}], n = 200"
    assert ours in " ".join(out.split())
    assert out.splitlines()[-1] == "1 reproduced, 1 not reproduced, 1 not testable at this scale"
    lines = err.splitlines()
    assert lines[0] == "draw: 0 of 4 units, red"
    assert lines[1] == "draw: 0 of 4 units, red 50 of 50 numbers drawn"
    assert lines[-1] == f"wrote {folder / 'report.html'}"
    (folder / "report.html").unlink()
    again = run(capsys, "study", "report", folder)
    assert again == (0, out, f"wrote {folder / 'report.html'}\n")
    assert (folder / "report.html").is_file()
    assert log(folder) == list(UNITS)


def test_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "study", "run", "toy", "--scale", "smoke", "--json", "--out", tmp_path / "run")
    assert code == 0
    claims = json.loads(out)
    assert claims == json.loads((tmp_path / "run" / "manifest.json").read_text())["claims"]
    assert [c["name"] for c in claims] == ["positive", "small", "rare"]
    assert claims[2] == {
        "name": "rare",
        "statement": "Large numbers are rare.",
        "paper": "0.1 %",
        "value": None,
        "low": None,
        "high": None,
        "n": None,
        "test": "exact interval",
        "threshold": 0.01,
        "side": "below",
        "verdict": "not testable at this scale",
        "note": "5 draws are too few",
    }
    assert json.loads(run(capsys, "study", "report", tmp_path / "run", "--json")[1]) == claims


def test_a_model(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("study", "run", "sure", "--model", checkpoint, "--dtype", "float32", "--out", tmp_path / "run")
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert out.splitlines()[-1] == "1 reproduced"
    model = ll.load(checkpoint, dtype="float32")
    about = json.loads((tmp_path / "run" / "manifest.json").read_text())["model"]
    assert (about["name"], about["fingerprint"]) == (checkpoint.name, model.fingerprint)


def test_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (
        refused(capsys, "study", "run", "nothing")
        == "there is no study 'nothing'; there are toy, sure (logitlab study list)"
    )
    assert refused(capsys, "study", "show", "nothing").startswith("there is no study 'nothing'")
    names = "draws, mean, label, layers, quick, limit"
    assert (
        refused(capsys, "study", "run", "toy", "--set", "layer=4")
        == f"study toy has no parameter 'layer'; it has {names}"
    )
    message = refused(capsys, "study", "run", "toy", "--set", "draws=many")
    assert message == "parameter draws is 'many'; it must be a whole number, for instance 1000"
    assert "give KEY=VALUE" in refused(capsys, "study", "run", "toy", "--set", "draws")
    assert "--scale" in refused(capsys, "study", "run", "toy", "--scale", "huge")
    assert "--seed" in refused(capsys, "study", "run", "toy", "--seed", -1)
    message = refused(capsys, "study", "report", tmp_path / "nothing")
    assert message == f"there is no run of a study in {tmp_path / 'nothing'}: manifest.json is missing"
    message = refused(capsys, "study", "run", "sure", "--model", "./nothing", "--out", "run")
    assert message == "there is no model at ./nothing: no such file or folder; check the path, or give a hub id"
    assert files(tmp_path) == []
    run(capsys, "study", "run", "toy", "--scale", "smoke", "--out", "run")
    message = refused(capsys, "study", "run", "toy", "--scale", "smoke", "--out", "run", "--set", "draws=6")
    assert message == (
        "run holds another run (parameters: draws: 5 there, 6 here): give another folder with --out, "
        "or the same arguments"
    )


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_STOP", "interrupt Red")
    code, out, err = run(capsys, "study", "run", "toy", "--scale", "smoke", "--out", "run")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "logitlab: interrupted; the same command goes on from what is in run"
    monkeypatch.delenv("TOY_STOP")
    assert run(capsys, "study", "run", "toy", "--scale", "smoke", "--out", "run")[0] == 0
    assert log(Path("run")) == list(UNITS)


# -- in a process of its own, with a package that logitlab does not know ------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    """What PYTHONPATH has to be for an outside study, a broken one, and the toy study."""
    packages = tmp_path / "packages"
    install(packages, "word-papers", {"lengths": "word_papers:STUDY"}, OUTSIDE)
    install(packages, "broken-papers", {"broken": "broken_papers:STUDY"}, "import nothing_like_this")
    toys = {"toy": "tests.studies.toy:STUDY"}
    install(packages, "toy-papers", toys)
    return os.pathsep.join([str(packages), str(ROOT)])


def test_a_study_of_another_package(path: str, tmp_path: Path) -> None:
    shown = spawn("study", "list", PYTHONPATH=path)
    assert shown.returncode == 0, shown.stderr
    out = shown.stdout.decode()
    assert "Words [bold]have[/bold] letters" in out
    assert "word-papers" in out
    assert "cannot be used: study 'broken' of broken-papers (broken_papers:STUDY) cannot be imported" in " ".join(
        out.split()
    )
    done = spawn("study", "run", "lengths", "--set", "more=2", "--json", "--out", tmp_path / "run", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    (claim,) = json.loads(done.stdout)
    assert [claim[key] for key in ("value", "low", "high", "n", "verdict")] == [6.0, 5.0, 7.0, 2, "reproduced"]
    again = spawn("study", "report", tmp_path / "run", "--json", PYTHONPATH=path)
    assert again.stdout == done.stdout
    assert "Counts letters." in (tmp_path / "run" / "report.html").read_text()


def test_no_torch_for_a_list(path: str) -> None:
    code = (
        "import sys; from logitlab import cli; from logitlab.studies import registry; "
        "registry.BUILT_IN = {}; code = cli.main(['study', *sys.argv[1:]]); "
        "print(code, sorted({'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    for arguments in (["list"], ["show", "toy"], ["run", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            check=True,
        )
        assert done.stdout.decode().splitlines()[-1] == "0 []"


def test_ctrl_c(path: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [*COMMAND, "study", "run", "toy", "--out", str(folder)]
    environment = os.environ | {"PYTHONPATH": path, "TOY_STOP": f"wait {UNITS[1]}"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while not list(folder.glob("parts/draw/*.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
    message = f"logitlab: interrupted; the same command goes on from what is in {folder}"
    assert err.decode().splitlines()[-1] == message
    assert spawn("study", "run", "toy", "--out", folder, PYTHONPATH=path).returncode == 0
    assert log(folder) == list(UNITS)


def test_places_that_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place, words in (
        ("x" * 300, "File name too long; give another folder"),
        ("~nosuchuser/run", "'~nosuchuser/run' is no path of a folder: "),
    ):
        for arguments in (("run", "toy", "--scale", "smoke", "--out", place), ("report", place)):
            assert words in refused(capsys, "study", *arguments)
    assert files(tmp_path) == []


def test_home_is_expanded(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(capsys, "study", "run", "toy", "--scale", "smoke", "--out", "~/run")[0] == 0
    assert run(capsys, "study", "report", "~/run")[0] == 0
    assert (tmp_path / "run" / "report.html").is_file()
