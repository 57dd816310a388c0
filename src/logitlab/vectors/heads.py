"""Function vectors from attention heads (Todd et al. 2023, "Function Vectors in Large Language Models", 2310.15213).

Prompts whose examples have shuffled answers show no task. Each head in turn is given, at the last token, the mean of
what it writes there when the task is shown; its average indirect effect is by how much that raises the probability of
the right answer (their eq. 4 and 5). The vector is the sum of the means of the heads with the largest effects (eq. 6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitlab.errors import InputError
from logitlab.interventions.intervention import replace
from logitlab.interventions.trials import ROWS, Trials
from logitlab.interventions.vectors import Vectors
from logitlab.models.capture import capture
from logitlab.models.handle import Model
from logitlab.models.inputs import whole_number
from logitlab.vectors.incontext import Examples


@dataclass(frozen=True)
class HeadEffects:
    """How much each attention head carries a task.

    Attributes:
        sites: names of the heads.
        effects: [heads, prompts] change of the probability of the answer, with the head's mean put in.
        means: [heads, width] float32, what each writes at the last token where the task is shown, on average.
        model: see `logitlab.Model.about`.
        recipe: how it was measured: plain values.
    """

    sites: tuple[str, ...]
    effects: NDArray[np.float64]
    means: torch.Tensor
    model: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def average(self) -> NDArray[np.float64]:
        """[heads] average indirect effect: change of probability, a mean over the prompts."""
        return self.effects.mean(1)

    def largest(self, heads: int) -> list[int]:
        """Numbers of the heads with the largest average effects, the largest first.

        Raises:
            InputError: there are not so many heads.
        """
        if not 1 <= whole_number(heads, "heads") <= len(self.sites):
            raise InputError(f"heads is {heads}; there are {len(self.sites)}: give 1 to {len(self.sites)}")
        return [int(i) for i in np.argsort(-self.average, kind="stable")[:heads]]

    def vectors(self, sites: Sequence[str], heads: int = 10) -> Vectors:
        """The sum of the means of the heads with the largest effects, the same at every site.

        It is added where the residual stream is read further on: Todd et al. add it about a third of the way up.

        Args:
            sites: names of the sites that it is for.
            heads: how many heads are summed (Todd et al.: 10 for GPT-J of 448 heads).

        Raises:
            InputError: there are not so many heads.
        """
        which = self.largest(heads)
        whole = self.means[which].double().sum(0)
        recipe = {**self.recipe, "heads": [self.sites[i] for i in which]}
        return Vectors(dict.fromkeys(map(str, sites), whole), "function vector (sum of heads)", self.model, recipe)


def head_effects(
    model: Model,
    examples: Examples,
    queries: Sequence[str],
    *,
    shots: int = 5,
    seed: int = 0,
    heads: Any = "head_out",
    prompts: int | None = None,
    rows: int = ROWS,
    progress: Callable[[int, int], None] | None = None,
) -> HeadEffects:
    """Average indirect effects of attention heads on a task that is shown by examples.

    Args:
        model: a model of which heads were verified (`model.verification`).
        examples: the task; pairs give the examples.
        queries: inputs to ask for; each must be the input of a pair, whose answer is the right one.
        shots: examples of each prompt.
        seed: of the draws.
        heads: which heads, in the form of sites; by default all.
        prompts: with how many of the queries effects are measured; by default all. Means are over all of them.
        rows: sequences that go through the model together, at most.
        progress: called with the numbers of layers done and in all.

    Raises:
        InputError: heads were not verified on this model, a query has no answer, or an argument cannot be used.

    Example:
        ``head_effects(model, examples, ["hot", "up"]).vectors(["10.resid_post"], heads=10)``
    """
    answers = dict(examples.pairs)
    unknown = next((q for q in queries if q not in answers), None)
    if unknown is not None:
        raise InputError(f"query {unknown!r} is the input of no pair: its answer is not known")
    if not queries:
        raise InputError("there are no queries: give inputs of some pairs")
    chosen = [s for s in model.select_sites(heads) if s.kind == "head_out"]
    if not chosen:
        raise InputError(f"heads={heads!r} names no attention head; write for instance '5.head_out' or '5.head_out.3'")
    if examples.joint.strip():
        raise InputError(
            f"joint {examples.joint!r} is not blank: put it into the template, so that prompts end where answers begin"
        )
    if prompts is not None and whole_number(prompts, "prompts") < 1:
        raise InputError(f"prompts is {prompts}; it must be at least 1")
    some = list(queries)[:prompts]
    shown = capture(model, examples.prompts(queries, shots=shots, seed=seed), chosen, -1)
    means = torch.stack([shown[site].double().mean(0) for site in chosen]).float()  # [heads, width]
    spoilt = Trials(model, examples.prompts(some, shots=shots, seed=seed, shuffled=True), rows=rows)
    targets = [first_tokens(model, examples.joint, (answers[q],)) for q in some]
    (plain,), _ = spoilt.next_tokens([[]], targets)
    effects = np.zeros((len(chosen), len(some)))
    layers = sorted({site.layer for site in chosen})
    for done, layer in enumerate(layers, 1):
        here = [i for i, site in enumerate(chosen) if site.layer == layer]
        trials = [[replace(chosen[i], means[i], positions="last")] for i in here]
        logprob, _ = spoilt.next_tokens(trials, targets)
        effects[here] = np.exp(logprob) - np.exp(plain)
        if progress is not None:
            progress(done, len(layers))
    recipe = {
        "template": examples.template,
        "joint": examples.joint,
        "separator": examples.separator,
        "queries": len(queries),
        "prompts": len(some),
        "shots": shots,
        "seed": seed,
    }
    return HeadEffects(tuple(map(str, chosen)), effects, means, model.about, recipe)


def first_tokens(model: Model, joint: str, answers: Sequence[str]) -> list[int]:
    """Ids of the tokens that answers can begin with: with what stands before an answer, and without.

    Raises:
        InputError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: what an answer begins with cannot be told")
    found: list[int] = []
    for answer in answers:
        for text in dict.fromkeys((f"{joint}{answer}", answer)):
            ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            # Some tokenizers give a blank a token of its own.
            first = next((int(i) for i in ids if model.vocabulary.label(int(i)).strip()), None)
            if first is not None:
                found.append(first)
    return list(dict.fromkeys(found))
