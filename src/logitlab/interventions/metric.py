"""What patching measures: a number from what a model answers at the last position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitlab.errors import InputError
from logitlab.logits import Head, statistics
from logitlab.logits.rows import HeadRows
from logitlab.models.handle import Model
from logitlab.targets import resolve_targets

Metric = Callable[[torch.Tensor], torch.Tensor]
"""From logits [n, V] at the last position to numbers [n]."""


@dataclass(frozen=True)
class Measure:
    """What is measured at the last position.

    Attributes:
        ids: the right token and the wrong one, whose logits are subtracted; or one, whose log-probability counts.
        metric: what counts in their place.
    """

    ids: tuple[int, ...]
    metric: Metric | None = None

    def of(self, model: Model, given: torch.Tensor, *, logits: bool) -> list[float]:
        """Of rows [n, d] that the head is given, or of logits [n, V].

        Raises:
            InputError: the metric gives something else than n numbers.
        """
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


def measures_of(model: Model, answers: Any, metric: Metric | None, pairs: int) -> list[Measure]:
    """What is measured of each pair; ``answers`` and ``metric`` as in `logitlab.interventions.patch`.

    Raises:
        InputError: there is neither or there are both, other numbers of answers than of pairs, or an answer cannot be
            used.
    """
    if (answers is None) == (metric is None):
        raise InputError("give answers=, or a metric=, and not both")
    if metric is not None:
        return [Measure((), metric)] * pairs
    many: list[Any] = list(answers) if isinstance(answers, list) else [answers] * pairs
    if len(many) != pairs:
        raise InputError(f"there are {len(many)} answers for {pairs} pairs: give one for each, or one for all")
    found: list[Measure] = []
    for n, answer in enumerate(many):
        named = list(answer) if isinstance(answer, tuple) else [answer]
        if not 1 <= len(named) <= 2:
            raise InputError(f"answer {n} has {len(named)} tokens: give the right one, or (right, wrong)")
        ids = tuple(target.id for token in named for target in resolve_targets(model, token))
        if len(set(ids)) != len(named):
            raise InputError(f"answer {n}: the right and the wrong token are the same")
        found.append(Measure(ids))
    return found


def name_of(answers: Any, metric: Metric | None) -> str:
    """What is measured, in words."""
    if metric is not None:
        return getattr(metric, "__name__", "a metric")
    first = answers[0] if isinstance(answers, list) and answers else answers
    two = isinstance(first, tuple) and len(first) == 2
    return "difference of logits, nats" if two else "log-probability, nats"


def recovered(
    patched: NDArray[np.float64], clean: NDArray[np.float64], corrupted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The normalised recovery, (patched - corrupted) / (clean - corrupted).

    Args:
        patched: [pairs, any, any].
        clean: [pairs].
        corrupted: [pairs].

    Returns:
        The same shape as ``patched``; NaN for a pair whose runs do not differ in the metric by more than rounding.
    """
    base, gap = corrupted[:, None, None], (clean - corrupted)[:, None, None]
    rounding = 1e-6 * (1 + np.maximum(np.abs(clean), np.abs(corrupted)))[:, None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(gap) <= rounding, np.nan, (patched - base) / gap)
