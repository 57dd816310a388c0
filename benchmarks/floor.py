"""The bare product [rows, d] x [d, V], as fast as `torch.mm` does it, and as fast as PyTorch is known to do it at all.

Everything else is held against this product. A slow one would flatter whatever is measured in units of it, so many
ways are tried and the fastest is taken. Whoever knows a faster way should add it here. Only PyTorch is imported:
contestants use this in environments of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

MOST = 2**30
"""Bytes of logits that are held at once."""

COLUMNS = (1024, 2048, 4096)
ROWS = 1024
TRIED, FINAL = 2048, 16_384
"""Rows that every way is tried on, and rows that the best ways are tried on again."""

LIBRARIES = ("mm", "oneDNN")


@dataclass(frozen=True)
class Way:
    """How a product is cut, laid out and computed.

    Attributes:
        library: "mm" for `torch.mm` with one reused output, which is what `@` and `nn.Linear` compute with; "oneDNN"
            for `linear` of tensors made by `to_mkldnn()`, another library that PyTorch carries.
        rows: Rows of a block; 0 for all.
        columns: Head rows of a piece; 0 for all.
        transposed: Whether head @ rows.T is computed.
    """

    library: str
    rows: int
    columns: int
    transposed: bool

    def __str__(self) -> str:
        name = "`torch.mm`" if self.library == "mm" else "oneDNN"
        cut = [f"{self.rows:,} rows"] if self.rows else []
        cut += [f"{self.columns:,} columns"] if self.columns else []
        return f"{name}{', transposed' if self.transposed else ''}, {'by ' + ' x '.join(cut) if cut else 'uncut'}"


class Product:
    """A product that is ready to be run: pieces, converted tensors and the output are there before time is taken."""

    def __init__(self, rows: torch.Tensor, head: torch.Tensor, way: Way) -> None:
        self.way = way
        blocks = rows.split(way.rows or len(rows))
        parts = head.split(way.columns or len(head))
        if way.library == "oneDNN":
            self._blocks, self._parts = [b.to_mkldnn() for b in blocks], [p.to_mkldnn() for p in parts]
        else:
            self._blocks, self._parts = list(blocks), list(parts)
        self._output = rows.new_zeros(len(blocks[0]) * len(parts[0]) if way.library == "mm" else 0)

    @torch.no_grad()
    def __call__(self) -> None:
        """Compute all of it, once."""
        transposed, output = self.way.transposed, self._output
        if self.way.library == "oneDNN":
            for block in self._blocks:
                for part in self._parts:
                    first, second = (part, block) if transposed else (block, part)
                    torch.nn.functional.linear(first, second)  # its output cannot be handed in
            return
        for block in self._blocks:
            for part in self._parts:
                first, second = (part, block) if transposed else (block, part)
                shape = (len(first), len(second))
                torch.mm(first, second.T, out=output[: shape[0] * shape[1]].view(shape))


def ways(rows: int, columns: int, size: int, libraries: tuple[str, ...] = LIBRARIES) -> Iterator[Way]:
    """All that is tried, for a number of rows and of columns whose logits have the given size in bytes."""
    for library in libraries:
        if library == "oneDNN" and not torch.backends.mkldnn.is_available():
            continue
        for block in (0, ROWS) if rows > ROWS else (0,):
            for part in (0, *(c for c in COLUMNS if c < columns)):
                if (block or rows) * (part or columns) * size <= MOST:
                    yield from (Way(library, block, part, transposed) for transposed in (False, True))


_chosen: dict[tuple[object, ...], Way] = {}


def fastest(rows: torch.Tensor, head: torch.Tensor, libraries: tuple[str, ...] = LIBRARIES) -> Product:
    """The product of rows [n, d] and head [V, d], ready to run in the way that took least time.

    Every way is run three times on at most `TRIED` rows; the best two for each size of a block are run twice more on at
    most `FINAL` rows. A choice is made once in a process for each shape and dtype.
    """
    key = (rows.shape, head.shape, rows.dtype, libraries)
    if key not in _chosen:
        tried = _seconds(rows[:TRIED], head, list(ways(len(rows), len(head), rows.element_size(), libraries)), 3)
        finalists = [w for b in (0, ROWS) for w in sorted((w for w in tried if w.rows == b), key=tried.__getitem__)[:2]]
        last = _seconds(rows[:FINAL], head, finalists, 2)
        _chosen[key] = min(last, key=last.__getitem__)
    return Product(rows, head, _chosen[key])


def _seconds(rows: torch.Tensor, head: torch.Tensor, candidates: list[Way], repeats: int) -> dict[Way, float]:
    found: dict[Way, float] = {}
    for way in candidates:
        try:
            product = Product(rows, head, way)
            found[way] = min(_timed(product) for _ in range(repeats))
        except RuntimeError:  # a library that lacks this dtype, or no room for its output
            continue
    return found


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
