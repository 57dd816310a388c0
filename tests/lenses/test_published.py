"""The two published formats: read, written, refused without the flag; and lenses found by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.errors import InputError
from logitlab.lenses.fitted import FittedLens, unembedding_digest
from logitlab.lenses.published import save_jacobian_lens, save_tuned_lens
from tests import zoo
from tests.lenses.test_fitted import changed


def tuned_folder(place: Path, model: ll.Model, seed: int = 0, **config: Any) -> dict[str, torch.Tensor]:
    """A folder as tuned-lens writes it."""
    generator = torch.Generator().manual_seed(seed)
    n, d = model.n_layers, model.width
    state = {f"{i}.weight": 0.1 * torch.randn(d, d, generator=generator) for i in range(n)}
    state |= {f"{i}.bias": 0.1 * torch.randn(d, generator=generator) for i in range(n)}
    place.mkdir()
    torch.save(state, place / "params.pt")
    about = {
        "base_model_name_or_path": "tiny",
        "d_model": d,
        "num_hidden_layers": n,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": unembedding_digest(model),
        "lens_type": "linear_tuned_lens",
    }
    (place / "config.json").write_text(json.dumps(about | config))
    return state


def test_a_tuned_lens_reads_as_its_formula_says(llama: ll.Model, tmp_path: Path) -> None:
    state = tuned_folder(tmp_path / "lens", llama)
    lens = ll.load_lens(tmp_path / "lens", allow_pickle=True)
    ids = torch.tensor([zoo.ids(6)])
    module: Any = llama.module
    with torch.no_grad():
        out = module(ids, output_hidden_states=True)
        logits = [
            module.lm_head(module.model.norm(h + h @ state[f"{i}.weight"].T + state[f"{i}.bias"]))[0].double()
            for i, h in enumerate(out.hidden_states[:-1])
        ]
    reading = ll.read(llama, zoo.ids(6), lens=lens, top_k=3)
    for i, z in enumerate(logits):
        truth = z.log_softmax(-1).topk(3).values
        np.testing.assert_allclose(reading.arrays["top_logprob"][0, i], truth, atol=1e-4)
    np.testing.assert_allclose(
        reading.arrays["top_logprob"][0, -1], out.logits[0].double().log_softmax(-1).topk(3).values, atol=1e-4
    )


def test_pickles_are_refused_without_the_flag(llama: ll.Model, tmp_path: Path) -> None:
    tuned_folder(tmp_path / "lens", llama)
    with pytest.raises(InputError, match=r"params\.pt is a pickle.*allow_pickle=True \(--allow-pickle\)"):
        ll.load_lens(tmp_path / "lens")
    torch.save({"J": {0: torch.eye(4)}}, tmp_path / "j.pt")
    with pytest.raises(InputError, match=r"j\.pt is a pickle"):
        ll.load_lens(tmp_path / "j.pt")


class Bomb:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('ran')",))


def test_a_pickle_that_would_run_code_is_not_read(llama: ll.Model, tmp_path: Path) -> None:
    tuned_folder(tmp_path / "lens", llama)
    torch.save({"0.weight": Bomb()}, tmp_path / "lens" / "params.pt")
    with pytest.raises(InputError, match="holds more than tensors and was therefore not read"):
        ll.load_lens(tmp_path / "lens", allow_pickle=True)


def test_a_tuned_lens_of_another_unembedding_is_refused(llama: ll.Model, tmp_path: Path) -> None:
    tuned_folder(tmp_path / "lens", llama, unembed_hash="0" * 64)
    lens = ll.load_lens(tmp_path / "lens", allow_pickle=True)
    with pytest.raises(InputError, match="whose unembedding is not that of"):
        ll.read(llama, zoo.ids(4), lens=lens)
    ll.read(llama, zoo.ids(4), lens=ll.load_lens(tmp_path / "lens", allow_pickle=True, any_weights=True))


@pytest.mark.parametrize("kind", ["bias", "diagonal", "low-rank", "affine"])
def test_a_fitted_lens_is_written_as_a_tuned_one(llama: ll.Model, tmp_path: Path, kind: str) -> None:
    lens = changed(llama, kind, **({"rank": 3} if kind == "low-rank" else {}))
    save_tuned_lens(lens, tmp_path / "out", model=llama)
    back = ll.load_lens(tmp_path / "out", allow_pickle=True)
    one, other = (ll.read(llama, zoo.ids(6), lens=some) for some in (lens, back))
    np.testing.assert_allclose(other.arrays["top_logprob"], one.arrays["top_logprob"], atol=1e-5)
    state = torch.load(tmp_path / "out" / "params.pt", weights_only=True)
    assert list(state) == [f"{i}.{part}" for part in ("weight", "bias") for i in range(llama.n_layers)]


@pytest.mark.parametrize("form", ["artefact", "checkpoint"])
def test_a_jacobian_lens_reads_as_its_formula_says(llama: ll.Model, tmp_path: Path, form: str) -> None:
    d, n = llama.width, 7
    generator = torch.Generator().manual_seed(0)
    matrices = {layer: torch.randn(d, d, generator=generator) for layer in range(llama.n_layers - 1)}
    if form == "artefact":
        found: dict[str, Any] = {"J": matrices, "n_prompts": n, "source_layers": list(matrices), "d_model": d}
        found["metadata"] = {"target_layer": llama.n_layers - 1, "model_name": "tiny"}
    else:
        sums = {layer: m * n for layer, m in matrices.items()}
        found = {"jacobian_sum": sums, "n_done": n, "next_idx": n, "source_layers": list(matrices)}
        found |= {"target_layer": llama.n_layers - 1, "skip_first": 16}
    torch.save(found, tmp_path / "lens.pt")
    lens = ll.load_lens(tmp_path / "lens.pt", allow_pickle=True)
    assert lens.recipe["prompts"] == n
    assert lens.model["layers"] == llama.n_layers
    h = torch.randn(5, d)
    for layer, matrix in matrices.items():
        torch.testing.assert_close(lens.transport(h, ll.Site(layer, "resid_post")), h @ matrix.T, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match=r"has no map for 0\.resid_pre"):
        ll.read(llama, zoo.ids(4), lens=lens)
    ll.read(llama, zoo.ids(4), lens=lens, sites="resid_post")
    save_jacobian_lens(lens, tmp_path / "back.pt", dtype=torch.float32)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert (back["n_prompts"], back["d_model"], back["source_layers"]) == (n, d, list(matrices))
    for layer, matrix in matrices.items():
        torch.testing.assert_close(back["J"][layer], matrix)


def test_a_jacobian_lens_for_another_depth_is_refused(llama: ll.Model, tmp_path: Path) -> None:
    torch.save({"J": {9: torch.eye(llama.width)}, "d_model": llama.width}, tmp_path / "deep.pt")
    with pytest.raises(InputError, match=r"has a map for 9\.resid_post, and tiny-llama has 3 layers"):
        ll.read(llama, zoo.ids(4), lens=ll.load_lens(tmp_path / "deep.pt", allow_pickle=True))
    found = {"J": {0: torch.eye(llama.width)}, "metadata": {"target_layer": 1}}
    torch.save(found, tmp_path / "early.pt")
    with pytest.raises(InputError, match="is for a model without a name"):
        ll.read(llama, zoo.ids(4), lens=ll.load_lens(tmp_path / "early.pt", allow_pickle=True))


def test_a_map_of_the_last_output_is_refused(llama: ll.Model, tmp_path: Path) -> None:
    torch.save({"J": {i: 2 * torch.eye(llama.width) for i in range(3)}}, tmp_path / "all.pt")
    with pytest.raises(InputError, match=r"has a map for 2\.resid_post, which the model itself decodes"):
        ll.read(llama, zoo.ids(4), lens=ll.load_lens(tmp_path / "all.pt", allow_pickle=True))


def test_an_exported_jacobian_lens_knows_its_model(llama: ll.Model, tmp_path: Path) -> None:
    lens = changed(llama, "jacobian")
    lens.recipe["skip_first"] = 7
    save_jacobian_lens(lens, tmp_path / "j.pt")
    back = ll.load_lens(tmp_path / "j.pt", allow_pickle=True)
    assert back.recipe["skip_first"] == 7
    ll.read(llama, zoo.ids(4), sites="resid_post", lens=back)
    other = ll.wrap(zoo.build("llama", seed=5), name="other")
    with pytest.raises(InputError, match="these are other weights"):
        ll.read(other, zoo.ids(4), sites="resid_post", lens=back)
    with torch.no_grad():
        lens.maps.weight[1] *= 1e6  # type: ignore[operator]
    with pytest.raises(InputError, match=r"too large for torch\.float16"):
        save_jacobian_lens(lens, tmp_path / "k.pt")


def test_what_is_damaged_is_said(llama: ll.Model, tmp_path: Path) -> None:
    def said(match: str, place: Path, **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            ll.load_lens(place, allow_pickle=True, **options)

    tuned_folder(tmp_path / "a", llama, num_hidden_layers=9)
    said("is damaged", tmp_path / "a")
    tuned_folder(tmp_path / "b", llama, lens_type="cubic")
    said("of type 'cubic'", tmp_path / "b")
    tuned_folder(tmp_path / "c", llama)
    (tmp_path / "c" / "params.pt").write_bytes(b"nothing")
    said("corrupt|cannot be read", tmp_path / "c")
    state = tuned_folder(tmp_path / "d", llama)
    state["0.bias"][0] = torch.nan
    torch.save(state, tmp_path / "d" / "params.pt")
    said("NaN or infinite", tmp_path / "d")
    tuned_folder(tmp_path / "e", llama, num_hidden_layers=2)
    said("params.pt has 2.weight, and config.json says 2 layers", tmp_path / "e")
    state = tuned_folder(tmp_path / "f", llama)
    state["1.weight"] = torch.ones(1, llama.width)
    torch.save(state, tmp_path / "f" / "params.pt")
    said(r"1\.weight is \[1, 32\], not \[32, 32\]", tmp_path / "f")
    (tmp_path / "bytes.pt").write_bytes(b"\x80\x02.")
    said("cannot be read|corrupt", tmp_path / "bytes.pt")
    for name, found, match in (
        ("width.pt", {"J": {0: torch.eye(3)}, "d_model": 99}, r"is \[3, 3\], not \[99, 99\]"),
        ("negative.pt", {"J": {-1: torch.eye(3)}}, "it has a layer -1"),
        ("words.pt", {"J": {0: torch.eye(3)}, "metadata": "abc"}, "is damaged"),
        ("no.pt", {"K": 1}, "neither 'J'"),
        ("sum.pt", {"jacobian_sum": {0: torch.eye(3)}, "n_done": 0}, "no prompt in it"),
        ("shape.pt", {"J": {0: torch.eye(3), 1: torch.eye(4)}}, "the matrix of layer 1"),
        ("empty.pt", {"J": {}}, "is damaged"),
        ("list.pt", [1], "holds a list"),
    ):
        torch.save(found, tmp_path / name)
        said(match, tmp_path / name)
    (tmp_path / "x.bin").write_bytes(b"")
    said("is no lens", tmp_path / "x.bin")
    said("no lens in", tmp_path)


def test_a_lens_is_found_on_the_hub(llama: ll.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository as the hub's cache keeps it; nothing is fetched."""
    asked: list[Any] = []

    def snapshot(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((name, repo_type, allow_patterns))
        return str(tmp_path / "repo")

    (tmp_path / "repo" / "lens").mkdir(parents=True)
    tuned_folder(tmp_path / "repo" / "lens" / "tiny", llama)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    lens = ll.load_lens("spaces/someone/lenses/lens/tiny", allow_pickle=True)
    assert lens.kind == "affine"
    assert asked == [("someone/lenses", "space", ["lens/tiny", "lens/tiny/*"])]
    changed(llama).save(tmp_path / "repo2")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path / "repo2"))
    assert ll.load_lens("someone/lens").kind == "affine"
    with pytest.raises(InputError, match=r"no other\.pt in someone/lens on the hub"):
        ll.load_lens("someone/lens/other.pt")
    with pytest.raises(InputError, match="no such file or folder"):
        ll.load_lens("./nowhere/at/all")
    with pytest.raises(InputError, match="no such file or folder"):
        ll.load_lens("nowhere")


def test_a_jacobian_lens_is_not_written_as_another(llama: ll.Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use save_jacobian_lens"):
        save_tuned_lens(changed(llama, "jacobian"), tmp_path / "x")
    with pytest.raises(InputError, match="cannot be written as a Jacobian lens"):
        save_jacobian_lens(changed(llama, "affine"), tmp_path / "x.pt")
    from logitlab.lenses import identity

    with pytest.raises(InputError, match="a map for every state of the residual stream"):
        save_tuned_lens(identity(llama, "affine", "0.resid_post"), tmp_path / "x")
    one = FittedLens(identity(llama, "jacobian", "mlp_out").maps, llama.select_sites("mlp_out"), {"name": "x"})
    with pytest.raises(InputError, match=r"this lens has 0\.mlp_out"):
        save_jacobian_lens(one, tmp_path / "x.pt")
