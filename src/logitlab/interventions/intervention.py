"""An intervention: a change, at some sites, at some positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from logitlab.errors import InputError
from logitlab.interventions.changes import (
    Add,
    Change,
    Clamp,
    ProjectOut,
    Replace,
    Resample,
    Scale,
    Swap,
    basis_of,
    direction_of,
    number,
    numbers_in_order,
    value_of,
)
from logitlab.interventions.positions import Positions, parse
from logitlab.interventions.vectors import Vectors
from logitlab.models.capture import Activations
from logitlab.models.handle import Model
from logitlab.models.inputs import whole_number
from logitlab.models.sites import Site


@dataclass(frozen=True)
class Intervention:
    """What is done where.

    Made by `add`, `replace`, `scale`, `project_out`, `ablate`, `swap` and `clamp`.

    Attributes:
        sites: which sites, in any form that `logitlab.read` takes.
        change: what is done there; or for each site something else, by its full name.
        positions: at which tokens, see `logitlab.interventions.positions.parse`.
        sequences: in which sequences of a batch, by number; None for all.
        vectors: what its numbers are from, which knows for which model they are.
    """

    sites: Any
    change: Change | Mapping[str, Change]
    positions: str | slice | tuple[int, ...]
    sequences: tuple[int, ...] | None = None
    vectors: Vectors | None = None

    def only(self, sequences: int | Iterable[int]) -> Intervention:
        """The same in some sequences of a batch alone, so that one pass can try several things.

        It is meant for calls of the module and of Transformers' ``generate`` on a batch. Prompts that `logitlab.read`
        and `logitlab.capture` are given go through the model one by one, so there each of them is sequence 0.

        Args:
            sequences: their numbers in the batch.

        Raises:
            InputError: no number is given, or it is negative. In the block: a number is beyond the batch.

        Example:
            ``intervene(model, add("8.resid_post", v).only(0), add("8.resid_post", v, strength=4).only(1))``
        """
        many: list[Any] = list(sequences) if isinstance(sequences, Iterable) else [sequences]
        found = tuple(whole_number(n, "sequence") for n in many)
        if not found or min(found) < 0:
            raise InputError(f"sequences are {list(found)}; give their numbers in the batch, from 0")
        return dataclasses.replace(self, sequences=found)

    def at(self, model: Model) -> list[tuple[Site, Change]]:
        """The sites of a model, each with its change.

        Raises:
            InputError: a site does not exist or was not verified on this model, a change is for another width, or the
                vectors belong to another model.
        """
        if self.vectors is not None:
            self.vectors.check(model)
        found: list[tuple[Site, Change]] = []
        for site in model.select_sites(self.sites):
            change = self.change.get(str(site)) if isinstance(self.change, Mapping) else self.change
            if change is None:
                assert isinstance(self.change, Mapping)
                if self.vectors is not None:
                    _ = self.vectors[site]  # says what there is
                raise InputError(f"nothing is given for {site}; there is something for {', '.join(self.change)}")
            if change.width not in (None, model.width):
                raise InputError(
                    f"what is given for {site} has width {change.width}, and states of {model.name} have {model.width}"
                )
            found.append((site, change))
        return found

    def describe(self) -> dict[str, Any]:
        """Plain values for the provenance of a reading."""
        change = self.change if isinstance(self.change, Change) else next(iter(self.change.values()))
        sites = self.sites if isinstance(self.sites, str | Site) else [str(s) for s in self.sites or ("resid",)]
        where = self.positions
        if isinstance(where, slice):
            where = ":".join("" if v is None else str(v) for v in (where.start, where.stop, where.step))
        return {
            "sites": str(sites) if isinstance(sites, Site) else sites,
            "positions": list(where) if isinstance(where, tuple) else where,
            **({} if self.sequences is None else {"sequences": list(self.sequences)}),
            **change.describe(),
            **({} if self.vectors is None else self.vectors.describe()),
        }


def _kept(sites: Any) -> Any:
    """Sites that can be gone through more than once."""
    return sites if sites is None or isinstance(sites, str | Site) else tuple(sites)


def add(sites: Any, vector: Any, *, strength: float = 1.0, positions: Positions = None) -> Intervention:
    """Add ``strength`` times a vector to the states at some sites.

    Args:
        sites: for instance ``"12.resid_post"``, see `logitlab.models.sites`.
        vector: [width]; or [n, width], one for each of ``n`` named positions; or `Vectors`, of which each site gets its
            own.
        strength: what it is multiplied with.
        positions: at which tokens, see `logitlab.interventions.positions.parse`; by default all.

    Raises:
        InputError: an argument cannot be used.

    Example:
        ``with intervene(model, add("8.resid_post", vector, strength=4, positions="each")): ...``
    """
    where, much = parse(positions), number(strength, "strength")
    if isinstance(vector, Vectors):
        each = {site: Add(value, much) for site, value in vector.values.items()}
        return Intervention(_kept(sites), each, where, vectors=vector)
    return Intervention(_kept(sites), Add(value_of(vector, "the vector", where), much), where)


def replace(sites: Any, value: Any, *, positions: Positions = None) -> Intervention:
    """Put a value in the place of the states at some sites; ``value`` as for `add`.

    Raises:
        InputError: an argument cannot be used.
    """
    where = parse(positions)
    return Intervention(_kept(sites), Replace(value_of(value, "the value", where)), where)


def scale(sites: Any, factor: float, *, positions: Positions = None) -> Intervention:
    """Multiply the states at some sites with a number.

    Raises:
        InputError: an argument cannot be used.
    """
    return Intervention(_kept(sites), Scale(number(factor, "factor")), parse(positions))


def project_out(sites: Any, directions: Any, *, positions: Positions = None) -> Intervention:
    """Take the part of the states away that lies in the span of some directions.

    Args:
        sites: as for `add`.
        directions: [width], or [k, width]; they need not be orthogonal.
        positions: as for `add`.

    Raises:
        InputError: an argument cannot be used.
    """
    return Intervention(_kept(sites), ProjectOut(basis_of(directions)), parse(positions))


def ablate(sites: Any, to: Any = "zero", *, positions: Positions = None) -> Intervention:
    """Take away what the states at some sites say.

    Args:
        sites: as for `add`.
        to: ``"zero"``; or what `logitlab.capture` has kept of other prompts at these sites: then each state becomes
            their mean.
        positions: as for `add`.

    Raises:
        InputError: an argument cannot be used.
    """
    if isinstance(to, Activations):
        return Intervention(_kept(sites), {str(s): Replace(to[s].float().mean(0)) for s in to.sites}, parse(positions))
    if to != "zero":
        raise InputError(f"ablate(to={to!r}): give 'zero', or activations of other prompts (logitlab.capture)")
    return Intervention(_kept(sites), Scale(0.0), parse(positions))


def resample(sites: Any, others: Activations, *, seed: int = 0, positions: Positions = None) -> Intervention:
    """Put states of other prompts in the place of those at some sites, drawn at random.

    Args:
        sites: as for `add`.
        others: what `logitlab.capture` has kept of other prompts at these sites.
        seed: of the draw. A token draws the same row at all sites, in every pass and batch.
        positions: as for `add`.

    Raises:
        InputError: an argument cannot be used.
    """
    if whole_number(seed, "seed") < 0 or seed >= 2**30:
        raise InputError(f"seed is {seed}; it must be at least 0 and below 2**30")
    return Intervention(_kept(sites), {str(s): Resample(others[s], seed) for s in others.sites}, parse(positions))


def swap(sites: Any, one: Any, other: Any, *, positions: Positions = None) -> Intervention:
    """Exchange the coordinates of the states along two directions; what is outside of their plane stays.

    Raises:
        InputError: a direction is zero, or both are the same.
    """
    a, b = direction_of(one, "the first direction"), direction_of(other, "the second direction")
    if a.shape != b.shape:
        raise InputError(f"the directions have width {a.shape[-1]} and {b.shape[-1]}: they must be alike")
    if float(torch.linalg.svdvals(torch.stack([a, b]).double())[-1]) < 1e-6:
        raise InputError("both directions are the same: there is nothing to swap")
    return Intervention(_kept(sites), Swap(a, b), parse(positions))


def clamp(
    sites: Any, direction: Any, *, low: float | None = None, high: float | None = None, positions: Positions = None
) -> Intervention:
    """Keep the coordinate of the states along a direction, taken with length 1, between two numbers.

    ``low`` and ``high`` alike set it to one.

    Raises:
        InputError: there is no bound, or they are out of order.
    """
    numbers_in_order(low, high)
    return Intervention(_kept(sites), Clamp(direction_of(direction, "the direction"), low, high), parse(positions))
