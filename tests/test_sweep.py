"""The sweep over all model types: its workers, its file, its page, its check. This module is also the zoo it sweeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import logitlab as ll
from logitlab.zoo import coverage, sweep
from logitlab.zoo.coverage import Coverage, Header, Layers, Result
from logitlab.zoo.sweep import Choice
from tests import zoo
from tests.commands import run

ROOT = Path(__file__).parent.parent
NAME = "tests.test_sweep"

# -- the zoo -----------------------------------------------------------------------------------

TASKS: dict[str, Any] = {"words": None, "pictures": None}


class CannotBuild(Exception):  # noqa: N818 - the zoo's name
    """As in the real zoo."""


def types(task: str) -> list[str]:
    """Not in the order of their names."""
    words = ["llama", "a-crash", "b-hang", "broken", "cannot", "headless", "loud", "odd"]
    return words if task == "words" else ["llama", "slow-1", "slow-2", "slow-3"]


def build(task: str, model_type: str, seed: int = 0) -> torch.nn.Module:
    """Do what the name says."""
    if model_type == "a-crash":
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(7)
    if model_type == "b-hang":
        time.sleep(600)
    if model_type == "cannot":
        raise CannotBuild("needs a package\nthat is not installed")
    if model_type == "odd":
        raise OSError("no file /home/somebody/models/thing.py at 0x7f00deadbeef")
    if model_type.startswith("slow"):
        time.sleep(0.5)
        raise CannotBuild("slow")
    model = zoo.build("llama", seed)
    if model_type == "headless":
        return model.model
    if model_type == "broken":
        model.lm_head.register_forward_pre_hook(_break)
    if model_type == "loud":
        print('{"not": "an answer"}')
        os.write(1, b"nor this\n")
    return model


def _break(*_: Any) -> None:
    raise RuntimeError("a kernel | is missing")


# -- running -----------------------------------------------------------------------------------


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find this module from any folder."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sweep, "ZOO", NAME)


LIGHT = """
import json, os, signal, sys, time
if sys.argv[1] == "no-such-zoo":
    sys.exit("there is no such zoo")
print("{}", flush=True)
for n, line in enumerate(sys.stdin):
    task, name = json.loads(line)
    if name == "crash" or name == "moody" and n:
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "closes":
        os.close(1)
    if "hang" in name or name == "closes":
        time.sleep(600)
    time.sleep(0.05)
    empty = {"stack": None, "stacks": [], "sites": [], "reason": f"job {n}"}
    print(json.dumps({"task": task, "type": name, "status": "refused", **empty}), flush=True)
"""
"""A worker that needs no libraries and so is there at once."""


def lightly(names: str, workers: int = 1, timeout: float = 30, zoo: str = "light") -> dict[str, tuple[str, str]]:
    found = sweep._try([("words", name) for name in names.split()], workers, timeout, 0, zoo)
    return {r.type: (r.status, r.reason) for r in found}


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_WORK", LIGHT)


@pytest.mark.usefixtures("light")
def test_a_worker_does_many_types() -> None:
    assert lightly("a b c") == {name: ("refused", f"job {n}") for n, name in enumerate("abc")}
    assert len(lightly(" ".join(map(str, range(40))), workers=4)) == 40
    assert lightly("") == {}


@pytest.mark.usefixtures("light")
def test_a_crash_is_tried_again_in_a_fresh_process() -> None:
    found = lightly("a moody b crash c")
    assert found == {
        "a": ("refused", "job 0"),
        "moody": ("refused", "job 0"),  # its second try
        "b": ("refused", "job 1"),
        "crash": ("crashed", "killed by SIGSEGV"),
        "c": ("refused", "job 0"),
    }


@pytest.mark.usefixtures("light")
def test_hangs_do_not_hold_up_the_others() -> None:
    started = time.monotonic()
    found = lightly("hang-1 a hang-2 b c", workers=2, timeout=1.5)
    assert time.monotonic() - started < 15
    assert {name for name, (status, _) in found.items() if status == "refused"} == set("abc")
    assert {found[name] for name in ("hang-1", "hang-2")} == {("timed out", "no result within 1.5 s")}


@pytest.mark.usefixtures("light")
def test_a_worker_that_closes_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_PATIENCE", 0.2)
    found = lightly("closes a")
    assert found["closes"] == ("crashed", "closed its output")
    assert found["a"] == ("refused", "job 0")


@pytest.mark.usefixtures("light")
def test_workers_that_do_not_start() -> None:
    with pytest.raises(ll.InputError) as caught:
        lightly("a", zoo="no-such-zoo")
    assert str(caught.value) == "a worker of the sweep did not start: exit status 1: there is no such zoo"


def no_worker(*_: Any) -> Any:
    raise AssertionError("a worker was started")


def by_type(found: Coverage, task: str = "words") -> dict[str, Result]:
    return {r.type: r for r in found.ordered() if r.task == task}


@pytest.mark.usefixtures("importable")
def test_what_becomes_of_a_type(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    reports: list[tuple[str | None, int, int]] = []
    started = time.monotonic()
    found = sweep.sweep(
        out,
        Choice(("words",)),
        workers=2,
        timeout=8,
        report=lambda r, done, total: reports.append((r and r.type, done, total)),
    )
    assert time.monotonic() - started < 60
    results = by_type(found)
    assert {name: r.status for name, r in results.items()} == {
        "a-crash": "crashed",
        "b-hang": "timed out",
        "broken": "not built",
        "cannot": "not built",
        "headless": "refused",
        "llama": "verified",
        "loud": "verified",
        "odd": "refused",
    }
    assert results["a-crash"].reason == "exit status 7: out of luck"
    assert results["b-hang"].reason == "no result within 8 s"
    assert 8 <= results["b-hang"].seconds < 20
    assert results["broken"].reason == "does not run on its example inputs: RuntimeError: a kernel | is missing"
    assert results["broken"].architecture == "LlamaForCausalLM"
    assert (results["cannot"].reason, results["cannot"].architecture) == ("needs a package that is not installed", None)
    assert results["headless"].reason.startswith("LlamaModel returns no logits; ")
    assert results["odd"].reason == "unexpected OSError: no file thing.py at 0x…"
    expected = ll.wrap(zoo.build("llama", 0))
    llama = results["llama"]
    assert llama.architecture == "LlamaForCausalLM"
    assert llama.stack == Layers("model.layers", 3, 32)
    assert llama.stacks == (Layers("model.layers", 3, 32),)
    assert llama.fast_form is True
    assert llama.sites == tuple(expected.verification.offered)
    assert llama.space == "vocabulary"
    assert llama.difference is not None
    assert llama.difference <= 1e-5
    assert replace(results["loud"], type="", seconds=0.0) == replace(llama, type="", seconds=0.0)
    assert reports[0] == (None, 0, 8)
    assert [done for _, done, _ in reports] == list(range(9))
    # the file, read again, is what was returned, in order
    assert coverage.load(out) == replace(found, size=out.stat().st_size)
    names = [json.loads(line)["type"] for line in out.read_text().splitlines()[1:]]
    assert names == sorted(types("words"))


def children(process: subprocess.Popen[Any]) -> list[Path]:
    done = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return [Path("/proc") / pid for pid in done.stdout.split()]


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.usefixtures("importable")
def test_a_kill_loses_only_what_was_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    code = f"from logitlab.zoo import sweep as s; s.ZOO = {NAME!r}; s.sweep({str(out)!r}, s.Choice(('pictures',)), "
    process = subprocess.Popen([sys.executable, "-c", f"{code} workers=1)"], cwd=ROOT)
    try:
        wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") >= 3)  # the header and two results
        workers = children(process)
    finally:
        process.kill()
        process.wait()
    assert len(workers) == 1
    wait_for(lambda: not any(worker.exists() for worker in workers))  # though nobody told them
    before = coverage.load(out)
    assert before is not None
    assert 2 <= len(before.results) < 4
    with out.open("ab") as file:  # and what a torn write leaves
        file.write(b'{"task": "pictures", "type": "sl')
    fresh: list[str] = []
    monkeypatch.setattr(sweep, "_WORK", LIGHT)
    after = sweep.sweep(out, Choice(("pictures",)), workers=1, report=lambda r, *_: fresh.append(r.type) if r else None)
    assert sorted(fresh) == sorted(set(types("pictures")) - {name for _, name in before.results})
    assert {name for _, name in after.results} == set(types("pictures"))
    assert all(after.results[key] == result for key, result in before.results.items())
    assert coverage.load(out) == replace(after, size=out.stat().st_size)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    code = f"from logitlab.zoo import sweep; sweep.ZOO, sweep._WORK = {NAME!r}, {LIGHT!r}"
    arguments = ("verify", "--all", "--types", "b-hang", "--workers", "1")
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}\nfrom logitlab.cli import run; run()", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for((tmp_path / "docs/coverage.jsonl").exists)
    wait_for(lambda: bool(children(process)))
    time.sleep(0.5)
    workers = children(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert err == (
        "logitlab: interrupted; what is done is in docs/coverage.jsonl, the same command goes on from there\n"
    )
    assert len(workers) == 1
    assert not workers[0].exists()


def test_two_types_of_the_real_zoo(tmp_path: Path) -> None:
    found = sweep.sweep(tmp_path / "out.jsonl", Choice(pattern="causal-lm/gpt2|masked-lm/bert"), workers=1)
    assert [(r.task, r.type, r.status) for r in found.ordered()] == [
        ("causal-lm", "gpt2", "verified"),
        ("masked-lm", "bert", "verified"),
    ]
    assert [r.architecture for r in found.ordered()] == ["GPT2LMHeadModel", "BertForMaskedLM"]
    assert found.header.types["causal-lm"] > 100


def test_the_slice_is_in_the_real_zoo() -> None:
    listing = sweep._listing("logitlab.zoo")
    assert list(sweep.SLICE) == list(listing)
    missing = [(task, name) for task, names in sweep.SLICE.items() for name in names if name not in listing[task]]
    assert missing == []
    assert 30 <= sum(map(len, sweep.SLICE.values())) <= 45


# -- differences -------------------------------------------------------------------------------


def examined(monkeypatch: pytest.MonkeyPatch, tail: float | None, fast: float | None, holds: bool = True) -> Result:
    model = ll.wrap(zoo.build("llama"))
    record = model.verification
    changed = replace(
        record,
        tail=replace(record.tail, error=tail),
        fast_form=replace(record.fast_form, error=fast, ordinary=fast, holds=holds),
    )
    monkeypatch.setattr(model, "verification", changed)
    monkeypatch.setattr(ll, "wrap", lambda _: model)
    return sweep.examine(sys.modules[__name__], "words", "llama")


@pytest.mark.parametrize(
    ("tail", "fast", "holds", "status", "difference", "reason"),
    [
        (0.0, 1e-5, True, "verified", 1e-5, ""),
        (2e-5, 0.0, True, "inexact", 2e-5, "differs by 2.0e-05, more than 1e-05"),
        (0.0, 0.5, False, "verified", 0.0, ""),  # a fast form that is not used
        (None, 0.0, True, "inexact", None, "no difference was measured"),
        (0.0, None, True, "inexact", None, "no difference was measured"),
        (float("inf"), 0.0, True, "inexact", None, "differs by inf, more than 1e-05"),
        (float("nan"), 0.0, True, "inexact", None, "differs by nan, more than 1e-05"),
    ],
)
def test_a_large_difference_is_not_verified(
    tail: float | None,
    fast: float | None,
    holds: bool,
    status: str,
    difference: float | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = examined(monkeypatch, tail, fast, holds)
    assert (result.status, result.difference, result.reason) == (status, difference, reason)
    assert json.loads(result.line())["difference"] == difference


@pytest.mark.parametrize(("size", "status"), [(3e-6, "verified"), (1e-2, "refused")])
def test_the_difference_is_that_of_the_model(size: float, status: str) -> None:
    """A head that is off by another amount in each call: a little shows in the number, much is refused."""
    amounts = torch.Generator().manual_seed(0)

    def noisy(*_: Any, **__: Any) -> torch.nn.Module:
        model = zoo.build("llama")
        model.lm_head.register_forward_hook(lambda _m, _a, out: out + size * torch.rand(1, generator=amounts))
        return model

    result = sweep.examine(SimpleNamespace(build=noisy, CannotBuild=CannotBuild), "words", "llama")
    assert result.status == status
    if status == "verified":
        assert result.difference is not None
        assert size / 3 < result.difference < 3 * size
    else:
        assert "does not give the model's own logits: they differ by " in result.reason


def test_inputs_that_cannot_be_made_up_are_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange(torch.nn.Module):
        def forward(self, spectrum_of_a_star: torch.Tensor) -> torch.Tensor:
            return spectrum_of_a_star

    fake = SimpleNamespace(build=lambda *_, **__: Strange(), CannotBuild=CannotBuild)
    result = sweep.examine(fake, "words", "strange")
    assert result.status == "refused"
    assert "spectrum_of_a_star" in result.reason


# -- the file ----------------------------------------------------------------------------------


def header(**changes: Any) -> Header:
    listing = {task: len(types(task)) for task in TASKS}
    return replace(Header(sweep.versions(), 0, "2001-02-03", listing), **changes)


def result(name: str, status: str = "verified", task: str = "words", **more: Any) -> Result:
    return Result(task, name, status, **more)


def stored(path: Path, *results: Result, head: Header | None = None) -> Path:
    return coverage.save(Coverage(head or header(), {r.key: r for r in results}), path)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo of this module, and no worker may start."""
    monkeypatch.setattr(sweep, "ZOO", NAME)
    monkeypatch.setattr(sweep, "_Worker", no_worker)


@pytest.mark.usefixtures("still")
def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    rows = [result(name, "refused", reason="x") for name in types("words")]
    out = stored(tmp_path / "out.jsonl", *rows)
    before = out.read_bytes()
    found = sweep.sweep(out, Choice(("words",)))
    assert found.ordered() == sorted(rows, key=lambda r: r.type)
    assert out.read_bytes() == before  # the date too: nothing was tried


@pytest.mark.usefixtures("still")
def test_types_that_are_no_longer_listed_are_dropped(tmp_path: Path) -> None:
    out = stored(tmp_path / "out.jsonl", result("llama"), result("gone"))
    assert list(by_type(sweep.sweep(out, Choice(pattern="words/llama")))) == ["llama"]


@pytest.mark.usefixtures("still")
def test_other_versions_are_refused(tmp_path: Path) -> None:
    old = header(versions={**sweep.versions(), "transformers": "5.0.0"}, seed=3)
    out = stored(tmp_path / "out.jsonl", result("llama"), head=old)
    before = out.read_bytes()
    now = sweep.versions()["transformers"]
    with pytest.raises(ll.InputError) as caught:
        sweep.sweep(out, Choice(pattern="words/llama"))
    assert str(caught.value) == (
        f"{out} has results of transformers 5.0.0 (now {now}), seed 3 (now 0): "
        "give --restart to replace them, or another --out"
    )
    assert out.read_bytes() == before


@pytest.mark.usefixtures("still")
def test_restart_forgets_what_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def tried(jobs: list[coverage.Key], *_: Any) -> Any:
        asked.append(list(jobs))
        yield from (result(name, "refused", task) for task, name in jobs)

    monkeypatch.setattr(sweep, "_try", tried)
    llama = Choice(pattern="words/llama")
    out = stored(tmp_path / "out.jsonl", result("llama"), result("odd"))
    found = sweep.sweep(out, llama, restart=True)
    assert {name: r.status for name, r in by_type(found).items()} == {"llama": "refused", "odd": "verified"}
    # of other versions nothing is kept
    stored(out, result("llama"), result("odd"), head=header(versions={"torch": "1.0"}))
    assert list(by_type(sweep.sweep(out, llama, restart=True))) == ["llama"]
    # nor of a file of another kind
    out.write_text("a diary\n")
    assert list(by_type(sweep.sweep(out, llama, restart=True))) == ["llama"]
    assert asked == [[("words", "llama")]] * 3


def test_a_torn_file_is_read_up_to_the_tear(tmp_path: Path) -> None:
    out = stored(tmp_path / "out.jsonl", result("llama"), result("odd"))
    whole = out.read_bytes()
    second = whole.rindex(b"\n", 0, -1) + 1
    for cut in (len(whole) - 1, second + 5, second):
        out.write_bytes(whole[:cut])
        found = coverage.load(out)
        assert found is not None
        assert (list(by_type(found)), found.size) == (["llama"], second)
    for cut in (0, 10):
        out.write_bytes(whole[:cut])
        assert coverage.load(out) is None
    out.write_bytes(whole.replace(b'"type": "llama"', b'"tope": "llama"'))
    with pytest.raises(ll.InputError, match=r"out\.jsonl: line 2 is not what this version of logitlab verify --all"):
        coverage.load(out)
    out.write_bytes(b"PK\x03\x04\n")
    with pytest.raises(ll.InputError, match="line 1 is not"):
        coverage.load(out)


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(("poems",)), "there is no task 'poems'; there are words, pictures"),
        (Choice(pattern="lla["), "types 'lla[' are no regular expression (unterminated character set"),
        (Choice(pattern="lla"), "types 'lla' has no type of any task: an expression has to fit a whole type"),
        (Choice(only_slice=True), "the slice has no type of any task"),
    ],
)
def test_choices_that_choose_nothing(choice: Choice, message: str, tmp_path: Path) -> None:
    with pytest.raises(ll.InputError) as caught:
        sweep.sweep(tmp_path / "out.jsonl", choice)
    assert str(caught.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


# -- the check ---------------------------------------------------------------------------------


def test_compare_lists_what_got_worse() -> None:
    old = Coverage(header(), {})
    new = Coverage(header(), {})
    for name, was, now in [
        ("same", "verified", "verified"),
        ("better", "refused", "verified"),
        ("other", "refused", "crashed"),
        ("blurred", "verified", "inexact"),
        ("lost", "verified", "not built"),
    ]:
        old.results["words", name] = result(name, was)
        new.results["words", name] = result(name, now, reason="why" if name == "lost" else "")
    old.results["words", "gone"] = result("gone")
    assert list(map(str, coverage.compare(old, new))) == [
        "words/blurred: was verified, is inexact",
        "words/gone: was verified, is not there any more",
        "words/lost: was verified, is not built: why",
    ]
    assert coverage.compare(new, new) == []
    assert [str(c.was.type) for c in coverage.compare(old, new, lambda _, name: name == "gone")] == ["gone"]


@pytest.mark.usefixtures("still")
def test_check_fails_when_a_type_got_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("verify", "--all", "--check", "--types", "words/(llama|odd)")
    code, out, err = run(capsys, *command)
    assert (code, out) == (2, "")
    assert "there is no docs/coverage.jsonl to check against" in err
    (tmp_path / "docs").mkdir()
    older = header(versions={"transformers": "5.0.0"})
    baseline = stored(Path("docs/coverage.jsonl"), result("llama"), result("odd", "refused"), head=older)
    before = baseline.read_bytes()
    statuses = {"llama": "verified", "odd": "refused"}

    def tried(jobs: list[coverage.Key], *_: Any) -> Any:
        yield from (result(name, statuses[name], task, reason="why") for task, name in jobs)

    monkeypatch.setattr(sweep, "_try", tried)
    code, out, err = run(capsys, *command)
    assert code == 0
    assert "docs/coverage.jsonl: transformers 5.0.0\n" in out
    assert err.splitlines()[0] == "1/2 words/llama: verified: why"
    statuses["llama"] = "refused"
    code, out, err = run(capsys, *command)
    assert code == 1
    assert out.splitlines()[-1] == "words/llama: was verified, is refused: why"
    assert err.splitlines()[-1] == (
        "logitlab: 1 of the types that docs/coverage.jsonl has as verified are not: words/llama"
    )
    code, out, err = run(capsys, *command, "--out", "docs/coverage.jsonl")
    assert code == 2
    assert "does not write it: give another --out, or none" in err
    assert baseline.read_bytes() == before
    assert [p.name for p in Path("docs").iterdir()] == ["coverage.jsonl"]


@pytest.mark.usefixtures("still")
def test_the_command_writes_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "verify", "--all")
    assert (code, out) == (2, "")
    assert "the folder docs does not exist; make it first" in err
    (tmp_path / "docs").mkdir()
    stored(Path("docs/coverage.jsonl"), *(result(n, task=t, difference=2e-7) for t in TASKS for n in types(t)))
    code, out, err = run(capsys, "verify", "--all")
    assert code == 0
    assert out.splitlines()[-1].split() == ["all", "12", "12", "12", "0", "0", "0", "0", "0", "2.0e-07"]
    assert err.splitlines() == ["12/12 done already", "wrote docs/coverage.jsonl, docs/coverage.md"]
    assert Path("docs/coverage.md").read_text().startswith("# Coverage\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "default", "--check"), "that option belongs to logitlab verify --all: add --all"),
        (("verify", "somewhere", "--all"), "--all makes its own models: leave out MODEL and the options about it"),
        (("verify", "--all", "--json"), "--all makes its own models: leave out MODEL and the options about it"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, *arguments) == (2, "", f"logitlab: {message}\n")


# -- the page ----------------------------------------------------------------------------------


def cells(page: str, start: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line[1:-1].replace("\\|", "¦").split("|")]


def test_the_page(tmp_path: Path) -> None:
    layers = Layers("model.layers", 3, 32)
    vision = Layers("vision[0]", 2, 16)
    rows = [
        result("ok", architecture="Ok", difference=2.5e-7, space="vocabulary", stack=layers, stacks=(layers,)),
        result("both", difference=0.0, stack=layers, stacks=(vision, layers), fast_form=False),
        result("bad", "refused", architecture="_Bad_", reason="a | b\n| <c> `d` *e* [f](g) \x1b"),
        result("off", "inexact", difference=3e-4, reason="differs"),
        result("none", "not built", reason="no package"),
        result("stuck", "not built", architecture="Stuck", reason="does not run"),
        result("dead", "crashed"),
        result("zebra", task="pictures", difference=1e-6),
    ]
    out = stored(tmp_path / "coverage.jsonl", *rows)
    found = coverage.load(out)
    assert found is not None
    path = coverage.write_page(found, tmp_path / "coverage.md")
    page = path.read_text()
    assert f"Made by `logitlab verify --all` on 2001-02-03 with logitlab {ll.__version__}, torch " in page
    assert "**Incomplete**: 8 of 12 types have a result." in page
    # types built verified % max inexact refused crashed timed-out not-built not-run %
    words = ["words", "7", "5", "2", "40", "3.0e-04", "1", "1", "1", "0", "2", "1", "28.5"]
    assert cells(page, "words") == words
    assert cells(page, "pictures") == ["pictures", "1", "1", "1", "100", "1.0e-06", *"000000", "0"]
    assert cells(page, "all") == ["all", "8", "6", "3", "50", "3.0e-04", *"111021", "25"]
    assert cells(page, "ok") == ["ok", "Ok", "model.layers × 3", "vocabulary", "2.5e-07", ""]
    assert cells(page, "both")[4:] == ["0", "also vision\\[0\\] × 2; no fast form"]
    escaped = "**refused**: a ¦ b ¦ &lt;c&gt; \\`d\\` \\*e\\* \\[f\\](g)"
    assert cells(page, "bad") == ["bad", "\\_Bad\\_", "", "", "", escaped]
    assert cells(page, "off")[4:] == ["3.0e-04", "**inexact**: differs"]
    assert cells(page, "dead")[5] == "**crashed**"
    assert page.index("## words") < page.index("## pictures")
    assert "## Real models" not in page
    coverage.save(replace(found, results=dict(reversed(found.results.items()))), out)
    assert coverage.page(coverage.load(out) or found) == page


def test_every_row_of_the_page_has_its_table_s_cells(tmp_path: Path) -> None:
    hostile = "a|b\r\n\\|c\\ \u2028 \x00 {d} ~~e~~ <script>"
    rows = {("words", "x"): result("x", "refused", architecture=hostile, space=hostile, reason=hostile)}
    page = coverage.page(Coverage(header(), rows), [{"name": hostile, "note": hostile}])
    assert "<script>" not in page
    lines = page.split("\n")
    for start, count in (("| x |", 7), ("| a\\|b", 9)):
        (line,) = (line for line in lines if line.startswith(start))
        assert line.replace("\\\\", "").replace("\\|", "").count("|") == count
    assert all(c.isprintable() or c == "\n" for c in page)


@pytest.mark.parametrize("lines", [False, True])
def test_real_models(lines: bool, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "one", "package": "p", "task": "t", "architecture": "A", "space": "vocabulary", "stack": "h × 12"},
        {"name": "two", "stack": {"name": "h", "blocks": 4}, "max_difference": 4e-6, "note": "a|b"},
        {"name": "three", "max difference": "none"},
    ]
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1)
    (tmp_path / "coverage_real.json").write_text(text)
    found = Coverage(header(), {})
    page = coverage.write_page(found, tmp_path / "coverage.md").read_text()
    assert cells(page, "one") == ["one", "p", "t", "A", "h × 12", "vocabulary", "", ""]
    assert cells(page, "two") == ["two", "", "", "", "h × 4", "", "4.0e-06", "a¦b"]
    assert cells(page, "three")[6] == "none"


@pytest.mark.parametrize("text", ["[1, 2]", "nothing", '[{"name": '])
def test_real_models_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "coverage_real.json").write_text(text)
    with pytest.raises(ll.InputError, match=r"coverage_real\.json: .*; mend it, or remove it"):
        coverage.write_page(Coverage(header(), {}), tmp_path / "coverage.md")
    assert not (tmp_path / "coverage.md").exists()
