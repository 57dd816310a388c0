"""Every bad input: one line that says what, where and what to do; exit code 2; nothing written."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import logitlab as ll
from logitlab.cli import main
from tests import zoo

Make = Callable[[Path], list[str]]


def copy(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder / "model")
    return folder / "model"


def run(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run the command line, check the form of the failure, return its one line."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("logitlab: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err.removeprefix("logitlab: ").strip()


# -- models ------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{broken")


def unknown_type(folder: Path) -> None:
    edit_config(folder, model_type="llamma", architectures=["LlammaForCausalLM"])


def remote_code(folder: Path) -> None:
    edit_config(folder, model_type="mine", auto_map={"AutoModelForCausalLM": "modeling.Mine"})


def truncated_safetensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 1000)


def missing_shard(folder: Path) -> None:
    names = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / names[0])
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lacking_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (no_config, ["is not a model folder: it has no config.json", "give the folder that has it"]),
        (config_not_json, ["config.json is not valid JSON"]),
        (unknown_type, ["names the model type 'llamma'", "does not know", "update transformers"]),
        (remote_code, ["needs Python code that comes with it", "--trust-remote-code"]),
        (truncated_safetensors, ["model.safetensors is corrupt or truncated"]),
        (corrupt_safetensors, ["model.safetensors is corrupt or truncated"]),
        (missing_shard, ["lacks 1 of 2 weight files", "model-00002-of-00002.safetensors first"]),
        (lacking_weights, ["does not hold all weights", "1 are missing", "model.layers.1.mlp.down_proj.weight first"]),
        (no_weights, ["has no weights: no .safetensors file"]),
        (pickle_only, ["has only pickled weights (pytorch_model.bin)", "--allow-pickle"]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_spoiled_checkpoints(
    spoil: Callable[[Path], None], parts: list[str], checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = copy(checkpoint, tmp_path)
    spoil(folder)
    out = tmp_path / "out.html"
    message = run(["read", "hello", "--model", str(folder), "--html", str(out)], capsys)
    assert str(folder) in message
    for part in parts:
        assert part in message
    assert not out.exists()
    with pytest.raises(ll.LogitlabError):
        ll.load(folder)


def test_pickles_are_read_on_request_but_never_run(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    folder = copy(checkpoint, tmp_path)
    pickle_only(folder)
    assert ll.load(folder, allow_pickle=True).fingerprint == ll.load(checkpoint).fingerprint
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    message = run(["verify", str(folder), "--allow-pickle"], capsys)
    assert "pickled weights" in message
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("./nowhere", ["there is no model at ./nowhere", "no such file or folder"]),
        ("/no/such/model.gguf", ["there is no model at /no/such/model.gguf"]),
        ("", ["the name of the model is empty"]),
        ("a b c", ["there is no model at a b c"]),
    ],
)
def test_no_such_model(name: str, parts: list[str], capsys: Any) -> None:
    message = run(["read", "hello", "--model", name], capsys)
    for part in parts:
        assert part in message


def test_a_hub_id_that_the_hub_does_not_give(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = run(["verify", "nobody/no-such-model"], capsys)
    assert "there is no model 'nobody/no-such-model' here" in message
    assert "check the name and the network" in message


def test_a_file_that_is_no_model(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "model.txt"
    file.write_text("x")
    assert "is a file, but not a .gguf one" in run(["verify", str(file)], capsys)


@pytest.mark.parametrize("content", [b"", b"GG", b"nope" * 50, b"GGUF", b"GGUF" + bytes(range(256)) * 40])
def test_spoiled_gguf_files(content: bytes, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    message = run(["verify", str(file)], capsys)
    assert str(file) in message
    assert "is not a GGUF file" in message or "corrupt or truncated" in message
    assert "download or copy it again" in message


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_real_gguf_file(share: float, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from logitlab.models.cache import default_gguf

    monkeypatch.setenv("LOGITLAB_CACHE", str(tmp_path / "cache"))
    source = default_gguf()
    assert source is not None
    file = tmp_path / "cut.gguf"
    file.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])
    message = run(["verify", str(file)], capsys)
    assert "truncated" in message
    assert not list((tmp_path / "cache").glob("gguf/*")) if (tmp_path / "cache").exists() else True


def test_a_model_whose_tail_does_not_verify(checkpoint: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from logitlab.models.tail import Tail

    original = Tail.output

    def wrong(self: Tail, *args: Any) -> Any:
        output = original(self, *args)
        return dataclasses.replace(output, logits=output.logits * 1.01)

    monkeypatch.setattr(Tail, "output", wrong)
    message = run(["verify", str(checkpoint)], capsys, code=1)
    assert "does not give the model's own logits" in message
    assert "cannot be read" in message


# -- what is asked of a model ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([""], ["the text is empty"]),
        (["  \n "], ["the text is empty"]),
        (["x", "--sites", "9.resid_post"], ["layer 9 is out of range", "3 layers (0 to 2"]),
        (["x", "--sites", "-4.resid_post"], ["layer -4 is out of range"]),
        (["x", "--sites", "1.resid"], ["unknown kind 'resid'", "the kinds are resid_pre"]),
        (["x", "--sites", "1.head_out.4"], ["1.head_out.4 does not exist", "has 4 (0 to 3)"]),
        (["x", "--sites", "1.mlp_out.4"], ["only head_out and neuron take a component index"]),
        (["x", "--sites", "cross_attn_out"], ["'cross_attn_out' is not offered", "does not attend to an encoder"]),
        (["x", "--sites", "7:9.resid_post"], ["the layer slice selects nothing"]),
        (["x", "--sites", "what?"], ["not of the form LAYER.KIND"]),
        (["x", "--positions", "99"], ["position 99 is out of range", "prompt 0 has"]),
        (["x", "--positions", "-99"], ["position -99 is out of range"]),
        (["x", "--positions", "50:60"], ["no position is selected in prompt 0"]),
        (["x", "--positions", "a,b"], ["positions 'a,b' are not understood"]),
        (["x", "--target", ""], ["the target is empty"]),
        (["x", "--target", "capital of France"], ["is", "tokens for this model"]),
        (["x", "--target", "id:300"], ["target id 300 is not in the vocabulary (0 to 299)"]),
        (["x", "--target", "id:-1"], ["target id -1"]),
        (["x", "--target", "id:abc"], ["after id: comes a whole number"]),
        (["x", "--top-k", "0"], ["top_k is 0; it must be at least 1"]),
        (["word " * 100], ["the model's context holds 64", "shorten it"]),
        (["x", "--chat"], ["has no chat template"]),
        (["x", "--decoder", "y"], ["decoder= is for encoder-decoder models"]),
        (["x", "--dtype", "int8"], ["unknown dtype 'int8'", "float32"]),
        (["x", "--device", "toaster"], ["device 'toaster' cannot be used"]),
        (["x", "--stack", "vision"], ["stack='vision' names no layer stack", "model.layers"]),
        (["x", "--nonsense"], ["No such option", "--nonsense"]),
        (["x", "--file", "y"], ["not both"]),
    ],
)
def test_bad_requests(arguments: list[str], parts: list[str], checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.parquet"
    message = run(["read", *arguments, "--model", str(checkpoint), "--save", str(out)], capsys)
    for part in parts:
        assert part in message, message
    assert list(tmp_path.iterdir()) == []


def test_empty_standard_input_and_files(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("", "\n\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert "empty" in run(["read", "--model", str(checkpoint)], capsys)
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert "empty" in run(["read", "--lines", "--model", str(checkpoint)], capsys)
    (tmp_path / "empty.txt").write_text("")
    assert "the text is empty" in run(["read", "-f", str(tmp_path / "empty.txt"), "-m", str(checkpoint)], capsys)
    assert "cannot read" in run(["read", "-f", str(tmp_path / "no.txt"), "-m", str(checkpoint)], capsys)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "is not UTF-8 text (byte 3)" in run(["read", "-f", str(tmp_path / "latin.txt")], capsys)


@pytest.mark.parametrize(
    ("inputs", "part"),
    [
        ([], "the list of prompts is empty"),
        ([[]], "the prompt is empty"),
        (torch.zeros(0, dtype=torch.long), "the list of prompts is empty"),
        ([1, 300], "token id 300, which is not in the vocabulary (0 to 299)"),
        ([-1], "token id -1"),
        (torch.ones(3), "must be whole numbers"),
        (torch.ones(1, 2, 3, dtype=torch.long), "one or two dimensions"),
        ({"attention_mask": [[1]]}, "has no input_ids"),
        ({"input_ids": [[5, 6, 7]], "attention_mask": [[1, 0, 1]]}, "a hole in the middle"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, "has 1 entries for 2 input_ids"),
        ([{"text": "hi"}], "needs 'role' and 'content'"),
        (3.5, "inputs of type float are not understood"),
        ([1, "a"], "not understood"),
        ([[1, 2], "a"], "not understood"),
    ],
)
def test_bad_inputs_in_python(llama: ll.Model, inputs: Any, part: str) -> None:
    with pytest.raises(ll.InputError) as caught:
        ll.read(llama, inputs)
    assert part in str(caught.value)


def test_text_without_a_tokenizer() -> None:
    model = ll.wrap(zoo.shared("gpt2"))
    with pytest.raises(ll.InputError, match="has no tokenizer: pass token ids"):
        ll.read(model, "hello")
    with pytest.raises(ll.InputError, match="has no tokenizer, so give a token id"):
        ll.read(model, zoo.ids(), target="a")


def test_hidden_states_that_are_not_finite(tmp_path: Path, capsys: Any) -> None:
    """A weight that overflows for real prompts only; the message says where it begins."""
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[299] = torch.inf
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    token = zoo.tokenizer().convert_ids_to_tokens(299).replace("\u0120", " ")
    message = run(["read", f"a{token}", "--model", str(folder)], capsys)
    assert "hidden states are NaN or infinite from site 0.resid_pre on (prompt 0, position 1)" in message


# -- outputs -----------------------------------------------------------------------------------


def test_outputs_that_cannot_be_written(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    base = ["read", "hello", "--model", str(checkpoint)]
    for option in ("--html", "--save", "--figure"):
        missing = tmp_path / "no" / "out.png"
        assert f"cannot write {missing}: the folder {missing.parent} does not exist" in run(
            [*base, option, str(missing)], capsys
        )
    assert "it is a folder; give a file name" in run([*base, "--html", str(tmp_path)], capsys)
    assert "ends in .png, .svg, .pdf" in run([*base, "--figure", str(tmp_path / "x.bmp")], capsys)
    assert list(tmp_path.iterdir()) == []


def test_no_permission(checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permission bits do not bind root
    message = run(["read", "x", "-m", str(checkpoint), "--save", str(tmp_path / "a.parquet")], capsys)
    assert "no permission to write in" in message


@pytest.mark.parametrize("option", ["--html", "--save", "--figure"])
def test_a_full_disk(
    option: str, checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "out.png"
    old.write_bytes(b"old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = run(["read", "x", "-m", str(checkpoint), option, str(old)], capsys)
    assert "No space left on device" in message
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


def test_wrong_reading_files(tmp_path: Path, capsys: Any, llama: ll.Model) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = ll.read(llama, zoo.ids()).save(tmp_path / "good.parquet")
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-50])
    (tmp_path / "text.parquet").write_text("no")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    table = pq.read_table(good)
    meta = json.loads(table.schema.metadata[b"logitlab.reading"]) | {"format": 99}
    pq.write_table(
        table.replace_schema_metadata({b"logitlab.reading": json.dumps(meta).encode()}), tmp_path / "new.parquet"
    )
    for name, part in {
        "missing.parquet": "there is no such file",
        "cut.parquet": "is not a whole Parquet file",
        "text.parquet": "is not a whole Parquet file",
        "other.parquet": "Reading.save did not write it",
        "new.parquet": "format 99",
    }.items():
        message = run(["show", str(tmp_path / name)], capsys)
        assert f"cannot read {tmp_path / name}" in message
        assert part in message
