"""One prompt through several lenses, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitlab.errors import InputError
from logitlab.reading import Reading

if TYPE_CHECKING:
    from rich.console import RenderableType

    from logitlab.lenses import Lens
    from logitlab.models.handle import Model
    from logitlab.models.sites import Site


@dataclass(frozen=True)
class Comparison:
    """Readings of the same prompts at the same sites and positions, by lens.

    Attributes:
        readings: the readings by the name of their lens, in order.
    """

    readings: Mapping[str, Reading]

    def __post_init__(self) -> None:
        """Raise `InputError` unless the readings are of the same model, prompts, sites and positions."""
        given: Any = self.readings
        named = isinstance(given, Mapping) and all(isinstance(name, str) for name in given)
        if not named or not all(isinstance(reading, Reading) for reading in given.values()):
            raise InputError("give readings by the name of their lens, as a mapping")
        if not self.readings:
            raise InputError("there is nothing to compare: give at least one lens")
        (name, first), *others = self.readings.items()
        for other, reading in others:
            what = _difference(first, reading)
            if what is not None:
                raise InputError(f"the readings {name!r} and {other!r} are of other {what}")

    def __getitem__(self, name: str) -> Reading:
        """The reading through one lens.

        Raises:
            InputError: there is no such lens.
        """
        if name not in self.readings:
            raise InputError(f"there is no lens {name!r} in this comparison; there are {', '.join(self.readings)}")
        return self.readings[name]

    def __rich__(self) -> RenderableType:
        """The grid in a terminal."""
        return self.grid()

    def __str__(self) -> str:
        """The grid as plain text."""
        from logitlab.views.compare import grid_text

        return grid_text(self)

    def grid(self, *, prompt: int = 0, position: int = -1) -> RenderableType:
        """Sites by lenses at one read position: top token, its probability, KL from the model in nats."""
        from logitlab.views.compare import grid

        return grid(self, prompt=prompt, position=position)

    def figure(self, path: str | Path, *, prompt: int = 0) -> Path:
        """Write a figure with a panel for each lens: sites by tokens; the ending (.png, .svg, .pdf) sets the format."""
        from logitlab.views.compare import save_figure

        return save_figure(self, path, prompt=prompt)


def _difference(one: Reading, other: Reading) -> str | None:
    """What two readings are not both of, or None."""
    if any(one.provenance.get(key) != other.provenance.get(key) for key in ("fingerprint", "stack")):
        return "models"
    read = [[(p.text, p.ids, p.positions, p.pictures) for p in reading.prompts] for reading in (one, other)]
    if read[0] != read[1]:
        return "prompts or positions"
    return "sites" if one.sites != other.sites else None


def compare(model: Model, inputs: Any, lenses: Mapping[str, Lens], *, sites: Any = None, **options: Any) -> Comparison:
    """Read the same prompts through several lenses.

    Args:
        model: the model.
        inputs: prompts, as in `logitlab.read`.
        lenses: lenses by the name that they shall have; `logitlab.LogitLens` is one.
        sites: which sites, as in `logitlab.read`; by default those of the residual stream that every lens has.
        options: other arguments of `logitlab.read`.

    Raises:
        InputError: as for `logitlab.read`; or the lenses have no site in common.

    Example:
        ``compare(model, "The capital of France is", {"logit": LogitLens(), "tuned": lens}).figure("lenses.png")``
    """
    from logitlab.lenses import Lens
    from logitlab.reader import read

    given: Any = lenses
    if not isinstance(given, Mapping) or not given or not all(isinstance(name, str) for name in given):
        raise InputError("give lenses by the name that they shall have: {'logit': LogitLens(), ...}")
    strange = next((name for name, lens in given.items() if not isinstance(lens, Lens)), None)
    if strange is not None:
        raise InputError(f"{strange!r} is a {type(given[strange]).__name__}, not a lens: load_lens() gives one")
    if "lens" in options:
        raise InputError("compare() takes lenses=, not lens=")
    chosen = common_sites(model, lenses) if sites is None else sites
    return Comparison({name: read(model, inputs, lens=lens, sites=chosen, **options) for name, lens in lenses.items()})


def common_sites(model: Model, lenses: Mapping[str, Lens]) -> list[str]:
    """Sites of the residual stream that every lens can be used at.

    Args:
        model: the model.
        lenses: lenses by name.

    Raises:
        InputError: a lens is not for this model, or they have no site in common.

    Example:
        ``read(model, inputs, lens=lens, sites=common_sites(model, {"tuned": lens}))`` reads where the lens is.
    """
    every = model.select_sites(None)
    refused: InputError | None = None
    for lens in lenses.values():
        lens.check(model, [model.last_site])  # whether it is for this model at all
        try:
            lens.check(model, every)
            continue
        except InputError as error:
            refused = error
        every = [site for site in every if _fits(lens, model, site)]
    if all(site == model.last_site for site in every):
        raise InputError(f"the lenses have no site of the residual stream in common: {refused}")
    return [str(site) for site in every]


def _fits(lens: Lens, model: Model, site: Site) -> bool:
    try:
        lens.check(model, [site])
    except InputError:
        return False
    return True
