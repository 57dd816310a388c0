"""Studies by name: logitlab's own, and those of other packages."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from logitlab.errors import InputError
from logitlab.studies import Entry, entries, find, registry
from tests.studies.toy import STUDY


def install(folder: Path, name: str, studies: dict[str, str], module: str = "") -> Path:
    """A package with entry points, as an installer leaves it; the folder has to be on the path."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{study} = {place}" for study, place in studies.items()]
    (info / "entry_points.txt").write_text("\n".join(["[logitlab.studies]", *lines, ""]))
    if module:
        (folder / f"{name.replace('-', '_')}.py").write_text(module)
    return folder


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of packages that is on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "BUILT_IN", {"toy": "tests.studies.toy:STUDY"})
    importlib.invalidate_caches()
    return tmp_path


def _refused(name: str) -> str:
    with pytest.raises(InputError) as error:
        find(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_own_and_other_studies(outside: Path) -> None:
    module = "import dataclasses\nfrom tests.studies.toy import STUDY\nA = dataclasses.replace(STUDY, name='other')\n"
    install(outside, "my-papers", {"other": "my_papers:A"}, module)
    assert entries() == [
        Entry("toy", "tests.studies.toy:STUDY", "logitlab"),
        Entry("other", "my_papers:A", "my-papers"),
    ]
    assert find("toy") is STUDY
    assert find("other").name == "other"
    assert _refused("nothing") == "there is no study 'nothing'; there are toy, other (logitlab study list)"


def test_two_of_one_name(outside: Path) -> None:
    install(outside, "a-papers", {"toy": "a_papers:STUDY"})
    install(outside, "b-papers", {"other": "b_papers:X"})
    assert _refused("toy") == (
        "there are 2 studies called 'toy': logitlab (tests.studies.toy:STUDY) and a-papers (a_papers:STUDY); "
        "uninstall all but one"
    )


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("import nothing_like_this", "cannot be imported: ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("raise RuntimeError('two\\nlines')", "cannot be imported: RuntimeError: two lines"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        ("x = 1 +", "cannot be imported: SyntaxError: invalid syntax (broken_papers.py, line 1)"),
        ("A = 1", "cannot be imported: AttributeError: module 'broken_papers' has no attribute 'STUDY'"),
        ("STUDY = 1", "is a int; it must be a logitlab.studies.Study"),
        ("from tests.studies.toy import STUDY", "calls itself 'toy': the names must be the same"),
    ],
)
def test_broken_packages(module: str, words: str, outside: Path) -> None:
    install(outside, "broken-papers", {"broken": "broken_papers:STUDY"}, module)
    sys.modules.pop("broken_papers", None)
    try:
        assert _refused("broken") == f"study 'broken' of broken-papers (broken_papers:STUDY) {words}"
        assert find("toy") is STUDY
    finally:
        sys.modules.pop("broken_papers", None)


def test_own_studies_have_names_of_their_own() -> None:
    """Each place is a module of logitlab and an attribute; the names can be names of folders."""
    for name, place in registry.BUILT_IN.items():
        module, _, attribute = place.partition(":")
        assert module.startswith("logitlab.studies.")
        assert attribute.isidentifier()
        assert name == name.lower().strip()
