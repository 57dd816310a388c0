"""Every example in the documentation is run, and every value that it shows is compared.

How examples are written, on every page in `PAGES`:

* A fenced ``python`` block is executed. The blocks of a page share one namespace and one empty
  working folder, and run in the order of the page.
* ``expression  # -> VALUE`` compares ``repr(expression)`` with VALUE. A long VALUE may start on the
  line below instead, and go on over lines that begin with ``#    ``.
* ``statement  # raises NAME: MESSAGE`` (or on the line below) says that the statement raises that
  error with that message.
* A fenced ``console`` block holds commands ``$ logitlab ...``, each followed by what it prints, if
  the page shows it. They run in this process at 88 columns and have to exit with 0, or with the N of
  a comment ``<!-- exit N -->`` before the block. ``< FILE`` gives a command its standard input.
* ``<!-- not run -->`` before a block leaves it out: it needs a network, or another program.
* ``<!-- needs NAME ... -->`` before a block leaves it to ``pytest -m packages``, which runs it if all that
  it names is there: models that ``logitlab fetch`` knows, sample images, or programs. Before the first block,
  ``<!-- page needs NAME ... -->`` says so for all blocks of the page.

When values are compared, ``...`` stands for anything, and runs of white space are equal. A number
with a decimal point may differ by one unit of its last digit. A number in exponent form is a
rounding error, which depends on the processor: both have to be within a factor of ten, or below
1e-3. Whole numbers are equal; in console output, those of at least 100 (ranks in the middle of a
network) may differ by 1 %.
"""

from __future__ import annotations

import ast
import io
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import logitlab as ll
from logitlab import cli
from logitlab.models import load as loading
from logitlab.models.cache import cache_folder
from logitlab.models.packages import PACKAGES, fetched
from logitlab.models.samples import IMAGES

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "real").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]

_FENCE = re.compile(r"^(?P<indent>[ \t]*)```(?P<language>\w*)")
_MARK = re.compile(r"<!-- (not run|exit \d+|needs [^>]+) -->")
_PAGE_NEEDS = re.compile(r"^<!-- page needs ([^>]+) -->$", re.MULTILINE)
_EXPECTATION = re.compile(r"#\s*(->|raises)\s(.*)$")
_NUMBER = r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)"


@dataclass
class Block:
    """One fenced block: its language, first line's number in the page, text, and the mark before it."""

    language: str
    line: int
    text: str
    mark: str
    needs: tuple[str, ...] = ()


def blocks_of(page: Path) -> list[Block]:
    """The python and console blocks of a page."""
    found: list[Block] = []
    text = page.read_text(encoding="utf-8")
    lines = text.splitlines()
    always = tuple(name for names in _PAGE_NEEDS.findall(text) for name in names.split())
    i, mark = 0, ""
    while i < len(lines):
        fence = _FENCE.match(lines[i])
        if fence is None:
            comment = _MARK.search(lines[i])
            mark = comment[1] if comment else mark if not lines[i].strip() else ""
            i += 1
            continue
        end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == "```")
        if fence["language"] in ("python", "console", "pycon"):
            assert not fence["indent"], f"{page.name}:{i + 1}: an indented block would not be run"
            assert fence["language"] != "pycon", f"{page.name}:{i + 1}: write python blocks with `# -> value`"
            own = tuple(mark.split()[1:]) if mark.startswith("needs ") else ()
            found.append(Block(fence["language"], i + 2, "\n".join(lines[i + 1 : end]), mark, always + own))
        i, mark = end + 1, ""
    return found


def matches(shown: str, actual: str, *, loose: bool = False) -> bool:
    """Whether an actual value is the one that a page shows; see the top of this file."""
    pattern, numbers = "", []
    for piece in re.split(rf"({_NUMBER}|\.\.\.|\s+)", shown.strip()):
        if piece == "...":
            pattern += ".*?"
        elif re.fullmatch(_NUMBER, piece):
            pattern += f"({_NUMBER})"
            numbers.append(piece)
        else:
            pattern += r"\s+" if piece.isspace() else re.escape(piece)
    found = re.fullmatch(pattern, actual.strip(), re.DOTALL)
    return found is not None and all(_close(a, b, loose) for a, b in zip(numbers, found.groups(), strict=True))


def _close(shown: str, actual: str, loose: bool) -> bool:
    a, b = (float(text.replace(",", "")) for text in (shown, actual))
    if "e" in shown:
        return max(abs(a), abs(b)) <= max(10 * min(abs(a), abs(b)), 1e-3)
    if "." in shown:
        return abs(a - b) <= 1.01 * 10.0 ** -len(shown.partition(".")[2])
    return a == b or (loose and abs(a) >= 100 and abs(a - b) <= 0.01 * abs(a))


# -- running -----------------------------------------------------------------------------------


def expectations(text: str) -> dict[int, tuple[str, str]]:
    """By line number in a block: (``->`` or ``raises``, what is expected) for the statement ending there."""
    found: dict[int, tuple[str, str]] = {}
    lines = text.splitlines()
    for i, line in enumerate(lines):
        match = _EXPECTATION.search(line)
        if match is None:
            continue
        alone = line.lstrip().startswith("#")
        value = match[2]
        for more in lines[i + 1 :]:
            if not more.startswith("#    "):
                break
            value += " " + more[1:].strip()
        found[i if alone else i + 1] = (match[1], value)
    return found


def run_python(block: Block, page: Path, namespace: dict[str, Any]) -> list[str]:
    """Execute a block, statement by statement; say where what it shows is not so."""
    wanted = expectations(block.text)
    problems: list[str] = []
    for statement in ast.parse(block.text).body:
        kind, value = wanted.pop(statement.end_lineno or 0, ("", ""))
        where = f"{page.name}:{block.line + statement.lineno - 1}"
        ast.increment_lineno(statement, block.line - 1)
        if kind == "->":
            assert isinstance(statement, ast.Expr), f"{where}: only an expression has a value to show"
            result = repr(eval(compile(ast.Expression(statement.value), page, "eval"), namespace))
        elif kind == "raises":
            result = _error_of(compile(ast.Module([statement], []), page, "exec"), namespace)
        else:
            exec(compile(ast.Module([statement], []), page, "exec"), namespace)
            continue
        if not matches(value, result):
            problems.append(f"{where}: the page shows\n  {value}\nbut it is\n  {result}")
    return [*problems, *(f"{page.name}:{block.line}: no statement before {value}" for _, value in wanted.values())]


def _error_of(code: Any, namespace: dict[str, Any]) -> str:
    try:
        exec(code, namespace)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def commands(block: Block) -> Iterator[tuple[int, str, str]]:
    """The commands of a console block: line number, command, the output that is shown."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    line = block.line + parts[0].count("\n")
    for part in parts[1:]:
        command, _, output = part.partition("\n")
        yield line, command, output
        line += part.count("\n")


def run_console(block: Block, page: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the commands of a block in this process; say where exit code or output are not as shown."""
    wanted = int(block.mark.split()[1]) if block.mark.startswith("exit") else 0
    problems: list[str] = []
    for line, command, shown in commands(block):
        where = f"{page.name}:{line}"
        words = shlex.split(command)
        assert words[0] == "logitlab", f"{where}: put <!-- not run --> before a block with other programs"
        if "<" in words:
            monkeypatch.setattr(sys, "stdin", io.StringIO(Path(words.pop()).read_text(encoding="utf-8")))
            words.pop()
        output = io.StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            code = cli.main(words[1:])
        actual = output.getvalue()
        if code != wanted:
            problems.append(f"{where}: exit code {code}\n{actual}")
        elif shown.strip() and not matches(shown, actual, loose=True):
            problems.append(f"{where}: it prints\n{actual}")
    return problems


@pytest.fixture
def one_default_model(default_model: ll.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``load("default")`` give the session's model; every other call really loads."""
    real = loading.load
    usual = {name: p.default for name, p in signature(real).parameters.items()}

    def load(name: str | Path = "default", **options: Any) -> ll.Model:
        plain = all(value == usual[key] for key, value in options.items())
        return default_model if str(name) == "default" and plain else real(name, **options)

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(ll, "load", load)


def run_page(page: Path, blocks: list[Block], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run blocks of a page, in order and in one namespace; all that is not as shown is one failure."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "88")
    module = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    namespace = vars(module)
    problems: list[str] = []
    for block in blocks:
        if block.mark == "not run":
            continue
        if block.language == "python":
            problems += run_python(block, page, namespace)
        else:
            problems += run_console(block, page, monkeypatch)
    assert not problems, "\n\n".join(problems)


def is_there(name: str) -> bool:
    """Whether a fetched model, a sample image or a program is there; nothing is downloaded."""
    if name in PACKAGES:
        return fetched(name) is not None
    if name in IMAGES:
        return (cache_folder() / "samples" / Path(IMAGES[name][1]).name).is_file()
    return shutil.which(name) is not None


@pytest.mark.usefixtures("one_default_model")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(page, [block for block in blocks_of(page) if not block.needs], tmp_path, monkeypatch)


@pytest.mark.packages
@pytest.mark.usefixtures("one_default_model")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.needs for block in blocks_of(page))], ids=lambda page: page.name
)
def test_examples_of_fetched_models(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(page)
    missing = sorted({name for block in blocks for name in block.needs if not is_there(name)})
    blocks = [block for block in blocks if all(map(is_there, block.needs))]
    if not any(block.needs for block in blocks):
        pytest.skip(f"not there: {', '.join(missing)}")
    run_page(page, blocks, tmp_path, monkeypatch)


# -- the pages themselves ----------------------------------------------------------------------


def test_every_public_name_has_an_entry() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    entries = re.findall(r"^::: logitlab\.(?:\w+\.)*(\w+)$", text, flags=re.MULTILINE)
    assert sorted(set(ll.__all__) - set(entries)) == []


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    docs = ROOT / "docs"
    names = [p.relative_to(docs).as_posix() for p in docs.rglob("*.md")]
    assert [name for name in names if f" {name}" not in nav] == []


# -- the comparison ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "actual"),
    [
        ("[34, 7, 1]", "[34, 7, 1]"),
        ("0.773", "0.77340001"),
        ("'29.resid_post'", "'29.resid_post'"),
        ("array([0.10,\n   0.20])", "array([0.1049, 0.1951])"),
        ("max 2.9e-05, more", "max 8.1e-06, more"),
        ("Model(...)", "Model(anything: at all)"),
    ],
)
def test_equal_values_match(shown: str, actual: str) -> None:
    assert matches(shown, actual)


@pytest.mark.parametrize(
    ("shown", "actual"),
    [
        ("[34, 7, 1]", "[34, 7, 2]"),
        ("2818", "2819"),
        ("0.773", "0.775"),
        ("2.9e-05", "2.9e-02"),
        ("'29.resid_post'", "'28.resid_post'"),
        ("[' Paris']", "['Paris']"),
        ("Paris", "Paris, London"),
    ],
)
def test_other_values_do_not(shown: str, actual: str) -> None:
    assert not matches(shown, actual)


@pytest.mark.parametrize(
    "text",
    [
        "1 + 1  # -> 3",
        "1 + 1\n# -> 3",
        "int('x')  # raises ValueError: fine",
        "1  # raises ValueError: ...",
        "x = 1\n\n# -> 1",
    ],
)
def test_a_wrong_value_on_a_page_is_noticed(text: str) -> None:
    assert len(run_python(Block("python", 1, text, ""), Path("page.md"), {})) == 1


def test_a_right_value_is_not() -> None:
    text = "1 + 1\n# -> 2\nint('x')  # raises ValueError: ...\n"
    assert run_python(Block("python", 1, text, ""), Path("page.md"), {}) == []
