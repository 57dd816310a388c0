"""The word lists of the tasks, from the files in ``data``: one line an input."""

from __future__ import annotations

from importlib.resources import files
from typing import TypeAlias

Pair: TypeAlias = tuple[str, tuple[str, ...]]
"""An input and its right answers, the main one first."""

FOLDER = "data"


def read_pairs(name: str) -> tuple[Pair, ...]:
    """Read the pairs of ``data/{name}.txt``, in the order of the file.

    A line is ``input: answer`` or ``input: main answer, other answer, ...``.

    Raises:
        FileNotFoundError: there is no such file.

    Example:
        >>> read_pairs("antonym")[0]
        ('hot', ('cold', 'cool'))
    """
    lines = (line.partition(": ") for line in _lines(name))
    return tuple((word, tuple(answers.split(", "))) for word, _, answers in lines)


def read_words() -> tuple[str, ...]:
    """Read the words that the tasks about characters are made from: common, lower-case, two or more letters.

    Example:
        >>> read_words()[:3]
        ('air', 'apple', 'arm')
    """
    return tuple(_lines("words"))


def _lines(name: str) -> list[str]:
    folder = files("logitlab.studies.steerable_not_decodable") / FOLDER
    return (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()
