"""Which backend decodes, and whether it screens."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from numbers import Real

from logitlab.errors import InputError
from logitlab.logits.head import Head, LogitSource
from logitlab.logits.statistics import BACKENDS, PRECISIONS, Backend


def choose(backend: str, source: Head | LogitSource) -> str:
    """The name of the backend that ``source`` is decoded with.

    Raises:
        InputError: there is no backend of that name, or it cannot do this work here.
    """
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")
    if backend == "auto":
        fast = "native" if not isinstance(source, Head) or source.weight.device.type == "cpu" else "triton"
        return fast if why_not(fast, source) is None else "tiled"
    why = why_not(backend, source)
    if why is not None:
        raise InputError(f"the backend {backend!r} cannot decode this: {why}; use backend='auto'")
    return backend


def why_not(name: str, source: Head | LogitSource) -> str | None:
    """Why a backend cannot decode ``source`` here; None if it can."""
    if name in ("tiled", "reference"):
        return None
    if not isinstance(source, Head):
        return "the model's tail has no linear head that could be taken out of it"
    if name == "native":
        from logitlab.logits.native import why_not as why_not_native

        return why_not_native(source)
    if source.weight.device.type != "cuda" and not interpreted():
        return "its head is not on a GPU"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    from logitlab.logits.gpu import why_not as why_not_triton

    return why_not_triton(source)


def run_of(name: str) -> Backend:
    """The backend of a name."""
    if name == "native":
        from logitlab.logits.native import native

        return native
    if name == "triton":
        from logitlab.logits.gpu import triton

        return triton
    if name == "tiled":
        from logitlab.logits.tiled import tiled

        return tiled
    from logitlab.logits.reference import reference

    return reference


def can_screen(name: str) -> bool:
    """Whether a backend has a screened precision on this machine."""
    if name != "native":
        return False
    from logitlab.logits.compiled import library

    found = library()
    return found is not None and found.bfloat16


def check_precision(precision: str) -> None:
    """Raise `InputError` if there is no such precision."""
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; it is one of {', '.join(PRECISIONS)}")


def check_max_error(given: object) -> None:
    """Raise `InputError` if it is no number of nats above 0."""
    if isinstance(given, bool) or not isinstance(given, Real) or not 0 < float(given) < math.inf:
        raise InputError(f"max_error is {given!r}; it is a number of nats above 0, such as 0.001")


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernel, on a processor."""
    return os.environ.get("TRITON_INTERPRET") == "1"
