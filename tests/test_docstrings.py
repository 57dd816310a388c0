"""The ``>>>`` examples in docstrings are run."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module

import pytest

import logitlab

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(logitlab.__path__, "logitlab.") if not m.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    with_examples = {name for name in MODULES if any(t.examples for t in finder.find(import_module(name)))}
    assert {"logitlab.models.hooks", "logitlab.models.sites", "logitlab.logits.statistics"} <= with_examples
