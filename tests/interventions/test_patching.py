"""Activation patching against single passes that are patched one place at a time, and its end points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab import interventions as iv
from logitlab.errors import InputError
from tests import zoo

NAMES = [name for name in zoo.FAMILIES if name != "bert"]


def wrapped(name: str) -> ll.Model:
    return ll.wrap(zoo.shared(name), zoo.tokenizer(), name=name)


def pair(model: ll.Model) -> tuple[Any, Any]:
    clean, corrupted = zoo.ids(6, seed=1), zoo.ids(6, seed=1)
    corrupted[2] = 17
    if not model.encoder_decoder:
        return clean, corrupted
    encoder = torch.tensor([zoo.ids(4, seed=8)])
    return tuple({"input_ids": encoder, "decoder_input_ids": torch.tensor([row])} for row in (clean, corrupted))  # type: ignore[return-value]


def logits(model: ll.Model, given: Any) -> torch.Tensor:
    if isinstance(given, dict):
        return zoo.forward(model.module, given["decoder_input_ids"][0].tolist(), given["input_ids"][0].tolist())
    return zoo.forward(model.module, given)


def difference(model: ll.Model, given: Any) -> float:
    z = logits(model, given)[-1].double()
    return float(z[5] - z[9])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["denoising", "noising"])
def test_each_place_is_what_replacing_it_alone_gives(name: str, mode: str) -> None:
    model = wrapped(name)
    clean, corrupted = pair(model)
    kinds = {c for part in model.parts for c in part.components}
    sites = [s for s in ("resid_pre", "attn_out", "mlp_out", "resid_post") if s.startswith("resid") or s in kinds]
    found = iv.patch(model, clean, corrupted, (5, 9), sites=sites, mode=mode, batch=7)
    assert found.clean[0] == pytest.approx(difference(model, clean), abs=1e-5)
    assert found.corrupted[0] == pytest.approx(difference(model, corrupted), abs=1e-5)
    source, base = (clean, corrupted) if mode == "denoising" else (corrupted, clean)
    kept = ll.capture(model, source, sites)
    for i, site in enumerate(found.sites):
        for position in (1, 2, 4, 5):
            with iv.intervene(model, iv.replace(site, kept[site][position], positions=position)):
                expected = difference(model, base)
            assert found.patched[0, i, position] == pytest.approx(expected, abs=1e-4), (site, position)


def test_patching_everything_recovers_all_and_nothing_nothing() -> None:
    for name in NAMES:
        model = wrapped(name)
        clean, corrupted = pair(model)
        found = iv.patch(model, clean, corrupted, (5, 9), sites=["0.resid_pre", "resid_post"])
        recovery = found.recovery[0]
        last = recovery[-1]  # after the last block only the last position counts
        assert last[-1] == pytest.approx(1.0, abs=1e-4), name
        np.testing.assert_allclose(last[:-1], 0.0, atol=1e-4, err_msg=name)
        assert recovery[0, 2] == pytest.approx(1.0, abs=1e-4), name  # the one token in which they differ
        np.testing.assert_allclose(recovery[0, [0, 1, 3, 4, 5]], 0.0, atol=1e-4, err_msg=name)


def test_heads_and_neurons() -> None:
    model = wrapped("llama")
    clean, corrupted = pair(model)
    sites = ["1.head_out.0", "1.head_out.3", "2.neuron.7"]
    found = iv.patch(model, clean, corrupted, (5, 9), sites=sites)
    kept = ll.capture(model, clean, sites)
    for i, site in enumerate(found.sites):
        with iv.intervene(model, iv.replace(site, kept[site][4], positions=4)):
            assert found.patched[0, i, 4] == pytest.approx(difference(model, corrupted), abs=2e-5)


def test_several_pairs_metrics_and_progress(tmp_path: Path) -> None:
    model = wrapped("gpt2")
    first, second = zoo.ids(5, seed=1), zoo.ids(7, seed=2)
    others = [[*first[:-1], 11], [*second[:-2], 12, 13]]
    seen: list[tuple[int, int]] = []
    both = iv.patch(model, [first, second], others, [(5, 9), (6, 8)], progress=lambda *p: seen.append(p))
    assert both.patched.shape == (2, 3, 7)
    assert np.isnan(both.patched[0, :, 5:]).all()
    assert not np.isnan(both.patched[1]).any()
    assert seen[-1] == (3 * 5 + 3 * 7, 3 * 5 + 3 * 7)
    alone = iv.patch(model, second, others[1], (6, 8))
    np.testing.assert_allclose(both.patched[1], alone.patched[0], atol=1e-6)
    logprob = iv.patch(model, first, others[0], 5, sites="1.resid_post", positions=-1)
    assert logprob.clean[0] == pytest.approx(float(logits(model, first)[-1].log_softmax(-1)[5]), abs=1e-5)
    assert logprob.about["metric"] == "log-probability, nats"
    own = iv.patch(model, first, others[0], metric=lambda z: z[:, 5] - z[:, 9])
    np.testing.assert_allclose(own.patched, iv.patch(model, first, others[0], (5, 9)).patched, atol=1e-5)
    assert both.data().dims == ("pair", "site", "position")
    assert alone.figure(tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(InputError, match="choose one with pair="):
        both.figure(tmp_path / "b.png")
    both.figure(tmp_path / "b.png", pair=1)


def test_causal_tracing() -> None:
    """The corrupted run is the clean one with noise on some embeddings; it is there in every pass."""
    model = wrapped("llama")
    ids = zoo.ids(6, seed=1)
    noise = 3 * torch.randn(2, model.width, generator=torch.Generator().manual_seed(0))
    corrupt = iv.add("0.resid_pre", noise, positions=[1, 2])
    found = iv.patch(model, ids, corrupt, (5, 9), sites=["0.resid_pre", "mlp_out", "resid_post"])
    with iv.intervene(model, corrupt):
        assert found.corrupted[0] == pytest.approx(difference(model, ids), abs=1e-5)
    kept = ll.capture(model, ids, "1.mlp_out")
    with iv.intervene(model, corrupt, iv.replace("1.mlp_out", kept["1.mlp_out"][3], positions=3)):
        expected = difference(model, ids)
    assert found.patched[0, found.sites.index("1.mlp_out"), 3] == pytest.approx(expected, abs=2e-5)
    assert zoo.hooks(model.module) == 0


def test_sounds_are_not_shared_out() -> None:
    """A batch of copies would have each row hear another part."""
    from logitlab import zoo as library

    model = ll.wrap(library.build("speech-to-text", "whisper"), name="whisper")
    shape = model.template.inputs["input_features"].shape
    sound = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    clean, corrupted = ({"input_features": sound, "decoder_input_ids": torch.tensor([[1, 5, n, 7]])} for n in (6, 9))
    one, many = (iv.patch(model, clean, corrupted, (5, 9), batch=batch) for batch in (1, 8))
    np.testing.assert_allclose(one.patched, many.patched, atol=1e-6)


def test_bad_input() -> None:
    model = wrapped("llama")
    ids = zoo.ids(5)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((ids, zoo.ids(4), (5, 9)), {}, "the clean prompt has 5 tokens and the corrupted one 4"),
        ((ids, [ids, ids], (5, 9)), {}, "1 clean prompts and 2 corrupted ones"),
        ((ids, ids), {}, "give answers=, or a metric="),
        ((ids, ids, (5, 9)), {"metric": lambda z: z[:, 0]}, "and not both"),
        ((ids, ids, (5, 5)), {}, "the right and the wrong token are the same"),
        ((ids, ids, (5, 6, 7)), {}, "answer 0 has 3 tokens"),
        ((ids, ids, [(5, 6), (7, 8)]), {}, "there are 2 answers for 1 pairs"),
        ((ids, ids, (5, 9)), {"mode": "both"}, "mode is 'both'"),
        ((ids, ids, (5, 9)), {"batch": 0}, "batch is 0"),
        ((ids, ids, (5, 9)), {"sites": "9.resid_post"}, "layer 9 is out of range"),
        ((ids, ids, (5, 9)), {"positions": 77}, "position 77 is out of range"),
        ((ids, ids), {"metric": lambda z: z}, r"gives no tensor of shape \[1\]"),
    ]
    for arguments, options, match in cases:
        with pytest.raises(InputError, match=match):
            iv.patch(model, *arguments, **options)
    vit = ll.wrap(__import__("logitlab.zoo", fromlist=["build"]).build("image-classification", "vit"), name="vit")
    given = {"pixel_values": torch.zeros(vit.template.inputs["pixel_values"].shape)}
    with pytest.raises(InputError, match="is not read token by token"):
        iv.patch(vit, given, given, (5, 9))
