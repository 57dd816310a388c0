"""Which studies there are: those of logitlab, and those of other packages by entry points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points

from logitlab.errors import InputError
from logitlab.studies.study import Study

GROUP = "logitlab.studies"
"""Group of the entry points; the name of one is the study's, its value ``module:attribute``."""

BUILT_IN = {
    "steerable-not-decodable": "logitlab.studies.steerable_not_decodable.study:STUDY",
}
"""By name, where the study is. These modules import nothing heavy at their top, so that all can be listed."""


@dataclass(frozen=True)
class Entry:
    """A study that is there, not yet imported.

    Attributes:
        name: how commands call it.
        place: ``module:attribute``.
        package: the package that brings it.
    """

    name: str
    place: str
    package: str

    def load(self) -> Study:
        """Import it.

        Raises:
            InputError: that fails, or what is there is no study of this name.
        """
        module, _, attribute = self.place.partition(":")
        where = f"study {self.name!r} of {self.package} ({self.place})"
        try:
            found: object = import_module(module.strip())
            for part in attribute.strip().split("."):
                found = getattr(found, part)
        except (Exception, SystemExit) as error:  # code of others, which may fail in any way
            words = " ".join(str(error).split())[:200]
            raise InputError(f"{where} cannot be imported: {type(error).__name__}: {words}") from error
        if not isinstance(found, Study):
            raise InputError(f"{where} is a {type(found).__name__}; it must be a logitlab.studies.Study")
        if found.name != self.name:
            raise InputError(f"{where} calls itself {found.name!r}: the names must be the same")
        return found


def entries() -> list[Entry]:
    """All studies by name, those of logitlab first; nothing is imported."""
    own = [Entry(name, place, "logitlab") for name, place in BUILT_IN.items()]
    others = [
        Entry(point.name, point.value, point.dist.name if point.dist is not None else "an unnamed package")
        for point in entry_points(group=GROUP)
    ]
    return own + sorted(others, key=lambda entry: (entry.name, entry.package, entry.place))


def find(name: str, among: Sequence[Entry] | None = None) -> Study:
    """The study of a name.

    Args:
        name: of the study.
        among: where to look; by default in `entries`.

    Raises:
        InputError: there is none, there are several, or it cannot be imported.

    Example:
        ``find("steerable-not-decodable").claims``
    """
    among = entries() if among is None else among
    found = [entry for entry in among if entry.name == name]
    if not found:
        names = ", ".join(dict.fromkeys(entry.name for entry in among)) or "none"
        raise InputError(f"there is no study {name!r}; there are {names} (logitlab study list)")
    if len(found) > 1:
        both = " and ".join(f"{entry.package} ({entry.place})" for entry in found)
        raise InputError(f"there are {len(found)} studies called {name!r}: {both}; uninstall all but one")
    return found[0].load()
