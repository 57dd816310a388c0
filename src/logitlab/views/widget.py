"""A Reading as a notebook widget, whose selection Python can see and set.

The widget runs the same module as the page (lens_grid.js), on the data of grid_data.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from logitlab.errors import InputError
from logitlab.reading import Reading
from logitlab.views.grid_data import grid_data
from logitlab.views.page import module_text
from logitlab.views.tokens import visible

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise InputError("the widget needs anywidget: pip install 'logitlab[notebook]'") from error

THEMES = ("auto", "light", "dark")
"""What `LensGrid` may look like; auto is what the browser prefers."""


class LensGrid(anywidget.AnyWidget):
    """The lens grid of a Reading in a notebook; `Reading.widget` makes one.

    Attributes:
        data: what is drawn, see grid_data.py; set with `show`.
        selection: the chosen cell, ``{"prompt": 0, "site": "3.resid_post", "position": 2, "token": " is"}``; None
            before anything was chosen. It may be set; prompt (0) and token need not be given, and negative
            positions count from the end of the prompt.
        theme: ``auto``, ``light`` or ``dark``.
        state: what is seen, as text (the part of a page's address after ``#``); it may be set.

    Example:
        ``grid = reading.widget()``, and in another cell of the notebook
        ``reading.at(position=grid.selection["position"]).rank``.
    """

    _esm = module_text()
    data = traitlets.Dict().tag(sync=True)
    selection = traitlets.Dict(allow_none=True, default_value=None).tag(sync=True)
    theme = traitlets.Unicode("auto").tag(sync=True)
    state = traitlets.Unicode("").tag(sync=True)

    def __init__(self, reading: Reading, *, theme: str = "auto", **options: Any) -> None:
        """Draw a Reading.

        Args:
            reading: the table.
            theme: ``auto``, ``light`` or ``dark``.
            options: other traits of a widget, ``selection`` and ``state`` among them.

        Raises:
            InputError: there is no such theme or cell.
        """
        self._reading = reading
        super().__init__(data=grid_data(reading), theme=theme, **options)

    def show(self, reading: Reading) -> None:
        """Draw another Reading; what is chosen stays chosen where it is still there.

        Args:
            reading: the table.
        """
        self._reading = reading
        try:
            kept = self.selection and _cell(reading, cast("Mapping[str, Any]", self.selection))
        except InputError:  # that cell is gone
            kept = None
        with self.hold_trait_notifications():
            self.data = grid_data(reading)
            self.selection = kept

    @traitlets.validate("theme")
    def _check_theme(self, proposal: Mapping[str, Any]) -> str:
        if proposal["value"] not in THEMES:
            raise InputError(f"there is no theme {proposal['value']!r}: take one of {', '.join(THEMES)}")
        return proposal["value"]

    @traitlets.validate("selection")
    def _check_selection(self, proposal: Mapping[str, Any]) -> dict[str, Any] | None:
        return None if proposal["value"] is None else _cell(self._reading, proposal["value"])


def _cell(reading: Reading, given: Mapping[str, Any]) -> dict[str, Any]:
    """A selection with all its parts, if the Reading has that cell."""
    if unknown := given.keys() - {"prompt", "site", "position", "token"}:
        raise InputError(f"a selection has no {min(map(str, unknown))!r}: it has prompt, site and position")
    for name in ("site", "position"):
        if name not in given:
            raise InputError(f"a selection needs a {name}: it has site and position, and prompt if it is not the first")
    n, site, position = given.get("prompt", 0), given["site"], given["position"]
    if type(n) is not int or not 0 <= n < len(reading.prompts):
        raise InputError(f"prompt {n!r} cannot be selected: the Reading has {len(reading.prompts)}, counted from 0")
    # The browser knows a site by its visible name.
    names = {visible(name): name for name in reading.sites} | {name: name for name in reading.sites}
    if not isinstance(site, str) or site not in names:
        raise InputError(f"site {site!r} cannot be selected: the Reading goes from {_ends(reading.sites)}")
    prompt = reading.prompts[n]
    place = position + len(prompt.tokens) if type(position) is int and position < 0 else position
    if type(place) is not int or place not in prompt.positions:
        raise InputError(f"position {position!r} cannot be selected: of prompt {n} there is {_ends(prompt.positions)}")
    return {"prompt": n, "site": names[site], "position": place, "token": prompt.tokens[place]}


def _ends(values: tuple[Any, ...]) -> str:
    return f"{values[0]} to {values[-1]}" if values else "nothing"
