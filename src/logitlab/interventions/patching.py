"""Activation patching: put states of one run into another, place by place, and see how much of the answer comes back.

A pair is a *clean* prompt, a *corrupted* one of as many tokens, and the answer. With ``denoising`` the corrupted run is
given clean states, which shows what suffices; with ``noising`` the clean run is given corrupted ones, which shows what
is needed. What is reported is the normalised recovery,

    (patched - corrupted) / (clean - corrupted)

of a metric at the last position: 0 where the answer is the corrupted run's, 1 where it is the clean one's (Heimersheim
and Nanda 2024, arXiv 2404.15255).

Many places are patched in one pass, one in each row of a batch. Blocks below a patched layer give what they gave in the
unpatched run, so a pass begins at the layer; and only the last position is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitlab.errors import InputError, LogitlabError, ModelError
from logitlab.interventions.apply import intervene
from logitlab.interventions.attention import Cut
from logitlab.interventions.intervention import Intervention
from logitlab.logits import Head, statistics
from logitlab.logits.rows import HeadRows
from logitlab.models.capture import Activations, by_tokens, capture_encoded, keys_of, select_positions
from logitlab.models.handle import Model
from logitlab.models.hooks import StopForward, Taps, hidden_input
from logitlab.models.inputs import Encoded, whole_number
from logitlab.models.output import output_of
from logitlab.models.passes import arguments_of, stopped
from logitlab.models.sites import Site
from logitlab.models.trace import copied, rebuilt
from logitlab.models.watch import Key, projection_of, watch
from logitlab.targets import resolve_targets

if TYPE_CHECKING:
    import xarray as xr

MODES = ("denoising", "noising")

Metric = Callable[[torch.Tensor], torch.Tensor]
"""From logits [n, V] at the last position to numbers [n]."""


@dataclass(frozen=True)
class Patching:
    """What patching has found.

    Attributes:
        sites: names of the sites, in order of depth.
        tokens: for each pair, labels of the tokens of the run that was patched.
        positions: for each pair, the positions that were patched.
        patched: [pairs, sites, positions] float64, the metric with that place patched; NaN where a pair has no such
            position.
        clean: [pairs] float64, the metric of the clean runs.
        corrupted: [pairs] float64, of the corrupted ones.
        about: mode, metric and model, as plain values.
    """

    sites: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    patched: NDArray[np.float64]
    clean: NDArray[np.float64]
    corrupted: NDArray[np.float64]
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def recovery(self) -> NDArray[np.float64]:
        """[pairs, sites, positions] float64, normalised; NaN for a pair whose runs do not differ in the metric."""
        base, gap = self.corrupted[:, None, None], (self.clean - self.corrupted)[:, None, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(gap == 0, np.nan, (self.patched - base) / gap)

    def data(self) -> xr.DataArray:
        """The recovery as a labelled array (pair, site, position)."""
        import xarray as xr

        names = ("pair", "site", "position")
        found = xr.DataArray(self.recovery, dims=names, name="recovery", attrs=dict(self.about))
        return found.assign_coords(pair=np.arange(len(self.clean)), site=list(self.sites))

    def figure(self, path: str | Path, *, pair: int | None = None) -> Path:
        """Write a heat map, sites by positions; of one pair, or of the mean over pairs of as many positions."""
        from logitlab.views.patching import save_figure

        return save_figure(self, path, pair=pair)


def patch(
    model: Model,
    clean: Any,
    corrupted: Any,
    answers: Any = None,
    *,
    sites: Any = None,
    positions: Any = None,
    mode: str = "denoising",
    metric: Metric | None = None,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Patching:
    """Patch every one of some sites and positions, each by itself.

    Args:
        model: the model.
        clean: one prompt, or several, in any form that `logitlab.read` takes.
        corrupted: as many prompts with as many tokens each; or interventions that corrupt the clean ones (noise on the
            embeddings of some tokens, say, for causal tracing).
        answers: for each pair the right and the wrong next token, ``(" Paris", " Rome")``: the metric is the difference
            of their logits, in nats. Or one token: its log-probability. One entry serves all pairs.
        sites: which sites, as in `logitlab.read`; by default the output of each block.
        positions: which positions, as in `logitlab.capture`; by default all.
        mode: ``denoising`` or ``noising``.
        metric: from the logits of the last position [n, V] to numbers [n], in place of ``answers``.
        batch: places that are patched in one pass.
        progress: called with the numbers of places done and in all.

    Raises:
        InputError: the prompts of a pair have other numbers of tokens, or an argument cannot be used.

    Example:
        ``patch(model, "Paris is in", "Rome is in", (" France", " Italy")).figure("patching.png")``
    """
    if mode not in MODES:
        raise InputError(f"mode is {mode!r}; it is one of {', '.join(MODES)}")
    if whole_number(batch, "batch") < 1:
        raise InputError(f"batch is {batch}; it must be at least 1")
    if (answers is None) == (metric is None):
        raise InputError("give answers=, or a metric=, and not both")
    noise = _interventions(corrupted)
    good = model.encode(clean)
    bad = good if noise else model.encode(corrupted)
    if not by_tokens(model, good):
        raise InputError(f"{model.name} is not read token by token: it cannot be patched by positions")
    if len(good) != len(bad):
        raise InputError(f"there are {len(good)} clean prompts and {len(bad)} corrupted ones: give as many")
    for n, (one, other) in enumerate(zip(good, bad, strict=True)):
        if len(one.ids) != len(other.ids):
            raise InputError(
                f"pair {n}: the clean prompt has {len(one.ids)} tokens and the corrupted one {len(other.ids)}: where "
                "a state belongs can only be told if they have as many"
            )
    measures = _measures(model, answers, metric, len(good))
    chosen = model.select_sites("resid_post" if sites is None else sites)
    noisy = [site for item in noise if isinstance(item, Intervention) for site, _ in item.at(model)]
    changed = {(site.layer, site.kind) for site in noisy}
    twice = next((s for s in chosen if s.index is not None and (s.layer, s.kind) in changed), None)
    if twice is not None:
        raise InputError(f"{twice} is corrupted and patched: heads and neurons of one layer cannot be both")
    places = [select_positions(positions, len(p.ids), n) for n, p in enumerate(good)]
    total, done = sum(len(p) for p in places) * len(chosen), 0
    wide = max(map(len, places))
    patched = np.full((len(good), len(chosen), wide), np.nan)
    ends: list[tuple[float, float]] = []
    for n, (one, other) in enumerate(zip(good, bad, strict=True)):
        work = _Pair(model, one, other, noise, mode, measures[n], chosen, batch)
        ends.append(work.ends)
        for cells, values in work.run(places[n]):
            for (site, slot), value in zip(cells, values, strict=True):
                patched[n, site, slot] = value
            done += len(cells)
            if progress is not None:
                progress(done, total)
    labels = [model.vocabulary.labels((p if mode == "noising" else q).ids) for p, q in zip(good, bad, strict=True)]
    return Patching(
        tuple(map(str, chosen)),
        tuple(map(tuple, labels)),
        tuple(map(tuple, places)),
        patched,
        np.array([c for c, _ in ends]),
        np.array([c for _, c in ends]),
        {"model": model.name, "fingerprint": model.fingerprint, "mode": mode, "metric": _named(answers, metric)},
    )


def _named(answers: Any, metric: Metric | None) -> str:
    if metric is not None:
        return getattr(metric, "__name__", "a metric")
    first = answers[0] if isinstance(answers, list) and answers else answers
    return "log-probability, nats" if isinstance(first, str | int) else "difference of logits, nats"


def _interventions(corrupted: Any) -> list[Intervention | Cut]:
    many: list[Any] = list(corrupted) if isinstance(corrupted, list | tuple) else [corrupted]
    changes = [item for item in many if isinstance(item, Intervention | Cut)]
    if changes and len(changes) < len(many):
        raise InputError("corrupted= holds interventions and prompts: give one or the other")
    return changes


# -- metrics -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measure:
    """What is measured at the last position."""

    ids: tuple[int, ...]
    metric: Metric | None = None

    def of(self, model: Model, given: torch.Tensor, *, logits: bool) -> list[float]:
        """Of rows [n, d] that the head is given, or of logits [n, V]."""
        source = model.tail.source
        if self.metric is not None or logits:
            z = given if logits else source.logits(given) if isinstance(source, Head) else source.compute(given)
            if self.metric is not None:
                found: Any = self.metric(z.float())
                if not isinstance(found, torch.Tensor) or found.shape != (len(given),):
                    raise InputError(f"the metric gives no tensor of shape [{len(given)}]")
                return found.double().tolist()
            z = z.double()
            if len(self.ids) == 1:
                return z.log_softmax(-1)[:, self.ids[0]].tolist()
            return (z[:, self.ids[0]] - z[:, self.ids[1]]).tolist()
        assert isinstance(source, Head)
        targets = torch.tensor(self.ids)
        if len(self.ids) == 2:
            rows = HeadRows(given, source)
            z = rows.at_all(targets.to(given.device).expand(len(given), -1))
            return (z[:, 0] - z[:, 1]).tolist()
        found = statistics(given.unsqueeze(0), source, top_k=1, targets=targets, entropy=False)
        assert found.target_logprob is not None
        return found.target_logprob[0, :, 0].tolist()


def _measures(model: Model, answers: Any, metric: Metric | None, pairs: int) -> list[_Measure]:
    if metric is not None:
        return [_Measure((), metric)] * pairs
    many: list[Any] = list(answers) if isinstance(answers, list) else [answers] * pairs
    if len(many) != pairs:
        raise InputError(f"there are {len(many)} answers for {pairs} pairs: give one for each, or one for all")
    found: list[_Measure] = []
    for n, answer in enumerate(many):
        named = list(answer) if isinstance(answer, tuple) else [answer]
        if not 1 <= len(named) <= 2:
            raise InputError(f"answer {n} has {len(named)} tokens: give the right one, or (right, wrong)")
        ids = tuple(target.id for token in named for target in resolve_targets(model, token))
        if len(set(ids)) != len(named):
            raise InputError(f"answer {n}: the right and the wrong token are the same")
        found.append(_Measure(ids))
    return found


# -- one pair ----------------------------------------------------------------------------------


class _Pair:
    """Patches one pair."""

    def __init__(
        self,
        model: Model,
        clean: Encoded,
        corrupted: Encoded,
        noise: Sequence[Intervention | Cut],
        mode: str,
        measure: _Measure,
        sites: Sequence[Site],
        batch: int,
    ) -> None:
        self.model, self.measure, self.sites = model, measure, sites
        self.batch = 1 if clean.extra else batch  # pictures and sounds are not repeated for each row
        denoising = mode == "denoising"
        self.base = corrupted if denoising else clean
        self.noise = noise if denoising else ()
        self._outputs: list[Any] = []
        self._short = self._can_answer
        every = [list(range(len(clean.ids)))]
        keys_of(model, sites)
        other = clean if denoising else corrupted
        with ExitStack() as stack:
            if noise and not denoising:
                stack.enter_context(intervene(model, noise))
            self.source: Activations = capture_encoded(model, [other], sites, every, share=False)
            theirs = self._pass([other], None)[0]
        with ExitStack() as stack:
            if self.noise:
                stack.enter_context(intervene(model, self.noise))
            mine = self._pass([self.base], self._recording)[0]
            self._short = self._can_answer and self._proved(mine)
        self.ends = (theirs, mine) if denoising else (mine, theirs)

    def run(self, positions: Sequence[int]) -> Iterator[tuple[list[tuple[int, int]], list[float]]]:
        """Numbers of sites and positions, and the metric with each patched, some at a time."""
        by_layer = groupby(range(len(self.sites)), key=lambda i: self._first_block(self.sites[i]))
        for first, group in by_layer:
            cells = [(i, slot) for i in group for slot in range(len(positions))]
            for start in range(0, len(cells), self.batch):
                some = cells[start : start + self.batch]
                with ExitStack() as stack:
                    if self.noise:
                        stack.enter_context(intervene(self.model, self.noise))
                    places = [(self.sites[i], positions[slot]) for i, slot in some]
                    values = self._pass([self.base] * len(some), partial(self._patch, cells=places, first=first))
                yield some, values

    def _first_block(self, site: Site) -> int:
        """The first block that has to run: what is before it is as in the unpatched run."""
        return site.layer + (site.kind == "resid_post")

    @property
    def _can_answer(self) -> bool:
        """Whether blocks can answer from the record: each module is one of them, states are [batch, tokens, width]."""
        stack = self.model.stack
        return len({id(b.module) for b in stack.blocks}) == len(stack) and stack.layout.order == (0, 1, 2)

    def _proved(self, expected: float) -> bool:
        """Whether a pass whose first half answers from the record ends as the whole one: blocks may share more."""
        rows, blocks = min(2, self.batch), len(self.model.stack)
        found: list[float] = []
        try:
            for first in {(blocks + 1) // 2, blocks - 1, blocks}:
                found += self._pass([self.base] * rows, partial(self._patch, cells=[], first=first, count=rows))
        except LogitlabError:
            return False
        return all(abs(value - expected) <= 1e-3 * (1 + abs(expected)) for value in found)

    def _recording(self, taps: Taps) -> None:
        def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self._outputs.append(copied(output))

        if self._can_answer:
            for block in self.model.stack.blocks:
                taps.after(block.module, note)

    def _patch(self, taps: Taps, cells: list[tuple[Site, int]], first: int, count: int | None = None) -> None:
        """Hooks of a pass in whose row ``i`` the ``i``-th place is patched; blocks before ``first`` do not run."""
        count = len(cells) if count is None else count
        places: dict[Key, list[tuple[int, int, Site]]] = {}
        for row, (site, position) in enumerate(cells):
            places.setdefault((site.layer, site.kind), []).append((row, position, site))
        given = {key for key in places if key[1] == "resid_post" and key[0] < first} if self._short else set[Key]()
        if self._short:
            for layer in range(min(first, len(self.model.stack))):
                here = places.get((layer, "resid_post"), []) if (layer, "resid_post") in given else []
                taps.replace(self.model.stack.blocks[layer].module, self._answer(layer, count, here))

        def edit(key: Key, value: torch.Tensor, scale: float = 1.0, inner: torch.Tensor | None = None) -> Any:
            layout = self.model.stack.layout
            resid = key[1] in ("resid_pre", "resid_post")
            rows = (layout.rows(value) if resid else value.reshape(-1, value.shape[-1])).clone()
            self._exchange(rows.reshape(count, -1, rows.shape[-1]), key, places[key], scale, inner)
            return layout.state(rows, value.shape) if resid else rows.reshape(value.shape)

        watch(self.model, [key for key in places if key not in given], edit, taps, edit=True)

    def _answer(self, layer: int, count: int, here: list[tuple[int, int, Site]]) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            def many(value: Any) -> Any:
                if isinstance(value, torch.Tensor):
                    return value.expand(count, *value.shape[1:]).clone() if value.shape[:1] == (1,) else value
                return rebuilt(value, many)

            output = many(self._outputs[layer])
            state = output if isinstance(output, torch.Tensor) else next(t for t in _tensors(output))
            self._exchange(state, (layer, "resid_post"), here, 1.0, None)
            return output

        return answer

    def _exchange(
        self,
        states: torch.Tensor,
        key: Key,
        here: list[tuple[int, int, Site]],
        scale: float,
        inner: torch.Tensor | None,
    ) -> None:
        """Put the other run's states into states [rows, tokens, width], in place."""
        for row, position, site in here:
            theirs = self.source.stacked([site])[0, position].to(states.device)
            if site.index is None:
                states[row, position] = (theirs / scale).to(states.dtype)
                continue
            part = projection_of(self.model, key)
            assert part is not None
            assert inner is not None
            given = inner.reshape(states.shape[0], states.shape[1], -1)[row, position].unsqueeze(0)
            own = part.expand(given, [site.index])[0, 0]
            states[row, position] += ((theirs - own) / part.scale).to(states.dtype)

    def _pass(self, prompts: Sequence[Encoded], hooks: Callable[[Taps], None] | None) -> list[float]:
        """The metric of every row of one pass."""
        model, head = self.model, self.model.tail.head_module
        seen: list[torch.Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            given = hidden_input(args, kwargs)
            if given is not None:
                seen.append(given)
            raise StopForward

        with model.exclusive(), Taps() as taps:
            if hooks is not None:
                hooks(taps)
            if head is not None:
                taps.replace(head, stop)
            inputs = arguments_of(model, prompts)
            if model.takes("use_cache"):
                inputs["use_cache"] = False
            result: Any = None
            try:
                with suppress(StopForward), torch.no_grad():
                    result = model.module(**inputs)
            except LogitlabError:
                raise
            except Exception as error:  # a model's own code can raise anything
                raise stopped(model, inputs, error) from error
        if head is None:
            output = output_of(result)
            if output is None:
                raise ModelError(f"{model.name} returned no logits")
            seen.append(output.logits)
        rows = seen[-1].reshape(len(prompts), len(prompts[0].ids), -1)[:, -1].detach()
        return self.measure.of(model, rows, logits=head is None)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    items: Any = value.values() if hasattr(value, "values") else value
    for item in items:
        if isinstance(item, torch.Tensor) and item.is_floating_point():
            yield item
