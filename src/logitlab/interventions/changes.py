"""What can be done to the states at a site. A change takes rows [n, width] to rows [n, width]."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch

from logitlab.errors import InputError


@dataclass(frozen=True)
class Rows:
    """Which states a change is given.

    Attributes:
        sequence: [n] which sequence of the batch each is of.
        number: [n] which token of it.
        slot: [n] which of the named positions.
    """

    sequence: torch.Tensor
    number: torch.Tensor
    slot: torch.Tensor


class Change:
    """One way to change states."""

    name: str = "change"

    def __call__(self, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Changed states, of the same shape, dtype and device."""
        raise NotImplementedError

    @property
    def width(self) -> int | None:
        """Size of the states that it is for; None for any."""
        return None

    def describe(self) -> dict[str, Any]:
        """Plain values for the provenance of a reading."""
        return {"change": self.name}


def vector_of(value: Any, what: str) -> torch.Tensor:
    """A vector [width] or rows [n, width] of finite numbers.

    Raises:
        InputError: it is something else.
    """
    try:
        found = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} is a {type(value).__name__}; it must be a vector of numbers") from error
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    if found.ndim not in (1, 2) or not found.numel():
        raise InputError(f"{what} has shape {tuple(found.shape)}; it must be [width], or a row for each position")
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{what} has numbers that are NaN or infinite")
    return found


def value_of(value: Any, what: str, positions: str | slice | tuple[int, ...]) -> torch.Tensor:
    """`vector_of`, where several rows need as many positions that have numbers.

    Raises:
        InputError: they have none, or other numbers of them.
    """
    found = vector_of(value, what)
    if found.ndim == 2:
        if isinstance(positions, str):
            raise InputError(f"{what} has {len(found)} rows: name their positions by numbers, or a slice")
        if isinstance(positions, tuple) and len(positions) != len(found):
            raise InputError(
                f"there are {len(found)} rows of values for {len(positions)} positions: give one for each position"
            )
    return found


def direction_of(value: Any, what: str) -> torch.Tensor:
    """A vector [width] of length 1.

    Raises:
        InputError: it is something else, or zero.
    """
    found = vector_of(value, what)
    if found.ndim != 1:
        raise InputError(f"{what} has shape {tuple(found.shape)}; it must be one vector, [width]")
    size = float(found.detach().double().norm())
    if size == 0:
        raise InputError(f"{what} is zero: it has no direction")
    return found / size


def _at(value: torch.Tensor, states: torch.Tensor, rows: Rows) -> torch.Tensor:
    """A value for each state: one for all, or one for each named position."""
    value = value.to(device=states.device, dtype=states.dtype)
    if value.ndim == 1:
        return value
    wanted = int(rows.slot.max()) + 1 if rows.slot.numel() else 0
    if wanted > len(value):
        raise InputError(f"there are {len(value)} rows of values for {wanted} positions: give one for each position")
    return value[rows.slot.to(value.device)]


@dataclass(frozen=True)
class Add(Change):
    """``h + strength * vector``."""

    vector: torch.Tensor = field(repr=False)
    strength: float = 1.0
    name = "add"

    def __call__(self, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Change`."""
        return states + self.strength * _at(self.vector, states, rows)

    @property
    def width(self) -> int | None:
        """See `Change`."""
        return self.vector.shape[-1]

    def describe(self) -> dict[str, Any]:
        """See `Change`."""
        norm = float(self.vector.detach().double().norm(dim=-1).mean())
        return {"change": self.name, "strength": float(self.strength), "norm": round(norm, 6)}


@dataclass(frozen=True)
class Replace(Change):
    """``value``, whatever was there."""

    value: torch.Tensor = field(repr=False)
    name = "replace"

    def __call__(self, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Change`."""
        return _at(self.value, states, rows).expand_as(states).clone()

    @property
    def width(self) -> int | None:
        """See `Change`."""
        return self.value.shape[-1]


@dataclass(frozen=True)
class Scale(Change):
    """``factor * h``; 0 takes away all."""

    factor: float
    name = "scale"

    def __call__(self, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Change`."""
        return states * self.factor

    def describe(self) -> dict[str, Any]:
        """See `Change`."""
        return {"change": self.name, "factor": float(self.factor)}


@dataclass(frozen=True)
class ProjectOut(Change):
    """``h`` without its part in the span of some directions."""

    basis: torch.Tensor = field(repr=False)
    name = "project out"

    def __call__(self, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Change`."""
        wide = torch.promote_types(states.dtype, torch.float32)
        basis, h = self.basis.to(device=states.device, dtype=wide), states.to(wide)
        return (h - (h @ basis.T) @ basis).to(states.dtype)

    @property
    def width(self) -> int | None:
        """See `Change`."""
        return self.basis.shape[-1]


@dataclass(frozen=True)
class Swap(Change):
    """``h`` with its coordinates along two directions exchanged; what is outside of their plane stays.

    The coordinates are those of the plane's own basis (the two directions, which need not be orthogonal).
    """

    one: torch.Tensor = field(repr=False)
    other: torch.Tensor = field(repr=False)
    name = "swap"

    def __call__(self, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Change`."""
        wide = torch.promote_types(states.dtype, torch.float32)
        plane = torch.stack([self.one, self.other]).to(device=states.device, dtype=wide)  # [2, width]
        h = states.to(wide)
        coordinates = h @ torch.linalg.pinv(plane)  # [n, 2]
        return (h + (coordinates.flip(-1) - coordinates) @ plane).to(states.dtype)

    @property
    def width(self) -> int | None:
        """See `Change`."""
        return self.one.shape[-1]


@dataclass(frozen=True)
class Clamp(Change):
    """``h`` with its coordinate along a direction kept between two numbers."""

    direction: torch.Tensor = field(repr=False)
    low: float | None = None
    high: float | None = None
    name = "clamp"

    def __call__(self, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Change`."""
        wide = torch.promote_types(states.dtype, torch.float32)
        along, h = self.direction.to(device=states.device, dtype=wide), states.to(wide)
        coordinate = h @ along
        kept = coordinate.clamp(self.low, self.high)
        return (h + (kept - coordinate).unsqueeze(-1) * along).to(states.dtype)

    @property
    def width(self) -> int | None:
        """See `Change`."""
        return self.direction.shape[-1]

    def describe(self) -> dict[str, Any]:
        """See `Change`."""
        return {"change": self.name, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Resample(Change):
    """A state drawn from others, anew for each state; the same in each pass with the same seed."""

    pool: torch.Tensor = field(repr=False)
    seed: int = 0
    name = "resample"

    def __call__(self, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Change`."""
        # By the state's own place, so that batches, passes and caches change nothing.
        drawn = [_draw(self.seed, n, len(self.pool)) for n in rows.number.tolist()]
        return self.pool.to(device=states.device, dtype=states.dtype)[drawn]

    @property
    def width(self) -> int | None:
        """See `Change`."""
        return self.pool.shape[-1]

    def describe(self) -> dict[str, Any]:
        """See `Change`."""
        return {"change": self.name, "pool": len(self.pool), "seed": self.seed}


def _draw(seed: int, token: int, count: int) -> int:
    """A number below ``count`` that only depends on the seed and the token's own number."""
    digest = hashlib.sha256(f"{seed} {token}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % count


def basis_of(directions: Any) -> torch.Tensor:
    """An orthonormal basis [k, width] of what some directions [k, width] or [width] span.

    Raises:
        InputError: they are no vectors, or zero.
    """
    given = vector_of(directions, "the directions")
    rows = given.unsqueeze(0) if given.ndim == 1 else given
    _, sizes, basis = torch.linalg.svd(rows.double(), full_matrices=False)
    rank = int((sizes > 1e-10 * sizes.max()).sum()) if float(sizes.max()) > 0 else 0
    if rank == 0:
        raise InputError("the directions are zero: there is nothing to project out")
    return basis[:rank].to(given.dtype)


def numbers_in_order(low: float | None, high: float | None) -> None:
    """Raise `InputError` unless at least one bound is given, and they are in order."""
    if low is None and high is None:
        raise InputError("clamp() needs low=, high=, or both")
    if low is not None and high is not None and low > high:
        raise InputError(f"low is {low} and high is {high}: give them in order")


def number(value: Any, what: str) -> float:
    """A finite number as a float.

    Raises:
        InputError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{what} is {value!r}; it must be a finite number")
    return float(value)
