"""Results of a sweep: the file that holds them, the page made from it, and what got worse since an older one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from logitlab.errors import InputError
from logitlab.files import write_text

FORMAT = 1

STATUSES = {
    "verified": "the last hidden states, decoded, are the model's own output within 1e-05",
    "inexact": "logitlab accepts it, but with a difference above 1e-05, or with none measured",
    "refused": "logitlab says why it cannot read the model",
    "crashed": "the process that tried it died",
    "timed out": "there was no result in time",
    "not built": "no tiny instance could be made, or it does not run on its own example inputs",
}
"""What can become of a type, in words."""

COMMAND = "logitlab verify --all"

Key = tuple[str, str]
"""A task and a model type."""


@dataclass(frozen=True)
class Layers:
    """A layer stack: its path in the model, its number of blocks, its width."""

    name: str
    blocks: int
    width: int


@dataclass(frozen=True)
class Result:
    """What became of one type.

    Attributes:
        task: name of the task.
        type: the model type.
        status: one of `STATUSES`.
        architecture: class of the model, or None if there is none.
        difference: largest absolute difference to the model's own output.
        space: name of the output space.
        stack: the stack that is read.
        stacks: all that were found.
        fast_form: whether the fast linear form holds.
        sites: the site kinds that can be read.
        reason: why it is not verified, in one line.
        seconds: time it took.
    """

    task: str
    type: str
    status: str
    architecture: str | None = None
    difference: float | None = None
    space: str | None = None
    stack: Layers | None = None
    stacks: tuple[Layers, ...] = ()
    fast_form: bool | None = None
    sites: tuple[str, ...] = ()
    reason: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        number = "" if self.difference is None else f", max difference {_number(self.difference)}"
        return f"{self.task}/{self.type}: {self.status}{number}{': ' * bool(self.reason)}{self.reason}"

    @property
    def key(self) -> Key:
        """Its task and type."""
        return self.task, self.type

    def line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Result:
        """From what `line` wrote; KeyError, TypeError or ValueError if it is something else."""
        if data["status"] not in STATUSES:
            raise ValueError(data["status"])
        plain: dict[str, Any] = dict(data)
        plain["stack"] = Layers(**data["stack"]) if data["stack"] else None
        plain["stacks"] = tuple(Layers(**item) for item in data["stacks"])
        plain["sites"] = tuple(data["sites"])
        return cls(**plain)


@dataclass(frozen=True)
class Header:
    """First line of a file of results.

    Attributes:
        versions: of the libraries that decide about the results.
        seed: of the random weights.
        date: when the results were made, as YYYY-MM-DD.
        types: number of types of each task, in the order of the tasks.
    """

    versions: dict[str, str]
    seed: int
    date: str
    types: dict[str, int]

    def line(self) -> str:
        """As one line of JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    def differences(self, now: Header) -> list[str]:
        """In words, what makes results under this header worthless under another."""
        names = {**self.versions, **now.versions}
        changed = [n for n in names if self.versions.get(n) != now.versions.get(n)]
        words = [f"{n} {self.versions.get(n, 'absent')} (now {now.versions.get(n, 'absent')})" for n in changed]
        return words + ([f"seed {self.seed} (now {now.seed})"] if self.seed != now.seed else [])

    @property
    def described(self) -> str:
        """The versions in words."""
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())


@dataclass(frozen=True)
class Coverage:
    """The results in a file, by task and type.

    Attributes:
        header: what they were made with.
        results: the last result of each type.
        size: bytes of the file that are whole lines; what comes after was torn by a kill.
    """

    header: Header
    results: dict[Key, Result] = field(default_factory=dict[Key, Result])
    size: int = 0

    def ordered(self) -> list[Result]:
        """The results in the order of the tasks, then of the types' names."""
        place = {task: i for i, task in enumerate(self.header.types)}
        return sorted(self.results.values(), key=lambda r: (place.get(r.task, len(place)), r.task, r.type))


def load(path: str | Path) -> Coverage | None:
    """Read a file of results; a torn last line is left out.

    Returns:
        The results, or None if the file holds not even a whole header.

    Raises:
        InputError: the file cannot be read, or is not a file of results.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a file that {COMMAND} wrote") from error
    size = data.rfind(b"\n") + 1
    lines = data[:size].splitlines()
    if not lines:
        return None
    number = 0
    try:
        first = json.loads(lines[0])
        if first.pop("format") != FORMAT:
            raise ValueError(FORMAT)
        header = Header(**first)
        results: dict[Key, Result] = {}
        for line in lines[1:]:
            number += 1
            result = Result.of(json.loads(line))
            results[result.key] = result
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"cannot read {path}: line {number + 1} is not what this version of {COMMAND} writes; "
            "give another file, or --restart to replace it"
        ) from error
    return Coverage(header, results, size)


def save(coverage: Coverage, path: str | Path) -> Path:
    """Write a file of results in its fixed order, in one step."""
    lines = [coverage.header.line(), *(r.line() for r in coverage.ordered())]
    return write_text(path, "\n".join(lines) + "\n")


# -- comparison --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worse:
    """A type that was verified and is not any more; ``now`` is None if it has no result at all."""

    was: Result
    now: Result | None

    def __str__(self) -> str:
        name = f"{self.was.task}/{self.was.type}"
        if self.now is None:
            return f"{name}: was verified, is not there any more"
        return f"{name}: was verified, is {self.now.status}{': ' * bool(self.now.reason)}{self.now.reason}"


def compare(old: Coverage, new: Coverage, takes: Callable[[str, str], bool] | None = None) -> list[Worse]:
    """The types that got worse: verified in ``old`` and anything else, or nothing, in ``new``.

    Args:
        old: the earlier results.
        new: the later ones.
        takes: says of a task and a type whether it is compared; by default all are.
    """
    return [
        Worse(was, new.results.get(was.key))
        for was in old.ordered()
        if was.status == "verified" and (takes is None or takes(*was.key))
        if was.key not in new.results or new.results[was.key].status != "verified"
    ]


# -- the page ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Totals:
    """Counts over the types of a task, or of all; ``not_run`` of the not built do not run on example inputs."""

    name: str
    counts: dict[str, int]
    not_run: int
    largest: float | None

    @classmethod
    def of(cls, name: str, results: Iterable[Result]) -> Totals:
        """Count results."""
        results = list(results)
        counts = {status: sum(r.status == status for r in results) for status in STATUSES}
        not_run = sum(r.status == "not built" and r.architecture is not None for r in results)
        largest = max((r.difference for r in results if r.difference is not None), default=None)
        return cls(name, counts, not_run, largest)

    @property
    def types(self) -> int:
        """Number of types."""
        return sum(self.counts.values())

    @property
    def built(self) -> int:
        """Types of which there was something to verify; what crashed or timed out is among them."""
        return self.types - self.counts["not built"]


def totals(coverage: Coverage) -> list[Totals]:
    """The counts of each task in order, and of all together at the end."""
    results = coverage.ordered()
    tasks = list(dict.fromkeys(r.task for r in results))
    return [Totals.of(task, (r for r in results if r.task == task)) for task in tasks] + [Totals.of("all", results)]


def summary(coverage: Coverage) -> str:
    """The counts as lines of text."""
    rows: list[list[str]] = [["task", "types", "built", *(s for s in STATUSES), "max difference"]]
    rows += [
        [t.name, str(t.types), str(t.built), *map(str, t.counts.values()), _number(t.largest)] for t in totals(coverage)
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def page(coverage: Coverage, real: Sequence[Mapping[str, Any]] = ()) -> str:
    """The Markdown page.

    Args:
        coverage: the results.
        real: rows about models with trained weights: name, package, task, architecture, space, stack,
            max_difference, note; what is missing is left blank.
    """
    header = coverage.header
    expected = sum(header.types.values())
    lines = [
        "# Coverage",
        "",
        f"Made by `{COMMAND}` on {_cell(header.date)} with {_cell(header.described)}, seed {header.seed}. "
        "Do not edit it: run the command.",
        "",
        "Every model type that transformers lists for a task is built with tiny random weights and handed to "
        "`logitlab.wrap`. A type counts as",
        "",
        *(f"* *{status}*: {words};" for status, words in list(STATUSES.items())[:-1]),
        f"* *not built*: {STATUSES['not built']}.",
        "",
        "The inputs are logitlab's own, made from the signature of the model: that a type is *not run* may be the "
        "fault of either. Differences were measured with one thread, where two ways to the same sum often round "
        "alike; a difference of 0 says that they did, bit by bit. With several threads the last digits differ.",
        "",
    ]
    if len(coverage.results) < expected:
        lines += [f"**Incomplete**: {len(coverage.results)} of {expected} types have a result.", ""]
    lines += _table(_TOTALS, (_total_row(t) for t in totals(coverage)), numbers=range(1, len(_TOTALS)))
    if real:
        lines += ["", "## Real models", ""]
        lines += _table(
            ["name", "package", "task", "class", "stack × blocks", "space", "max difference", "note"],
            (_real_row(row) for row in real),
            numbers=[6],
        )
    results = coverage.ordered()
    for task in dict.fromkeys(r.task for r in results):
        lines += ["", f"## {_cell(task)}", ""]
        lines += _table(
            ["type", "class", "stack × blocks", "space", "max difference", "note"],
            (_row(r) for r in results if r.task == task),
            numbers=[4],
        )
    return "\n".join(lines) + "\n"


def write_page(coverage: Coverage, path: str | Path) -> Path:
    """Write the page in one step; rows about real models come from ``coverage_real.json`` beside it.

    Raises:
        InputError: the page cannot be written, or the rows about real models cannot be read.
    """
    path = Path(path)
    return write_text(path, page(coverage, load_real(path.with_name("coverage_real.json"))))


def load_real(path: Path) -> list[dict[str, Any]]:
    """Rows about real models: a JSON list of objects, or one object a line; none if there is no file."""
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; mend it, or remove it") from error
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"cannot read {path}: it is not a list of objects; mend it, or remove it")
    return rows


_TOTALS = (
    "task",
    "types",
    "built",
    "verified",
    "% of built",
    "largest difference",
    "inexact",
    "refused",
    "crashed",
    "timed out",
    "not built",
    "of these not run",
    "% not built",
)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int]) -> list[str]:
    right = set(numbers)
    rule = ["--:" if i in right else "---" for i in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _total_row(t: Totals) -> list[str]:
    n = t.counts
    return [
        _cell(t.name),
        str(t.types),
        str(t.built),
        str(n["verified"]),
        _percent(n["verified"], t.built),
        _number(t.largest),
        str(n["inexact"]),
        str(n["refused"]),
        str(n["crashed"]),
        str(n["timed out"]),
        str(n["not built"]),
        str(t.not_run),
        _percent(n["not built"], t.types),
    ]


def _row(r: Result) -> list[str]:
    return [
        _cell(r.type),
        _cell(r.architecture),
        _cell(_layers(r.stack)),
        _cell(r.space),
        _number(r.difference),
        _note(r),
    ]


def _note(r: Result) -> str:
    if r.status not in ("verified", "inexact"):
        return f"**{r.status}**: {_cell(r.reason)}" if r.reason else f"**{r.status}**"
    notes = [f"**{r.status}**: {_cell(r.reason)}"] if r.status == "inexact" else []
    others = list(r.stacks)
    if r.stack in others:
        others.remove(r.stack)
    if others:
        notes.append(_cell(f"also {', '.join(_layers(s) for s in others)}"))
    if r.fast_form is False:
        notes.append("no fast form")
    return "; ".join(notes)


def _real_row(row: Mapping[str, Any]) -> list[str]:
    stack = row.get("stack")
    if isinstance(stack, Mapping):
        stack = _layers(Layers(stack.get("name", ""), stack.get("blocks", 0), stack.get("width", 0)))
    difference = next((row[k] for k in ("max_difference", "max difference", "difference") if k in row), None)
    return [
        *(_cell(row.get(k)) for k in ("name", "package", "task", "architecture")),
        _cell(stack),
        _cell(row.get("space")),
        _number(difference) if isinstance(difference, int | float) else _cell(difference),
        _cell(row.get("note")),
    ]


def _layers(stack: Layers | None) -> str:
    return "" if stack is None else f"{stack.name} × {stack.blocks}"


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _percent(part: int, whole: int) -> str:
    # Rounded down, so that 100 means all.
    return f"{math.floor(1000 * part / whole) / 10:g}" if whole else ""


def _cell(value: Any) -> str:
    """Text that stays inside its cell and is not taken for markup."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str("" if value is None else value)).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|{}~])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word it is plain


def without(coverage: Coverage, keys: Iterable[Key]) -> Coverage:
    """The same results without those of some types."""
    gone = set(keys)
    return replace(coverage, results={k: r for k, r in coverage.results.items() if k not in gone})
