"""Path patching: how much of the answer goes from one component to another one directly, and from there on.

`patch` changes a component and lets everything after it follow. Here a *sender* s is changed for one *receiver* r
alone, so that what is measured is one edge of the computation (Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et
al. 2023, arXiv 2304.05969). The residual stream is a sum, so that what s passes on to r without a detour is

    delta = s in the other run - s in the base run

and an edge is measured in two passes over the base prompt:

1. r is computed with ``delta`` added to the stream that its block reads, and nothing else changed: what lies between s
   and r stays as it is in the base run.
2. r is replaced by that value, and everything after it follows.

The base run is the corrupted one with ``denoising`` and the clean one with ``noising``. What is reported is the
normalised recovery, as in `logitlab.interventions.patching`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitlab.errors import InputError
from logitlab.interventions.metric import Measure, Metric, measures_of, name_of, recovered
from logitlab.interventions.patching import check_options, interventions_in, pairs_of
from logitlab.interventions.rerun import Edit, Rerun, measured
from logitlab.models.capture import capture_encoded, keys_of, select_positions
from logitlab.models.handle import Model
from logitlab.models.hooks import StopForward, Taps
from logitlab.models.inputs import Encoded
from logitlab.models.sites import Site
from logitlab.models.watch import Key, projection_of, watch

if TYPE_CHECKING:
    import xarray as xr

STREAM = ("resid_pre", "resid_post")
"""Kinds that are the residual stream itself, and not something that is added to it."""

_WHOLE = {"head_out": "attn_out", "neuron": "mlp_out"}

_NOTICEABLE = 1e-4  # by how much, in parts of its size, a component has to change before it counts as changed


@dataclass(frozen=True)
class Paths:
    """What path patching has found.

    Attributes:
        senders: names of the senders, in order of depth.
        receivers: names of the receivers, in order of depth.
        patched: [pairs, senders, receivers] float64, the metric with that edge patched; NaN where there is no edge.
        clean: [pairs] float64, the metric of the clean runs.
        corrupted: [pairs] float64, of the corrupted ones.
        about: mode, metric, positions (of the senders, for each pair) and model, as plain values.
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    patched: NDArray[np.float64]
    clean: NDArray[np.float64]
    corrupted: NDArray[np.float64]
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def recovery(self) -> NDArray[np.float64]:
        """[pairs, senders, receivers] float64, normalised: 0 is the corrupted run's answer and 1 the clean one's.

        NaN where there is no edge, and for a pair whose runs do not differ in the metric.
        """
        return recovered(self.patched, self.clean, self.corrupted)

    def data(self) -> xr.DataArray:
        """The recovery as a labelled array (pair, sender, receiver)."""
        import xarray as xr

        names = ("pair", "sender", "receiver")
        found = xr.DataArray(self.recovery, dims=names, name="recovery", attrs=dict(self.about))
        return found.assign_coords(
            pair=np.arange(len(self.clean)), sender=list(self.senders), receiver=list(self.receivers)
        )

    def figure(self, path: str | Path, *, pair: int | None = None) -> Path:
        """Write a heat map, senders by receivers; of one pair, or of the mean over pairs.

        Raises:
            InputError: another ending than .png, .svg or .pdf, no such pair, no Matplotlib, or it cannot be written.
        """
        from logitlab.views.patching import save_paths

        return save_paths(self, path, pair=pair)


def patch_paths(
    model: Model,
    clean: Any,
    corrupted: Any,
    answers: Any = None,
    *,
    senders: Any,
    receivers: Any,
    positions: Any = None,
    mode: str = "denoising",
    metric: Metric | None = None,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Paths:
    """Patch every edge from some sites to some others, each by itself.

    An edge is the *direct* path. At ``resid_pre`` and ``resid_post`` a sender is the whole stream up to there, and a
    receiver the whole stream from there on; so the last block's ``resid_post`` as a receiver shows what a sender does
    to the answer by itself. A receiver's state is replaced at all positions.

    Edges that do not exist are NaN: those to what is not after the sender, and within a block those to what does not
    read it. The latter is found out on the model: where attention and MLP stand side by side, neither reads the other.

    It takes a pass that ends in the receiver's block for ``batch`` senders, and a row of a pass from there on for each
    edge. What is kept in memory at a time are states of ``batch`` rows of the prompt and, of both runs, those at the
    senders: a smaller ``batch`` takes less, and longer.

    Args:
        model: the model.
        clean: one prompt, or several, in any form that `logitlab.read` takes.
        corrupted: as many prompts with as many tokens each.
        answers: what is measured, as in `logitlab.interventions.patch`.
        senders: which sites, as in `logitlab.read`.
        receivers: which sites.
        positions: at which positions senders are changed, as in `logitlab.capture`; by default at all.
        mode: ``denoising`` or ``noising``.
        metric: from the logits of the last position [n, V] to numbers [n], in place of ``answers``.
        batch: most rows of a pass.
        progress: called with the numbers of edges done and in all.

    Raises:
        InputError: no sender is below a receiver, the stream between two of them was not verified to be a sum, the
            prompts of a pair have other numbers of tokens, or an argument cannot be used.

    Example:
        ``patch_paths(model, "Paris is in", "Rome is in", (" France", " Italy"), senders="head_out",
        receivers="-1.resid_post").recovery`` is what each head does to the answer by itself, [1, heads, 1]
    """
    check_options(mode, batch)
    if interventions_in(corrupted):
        raise InputError("corrupted= is an intervention: path patching needs the corrupted prompts themselves")
    good, bad = pairs_of(model, clean, corrupted)
    measures = measures_of(model, answers, metric, len(good))
    givers, takers = _named(model, senders, "senders"), _named(model, receivers, "receivers")
    places = [select_positions(positions, len(p.ids), n) for n, p in enumerate(good)]
    patched = np.full((len(good), len(givers), len(takers)), np.nan)
    ends: list[tuple[float, float]] = []
    edges: NDArray[np.bool_] | None = None
    done = 0
    for n, (one, other) in enumerate(zip(good, bad, strict=True)):
        base, source = (one, other) if mode == "noising" else (other, one)
        work = _Pair(model, base, source, measures[n], givers, takers, batch)
        if edges is None:
            edges = work.edges()
            _check_sum(model, givers, takers, edges)
        ends.append((work.mine, work.theirs) if mode == "noising" else (work.theirs, work.mine))
        for cells, values in work.run(places[n], edges):
            for (sender, receiver), value in zip(cells, values, strict=True):
                patched[n, sender, receiver] = value
            done += len(cells)
            if progress is not None:
                progress(done, int(edges.sum()) * len(good))
    about = {"model": model.name, "fingerprint": model.fingerprint, "mode": mode, "metric": name_of(answers, metric)}
    return Paths(
        tuple(map(str, givers)),
        tuple(map(str, takers)),
        patched,
        np.array([c for c, _ in ends]),
        np.array([c for _, c in ends]),
        {**about, "positions": places},
    )


def _named(model: Model, sites: Any, what: str) -> list[Site]:
    if sites is None:
        raise InputError(f"{what}= is None: name their sites, for instance '3.mlp_out'")
    return model.select_sites(sites)


# -- which edges there are ---------------------------------------------------------------------


def _whole(site: Site) -> Key:
    """The layer and kind of a site; for a head or neuron, of what it is a part of."""
    return site.layer, _WHOLE.get(site.kind, site.kind)


def _state(site: Site, *, reads: bool) -> int:
    """Which state of the stream a site reads, or writes: ``n`` is the one that enters block ``n``."""
    if site.kind in STREAM:
        return site.layer + (site.kind == "resid_post")
    return site.layer + (not reads)


def _check_sum(model: Model, senders: Sequence[Site], receivers: Sequence[Site], edges: NDArray[np.bool_]) -> None:
    """Raise `InputError` unless there are edges, and the stream along all of them is a sum that was verified."""
    if not edges.any():
        raise InputError(
            f"no sender is below a receiver: nothing goes from {senders[0]}{' ...' if len(senders) > 1 else ''} to "
            f"{receivers[0]}{' ...' if len(receivers) > 1 else ''} directly"
        )
    if not model.stack.continuous:
        raise InputError(
            f"blocks of {model.stack.name} are not given what the one before returns: what a sender adds cannot be "
            "followed to a receiver"
        )
    for i, j in np.argwhere(edges):
        for layer in range(_state(senders[i], reads=False), _state(receivers[j], reads=True)):
            if not model.parts[layer].components:
                why = model.parts[layer].reasons.get("attn_out", "not found")
                raise InputError(
                    f"{senders[i]} has no direct path to {receivers[j]}: what layer {layer} of {model.name} adds to "
                    f"the stream is not known: {why}"
                )


# -- one pair ----------------------------------------------------------------------------------


class _Pair:
    """Patches the edges of one pair."""

    def __init__(
        self,
        model: Model,
        base: Encoded,
        other: Encoded,
        measure: Measure,
        senders: Sequence[Site],
        receivers: Sequence[Site],
        batch: int,
    ) -> None:
        self.model, self.senders, self.receivers = model, senders, receivers
        every = [list(range(len(base.ids)))]
        keys = [key for key in keys_of(model, receivers) if key[1] not in STREAM]
        layers = dict.fromkeys(layer for layer, _ in keys)
        keys += [(layer, kind) for layer in layers for kind in model.parts[layer].components]
        self._captured = [capture_encoded(model, [p], senders, every, share=False) for p in (base, other)]
        self.theirs = measured(model, [other], measure)[0]
        self._recorded: dict[Key, torch.Tensor] = {}  # [tokens, size], as in memory

        def keep(key: Key, value: torch.Tensor, scale: float = 1.0) -> None:
            self._recorded[key] = value.detach().reshape(-1, value.shape[-1]).clone()

        def record(taps: Taps) -> None:
            watch(model, list(dict.fromkeys(keys)), keep, taps)

        self.rerun = Rerun(model, base, measure, batch, recording=record)
        self.mine = self.rerun.value

    # -- edges ---------------------------------------------------------------------------------

    def edges(self) -> NDArray[np.bool_]:
        """[senders, receivers], whether a receiver reads what a sender writes."""
        known: dict[tuple[int, str, str], bool] = {}
        found = np.zeros((len(self.senders), len(self.receivers)), dtype=np.bool_)
        for i, sender in enumerate(self.senders):
            for j, receiver in enumerate(self.receivers):
                found[i, j] = _state(sender, reads=False) <= _state(receiver, reads=True)
                (layer, source), (other, target) = _whole(sender), _whole(receiver)
                parts = source not in STREAM and target not in STREAM
                if parts and layer == other and source != target:
                    if (layer, source, target) not in known:
                        known[layer, source, target] = self._feeds(layer, source, target)
                    found[i, j] = known[layer, source, target]
        return found

    def _feeds(self, layer: int, source: str, target: str) -> bool:
        """Whether one component of a block changes with another one."""
        before = self._recorded[layer, target]
        size, gap = 1.0, 0.0

        def enter(states: torch.Tensor, scale: float, inner: torch.Tensor | None) -> None:
            nonlocal size
            size = float(states.float().std())

        def shake(states: torch.Tensor, scale: float, inner: torch.Tensor | None) -> None:
            noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(3))
            states += noise.to(states) * size / scale

        def look(states: torch.Tensor, scale: float, inner: torch.Tensor | None) -> None:
            nonlocal gap
            gap = float((states[0] - before).abs().max())
            raise StopForward

        edits: dict[Key, Edit] = {(layer, "resid_pre"): enter, (layer, source): shake, (layer, target): look}
        self.rerun.run(1, layer, edits)
        return gap > _NOTICEABLE * float(before.abs().max())

    # -- patching ------------------------------------------------------------------------------

    def run(
        self, positions: Sequence[int], edges: NDArray[np.bool_]
    ) -> Iterator[tuple[list[tuple[int, int]], list[float]]]:
        """Numbers of senders and receivers, and the metric with each edge patched, some at a time."""
        order = sorted(range(len(self.receivers)), key=lambda j: _whole(self.receivers[j]))
        for target, some in groupby(order, key=lambda j: _whole(self.receivers[j])):
            group = list(some)  # they have the same senders
            reading = [int(i) for i in np.flatnonzero(edges[:, group[0]])]
            for start in range(0, len(reading), self.rerun.rows):
                chunk = reading[start : start + self.rerun.rows]
                deltas = self._deltas(chunk, positions)
                received = {} if target[1] in STREAM else self._received(target, group, chunk, deltas)
                cells = [(row, j) for j in group for row in range(len(chunk))]
                for first in range(0, len(cells), self.rerun.rows):
                    now = cells[first : first + self.rerun.rows]
                    yield [(chunk[row], j) for row, j in now], self._answers(target, now, deltas, received)

    def _deltas(self, chunk: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """By how much senders differ between the runs, [senders, tokens, width]; 0 where they are not changed."""
        found: list[torch.Tensor] = []
        for key, some in groupby((self.senders[i] for i in chunk), key=lambda s: (s.layer, s.kind)):
            indices = [site.index for site in some]
            mine, theirs = (kept.kept[key].double() for kept in self._captured)
            moved = theirs - mine  # so fine that added to the one it gives the other
            part = projection_of(self.model, key)
            if part is not None:  # linear, so that the difference may go through it
                moved = part.expand(moved, [i for i in indices if i is not None]).transpose(0, 1)
            found.append(moved.reshape(len(indices), -1, self.model.width))
        whole = torch.cat([d.to(found[0].device, torch.float64) for d in found])
        deltas = torch.zeros_like(whole)
        deltas[:, list(positions)] = whole[:, list(positions)]
        return deltas

    def _received(
        self, target: Key, group: Sequence[int], chunk: Sequence[int], deltas: torch.Tensor
    ) -> dict[Key, torch.Tensor]:
        """What receivers of one component become, a row for each sender.

        By key of the receivers: states [senders, tokens, width]; for heads and neurons what their projection is given,
        [senders, tokens, inputs].
        """
        layer, kind = target
        wanted = {(layer, self.receivers[j].kind) for j in group}
        found: dict[Key, torch.Tensor] = {}
        inside = {  # rows whose sender is another part of the same block
            other: [row for row, i in enumerate(chunk) if _whole(self.senders[i]) == (layer, other)]
            for other in self.model.parts[layer].components
            if other != kind
        }
        below = [row for row in range(len(chunk)) if not any(row in rows for rows in inside.values())]

        def enter(states: torch.Tensor, scale: float, inner: torch.Tensor | None) -> None:
            _add(states, below, deltas[below])

        def hold(other: str, states: torch.Tensor, scale: float, inner: torch.Tensor | None) -> None:
            states[:] = self._recorded[layer, other].to(states.device)
            _add(states, inside[other], deltas[inside[other]] / scale)

        def look(key: Key, states: torch.Tensor, scale: float, inner: torch.Tensor | None) -> None:
            found[key] = (states if inner is None else inner).detach().clone()
            if len(found) == len(wanted):
                raise StopForward

        edits: dict[Key, Edit] = {(layer, "resid_pre"): enter}
        edits |= {(layer, other): partial(hold, other) for other in inside}
        edits |= {key: partial(look, key) for key in wanted}
        self.rerun.run(len(chunk), layer, edits)
        return found

    def _answers(
        self, target: Key, cells: Sequence[tuple[int, int]], deltas: torch.Tensor, received: dict[Key, torch.Tensor]
    ) -> list[float]:
        """The metric with receivers as senders make them, for each (row of the senders, number of the receiver)."""
        layer = target[0]
        places: dict[Key, list[tuple[int, int, int | None]]] = {}
        for row, (sender, j) in enumerate(cells):
            site = self.receivers[j]
            places.setdefault((layer, site.kind), []).append((row, sender, site.index))

        def add_stream(
            here: list[tuple[int, int, int | None]], states: torch.Tensor, scale: float, inner: torch.Tensor | None
        ) -> None:
            _add(states, [row for row, _, _ in here], deltas[[sender for _, sender, _ in here]])

        def put(
            key: Key,
            here: list[tuple[int, int, int | None]],
            states: torch.Tensor,
            scale: float,
            inner: torch.Tensor | None,
        ) -> None:
            part = projection_of(self.model, key)
            if part is None:
                states[[row for row, _, _ in here]] = received[key][[sender for _, sender, _ in here]]
                return
            matrix, before = part.matrix(), self._recorded[key]
            size = before.shape[-1] // part.parts
            for index, some in groupby(here, key=lambda place: place[2]):
                assert index is not None
                own, many = slice(index * size, (index + 1) * size), list(some)
                moved = received[key][[sender for _, sender, _ in many]][..., own].float() - before[:, own].float()
                _add(states, [row for row, _, _ in many], moved @ matrix[own].to(moved.device) / part.scale)

        edits: dict[Key, Edit] = {
            key: partial(add_stream, here) if key[1] in STREAM else partial(put, key, here)
            for key, here in places.items()
        }
        return self.rerun.values(len(cells), layer + (target[1] == "resid_post"), edits)


def _add(states: torch.Tensor, rows: Sequence[int], moved: torch.Tensor) -> None:
    """Add [rows, tokens, width] to some rows of states, in place."""
    if rows:
        states[list(rows)] = (states[list(rows)].double() + moved.to(states.device)).to(states.dtype)
