"""interpreto: its logit lens gives top tokens of one text; nothing else is offered.

It takes text, and tokenises that itself, so the tokens are written out. That it reads as many tokens as the others (but
for special ones that its tokenizer adds) at as many sites is checked before anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from interpreto import LogitLens

SITES = 31


class Contestant:
    """interpreto."""

    def __init__(self, folder: str) -> None:
        self.lens: Any = LogitLens(folder, top_k=5)
        self.model: Any = self.lens.splitter._model
        self.threads = torch.get_num_threads()
        self._checked = False

    def case(self, what: str, ids: list[int]) -> Callable[[], object] | None:
        """The work of a case. Raises ValueError if its text is not read as that many tokens."""
        if what != "top":
            return None
        tokenizer = self.lens.splitter.tokenizer
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        whole = tokenizer(text)["input_ids"]
        special = len(whole) - len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(whole) - special != len(ids):
            raise ValueError(f"{len(ids)} tokens, written out as text, are read as {len(whole) - special}")
        if not self._checked:  # on the few tokens that come first
            found = self.lens.explain(text, align=False)
            shapes = {tuple(layer["top_indices"].shape) for layer in found.values()}
            if len(found) != SITES or shapes != {(1, len(whole), 5)}:
                raise ValueError(f"it reads {len(found)} sites, top tokens {shapes}, of {len(whole)} tokens")
            self._checked = True
        return lambda: self.lens.explain(text, align=False)
