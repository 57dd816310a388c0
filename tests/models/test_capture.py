"""Captured values against plain hooks, in every way of running a model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import logitlab as ll
from logitlab.models.capture import capture
from tests import zoo


def plain_outputs(module: Any, tokens: list[int]) -> list[torch.Tensor]:
    """Block outputs [tokens, width] by hand-written hooks."""
    seen: list[torch.Tensor] = []
    layers = module.model.layers
    hooks = [
        layer.register_forward_hook(lambda m, a, o: seen.append((o if torch.is_tensor(o) else o[0])[0].detach()))
        for layer in layers
    ]
    with torch.no_grad():
        module(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return seen


def test_resid_equals_plain_hooks(llama: ll.Model) -> None:
    tokens = zoo.ids(9)
    truth = plain_outputs(llama.module, tokens)
    a = capture(llama, tokens)
    assert [str(s) for s in a.sites] == ["0.resid_pre", "0.resid_post", "1.resid_post", "2.resid_post"]
    for layer in range(3):
        assert torch.equal(a[f"{layer}.resid_post"], truth[layer])
    embedded = llama.module.model.embed_tokens(torch.tensor(tokens)).detach()
    assert torch.equal(a["0.resid_pre"], embedded)


def test_chosen_positions_only(llama: ll.Model) -> None:
    tokens = zoo.ids(9)
    whole = capture(llama, tokens, "1.resid_post")["1.resid_post"]
    for positions, rows in ((-1, [8]), ([0, -2, 3], [0, 7, 3]), (slice(2, 5), [2, 3, 4])):
        assert torch.equal(capture(llama, tokens, "1.resid_post", positions)["1.resid_post"], whole[rows])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mamba", "bert", "gpt_neox"])
def test_encoded_batches_with_padding_equal_singles(name: str, side: str) -> None:
    model = ll.wrap(zoo.shared(name))
    rows = [zoo.ids(4), zoo.ids(9, seed=6), zoo.ids(6, seed=7)]
    width = 9
    pads = [[0] * (width - len(r)) for r in rows]
    ones = [[1] * len(r) for r in rows]
    batch = {
        "input_ids": torch.tensor([p + r if side == "left" else r + p for p, r in zip(pads, rows, strict=True)]),
        "attention_mask": torch.tensor([p + o if side == "left" else o + p for p, o in zip(pads, ones, strict=True)]),
    }
    for batch_tokens in (None, 1000):
        together = capture(model, batch, "1.resid_post", batch_tokens=batch_tokens)
        for n, row in enumerate(rows):
            alone = capture(model, row, "1.resid_post")["1.resid_post"]
            part = together["1.resid_post"][together.rows_of(n)]
            torch.testing.assert_close(part, alone, atol=1e-5 * max(1.0, float(alone.abs().max())), rtol=0)


def test_batches_with_an_encoder_equal_singles() -> None:
    for name in ("t5", "bart"):
        model = ll.wrap(zoo.shared(name))
        prompts = [zoo.ids(4), zoo.ids(8, seed=9)]
        together = capture(model, prompts, "1.resid_post", decoder=zoo.ids(3), batch_tokens=100)
        for n, prompt in enumerate(prompts):
            alone = capture(model, prompt, "1.resid_post", decoder=zoo.ids(3))["1.resid_post"]
            part = together["1.resid_post"][together.rows_of(n)]
            torch.testing.assert_close(part, alone, atol=1e-5 * float(alone.abs().max()), rtol=0)


def test_the_forward_pass_stops_before_the_head(llama: ll.Model) -> None:
    calls: list[int] = []
    hook = llama.module.lm_head.register_forward_hook(lambda m, a, o: calls.append(1))
    try:
        capture(llama, zoo.ids())
    finally:
        hook.remove()
    assert calls == []


def test_an_exception_in_the_model_leaves_no_hook() -> None:
    module = zoo.build("llama")
    model = ll.wrap(module)

    def fail(m: Any, args: Any) -> None:
        raise RuntimeError("broken on purpose")

    hook = module.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        capture(model, zoo.ids(), "attn_out,mlp_out,head_out,resid_post")
    hook.remove()
    for m in module.modules():
        assert not m._forward_hooks
        assert not m._forward_pre_hooks
        assert "_call_impl" not in m.__dict__
    assert torch.equal(capture(model, zoo.ids())["2.resid_post"], plain_outputs(module, zoo.ids())[2])


def test_somebody_elses_hook_is_respected() -> None:
    """An edit by a hook of the user's is part of the model that is read."""
    module = zoo.build("llama")
    model = ll.wrap(module)
    plain = ll.read(model, zoo.ids()).arrays["top_logprob"]
    push = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def add(m: Any, args: Any, output: Any) -> Any:
        return output + push if torch.is_tensor(output) else (output[0] + push, *output[1:])

    hook = module.model.layers[1].register_forward_hook(add)
    edited = ll.read(model, zoo.ids())
    truth = torch.log_softmax(zoo.forward(module, zoo.ids()), -1).sort(-1, descending=True).values[:, :5]
    hook.remove()
    assert not (edited.arrays["top_logprob"][0, -1] == plain[0, -1]).all()
    torch.testing.assert_close(torch.from_numpy(edited.arrays["top_logprob"][0, -1]), truth, atol=1e-5, rtol=0)


def test_autocast_is_the_callers_choice(llama: ll.Model) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = capture(llama, zoo.ids(), "2.resid_post")["2.resid_post"]
        truth = plain_outputs(llama.module, zoo.ids())[2]
    assert torch.equal(inside, truth)
    assert not torch.equal(inside, capture(llama, zoo.ids(), "2.resid_post")["2.resid_post"])


def test_gradients_are_not_recorded(llama: ll.Model) -> None:
    assert not capture(llama, zoo.ids())["2.resid_post"].requires_grad


def test_shared_blocks_are_told_apart() -> None:
    model = ll.wrap(zoo.shared("albert"))
    a = capture(model, zoo.ids())
    states = [a[f"{layer}.resid_post"] for layer in range(3)]
    with torch.no_grad():
        truth = model.module(torch.tensor([zoo.ids()]), output_hidden_states=True).hidden_states
    for layer in range(3):
        torch.testing.assert_close(states[layer], truth[layer + 1][0])


def test_threads_share_a_model(llama: ll.Model) -> None:
    prompts = [zoo.ids(5, seed=s) for s in range(8)]
    alone = [capture(llama, p)["2.resid_post"] for p in prompts]
    found: dict[int, torch.Tensor] = {}

    def work(n: int) -> None:
        found[n] = capture(llama, prompts[n])["2.resid_post"]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(found[n], alone[n]) for n in range(8))


def test_offloaded_to_disk(tmp_path: Path, checkpoint: Path) -> None:
    """A device map that puts half the model on disk gives the same values."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        device_map={
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.layers.2": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "disk",
        },
        offload_folder=str(tmp_path),
    )
    model = ll.wrap(module)
    assert model.verification.fast_form.holds  # its head is read from the store
    plain = ll.read(ll.load(checkpoint), zoo.ids())
    spread = ll.read(model, zoo.ids())
    torch.testing.assert_close(
        torch.from_numpy(spread.arrays["top_logprob"]), torch.from_numpy(plain.arrays["top_logprob"]), atol=1e-5, rtol=0
    )


def test_stacked_mixes_kinds(llama: ll.Model) -> None:
    a = capture(llama, zoo.ids(), "1.resid_post,1.head_out,2.neuron.3")
    stacked = a.stacked(a.sites)
    assert stacked.shape == (6, 7, 32)
    for site, rows in zip(a.sites, stacked, strict=True):
        torch.testing.assert_close(rows, a[site], atol=1e-6, rtol=0)
    with pytest.raises(ll.InputError, match=r"site 0\.mlp_out was not captured"):
        a["0.mlp_out"]
