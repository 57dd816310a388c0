"""What a study is made of: data and functions. Nothing heavy is imported here."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from logitlab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from logitlab.studies.run import Run

Scale: TypeAlias = Literal["smoke", "small", "full"]
"""How large a run is: ``full`` has the paper's parameters, ``small`` fits a laptop, ``smoke`` is quick."""

SCALES: tuple[Scale, ...] = ("smoke", "small", "full")

Tables: TypeAlias = "pd.DataFrame | Mapping[str, pd.DataFrame]"
"""What a step gives for one unit: a table, or several by name; an empty mapping if it only keeps arrays."""

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
"""How studies, steps, tables, claims and pictures are called: they become names of files."""

LONGEST_NAME = 60


class Untestable(Exception):  # noqa: N818 - an outcome, not a failure
    """A measure raises it to say that this run cannot test the claim; the message is the reason.

    Example:
        ``raise Untestable("only 2 of 14 tasks were run")``
    """


@dataclass(frozen=True)
class Finding:
    """What a measure has found.

    Attributes:
        value: the estimate.
        low: lower end of its 95 % interval; ``-inf`` if it is not bounded.
        high: upper end of it.
        n: how many independent things it is estimated from.
        note: whatever the number does not say; shown beside it.

    Raises:
        InputError: a number is none, the interval ends before it begins or does not contain the value, or n is no
            whole number that is at least 0.
    """

    value: float
    low: float
    high: float
    n: int
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            number: Any = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, Real):
                raise InputError(f"a finding's {name} is {str(number)[:60]!r}; it must be a number")
        n: Any = self.n
        if isinstance(n, bool) or not isinstance(n, Integral) or self.n < 0:
            raise InputError(f"a finding's n is {str(n)[:60]!r}; it must be a whole number, at least 0")
        if self.low > self.high:
            raise InputError(f"a finding's interval ends before it begins: {self.low} to {self.high}")
        outside = self.value < self.low or self.value > self.high
        ends = (self.low, self.high)  # the value may be beyond one by what rounding does
        if outside and not any(math.isclose(self.value, end, rel_tol=1e-9, abs_tol=1e-12) for end in ends):
            raise InputError(f"a finding's value, {self.value}, is outside of its interval: {self.low} to {self.high}")


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, and the test of it, fixed before the run.

    Attributes:
        name: short, with hyphens.
        statement: the paper's statement, in our words.
        paper: the paper's figure, with its place; or "not given".
        test: the test, in words.
        threshold: what the interval is compared with.
        measure: from the tables of a run to a finding. It may raise `Untestable`. It sees no model.
        side: on which side of the threshold the whole interval has to be for the claim to be reproduced.
    """

    name: str
    statement: str
    paper: str
    test: str
    threshold: float
    measure: Callable[[Run], Finding]
    side: Literal["above", "below"] = "above"

    def __post_init__(self) -> None:
        _check_name("a claim", self.name)
        if self.side not in ("above", "below"):
            raise InputError(f"claim {self.name!r}: its side is {self.side!r}; it must be 'above' or 'below'")
        if not math.isfinite(self.threshold):
            raise InputError(f"claim {self.name!r}: its threshold is {self.threshold}; it must be a finite number")


@dataclass(frozen=True)
class Step:
    """A part of the work, whose tables later steps and the claims read.

    Attributes:
        name: of the step, and of its table.
        do: called with the run and the name of a unit, once for each unit; returns `Tables`. What it draws at random
            comes from ``run.rng``, so that its result does not depend on what was done before it.
        units: names of the pieces that can be lost, for instance tasks; it gives the same names for the same run. None
            for one piece. A run that was broken off goes on at the first unit that is not done.
    """

    name: str
    do: Callable[[Run, str], Tables]
    units: Callable[[Run], Sequence[str]] | None = None

    def __post_init__(self) -> None:
        _check_name("a step", self.name)


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: of its file.
        caption: what there is to see, with units.
        draw: from the tables of a run to a Matplotlib figure. It sees no model.
    """

    name: str
    caption: str
    draw: Callable[[Run], Figure]

    def __post_init__(self) -> None:
        _check_name("a picture", self.name)


class _Same:
    """Stands for a value that was not given."""

    def __repr__(self) -> str:
        return "the same"


SAME: Any = _Same()


@dataclass(frozen=True)
class Parameter:
    """A number, text, truth value, None, or list of such, which a run can be made with.

    Attributes:
        value: the paper's, used at scale ``full``.
        about: what it is, and where it is from.
        small: used at scale ``small``; by default the paper's.
        smoke: used at scale ``smoke``; by default that of ``small``.
        ours: whether the paper has nothing of the kind: the value is then nobody's but the study's.
    """

    value: Any
    about: str
    small: Any = SAME
    smoke: Any = SAME
    ours: bool = False

    def at(self, scale: Scale) -> Any:
        """The value at a scale, lists as tuples."""
        small = self.value if self.small is SAME else self.small
        smoke = small if self.smoke is SAME else self.smoke
        return frozen({"full": self.value, "small": small, "smoke": smoke}[scale])

    @property
    def values(self) -> list[Any]:
        """The values at all scales."""
        return [self.at(scale) for scale in SCALES]


def frozen(value: Any) -> Any:
    """The value with lists as tuples, as steps see it whether it comes from Python or from JSON."""
    if isinstance(value, list | tuple):
        return tuple(frozen(v) for v in cast("Sequence[Any]", value))
    return value


def is_plain(value: Any) -> bool:
    """Whether a parameter may have this value: it survives JSON."""
    if isinstance(value, list | tuple):
        return all(is_plain(v) for v in cast("Sequence[Any]", value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)


@dataclass(frozen=True, kw_only=True)
class Study:
    """One paper's system as a runnable experiment that ends in claims that are checked.

    Attributes:
        name: short, with hyphens; how commands call it.
        title: of the paper, or what is studied.
        paper: the citation.
        summary: what is done, in a few sentences.
        data: where its data come from.
        steps: in the order in which they are done.
        parameters: by name, a Python identifier that is no keyword and no method of a mapping, as ``items`` is.
        claims: what is checked at the end.
        pictures: the figures of the report.
        defects: known defects of the source that the study avoids.
        version: raised when the study would give other tables than before.
        needs_model: whether steps use ``run.model``.
        requires: names of extras of logitlab that it needs; ``figures`` is implied by pictures.

    Raises:
        InputError: a name cannot be used or comes twice, a parameter is no plain value, or there is no step.

    Example:
        ``run_study(Study(name="toy", title=..., paper=..., summary=..., data=..., steps=[Step("draw", draw)]))``
    """

    name: str
    title: str
    paper: str
    summary: str
    data: str
    steps: Sequence[Step]
    parameters: Mapping[str, Parameter] = field(default_factory=lambda: MappingProxyType({}))
    claims: Sequence[Claim] = ()
    pictures: Sequence[Picture] = ()
    defects: Sequence[str] = ()
    version: int = 1
    needs_model: bool = True
    requires: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_name("a study", self.name)
        if not self.steps:
            raise InputError(f"study {self.name!r} has no steps")
        for what, things in (("steps", self.steps), ("claims", self.claims), ("pictures", self.pictures)):
            names = [thing.name for thing in things]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"study {self.name!r} has two {what} called {twice!r}")
        for name, parameter in self.parameters.items():
            if not name.isidentifier() or name.startswith("_"):
                raise InputError(f"study {self.name!r}: a parameter is called {name!r}; use letters, digits and _")
            if keyword.iskeyword(name) or name in dir(Mapping):
                raise InputError(
                    f"study {self.name!r}: a parameter is called {name!r}, so run.parameters.{name} would not give it; "
                    "use another name"
                )
            if not all(is_plain(value) for value in parameter.values):
                raise InputError(
                    f"study {self.name!r}: parameter {name!r} must be a finite number, text, true, false, null or a "
                    "list of such"
                )


def _check_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise InputError(
            f"{what} is called {name!r}; use lower-case letters, digits and hyphens, at most {LONGEST_NAME}"
        )
