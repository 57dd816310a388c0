"""What vectors do: site and strength are chosen on some prompts, the effect is measured on others, with controls."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitlab.errors import InputError
from logitlab.intervals import Mean, bootstrap
from logitlab.interventions.apply import intervene
from logitlab.interventions.changes import number
from logitlab.interventions.intervention import Intervention, add
from logitlab.interventions.trials import ROWS, Trials
from logitlab.interventions.vectors import Vectors
from logitlab.logits import statistics
from logitlab.models.capture import capture_encoded
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded, whole_number

if TYPE_CHECKING:
    import xarray as xr

STRENGTHS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
"""The grid of arXiv 2604.02608."""


@dataclass(frozen=True)
class Match:
    """When a text counts as right.

    Attributes:
        begins: whether an answer must begin the text (what is no letter or digit is left out before it); else it may
            occur anywhere.
        case: whether upper and lower case differ.
        words: whether letters and digits next to the answer make it another word: "safe" is not in "unsafe" then.
    """

    begins: bool = False
    case: bool = False
    words: bool = False

    def __call__(self, text: str, answers: Sequence[str]) -> bool:
        """Whether a text has one of some answers."""
        said, wanted = (text, answers) if self.case else (text.casefold(), [a.casefold() for a in answers])
        start, end = (r"(?<!\w)", r"(?!\w)") if self.words else ("", "")
        for a in wanted:
            one = f"{start}{re.escape(a)}{end}"
            found = re.match(rf"[\W_]*?{one}", said) if self.begins else re.search(one, said)
            if found is not None:
                return True
        return False


@dataclass(frozen=True)
class Effect:
    """What vectors do to what a model writes.

    Attributes:
        sites: names of the sites that were tried.
        strengths: what was tried there.
        grid: [sites, strengths] share of right answers on the prompts for choosing.
        chosen: number of the site and of the strength that were best there.
        correct: by what was done (``plain``, ``steered``, ``random``, and ``other`` if another vector was given), which
            of the prompts for testing were answered rightly, [prompts] float64; at the chosen site and strength. With
            several random vectors it is the share of them. ``permuted`` is what the steered texts score if each is held
            against the answers of the other prompts, as a mean over these: what saying likely answers is worth.
        nll: by what was done, nats of each neutral text for a token, [texts]; empty where none were given.
        choosing: numbers of the prompts for choosing.
        testing: numbers of those for testing.
        about: what was measured: plain values.
    """

    sites: tuple[str, ...]
    strengths: tuple[float, ...]
    grid: NDArray[np.float64]
    chosen: tuple[int, int]
    correct: dict[str, NDArray[np.float64]]
    nll: dict[str, NDArray[np.float64]]
    choosing: tuple[int, ...]
    testing: tuple[int, ...]
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def site(self) -> str:
        """The site that was chosen."""
        return self.sites[self.chosen[0]]

    @property
    def strength(self) -> float:
        """The strength that was chosen."""
        return self.strengths[self.chosen[1]]

    def rate(self, what: str = "steered") -> Mean:
        """Share of right answers on the prompts for testing, with its 95 % interval."""
        return bootstrap(self._of(what))

    def gain(self, over: str = "plain") -> Mean:
        """By how much the steered share is larger than another, with the 95 % interval of the paired difference."""
        return bootstrap(self._of("steered") - self._of(over))

    def perplexity(self, what: str = "steered") -> float:
        """Perplexity of the neutral texts: exp of the mean nats for a token, texts alike.

        Raises:
            InputError: no neutral texts were given.
        """
        if what not in self.nll:
            raise InputError(
                f"there is no perplexity of {what!r}; neutral= gives it for {', '.join(self.nll) or 'none'}"
            )
        return float(np.exp(self.nll[what].mean()))

    def data(self) -> xr.DataArray:
        """The grid as a labelled array (site, strength)."""
        import xarray as xr

        coordinates = {"site": list(self.sites), "strength": list(self.strengths)}
        return xr.DataArray(self.grid, coordinates, ("site", "strength"), "accuracy", dict(self.about))

    def rows(self) -> list[dict[str, Any]]:
        """For each of what was done the share of right answers, the gain over it, and the perplexity."""
        found: list[dict[str, Any]] = []
        for what in self.correct:
            rate, gain = self.rate(what), self.gain(what)
            row: dict[str, Any] = {"what": what, "rate": rate.value, "low": rate.low, "high": rate.high, "n": rate.n}
            if what != "steered":
                row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
            if what in self.nll:
                row["perplexity"] = self.perplexity(what)
            found.append(row)
        return found

    def __repr__(self) -> str:
        lines = [f"Effect at {self.site}, strength {self.strength:g} (chosen on {len(self.choosing)} prompts):"]
        for row in self.rows():
            line = f"  {row['what']:<8} right {row['rate']:.3f} [{row['low']:.3f}, {row['high']:.3f}] of {row['n']}"
            if "gain" in row:
                line += f"; steered gains {row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
            if "perplexity" in row:
                line += f"; perplexity of neutral text {row['perplexity']:.2f}"
            lines.append(line)
        return "\n".join(lines)

    def _of(self, what: str) -> NDArray[np.float64]:
        if what not in self.correct:
            raise InputError(f"{what!r} was not measured; there are {', '.join(self.correct)}")
        return self.correct[what]


def effect(
    model: Model,
    vectors: Vectors,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    strengths: Sequence[float] = STRENGTHS,
    other: Vectors | None = None,
    neutral: Sequence[str] | None = None,
    choose: float | Sequence[int] = 0.4,
    randoms: int = 1,
    new_tokens: int = 5,
    match: Match | None = None,
    positions: str = "each",
    seed: int = 0,
    rows: int = ROWS,
    progress: Callable[[int, int], None] | None = None,
) -> Effect:
    """Steer a model with vectors, and count right answers beside controls.

    The site and the strength are those with the most right answers on a part of the prompts (of equals the smaller
    strength, then the earlier site). All that is reported else is of the other prompts: what the model writes as it is,
    steered, with a random vector of the same length at the same place, and with the vector of another task.

    Args:
        model: a model that can write.
        vectors: at which sites to add what.
        prompts: texts that end where the answer begins.
        answers: for each prompt the answers that are right.
        strengths: what vectors are multiplied with.
        other: vectors of another task, a control; at the chosen site it is given the length of the vector there.
        neutral: texts that have nothing to do with the task: by how much does steering spoil them? The vector is added
            at all of their tokens.
        choose: share of the prompts on which site and strength are chosen; or their numbers.
        randoms: how many random vectors are tried.
        new_tokens: tokens to write.
        match: when a text is right; by default where an answer occurs anywhere in it, in upper or lower case.
        positions: where vectors are added: ``each``, ``last`` or ``generated``.
        seed: of the split and of random vectors.
        rows: sequences that go through the model together, at most.
        progress: called with the numbers of texts written and in all.

    Raises:
        InputError: the vectors belong to another model, there are too few prompts, or an argument cannot be used.

    Example:
        ``effect(model, function_vectors(model, examples), prompts, [[a] for a in answers]).gain("random").low > 0``
    """
    for given, what in ((prompts, "prompts"), (answers, "answers"), (neutral, "neutral texts")):
        if isinstance(given, str):
            raise InputError(f"the {what} are one text, {given[:40]!r}: give a list")
    asked, much = list(prompts), tuple(number(s, "strength") for s in strengths)
    right = [[a] if isinstance(a, str) else list(a) for a in answers]
    if len(right) != len(asked) or not all(right):
        raise InputError(f"there are {len(asked)} prompts and {len(right)} lists of answers: give answers for each")
    if not all(a.strip() for some in right for a in some):
        raise InputError("an answer is blank: it would be found in any text")
    if not much:
        raise InputError("there are no strengths: give at least one")
    if whole_number(randoms, "randoms") < 1:
        raise InputError(f"randoms is {randoms}; it must be at least 1")
    if whole_number(seed, "seed") < 0:
        raise InputError(f"seed is {seed}; it must be at least 0")
    vectors.check(model)
    first, rest = _parted(len(asked), choose, seed)
    judge = match or Match()
    sites = tuple(vectors.sites)
    for site in sites:
        model.select_sites(site)
    others: dict[str, torch.Tensor] = {}
    if other is not None:
        other.check(model)
        others = {site: _as_long(other[site], vectors[site]) for site in sites}
    if neutral is not None:  # before much has been computed
        _ = _long_enough(model, neutral)

    def texts_of(trials: Sequence[Sequence[Intervention]], which: Sequence[int], done: int) -> list[list[str]]:
        def tell(now: int, _: int) -> None:
            if progress is not None:
                progress(done + now, total)

        return Trials(model, [asked[n] for n in which], rows=rows).write(trials, new_tokens, progress=tell)

    def judged(texts: Sequence[str], which: Sequence[int]) -> NDArray[np.float64]:
        return np.array([judge(text, right[n]) for text, n in zip(texts, which, strict=True)], float)

    grid_trials = [[add(site, vectors[site], strength=s, positions=positions)] for site in sites for s in much]
    controls = 1 + int(other is not None) + randoms + 1
    total = len(grid_trials) * len(first) + controls * len(rest)
    tried = texts_of(grid_trials, first, 0)
    grid = np.array([judged(texts, first).mean() for texts in tried]).reshape(len(sites), len(much))
    best = min(np.ndindex(len(sites), len(much)), key=partial(_order, grid, much))
    site, strength = sites[best[0]], much[best[1]]
    changes = {
        "plain": [],
        "steered": [add(site, vectors[site], strength=strength, positions=positions)],
        **{
            f"random {i}": [add(site, twin[site], strength=strength, positions=positions)]
            for i in range(randoms)
            for twin in [vectors.random_twin(seed + i)]
        },
    }
    if other is not None:
        changes["other"] = [add(site, others[site], strength=strength, positions=positions)]
    written = dict(zip(changes, texts_of(list(changes.values()), rest, len(grid_trials) * len(first)), strict=True))
    found = {name: judged(texts, rest) for name, texts in written.items()}
    if len(rest) > 1:
        found["permuted"] = np.array(
            [
                sum(judge(text, right[m]) for m in rest if m != n) / (len(rest) - 1)
                for n, text in zip(rest, written["steered"], strict=True)
            ]
        )
    nll = {} if neutral is None else {k: nats(model, neutral, _everywhere(v)) for k, v in changes.items()}
    about = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "vectors": vectors.describe(),
        "new_tokens": new_tokens,
        "positions": positions,
        "randoms": randoms,
        "seed": seed,
    }
    return Effect(sites, much, grid, best, _joined(found), _joined(nll), first, rest, about)


def _parted(count: int, choose: float | Sequence[int], seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of the prompts for choosing, and of those for testing."""
    if isinstance(choose, Sequence):
        first = sorted({whole_number(n, "choose") for n in choose})
        if not first or first[0] < 0 or first[-1] >= count or len(first) == count:
            raise InputError(
                f"choose names {len(first)} of {count} prompts: give numbers of some, so that others are left"
            )
        return tuple(first), tuple(n for n in range(count) if n not in first)
    if not 0 < choose < 1:
        raise InputError(f"choose is {choose}; it must be above 0 and below 1, or numbers of prompts")
    if count < 2:
        raise InputError(f"there are {count} prompts: choosing and testing need some each, so at least 2")
    size = min(max(round(choose * count), 1), count - 1)
    order = np.random.default_rng(seed).permutation(count)
    return tuple(sorted(map(int, order[:size]))), tuple(sorted(map(int, order[size:])))


def nats(model: Model, texts: Sequence[str], changes: Sequence[Intervention] = ()) -> NDArray[np.float64]:
    """Mean negative log-likelihood of the tokens of each text but its first, [texts] nats.

    Args:
        model: a decoder.
        texts: texts of at least two tokens each.
        changes: interventions under which it is measured.

    Raises:
        InputError: there is no text, or one has less than two tokens.
    """
    found: list[float] = []
    for prompt in _long_enough(model, texts):
        before = [list(range(len(prompt.ids) - 1))]
        site = model.last_site
        if changes:
            with intervene(model, changes):
                rows = capture_encoded(model, [prompt], [site], before, share=False)[site]
        else:
            rows = capture_encoded(model, [prompt], [site], before, share=False)[site]
        with model.exclusive(), torch.no_grad():
            x = model.tail.prepare(rows)
            said = statistics(
                x, model.tail.source, top_k=1, targets=torch.tensor(prompt.ids[1:]).unsqueeze(1), entropy=False
            )
        assert said.target_logprob is not None
        found.append(-float(said.target_logprob.double().mean()))
    return np.array(found)


def _long_enough(model: Model, texts: Sequence[str]) -> list[Encoded]:
    if not texts:
        raise InputError("there are no neutral texts: give some, or leave them out")
    found = model.encode(list(texts))
    short = next((p for p in found if len(p.ids) < 2), None)
    if short is not None:
        raise InputError(
            f"the neutral text {short.text!r} has {len(short.ids)} token for {model.name}: at least 2 are needed"
        )
    return list(found)


def _order(grid: NDArray[np.float64], strengths: Sequence[float], cell: tuple[int, int]) -> tuple[float, float, int]:
    """What comes first is best: more right answers, a smaller strength, an earlier site."""
    return -float(grid[cell]), strengths[cell[1]], cell[0]


def _everywhere(changes: Sequence[Intervention]) -> list[Intervention]:
    return [Intervention(c.sites, c.change, "all", None, c.vectors) for c in changes]


def _as_long(vector: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    size = float(vector.double().norm())
    if size == 0:
        raise InputError("the vector of the other task is zero: it is no control")
    return vector * (float(model.double().norm()) / size)


def _joined(found: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Several random vectors as their mean."""
    out = {name: value for name, value in found.items() if not name.startswith("random ")}
    many = [value for name, value in found.items() if name.startswith("random ")]
    return out | ({"random": np.mean(many, axis=0)} if many else {})
