"""One function from decoded rows to statistics over the vocabulary; backends do the work.

Definitions, for logits ``z`` of one row, ``lse = log sum_v exp z_v`` and ``p = exp(z - lse)``:

* log-probability of ``v``: ``z_v - lse``, in nats;
* entropy: ``lse - sum_v p_v z_v``, in nats;
* KL divergence from a reference distribution ``r``: ``sum_v r_v (log r_v - log p_v)``, in nats;
* cross-entropy to it: ``- sum_v r_v log p_v``, in nats;
* rank of ``v``: 1 + the number of columns that come before it. A column comes before another
  when its logit is larger or, in a tie, when its id is smaller. Logits that agree to 2**-30 are tied,
  so ranks do not depend on the device that summed them.

A row with a NaN or +inf among its logits (or one that float32 does not hold) has no distribution: all of the above are
NaN, and ids and ranks are those of a row whose columns all tie.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from logitlab.errors import InputError, KernelError
from logitlab.logits.head import Head, LogitSource

TIE = 2.0**-30
"""Logits are compared in steps of this size."""

MAX_ERROR = 1e-3
"""Nats by which a screened statistic may be off, unless the caller says otherwise."""


@dataclass
class Statistics:
    """Statistics of rows shaped [groups, positions]; k and m are the numbers of top ids and targets.

    Attributes:
        top_ids: [groups, positions, k] int64, best first.
        top_logprob: [groups, positions, k] float64, nats.
        logsumexp: [groups, positions] float64.
        entropy: [groups, positions] float64, nats; None where it was not wanted.
        target_logprob: [groups, positions, m] float64, nats; None without targets.
        target_rank: [groups, positions, m] int64, from 1; None without targets.
        kl: [groups, positions] float64, nats, from the reference; None without a reference.
        cross_entropy: [groups, positions] float64, nats, to the reference; None without one.
        bound: [groups, positions] float64, nats: what screening can have added to the error of any of
            these statistics; 0 where a row was done in full. None of an exact pass. Ids and ranks are
            never affected.
    """

    top_ids: torch.Tensor
    top_logprob: torch.Tensor
    logsumexp: torch.Tensor
    entropy: torch.Tensor | None = None
    target_logprob: torch.Tensor | None = None
    target_rank: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    cross_entropy: torch.Tensor | None = None
    bound: torch.Tensor | None = None

    @staticmethod
    def join(parts: list[Statistics], dim: int) -> Statistics:
        """Put the statistics of consecutive rows together again along ``dim``."""
        joined: dict[str, torch.Tensor | None] = {}
        for f in fields(Statistics):
            values = [getattr(part, f.name) for part in parts]
            joined[f.name] = None if any(v is None for v in values) else torch.cat(values, dim=dim)
        return Statistics(**joined)  # pyright: ignore[reportArgumentType]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Statistics:
        """The same with every tensor changed."""
        values = {f.name: getattr(self, f.name) for f in fields(Statistics)}
        return Statistics(**{name: None if v is None else change(v) for name, v in values.items()})  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Request:
    """What to compute; shared by all backends.

    Attributes:
        top_k: number of top columns.
        columns: number of columns that are ranked.
        targets: [positions or 1, m] column ids, or None; for each row where a backend works on rows.
        allowed: [V] bool, the columns that are ranked, or None for all; normalisation ignores it.
        entropy: whether the entropy is wanted.
        precision: one of `PRECISIONS`.
        max_error: nats by which a screened statistic may be off.
    """

    top_k: int
    columns: int
    targets: torch.Tensor | None = None
    allowed: torch.Tensor | None = None
    entropy: bool = True
    precision: str = "exact"
    max_error: float = MAX_ERROR

    def only_top(self) -> Request:
        """The same without targets and entropy."""
        return replace(self, targets=None, entropy=False)

    def with_targets(self, targets: torch.Tensor | None) -> Request:
        """The same with other targets."""
        return replace(self, targets=targets)

    def at(self, positions: slice) -> Request:
        """The same for some of the positions."""
        if self.targets is None or self.targets.shape[0] == 1:
            return self
        return replace(self, targets=self.targets[positions])

    def for_rows(self, groups: int, positions: int) -> Request:
        """The same with targets [groups * positions, m], row by row."""
        if self.targets is None:
            return self
        m = self.targets.shape[1]
        return replace(self, targets=self.targets.expand(groups, positions, m).reshape(-1, m))


@dataclass(frozen=True)
class Asked:
    """The arguments of `statistics` that are the same for all rows of a reading.

    Attributes:
        top_k: as in `statistics`.
        targets: [m] column ids, or None.
        allowed: as in `statistics`.
        entropy: whether the entropy is wanted.
        kl: whether the divergence from a reference is wanted.
        precision: as in `statistics`.
        max_error: as in `statistics`.
        backend: as in `statistics`.
    """

    top_k: int = 5
    targets: torch.Tensor | None = None
    allowed: torch.Tensor | None = None
    entropy: bool = True
    kl: bool = True
    precision: str = "exact"
    max_error: float = MAX_ERROR
    backend: str = "auto"

    def of(self, x: torch.Tensor, source: Head | LogitSource, reference: torch.Tensor | None) -> Statistics:
        """Statistics of rows [groups, positions, d] against reference rows [positions, d]."""
        return statistics(
            x,
            source,
            top_k=min(self.top_k, source.vocab_size),
            targets=self.targets,
            allowed=self.allowed,
            reference=reference if self.kl else None,
            entropy=self.entropy,
            precision=self.precision,
            max_error=self.max_error,
            backend=self.backend,
        )


Backend = Callable[[torch.Tensor, "Head | LogitSource", Request, "torch.Tensor | None"], Statistics]

BACKENDS = ("auto", "native", "triton", "tiled", "reference")
"""Names of the backends.

``native`` (compiled on this machine, for processors), ``triton`` (for GPUs), ``tiled`` (PyTorch alone, anywhere),
``reference`` (float64, plain, for tests); ``auto`` takes the first of them that can do the work.
"""

PRECISIONS = ("exact", "screened", "auto")
"""Names of the precisions, see `statistics`."""


def statistics(
    x: torch.Tensor,
    source: Head | LogitSource,
    *,
    top_k: int = 5,
    targets: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    entropy: bool = True,
    precision: str = "exact",
    max_error: float = MAX_ERROR,
    backend: str = "auto",
) -> Statistics:
    """Statistics over the vocabulary of decoded rows.

    Args:
        x: rows to decode, [groups, positions, d] (or [positions, d], taken as one group).
        source: what turns rows into logits.
        top_k: number of top columns to keep, at least 1.
        targets: int64 ids whose log-probability and rank are wanted: [m], the same for all rows, or
            [positions, m].
        allowed: [V] bool; only these columns compete for the top and count for ranks. Probabilities
            are still normalised over the whole vocabulary.
        reference: rows [positions, d]; ``kl`` and ``cross_entropy`` are of every group's distribution
            from the one that these rows give.
        entropy: whether the entropy is wanted.
        precision: ``exact`` (the default): float32 products, float64 where those are too coarse. ``screened``:
            where the processor multiplies bfloat16, a first look in bfloat16, after which every column that
            can still matter is computed again in float32; no statistic is off by more than ``max_error``,
            and rows for which that cannot be shown are done in full. ``auto``: screened if that turns out
            faster on the first rows, else exact.
        max_error: nats by which a screened statistic may be off. The bound that holds for each row is in the
            result. Ids and ranks are exact in every precision.
        backend: one of `BACKENDS`.

    Raises:
        InputError: a shape, size, id or name is wrong, or the backend cannot run here.

    Example:
        >>> head = Head(torch.eye(3))
        >>> s = statistics(torch.tensor([[2.0, 0.0, 0.0]]), head, top_k=1, targets=torch.tensor([2]))
        >>> s.top_ids.tolist(), s.target_rank.tolist()
        ([[[0]]], [[[3]]])
    """
    from logitlab.logits.choose import check_max_error, check_precision, choose, run_of

    _check_rows(x, source, reference)
    if x.ndim == 2:
        x = x.unsqueeze(0)
    size = source.vocab_size
    columns = size if allowed is None else int(allowed.sum())
    if allowed is not None and allowed.shape != (size,):
        raise InputError(f"the vocabulary filter has shape {tuple(allowed.shape)}; the vocabulary has {size} entries")
    if columns == 0:
        raise InputError("the vocabulary filter leaves no token to rank")
    if top_k < 1:
        raise InputError(f"top_k is {top_k}; it must be at least 1")
    check_precision(precision)
    check_max_error(max_error)
    if targets is not None:
        targets = _checked_targets(targets, x.shape[1], size)
    name = choose(backend, source)
    request = Request(min(top_k, columns), columns, targets, allowed, entropy, precision, float(max_error))
    if 0 in x.shape[:2]:
        return _of_nothing(x, request, reference)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), _full_products():
        try:
            found = run_of(name)(x, source, request, reference)
        except KernelError:  # the next call will know
            if backend != "auto":
                raise
            found = run_of("tiled")(x, source, request, reference)
    if precision != "exact" and found.bound is None:  # a backend that has nothing to screen does all rows in full
        found.bound = torch.zeros_like(found.logsumexp)
    return found


def _check_rows(x: torch.Tensor, source: Head | LogitSource, reference: torch.Tensor | None) -> None:
    """Refuse rows of a wrong shape: compiled code would read beyond them."""
    shape = tuple(x.shape)
    if x.ndim not in (2, 3):
        raise InputError(f"the rows have shape {shape}; give [groups, positions, d] or [positions, d]")
    if isinstance(source, Head) and shape[-1] != source.weight.shape[1]:
        width = source.weight.shape[1]
        raise InputError(f"the rows have shape {shape}, but the head takes rows of width {width}; give [..., {width}]")
    if reference is not None and tuple(reference.shape) != shape[-2:]:
        raise InputError(
            f"the reference has shape {tuple(reference.shape)}; the rows have shape {shape}, so give one row for each"
            f" position, {list(shape[-2:])}"
        )


def _of_nothing(x: torch.Tensor, request: Request, reference: torch.Tensor | None) -> Statistics:
    """Statistics of no groups or no positions."""

    def empty(*last: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return x.new_zeros((*x.shape[:2], *last), dtype=dtype)

    found = Statistics(empty(request.top_k, dtype=torch.int64), empty(request.top_k), empty())
    if request.entropy:
        found.entropy = empty()
    if request.targets is not None:
        m = request.targets.shape[1]
        found.target_logprob, found.target_rank = empty(m), empty(m, dtype=torch.int64)
    if reference is not None:
        found.kl, found.cross_entropy = empty(), empty()
    if request.precision != "exact":
        found.bound = empty()
    return found


class _Switches:
    """The process's settings that let PyTorch compute float32 products in TF32 or bfloat16.

    Threads share them. So the first that needs full products switches them, and the last one that does switches them
    back; in between, products of other threads are full as well.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: list[Callable[[], object]] = []

    def enter(self) -> None:
        """Have full products from now on."""
        with self._lock:
            if self._inside == 0:
                self._restore = _switch_off()
            self._inside += 1

    def leave(self) -> None:
        """Have what was set before, if nobody else needs full products."""
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for restore in self._restore:
                    restore()


_switches = _Switches()


def _switch_off() -> list[Callable[[], object]]:
    """Have float32 products computed in float32; what to call to undo that."""
    places: list[Any] = [torch.backends.mkldnn, torch.backends.cuda]
    settings = [p.matmul for p in places if hasattr(getattr(p, "matmul", None), "fp32_precision")]
    if not settings:  # before PyTorch 2.9 there is one setting for all
        before = torch.get_float32_matmul_precision()
        if before == "highest":
            return []
        torch.set_float32_matmul_precision("highest")
        return [lambda: torch.set_float32_matmul_precision(before)]
    undo: list[Callable[[], object]] = []
    for setting in settings:
        value = setting.fp32_precision
        if value not in ("none", "ieee"):
            setting.fp32_precision = "ieee"
            undo.append(lambda s=setting, v=value: setattr(s, "fp32_precision", v))
    return undo


@contextmanager
def _full_products() -> Generator[None]:
    """Have float32 products computed in float32, also where the user lets PyTorch use TF32 or bfloat16 for them."""
    _switches.enter()
    try:
        yield
    finally:
        _switches.leave()


def _checked_targets(targets: torch.Tensor, positions: int, size: int) -> torch.Tensor:
    if targets.ndim not in (1, 2) or (targets.ndim == 2 and targets.shape[0] not in (1, positions)):
        raise InputError(f"targets have shape {tuple(targets.shape)}; give [m], or [positions, m] = [{positions}, m]")
    if targets.numel() and not bool(((targets >= 0) & (targets < size)).all()):
        bad = targets[(targets < 0) | (targets >= size)][0]
        raise InputError(f"target id {int(bad)} is not in the vocabulary (0 to {size - 1})")
    return targets if targets.ndim == 2 else targets.unsqueeze(0)


def in_order(z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Indices that sort columns [n, c] by logit, ties (to `TIE`) by id: the order of ranks."""
    by_id = torch.argsort(ids, dim=-1, stable=True)
    steps = torch.round(z.double().gather(-1, by_id) / TIE)
    by_logit = torch.argsort(steps, dim=-1, descending=True, stable=True)
    return by_id.gather(-1, by_logit)
