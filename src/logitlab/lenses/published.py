"""Fitted lenses in the formats that others have published, read and written.

Two are in use. *tuned-lens* (Belrose et al. 2023) keeps a folder with ``config.json`` and ``params.pt``, a translator
``h + A h + b`` for every entry of ``hidden_states`` but the last. *Jacobian lenses* (Gurnee et al. 2026) are a file
``.pt`` with a matrix for the output of each block, or with sums over prompts while one is being fitted.
Both hold pickles, so they are read only if a caller asks for it, and then by PyTorch's weights-only loader.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from logitlab.errors import InputError
from logitlab.files import write_atomically, write_text
from logitlab.lenses.fitted import FittedLens, read_record, unembedding_digest
from logitlab.lenses.maps import Affine, Bias, Diagonal, Linear, LowRank, Maps
from logitlab.models.handle import Model
from logitlab.models.sites import Site

CONFIG, PARAMETERS = "config.json", "params.pt"


def is_tuned_lens(folder: Path) -> bool:
    """Whether a folder is one that tuned-lens writes."""
    return (folder / CONFIG).is_file() and (folder / PARAMETERS).is_file()


def load_tuned_lens(folder: Path, *, allow_pickle: bool = False) -> FittedLens:
    """A lens from a folder that tuned-lens has written.

    Args:
        folder: with ``config.json`` and ``params.pt``.
        allow_pickle: read ``params.pt``, which is a pickle, through the weights-only loader.

    Raises:
        InputError: pickles are not allowed, or the folder is damaged.
    """
    config = read_record(folder / CONFIG)
    kind = config.get("lens_type", "linear_tuned_lens")
    if kind != "linear_tuned_lens":
        raise InputError(f"{folder / CONFIG} is of a lens of type {kind!r}; only linear_tuned_lens is known")
    state = _unpickled(folder / PARAMETERS, allow_pickle)
    try:
        width, layers = int(config["d_model"]), int(config["num_hidden_layers"])
        maps = Affine(layers, width)
        with torch.no_grad():
            for i in range(layers):
                maps.weight[i] = _of_shape(state.pop(f"{i}.weight"), (width, width), f"{i}.weight")
                if f"{i}.bias" in state:
                    maps.bias[i] = _of_shape(state.pop(f"{i}.bias"), (width,), f"{i}.bias")
        if state:
            raise ValueError(f"{PARAMETERS} has {next(iter(state))}, and {CONFIG} says {layers} layers")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the tuned lens in {folder} is damaged ({_line(error)}): get it again") from error
    _check_finite(maps, folder)
    model = {
        "name": config.get("base_model_name_or_path") or "a model without a name",
        "width": width,
        "layers": layers,
        "unembedding": config.get("unembed_hash"),
    }
    return FittedLens(maps, stream_sites(layers), model, {"kind": "affine", "from": "tuned-lens", "config": config})


def load_jacobian_lens(file: Path, *, allow_pickle: bool = False) -> FittedLens:
    """A Jacobian lens from an artefact or a checkpoint ``.pt``.

    Args:
        file: with the matrices under ``J``, or their sums over ``n_done`` prompts under ``jacobian_sum``.
        allow_pickle: read the file, which is a pickle, through the weights-only loader.

    Raises:
        InputError: pickles are not allowed, the file is damaged, or no prompt is in it yet.
    """
    found = _unpickled(file, allow_pickle)
    if "J" in found:
        matrices, count = found["J"], found.get("n_prompts")
        divisor = 1
    elif "jacobian_sum" in found:
        matrices, count = found["jacobian_sum"], found.get("n_done", found.get("n_prompts"))
        if not isinstance(count, int) or count < 1:
            raise InputError(f"{file} is a checkpoint with no prompt in it (n_done is {count!r}): it gives no lens yet")
        divisor = count
    else:
        raise InputError(
            f"{file} is no Jacobian lens: it has neither 'J' (an artefact) nor 'jacobian_sum' (a checkpoint), but "
            f"{', '.join(map(repr, list(found)[:5])) or 'nothing'}"
        )
    try:
        layers = sorted(int(layer) for layer in matrices)
        by_layer = {int(layer): matrix for layer, matrix in matrices.items()}
        width = int(found.get("d_model", by_layer[layers[0]].shape[0]))
        if layers[0] < 0:
            raise ValueError(f"it has a layer {layers[0]}")
        maps = Linear(len(layers), width)
        with torch.no_grad():
            for i, layer in enumerate(layers):
                maps.weight[i] = (
                    _of_shape(by_layer[layer], (width, width), f"the matrix of layer {layer}").float() / divisor
                )
        about = dict(found.get("metadata") or {})
        count = None if count is None else int(count)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the Jacobian lens {file} is damaged ({_line(error)}): get it again") from error
    _check_finite(maps, file)
    about = {**{k: found[k] for k in ("model_name", "target_layer", "corpus", "skip_first") if k in found}, **about}
    target = about.get("target_layer")
    model = {
        "name": about.get("model_name") or "a model without a name",
        "width": width,
        "layers": int(target) + 1 if isinstance(target, int) else None,
        "fingerprint": about.get("logitlab_fingerprint"),
    }
    skipped = about.get("skip_first_positions", about.get("skip_first"))
    recipe = {"kind": "jacobian", "from": file.name, "prompts": count, "skip_first": skipped, "metadata": _plain(about)}
    corpus = {"name": str(about["corpus"])} if about.get("corpus") else {}
    return FittedLens(maps, [Site(layer, "resid_post") for layer in layers], model, recipe, corpus)


def save_tuned_lens(lens: FittedLens, folder: str | Path, *, model: Model | None = None) -> Path:
    """Write a lens as tuned-lens keeps it, which is float32 here.

    Every family but the Jacobian lens can be written as ``h + A h + b``.

    Args:
        lens: the lens; it must have a map for the whole residual stream, as `fit` makes it by default.
        folder: where; it is made.
        model: the model; then the folder says which unembedding the lens is for, and tuned-lens checks it.

    Raises:
        InputError: the lens has no such form, lacks sites, or the folder cannot be written.
    """
    layers = lens.model["layers"]
    if layers is None or list(lens.sites) != stream_sites(layers):
        raise InputError(
            f"tuned-lens keeps a map for every state of the residual stream, and this {lens.name} has "
            f"{len(lens.sites)} of its own choice: fit one with sites=None"
        )
    weight, bias = _affine(lens.maps)
    place = Path(folder)
    _make(place)
    digest = None if model is None else unembedding_digest(model)
    config = {
        "base_model_name_or_path": lens.model["name"],
        "d_model": lens.model["width"],
        "num_hidden_layers": layers,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": digest or lens.model.get("unembedding"),
        "lens_type": "linear_tuned_lens",
    }
    state = {f"{i}.weight": weight[i].clone() for i in range(layers)}
    state |= {f"{i}.bias": bias[i].clone() for i in range(layers)}
    write_atomically(place / PARAMETERS, lambda path: torch.save(state, path))
    write_text(place / CONFIG, json.dumps(config) + "\n")
    return place


def save_jacobian_lens(lens: FittedLens, file: str | Path, *, dtype: torch.dtype = torch.float16) -> Path:
    """Write a Jacobian lens as the artefact that is published.

    Its form has no place for a map of what enters the first block: that one is left out.

    Args:
        lens: a lens of kind ``jacobian``.
        file: where, by custom ending in ``.pt``.
        dtype: of the matrices; float16 is the custom.

    Raises:
        InputError: the lens is another one, or has maps of other sites than blocks' outputs.
    """
    if lens.kind != "jacobian":
        raise InputError(f"a {lens.name} cannot be written as a Jacobian lens")
    strange = [s for s in lens.sites if s.kind != "resid_post" and s != Site(0, "resid_pre")]
    if strange:
        raise InputError(f"the format has blocks' outputs only, and this lens has {strange[0]}")
    weight = lens.maps.state_dict()["weight"].cpu()
    matrices = {s.layer: weight[i].to(dtype) for i, s in enumerate(lens.sites) if s.kind == "resid_post"}
    lost = next((layer for layer, m in matrices.items() if not bool(torch.isfinite(m).all())), None)
    if lost is not None:
        raise InputError(f"the matrix of layer {lost} is too large for {dtype}: give dtype=torch.float32")
    metadata = {
        "model_name": lens.model["name"],
        "target_layer": None if lens.model["layers"] is None else lens.model["layers"] - 1,
        "skip_first_positions": lens.recipe.get("skip_first"),
        "logitlab_fingerprint": lens.model.get("fingerprint"),
    }
    found = {
        "J": matrices,
        "n_prompts": int(lens.recipe.get("prompts") or 0),
        "source_layers": sorted(matrices),
        "d_model": int(weight.shape[-1]),
        "metadata": {name: value for name, value in metadata.items() if value is not None},
    }
    return write_atomically(file, lambda path: torch.save(found, path))


def stream_sites(layers: int) -> list[Site]:
    """The residual stream before its last state: what enters the first block, and what each but the last one gives."""
    return [Site(0, "resid_pre"), *(Site(layer, "resid_post") for layer in range(layers - 1))]


def _affine(maps: Maps) -> tuple[torch.Tensor, torch.Tensor]:
    """A and b of ``h + A h + b``, [sites, width, width] and [sites, width]."""
    if isinstance(maps, Affine):
        weight = maps.weight
    elif isinstance(maps, LowRank):
        weight = maps.up @ maps.down
    elif isinstance(maps, Diagonal):
        weight = torch.diag_embed(maps.delta)
    elif isinstance(maps, Bias):
        weight = torch.zeros(maps.sites, maps.width, maps.width)
    else:
        raise InputError(f"a {maps.title} cannot be written as a tuned lens: use save_jacobian_lens")
    return weight.detach().float().cpu(), maps.bias.detach().float().cpu()


def _unpickled(file: Path, allowed: bool) -> dict[str, Any]:
    if not allowed:
        raise InputError(
            f"{file} is a pickle, which can run code when it is read: pass allow_pickle=True (--allow-pickle) to read "
            "it with PyTorch's weights-only loader, which takes tensors and plain values alone"
        )
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{file} is corrupt, or holds more than tensors and was therefore not read") from error
    except Exception as error:  # what is no pickle can end in any error
        raise InputError(f"{file} cannot be read ({_line(error)})") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} holds a {type(found).__name__}; a lens is a dictionary")
    return found


def _of_shape(value: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} is {list(value.shape)}, not {list(shape)}")
    return value


def _check_finite(maps: Maps, place: Path) -> None:
    for name, value in maps.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"the lens in {place} has values that are NaN or infinite, in {name}: get it again")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror or error}") from error


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of some values JSON can hold."""
    return json.loads(json.dumps({k: v for k, v in values.items() if not isinstance(v, torch.Tensor)}, default=str))


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
