"""tuned-lens: a prediction trajectory holds all log-probabilities; statistics are taken from it.

Its own unembedding is used, so the last row is the model's. It finds top tokens only to label its figures, with
numpy on one thread; here they are found by `torch.topk` over the trajectory, which is faster for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from tuned_lens.nn.lenses import LogitLens
from tuned_lens.plotting import PredictionTrajectory

TARGET = 7042


class Contestant:
    """tuned-lens."""

    def __init__(self, folder: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.lens: Any = LogitLens.from_model(self.model)
        self.threads = torch.get_num_threads()

    def case(self, what: str, ids: list[int]) -> Callable[[], object] | None:
        """The work of a case."""

        def read(everything: bool) -> list[Any]:
            trajectory = PredictionTrajectory.from_lens_and_model(
                self.lens, self.model, input_ids=ids, tokenizer=self.tokenizer, targets=[TARGET] * len(ids)
            )
            found: list[Any] = [torch.from_numpy(trajectory.log_probs).topk(5)]
            if everything:
                found += [trajectory.entropy(), trajectory.forward_kl(), trajectory.cross_entropy(), trajectory.rank()]
            return found

        return {"top": lambda: read(False), "all": lambda: read(True)}.get(what)
