"""Rows to decode, with the few ways in which their logits are computed."""

from __future__ import annotations

import math
from functools import cached_property

import torch

from logitlab.logits.head import Head, LogitSource
from logitlab.logits.statistics import TIE

PAIR_VALUES = 2**20
"""Most numbers of head rows that are gathered at once, as float64."""

GPU_PAIR_VALUES = 2**23
"""The same on a GPU, which small steps leave idle."""

MEAN_TILE = 2048
"""Columns that are weighed at once."""

ALONG_ROWS = 256
"""Rows that are widened to float64 at once."""


class HeadRows:
    """Rows [n, d] whose logits come from a linear head.

    Attributes:
        x: the rows, float32, on the head's device.
        given: the rows as they came.
        head: the head.
        narrow: whether rows and head are both bfloat16, so that their products are exact in float32.
    """

    def __init__(self, x: torch.Tensor, head: Head) -> None:
        self.given = x.to(head.weight.device)
        self.narrow = x.dtype == torch.bfloat16 == head.weight.dtype
        self.x = x.to(device=head.weight.device, dtype=torch.float32)
        self.head = head

    def tile(self, columns: slice, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Logits [n, columns] in ``dtype``."""
        return self.head.logits(self.x, columns, dtype)

    def some(self, rows: torch.Tensor) -> HeadRows:
        """A few of the rows."""
        return HeadRows(self.x[rows], self.head)

    def at(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Float64 logits of (row, column) pairs, both [m] -> [m]."""
        size = max(1, self._pair_values // self.x.shape[1])
        parts = [
            self.head.logits_at(self.x[r], i.unsqueeze(1)).squeeze(1)
            for r, i in zip(rows.split(size), ids.split(size), strict=True)
        ]
        return torch.cat(parts) if parts else self.x.new_zeros(0, dtype=torch.float64)

    def at_all(self, ids: torch.Tensor) -> torch.Tensor:
        """Float64 logits at ``ids`` [n, c], row by row -> [n, c]."""
        return _pairs(self, ids)

    @property
    def _pair_values(self) -> int:
        return GPU_PAIR_VALUES if self.x.device.type == "cuda" else PAIR_VALUES

    @property
    def linear(self) -> bool:
        """Whether differences of logits are differences of rows times the head.

        No soft-cap bends them, and no weight is infinite, which could not be weighed with a probability of 0.
        """
        return self.head.softcap is None and self.finite

    @property
    def finite(self) -> bool:
        """Whether all rows of the head are."""
        return self.head.kept("finite", lambda: bool(torch.isfinite(self.head.row_sizes).all()))

    def mean_row(self, lse: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's rows in the mean that each row's own distribution takes of them.

        Args:
            lse: [n] float64, the log-sum-exp of each row.
            ids: [n, c] columns that are left out.

        Returns:
            The sums of weights ``exp(z - float32(lse))`` times rows of the head [n, d], and of weights [n], float64.
        """
        n, d = self.x.shape
        total = torch.zeros(n, d, dtype=torch.float64, device=self.x.device)
        mass = torch.zeros(n, dtype=torch.float64, device=self.x.device)
        for start in range(0, self.head.vocab_size, MEAN_TILE):
            columns = slice(start, min(start + MEAN_TILE, self.head.vocab_size))
            weights = (self.tile(columns) - lse.float().unsqueeze(1)).exp()
            row, place = ((ids >= columns.start) & (ids < columns.stop)).nonzero(as_tuple=True)
            weights[row, ids[row, place] - columns.start] = 0.0
            total += weights @ self.head.weight[columns].float()
            mass += weights.sum(dim=1, dtype=torch.float64)
        return total, mass

    def expected(self, narrow: bool = False, like: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's row in the mean that each row's own distribution takes of them, in one pass over the head.

        Args:
            like: for how many rows the work is cut, by default for these: cut alike, equal rows give equal bits.
            narrow: whether products may be of numbers rounded to bfloat16, where that is quicker.

        Returns:
            The means [n, d] float32, and log-sum-exp [n] float64. Good for a gradient: neither is settled in float64.
        """
        n, d = self.x.shape
        device, size = self.x.device, self.head.vocab_size
        narrow = narrow and self.narrows
        mean = torch.zeros(n, d, device=device)
        total = torch.zeros(n, 1, dtype=torch.float64, device=device)
        used = torch.zeros(n, 1, dtype=torch.float64, device=device)
        top = torch.full((n, 1), -1e30, device=device)
        for start in range(0, size, MEAN_TILE):
            columns = slice(start, min(start + MEAN_TILE, size))
            z = self._narrow_tile(columns) if narrow else self.tile(columns)
            higher = torch.maximum(top, z.amax(1, keepdim=True))
            shrunk, top = (top - higher).exp(), higher
            weights = (z - top).exp()
            total = total * shrunk + weights.sum(1, keepdim=True, dtype=torch.float64)
            weight = self.head.weight[columns]
            if narrow:
                weights = weights.bfloat16()
                part = product(weights, weight.bfloat16())
            else:
                part = weights @ weight.float()
            used = used * shrunk + weights.sum(1, keepdim=True, dtype=torch.float64)
            mean = mean * shrunk + part
        return mean / used.float(), top.squeeze(1) + total.squeeze(1).log()

    @property
    def narrows(self) -> bool:
        """Whether this device is quicker at products of bfloat16 numbers that are summed in float32."""
        device = self.x.device
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def _narrow_tile(self, columns: slice) -> torch.Tensor:
        """Logits [n, columns] float32 of rounded rows and head."""
        head = self.head
        z = product(self.x.bfloat16(), head.weight[columns].bfloat16().T)
        z = head.postmap(z if head.bias is None else z + head.bias[columns].float())
        return z if head.offset is None else z + head.offset[columns].float()

    def weigh(self, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Sums [n, d] of rows ``ids`` [n, c] of the head times weights [n, c], float64."""
        size = max(1, self._pair_values // (ids.shape[1] * self.x.shape[1]))
        parts = [
            torch.einsum("nc,ncd->nd", w, self.head.weight[i].double())
            for w, i in zip(weights.split(size), ids.split(size), strict=True)
        ]
        return torch.cat(parts)

    def along(self, vectors: torch.Tensor, place: torch.Tensor, base: HeadRows) -> torch.Tensor:
        """``scale (x_base - x) . vectors`` [n] float64, each row with the vector and the base row of its place."""
        parts = [
            ((base.x[p].double() - x.double()) * vectors[p]).sum(1)
            for x, p in zip(self.x.split(ALONG_ROWS), place.split(ALONG_ROWS), strict=True)
        ]
        return torch.cat(parts) * self.head.scale

    @cached_property
    def bound(self) -> torch.Tensor:
        """Bound [n, 1] on the error of a float32 logit.

        Rounding errors of a sum of d products behave like a random walk, so they stay below
        ``2 sqrt(d) u |x| |w|`` (Higham and Mary 2019, with u = 2**-24) with room to spare: |x| |w|
        already over-estimates the sum of absolute products. That is likely, not certain: in which order a
        library sums is not known. `NativeRows` knows its own and has the worst case.
        """
        d = self.x.shape[1]
        slack = 2 * math.sqrt(d) * 2.0**-24 * self.head.largest_row * abs(self.head.scale)
        return (slack * self.x.norm(dim=1, keepdim=True)).double() + 2 * TIE + self.head.extra_error


class SourceRows:
    """Rows [n, V] of logits that come from the model's own tail; they are taken as they are."""

    def __init__(self, z: torch.Tensor) -> None:
        self.z = z.float().clamp_min(-1e38)  # -inf would turn 0 * -inf into NaN
        self.bound = torch.full((z.shape[0], 1), 2 * TIE, dtype=torch.float64, device=z.device)

    def some(self, rows: torch.Tensor) -> SourceRows:
        """A few of the rows."""
        return SourceRows(self.z[rows])

    def tile(self, columns: slice, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Logits [n, columns] in ``dtype``."""
        return self.z[:, columns].to(dtype)

    def at(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Float64 logits of (row, column) pairs, both [m] -> [m]."""
        return self.z[rows, ids].double()

    def at_all(self, ids: torch.Tensor) -> torch.Tensor:
        """Float64 logits at ``ids`` [n, c], row by row -> [n, c]."""
        return self.z.gather(1, ids).double()


Rows = HeadRows | SourceRows


def rows_of(x: torch.Tensor, source: Head | LogitSource) -> Rows:
    """Rows ``x`` [n, d] with the way in which ``source`` decodes them."""
    return HeadRows(x, source) if isinstance(source, Head) else SourceRows(source.compute(x))


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` of bfloat16 matrices in float32: nothing is rounded but what was."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def together(mean: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`HeadRows.expected` over all columns from what it is over parts of them, [parts, n, d] and [parts, n]."""
    if len(lse) == 1:
        return mean[0], lse[0]
    whole = lse.logsumexp(0)
    return torch.einsum("sn,snd->nd", (lse - whole).exp().float(), mean), whole


def _pairs(rows: HeadRows, ids: torch.Tensor) -> torch.Tensor:
    n, c = ids.shape
    numbers = torch.arange(n, device=ids.device).unsqueeze(1).expand(n, c)
    return rows.at(numbers.reshape(-1), ids.reshape(-1)).reshape(n, c)
