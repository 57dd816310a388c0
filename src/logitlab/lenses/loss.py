"""The loss of a fit and its gradients: KL divergence of what a site says from what the model says in the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch.func import functional_call

from logitlab.lenses.fitted import FittedLens
from logitlab.logits import statistics
from logitlab.logits.divergence import divergence
from logitlab.models.capture import capture_encoded, checked_states, rows_at
from logitlab.models.handle import Model
from logitlab.models.inputs import Encoded
from logitlab.models.products import QuickGradients
from logitlab.models.tail import shape_of

ROWS = 4096
"""Rows that are differentiated together."""

PASS = 1024
"""Tokens whose hidden states are held at once."""


class Loss:
    """Loss of the maps of a lens on some prompts.

    Args:
        model: the model.
        lens: the lens; gradients go to ``p.grad`` of its parameters.
    """

    def __init__(self, model: Model, lens: FittedLens) -> None:
        self.model, self.lens = model, lens
        self.sites = list(lens.sites)

    def backward(self, prompts: Sequence[Encoded], positions: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
        """Add the gradients of the sum of the KL over some positions.

        Returns:
            That sum for each site, [sites] float64, nats, and of how many it is.
        """
        raise NotImplementedError

    def kl(self, prompts: Sequence[Encoded], positions: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
        """The same without gradients, and exact."""
        raise NotImplementedError

    def _own(self, site: int) -> dict[str, torch.Tensor]:
        """Parameters of one site's map, of which gradients can be taken."""
        named = self.lens.maps.named_parameters()
        return {name: p.detach()[site : site + 1].requires_grad_(True) for name, p in named}

    def _moved_by(self, own: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """States [n, width] of one site behind its map."""
        return functional_call(self.lens.maps, own, (_wide(hidden).unsqueeze(0),))[0].to(hidden.dtype)

    def _take(self, site: int, gradients: Sequence[torch.Tensor]) -> None:
        for p, gradient in zip(self.lens.maps.parameters(), gradients, strict=True):
            assert p.grad is not None
            p.grad[site] += gradient[0]


class TokenLoss(Loss):
    """Where tokens are decoded one by one: all sites share passes and reference, and no logits are held.

    Args:
        model: the model.
        lens: the lens.
        length: tokens of one pass through the model, at most.
        narrow: whether products with the head for the gradient may be of numbers rounded to bfloat16.
    """

    def __init__(self, model: Model, lens: FittedLens, length: int, narrow: bool) -> None:
        super().__init__(model, lens)
        self.length, self.narrow = length, narrow

    def backward(self, prompts: Sequence[Encoded], positions: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
        """See `Loss`."""
        tail = self.model.tail
        kl = torch.zeros(len(self.sites), dtype=torch.float64)
        for hidden, final in self._rows(prompts, positions):
            with self.model.exclusive(), torch.no_grad():
                x, reference = self._moved(hidden), tail.prepare(final)
                found = divergence(x, reference, tail.source, narrow=self.narrow)
                del x
                for i, slope in enumerate(found.gradient):
                    self._add(i, hidden[i], slope)
            kl += found.kl.sum(1).cpu()
        return kl, sum(map(len, positions))

    def kl(self, prompts: Sequence[Encoded], positions: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
        """See `Loss`."""
        tail = self.model.tail
        kl = torch.zeros(len(self.sites), dtype=torch.float64)
        for hidden, final in self._rows(prompts, positions):
            with self.model.exclusive(), torch.no_grad():
                x, reference = self._moved(hidden), tail.prepare(final)
                got = statistics(x, tail.source, top_k=1, reference=reference, entropy=False)
            assert got.kl is not None
            kl += got.kl.sum(1).cpu()
        return kl, sum(map(len, positions))

    def _rows(
        self, prompts: Sequence[Encoded], positions: Sequence[Sequence[int]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Hidden states [sites, n, width] of some positions, a few at a time, and of the last block [n, width]."""
        last = self.model.last_site
        many = max(1, ROWS // len(self.sites))
        together = max(1, PASS // self.length)
        for first in range(0, len(prompts), together):
            some = slice(first, first + together)
            with QuickGradients(forward=True):
                found = capture_encoded(
                    self.model, prompts[some], [*self.sites, last], positions[some], self.length, share=False
                )
            final = found.kept[last.layer, last.kind]
            for start in range(0, len(final), many):
                rows = slice(start, min(start + many, len(final)))
                kept = {key: value[rows] for key, value in found.kept.items()}
                one = type(found)(found.sites, found.prompts, found.positions, kept, found.projections)
                yield one.stacked(self.sites), final[rows]

    def _moved(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows to decode [sites, n, d], of hidden states [sites, n, width]."""
        maps, tail = self.lens.maps, self.model.tail
        return torch.stack(
            [
                tail.prepare(maps(_wide(hidden[i : i + 1]), slice(i, i + 1))[0].to(hidden.dtype))
                for i in range(len(hidden))
            ]
        )

    def _add(self, site: int, hidden: torch.Tensor, slope: torch.Tensor) -> None:
        """Add to the gradients of one site's map, from that of its rows [n, d].

        The map is applied once more for this: that costs little beside the head, and keeping it for all sites would
        cost several times their hidden states, and the gradients of all sites at once another copy of all maps.
        """
        own = self._own(site)
        with torch.enable_grad():
            x = self.model.tail.prepare(self._moved_by(own, hidden))
        self._take(site, torch.autograd.grad(x, list(own.values()), slope.to(x.dtype)))


class StateLoss(Loss):
    """Where answers are pooled, or come from whole states: the model's own code is differentiated.

    All answers of an input count: one where they are pooled, one for each position or query otherwise.
    """

    def backward(self, prompts: Sequence[Encoded], positions: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
        """See `Loss`."""
        return self._sums(prompts, gradients=True)

    def kl(self, prompts: Sequence[Encoded], positions: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
        """See `Loss`."""
        return self._sums(prompts, gradients=False)

    def _sums(self, prompts: Sequence[Encoded], *, gradients: bool) -> tuple[torch.Tensor, int]:
        model, tail = self.model, self.model.tail
        kl = torch.zeros(len(self.sites), dtype=torch.float64)
        count = 0
        for prompt in prompts:
            run, rows, output = checked_states(model, prompt, [*self.sites, model.last_site])
            reference = output.rows
            shape = shape_of(run.blocks[-1])
            count += len(reference)
            for i, site in enumerate(self.sites):
                hidden, own = rows_at(model, rows, site), self._own(i)
                with model.exclusive(), torch.set_grad_enabled(gradients):
                    state = model.stack.layout.state(self._moved_by(own, hidden), shape)
                    logits = tail.output(state, run).logits  # `rows` would be without a gradient
                    found = _divergence(reference, logits.reshape(reference.shape), model.space.activation)
                    if gradients:
                        self._take(i, torch.autograd.grad(found, list(own.values())))
                kl[i] += float(found.detach())
        return kl, count


def _divergence(reference: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    """Sum over answers of the KL divergence of logits [answers, V] from the model's own, nats, float64."""
    z, r = z.double(), reference.detach().double()
    if activation == "sigmoid":
        parts = ((F.logsigmoid(side * r), F.logsigmoid(side * z)) for side in (1, -1))
        return torch.stack([_weighed(log_r, log_p).sum() for log_r, log_p in parts]).sum()
    return _weighed(r.log_softmax(-1), z.log_softmax(-1)).sum()


def _weighed(log_r: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    gap = torch.where(log_r > -torch.inf, log_r - log_p, 0.0)
    return log_r.exp() * gap


def _wide(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
