"""The parameters of a run: the paper's, those of a scale, and what the user sets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, cast

from logitlab.errors import InputError
from logitlab.studies.study import SCALES, Parameter, Scale, Study, frozen, is_plain


class Parameters(Mapping[str, Any]):
    """Values by name, also as attributes; lists are tuples.

    Example:
        ``run.parameters.layers``, ``run.parameters["layers"]``
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: frozen(value) for name, value in values.items()}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"there is no parameter {name!r}; there are {_names(self._values)}")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Parameters({', '.join(f'{name}={value!r}' for name, value in self._values.items())})"


def parameters_of(study: Study, scale: str = "full", changed: Mapping[str, Any] | None = None) -> Parameters:
    """The parameters of a study at a scale.

    Args:
        study: the study.
        scale: ``smoke``, ``small`` or ``full``.
        changed: values that replace those of the scale.

    Raises:
        InputError: there is no such scale or parameter, or a value is of another kind than the study's own.

    Example:
        ``parameters_of(study, "small", {"layers": 4}).layers``
    """
    scale = scale_of(scale)
    found = {name: parameter.at(scale) for name, parameter in study.parameters.items()}
    for name, value in (changed or {}).items():
        found[name] = _checked(name, frozen(value), _parameter(study, name))
    return Parameters(found)


def scale_of(text: str) -> Scale:
    """The scale of that name.

    Raises:
        InputError: there is none.
    """
    if text not in SCALES:
        raise InputError(f"there is no scale {text!r}; there are {', '.join(SCALES)}")
    return text


def setting_of(study: Study, text: str) -> tuple[str, Any]:
    """What ``KEY=VALUE`` sets; the value is JSON where that fits the parameter, else the text itself.

    Raises:
        InputError: it has no ``=``, or the study has no such parameter.
    """
    name, equals, raw = text.partition("=")
    if not equals:
        raise InputError(f"--set {text!r}: give KEY=VALUE, for instance --set layers=4")
    parameter = _parameter(study, name.strip())
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except ValueError:
        return name.strip(), raw
    fits = any(_fits(frozen(value), own) for own in parameter.values)
    return name.strip(), value if fits or not any(isinstance(own, str) for own in parameter.values) else raw


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _parameter(study: Study, name: str) -> Parameter:
    if name not in study.parameters:
        raise InputError(f"study {study.name} has no parameter {name!r}; it has {_names(study.parameters)}")
    return study.parameters[name]


def _checked(name: str, value: Any, parameter: Parameter) -> Any:
    if not is_plain(value) or not any(_fits(value, own) for own in parameter.values):
        kinds = " or ".join(dict.fromkeys(_kind(own) for own in parameter.values))
        raise InputError(
            f"parameter {name} is {str(value)[:60]!r}; it must be {kinds}, for instance {_example(parameter)}"
        )
    return float(value) if isinstance(value, int) and _is_real(parameter) else value


def _example(parameter: Parameter) -> str:
    return json.dumps(parameter.value)[:60]


def _is_real(parameter: Parameter) -> bool:
    """Whether whole numbers are meant as real ones."""
    kinds = {type(own) for own in parameter.values if own is not None}
    return kinds <= {int, float} and float in kinds


def _fits(value: Any, own: Any) -> bool:
    """Whether a value is of the kind of one that the study itself has."""
    if own is None:
        return value is None
    if isinstance(own, bool) or isinstance(value, bool):
        return isinstance(own, bool) and isinstance(value, bool)
    if isinstance(own, float):
        return isinstance(value, int | float)
    if isinstance(own, tuple):
        kinds = cast("tuple[Any, ...]", own)
        items = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else None
        return items is not None and all(not kinds or any(_fits(item, kind) for kind in kinds) for item in items)
    return isinstance(value, type(own))


def _kind(own: Any) -> str:
    if own is None:
        return "null"
    if isinstance(own, tuple):
        kinds = " or ".join(dict.fromkeys(_kind(item) for item in cast("tuple[Any, ...]", own)))
        return f"a list of ({kinds})" if kinds else "a list"
    if isinstance(own, bool):
        return "true or false"
    return {int: "a whole number", float: "a number", str: "text"}[type(own)]


def _names(names: Mapping[str, Any]) -> str:
    return ", ".join(names) if names else "none"
