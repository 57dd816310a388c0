"""Probes at many sites: how well they do on groups that they were not fitted on, beside their controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitlab.errors import InputError
from logitlab.models.capture import Activations, by_tokens, capture_encoded, select_positions
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded, whole_number
from logitlab.models.interfere import described
from logitlab.probes import chance
from logitlab.probes.kinds import CLOSED, fitted, options_of
from logitlab.probes.labels import BATCH, Codes, Matrix, label_codes, set_codes
from logitlab.probes.moments import Moments
from logitlab.probes.report import ProbeReport
from logitlab.probes.splits import Split, split
from logitlab.probes.states import Held, States, file_states, key_of

Progress = Callable[[int, int], None]


def probe(
    model: Model,
    inputs: Any,
    labels: Any,
    *,
    groups: Any = None,
    types: Any = None,
    sites: Any = None,
    position: int | Sequence[int] = -1,
    kind: str = "logistic",
    folds: int | float = 5,
    top_k: int = 1,
    classes: Sequence[Any] | None = None,
    unseen: str = "refuse",
    control: bool = True,
    permutations: int = 0,
    resamples: int = 1000,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ProbeReport:
    """Capture one state of each prompt at some sites, and see what a probe can tell from them.

    Args:
        model: the model.
        inputs: prompts in any form that `logitlab.read` takes.
        labels: what is to be told, one a prompt: texts, whole numbers, truth values.
        groups: one entry a prompt; prompts of one group are never on both sides of a split. By default prompts with
            the same tokens are a group.
        types: one entry a prompt: what the control task gives one label (Hewitt and Liang 2019), words for instance. By
            default the groups, of which a probe is held out on all; then the control is at chance by construction,
            and says nothing about memorising.
        sites: which sites, as in `logitlab.read`; by default the residual stream.
        position: which token of each prompt, a number or one a prompt; negative numbers count from the end.
        kind: ``logistic``, ``ridge``, ``lda``, ``mean-difference`` or ``mlp``.
        folds: in how many parts the groups are put, each of which is held out once; or the share that is held out.
        top_k: a row counts as right if its label is among as many first ones.
        classes: all classes; by default the labels that there are.
        unseen: what is done where a label is missing from a training part: ``refuse``, or ``count`` the rows as wrong.
        control: whether the control task is run.
        permutations: how often the labels are permuted, split and fitted again, for a p-value. Where each group has
            one label, labels move among groups; else those of whole groups move among groups of as many rows, or,
            where that changes too little, labels move within groups. The report's ``about["permuted"]`` says which;
            p is NaN where none can be done.
        resamples: bootstrap resamples of the intervals.
        seed: of splits, control labels, permutations, resamples and fits.
        folder: write the states into a file there, and read one site at a time: memory does not grow with prompts
            times sites. A run that was broken off goes on; the file is left for others.
        progress: called with the numbers of prompts captured and sites probed, and of both in all.
        options: of the kind, as in `fit_probe`.

    Raises:
        InputError: the model is not read token by token, a position is beyond a prompt, there are other numbers of
            labels than prompts, one class only, fewer groups than folds, a label that is not in a training part, states
            that are NaN, or an argument cannot be used; or ``folder`` is given while the model is being changed.

    Example:
        ``probe(model, ["I love it", "I hate it", ...], ["good", "bad", ...], kind="lda").best``
    """
    prompts = model.encode(inputs)
    if not by_tokens(model, prompts):
        raise InputError(f"probe() is for models that are read token by token; {model.name} is not")
    places = _places(position, prompts)
    chosen = model.select_sites(sites)
    plan = _Plan(
        len(prompts), labels, groups, types, classes, unseen, kind, folds, top_k, control, permutations, resamples,
        seed, options, lambda: set_codes([key_of(p) for p in prompts], len(prompts), "inputs"),
    )  # fmt: skip
    total = len(prompts) + len(chosen)

    def captured(done: int) -> None:
        if progress is not None:
            progress(done, total)

    changes = described(model.module)
    about = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "position": position if isinstance(position, int) else places,
        **({"interventions": changes} if changes else {}),
    }
    if folder is not None:
        if changes:
            raise InputError("folder= is for a model as it is: in an intervene() block leave it out")
        states: States = file_states(model, prompts, chosen, places, folder, captured)
    else:
        at = [[p] for p in places]
        states = Held(capture_encoded(model, prompts, chosen, at, progress=lambda done, _: captured(done)))
    return plan.run(states, about, lambda done: captured(len(prompts) + done))


def probe_states(
    states: Any,
    labels: Any,
    *,
    groups: Any = None,
    types: Any = None,
    kind: str = "logistic",
    folds: int | float = 5,
    top_k: int = 1,
    classes: Sequence[Any] | None = None,
    unseen: str = "refuse",
    control: bool = True,
    permutations: int = 0,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> ProbeReport:
    """`probe` for states that are there already.

    Args:
        states: `Activations` of `logitlab.capture`, or arrays or tensors [rows, width] by the name of their site; they
            may be mapped files.
        labels: one a row.
        groups: one entry a row. By default all rows of the same prompt are a group for `Activations`, and each row is
            one of its own for arrays.
        types: as in `probe`, with one entry a row.
        kind: as in `probe`.
        folds: as in `probe`.
        top_k: as in `probe`.
        classes: as in `probe`.
        unseen: as in `probe`.
        control: as in `probe`.
        permutations: as in `probe`.
        resamples: as in `probe`.
        seed: as in `probe`.
        progress: called with the numbers of sites probed and of all.
        options: of the kind, as in `fit_probe`.

    Raises:
        InputError: as in `probe`, where it applies.

    Example:
        ``probe_states({"3.resid_post": states}, labels, groups=speakers, kind="ridge", penalty=10)``
    """
    held = Held(states)

    def default() -> Codes:
        if not isinstance(states, Activations):
            return np.arange(held.rows)
        keys = [key_of(p) for p, at in zip(states.prompts, states.positions, strict=True) for _ in at]
        return set_codes(keys, held.rows, "groups")

    plan = _Plan(
        held.rows, labels, groups, types, classes, unseen, kind, folds, top_k, control, permutations, resamples, seed,
        options, default,
    )  # fmt: skip
    return plan.run(held, {}, lambda done: None if progress is None else progress(done, len(held.sites)))


class _Plan:
    """What is fitted and held out, checked before anything runs."""

    def __init__(
        self,
        rows: int,
        labels: Any,
        groups: Any,
        types: Any,
        classes: Sequence[Any] | None,
        unseen: str,
        kind: str,
        folds: int | float,
        top_k: int,
        control: bool,
        permutations: int,
        resamples: int,
        seed: int,
        options: dict[str, Any],
        default: Callable[[], Codes],
    ) -> None:
        self.kind, self.options = kind, options_of(kind, options)
        self.classes, self.codes = label_codes(labels, rows, classes)
        self.top_k = _at_least(top_k, "top_k", 1)
        if self.top_k > len(self.classes):
            raise InputError(f"top_k is {top_k}, and there are {len(self.classes)} classes")
        if unseen not in ("refuse", "count"):
            raise InputError(f"unseen is {unseen!r}; it is one of refuse, count")
        self.permutations = _at_least(permutations, "permutations", 0)
        self.resamples = _at_least(resamples, "resamples", 1)
        self.seed = _at_least(seed, "seed", 0)
        self.control = bool(control)
        self.groups = default() if groups is None else set_codes(groups, rows, "groups")
        kinds = self.groups if types is None else set_codes(types, rows, "types")
        self.split: Split = split(self.groups, self.codes, folds, self.seed)
        if unseen == "refuse":
            self._check_seen()
        if self.control and not kinds.any():
            raise InputError("all rows are of one type, so there is no control task: give types=, or control=False")
        self.sets = [self.codes]
        if self.control:
            self.sets.append(chance.control_codes(kinds, self.codes, self.seed))
        permuted, how = chance.permuted_codes(self.groups, self.codes, self.permutations, self.seed)
        # A split is chosen by the labels, so each permutation is split anew: all that is done with the labels is.
        self.splits = [self.split] * len(self.sets)
        self.splits += [split(self.groups, codes, folds, self.seed) for codes in permuted]
        self.sets += permuted
        self.about: dict[str, Any] = {
            "kind": kind,
            "options": self.options,
            "seed": self.seed,
            "folds": float(folds) if isinstance(folds, float | np.floating) else int(folds),
            "top_k": self.top_k,
            "classes": list(self.classes),
            "rows": rows,
            "groups": int(self.groups.max()) + 1,
            "types": int(kinds.max()) + 1,
            "held_out": len(self.split.rows),
            "held_out_groups": len(np.unique(self.groups[self.split.rows])),
            "unseen": unseen,
            "permutations": self.permutations,
            **({"permuted": how} if self.permutations else {}),
            "resamples": self.resamples,
        }

    def run(self, states: States, about: dict[str, Any], progress: Callable[[int], None]) -> ProbeReport:
        """Fit at every site."""
        held = self.split.rows
        first = 1 + int(self.control)
        right = np.zeros((len(states.sites), first, len(held)))
        others = np.zeros((len(self.sets) - first, len(states.sites)))
        for i in range(len(states.sites)):
            found = self._right(states.read(i))
            right[i] = [own[held] for own in found[:first]]
            others[:, i] = [
                own[parts.rows].mean() for own, parts in zip(found[first:], self.splits[first:], strict=True)
            ]
            progress(i + 1)
        none = np.full(len(states.sites), np.nan)
        series = [right[:, 0]] + ([right[:, 1], right[:, 0] - right[:, 1]] if self.control else [])
        low, high = chance.bootstrap(np.concatenate(series), self.groups[held], self.resamples, self.seed)
        means = [s.mean(axis=1) for s in series] + [none] * (3 - len(series))
        lows = [*np.split(low, len(series)), none, none][:3]
        highs = [*np.split(high, len(series)), none, none][:3]
        p = chance.p_values(means[0], list(others)) if len(others) else none
        return ProbeReport(
            states.sites,
            *(means[0], lows[0], highs[0]),
            *(means[1], lows[1], highs[1]),
            *(means[2], lows[2], highs[2]),
            p,
            chance.baseline(self.codes, self.split, self.top_k),
            chance.label_overlap(self.codes, self.split),
            self.about | about | {"versions": _versions(self.kind)},
        )

    def _right(self, states: Matrix) -> list[NDArray[np.bool_]]:
        """For each set of labels [rows]: whether the label was among the first; False for rows never held out."""
        found: list[NDArray[np.bool_]] = []
        first: list[Moments] = []
        for codes, parts in zip(self.sets, self.splits, strict=True):
            own = np.zeros(len(states), dtype=bool)
            sums: list[Moments] = []
            if self.kind in CLOSED:
                # Outer products are taken once for all labels that are split alike.
                sums = self._sums(states, codes, parts, first if parts is self.split else [])
                first = first or sums
            for fold in parts.held:
                held = parts.part == fold
                test = states[held]
                scores, which = self._scores(sums, fold, test) if sums else self._fit(states[~held], codes[~held], test)
                own[held] = chance.ranks(scores, codes[held], which) <= self.top_k
            found.append(own)
        return found

    def _sums(self, states: Matrix, codes: Codes, parts: Split, known: Sequence[Moments]) -> list[Moments]:
        """For each part its sums; ``known`` are those of the same parts with other labels, if there are any."""
        found: list[Moments] = []
        for part in range(parts.parts):
            batches = _batches(states, codes, np.flatnonzero(parts.part == part))
            if known:
                found.append(known[part].relabelled(batches))
                continue
            own = Moments.empty(range(len(self.classes)), states.shape[1])
            for some, labels in batches:
                own.add(some, labels)
            found.append(own)
        return found

    def _scores(self, parts: list[Moments], fold: int, test: Matrix) -> tuple[NDArray[np.float64], Codes]:
        """Scores of held-out states by a fit on the sums of the other parts, and which classes they are of."""
        others = [own for part, own in enumerate(parts) if part != fold]
        whole = others[0]
        for own in others[1:]:
            whole = whole.merge(own)
        seen, which = whole.present()
        if len(which) == 1:
            return np.zeros((len(test), 1)), which
        return CLOSED[self.kind](seen, **self.options).scores(test), which

    def _fit(self, train: Matrix, codes: Codes, test: Matrix) -> tuple[NDArray[np.float64], Codes]:
        """The same by a fit on states."""
        which, inner = np.unique(codes, return_inverse=True)
        if len(which) == 1:  # a control or a permutation can leave one class only
            return np.zeros((len(test), 1)), which
        found = fitted(self.kind, train, inner.astype(np.int64), tuple(which.tolist()), self.options, self.seed)
        return found.scores(test), which

    def _check_seen(self) -> None:
        for fold in self.split.held:
            held = self.split.part == fold
            missing = np.setdiff1d(np.arange(len(self.classes)), self.codes[~held])
            if len(missing):
                label = self.classes[int(missing[0])]
                count = len(np.unique(self.groups[self.codes == missing[0]]))
                raise InputError(
                    f"no row of the training part of fold {fold} has the label {label!r}, which {count} "
                    f"group{'s have' if count > 1 else ' has'}: give more groups with it, leave it out, or count its "
                    'rows as wrong with unseen="count"'
                )


def _batches(states: Matrix, codes: Codes, rows: NDArray[np.int64]) -> Iterator[tuple[Matrix, Codes]]:
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        yield states[some], codes[some]


def _places(position: Any, prompts: Sequence[Encoded]) -> list[int]:
    """The position of each prompt, from 0."""
    one = not hasattr(position, "__len__") or getattr(position, "ndim", 1) == 0
    many: list[Any] = [position] * len(prompts) if one else [*position]
    if len(many) != len(prompts):
        raise InputError(f"there are {len(many)} positions for {len(prompts)} prompts: give one, or one for each")
    found: list[int] = []
    for n, (place, prompt) in enumerate(zip(many, prompts, strict=True)):
        found += select_positions(whole_number(place, "position"), len(prompt.ids), n)
    return found


def _at_least(value: Any, name: str, least: int) -> int:
    if whole_number(value, name) < least:
        raise InputError(f"{name} is {value}; it must be at least {least}")
    return int(value)


def _versions(kind: str) -> dict[str, str]:
    names = ("logitlab", "torch", "numpy", *(("scikit-learn",) if kind == "logistic" else ()))
    return {name: version(name) for name in names}
