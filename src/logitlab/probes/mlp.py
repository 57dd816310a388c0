"""A probe with one hidden layer, trained with AdamW."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from logitlab.probes.labels import BATCH, Codes
from logitlab.probes.probe import Probe


@dataclass(frozen=True)
class MLPProbe(Probe):
    """LayerNorm, a linear map to ``hidden``, GELU, dropout, a linear map to the classes.

    Attributes:
        parameters: weight and bias of the three layers, float32.
    """

    parameters: tuple[torch.Tensor, ...] = field(repr=False)

    def _scores(self, states: NDArray[Any]) -> NDArray[np.float64]:
        parts: list[torch.Tensor] = []
        with torch.no_grad():
            for start in range(0, len(states), BATCH):
                rows = torch.from_numpy(states[start : start + BATCH].astype(np.float32))
                parts.append(_forward(rows, self.parameters))
        return torch.cat(parts).double().numpy()


def mlp(
    states: NDArray[Any],
    codes: Codes,
    classes: tuple[Any, ...],
    *,
    seed: int,
    hidden: int,
    epochs: int,
    rate: float,
    decay: float,
    dropout: float,
    batch: int | None,
) -> MLPProbe:
    """Minimise cross-entropy (nats) with a linear warm-up over a tenth of the steps and a cosine to 0."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.from_numpy(states.astype(np.float32)), torch.from_numpy(codes)
    width, count = states.shape[1], len(states)

    def drawn(*shape: int, inputs: int) -> torch.Tensor:  # PyTorch's own range for linear layers
        return (2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(inputs)

    parameters = (
        torch.ones(width),
        torch.zeros(width),
        drawn(hidden, width, inputs=width),
        drawn(hidden, inputs=width),
        drawn(len(classes), hidden, inputs=hidden),
        drawn(len(classes), inputs=hidden),
    )
    for parameter in parameters:
        parameter.requires_grad_(True)
    size = count if batch is None else min(batch, count)
    steps = epochs * -(-count // size)
    warm = math.ceil(steps / 10)
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    step = 0
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.arange(count) if size == count else torch.randperm(count, generator=generator)
            for some in order.split(size):
                for group in optimiser.param_groups:
                    group["lr"] = rate * schedule(step, steps, warm)
                optimiser.zero_grad()
                loss = F.cross_entropy(_forward(x[some], parameters, dropout, generator), y[some])
                loss.backward()
                optimiser.step()
                step += 1
    return MLPProbe("mlp", classes, width, tuple(p.detach() for p in parameters))


def schedule(step: int, steps: int, warm: int) -> float:
    """The share of the rate at a step: (step + 1) / warm at first, then half a cosine down to 0."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _forward(
    x: torch.Tensor,
    parameters: tuple[torch.Tensor, ...],
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    scale, shift, first, first_bias, second, second_bias = parameters
    inner = F.gelu(F.linear(F.layer_norm(x, (x.shape[1],), scale, shift), first, first_bias))
    if dropout > 0:
        # Not nn.Dropout, which draws from PyTorch's global generator.
        inner = inner * (torch.rand(inner.shape, generator=generator) >= dropout) / (1 - dropout)
    return F.linear(inner, second, second_bias)
