"""interp-engine: residuals captured once, decoded layer by layer, and its own top-k.

Two public ways lead to the logits: `layer_logits`, in one call, which holds those of all layers at once (12 GB for 30
layers of 2,048 tokens of the default model); and `capture_residuals` with `decode_residuals`, which `layer_logits` is
made of, one layer at a time. The second is used: it computes the same, and holds the logits of one layer (and of the
last one).
Entropy, KL and rank are not offered, so they are worked out by the usual code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import interp_engine
import torch
from interp_engine import capture_residuals, decode_residuals
from interp_engine.lens_topk import lens_topk

TARGET = 7042


class Contestant:
    """interp-engine."""

    def __init__(self, folder: str) -> None:
        self.model: Any = interp_engine.load_model(folder, backend="eager", device="cpu", dtype="float32")
        self.threads = torch.get_num_threads()

    def case(self, what: str, ids: list[int]) -> Callable[[], object] | None:
        """The work of a case."""

        def decoded(rows: torch.Tensor) -> torch.Tensor:
            quirks = self.model.arch.quirks  # as `layer_logits` does it
            softcap, multiplier = quirks.final_logit_softcapping, quirks.logit_multiplier
            return decode_residuals(self.model, rows, softcap=softcap, multiplier=multiplier)

        @torch.no_grad()
        def read(everything: bool) -> list[Any]:
            residuals = capture_residuals(self.model, ids)
            last = max(residuals)
            out: list[Any] = []
            if not everything:
                for rows in residuals.values():
                    out.append(lens_topk(decoded(rows), top_n=5))
                return out
            ended = decoded(residuals[last])
            final = ended.log_softmax(-1)
            r = final.exp()
            for layer, rows in residuals.items():
                logits = ended if layer == last else decoded(rows)
                out.append(lens_topk(logits, top_n=5))
                log_p = final if layer == last else logits.log_softmax(-1)
                out.append(-(log_p.exp() * log_p).sum(-1))
                out.append((r * (final - log_p)).sum(-1))
                out.append((log_p[:, TARGET], (log_p > log_p[:, TARGET, None]).sum(-1)))
            return out

        return {"top": lambda: read(False), "all": lambda: read(True)}.get(what)
