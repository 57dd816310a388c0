"""interpreto: its logit lens gives top tokens of one text; nothing else is offered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from interpreto import LogitLens


class Contestant:
    """interpreto."""

    def __init__(self, folder: str) -> None:
        self.lens: Any = LogitLens(folder, top_k=5)
        self.threads = torch.get_num_threads()

    def case(self, what: str, ids: list[int]) -> Callable[[], object] | None:
        """The work of a case; it takes texts, so the tokens are written out."""
        text = self.lens.splitter.tokenizer.decode(ids)
        return {"top": lambda: self.lens.explain(text, align=False)}.get(what)
