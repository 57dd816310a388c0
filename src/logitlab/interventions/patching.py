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
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitlab.errors import InputError
from logitlab.interventions.apply import intervene
from logitlab.interventions.attention import Cut
from logitlab.interventions.intervention import Intervention
from logitlab.interventions.metric import Measure, Metric, measures_of, name_of, recovered
from logitlab.interventions.rerun import Rerun, measured
from logitlab.models.capture import Activations, by_tokens, capture_encoded, keys_of, select_positions
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded, whole_number
from logitlab.models.sites import Site
from logitlab.models.watch import Key, projection_of

if TYPE_CHECKING:
    import xarray as xr

MODES = ("denoising", "noising")


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
        return recovered(self.patched, self.clean, self.corrupted)

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
    check_options(mode, batch)
    noise = interventions_in(corrupted)
    good, bad = pairs_of(model, clean, clean if noise else corrupted)
    measures = measures_of(model, answers, metric, len(good))
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
        {"model": model.name, "fingerprint": model.fingerprint, "mode": mode, "metric": name_of(answers, metric)},
    )


def check_options(mode: str, batch: int) -> None:
    """Raise `InputError` if there is no such mode, or nothing would be patched in a pass."""
    if mode not in MODES:
        raise InputError(f"mode is {mode!r}; it is one of {', '.join(MODES)}")
    if whole_number(batch, "batch") < 1:
        raise InputError(f"batch is {batch}; it must be at least 1")


def pairs_of(model: Model, clean: Any, corrupted: Any) -> tuple[list[Encoded], list[Encoded]]:
    """Clean and corrupted prompts, as many of both, and as many tokens in both of a pair.

    Raises:
        InputError: they are not like that, or the model is not read token by token.
    """
    good = model.encode(clean)
    bad = good if corrupted is clean else model.encode(corrupted)
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
    return good, bad


def interventions_in(corrupted: Any) -> list[Intervention | Cut]:
    """The interventions that are given in the place of corrupted prompts; none where prompts are.

    Raises:
        InputError: there are both.
    """
    many: list[Any] = list(corrupted) if isinstance(corrupted, list | tuple) else [corrupted]
    changes = [item for item in many if isinstance(item, Intervention | Cut)]
    if changes and len(changes) < len(many):
        raise InputError("corrupted= holds interventions and prompts: give one or the other")
    return changes


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
        measure: Measure,
        sites: Sequence[Site],
        batch: int,
    ) -> None:
        self.model, self.sites = model, sites
        denoising = mode == "denoising"
        base, other = (corrupted, clean) if denoising else (clean, corrupted)
        every = [list(range(len(clean.ids)))]
        keys_of(model, sites)
        with ExitStack() as stack:
            if noise and not denoising:
                stack.enter_context(intervene(model, noise))
            self.source: Activations = capture_encoded(model, [other], sites, every, share=False)
            theirs = measured(model, [other], measure)[0]
        self.rerun = Rerun(model, base, measure, batch, noise if denoising else ())
        self.ends = (theirs, self.rerun.value) if denoising else (self.rerun.value, theirs)

    def run(self, positions: Sequence[int]) -> Iterator[tuple[list[tuple[int, int]], list[float]]]:
        """Numbers of sites and positions, and the metric with each patched, some at a time."""
        by_layer = groupby(range(len(self.sites)), key=lambda i: self._first_block(self.sites[i]))
        for first, group in by_layer:
            cells = [(i, slot) for i in group for slot in range(len(positions))]
            for start in range(0, len(cells), self.rerun.rows):
                some = cells[start : start + self.rerun.rows]
                places: dict[Key, list[tuple[int, int, Site]]] = {}
                for row, (i, slot) in enumerate(some):
                    site = self.sites[i]
                    places.setdefault((site.layer, site.kind), []).append((row, positions[slot], site))
                edits = {key: partial(self._exchange, key, here) for key, here in places.items()}
                yield some, self.rerun.values(len(some), first, edits)

    def _first_block(self, site: Site) -> int:
        """The first block that has to run: what is before it is as in the unpatched run."""
        return site.layer + (site.kind == "resid_post")

    def _exchange(
        self,
        key: Key,
        here: list[tuple[int, int, Site]],
        states: torch.Tensor,
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
            own = part.expand(inner[row, position].unsqueeze(0), [site.index])[0, 0]
            states[row, position] += ((theirs - own) / part.scale).to(states.dtype)
