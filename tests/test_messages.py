"""The whole text of every refusal: what is wrong, where, and what to do instead."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import logitlab as ll
from tests import zoo
from tests.commands import files, one_line, refused, spawn

Refused = Callable[..., str]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path) -> Refused:
    """Run `logitlab read` on the tiny checkpoint with an output file; give its message back."""

    def run(*arguments: Any, model: Any = checkpoint, code: int = 2) -> str:
        folder = tmp_path / "outputs"
        folder.mkdir(exist_ok=True)
        outputs = ("--save", folder / "out.parquet", "--html", folder / "out.html")
        message = refused(capsys, "read", *arguments, "-m", model, *outputs, code=code)
        assert files(folder) == []
        return message

    return run


def read(model: ll.Model, inputs: Any = "The capital", **options: Any) -> str:
    """The message with which the Python API refuses."""
    with pytest.raises(ll.InputError) as caught:
        ll.read(model, inputs, **options)
    return str(caught.value)


EMPTY = "the text is empty: give at least one word"


@pytest.mark.parametrize("text", ["", " ", "\n\t \n"])
def test_empty_text(refuse: Refused, llama: ll.Model, text: str) -> None:
    assert refuse(text) == EMPTY
    assert read(llama, text) == EMPTY
    assert read(llama, ["a", text]) == EMPTY


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_standard_input_and_file(
    refuse: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert refuse() == EMPTY
    (tmp_path / "empty.txt").write_text(text)
    assert refuse("--file", tmp_path / "empty.txt") == EMPTY
    assert refuse("--file", tmp_path / "empty.txt", "--lines") == (
        "there is nothing to read: the list of prompts is empty"
    )


def test_empty_lists(llama: ll.Model) -> None:
    assert read(llama, []) == "there is nothing to read: the list of prompts is empty"
    assert read(llama, [[]]) == "the prompt is empty: give at least one token"
    assert read(llama, [[3], []]) == "prompt 1 is empty: give at least one token"
    assert read(llama, {"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}) == (
        "the prompt is empty: give at least one token"
    )


def test_no_prompt_at_a_terminal(refuse: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO("")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert refuse() == 'there is no prompt: logitlab read "some text", or --file, or standard input'


def test_prompts_from_two_places(refuse: Refused, tmp_path: Path) -> None:
    assert refuse("x", "--file", tmp_path / "x.txt") == "give prompts as arguments or with --file, not both"


def test_files_that_hold_no_text(refuse: Refused, tmp_path: Path, checkpoint: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"abc\xff\xfe")
    assert refuse("--file", bad) == f"cannot read {bad}: it is not UTF-8 text (byte 3); save it as UTF-8"
    missing = tmp_path / "missing.txt"
    assert refuse("--file", missing) == f"cannot read {missing}: No such file or directory; give a text file"
    assert refuse("--file", tmp_path) == f"cannot read {tmp_path}: Is a directory; give a text file"


def test_standard_input_that_is_no_text(refuse: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abc\xff\xfe"), encoding="utf-8"))
    assert refuse() == "cannot read standard input: it is not UTF-8 text (byte 3); convert it to UTF-8"


def test_half_characters(refuse: Refused, llama: ll.Model) -> None:
    rest = "that is not text (\\udcff, half a character or a stray byte); take it out, or write the text as UTF-8"
    assert refuse("ab\udcff") == f"the text has a character at 2 {rest}"
    assert refuse("ab", "-t", "\udcff") == f"the target has a character at 0 {rest}"
    assert read(llama, target="a\udcff") == f"the target has a character at 1 {rest}"


def test_a_prompt_beyond_the_context(refuse: Refused, llama: ll.Model) -> None:
    message = "has 65 tokens, but the model's context holds 64: shorten it or read it in parts"
    assert refuse("x" * 65) == f"the prompt {message}"
    assert read(llama, [[5], [5] * 65]) == f"prompt 1 {message}"
    assert len(ll.read(llama, [5] * 64, positions=-1).prompts[0].ids) == 64


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("3.resid_post", "layer 3 is out of range: this stack has 3 layers (0 to 2, or -1 to -3)"),
        ("-4.resid_post", "layer -4 is out of range: this stack has 3 layers (0 to 2, or -1 to -3)"),
        ("9:.mlp_out", "site kind 'mlp_out': the layer slice selects nothing (this stack has 3)"),
        ("::0.mlp_out", "site '::0.mlp_out': the step of a layer slice must be at least 1"),
        (
            "0.nope",
            "site '0.nope': unknown kind 'nope'; the kinds are resid_pre, attn_out, cross_attn_out, mlp_out, "
            "resid_post, head_out, neuron",
        ),
        (
            "x.resid_post",
            "site 'x.resid_post' is not of the form LAYER.KIND or LAYER.KIND.INDEX "
            "(for instance 12.resid_post, ::4.mlp_out, 3.head_out.7)",
        ),
        ("0.head_out.4", "0.head_out.4 does not exist: layer 0 has 4 (0 to 3)"),
        ("1.neuron.48", "1.neuron.48 does not exist: layer 1 has 48 (0 to 47)"),
        (
            "0.mlp_out.1",
            "site '0.mlp_out.1': only head_out and neuron take a component index; write 0.mlp_out",
        ),
        (" , ", "no site was named; leave sites out for the whole residual stream"),
        (
            "0.cross_attn_out",
            "site kind 'cross_attn_out' is not offered at layer 0 of tiny-llama: "
            "the block does not attend to an encoder",
        ),
    ],
)
def test_sites_that_do_not_exist(refuse: Refused, llama: ll.Model, site: str, message: str) -> None:
    assert refuse("x", "-s", site) == message
    assert read(llama, sites=site) == message


def test_a_kind_that_bert_does_not_offer() -> None:
    model = ll.wrap(zoo.shared("bert"), zoo.tokenizer(), name="tiny-bert")
    message = read(model, sites="1.attn_out")
    head = "site kind 'attn_out' is not offered at layer 1 of tiny-bert: "
    assert message.startswith(head)
    assert message.removeprefix(head) == model.verification.refused["attn_out"]
    assert "norm" in message  # the reason: a norm comes after the sum


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ("5", "position 5 is out of range: prompt 0 has 5 tokens (0 to 4, or -1 to -5)"),
        ("-6", "position -6 is out of range: prompt 0 has 5 tokens (0 to 4, or -1 to -5)"),
        ("9:", "no position is selected in prompt 0, which has 5 tokens (0 to 4)"),
        ("::0", "the step of a slice of positions is 0; it must be another whole number"),
        *(
            (p, f"positions {p!r} are not understood: write 3, -1, 0,5,-1 or a slice such as 2:8")
            for p in ("x", "", "1,,2", "1.5", "1:2:3:4", "1:x")
        ),
    ],
)
def test_positions(refuse: Refused, positions: str, message: str) -> None:
    assert refuse("x y z", "-p", positions) == message


def test_positions_in_python(llama: ll.Model) -> None:
    assert read(llama, [[5, 6, 7], [5, 6]], positions=2) == (
        "position 2 is out of range: prompt 1 has 2 tokens (0 to 1, or -1 to -2)"
    )
    assert read(llama, [5, 6, 7], positions=-4) == (
        "position -4 is out of range: prompt 0 has 3 tokens (0 to 2, or -1 to -3)"
    )
    assert read(llama, [5, 6], positions=[]) == "no position is selected in prompt 0, which has 2 tokens (0 to 1)"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "the target is empty: give a token such as ' Paris', or an id"),
        ("id:abc", "target 'id:abc': after id: comes a whole number, for instance id:42"),
        ("id:300", "target id 300 is not in the vocabulary (0 to 299)"),
        ("id:-1", "target id -1 is not in the vocabulary (0 to 299)"),
        (
            "xyz",
            "target 'xyz' is 3 tokens for this model: 'x' (90), 'y' (91), 'z' (92); give one of them, or an id",
        ),
    ],
)
def test_targets(refuse: Refused, target: str, message: str) -> None:
    assert refuse("x", "-t", target) == message


def test_a_target_that_wants_a_space(refuse: Refused, llama: ll.Model) -> None:
    space = zoo.tokenizer()(" capital")["input_ids"]
    pieces = zoo.tokenizer()("capital")["input_ids"]
    assert (len(space), len(pieces)) == (1, 2)
    message = (
        f"target 'capital' is 2 tokens for this model: 'cap' ({pieces[0]}), 'ital' ({pieces[1]}); "
        f"with a space before it, ' capital' is one token ({space[0]})"
    )
    assert refuse("x", "-t", "capital") == message
    assert read(llama, target="capital") == message


@pytest.mark.parametrize("k", [0, -1])
def test_top_k(refuse: Refused, llama: ll.Model, k: int) -> None:
    assert refuse("x", "-k", k) == f"top_k is {k}; it must be at least 1"
    assert read(llama, top_k=k) == f"top_k is {k}; it must be at least 1"


def test_what_only_other_models_have(refuse: Refused) -> None:
    assert refuse("x", "--decoder", "y") == "decoder= is for encoder-decoder models; this model has one sequence only"
    assert refuse("x", "--chat") == "this model's tokenizer has no chat template: pass the text as one string"
    assert refuse("x", "--stack", "nope") == "stack='nope' names no layer stack of this model; it has model.layers"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hidden_states_that_are_not_finite(refuse: Refused, tmp_path: Path, value: float) -> None:
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path / "poisoned")
    zoo.tokenizer().save_pretrained(tmp_path / "poisoned")
    assert refuse("x y", model=tmp_path / "poisoned", code=1) == (
        "the model's own logits are not finite on a few ordinary tokens: hidden states are not, from 1.resid_post of "
        "model.layers on; load it in float32, or look at its weights"
    )


def test_hidden_states_that_are_not_finite_at_one_position_only() -> None:
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[77, 0] = float("inf")
    handle = ll.wrap(model)
    with pytest.raises(ll.ModelError) as caught:
        ll.read(handle, [[5, 6], [5, 77, 8]])
    assert str(caught.value) == (
        "hidden states are NaN or infinite from site 0.resid_pre on (prompt 1, position 1): "
        "load the model in float32, or look at its weights"
    )


# -- models ------------------------------------------------------------------------------------


def test_no_such_model(refuse: Refused, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert refuse("x", model=gone) == (
        f"there is no model at {gone}: no such file or folder; check the path, or give a hub id"
    )
    assert refuse("x", model="gone.gguf") == (
        "there is no model at gone.gguf: no such file or folder; check the path, or give a hub id"
    )
    assert refuse("x", model="") == (
        "the name of the model is empty: give 'default', a hub id, a folder, or a .gguf file"
    )
    (tmp_path / "model.bin").write_bytes(b"x")
    assert refuse("x", model=tmp_path / "model.bin") == (
        f"{tmp_path / 'model.bin'} is a file, but not a .gguf one: give the folder that has config.json in it"
    )


def test_a_hub_id_that_the_hub_does_not_give(checkpoint: Path, tmp_path: Path) -> None:
    done = spawn("read", "x", "-m", "nobody-here/no-such-model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    message = one_line(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert re.fullmatch(
        r"there is no model 'nobody-here/no-such-model' here: it is not a local folder, and the hub did not give it "
        r"\(.+\); check the name and the network, or give a local folder",
        message,
    )


@pytest.mark.parametrize("command", ["read", "verify"])
def test_a_folder_that_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    arguments = ["read", "x", "-m", tmp_path] if command == "read" else ["verify", tmp_path]
    assert refused(capsys, *arguments) == (
        f"{tmp_path} is not a model folder: it has no config.json; give the folder that has it"
    )


def test_a_stack_of_other_options(refuse: Refused) -> None:
    assert refuse("x", "--dtype", "float99") == "unknown dtype 'float99': use auto, float32, bfloat16 or float16"
    assert refuse("x", "--dtype", "int8") == "unknown dtype 'int8': use auto, float32, bfloat16 or float16"
    assert re.fullmatch(
        r"device 'frob' cannot be used \(.+\); leave it out for the CPU", refuse("x", "--device", "frob")
    )


def test_options_that_do_not_exist(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert re.fullmatch(
        r"No such option:? '?--nope'?.* \(see logitlab --help\)", refused(capsys, "read", "x", "--nope")
    )
    assert re.fullmatch(r"No such command 'frob'\. \(see logitlab --help\)", refused(capsys, "frob"))
    assert re.fullmatch(
        r"Invalid value for '--top-k' / '-k': .*integer.* \(see logitlab --help\)",
        refused(capsys, "read", "x", "-k", "many"),
    )
    assert re.fullmatch(r"Missing argument '(?i:path)'\.? \(see logitlab --help\)", refused(capsys, "show"))
    for option in ("--rows", "--width"):
        message = refused(capsys, "read", "x", option, "0")
        assert re.fullmatch(rf"Invalid value for '{option}': .+ \(see logitlab --help\)", message)


def test_a_model_whose_tail_does_not_verify(refuse: Refused, checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from transformers import LlamaForCausalLM, LlamaConfig\n"
        "class OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
        "class OddForCausalLM(LlamaForCausalLM):\n"
        "    config_class = OddConfig\n"
        "    calls = 0\n"
        "    def forward(self, input_ids=None, attention_mask=None, **more):\n"
        "        OddForCausalLM.calls += 1\n"
        "        out = super().forward(input_ids=input_ids, attention_mask=attention_mask)\n"
        "        out.logits = out.logits + OddForCausalLM.calls\n"
        "        return out\n"
    )
    folder = tmp_path / "odd"
    shutil.copytree(checkpoint, folder)
    (folder / "modeling_odd.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "odd",
        "architectures": ["OddForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert refuse("x", model=folder) == (
        f"{folder} needs Python code that comes with it (auto_map in config.json); "
        "if you trust it, pass trust_remote_code=True (--trust-remote-code)"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    out = tmp_path / "out.parquet"
    done = spawn("read", "x", "-m", folder, "--trust-remote-code", "--save", out, **environment)
    message = one_line(done.returncode, done.stdout.decode(), done.stderr.decode(), code=1)
    assert re.fullmatch(
        r"the short-circuited tail of model\.layers does not give the model's own logits: they differ by \S+ "
        r"where rounding explains \S+; this model cannot be read",
        message,
    )
    assert not out.exists()


# -- outputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--save", "--html", "--figure"])
def test_outputs_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
) -> None:
    def told(path: Path) -> str:
        before = files(tmp_path)
        message = refused(capsys, "read", "x", "-m", checkpoint, option, path)
        assert files(tmp_path) == before
        return message

    missing = tmp_path / "missing" / "out.svg"
    assert told(missing) == f"cannot write {missing}: the folder {missing.parent} does not exist; make it first"
    folder = tmp_path / "folder.svg"
    folder.mkdir()
    assert told(folder) == f"cannot write {folder}: it is a folder; give a file name"
    pipe = tmp_path / "pipe.svg"
    os.mkfifo(pipe)
    assert told(pipe) == f"cannot write {pipe}: it is a device or a pipe; give a file name"
    out = tmp_path / "out.svg"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert told(out) == f"cannot write {out}: no permission to write in {tmp_path}; give another folder"


def test_outputs_are_checked_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitlab.models.load.load", lambda *a, **k: pytest.fail("the model was loaded"))
    assert "is a folder" in refused(capsys, "read", "x", "--save", tmp_path)
    gif = tmp_path / "x.gif"
    assert refused(capsys, "read", "x", "--figure", gif) == (
        f"cannot write {gif}: a figure's name ends in .png, .svg, .pdf"
    )
    monkeypatch.setattr("logitlab.cli.options.find_spec", lambda name: None)
    assert refused(capsys, "read", "x", "--figure", tmp_path / "x.png") == (
        "a figure needs matplotlib: pip install 'logitlab[figures]'"
    )


@pytest.mark.parametrize("option", ["--save", "--html", "--figure"])
def test_a_full_disk(
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    out = tmp_path / "out.svg"
    out.write_bytes(b"older")
    assert refused(capsys, "read", "x", "-m", checkpoint, option, out) == (
        f"cannot write {out}: No space left on device; what was there before is unchanged, give another place"
    )
    assert files(tmp_path) == ["out.svg"]
    assert out.read_bytes() == b"older"


# -- readings ----------------------------------------------------------------------------------

AGAIN = "give the file that Reading.save or read --save wrote, or save it again"


def test_files_that_hold_no_reading(capsys: pytest.CaptureFixture[str], llama: ll.Model, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def told(path: Path) -> str:
        message = refused(capsys, "show", path)
        with pytest.raises(ll.InputError) as caught:
            ll.Reading.load(path)
        assert str(caught.value) == message
        return message

    gone = tmp_path / "gone.parquet"
    assert told(gone) == f"cannot read {gone}: there is no such file; check the path"
    assert told(tmp_path) == f"cannot read {tmp_path}: it is a folder; give the file that Reading.save wrote"

    whole = ll.read(llama, "x y").save(tmp_path / "whole.parquet").read_bytes()
    file = tmp_path / "file.parquet"
    for data in (b"", b"some text", whole[:4], whole[:100], whole[: len(whole) // 2], whole[:-1], whole[1:]):
        file.write_bytes(data)
        pattern = rf"cannot read {re.escape(str(file))}: it is not a whole Parquet file \(.+\); {AGAIN}"
        assert re.fullmatch(pattern, told(file))

    pq.write_table(pa.table({"a": [1]}), file)
    assert told(file) == f"cannot read {file}: it is a Parquet file, but Reading.save did not write it; {AGAIN}"

    def rewritten(meta: str) -> None:
        table = pq.read_table(tmp_path / "whole.parquet")
        pq.write_table(table.replace_schema_metadata({b"logitlab.reading": meta.encode()}), file)

    meta = json.loads(pq.read_schema(tmp_path / "whole.parquet").metadata[b"logitlab.reading"])
    rewritten(json.dumps(meta | {"format": 99}))
    assert told(file) == (
        f"cannot read {file}: it has format 99, this logitlab reads format 1; "
        "read it with the logitlab that wrote it, or save it again"
    )
    broken = ["{", "[]", "{}", json.dumps(meta | {"prompts": []}), json.dumps(meta | {"sites": ["0.resid_post"]})]
    for text in broken:
        rewritten(text)
        pattern = rf"cannot read {re.escape(str(file))}: it does not hold a whole Reading \(.+\); {AGAIN}"
        assert re.fullmatch(pattern, told(file)), text


def test_outputs_of_show_are_checked_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refused(capsys, "show", tmp_path / "gone", "--html", tmp_path) == (
        f"cannot write {tmp_path}: it is a folder; give a file name"
    )
    assert refused(capsys, "show", tmp_path / "gone", "--figure", tmp_path / "x.bmp") == (
        f"cannot write {tmp_path / 'x.bmp'}: a figure's name ends in .png, .svg, .pdf"
    )
