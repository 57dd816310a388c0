"""What is measured of one model, task and template: by writing, by steering, and by reading through a lens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from logitlab.errors import InputError
from logitlab.interventions import Intervention, Vectors, intervene
from logitlab.interventions.trials import Trials
from logitlab.lenses import Lens
from logitlab.logits import statistics
from logitlab.models.capture import Activations, capture
from logitlab.models.handle import Model
from logitlab.models.sites import Site
from logitlab.vectors import Effect, Examples, Match, effect, function_vectors
from logitlab.vectors.heads import first_tokens

if TYPE_CHECKING:
    from logitlab.studies.steerable_not_decodable.tasks import Pair

TOP = 10
"""A token is readable if it is among so many."""


PASS = 2048
"""Tokens of one pass over several prompts."""


class Asked(Protocol):
    """What is asked for of a task; `tasks.Task`, and the tasks of the constructed models."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Inputs with their answers."""
        ...

    @property
    def templates(self) -> tuple[str, ...]:
        """Texts with ``{X}``."""
        ...

    @property
    def new_tokens(self) -> int:
        """Tokens to write."""
        ...

    @property
    def case_sensitive(self) -> bool:
        """Whether capitals count."""
        ...


@dataclass(frozen=True)
class Split:
    """Pairs of a task by what they are used for; no pair is in two parts.

    Attributes:
        shown: for the examples in prompts.
        queries: whose states vectors are made of.
        choosing: on which layers and strengths are chosen.
        testing: on which everything that is reported is measured.
    """

    shown: tuple[Pair, ...]
    queries: tuple[Pair, ...]
    choosing: tuple[Pair, ...]
    testing: tuple[Pair, ...]

    @staticmethod
    def of(pairs: Sequence[Pair], sizes: Sequence[int], rng: np.random.Generator) -> Split:
        """The pairs in four parts of these sizes; of the last part, as many as are left.

        Pairs that answer each other (hot and cold, cold and hot) are not told apart: only one of the two is used, or an
        example could show the answer to another part's question.

        Raises:
            InputError: there are too few pairs.
        """
        pairs = _without_reversals(pairs, rng)
        if sum(sizes[:3]) + 2 > len(pairs):
            raise InputError(
                f"there are {len(pairs)} pairs for parts of {', '.join(map(str, sizes))}: make them smaller"
            )
        order = [pairs[i] for i in rng.permutation(len(pairs))]
        ends = np.cumsum([0, *sizes])
        shown, queries, choosing, testing = (tuple(order[a:b]) for a, b in pairwise(ends))
        return Split(shown, queries, choosing, testing)


def _without_reversals(pairs: Sequence[Pair], rng: np.random.Generator) -> list[Pair]:
    answers = {x.casefold(): {a.casefold() for a in y} for x, y in pairs}
    kept: dict[str, Pair] = {}
    for i in rng.permutation(len(pairs)):
        x, _ = pairs[i]
        if not any(a in kept and x.casefold() in answers[a] for a in answers[x.casefold()]):
            kept[x.casefold()] = pairs[i]
    return [pair for pair in pairs if pair[0].casefold() in kept]


def sites_of(model: Model, step: int) -> list[Site]:
    """The output of every ``step``-th block, counted from the one with that number: of 1, 2, 3, 4, ... 2, 4, ...

    A model of few layers is looked at twice at least: the step is half of their number then.
    """
    step = max(1, min(step, model.n_layers // 2))
    return [Site(layer - 1, "resid_post") for layer in range(step, model.n_layers + 1, step)]


def examples_of(task: Asked, split: Split, template: int, separator: str = "\n") -> Examples:
    """The examples of a task in a template."""
    return Examples(tuple((x, y[0]) for x, y in split.shown), task.templates[template], separator=separator)


def match_of(task: Asked) -> Match:
    """When a text is right: an answer occurs in it as a word; one of a single letter has to begin it."""
    letters = all(len(a) == 1 for _, y in task.pairs for a in y)
    return Match(begins=letters, case=task.case_sensitive, words=True)


def one_token_tells(task: Asked) -> bool:
    """Whether the first token of an answer says something of the task: not where most begin as their inputs do."""
    alike = [y[0].split()[0] == x.split()[0] for x, y in task.pairs]
    return sum(alike) < len(alike) / 2


def written(model: Model, task: Asked, prompts: Sequence[str], pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """Which prompts the model answers rightly, [prompts] of 0 and 1."""
    (texts,) = Trials(model, list(prompts)).write([[]], task.new_tokens)
    judge = match_of(task)
    return np.array([judge(text, y) for text, (_, y) in zip(texts, pairs, strict=True)], dtype=np.float64)


def few_shot(examples: Examples, pairs: Sequence[Pair], shots: int, seed: int) -> list[str]:
    """The pairs' inputs after some examples each."""
    return examples.prompts([x for x, _ in pairs], shots=shots, seed=seed)


def vectors_of(model: Model, examples: Examples, split: Split, sites: Sequence[Site], shots: int, seed: int) -> Vectors:
    """The function vector at some sites: mean state with examples minus mean state of the bare question."""
    return function_vectors(model, examples, [x for x, _ in split.queries], sites, shots=shots, seed=seed)


def steered(
    model: Model,
    task: Asked,
    examples: Examples,
    split: Split,
    vectors: Vectors,
    strengths: Sequence[float],
    *,
    other: Vectors | None,
    neutral: Sequence[str] | None,
    randoms: int,
    seed: int,
) -> Effect:
    """What the vectors do to bare questions; layer and strength are chosen on other inputs than those of the result."""
    asked = [*split.choosing, *split.testing]
    return effect(
        model,
        vectors,
        [examples.bare(x) for x, _ in asked],
        [y for _, y in asked],
        strengths=strengths,
        other=other,
        neutral=neutral,
        choose=list(range(len(split.choosing))),
        randoms=randoms,
        new_tokens=task.new_tokens,
        match=match_of(task),
        seed=seed,
    )


@dataclass(frozen=True)
class Readout:
    """Where a lens has the right answer.

    Attributes:
        rank: [sites, prompts] of the better of both variants of the answer's first token, from 1.
        logprob: [sites, prompts] nats, of the more likely one.
        spaced: [sites, prompts] whether the better variant is the one with a space before it.
    """

    rank: NDArray[np.int64]
    logprob: NDArray[np.float64]
    spaced: NDArray[np.bool_]

    def top(self, k: int) -> NDArray[np.float64]:
        """[sites] share of prompts whose answer is among the first ``k``."""
        return (self.rank <= k).mean(1)


def states_of(
    model: Model, prompts: Sequence[str], sites: Sequence[Site], changes: Sequence[Intervention] = ()
) -> Activations:
    """States at the last token, perhaps under interventions."""
    if not changes:
        return capture(model, list(prompts), sites, -1, batch_tokens=PASS)
    with intervene(model, changes):
        return capture(model, list(prompts), sites, -1, batch_tokens=PASS)


def readout(
    model: Model,
    states: torch.Tensor,
    sites: Sequence[Site],
    task: Asked,
    pairs: Sequence[Pair],
    lens: Lens | None = None,
) -> Readout:
    """Decode states [sites, prompts, width], and look for the answers' first tokens.

    Args:
        model: the model.
        states: what `states_of` has kept.
        sites: the sites.
        task: the task, which says whether capitals count.
        pairs: for each prompt its input and answers.
        lens: through which states go; by default the logit lens.
    """
    targets = [variants(model, task, y) for _, y in pairs]
    wide = max(len(ids) for ids, _ in targets)
    ids = torch.tensor([one + one[:1] * (wide - len(one)) for one, _ in targets])
    with_space = np.array([flags + flags[:1] * (wide - len(flags)) for _, flags in targets])
    moved = states if lens is None else torch.stack([lens.transport(h, s) for h, s in zip(states, sites, strict=True)])
    with model.exclusive(), torch.no_grad():
        rows = model.tail.prepare(moved.reshape(-1, moved.shape[-1]))
        found = statistics(rows.reshape(*moved.shape[:2], -1), model.tail.source, top_k=1, targets=ids, entropy=False)
    assert found.target_rank is not None
    assert found.target_logprob is not None
    ranks, logprobs = found.target_rank.cpu().numpy(), found.target_logprob.double().cpu().numpy()
    best = ranks.argmin(-1)
    spaced = np.take_along_axis(np.broadcast_to(with_space, ranks.shape), best[..., None], -1)[..., 0]
    return Readout(ranks.min(-1), logprobs.max(-1), spaced)


def variants(model: Model, task: Asked, answers: Sequence[str]) -> tuple[list[int], list[bool]]:
    """First tokens of answers, with a space before them and without; and which of them have one.

    The paper decodes the variant without a space and takes the other one only where there is none. A model that goes on
    with " Paris" is then said to be unreadable, so both count here, and which one was better is reported. Where
    capitals do not count in what is written, they do not count in what is read: "Cold" is as good as "cold".
    """
    ids: list[int] = []
    spaced: list[bool] = []
    both = [f for a in answers for f in (a, a[:1].upper() + a[1:])]
    forms = answers if task.case_sensitive else both
    for answer in dict.fromkeys(forms):
        for token in first_tokens(model, " ", (answer,)):
            if token not in ids:
                ids.append(token)
                spaced.append(model.vocabulary.label(token).startswith(" "))
    if not ids:
        raise InputError(f"the answers {', '.join(answers)} have no tokens")
    return ids, spaced


def cell(steering: float, reading: float, threshold: float) -> str:
    """Which cell of the 2 x 2 table: what steers, and what a lens reads."""
    steers, reads = steering > threshold, reading > threshold
    return {
        (True, True): "both succeed",
        (True, False): "steerable, not decodable",
        (False, True): "decodable, not steerable",
        (False, False): "both fail",
    }[steers, reads]
