"""Models whose weights lie partly on disk give the values of the same model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.models import load as loading
from logitlab.models.weights import dense, stored
from tests import zoo

pytest.importorskip("accelerate", reason="device_map needs accelerate")

TEXT = "The capital of France is"
AROUND = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
BLOCKS = AROUND | {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "cpu"}
HEAD = AROUND | {"model.layers": "cpu", "lm_head": "disk"}
ALL = {"": "disk"}


def same(reading: ll.Reading, other: ll.Reading) -> None:
    assert reading.sites == other.sites
    assert reading.arrays.keys() == other.arrays.keys()
    for name, values in reading.arrays.items():
        np.testing.assert_array_equal(values, other.arrays[name], err_msg=name)


def on_disk(model: ll.Model) -> set[str]:
    return {name for name, p in model.module.named_parameters() if p.device.type == "meta"}


@pytest.mark.parametrize("device_map", [BLOCKS, HEAD, ALL], ids=["blocks", "head", "all"])
@pytest.mark.parametrize("tied", [False, True])
def test_values_are_those_of_the_model_in_memory(tmp_path: Path, device_map: dict[str, str], tied: bool) -> None:
    folder = zoo.save(tmp_path / "model", tie_word_embeddings=tied)
    whole = ll.load(folder)
    if tied and device_map is HEAD:
        device_map = device_map | {"model.embed_tokens": "disk"}
    parted = ll.load(folder, device_map=device_map, offload_folder=tmp_path / "off")
    before = on_disk(parted)
    assert ("lm_head.weight" in before) is (device_map is not BLOCKS)
    assert ("model.layers.1.mlp.up_proj.weight" in before) is (device_map in (BLOCKS, ALL))
    assert parted.verification.tail.error == 0.0
    assert parted.verification.fast_form.holds
    assert parted.verification.head == whole.verification.head
    assert parted.fingerprint == whole.fingerprint
    same(ll.read(parted, TEXT, target=5), ll.read(whole, TEXT, target=5))
    sites = ["attn_out", "mlp_out"]
    assert set(parted.verification.offered) >= set(sites)
    same(ll.read(parted, TEXT, sites=sites), ll.read(whole, TEXT, sites=sites))
    assert on_disk(parted) == before  # what was fetched for a pass has gone again


def test_bfloat16_and_several_prompts(checkpoint: Path, tmp_path: Path) -> None:
    texts = [TEXT, "Once upon a time", "The"]
    whole = ll.load(checkpoint, dtype="bfloat16")
    parted = ll.load(checkpoint, dtype="bfloat16", device_map=ALL, offload_folder=tmp_path)
    assert parted.dtype == torch.bfloat16
    same(ll.read(parted, texts), ll.read(whole, texts))


def test_other_tails(tmp_path: Path) -> None:
    """A soft-cap, and maps that keep their weights as [in, out]."""
    folder = zoo.save(tmp_path / "gemma", "gemma2")
    parted = ll.load(folder, device_map=ALL, offload_folder=tmp_path / "off")
    assert parted.verification.head == "linear 32 -> 300, soft-cap 2"
    same(ll.read(parted, TEXT), ll.read(ll.load(folder), TEXT))
    folder = zoo.save(tmp_path / "gpt2", "gpt2")
    parted = ll.load(folder, device_map=ALL, offload_folder=tmp_path / "off2")
    same(ll.read(parted, TEXT), ll.read(ll.load(folder), TEXT))


def test_a_model_that_its_owner_has_off_loaded(tmp_path: Path) -> None:
    """With weights in accelerate's own files instead of safetensors."""
    from accelerate import disk_offload

    module: Any = zoo.build("llama")
    whole = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="same")
    disk_offload(module, tmp_path)
    parted = ll.wrap(module, zoo.tokenizer(), name="same")
    assert parted.verification.fast_form.holds
    assert parted.fingerprint == whole.fingerprint
    same(ll.read(parted, TEXT), ll.read(whole, TEXT))


def test_a_head_that_cannot_be_had_is_decoded_by_the_model(checkpoint: Path, tmp_path: Path) -> None:
    whole = ll.load(checkpoint)
    module: Any = ll.load(checkpoint, device_map=HEAD, offload_folder=tmp_path).module
    hook = module.lm_head._hf_hook

    class Secret:
        """A store that gives its weights to nobody but the hook's own pass."""

        def __init__(self, store: Any) -> None:
            self.store, self.open = store, False

        def __getitem__(self, name: str) -> torch.Tensor:
            if not self.open:
                raise KeyError(name)
            return self.store[name]

    secret = hook.weights_map = Secret(hook.weights_map)
    before, after = hook.pre_forward, hook.post_forward

    def opening(*args: Any, **kwargs: Any) -> Any:
        secret.open = True
        return before(*args, **kwargs)

    def closing(*args: Any, **kwargs: Any) -> Any:
        secret.open = False
        return after(*args, **kwargs)

    hook.pre_forward, hook.post_forward = opening, closing
    model = ll.wrap(module, zoo.tokenizer())
    assert not model.verification.fast_form.holds
    assert "cannot be had as plain numbers" in model.verification.fast_form.note
    got, wanted = (ll.read(m, TEXT, target=5).arrays for m in (model, whole))
    np.testing.assert_array_equal(got["top_id"], wanted["top_id"])
    np.testing.assert_allclose(got["target_logprob"], wanted["target_logprob"], atol=1e-5)


def test_weights_are_had_or_not() -> None:
    layer = torch.nn.Linear(3, 2, bias=False, device="meta")
    assert dense(layer) is None
    assert stored(layer, "weight") == []
    assert dense(layer, "bias") is None
    assert dense(layer, "nothing") is None
    layer = torch.nn.Linear(3, 2)
    found = dense(layer)
    assert found is not None
    assert found.data_ptr() == layer.weight.data_ptr()
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": BLOCKS}, "device_map puts weights on disk: give the folder for them as offload_folder"),
        ({"offload_folder": "x"}, "offload_folder is for weights that a device_map sends to disk"),
        ({"device_map": "auto", "device": "cpu"}, "device and device_map exclude each other"),
        ({"device_map": "nowhere"}, "found nowhere"),
        ({"device_map": BLOCKS, "offload_folder": "x", "quantize": "int8"}, "exclude each other"),
    ],
)
def test_what_does_not_go_together(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.LogitlabError) as caught:
        ll.load(checkpoint, **options)
    assert message in str(caught.value)


def test_without_accelerate(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ll.InputError, match="device_map needs accelerate: pip install accelerate"):
        ll.load(checkpoint, device_map="auto")


def test_the_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from logitlab import cli

    parts = ["--device-map", '{"model": "cpu", "lm_head": "disk"}', "--offload-folder", str(tmp_path)]
    assert cli.main(["verify", str(checkpoint), *parts]) == 0
    parted = capsys.readouterr().out
    assert cli.main(["verify", str(checkpoint)]) == 0
    assert parted == capsys.readouterr().out
    assert cli.main(["verify", str(checkpoint), "--device-map", '{"model"']) == 2
    assert "--device-map is not valid JSON" in capsys.readouterr().err
