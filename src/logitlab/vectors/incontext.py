"""Prompts that show a task by examples, and the function vectors that they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitlab.errors import InputError
from logitlab.interventions.vectors import Vectors
from logitlab.models.capture import capture
from logitlab.models.handle import Model
from logitlab.models.inputs import whole_number
from logitlab.vectors.differences import mean_difference

SLOT = "{X}"
"""Where a template has its input."""


@dataclass(frozen=True)
class Examples:
    """A task that can be shown by examples.

    Attributes:
        pairs: inputs and their answers.
        template: a text with ``{X}`` where the input goes.
        joint: what stands between a filled template and its answer.
        separator: what stands between two examples.

    Raises:
        InputError: the template has no ``{X}``, there is no pair, or a pair is not two texts.

    Example:
        ``Examples((("hot", "cold"), ("up", "down")), "The opposite of {X} is")``
    """

    pairs: tuple[tuple[str, str], ...]
    template: str
    joint: str = " "
    separator: str = "\n"

    def __post_init__(self) -> None:
        if self.template.count(SLOT) != 1:
            raise InputError(f"template {self.template!r}: it must have {SLOT} once, where the input goes")
        if not self.pairs:
            raise InputError("there are no pairs: a task needs inputs and their answers")
        given: list[Any] = list(self.pairs)
        for pair in given:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
                raise InputError(f"pair {pair!r} is not an input and its answer: give two texts")
        object.__setattr__(self, "pairs", tuple((x, y) for x, y in given))

    def bare(self, query: str) -> str:
        """The question alone."""
        return self.template.replace(SLOT, query)

    def shown(self, query: str, shots: Sequence[tuple[str, str]]) -> str:
        """The question after some examples."""
        lines = [f"{self.bare(x)}{self.joint}{y}" for x, y in shots]
        return self.separator.join([*lines, self.bare(query)])

    def prompts(self, queries: Sequence[str], *, shots: int = 5, seed: int = 0, shuffled: bool = False) -> list[str]:
        """Each query after examples that are drawn for it, from the pairs with other inputs.

        Args:
            queries: inputs; they need not be among the pairs.
            shots: examples of each prompt.
            seed: of the draw.
            shuffled: whether each example is given the answer of another pair at random, so that they show no task (a
                corrupted prompt of the same form). It is never a right one, unless all answers are.

        Raises:
            InputError: there are too few pairs, or a number is too small.
        """
        if whole_number(shots, "shots") < 1:
            raise InputError(f"shots is {shots}; it must be at least 1")
        if whole_number(seed, "seed") < 0:
            raise InputError(f"seed is {seed}; it must be at least 0")
        right: dict[str, set[str]] = {}
        for x, y in self.pairs:
            right.setdefault(x, set()).add(y)
        rng = np.random.default_rng([seed, 0x5EED])
        found: list[str] = []
        for query in queries:
            others = [pair for pair in self.pairs if pair[0] != query]
            if len(others) < max(shots, 1 + shuffled):
                raise InputError(f"{shots} examples are wanted for {query!r}, and there are {len(others)} other pairs")
            drawn = [others[i] for i in rng.permutation(len(others))[:shots]]
            if shuffled:
                pool = [answer for _, answer in others]
                drawn = [(x, str(rng.choice([a for a in pool if a not in right[x]] or pool))) for x, _ in drawn]
            found.append(self.shown(query, drawn))
        return found


def function_vectors(
    model: Model,
    examples: Examples,
    queries: Sequence[str] | None = None,
    sites: Any = None,
    *,
    shots: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Vectors:
    """The mean state at the last token of prompts with examples, minus that of the bare questions.

    This is how arXiv 2604.02608 takes function vectors. The one of Todd et al. 2023 (arXiv 2310.15213), a sum over
    attention heads, is `logitlab.vectors.head_effects`.

    Args:
        model: the model.
        examples: the task.
        queries: inputs to ask for; by default those of all pairs. Prompts show no example with the query's own input.
        sites: which sites, as in `logitlab.read`; by default the output of each block.
        shots: examples of each prompt.
        seed: of the draw of examples.
        progress: called with the numbers of prompts done and in all.

    Raises:
        InputError: an argument cannot be used.

    Example:
        ``function_vectors(model, Examples(pairs, "The opposite of {X} is"), sites="::2.resid_post")``
    """
    asked = [x for x, _ in examples.pairs] if queries is None else list(queries)
    if not asked:
        raise InputError("there are no queries: give inputs to ask for")
    chosen = model.select_sites("resid_post" if sites is None else sites)
    shown = capture(model, examples.prompts(asked, shots=shots, seed=seed), chosen, -1, progress=progress)
    found = mean_difference(model, shown, capture(model, [examples.bare(x) for x in asked], chosen, -1), chosen)
    recipe = {
        "template": examples.template,
        "joint": examples.joint,
        "separator": examples.separator,
        "queries": len(asked),
        "shots": shots,
        "seed": seed,
    }
    return Vectors(found.values, "function vector (mean difference)", model.about, recipe)
