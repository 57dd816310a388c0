"""A sweep against readings, and whatever is done to it in between: broken off, killed, changed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import logitlab as ll
from logitlab.corpora import corpus, windows
from logitlab.errors import InputError
from logitlab.lenses import LogitLens, identity
from logitlab.sweeps import Progress, SweepReport, sweep
from logitlab.sweeps.run import LOCK, looks_back_only
from tests import zoo
from tests.lenses.test_fitted import changed
from tests.words import rows as texts


@pytest.fixture(scope="module")
def model() -> ll.Model:
    return ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which names the process that held it last."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != LOCK)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize("packed", [True, False])
def test_means_are_those_of_readings(model: ll.Model, packed: bool) -> None:
    lenses = {"plain": LogitLens(), "moved": changed(model, "diagonal")}
    report = sweep(model, texts(), lens=lenses, length=16, packed=packed, shard_windows=3, top_k=3, skip_first=1)
    found = [w for w in windows(model, corpus(texts()), 16, packed=packed) if len(w.ids[w.own]) > 1]
    for name, lens in lenses.items():
        sums: dict[str, list[np.ndarray]] = {}
        for w in found:
            following = [*w.ids[1:], 0]
            reading = ll.read(model, list(w.ids), lens=lens, top_k=3)
            final = reading.arrays["top_id"][0, -1]
            for p in range(1, len(w.ids)):
                cell = {k: v[0, :, p] for k, v in reading.arrays.items()}
                sums.setdefault("kl", []).append(cell["kl"])
                sums.setdefault("entropy", []).append(cell["entropy"])
                sums.setdefault("agreement", []).append(cell["top_id"][:, 0] == final[p, 0])
                sums.setdefault("overlap", []).append([len(set(row) & set(final[p])) / 3 for row in cell["top_id"]])
                sums.setdefault("confidence", []).append(np.exp(cell["top_logprob"][:, 0]))
                if p + 1 < len(w.ids):
                    one = ll.read(model, list(w.ids), lens=lens, positions=p, target=[following[p]])
                    sums.setdefault("cross_entropy", []).append(-one.arrays["target_logprob"][0, :, 0, 0])
                    sums.setdefault("accuracy", []).append(cell["top_id"][:, 0] == following[p])
        for measure, values in sums.items():
            mean = np.mean(np.array(values, dtype=float), 0)
            for i, site in enumerate(report.sites):
                got = report.measure(measure, name, site)
                assert got.mean == pytest.approx(mean[i], abs=2e-5), (name, measure, site)
                assert got.tokens == len(values)
    assert report.about["corpus"]["tokens"] == sum(len(w.ids) - 1 for w in found)
    assert report.measure("agreement").mean == 1.0
    assert int(report.depths("plain").sum()) == report.about["corpus"]["tokens"]


def test_groups_share_out_the_tokens(model: ll.Model) -> None:
    report = sweep(model, texts(), group="lang", length=12, shard_windows=5)
    assert set(report.groups) == {"all", "lang=en", "lang=de"}
    parts = [report.measure("kl", site=0, group=g) for g in ("lang=en", "lang=de")]
    whole = report.measure("kl", site=0)
    assert sum(p.tokens for p in parts) == whole.tokens
    assert sum(p.mean * p.tokens for p in parts) == pytest.approx(whole.mean * whole.tokens)
    alone = sweep(model, [t for t in texts() if t["lang"] == "de"], length=12, packed=False)
    assert alone.measure("kl", site=0).mean == pytest.approx(parts[1].mean, abs=1e-6)


def test_how_it_is_cut_into_shards_does_not_matter(model: ll.Model) -> None:
    reports = [
        sweep(model, texts(), length=16, shard_windows=n, batch_tokens=b) for n, b in ((1, 16), (4, 64), (99, 999))
    ]
    for name in reports[0].measures:
        for other in reports[1:]:
            assert other.measure(name, site=1).mean == pytest.approx(reports[0].measure(name, site=1).mean, abs=1e-6)
    np.testing.assert_array_equal(reports[0].depths(), reports[2].depths())


def test_equal_windows_are_counted_each(model: ll.Model) -> None:
    twice = [texts()[0]] * 4
    report = sweep(model, twice, packed=False, length=32)
    single = sweep(model, twice[:1], packed=False, length=32)
    assert report.measure("kl").tokens == 4 * single.measure("kl").tokens
    assert report.measure("kl", site=0).mean == pytest.approx(single.measure("kl", site=0).mean, abs=1e-6)


def test_every_token_is_written_down(model: ll.Model, tmp_path: Path) -> None:
    lenses = {"plain": LogitLens(), "bias": identity(model, "bias")}
    report = sweep(
        model, texts(), lens=lenses, length=16, packed=False, shard_windows=4, folder=tmp_path / "x", rows=True
    )
    table = pq.read_table(sorted((tmp_path / "x").glob("rows-*.parquet"))).to_pandas()  # type: ignore[arg-type]
    tokens = report.about["corpus"]["tokens"]
    assert len(table) == tokens * 2 * len(report.sites)
    for (lens, site), rows in table.groupby(["lens", "site"], observed=True):
        assert rows["kl"].mean() == pytest.approx(report.measure("kl", lens, site).mean, abs=1e-5)
        known = rows["cross_entropy"].dropna()
        assert len(known) == report.measure("cross_entropy", lens, site).tokens
        assert (rows["rank"] >= 1).sum() == len(known)
    first = table[(table["text"] == 2) & (table["lens"] == "plain") & (table["site"] == "1.resid_post")]
    ids = model.tokenizer(texts()[2]["text"], add_special_tokens=False)["input_ids"]
    assert list(first["place"]) == list(range(len(ids)))
    assert list(first["token_id"]) == ids[:16] + ids[16:]
    reading = ll.read(model, ids[:16], sites="1.resid_post")
    np.testing.assert_allclose(first["kl"][: len(ids[:16])], reading.arrays["kl"][0, 0], atol=1e-5)


def test_tokens_of_packed_windows_know_their_text(model: ll.Model, tmp_path: Path) -> None:
    sweep(model, texts(), length=16, folder=tmp_path / "x", rows=True, sites="2.resid_post")
    table = pq.read_table(sorted((tmp_path / "x").glob("rows-*.parquet"))).to_pandas()  # type: ignore[arg-type]
    for number, rows in table.groupby("text"):
        ids = [*model.tokenizer(texts()[number]["text"], add_special_tokens=False)["input_ids"], 2]
        assert list(rows["token_id"]) == [ids[p] for p in rows["place"]]
    assert table["text"].nunique() > 20


def test_windows_that_are_run_again_are_counted_once(tmp_path: Path) -> None:
    """Beyond the length that it was trained on this model changes its rotary table, so a long prompt is begun anew."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 600}
    module = zoo.build("llama", max_position_embeddings=2400, rope_parameters=rope)
    model = ll.wrap(module, zoo.tokenizer(), name="dynamic")
    text = " ".join(t["text"] for t in texts(200))
    report = sweep(model, [text], length=1200, max_tokens=1200, folder=tmp_path / "x", rows=True)
    assert report.about["corpus"]["tokens"] == report.measure("kl").tokens == int(report.depths().sum())
    table = pq.read_table(sorted((tmp_path / "x").glob("rows-*.parquet"))).to_pandas()  # type: ignore[arg-type]
    assert not table.duplicated(["window", "position", "site"]).any()
    ids = list(table[table["site"] == "0.resid_pre"]["token_id"])
    reading = ll.read(model, ids, sites="0.resid_pre")
    kl = table[table["site"] == "0.resid_pre"]["kl"]
    np.testing.assert_allclose(kl, reading.arrays["kl"][0, 0], atol=1e-5)


def test_what_is_not_a_number_is_said(model: ll.Model) -> None:
    class Broken(LogitLens):
        def transport(self, hidden: torch.Tensor, site: ll.Site) -> torch.Tensor:
            moved = hidden.clone()
            moved[::2] = torch.nan
            return moved if site.layer == 0 else hidden

    with pytest.raises(ll.ModelError, match=r"not a number at 0\.resid_pre through broken"):
        sweep(model, texts(), lens={"broken": Broken()}, length=16)


def test_classes_of_tokens_are_no_next_tokens() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, num_labels=5)
    module = transformers.GPT2ForTokenClassification(config)
    zoo.perturb(module.eval())
    report = sweep(ll.wrap(module, zoo.tokenizer(), name="tags"), texts(), length=16, top_k=2)
    assert "cross_entropy" not in report.measures
    assert "kl" in report.measures


def test_two_sweeps_do_not_share_a_folder(model: ll.Model, tmp_path: Path) -> None:
    def again(p: Progress) -> None:
        with pytest.raises(InputError, match=r"another sweep \(process \d+\) is at work in"):
            sweep(model, texts(), length=16, folder=tmp_path / "x")

    sweep(model, texts(), length=16, folder=tmp_path / "x", progress=again)


def test_a_kill_while_it_begins_does_no_harm(model: ll.Model, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".sweep.json.abc.part").write_text("{")
    sweep(model, texts(), length=16, folder=tmp_path / "x")
    assert not list((tmp_path / "x").glob(".*.part"))


@pytest.mark.parametrize("stop", [1, 3])
def test_broken_off_it_ends_with_the_same_bytes(model: ll.Model, tmp_path: Path, stop: int) -> None:
    options: dict[str, Any] = {"length": 16, "shard_windows": 2, "rows": True}
    sweep(model, texts(), folder=tmp_path / "whole", **options)

    def breaks(p: Progress) -> None:
        if p.shards == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(model, texts(), folder=tmp_path / "x", progress=breaks, **options)
    assert not (tmp_path / "x" / "report.json").exists()
    rates: list[float] = []
    report = sweep(model, texts(), folder=tmp_path / "x", progress=lambda p: rates.append(p.rate), **options)
    assert rates[:stop] == [0.0] * stop
    assert content(tmp_path / "x") == content(tmp_path / "whole")
    assert SweepReport.load(tmp_path / "x").to_pandas().equals(report.to_pandas())


KILLED = """
import sys, json
from pathlib import Path
import logitlab as ll
from tests import zoo
from tests.words import rows as texts
from logitlab.sweeps import sweep
model = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
print("ready", flush=True)
sweep(model, texts(120), length=16, shard_windows=1, rows=True, folder=sys.argv[1])
"""


def test_killed_three_times_it_ends_with_the_same_bytes(model: ll.Model, tmp_path: Path) -> None:
    whole = sweep(model, texts(120), length=16, shard_windows=1, rows=True, folder=tmp_path / "whole")
    draw = random.Random(5)
    done = 0
    for _ in range(3):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "x")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        assert process.stdout is not None
        process.stdout.readline()
        target = done + draw.randint(2, 12)
        while len(list((tmp_path / "x").glob("shard-*"))) < target and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = len(list((tmp_path / "x").glob("shard-*")))
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "x" / "report.json").exists()
    report = sweep(model, texts(120), length=16, shard_windows=1, rows=True, folder=tmp_path / "x")
    assert content(tmp_path / "x") == content(tmp_path / "whole")
    assert report.to_pandas().equals(whole.to_pandas())


def test_models_that_look_both_ways_have_no_next_token() -> None:
    bert = ll.wrap(zoo.build("bert"), zoo.tokenizer(), name="bert")
    assert not looks_back_only(bert)
    report = sweep(bert, texts(), length=16)
    assert "cross_entropy" not in report.measures
    assert "kl" in report.measures
    assert report.ranks().sum() == 0
    for name in ("gpt2", "llama", "mamba", "gemma3"):
        assert looks_back_only(ll.wrap(zoo.build(name)))


def test_what_is_in_the_folder_must_belong_to_it(model: ll.Model, tmp_path: Path) -> None:
    def said(match: str, source: Any = None, folder: str = "x", **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            sweep(model, texts() if source is None else source, **{"length": 16, "folder": tmp_path / folder} | options)

    sweep(model, texts(), length=16, shard_windows=2, folder=tmp_path / "x")
    said(r"another settings \(shard_windows: 2 there, 3 here\)", shard_windows=3)
    said("of other tokens than the corpus has now", texts(seed=1), shard_windows=2)
    said("has more shards than the corpus gives now", texts()[:18], shard_windows=2)
    said(r"max_tokens: None there, 60 here", max_tokens=60, shard_windows=2)
    assert SweepReport.load(tmp_path / "x").measure("kl").tokens > 0  # a refused call leaves the report
    said("with another lenses", lens={"logit lens": changed(model)}, shard_windows=2)
    other = ll.wrap(zoo.build("llama", seed=3), zoo.tokenizer(), name="llama")
    with pytest.raises(InputError, match="with another model"):
        sweep(other, texts(), length=16, shard_windows=2, folder=tmp_path / "x")
    sweep(model, texts(seed=2), length=16, shard_windows=2, top_k=2, folder=tmp_path / "y")
    foreign = (tmp_path / "y" / "shard-000001.safetensors").read_bytes()
    (tmp_path / "x" / "shard-000001.safetensors").write_bytes(foreign)
    said("belongs to another sweep", shard_windows=2)
    (tmp_path / "x" / "shard-000001.safetensors").write_bytes(foreign[:50])
    said("is damaged", shard_windows=2)
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "notes.txt").write_text("mine")
    said("is not empty and holds no sweep", folder="z")
    said("is a file", folder="z/notes.txt")
    assert (tmp_path / "z" / "notes.txt").read_text() == "mine"


def test_bad_requests(model: ll.Model, tmp_path: Path) -> None:
    def said(match: str, source: Any = None, **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            sweep(model, texts() if source is None else source, **options)

    said("is empty", [])
    said("gives no window of 4000 tokens", length=4000)
    said("are in windows of no more than skip_first=40", length=32, skip_first=40)
    said("has no column 'body'", column="body")
    said("has no column 'country' to group by; there are lang", group="country")
    said("cannot be grouped", group="lang", packed=True)
    said("name a folder", rows=True)
    said("top_k is 0", top_k=0)
    said("has columns of its own", lens=ll.ConceptLens(torch.randn(3, model.width)))
    said("two lenses have the same name", lens=[LogitLens(), LogitLens()])
    said("no lens was given", lens=[])
    said(r"lens is the text 'tuned'", lens="tuned")
    said("workers are those of a Ray cluster", workers=2)
    said(r"length 8\.5 is not a whole number", length=8.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("logitlab.sweeps.run.MOST_GROUPS", 3)
        many = [{"text": t["text"], "id": str(n)} for n, t in enumerate(texts())]
        said("has more than 3 values", many, group="id", length=16)
    with pytest.raises(InputError, match="cannot be swept"):
        sweep(ll.wrap(zoo.build("t5"), zoo.tokenizer()), texts())


def test_the_most_tokens_that_are_wanted(model: ll.Model) -> None:
    report = sweep(model, texts(), length=16, max_tokens=50)
    assert report.about["corpus"]["tokens"] == 64
    assert json.loads(json.dumps(report.about)) == report.about


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_made(model: ll.Model, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot make the folder"):
        sweep(model, texts(), folder=tmp_path / "x")
