"""What everything is held against: the model's forward pass, the bare products, and the usual hand-written loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from floor import Product, fastest

TARGET = 7042


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
        if what.startswith("product"):
            return self.product(torch.randn(sites * len(ids), self.head.shape[1]), what)
        work: dict[str, Callable[[], object]] = {
            "forward": lambda: self.forward(tokens),
            "forward, all logits": lambda: self.forward(tokens, everything=True),
            "top": lambda: self.usual(tokens, everything=False),
            "all": lambda: self.usual(tokens, everything=True),
        }
        return work.get(what)

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, *, everything: bool = False) -> object:
        """The model as it is called: with its cache, and with the logits of the last token, or of all."""
        return self.model(tokens, logits_to_keep=0 if everything else 1)

    def product(self, rows: torch.Tensor, what: str) -> Product | None:
        """[rows, d] x [d, V] in the fastest way known: of all, of those by `torch.mm`, or in bfloat16."""
        if what == "product bfloat16":
            return fastest(rows.bfloat16(), self.narrow)
        if what == "product torch.mm":
            return fastest(rows, self.head, ("mm",))
        return fastest(rows, self.head) if what == "product" else None

    @torch.no_grad()
    def usual(self, tokens: torch.Tensor, *, everything: bool) -> list[Any]:
        """Norm, head, log-softmax, and a pass over the vocabulary for each statistic, layer by layer."""
        output = self.model(tokens, output_hidden_states=True)
        norm, head = self.model.model.norm, self.model.lm_head
        final = output.logits[0].log_softmax(-1)
        r = final.exp() if everything else final
        found: list[Any] = []
        for i, hidden in enumerate(output.hidden_states):
            last = i == len(output.hidden_states) - 1
            logits = output.logits[0] if last else head(norm(hidden[0]))
            log_p = logits.log_softmax(-1)
            found.append(log_p.topk(5))
            if everything:
                p = log_p.exp()
                found.append(-(p * log_p).sum(-1))
                found.append((r * (final - log_p)).sum(-1))
                found.append((log_p[:, TARGET], (log_p > log_p[:, TARGET, None]).sum(-1)))
        return found
