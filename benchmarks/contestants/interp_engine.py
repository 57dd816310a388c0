"""interp-engine: `layer_logits`, and its own top-k; entropy, KL and rank are not offered, so by the usual code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import interp_engine
import torch
from interp_engine.lens import layer_logits
from interp_engine.lens_topk import lens_topk

TARGET = 7042


class Contestant:
    """interp-engine."""

    def __init__(self, folder: str) -> None:
        self.model: Any = interp_engine.load_model(folder, backend="eager", device="cpu", dtype="float32")
        self.threads = torch.get_num_threads()

    def case(self, what: str, ids: list[int]) -> Callable[[], object] | None:
        """The work of a case."""
        layers = {"logit_lens": list(range(30))}

        @torch.no_grad()
        def read(everything: bool) -> list[Any]:
            found = layer_logits(self.model, ids, layers)["logit_lens"]
            final = found[29].log_softmax(-1) if everything else None
            out: list[Any] = []
            for logits in found.values():
                out.append(lens_topk(logits, top_n=5))
                if final is not None:
                    log_p = logits.log_softmax(-1)
                    out.append(-(log_p.exp() * log_p).sum(-1))
                    out.append((final.exp() * (final - log_p)).sum(-1))
                    out.append((log_p > log_p[:, TARGET, None]).sum(-1))
            return out

        return {"top": lambda: read(False), "all": lambda: read(True)}.get(what)
