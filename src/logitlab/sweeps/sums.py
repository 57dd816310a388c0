"""What a sweep adds up: from statistics of single tokens to sums that can be merged in any number of pieces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from logitlab.logits import Statistics

MEASURES = ("kl", "entropy", "agreement", "overlap", "confidence", "cross_entropy", "accuracy")
"""What is averaged at every site.

``kl`` and ``entropy`` are those of `logitlab.logits.statistics`, in nats; ``agreement`` is the share of tokens whose
top token is the model's own, ``overlap`` the share of the model's top k that is in the site's, ``confidence`` the
probability of the top token; ``cross_entropy`` (nats) and ``accuracy`` are about the next token of the text.
"""

RANKS = 20
"""Bins of ranks: bin i has the ranks from 2**i to 2**(i + 1) - 1, the last one all that are larger."""

CONFIDENCES = 15
"""Bins of confidence for calibration, all of the same width."""


@dataclass
class Sums:
    """Sums over the tokens of some windows, at S sites.

    A window's tokens depend on each other and windows hardly do, so what is kept are moments of the windows' sums.

    Attributes:
        windows: how many windows.
        moments: [measures, 6, S] float64: over windows, sums of s, n, s s, s n and n n, where s is the sum of a measure
            over the window's n tokens; and the number of windows with any such token.
        ranks: [S, `RANKS`] int64: ranks of the next token.
        depths: [S] int64: tokens whose top token is the model's own from this site on, and not before.
        calibration: [S, `CONFIDENCES`, 3] float64: tokens, sum of their confidence, and how many were right.
    """

    windows: int
    moments: np.ndarray
    ranks: np.ndarray
    depths: np.ndarray
    calibration: np.ndarray

    @staticmethod
    def nothing(sites: int) -> Sums:
        """Sums over no window."""
        return Sums(
            0,
            np.zeros((len(MEASURES), 6, sites)),
            np.zeros((sites, RANKS), dtype=np.int64),
            np.zeros(sites, dtype=np.int64),
            np.zeros((sites, CONFIDENCES, 3)),
        )

    def add(self, other: Sums) -> None:
        """Add the sums over other windows. Merged in the same order, the result has the same bits."""
        self.windows += other.windows
        self.moments += other.moments
        self.ranks += other.ranks
        self.depths += other.depths
        self.calibration += other.calibration

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays."""
        return {
            "windows": np.array([self.windows], dtype=np.int64),
            "moments": self.moments,
            "ranks": self.ranks,
            "depths": self.depths,
            "calibration": self.calibration,
        }

    @staticmethod
    def of_arrays(arrays: Mapping[str, np.ndarray]) -> Sums:
        """The inverse of `arrays`."""
        rest = {name: np.array(arrays[name]) for name in ("moments", "ranks", "depths", "calibration")}
        return Sums(int(arrays["windows"][0]), **rest)


@dataclass(frozen=True)
class Tokens:
    """What is known of some tokens, row by row, whatever the site.

    Attributes:
        window: [rows] the window of each, counted from 0.
        next_id: [rows] the token that follows it in the text; -1 where none does.
        final_ids: [rows, k] the model's own top tokens.
    """

    window: torch.Tensor
    next_id: torch.Tensor
    final_ids: torch.Tensor

    def at(self, rows: slice) -> Tokens:
        """The same of some rows."""
        return Tokens(self.window[rows], self.next_id[rows], self.final_ids[rows])

    def targets(self) -> torch.Tensor:
        """The next token of each row, [rows, 1]; token 0 where there is none."""
        return self.next_id.clamp_min(0).unsqueeze(1)


def values_of(found: Statistics, tokens: Tokens, *, next_token: bool = True) -> dict[str, torch.Tensor]:
    """The `MEASURES` and the rank of the next token, [sites, rows] float64; NaN where no token follows."""
    top = found.top_ids.cpu()
    final = tokens.final_ids
    has_next = tokens.next_id >= 0
    shared = (top.unsqueeze(-1) == final.unsqueeze(-2)).any(-1).double().mean(-1)
    values = {
        "agreement": (top[..., 0] == final[:, 0]).double(),
        "overlap": shared,
        "confidence": found.top_logprob[..., 0].cpu().exp(),
    }
    if next_token:
        values["accuracy"] = torch.where(has_next, (top[..., 0] == tokens.next_id).double(), torch.nan)
    if found.kl is not None:
        values["kl"] = found.kl.cpu()
    if found.entropy is not None:
        values["entropy"] = found.entropy.cpu()
    if found.target_logprob is not None and found.target_rank is not None:
        values["cross_entropy"] = torch.where(has_next, -found.target_logprob[..., 0].cpu(), torch.nan)
        values["rank"] = torch.where(has_next, found.target_rank[..., 0].cpu().double(), torch.nan)
    return values


class Adder:
    """Adds up the tokens of some windows.

    Args:
        windows: how many windows.
        sites: how many sites.
        stream: whether the sites are states of the residual stream in order, so that a prediction has a depth.
    """

    def __init__(self, windows: int, sites: int, *, stream: bool) -> None:
        self._sites, self._stream = sites, stream
        self._sums = torch.zeros(len(MEASURES), windows, sites, dtype=torch.float64)
        self._counts = torch.zeros(len(MEASURES), windows, sites, dtype=torch.float64)
        self._ranks = torch.zeros(windows, sites, RANKS, dtype=torch.int64)
        self._depths = torch.zeros(windows, sites, dtype=torch.int64)
        self._calibration = torch.zeros(windows, sites, CONFIDENCES, 3, dtype=torch.float64)

    def add(self, values: Mapping[str, torch.Tensor], tokens: Tokens) -> None:
        """Add the values [sites, rows] of some tokens."""
        window = tokens.window
        for m, name in enumerate(MEASURES):
            if name not in values:
                continue
            value = values[name].T  # [rows, sites]
            known = ~value.isnan()
            self._sums[m].index_add_(0, window, torch.where(known, value, 0.0))
            self._counts[m].index_add_(0, window, known.double())
        has_next = tokens.next_id >= 0
        if "rank" in values and bool(has_next.any()):
            rank = values["rank"].T[has_next]
            bins = rank.log2().floor().clamp(0, RANKS - 1).long()
            self._ranks.index_add_(0, window[has_next], torch.nn.functional.one_hot(bins, RANKS))
        if self._stream:
            same = values["agreement"].flip(0).cumprod(0).sum(0).long()  # sites at the end that agree
            settled = torch.nn.functional.one_hot((self._sites - same).clamp_max(self._sites - 1), self._sites)
            self._depths.index_add_(0, window, settled)
        if bool(has_next.any()):
            sure = values["confidence"].T[has_next]
            right = values["accuracy"].T[has_next]
            bins = (sure * CONFIDENCES).long().clamp(0, CONFIDENCES - 1)
            chosen = torch.nn.functional.one_hot(bins, CONFIDENCES).double()  # [rows, sites, bins]
            each = torch.stack([torch.ones_like(sure), sure, right], -1)
            self._calibration.index_add_(0, window[has_next], chosen.unsqueeze(-1) * each.unsqueeze(-2))

    def sums(self, windows: list[int]) -> Sums:
        """The sums over some of the windows."""
        s, n = self._sums[:, windows], self._counts[:, windows]
        moments = torch.stack([s, n, s * s, s * n, n * n, (n > 0).double()]).sum(2).transpose(0, 1)
        return Sums(
            len(windows),
            moments.contiguous().numpy(),
            self._ranks[windows].sum(0).numpy(),
            self._depths[windows].sum(0).numpy(),
            self._calibration[windows].sum(0).numpy(),
        )
