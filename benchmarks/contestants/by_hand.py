"""What everything is held against: the model's forward pass, the bare products, and the loop that everybody writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

TARGET = 7042
WIDTHS = (1024, 2048, 4096)


class Contestant:
    """Plain PyTorch and transformers."""

    def __init__(self, folder: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.head = self.model.lm_head.weight.detach()
        self.narrow = self.head.bfloat16()
        self.threads = torch.get_num_threads()

    def case(self, what: str, ids: list[int]) -> Callable[[], object] | None:
        """The work of a case."""
        tokens = torch.tensor([ids])
        sites = self.model.config.num_hidden_layers + 1
        rows = torch.randn(sites * len(ids), self.head.shape[1]) if what.startswith("product") else torch.empty(0, 1)
        work: dict[str, Callable[[], object]] = {
            "forward": lambda: self.forward(tokens),
            "forward, all logits": lambda: self.forward(tokens, everything=True),
            "product": self.product(rows, self.head),
            "product bfloat16": self.product(rows.bfloat16(), self.narrow),
            "top": lambda: self.usual(tokens, everything=False),
            "all": lambda: self.usual(tokens, everything=True),
        }
        return work.get(what)

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, *, everything: bool = False) -> object:
        """The model as it is called: with its cache, and with the logits of the last token, or of all."""
        return self.model(tokens, logits_to_keep=0 if everything else 1)

    @torch.no_grad()
    def product(self, rows: torch.Tensor, head: torch.Tensor) -> Callable[[], object]:
        """[rows, d] x [d, V] by parts of the head, so that nothing large is held; the fastest of a few widths."""

        def run(width: int, some: torch.Tensor) -> None:
            for part in head.split(width):
                some @ part.T

        def seconds(width: int) -> float:
            start = time.perf_counter()
            run(width, rows[:2048])
            return time.perf_counter() - start

        if rows.shape[1] != head.shape[1]:
            return lambda: None
        best = min(WIDTHS, key=lambda width: min(seconds(width) for _ in range(2)))
        return lambda: run(best, rows)

    @torch.no_grad()
    def usual(self, tokens: torch.Tensor, *, everything: bool) -> list[Any]:
        """Norm, head, log-softmax, and a pass over the vocabulary for each statistic, layer by layer."""
        output = self.model(tokens, output_hidden_states=True)
        norm, head = self.model.model.norm, self.model.lm_head
        final = output.logits[0].log_softmax(-1)
        found: list[Any] = []
        for i, hidden in enumerate(output.hidden_states):
            last = i == len(output.hidden_states) - 1
            logits = output.logits[0] if last else head(norm(hidden[0]))
            log_p = logits.log_softmax(-1)
            found.append(log_p.topk(5))
            if everything:
                p = log_p.exp()
                found.append(-(p * log_p).sum(-1))
                found.append((final.exp() * (final - log_p)).sum(-1))
                found.append((log_p[:, TARGET], (log_p > log_p[:, TARGET, None]).sum(-1)))
        return found
