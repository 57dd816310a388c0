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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from logitlab.corpora import corpus, windows
from logitlab.errors import InputError, ModelError
from logitlab.files import difference, write_atomically, write_text
from logitlab.lenses.fitted import FittedLens, check_folder, identity, read_record
from logitlab.lenses.group import Group, joined
from logitlab.lenses.jacobian import SKIP_FIRST, fit_jacobian
from logitlab.lenses.loss import Loss, StateLoss, TokenLoss
from logitlab.lenses.material import Material, material
from logitlab.lenses.recipe import Progress, Recipe
from logitlab.models.capture import by_tokens
from logitlab.models.handle import Model
from logitlab.models.inputs import whole_number

STATE = "fit.json"


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
    decoder_column: str | None = None,
    concepts: Sequence[Any] | None = None,
    folder: str | Path | None = None,
    checkpoint_every: int = 25,
    progress: Callable[[Progress], None] | None = None,
    **changes: Any,
) -> FittedLens:
    """Fit a lens on a corpus.

    Args:
        model: the model; it is not changed.
        source: the corpus, see `logitlab.corpora.corpus`. For a model that reads more than text, or none: a list of
            inputs, each as `logitlab.read` takes it; with ``decoder`` in a mapping for what a decoder has written.
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
        decoder_column: which column is what the decoder of an encoder-decoder model has written; both texts are cut to
            ``length`` tokens.
        concepts: what pictures are compared with, as in `logitlab.read`.
        folder: where checkpoints are kept while fitting, and the lens is written in the end. If a fit of the same
            recipe, model and corpus was broken off there it goes on, and ends with the same bits.
        checkpoint_every: steps between two checkpoints.
        progress: called after each step.
        changes: fields of the recipe that are to be different, for instance ``steps=100``.

    In processes that torchrun or accelerate has started, each does a part of the windows of every step (all must be
    given the same arguments, and the model on a device of their own); the first writes the files.

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
    if whole_number(checkpoint_every, "checkpoint_every") < 1:
        raise InputError(f"checkpoint_every is {checkpoint_every}; it must be at least 1")
    if kind == "jacobian":
        length = changes.pop("length", 128 if recipe is None else recipe.length)
        named = {"rank": rank, "decoder_column": decoder_column, "concepts": concepts}
        given = [*changes, *(name for name, value in named.items() if value is not None)]
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
    if torch.is_inference_mode_enabled():
        raise InputError("fit() needs gradients, and torch.inference_mode() is on: call it outside of that")
    recipe = replace(recipe or Recipe(), **changes, kind=kind)
    recipe.check()
    place = None if folder is None else check_folder(folder, STATE)
    lens = identity(model, recipe.kind, sites, **({} if rank is None else {"rank": rank}))
    group = joined(model)
    if group.size > 1 and isinstance(source, str) and source == "-":
        raise InputError("several processes cannot share standard input: write the texts to a file")
    data = material(
        model,
        source,
        wanted=recipe.validation_windows + recipe.steps * recipe.windows_per_step,
        least=recipe.validation_windows + recipe.windows_per_step,
        length=recipe.length,
        column=column,
        decoder_column=decoder_column,
        concepts=concepts,
    )
    lens.recipe, lens.corpus = asdict(recipe), data.described
    run = _Fit(model, lens, recipe, data, group)
    try:
        _run(run, place, checkpoint_every, progress)
    finally:
        for p in lens.maps.parameters():
            p.grad = None
        lens.maps.requires_grad_(False)
    if place is not None and group.writes:
        lens.save(place)
        for old in [place / STATE, *place.glob("fit-*.safetensors")]:
            old.unlink(missing_ok=True)
    group.wait()  # nobody goes on before the lens is there
    return lens


def _run(run: _Fit, place: Path | None, checkpoint_every: int, progress: Callable[[Progress], None] | None) -> None:
    """Step after step to the end; the best maps are in the lens then."""
    recipe, lens = run.recipe, run.lens
    state = run.start() if place is None else run.resumed(place)
    run.group.check_alike(run.key | {"step": state.step})
    begin, first, tokens = time.perf_counter(), state.step, 0
    while state.step < recipe.steps and state.stale < recipe.patience:
        tokens += run.tokens(state.step)
        loss = run.advance(state)
        if progress is not None:
            seconds = time.perf_counter() - begin
            left = seconds / (state.step - first) * (recipe.steps - state.step)
            progress(Progress(state.step, recipe.steps, tokens, loss, float(state.best_kl.mean()), seconds, left))
        if place is not None and run.group.writes and state.step % checkpoint_every == 0:
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


class _Fit:
    """One fit: everything that does not change while it goes on."""

    def __init__(
        self, model: Model, lens: FittedLens, recipe: Recipe, data: Material, group: Group | None = None
    ) -> None:
        self.model, self.lens, self.recipe, self.data = model, lens, recipe, data
        self.group = Group() if group is None else group
        self.sites = list(lens.sites)
        self.device = model.device
        count = recipe.validation_windows
        self.validation, self.training = range(count), range(count, len(data))
        narrow = recipe.products == "bfloat16"
        self.loss: Loss = (
            TokenLoss(model, lens, recipe.length, narrow)
            if by_tokens(model, [data.prompt(0)])
            else StateLoss(model, lens)
        )

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
        own = self.data.own(window)
        if not own:
            return []
        count = max(1, round(self.recipe.share * len(own)))
        generator = np.random.default_rng([self.recipe.seed, 1, step, window, n])
        return sorted(int(own[i]) for i in generator.choice(len(own), count, replace=False))

    def tokens(self, step: int) -> int:
        """Tokens that a step takes, of all processes; a picture counts as one."""
        return sum(max(1, len(self.data.own(w))) for w in self._chosen(step))

    def _backward(self, step: int) -> torch.Tensor:
        """The gradients of the mean KL of a step, in ``p.grad``; returns it for each site, [sites] float64."""
        parameters = list(self.lens.maps.parameters())
        for p in parameters:
            p.grad = torch.zeros_like(p)
        mine = self.group.part(list(enumerate(self._chosen(step))))
        positions = [self._positions(w, step, n) for n, w in mine]
        kl, count = self._total(self.loss.backward([self.data.prompt(w) for _, w in mine], positions))
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.group.add(gradients)
        # The mean is taken of the maps' gradients, in float32: divided before, float16 would lose them.
        for gradient in gradients:
            gradient /= count
        return kl / count

    def _total(self, found: tuple[torch.Tensor, int]) -> tuple[torch.Tensor, int]:
        """Sums [sites], and of how many they are, over all processes."""
        both = torch.cat([found[0], torch.tensor([float(found[1])], dtype=torch.float64)])
        self.group.add([both])
        return both[:-1], round(float(both[-1]))

    def _validation_kl(self) -> torch.Tensor:
        """Mean KL of every site on the validation windows, [sites] float32."""
        mine = self.group.part(self.validation)
        prompts, own = [self.data.prompt(w) for w in mine], [list(self.data.own(w)) for w in mine]
        kl, count = self._total(self.loss.kl(prompts, own))
        return (kl / count).float()

    def _look(self, state: _State) -> None:
        """Keep of every site the map that is best on the validation windows so far."""
        kl = self._validation_kl()
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
    def key(self) -> dict[str, Any]:
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
        record = {"key": self.key, "file": file, "step": state.step, "stale": state.stale, "history": state.history}
        write_text(folder / STATE, json.dumps(record) + "\n")
        for old in folder.glob("fit-*.safetensors"):
            if old.name != file:
                old.unlink()

    def resumed(self, folder: Path) -> _State:
        """The state of the checkpoint in a folder, or a new one where there is none."""
        if not (check_folder(folder, STATE) / STATE).is_file():
            return self.start()
        record = read_record(folder / STATE)
        mine, its = self.key, record.get("key")
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
