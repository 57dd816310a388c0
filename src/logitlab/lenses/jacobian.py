"""The Jacobian lens: how, on average, a change of a site's state moves the model's last hidden state.

For a prompt with valid positions V (the first few and the last one are left out)

    J_site = mean over t in V of sum over t' in V of d h_final,t' / d h_site,t

and the lens is the mean over prompts, each of them weighing the same (Gurnee et al. 2026, "Verbalizable
Representations Form a Global Workspace in Language Models"). In a causal model only t' >= t contribute. The estimator
is exact: for each of the last state's coordinates one backward pass, from all valid positions at once; several
coordinates go side by side.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from logitlab.errors import InputError, ModelError
from logitlab.files import write_atomically, write_text
from logitlab.lenses.fitted import FittedLens, check_folder, identity, read_record
from logitlab.lenses.group import Group, joined
from logitlab.lenses.maps import Linear
from logitlab.models.capture import by_tokens
from logitlab.models.handle import Model
from logitlab.models.hooks import StopForward, Taps
from logitlab.models.inputs import Encoded, whole_number
from logitlab.models.passes import Cache, arguments_of, cache_of, continues, stopped
from logitlab.models.products import QuickGradients
from logitlab.models.sites import Site
from logitlab.models.watch import Key, watch

KINDS = ("resid_pre", "resid_post", "attn_out", "cross_attn_out", "mlp_out")
"""Kinds of sites that have a Jacobian lens: whole states of the residual stream's width."""

SKIP_FIRST = 16
"""Positions at the beginning that are left out: much attention goes to them, and their states are unlike others."""

STATE = "jacobian.json"


@dataclass
class Jacobians:
    """Sums of Jacobians over prompts; sums of different prompts add up.

    Attributes:
        sites: the sites.
        total: [sites, width, width] float64.
        prompts: how many prompts are in it.
        positions: how many valid positions those have.
        skipped: prompts that had no valid position.
    """

    sites: tuple[Site, ...]
    total: torch.Tensor
    prompts: int = 0
    positions: int = 0
    skipped: int = 0

    def merge(self, other: Jacobians) -> Jacobians:
        """The sum over the prompts of both.

        Raises:
            InputError: they are of other sites.
        """
        if self.sites != other.sites or self.total.shape != other.total.shape:
            raise InputError("these Jacobians are of other sites, or of another model")
        return Jacobians(
            self.sites,
            self.total + other.total,
            self.prompts + other.prompts,
            self.positions + other.positions,
            self.skipped + other.skipped,
        )

    def lens(self, model: Model, **record: Any) -> FittedLens:
        """The lens that they give.

        Raises:
            InputError: no prompt is in them.
        """
        if self.prompts == 0:
            raise InputError(
                f"no prompt had a valid position ({self.skipped} were too short): give longer prompts, or skip fewer"
            )
        maps = Linear(len(self.sites), self.total.shape[-1])
        maps.load_state_dict({"weight": (self.total / self.prompts).float()})
        recipe = {"kind": "jacobian", "prompts": self.prompts, "positions": self.positions, "skipped": self.skipped}
        return FittedLens(maps, self.sites, model.about, recipe | record)


def fit_jacobian(
    model: Model,
    inputs: Any,
    *,
    sites: Any = None,
    decoder: Any = None,
    skip_first: int = SKIP_FIRST,
    length: int = 128,
    coordinates: int = 16,
    folder: str | Path | None = None,
    about_corpus: dict[str, Any] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> FittedLens:
    """Measure a Jacobian lens on some prompts.

    Args:
        model: the model.
        inputs: prompts in any form that `logitlab.read` takes; about 100 of 128 tokens give a usable lens.
        sites: which sites, see `KINDS`; by default the residual stream.
        decoder: what the decoder of an encoder-decoder model has already written.
        skip_first: positions at the beginning of each prompt that are left out; the last one always is.
        length: tokens of a prompt that are used.
        coordinates: how many backward passes go side by side: more need more memory.
        folder: where the sums are kept after each prompt, and the lens in the end; a fit of the same prompts that was
            broken off there goes on.
        about_corpus: what the lens shall say of where the prompts are from; plain values.
        progress: called with the numbers of prompts done and in all, and the seconds that are left.

    In processes that torchrun or accelerate has started, each takes a prompt at a time; the first writes the files.

    Raises:
        InputError: an argument cannot be used, or no prompt is long enough.
        ModelError: a state does not depend on a site.

    Example:
        ``fit_jacobian(model, texts).save("jacobian-lens")``
    """
    skip_first, coordinates = whole_number(skip_first, "skip_first"), whole_number(coordinates, "coordinates")
    length = whole_number(length, "length")
    if skip_first < 0 or coordinates < 1 or length < 2:
        raise InputError("skip_first must be at least 0, coordinates at least 1 and length at least 2")
    prompts = [_cut(p, length) for p in model.encode(inputs, decoder=decoder)]
    chosen = tuple(identity(model, "jacobian", sites).sites)
    bad = next((site for site in chosen if site.kind not in KINDS), None)
    if bad is not None:
        raise InputError(f"{bad} has no Jacobian lens: it can be had for {', '.join(KINDS)}")
    if not by_tokens(model, prompts):
        raise InputError(f"{model.name} is not read token by token: it has no Jacobian lens")
    place = None if folder is None else check_folder(folder, STATE)
    key = _key(model, prompts, chosen, skip_first)
    sums = Jacobians(chosen, torch.zeros(len(chosen), model.width, model.width, dtype=torch.float64))
    done = 0
    if place is not None and (place / STATE).is_file():
        sums, done = _resumed(place, key, sums)
    group = joined(model)
    group.check_alike(key | {"prompts done": done})
    begin = time.perf_counter()
    for n in range(done, len(prompts), group.size):
        mine = prompts[n : n + group.size][group.rank : group.rank + 1]  # one each, or none
        found = jacobians(model, mine, chosen, skip_first=skip_first, coordinates=coordinates)
        sums = sums.merge(_together(found, group))
        ready = min(n + group.size, len(prompts))
        if place is not None and group.writes:
            _keep(place, key, sums, ready)
        if progress is not None:
            each = (time.perf_counter() - begin) / (ready - done)
            progress(ready, len(prompts), each * (len(prompts) - ready))
    lens = sums.lens(model, skip_first=skip_first, length=length)
    lens.corpus = about_corpus or {}
    if place is not None and group.writes:
        lens.save(place)
        for old in [place / STATE, *place.glob("jacobian-*.safetensors")]:
            old.unlink(missing_ok=True)
    group.wait()
    return lens


def _together(found: Jacobians, group: Group) -> Jacobians:
    """The sums of all processes."""
    counts = torch.tensor([found.prompts, found.positions, found.skipped], dtype=torch.float64)
    group.add([found.total, counts])
    return Jacobians(found.sites, found.total, *(round(float(c)) for c in counts))


def jacobians(
    model: Model, prompts: Sequence[Encoded], sites: Sequence[Site], *, skip_first: int, coordinates: int
) -> Jacobians:
    """Sums over some prompts of the Jacobians of the last hidden state by the states at some sites."""
    sums = Jacobians(tuple(sites), torch.zeros(len(sites), model.width, model.width, dtype=torch.float64))
    for prompt in prompts:
        valid = range(skip_first, len(prompt.ids) - 1)
        if not valid:
            sums.skipped += 1
            continue
        with model.exclusive(), _frozen(model):
            for rows, found in _backward(model, prompt, sites, valid, coordinates):
                sums.total[:, rows] += found
        sums.prompts += 1
        sums.positions += len(valid)
    return sums


def _backward(
    model: Model, prompt: Encoded, sites: Sequence[Site], valid: range, coordinates: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of the prompt's Jacobians, [sites, rows, width] float64, a few at a time."""
    last = (model.last_site.layer, model.last_site.kind)
    keys: list[Key] = [(site.layer, site.kind) for site in sites]
    copies = min(coordinates, model.width)
    if valid.start and continues(model, prompt):
        # Nothing comes back to the tokens before the valid ones, and those after them have no part in it.
        skipped = replace(prompt, ids=prompt.ids[: valid.start])
        rest = replace(prompt, ids=prompt.ids[valid.start : valid.stop])
        cache, past, valid = cache_of(model, [skipped] * copies), valid.start, range(len(valid))
    else:
        rest, cache, past = prompt, None, 0
    seen = _graph(model, [rest] * copies, [*keys, last], cache, past)
    final, layout = seen[last], model.stack.layout
    length = layout.rows(final).shape[0] // copies
    if length != len(rest.ids):
        raise ModelError(
            f"{model.stack.name} has {length} positions for {len(rest.ids)} tokens: it has no Jacobian lens"
        )
    positions = torch.arange(valid.start, valid.stop, device=final.device)
    for start in range(0, model.width, copies):
        rows = slice(start, min(start + copies, model.width))
        cotangent = torch.zeros(copies, length, model.width, dtype=final.dtype, device=final.device)
        for c, i in enumerate(range(rows.start, rows.stop)):
            cotangent[c, positions, i] = 1.0
        found: Any = torch.autograd.grad(
            final,
            [seen[key] for key in keys],
            layout.state(cotangent.flatten(0, 1), final.shape),
            retain_graph=rows.stop < model.width,
            allow_unused=True,
        )
        gradients: list[torch.Tensor | None] = list(found)  # None where a state has no part in it
        unused = next((site for site, g in zip(sites, gradients, strict=True) if g is None), None)
        if unused is not None:
            raise ModelError(f"the last hidden state does not depend on {unused}: it has no Jacobian lens")
        by_token = [layout.rows(g).reshape(copies, length, model.width) for g in gradients if g is not None]
        means = [g[:, positions.to(g.device)].double().mean(1).cpu() for g in by_token]
        yield rows, torch.stack(means)[:, : rows.stop - rows.start]


def _graph(
    model: Model, prompts: Sequence[Encoded], keys: Sequence[Key], cache: Cache | None, past: int
) -> dict[Key, torch.Tensor]:
    """States at some sites of one differentiable pass over copies of a prompt, which goes on from a cache."""
    found: dict[Key, torch.Tensor] = {}
    first = (0, "resid_pre")

    def keep(key: Key, value: torch.Tensor, scale: float = 1.0) -> None:
        if key == first and not value.requires_grad:
            value.requires_grad_(True)  # no weight needs a gradient, so it is a leaf
        if scale != 1.0:
            raise ModelError(f"{key[0]}.{key[1]} is scaled after the module that gives it: it has no Jacobian lens yet")
        found[key] = value

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise StopForward

    inputs = arguments_of(model, prompts, past)
    if cache is not None:
        inputs |= {"use_cache": True, **cache}
    elif model.takes("use_cache"):
        inputs["use_cache"] = False
    with Taps() as taps:
        watch(model, list(dict.fromkeys([first, *keys])), keep, taps)
        if model.tail.head_module is not None:
            taps.replace(model.tail.head_module, stop)  # logits are not needed
        with torch.enable_grad(), QuickGradients(), suppress(StopForward):
            try:
                model.module(**inputs)
            except Exception as error:  # a model's own code can raise anything
                raise stopped(model, inputs, error) from error
    return found


@contextmanager
def _frozen(model: Model) -> Generator[None]:
    """No weight asks for a gradient: only states are differentiated."""
    asking = [p for p in model.module.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)


# -- sums on disk ------------------------------------------------------------------------------


def _cut(prompt: Encoded, length: int) -> Encoded:
    return replace(prompt, ids=prompt.ids[:length]) if len(prompt.ids) > length else prompt


def _key(model: Model, prompts: Iterable[Encoded], sites: Sequence[Site], skip_first: int) -> dict[str, Any]:
    found = hashlib.sha256()
    for p in prompts:
        found.update(json.dumps([p.ids, p.encoder_ids]).encode())
        for name, value in sorted(p.extra.items()):
            data = (
                value.cpu().contiguous().view(torch.uint8).numpy().tobytes() if isinstance(value, torch.Tensor) else b""
            )
            found.update(f"{name} {value if not data else tuple(value.shape)}".encode() + data)
    names = [str(s) for s in sites]
    return {"model": model.about, "prompts": found.hexdigest(), "sites": names, "skip_first": skip_first}


def _keep(folder: Path, key: dict[str, Any], sums: Jacobians, done: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = f"jacobian-{done}.safetensors"
    write_atomically(folder / file, lambda path: save_file({"total": sums.total}, path))
    counts = {"prompts": sums.prompts, "positions": sums.positions, "skipped": sums.skipped}
    write_text(folder / STATE, json.dumps({"key": key, "file": file, "done": done, "counts": counts}) + "\n")
    for old in folder.glob("jacobian-*.safetensors"):
        if old.name != file:
            old.unlink(missing_ok=True)


def _resumed(folder: Path, key: dict[str, Any], empty: Jacobians) -> tuple[Jacobians, int]:
    record = read_record(folder / STATE)
    if record.get("key") != key:
        raise InputError(f"{folder} holds a fit on another model, other prompts or sites: give another folder")
    try:
        total = load_file(folder / record["file"])["total"]
        return Jacobians(empty.sites, total, **record["counts"]), int(record["done"])
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise InputError(f"the sums in {folder} are damaged: remove the folder and start again") from error
