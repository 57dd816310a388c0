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


@dataclass(frozen=True)
class Comparison:
    """Readings of the same prompts at the same sites and positions, by lens.

    Attributes:
        readings: the readings by the name of their lens, in order.
    """

    readings: Mapping[str, Reading]

    def __post_init__(self) -> None:
        """Raise `InputError` unless the readings are of the same prompts, sites and positions."""
        if not self.readings:
            raise InputError("there is nothing to compare: give at least one lens")
        (name, first), *others = self.readings.items()
        for other, reading in others:
            same = [p.ids for p in reading.prompts] == [p.ids for p in first.prompts]
            if not same or [p.positions for p in reading.prompts] != [p.positions for p in first.prompts]:
                raise InputError(f"the readings {name!r} and {other!r} are of other prompts or positions")
            if reading.sites != first.sites:
                raise InputError(f"the readings {name!r} and {other!r} are of other sites")

    def __getitem__(self, name: str) -> Reading:
        """The reading through one lens."""
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
    from logitlab.reader import read

    chosen = _common(model, lenses) if sites is None else sites
    return Comparison({name: read(model, inputs, lens=lens, sites=chosen, **options) for name, lens in lenses.items()})


def _common(model: Model, lenses: Mapping[str, Lens]) -> list[str]:
    """Sites of the residual stream that every lens can be used at."""
    found: list[str] = []
    refused: InputError | None = None
    for site in model.select_sites(None):
        try:
            for lens in lenses.values():
                lens.check(model, [site])
        except InputError as error:
            refused = error
            continue
        found.append(str(site))
    if all(site == str(model.last_site) for site in found):
        raise InputError(f"the lenses have no site of the residual stream in common: {refused}")
    return found
