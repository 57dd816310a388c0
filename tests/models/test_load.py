"""Loading: which class and dtype are taken, and every way in which a checkpoint can be broken."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import logitlab as ll
from logitlab.models import load as loading
from tests import zoo

AGAIN = "download or copy it again"
YOURSELF = "check its files, or load it yourself and pass it to logitlab.wrap"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def told(folder: Path, **options: Any) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(ll.LogitlabError) as caught:
        ll.load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def configured(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def reweighted(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_folder_gives_the_saved_weights(checkpoint: Path) -> None:
    model = ll.load(checkpoint)
    assert (model.name, model.n_layers, model.width, model.vocab_size) == ("tiny-llama", 3, 32, 300)
    for name, value in zoo.shared("llama").state_dict().items():
        assert torch.equal(model.module.state_dict()[name], value), name
    assert model.tokenizer("The capital")["input_ids"] == zoo.tokenizer()("The capital")["input_ids"]


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    zoo.shared("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    model = ll.load(tmp_path)
    assert model.tokenizer is None
    assert torch.equal(model.module.lm_head.weight, zoo.shared("llama").lm_head.weight)
    (tmp_path / shards[1]).unlink()
    assert told(tmp_path) == (
        f"{tmp_path} lacks 1 of {len(shards)} weight files that model.safetensors.index.json names, {shards[1]} first; "
        + AGAIN
    )
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        pattern = rf"{re.escape(str(tmp_path / 'model.safetensors.index.json'))} is not an index of weight files: .+; "
        assert re.fullmatch(pattern + AGAIN, told(tmp_path)), text


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16), ("float64", torch.float64)],
)
def test_dtypes(checkpoint: Path, dtype: Any, expected: torch.dtype) -> None:
    assert ll.load(checkpoint, dtype=dtype).dtype == expected


@pytest.mark.parametrize("dtype", ["float99", "int8", "", "nn", "bool"])
def test_unknown_dtypes(checkpoint: Path, dtype: str) -> None:
    assert told(checkpoint, dtype=dtype) == f"unknown dtype {dtype!r}: use auto, float32, bfloat16 or float16"


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_the_class_carries_the_head(tmp_path: Path, family: str) -> None:
    zoo.shared(family).save_pretrained(tmp_path)
    assert type(ll.load(tmp_path).module) is type(zoo.shared(family))
    configured(tmp_path, architectures=None)  # the type alone decides then
    encoder = zoo.ids(5) if family == "t5" else None
    found = zoo.forward(ll.load(tmp_path).module, zoo.ids(), encoder)
    assert torch.equal(found, zoo.forward(zoo.shared(family), zoo.ids(), encoder))


def test_names_are_resolved(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading._resolve(checkpoint) == (checkpoint, "tiny-llama")
    assert loading._resolve("some-org/some.model-1") == ("some-org/some.model-1", "some-org/some.model-1")
    monkeypatch.chdir(checkpoint.parent)
    assert loading._resolve("tiny-llama") == (Path("tiny-llama"), "tiny-llama")
    monkeypatch.setattr(loading, "default_gguf", lambda: None)
    monkeypatch.setattr(loading, "converted_default", lambda: None)
    assert loading._resolve("default") == ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct")
    monkeypatch.setattr(loading, "converted_default", lambda: tmp_path)
    assert loading._resolve("default") == (tmp_path, "SmolLM2-135M-Instruct")


@pytest.mark.parametrize("content", [b"{nope", b"", b"\xff\x00"])
def test_a_configuration_that_is_not_json(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    pattern = rf"{re.escape(str(folder))}/config\.json is not valid JSON: .+; {AGAIN}"
    assert re.fullmatch(pattern, told(folder))


@pytest.mark.parametrize("content", ["[1, 2]", "null", "3", '"text"'])
def test_a_configuration_that_is_no_object(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert told(folder) == f"{folder}/config.json does not hold a configuration (a JSON object); {AGAIN}"


@pytest.mark.parametrize("kind", ["frobnitz", 5])
def test_unknown_model_types(folder: Path, kind: Any) -> None:
    import transformers

    assert told(configured(folder, model_type=kind)) == (
        f"{folder}/config.json names the model type {kind!r}, which transformers {transformers.__version__} does not "
        "know; update transformers, or load the model yourself and pass it to logitlab.wrap"
    )


def test_a_type_without_an_output(folder: Path) -> None:
    assert told(configured(folder, model_type="vitdet", architectures=["VitDetModel"])) == (
        "transformers has no model of type 'vitdet' that gives logits (a vocabulary, classes, boxes)"
    )


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"hidden_size": -1}, {"num_attention_heads": 0}])
def test_configurations_that_transformers_stumbles_over(folder: Path, changes: dict[str, Any]) -> None:
    pattern = rf"{re.escape(str(folder))} cannot be loaded: .+; {YOURSELF}"
    assert re.fullmatch(pattern, told(configured(folder, **changes)))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer(folder: Path, name: str) -> None:
    (folder / name).write_text("{nope")
    pattern = rf"{re.escape(str(folder))} cannot be loaded: .+; {YOURSELF}"
    assert re.fullmatch(pattern, told(folder))


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_weights(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if keep == 0.5 else int(keep)])
    assert re.fullmatch(rf"{re.escape(str(file))} is corrupt or truncated: .+; {AGAIN}", told(folder))


def test_weights_of_random_bytes(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(os.urandom(2000))
    assert re.fullmatch(rf"{re.escape(str(file))} is corrupt or truncated: .+; {AGAIN}", told(folder))


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change",
    [lambda w: w.pop(NAME), lambda w: w.update({NAME: torch.zeros(3, 3)})],
    ids=["missing", "of another shape"],
)
def test_weights_that_do_not_fit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    assert told(reweighted(folder, change)) == (
        f"{folder} does not hold all weights of LlamaForCausalLM: 1 are missing or of another shape, {NAME} first; "
        f"its readings would be noise; {AGAIN}"
    )


def test_more_layers_than_weights(folder: Path) -> None:
    assert told(configured(folder, num_hidden_layers=4)).startswith(
        f"{folder} does not hold all weights of LlamaForCausalLM: 9 are missing or of another shape, model.layers.3."
    )


class _Harmful:
    """Creates a file when it is unpickled by a loader that runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


PICKLED = (
    "cannot be loaded: its pickled weights are corrupt, or hold more than tensors and were therefore not read; "
    "get a safetensors copy"
)


def test_pickles_need_a_permission(folder: Path, checkpoint: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert told(folder) == f"{folder} has no weights: no .safetensors file in it; {AGAIN}"
    torch.save(weights, folder / "pytorch_model.bin")
    assert told(folder) == (
        f"{folder} has only pickled weights (pytorch_model.bin), which can run code when they are read; "
        "convert them to safetensors, or pass allow_pickle=True (--allow-pickle)"
    )
    assert ll.load(folder, allow_pickle=True).fingerprint == ll.load(checkpoint).fingerprint


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_harmful_pickles_are_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    file, marker = folder / "pytorch_model.bin", tmp_path / "ran"
    pickle.loads(pickle.dumps(_Harmful(tmp_path / "control")))
    assert (tmp_path / "control").exists()  # the pickle would do it
    torch.save({"weight": _Harmful(marker)}, file)
    assert told(folder, allow_pickle=True) == f"{folder} {PICKLED}"
    file.write_bytes(pickle.dumps({"weight": _Harmful(marker)}))
    assert told(folder, allow_pickle=True) == f"{folder} {PICKLED}"
    file.write_bytes(b"garbage")
    assert told(folder, allow_pickle=True) == f"{folder} {PICKLED}"
    assert not marker.exists()


def test_harmful_pickles_beside_safetensors_are_ignored(folder: Path, tmp_path: Path) -> None:
    torch.save({"weight": _Harmful(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert ll.load(folder).n_layers == 3
    assert not (tmp_path / "ran").exists()


def test_remote_code_needs_a_permission(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    configured(folder, model_type="mine", auto_map={"AutoConfig": "modeling.Config"})
    assert told(folder) == (
        f"{folder} needs Python code that comes with it (auto_map in config.json); "
        "if you trust it, pass trust_remote_code=True (--trust-remote-code)"
    )
    assert not (tmp_path / "ran").exists()


def test_devices(checkpoint: Path) -> None:
    assert ll.load(checkpoint, device="cpu").device.type == "cpu"
    assert re.fullmatch(
        r"device 'frob' cannot be used \(.+\); leave it out for the CPU", told(checkpoint, device="frob")
    )
    if not torch.cuda.is_available():
        pattern = r"device 'cuda' cannot be used \(.+\); leave it out for the CPU"
        assert re.fullmatch(pattern, told(checkpoint, device="cuda"))
