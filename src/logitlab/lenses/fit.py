"""Fit a lens: make what a site says as close as possible to what the model says in the end.

For each site the loss is the mean over tokens of KL(final distribution || distribution at the site), in nats
(Belrose et al. 2023, arXiv 2303.08112, equation 3). Its gradient reaches the maps alone; the model's weights stay. The
final distribution is worked out once for all sites, and no logits are kept (`logitlab.logits.divergence`).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from logitlab.corpora import Corpus, corpus, windows
from logitlab.errors import InputError, ModelError
from logitlab.files import difference, write_atomically, write_text
from logitlab.lenses.fitted import FittedLens, check_folder, identity, read_record
from logitlab.lenses.jacobian import SKIP_FIRST, fit_jacobian
from logitlab.logits import statistics
from logitlab.logits.divergence import divergence
from logitlab.models.capture import by_tokens, capture_encoded
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded, whole_number

ROWS = 4096
"""Rows that are differentiated together."""

PASS = 1024
"""Tokens whose hidden states are held at once."""

STATE = "fit.json"


@dataclass(frozen=True)
class Recipe:
    """How a lens is fitted.

    Attributes:
        kind: family of maps.
        steps: optimiser steps.
        windows_per_step: windows of one step.
        length: tokens of a window.
        share: part of the positions of a window that are used, drawn anew for each step.
        optimiser: ``adam`` or ``sgd`` (with Nesterov momentum 0.9).
        rate: learning rate at the start; it falls linearly to zero.
        decay: weight decay, towards the identity (decoupled from the gradient with ``adam``).
        clip: largest norm of the gradient of one site's map; None for no limit.
        clip_together: whether ``clip`` is for the gradient of all maps together, as in tuned-lens; then what becomes
            of a site depends on the others.
        validate_every: steps between two looks at the validation windows.
        validation_windows: windows that are set aside for stopping, before those that are fitted on.
        patience: looks without an improvement at any site after which fitting stops.
        products: ``bfloat16`` rounds what is multiplied with the head for the gradient, where the machine is quicker at
            that; sums, maps and the optimiser are float32, and so is all that is validated. ``float32`` does not.
        seed: of the order of windows and the choice of positions.
    """

    kind: str = "affine"
    steps: int = 250
    windows_per_step: int = 4
    length: int = 256
    share: float = 0.25
    optimiser: str = "adam"
    rate: float = 1e-3
    decay: float = 1e-3
    clip: float | None = 1.0
    clip_together: bool = False
    validate_every: int = 25
    validation_windows: int = 8
    patience: int = 4
    products: str = "bfloat16"
    seed: int = 0

    def check(self) -> None:
        """Raise `InputError` if a number is out of range."""
        whole = ("steps", "windows_per_step", "length", "validate_every", "validation_windows", "patience")
        bad = next((name for name in whole if whole_number(getattr(self, name), name) < 1), None)
        if bad is not None:
            raise InputError(f"{bad} is {getattr(self, bad)}; it must be at least 1")
        if whole_number(self.seed, "seed") < 0:
            raise InputError(f"seed is {self.seed}; it must be at least 0")
        if not 0 < self.share <= 1:
            raise InputError(f"share is {self.share}; it is a part of the positions, above 0 and at most 1")
        if not self.rate > 0 or not math.isfinite(self.rate):
            raise InputError(f"rate is {self.rate}; it must be above 0")
        if not self.decay >= 0 or (self.clip is not None and not self.clip > 0):
            raise InputError(f"decay is {self.decay} and clip {self.clip}; neither may be negative, nor clip 0")
        if self.optimiser not in ("adam", "sgd"):
            raise InputError(f"there is no optimiser {self.optimiser!r}; there are adam and sgd")
        if self.products not in ("bfloat16", "float32"):
            raise InputError(f"products is {self.products!r}; it is bfloat16 or float32")


@dataclass(frozen=True)
class Progress:
    """Where a fit stands.

    Attributes:
        step: steps done.
        steps: steps in all.
        tokens: tokens that went through the model in this run.
        loss: mean of the sites' KL in the last step, nats.
        validation: mean of the sites' best KL on the validation windows so far, nats.
        seconds: how long this run has taken.
        left: seconds that are left at this rate.
    """

    step: int
    steps: int
    tokens: int
    loss: float
    validation: float
    seconds: float
    left: float

    @property
    def words(self) -> str:
        """Rate and loss in words."""
        rate = f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        return rate if math.isnan(self.loss) else f"{rate}, KL {self.loss:.4f} (validation {self.validation:.4f})"


@dataclass
class _State:
    """What a fit is made of between two steps; all of it is in a checkpoint."""

    lens: FittedLens
    optimiser: torch.optim.Optimizer
    best: dict[str, torch.Tensor]
    best_kl: torch.Tensor
    step: int = 0
    stale: int = 0
    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def fit(
    model: Model,
    source: Any,
    *,
    kind: str | None = None,
    sites: Any = None,
    rank: int | None = None,
    prompts: int | None = None,
    skip_first: int | None = None,
    coordinates: int | None = None,
    recipe: Recipe | None = None,
    column: str = "text",
    folder: str | Path | None = None,
    checkpoint_every: int = 25,
    progress: Callable[[Progress], None] | None = None,
    **changes: Any,
) -> FittedLens:
    """Fit a lens on a corpus.

    Args:
        model: the model; it is not changed.
        source: the corpus, see `logitlab.corpora.corpus`.
        kind: family of maps, one of `logitlab.lenses.FAMILIES`; by default the recipe's, which is ``affine``. A
            ``jacobian`` lens is not fitted by descent but measured on the first windows (`fit_jacobian`): of a recipe
            it takes the ``length`` alone, by default 128.
        sites: which sites, as in `logitlab.read`; by default the residual stream. The last block's output needs no map.
        rank: of a low-rank lens.
        prompts: windows that a Jacobian lens is measured on; by default 100.
        skip_first: positions at their beginning that a Jacobian lens leaves out, as in `fit_jacobian`.
        coordinates: as in `fit_jacobian`.
        recipe: how to fit; by default a `Recipe()`.
        column: which column of a table is the text.
        folder: where checkpoints are kept while fitting, and the lens is written in the end. If a fit of the same
            recipe, model and corpus was broken off there it goes on, and ends with the same bits.
        checkpoint_every: steps between two checkpoints.
        progress: called after each step.
        changes: fields of the recipe that are to be different, for instance ``steps=100``.

    Returns:
        The lens. At each site its map is the one that was best on the validation windows, so it is never worse there
        than the logit lens. ``metrics`` has the KL of both, in nats.

    Raises:
        InputError: an argument or the corpus cannot be used, or ``folder`` holds another fit.
        ModelError: the loss is not finite; the message says at which site and step.

    Example:
        ``lens = fit(model, "texts.jsonl", kind="diagonal", steps=100, folder="diagonal-lens")``
    """
    kind = kind or (recipe or Recipe()).kind
    strange = next((name for name in changes if name not in Recipe.__dataclass_fields__), None)
    if strange is not None:
        raise InputError(f"fit() takes no {strange!r}; a recipe has {', '.join(Recipe.__dataclass_fields__)}")
    measured = {"prompts": prompts, "skip_first": skip_first, "coordinates": coordinates}
    if kind == "jacobian":
        length = changes.pop("length", 128 if recipe is None else recipe.length)
        given = [*changes, *(["rank"] if rank is not None else [])]
        if given:
            raise InputError(
                f"a Jacobian lens is not fitted by descent: {', '.join(given)} means nothing to it; it takes prompts, "
                "skip_first, coordinates and length"
            )
        options = {name: value for name, value in measured.items() if value is not None}
        return _measured(model, source, sites, column, length, folder=folder, progress=progress, **options)
    strange = next((name for name, value in measured.items() if value is not None), None)
    if strange is not None:
        raise InputError(f"{strange} is about a Jacobian lens: leave it out, or give kind='jacobian'")
    if whole_number(checkpoint_every, "checkpoint_every") < 1:
        raise InputError(f"checkpoint_every is {checkpoint_every}; it must be at least 1")
    recipe = replace(recipe or Recipe(), **changes, kind=kind)
    recipe.check()
    if not by_tokens(model, [Encoded(None, (0,))]) or model.encoder_decoder:
        raise InputError(f"{model.name} is not read token by token from texts alone: fit() needs that")
    place = None if folder is None else check_folder(folder, STATE)
    lens = identity(model, recipe.kind, sites, **({} if rank is None else {"rank": rank}))
    texts = corpus(source, column=column)
    data = _Data.of(model, texts, recipe)
    lens.recipe, lens.corpus = asdict(recipe), data.described
    run = _Fit(model, lens, recipe, data)
    try:
        _run(run, place, checkpoint_every, progress)
    finally:
        for p in lens.maps.parameters():
            p.grad = None
        lens.maps.requires_grad_(False)
    if place is not None:
        lens.save(place)
        for old in [place / STATE, *place.glob("fit-*.safetensors")]:
            old.unlink(missing_ok=True)
    return lens


def _run(run: _Fit, place: Path | None, checkpoint_every: int, progress: Callable[[Progress], None] | None) -> None:
    """Step after step to the end; the best maps are in the lens then."""
    recipe, lens = run.recipe, run.lens
    state = run.start() if place is None else run.resumed(place)
    begin, first = time.perf_counter(), state.step
    while state.step < recipe.steps and state.stale < recipe.patience:
        loss = run.advance(state)
        if progress is not None:
            seconds = time.perf_counter() - begin
            done = state.step - first
            left = seconds / done * (recipe.steps - state.step)
            tokens = done * recipe.windows_per_step * recipe.length
            progress(Progress(state.step, recipe.steps, tokens, loss, float(state.best_kl.mean()), seconds, left))
        if place is not None and state.step % checkpoint_every == 0:
            run.keep(state, place)
    lens.maps.load_state_dict(state.best)
    lens.metrics = run.metrics(state)


def _measured(
    model: Model,
    source: Any,
    sites: Any,
    column: str,
    length: int,
    *,
    prompts: int = 100,
    skip_first: int = SKIP_FIRST,
    coordinates: int = 16,
    folder: str | Path | None,
    progress: Callable[[Progress], None] | None,
) -> FittedLens:
    """A Jacobian lens of the first windows of a corpus."""
    if prompts < 1:
        raise InputError(f"prompts is {prompts}; it must be at least 1")
    texts = corpus(source, column=column)
    ids = [list(w.ids) for w in islice(windows(model, texts, length), prompts)]
    if not ids:
        raise InputError(f"the corpus {texts.name} has fewer than {length} tokens: give more text, or a smaller length")
    begin = time.perf_counter()
    first: list[int] = []

    def tell(done: int, total: int, left: float) -> None:
        if progress is not None:
            first.append(done)
            seconds = time.perf_counter() - begin
            tokens = (done - first[0] + 1) * length
            progress(Progress(done, total, tokens, math.nan, math.nan, seconds, left))

    digest = hashlib.sha256(np.array(ids, dtype=np.int32).tobytes()).hexdigest()
    described = {"name": texts.name, "windows": len(ids), "tokens": len(ids) * length, "digest": digest}
    return fit_jacobian(
        model,
        ids,
        sites=sites,
        skip_first=skip_first,
        length=length,
        coordinates=coordinates,
        folder=folder,
        about_corpus=described,
        progress=tell,
    )


@dataclass
class _Data:
    """The windows of a fit, in memory: four bytes a token.

    Attributes:
        ids: [windows, length] int32; those for validation come first.
        own: which positions may be used.
        described: plain values for the record.
    """

    ids: np.ndarray
    own: range
    described: dict[str, Any]

    @staticmethod
    def of(model: Model, texts: Corpus, recipe: Recipe) -> _Data:
        """As many windows as the recipe can use."""
        wanted = recipe.validation_windows + recipe.steps * recipe.windows_per_step
        found: list[np.ndarray] = []
        own = range(0)
        for window in islice(windows(model, texts, recipe.length), wanted):
            found.append(np.array(window.ids, dtype=np.int32))
            own = range(window.own.start, window.own.stop)
        least = recipe.validation_windows + recipe.windows_per_step
        if len(found) < least:
            raise InputError(
                f"the corpus {texts.name} gives {len(found)} windows of {recipe.length} tokens; at least {least} are "
                f"needed ({recipe.validation_windows} for validation, {recipe.windows_per_step} for a step): "
                "give more text, or a smaller length"
            )
        ids = np.stack(found)
        described = {
            "name": texts.name,
            "windows": len(found),
            "tokens": int(ids.size),
            "digest": hashlib.sha256(ids.tobytes()).hexdigest(),
        }
        return _Data(ids, own, described)


class _Fit:
    """One fit: everything that does not change while it goes on."""

    def __init__(self, model: Model, lens: FittedLens, recipe: Recipe, data: _Data) -> None:
        self.model, self.lens, self.recipe, self.data = model, lens, recipe, data
        self.sites = list(lens.sites)
        self.final = model.last_site
        self.device = model.device
        count = recipe.validation_windows
        self.validation, self.training = range(count), range(count, len(data.ids))

    # -- steps ---------------------------------------------------------------------------------

    def start(self) -> _State:
        """The state before the first step, with the logit lens' own KL."""
        self.lens.maps.to(self.device).requires_grad_(True)
        state = _State(self.lens, self._optimiser(), {}, torch.full((len(self.sites),), math.inf))
        self._look(state)
        return state

    def _optimiser(self) -> torch.optim.Optimizer:
        r, parameters = self.recipe, list(self.lens.maps.parameters())
        if r.optimiser == "sgd":
            return torch.optim.SGD(parameters, r.rate, momentum=0.9, nesterov=True, weight_decay=r.decay, fused=True)
        return torch.optim.AdamW(parameters, r.rate, weight_decay=r.decay, fused=True)

    def advance(self, state: _State) -> float:
        """One step; returns the mean of the sites' KL, in nats."""
        r = self.recipe
        for group in state.optimiser.param_groups:
            group["lr"] = r.rate * (1 - state.step / r.steps)
        kl = self._backward(state.step)
        if not bool(torch.isfinite(kl).all()):
            site = self.sites[int((~torch.isfinite(kl)).nonzero()[0])]
            raise ModelError(
                f"the loss is not finite at {site} in step {state.step + 1}: use a smaller rate than {r.rate:g}, "
                "or a float32 model"
            )
        self._clip()
        state.optimiser.step()
        state.step += 1
        if state.step % r.validate_every == 0 or state.step == r.steps:
            self._look(state)
        return float(kl.mean())

    def _clip(self) -> None:
        """Limit the gradient: site by site, or of all together."""
        if self.recipe.clip is None:
            return
        gradients = [p.grad for p in self.lens.maps.parameters() if p.grad is not None]
        sizes = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        size = sizes.norm(dim=0)  # norms of norms: no copy of a gradient is made
        if self.recipe.clip_together:
            size = size.norm().expand_as(size)
        factor = (self.recipe.clip / (size + 1e-12)).clamp_max(1.0)
        for g in gradients:
            g.mul_(factor.reshape(-1, *[1] * (g.ndim - 1)))

    def _chosen(self, step: int) -> list[int]:
        """Windows of a step: the training windows in an order of their own in each round."""
        found: list[int] = []
        for n in range(step * self.recipe.windows_per_step, (step + 1) * self.recipe.windows_per_step):
            turn, place = divmod(n, len(self.training))
            order = np.random.default_rng([self.recipe.seed, turn]).permutation(len(self.training))
            found.append(self.training[int(order[place])])
        return found

    def _positions(self, window: int, step: int, n: int) -> list[int]:
        own = self.data.own
        count = max(1, round(self.recipe.share * len(own)))
        generator = np.random.default_rng([self.recipe.seed, 1, step, window, n])
        return sorted(int(own[i]) for i in generator.choice(len(own), count, replace=False))

    # -- loss ----------------------------------------------------------------------------------

    def _rows(self, chosen: Sequence[int], positions: Sequence[Sequence[int]]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Hidden states [sites, n, width] of some positions, a few at a time, and of the last block [n, width]."""
        prompts = [Encoded(None, tuple(map(int, self.data.ids[w]))) for w in chosen]
        many = max(1, ROWS // len(self.sites))
        together = max(1, PASS // self.recipe.length)
        for first in range(0, len(prompts), together):
            some = slice(first, first + together)
            found = capture_encoded(
                self.model, prompts[some], [*self.sites, self.final], positions[some], self.recipe.length, share=False
            )
            final = found.kept[self.final.layer, self.final.kind]
            for start in range(0, len(final), many):
                rows = slice(start, min(start + many, len(final)))
                kept = {key: value[rows] for key, value in found.kept.items()}
                one = type(found)(found.sites, found.prompts, found.positions, kept, found.projections)
                yield one.stacked(self.sites), final[rows]

    def _backward(self, step: int) -> torch.Tensor:
        """Add the gradients of the mean KL of a step; returns it for each site, [sites] float64."""
        chosen = self._chosen(step)
        positions = [self._positions(w, step, n) for n, w in enumerate(chosen)]
        total = sum(map(len, positions))
        kl = torch.zeros(len(self.sites), dtype=torch.float64)
        for p in self.lens.maps.parameters():
            p.grad = torch.zeros_like(p)
        for hidden, final in self._rows(chosen, positions):
            with self.model.exclusive(), torch.no_grad():
                x, reference = self._moved(hidden), self.model.tail.prepare(final)
                narrow = self.recipe.products == "bfloat16"
                found = divergence(x, reference, self.model.tail.source, narrow=narrow)
                del x
                for i, slope in enumerate(found.gradient):
                    self._add(i, hidden[i : i + 1], slope)
            kl += found.kl.sum(1).cpu()
        # The mean is taken of the maps' gradients, in float32: divided before, float16 would lose them.
        for p in self.lens.maps.parameters():
            assert p.grad is not None
            p.grad /= total
        return kl / total

    def _moved(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows to decode [sites, n, d], of hidden states [sites, n, width]."""
        return torch.stack(
            [
                self.model.tail.prepare(self.lens.maps(_wide(hidden[i : i + 1]), slice(i, i + 1))[0].to(hidden.dtype))
                for i in range(len(hidden))
            ]
        )

    def _add(self, site: int, hidden: torch.Tensor, slope: torch.Tensor) -> None:
        """Add to the gradients of one site's map, from that of its rows [n, d]; states are [1, n, width].

        The map is applied once more for this: that costs little beside the head, and keeping it for all sites would
        cost several times their hidden states, and the gradients of all sites at once another copy of all maps.
        """
        maps = self.lens.maps
        own = {name: p.detach()[site : site + 1].requires_grad_(True) for name, p in maps.named_parameters()}
        with torch.enable_grad():
            moved = functional_call(maps, own, (_wide(hidden),)).to(hidden.dtype)
            x = self.model.tail.prepare(moved[0])
        found = torch.autograd.grad(x, list(own.values()), slope.to(x.dtype))
        for p, gradient in zip(maps.parameters(), found, strict=True):
            assert p.grad is not None
            p.grad[site] += gradient[0]

    def kl(self, chosen: Sequence[int]) -> torch.Tensor:
        """KL of every site at every position of some windows, [sites, n] float64."""
        own = list(self.data.own)
        found: list[torch.Tensor] = []
        for hidden, final in self._rows(chosen, [own] * len(chosen)):
            with self.model.exclusive(), torch.no_grad():
                x, reference = self._moved(hidden), self.model.tail.prepare(final)
                got = statistics(x, self.model.tail.source, top_k=1, reference=reference, entropy=False)
            assert got.kl is not None
            found.append(got.kl.cpu())
        return torch.cat(found, dim=1)

    def _look(self, state: _State) -> None:
        """Keep of every site the map that is best on the validation windows so far."""
        kl = self.kl(self.validation).mean(1).float()
        better = kl < state.best_kl
        now = {name: value.detach().clone() for name, value in self.lens.maps.state_dict().items()}
        for name, value in now.items():
            if name in state.best:
                state.best[name][better.to(value.device)] = value[better.to(value.device)]
            else:
                state.best[name] = value
        state.best_kl = torch.where(better, kl, state.best_kl)
        state.stale = 0 if bool(better.any()) else state.stale + 1
        state.history.append({"step": state.step, "kl": [round(v, 6) for v in kl.tolist()]})

    def metrics(self, state: _State) -> dict[str, Any]:
        """KL on the validation windows, in nats: of the logit lens, and of the map that is kept."""
        first = state.history[0]["kl"]
        sites = {
            str(site): {"logit lens": first[i], "fitted": round(float(state.best_kl[i]), 6)}
            for i, site in enumerate(self.sites)
        }
        return {"validation KL, nats": sites, "steps": state.step}

    # -- checkpoints ---------------------------------------------------------------------------

    @property
    def _key(self) -> dict[str, Any]:
        """What must be the same for a fit to go on."""
        return {
            "recipe": asdict(self.recipe),
            "options": self.lens.maps.options(),
            "sites": [str(s) for s in self.sites],
            "model": self.lens.model,
            "corpus": self.data.described,
        }

    def keep(self, state: _State, folder: Path) -> None:
        """Write a checkpoint; the one before is there until this one is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"map.{n}": v.detach().cpu().contiguous() for n, v in self.lens.maps.state_dict().items()}
        tensors |= {f"best.{n}": v.cpu().contiguous() for n, v in state.best.items()}
        for i, values in state.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{n}": torch.as_tensor(v).cpu().contiguous() for n, v in values.items()}
        tensors["best_kl"] = state.best_kl
        file = f"fit-{state.step}.safetensors"
        write_atomically(folder / file, lambda path: save_file(tensors, path))
        record = {"key": self._key, "file": file, "step": state.step, "stale": state.stale, "history": state.history}
        write_text(folder / STATE, json.dumps(record) + "\n")
        for old in folder.glob("fit-*.safetensors"):
            if old.name != file:
                old.unlink()

    def resumed(self, folder: Path) -> _State:
        """The state of the checkpoint in a folder, or a new one where there is none."""
        if not (check_folder(folder, STATE) / STATE).is_file():
            return self.start()
        record = read_record(folder / STATE)
        mine, its = self._key, record.get("key")
        if not isinstance(its, dict):
            raise InputError(f"{folder / STATE} is damaged: remove the folder and start again")
        other = [name for name in mine if its.get(name) != mine[name]]
        if other:
            what = ", ".join(f"{name} ({difference(its.get(name), mine[name])})" for name in other)
            raise InputError(f"{folder} holds a fit that differs in its {what}: give another folder, or what was given")
        self.lens.maps.to(self.device).requires_grad_(True)
        optimiser = self._optimiser()
        damaged = f"the checkpoint in {folder} is damaged: remove the folder and start again"
        try:
            tensors = load_file(folder / record["file"])

            def of(prefix: str) -> dict[str, torch.Tensor]:
                return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

            self.lens.maps.load_state_dict(of("map."))
            saved = optimiser.state_dict()
            count = len(saved["param_groups"][0]["params"])
            states = {i: of(f"optimiser.{i}.") for i in range(count)}
            saved["state"] = {i: s for i, s in states.items() if s}
            optimiser.load_state_dict(saved)
            best = {n: v.to(self.device) for n, v in of("best.").items()}
            done, stale, history = int(record["step"]), int(record["stale"]), list(record["history"])
            return _State(self.lens, optimiser, best, tensors["best_kl"], done, stale, history)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(damaged) from error


def _wide(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
