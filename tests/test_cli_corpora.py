"""The commands about corpora: they do what the library does, go on where they were, and refuse in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import logitlab as ll
from logitlab.sweeps import SweepReport
from tests.commands import COMMAND, refused, run
from tests.sweeps.test_sweep import content
from tests.words import rows as texts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts(60)), encoding="utf-8")
    return path


SMALL = ("--steps", 6, "--windows-per-step", 1, "--length", 16)


def test_fit_then_read_with_it(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "lens"
    code, said, err = run(capsys, "fit", corpus, "-m", checkpoint, "--kind", "diagonal", "--out", out, *SMALL)
    assert code == 0
    assert f"wrote {out}" in err
    lens = ll.load_lens(out)
    assert lens.kind == "diagonal"
    assert lens.recipe["steps"] == 6
    for site, row in lens.metrics["validation KL, nats"].items():
        assert any(
            line.split() == [site, f"{row['logit lens']:.4f}", f"{row['fitted']:.4f}"] for line in said.split("\n")
        )
    code, said, _ = run(capsys, "read", "the sea", "-m", checkpoint, "--lens", out, "--json")
    assert code == 0
    found = json.loads(said)
    assert found["provenance"]["lens"]["name"] == "diagonal lens"
    reading = ll.read(ll.load(checkpoint), "the sea", lens=lens)
    assert found["cells"][0]["kl"] == pytest.approx(float(reading.arrays["kl"][0, 0, 0]), abs=1e-6)


def test_a_jacobian_lens(capsys: pytest.CaptureFixture[str], checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = ("--kind", "jacobian", "--out", tmp_path / "j", "--prompts", 2, "--length", 12, "--skip-first", 2)
    code, said, _ = run(capsys, "fit", corpus, "-m", checkpoint, *arguments)
    assert code == 0
    assert "3 sites, 2 prompts" in said
    lens = ll.load_lens(tmp_path / "j")
    assert (lens.kind, lens.recipe["prompts"], lens.corpus["tokens"]) == ("jacobian", 2, 24)


def test_sweep(capsys: pytest.CaptureFixture[str], checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    lens = tmp_path / "mine"
    assert run(capsys, "fit", corpus, "-m", checkpoint, "--kind", "bias", "--out", lens, *SMALL)[0] == 0
    arguments = ("sweep", corpus, "-m", checkpoint, "--length", 16, "--lens", "logit", "--lens", lens)
    out, figure = tmp_path / "sweep", tmp_path / "curves.png"
    code, said, err = run(capsys, *arguments, "--out", out, "--figure", figure, "--group", "lang")
    assert code == 0
    assert "logit lens" in said
    assert "mine" in said
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {out}" in err
    report = SweepReport.load(out)
    assert report.lenses == ["logit lens", "mine"]
    assert set(report.groups) == {"all", "lang=en", "lang=de"}
    code, said, _ = run(capsys, *arguments, "--json")
    rows = json.loads(said)
    assert code == 0
    assert len(rows) == 2 * len(report.sites)
    assert {row["lens"] for row in rows} == {"logit lens", "mine"}


def test_a_sweep_that_is_interrupted_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts(3000)), encoding="utf-8")
    command = [*COMMAND, "sweep", str(path), "-m", str(checkpoint), "--length", "16", "--out"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*command, str(tmp_path / "x")], stderr=subprocess.PIPE, env=environment)
    while len(list((tmp_path / "x").glob("shard-*"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    last = process.stderr.read().decode().splitlines()[-1]
    assert process.wait() == 130
    assert last == f"logitlab: interrupted; the same command goes on from what is in {tmp_path / 'x'}"
    for folder in ("x", "y"):
        assert subprocess.run([*command, str(tmp_path / folder)], env=environment, capture_output=True).returncode == 0
    assert content(tmp_path / "x") == content(tmp_path / "y")


def test_generate(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    code, said, _ = run(capsys, "generate", "the sea is", "-m", checkpoint, "-n", 3)
    lines = said.splitlines()
    assert code == 0
    assert lines[0].split() == ["token", "p", "first", "from", "ranks", "by", "layer"]
    assert len(lines) == 4
    code, said, _ = run(capsys, "generate", "the sea is", "-m", checkpoint, "-n", 3, "--json")
    steps = [json.loads(line) for line in said.splitlines()]
    truth = list(ll.generate(ll.load(checkpoint), "the sea is", max_new_tokens=3, do_sample=False))
    assert [s["token_id"] for s in steps] == [s.token_id for s in truth]
    assert [s["logprob"] for s in steps] == pytest.approx([s.logprob for s in truth])
    drawn = [run(capsys, "generate", "the", "-m", checkpoint, "-n", 4, "--sample", "--seed", 5)[1] for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_bad_input(capsys: pytest.CaptureFixture[str], checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    model = ("-m", checkpoint)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "file").write_text("x")
    for arguments, said in (
        (("sweep", tmp_path / "no", *model), "there is no corpus at"),
        (("sweep", tmp_path / "empty.txt", *model), "is empty: it has no text"),
        (("sweep", corpus, *model, "--column", "body"), "has no column 'body'; its columns are text, lang"),
        (("sweep", corpus, *model, "--lens", tmp_path), "there is no lens in"),
        (("sweep", corpus, *model, "--rows"), "name a folder"),
        (("sweep", corpus, *model, "--ray", "127.0.0.1:9", "--out", tmp_path / "r"), "no Ray cluster answers"),
        (("sweep", corpus, *model, "--figure", tmp_path / "x.gif"), "a figure's name ends in"),
        (("fit", corpus, *model, "--out", tmp_path / "file"), "is a file; give a folder"),
        (("fit", corpus, *model, "--out", tmp_path / "a", "--length", 9000), "windows of 9000 tokens; at least"),
        (("fit", corpus, *model, "--out", tmp_path / "a", "--kind", "low-rank", "--rank", 99), "rank is 99"),
        (("fit", corpus, *model, "--out", tmp_path / "a", "--optimiser", "lion"), "there is no optimiser 'lion'"),
        (("fit", corpus, *model, "--out", tmp_path / "a", "--prompts", 3), "prompts is about a Jacobian lens"),
        (
            ("fit", corpus, *model, "--out", tmp_path / "a", "--kind", "jacobian", "--steps", 3),
            "steps means nothing to it",
        ),
        (("generate", "a", "b", *model), "give one prompt, not 2"),
        (("generate", "a", *model, "--temperature", 0.5), "add --sample"),
        (("read", "a", *model, "--lens", tmp_path / "no"), "there is no lens at"),
    ):
        assert said in refused(capsys, *arguments), arguments
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "file", "r"]
