"""TransformerLens: `logit_lens` over a cache of the residual stream.

It takes one selector a call, so top tokens and a target's rank are two calls; entropy comes with either, so with the
top tokens alone too. There is no KL divergence. The cache is made first, of exactly the hooks that `logit_lens` reads:
handed a model instead, it would make the same cache, then decode the last layer once more as a check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import logit_lens

TARGET = 7042
CHUNK = 512  # rows a product; the default of 64 is slower on this machine


class Contestant:
    """TransformerLens."""

    def __init__(self, folder: str) -> None:
        self.model: Any = TransformerBridge.boot_transformers(folder, device="cpu")
        self.threads = torch.get_num_threads()

    def case(self, what: str, ids: list[int]) -> Callable[[], object] | None:
        """The work of a case."""
        tokens = torch.tensor([ids])

        layers = int(self.model.cfg.n_layers)
        hooks = [f"blocks.{i}.hook_resid_pre" for i in range(layers)] + [f"blocks.{layers - 1}.hook_resid_post"]
        options: dict[str, Any] = {"positions": None, "return_type": "log_probs", "chunk_size": CHUNK}

        def cached() -> Any:
            return self.model.run_with_cache(tokens, names_filter=hooks)[1]

        def top() -> object:
            return logit_lens(cached(), top_k=5, **options)

        def everything() -> object:
            cache = cached()
            return (
                logit_lens(cache, top_k=5, **options),
                logit_lens(cache, targets=TARGET, **options),
            )

        return {"top": top, "all": everything}.get(what)
