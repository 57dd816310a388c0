"""Path patching against a computation by hand from the modules, against single interventions, and its end points."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab import interventions as iv
from logitlab.errors import InputError
from logitlab.models.sites import Site
from tests import zoo

RIGHT, WRONG = 13, 23  # whose logits move apart in both models


@cache
def wrapped(name: str) -> ll.Model:
    return ll.wrap(zoo.shared(name), zoo.tokenizer(), name=name)


@cache
def exact(name: str) -> ll.Model:
    """The same in float64."""
    return ll.wrap(copy.deepcopy(zoo.shared(name)).double(), zoo.tokenizer(), name=name)


def pair(n: int = 6) -> tuple[list[int], list[int]]:
    clean = zoo.ids(n, seed=1)
    return clean, [*clean[:2], 17, *clean[3:-1], 23]


# -- by hand -----------------------------------------------------------------------------------


class Hand:
    """One path at a time, from the modules of a model; states are [tokens, width] float64."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def embed(self, ids: list[int]) -> torch.Tensor:
        raise NotImplementedError

    def attention(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """What the output projection is given."""
        raise NotImplementedError

    def mlp(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """Activations of the neurons."""
        raise NotImplementedError

    def out(self, layer: int, kind: str) -> tuple[torch.Tensor, torch.Tensor | float, int]:
        """Matrix [inputs, width], bias, and inputs of one head or neuron."""
        raise NotImplementedError

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def write(self, layer: int, kind: str, given: torch.Tensor, index: int | None = None) -> torch.Tensor:
        matrix, bias, size = self.out(layer, kind)
        if index is None:
            return given @ matrix + bias
        own = slice(index * size, (index + 1) * size)
        return given[:, own] @ matrix[own]

    def states(self, ids: list[int]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        h = self.embed(ids)
        for n in range(3):
            found[f"{n}.resid_pre"] = h
            found[f"{n}.z"] = self.attention(n, h)
            found[f"{n}.attn_out"] = self.write(n, "head_out", found[f"{n}.z"])
            found[f"{n}.acts"] = self.mlp(n, h + found[f"{n}.attn_out"])
            found[f"{n}.mlp_out"] = self.write(n, "neuron", found[f"{n}.acts"])
            h = h + found[f"{n}.attn_out"] + found[f"{n}.mlp_out"]
            found[f"{n}.resid_post"] = h
        return found

    def value(self, states: dict[str, torch.Tensor], site: Site) -> torch.Tensor:
        if site.index is None:
            return states[str(site)]
        given = states[f"{site.layer}.{'z' if site.kind == 'head_out' else 'acts'}"]
        return self.write(site.layer, site.kind, given, site.index)

    def answer(self, h: torch.Tensor, layer: int) -> float:
        """From the stream before a block on, all of it following."""
        for n in range(layer, 3):
            h = h + self.write(n, "head_out", self.attention(n, h))
            h = h + self.write(n, "neuron", self.mlp(n, h))
        z = self.logits(h[-1:])[0]
        return float(z[RIGHT] - z[WRONG])

    def edge(self, base: list[int], other: list[int], sender: Site, receiver: Site, positions: list[int]) -> float:
        mine, theirs = self.states(base), self.states(other)
        delta = torch.zeros_like(mine["0.resid_pre"])
        delta[positions] = (self.value(theirs, sender) - self.value(mine, sender))[positions]
        n, kind = receiver.layer, receiver.kind
        stream, attention, mlp = (mine[f"{n}.{k}"] for k in ("resid_pre", "attn_out", "mlp_out"))
        if kind == "resid_pre":
            return self.answer(stream + delta, n)
        if kind == "resid_post":
            return self.answer(mine[f"{n}.resid_post"] + delta, n + 1)
        if kind in ("attn_out", "head_out"):
            z = self.attention(n, stream + delta)
            if kind == "attn_out":
                attention = self.write(n, "head_out", z)
            else:
                attention = attention + self.write(n, kind, z - mine[f"{n}.z"], receiver.index)
            middle = stream + attention
            return self.answer(middle + self.write(n, "neuron", self.mlp(n, middle)), n + 1)
        acts = self.mlp(n, stream + attention + delta)
        if kind == "mlp_out":
            mlp = self.write(n, "neuron", acts)
        else:
            mlp = mlp + self.write(n, kind, acts - mine[f"{n}.acts"], receiver.index)
        return self.answer(stream + attention + mlp, n + 1)


def causal(length: int) -> torch.Tensor:
    return torch.full((1, 1, length, length), float("-inf"), dtype=torch.float64).triu(1)


def given_to(module: Any, run: Any) -> torch.Tensor:
    """What a module is given while something runs."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].detach().clone()))
    with torch.no_grad():
        run()
    handle.remove()
    return seen[0]


class Llama(Hand):
    def embed(self, ids: list[int]) -> torch.Tensor:
        return self.module.model.embed_tokens.weight.detach()[ids]

    def attention(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        block = self.module.model.layers[layer]
        where = self.module.model.rotary_emb(h[None], torch.arange(len(h))[None])
        normed = block.input_layernorm(h[None])
        mask = causal(len(h))
        call = lambda: block.self_attn(normed, position_embeddings=where, attention_mask=mask)  # noqa: E731
        return given_to(block.self_attn.o_proj, call)

    def mlp(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        block = self.module.model.layers[layer]
        normed = block.post_attention_layernorm(h)
        return (block.mlp.act_fn(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed)).detach()

    def out(self, layer: int, kind: str) -> tuple[torch.Tensor, torch.Tensor | float, int]:
        block = self.module.model.layers[layer]
        if kind == "head_out":
            return block.self_attn.o_proj.weight.detach().T, 0.0, 8
        return block.mlp.down_proj.weight.detach().T, 0.0, 1

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        return self.module.lm_head(self.module.model.norm(h)).detach()


class GPT2(Hand):
    def embed(self, ids: list[int]) -> torch.Tensor:
        wte, wpe = self.module.transformer.wte.weight.detach(), self.module.transformer.wpe.weight.detach()
        return wte[ids] + wpe[: len(ids)]

    def attention(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        block = self.module.transformer.h[layer]
        normed, mask = block.ln_1(h[None]), causal(len(h))
        return given_to(block.attn.c_proj, lambda: block.attn(normed, attention_mask=mask))

    def mlp(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        block = self.module.transformer.h[layer]
        return block.mlp.act(block.mlp.c_fc(block.ln_2(h))).detach()

    def out(self, layer: int, kind: str) -> tuple[torch.Tensor, torch.Tensor | float, int]:
        block = self.module.transformer.h[layer]
        part, size = (block.attn.c_proj, 8) if kind == "head_out" else (block.mlp.c_proj, 1)
        return part.weight.detach(), part.bias.detach(), size

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        return self.module.lm_head(self.module.transformer.ln_f(h)).detach()


HANDS: dict[str, type[Hand]] = {"llama": Llama, "gpt2": GPT2}
SENDERS = ["0.resid_pre", "0.head_out.1", "0.mlp_out", "1.attn_out", "1.head_out.3", "1.neuron.5", "1.resid_post"]
RECEIVERS = ["1.resid_pre", "1.attn_out", "1.head_out.2", "1.mlp_out", "1.neuron.7", "2.head_out.0", "2.mlp_out"]
PARALLEL = ("gpt_neox", "falcon", "phi", "cohere")
MISSING = [  # of SENDERS and RECEIVERS
    *itertools.product(["1.attn_out", "1.head_out.3", "1.neuron.5", "1.resid_post"], RECEIVERS[:3]),
    *itertools.product(["1.neuron.5", "1.resid_post"], RECEIVERS[3:5]),
]


def site(text: str) -> Site:
    layer, kind, *index = text.split(".")
    return Site(int(layer), kind, int(index[0]) if index else None)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("mode", "positions"), [("denoising", None), ("noising", [2, -1])])
def test_every_edge_is_what_the_modules_give_by_hand(name: str, mode: str, positions: list[int] | None) -> None:
    model = exact(name)
    clean, corrupted = pair()
    receivers = [*RECEIVERS, "2.resid_post"]
    found = iv.patch_paths(
        model,
        clean,
        corrupted,
        (RIGHT, WRONG),
        senders=SENDERS,
        receivers=receivers,
        positions=positions,
        mode=mode,
        batch=4,
    )
    hand = HANDS[name](model.module)
    assert found.clean[0] == pytest.approx(hand.answer(hand.embed(clean), 0), abs=1e-6)
    assert found.corrupted[0] == pytest.approx(hand.answer(hand.embed(corrupted), 0), abs=1e-6)
    base, other = (corrupted, clean) if mode == "denoising" else (clean, corrupted)
    where = list(range(6)) if positions is None else [2, 5]
    moved = 0
    unchanged = found.corrupted[0] if mode == "denoising" else found.clean[0]
    for i, sender in enumerate(found.senders):
        for j, receiver in enumerate(found.receivers):
            value = found.patched[0, i, j]
            if (sender, receiver) in MISSING:
                assert np.isnan(value), (sender, receiver)
                continue
            expected = hand.edge(base, other, site(sender), site(receiver), where)
            # heads and neurons are float32 throughout the library
            assert value == pytest.approx(expected, abs=1e-5), (sender, receiver)
            moved += abs(value - unchanged) > 1e-3
    assert set(found.senders) == set(SENDERS)
    assert set(found.receivers) == set(receivers)
    assert moved > 20  # the edges do something
    assert zoo.hooks(model.module) == 0


def test_in_float32_too() -> None:
    clean, corrupted = pair()
    options: dict[str, Any] = {"senders": SENDERS, "receivers": [*RECEIVERS, "resid_post"]}
    one = iv.patch_paths(wrapped("llama"), clean, corrupted, (RIGHT, WRONG), **options)
    other = iv.patch_paths(exact("llama"), clean, corrupted, (RIGHT, WRONG), **options)
    np.testing.assert_allclose(one.patched, other.patched, atol=1e-4)


# -- single interventions ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["granite", "gemma2", "cohere", "opt", "olmo2", "t5"])
def test_an_edge_is_two_interventions(name: str) -> None:
    """For other structures: scaled sums, norms after the parts, parts side by side, attention to an encoder."""
    model = wrapped(name)
    clean, corrupted = pair()
    encoder = zoo.ids(4, seed=8) if model.encoder_decoder else None

    def given(ids: list[int]) -> Any:
        return ids if encoder is None else {"input_ids": torch.tensor([encoder]), "decoder_input_ids": [ids]}

    good, bad = given(clean), given(corrupted)
    part = model.parts[1]
    kinds = [f"1.{kind}" for kind in part.components]  # in the order in which they are computed
    whole = {kind: kind for kind in kinds}
    whole |= {"1.head_out.1": "1.attn_out"} if part.heads else {}
    whole |= {"1.neuron.3": "1.mlp_out"} if part.neurons else {}
    senders = ["0.resid_pre", "0.attn_out", "0.mlp_out", *whole]
    found = iv.patch_paths(model, good, bad, (RIGHT, WRONG), senders=senders, receivers=list(whole), batch=4)
    theirs, mine = ll.capture(model, good, senders), ll.capture(model, bad, senders)
    everywhere: Any = {"positions": slice(None)}
    for sender, receiver in itertools.product(senders, whole):
        value = found.patched[0, found.senders.index(sender), found.receivers.index(receiver)]
        before = kinds[: kinds.index(whole[receiver])]
        inside = whole.get(sender)
        if inside is not None and (inside not in before or name in PARALLEL):
            assert np.isnan(value), (sender, receiver)
            continue
        delta = theirs[sender] - mine[sender]
        changes = [iv.add(inside or "1.resid_pre", delta, **everywhere)]
        changes += [iv.replace(r, mine[r], **everywhere) for r in before if r != inside]
        with iv.intervene(model, changes):
            state = ll.capture(model, bad, receiver)[receiver]
        with iv.intervene(model, iv.replace(receiver, state, **everywhere)):
            z = zoo.forward(model.module, corrupted, encoder)[-1].double()
        expected = float(z[RIGHT] - z[WRONG])
        assert value == pytest.approx(expected, abs=2e-5 * (1 + float(z.abs().max()))), (sender, receiver)
    assert zoo.hooks(model.module) == 0


def test_within_an_intervention() -> None:
    """The model is then the changed one: here, one whose first MLP writes half of what it does."""
    halved = zoo.build("llama")
    with torch.no_grad():
        halved.model.layers[0].mlp.down_proj.weight *= 0.5
    clean, corrupted = pair()
    options: dict[str, Any] = {"senders": SENDERS, "receivers": [*RECEIVERS, "2.resid_post"]}
    expected = iv.patch_paths(ll.wrap(halved, name="halved"), clean, corrupted, (RIGHT, WRONG), **options)
    model = wrapped("llama")
    with iv.intervene(model, iv.scale("0.mlp_out", 0.5)):
        found = iv.patch_paths(model, clean, corrupted, (RIGHT, WRONG), **options)
    np.testing.assert_allclose(found.patched, expected.patched, atol=2e-5)
    plain = iv.patch_paths(model, clean, corrupted, (RIGHT, WRONG), **options)
    assert np.nanmax(np.abs(found.patched - plain.patched)) > 0.01
    assert zoo.hooks(model.module) == 0


def test_sounds_are_not_shared_out() -> None:
    """A batch of copies would have each row hear another part."""
    from logitlab import zoo as library

    model = ll.wrap(library.build("speech-to-text", "whisper"), name="whisper")
    shape = model.template.inputs["input_features"].shape
    sound = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    clean, corrupted = ({"input_features": sound, "decoder_input_ids": torch.tensor([[1, 5, n, 7]])} for n in (6, 9))
    options: dict[str, Any] = {"senders": ["0.resid_pre", "0.attn_out"], "receivers": ["0.resid_pre", "mlp_out"]}
    one, many = (iv.patch_paths(model, clean, corrupted, (5, 9), **options, batch=batch) for batch in (1, 8))
    assert many.recovery[0, 0, 0] == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(one.patched, many.patched, atol=1e-6)
    assert not np.isnan(many.patched[0, :, 1:]).any()


# -- end points --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["denoising", "noising"])
def test_the_whole_stream_recovers_everything(mode: str) -> None:
    model = exact("llama")
    clean, corrupted = pair()
    found = iv.patch_paths(
        model, clean, corrupted, (RIGHT, WRONG), senders="resid", receivers="resid", mode=mode, batch=3
    )
    everything, nothing = (1.0, 0.0) if mode == "denoising" else (0.0, 1.0)
    assert found.senders == found.receivers == ("0.resid_pre", "0.resid_post", "1.resid_post", "2.resid_post")
    recovery = found.recovery[0]
    np.testing.assert_allclose(np.diag(recovery), everything, atol=1e-5)  # a state put into itself
    assert np.isnan(recovery[np.tril_indices(4, -1)]).all()
    assert not np.isnan(recovery[np.triu_indices(4)]).any()
    assert abs(recovery[0, 1] - everything) > 1e-3  # block 0 is left as it was
    first = iv.patch_paths(
        model, clean, corrupted, (RIGHT, WRONG), senders="0.resid_pre", receivers="0.attn_out", positions=0, mode=mode
    )
    assert first.recovery[0, 0, 0] == pytest.approx(nothing, abs=1e-5)  # position 0 is alike in both


def test_the_direct_effect_on_the_logits_is_decoded() -> None:
    model = exact("llama")
    clean, corrupted = pair()
    sites = ["0.resid_pre", "attn_out", "mlp_out", "2.resid_post"]
    theirs, mine = ll.capture(model, clean, sites), ll.capture(model, corrupted, sites)
    last = mine["2.resid_post"][-1]
    names = [str(s) for s in model.select_sites(sites)]
    found = iv.patch_paths(model, clean, corrupted, (RIGHT, WRONG), senders=sites, receivers="2.resid_post")
    assert list(found.senders) == names
    for i, name in enumerate(names):
        z = model.module.lm_head(model.module.model.norm(last + (theirs[name] - mine[name])[-1])).detach()
        assert found.patched[0, i, 0] == pytest.approx(float(z[RIGHT] - z[WRONG]), abs=1e-6), name
    # The parts add up to the whole.
    total = sum((theirs[n] - mine[n])[-1] for n in names[:-1])
    torch.testing.assert_close(total, (theirs["2.resid_post"] - mine["2.resid_post"])[-1], atol=1e-9, rtol=1e-9)


def test_parts_that_stand_side_by_side_have_no_edge() -> None:
    clean, corrupted = pair()
    for name in PARALLEL:
        model = wrapped(name)
        found = iv.patch_paths(
            model, clean, corrupted, (RIGHT, WRONG), senders=["attn_out"], receivers=["mlp_out"], batch=4
        )
        assert np.isnan(found.patched[0][np.tril_indices(3)]).all(), name
        assert not np.isnan(found.patched[0][np.triu_indices(3, 1)]).any(), name
        assert zoo.hooks(model.module) == 0
        with pytest.raises(InputError, match=r"nothing goes from 1.attn_out to 1.mlp_out directly"):
            iv.patch_paths(model, clean, corrupted, (RIGHT, WRONG), senders="1.attn_out", receivers="1.mlp_out")
    after = iv.patch_paths(wrapped("llama"), clean, corrupted, (5, 9), senders="attn_out", receivers="mlp_out")
    assert np.isnan(after.patched[0][np.tril_indices(3, -1)]).all()
    assert not np.isnan(after.patched[0][np.triu_indices(3)]).any()


# -- the rest ----------------------------------------------------------------------------------


def test_pairs_batches_and_metrics(tmp_path: Path) -> None:
    model = wrapped("gpt2")
    first, second = pair(5), pair(8)
    clean, corrupted = [first[0], second[0]], [first[1], second[1]]
    answers = [(5, 9), (6, 8)]
    options: dict[str, Any] = {"senders": ["1.head_out", "0.mlp_out"], "receivers": ["2.head_out", "resid_post"]}
    seen: list[tuple[int, int]] = []
    both = iv.patch_paths(
        model, clean, corrupted, answers, **options, positions=[2, -1], batch=7, progress=lambda *p: seen.append(p)
    )
    assert both.patched.shape == (2, 5, 7)
    edges = int((~np.isnan(both.patched)).sum())
    assert seen[-1] == (edges, edges)
    assert both.about["positions"] == [[2, 4], [2, 7]]
    for batch in (1, 64):
        again = iv.patch_paths(model, clean, corrupted, answers, **options, positions=[2, -1], batch=batch)
        np.testing.assert_allclose(again.patched, both.patched, atol=2e-5)
    alone = iv.patch_paths(model, second[0], second[1], (6, 8), **options, positions=[2, -1])
    np.testing.assert_allclose(alone.patched[0], both.patched[1], atol=2e-5)
    own = iv.patch_paths(model, *second, metric=lambda z: z[:, 6] - z[:, 8], **options, positions=[2, -1])
    np.testing.assert_allclose(own.patched, alone.patched, atol=2e-5)
    data = both.data()
    assert data.dims == ("pair", "sender", "receiver")
    expected = (alone.patched[0, 0, 3] - alone.corrupted[0]) / (alone.clean[0] - alone.corrupted[0])
    assert float(data.sel(pair=1, sender="0.mlp_out", receiver="2.head_out.0")) == pytest.approx(expected, abs=1e-3)
    assert both.figure(tmp_path / "a.png").stat().st_size > 5000
    assert both.figure(tmp_path / "b.png", pair=-1).stat().st_size > 5000
    with pytest.raises(InputError, match="pair 2 is not in this patching: it has 2"):
        both.figure(tmp_path / "c.png", pair=2)


def test_equal_prompts_have_no_recovery(tmp_path: Path) -> None:
    clean, _ = pair()
    found = iv.patch_paths(wrapped("llama"), clean, clean, 5, senders="0.mlp_out", receivers="2.mlp_out")
    assert found.clean[0] == found.corrupted[0]
    assert found.patched[0, 0, 0] == pytest.approx(found.clean[0], abs=1e-5)
    assert np.isnan(found.recovery).all()
    assert found.about["metric"] == "log-probability, nats"
    assert found.figure(tmp_path / "nothing.svg").is_file()


def test_half_precision() -> None:
    """Differences are taken and added in float32, so nothing is lost but what the model itself rounds."""
    model = ll.wrap(copy.deepcopy(zoo.shared("granite")).bfloat16(), zoo.tokenizer(), name="half")
    clean, corrupted = pair()
    options: dict[str, Any] = {"senders": ["0.resid_pre", "0.mlp_out"], "receivers": ["1.mlp_out", "2.resid_post"]}
    half = iv.patch_paths(model, clean, corrupted, (RIGHT, WRONG), **options)
    full = iv.patch_paths(wrapped("granite"), clean, corrupted, (RIGHT, WRONG), **options)
    size = float(np.nanmax(np.abs(full.patched)))
    np.testing.assert_allclose(half.patched, full.patched, atol=0.05 * (1 + size))


def test_bad_input() -> None:
    model = wrapped("llama")
    clean, corrupted = pair()
    usual: dict[str, Any] = {"senders": "0.mlp_out", "receivers": "2.mlp_out"}
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((clean, corrupted[:-1], (5, 9)), {}, "the clean prompt has 6 tokens and the corrupted one 5"),
        ((clean, [clean, clean], (5, 9)), {}, "1 clean prompts and 2 corrupted ones"),
        ((clean, iv.scale("0.resid_pre", 2.0), (5, 9)), {}, "path patching needs the corrupted prompts themselves"),
        ((clean, corrupted), {}, "give answers=, or a metric="),
        ((clean, corrupted, (5, 9)), {"metric": lambda z: z[:, 0]}, "and not both"),
        ((clean, corrupted, (5, 9)), {"mode": "both"}, "mode is 'both'"),
        ((clean, corrupted, (5, 9)), {"batch": 0}, "batch is 0"),
        ((clean, corrupted, (5, 9)), {"positions": 77}, "position 77 is out of range"),
        ((clean, corrupted, (5, 9)), {"senders": None}, "senders= is None"),
        ((clean, corrupted, (5, 9)), {"receivers": None}, "receivers= is None"),
        ((clean, corrupted, (5, 9)), {"receivers": "9.mlp_out"}, "layer 9 is out of range"),
        ((clean, corrupted, (5, 9)), {"senders": "0.head_out.4"}, "0.head_out.4 does not exist"),
        ((clean, corrupted, (5, 9)), {"receivers": "0.mlp_out"}, "nothing goes from 0.mlp_out to 0.mlp_out directly"),
        (
            (clean, corrupted, (5, 9)),
            {"senders": "2.head_out", "receivers": "1.head_out, 2.head_out"},
            r"no sender is below a receiver: nothing goes from 2.head_out.0 ... to 1.head_out.0 ... directly",
        ),
        ((clean, corrupted), {"metric": lambda z: z}, r"gives no tensor of shape \[1\]"),
    ]
    for arguments, options, match in cases:
        with pytest.raises(InputError, match=match):
            iv.patch_paths(model, *arguments, **(usual | options))
    assert zoo.hooks(model.module) == 0

    def fails(z: torch.Tensor) -> torch.Tensor:
        if len(z) > 1:
            raise RuntimeError("no")
        return z[:, 0]

    with pytest.raises(RuntimeError, match="no"):
        iv.patch_paths(model, clean, corrupted, metric=fails, senders="mlp_out", receivers="2.resid_post")
    assert zoo.hooks(model.module) == 0
    torch.testing.assert_close(zoo.forward(model.module, clean), zoo.forward(zoo.build("llama"), clean))


def test_streams_that_are_no_sums_are_refused() -> None:
    """With norms after the sum, what is added does not arrive as it was."""
    model = wrapped("bert")
    clean, corrupted = pair()
    with pytest.raises(InputError, match=r"0.resid_post has no direct path to 2.resid_post: .*layer 1 of bert"):
        iv.patch_paths(model, clean, corrupted, (5, 9), senders="0.resid_post", receivers="2.resid_post")
    with pytest.raises(InputError, match="site kind 'mlp_out' is not offered at layer 0 of bert"):
        iv.patch_paths(model, clean, corrupted, (5, 9), senders="0.mlp_out", receivers="2.resid_post")
    found = iv.patch_paths(model, clean, corrupted, (5, 9), senders="1.resid_post", receivers="1.resid_post")
    assert found.recovery[0, 0, 0] == pytest.approx(1.0, abs=1e-5)
