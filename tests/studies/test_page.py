"""The report: what it shows, that it is one file, and that nothing in it is taken for markup."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from logitlab.studies import Claim, Finding, Parameter, Picture, Step, report, run_study
from logitlab.studies.folder import RunFolder
from logitlab.studies.page import FIRST_ROWS, number, page
from tests.studies.toy import STUDY, picture

EVIL = '</style><script>alert("1")</script><img src=x onerror=alert(1)>&amp;\u202e\x1b[31m\ud800'
TAGS = {
    *("html", "head", "meta", "link", "title", "style", "body", "main", "header", "h1", "h2", "h3", "p", "span"),
    *(
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "small",
        "code",
        "figure",
        "figcaption",
        "img",
        "a",
        "ul",
        "li",
    ),
}


class _Page(HTMLParser):
    """Tags, attributes and texts of a page; fails where a tag is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def _page(folder: Path) -> tuple[str, _Page]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, _Page(text)


def test_what_a_report_shows(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    study = dataclasses.replace(STUDY, pictures=[Picture("numbers", "All numbers.", picture)])
    result = run_study(study, out=folder)
    text, page = _page(folder)
    found = result.claims["positive"].finding
    assert found is not None
    ours = f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}], n = 400"
    for shown in (
        "Numbers around a mean Nobody (2026). Numbers.",
        "1 reproduced, 1 not reproduced, 1 not testable at this scale (scale small, seed 0)",
        f"The mean is above 0. positive 1.0 (table 1) {ours} normal interval 95 % interval above 0 reproduced",
        f"The mean is below 0.5. small not given {ours} normal interval 95 % interval below 0.5 not reproduced",
        "rare 0.1 % – exact interval 95 % interval below 0.01 not testable at this scale 100 draws are too few",
        "the first 12 of 400 rows ; tables/draw-numbers.parquet",
        "4 rows ; tables/draw-means.parquet",
        "draws 100 1000 numbers a unit mean 1.0 1.0 their mean (section 2)",
        'label "a" "a" some text layers [1, 2] [1, 2] a list',
        "Defects of the source that this study avoids The source draws the same numbers twice.",
        "study toy, version 1",
        "step draw 4 units",
    ):
        assert shown in page.text or shown.replace(" ;", ";") in page.text, shown
    places = [page.text.index(f" {head} ") for head in ("Claims", "Figures", "Tables", "Parameters", "Defects", "How")]
    assert places == sorted(places)
    first = result.table("draw-numbers").head(FIRST_ROWS + 1).value
    cells = [number(v) for v in first]
    assert all(f">{cell}</td>" in text for cell in cells[:FIRST_ROWS])
    (image,) = [a for tag, a in page.tags if tag == "img"]
    data = base64.b64encode((folder / "figures" / "numbers.png").read_bytes()).decode()
    assert (image["src"], image["alt"]) == (f"data:image/png;base64,{data}", "All numbers.")


def test_it_is_one_file_without_scripts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_study(STUDY, scale="smoke", out=folder)
    text, page = _page(folder)
    assert {tag for tag, _ in page.tags} <= TAGS
    links = [a["href"] for tag, a in page.tags if "href" in a]
    tables = [f"tables/{name}.parquet" for name in ("draw-numbers", "draw-means", "squares")]
    assert links == ["data:,", *tables, "manifest.json"]
    assert all((folder / link).is_file() for link in links[1:])  # type: ignore[operator]
    (style,) = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert "url(" not in style
    assert "@import" not in style
    assert not any("style" in a for _, a in page.tags)  # the policy would not let them


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_study(STUDY, scale="smoke", out=folder)
    before = (folder / "report.html").read_bytes()
    run_study(STUDY, scale="smoke", out=folder)
    assert (folder / "report.html").read_bytes() == before


def test_nothing_is_taken_for_markup(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    column = EVIL.replace("\ud800", "")  # no file can have it in a name
    frame = pd.DataFrame({column: pd.Series([EVIL, "b", None], dtype=object), "list": [[column], ["b"], []]})
    study = dataclasses.replace(
        STUDY,
        title=EVIL,
        paper=EVIL,
        summary=EVIL,
        data=EVIL,
        parameters={"evil": Parameter(EVIL, EVIL)},
        steps=[Step("one", lambda run, unit: frame, units=lambda run: [EVIL])],
        claims=[
            Claim("evil", EVIL, EVIL, EVIL, 0.0, lambda run: Finding(1, 0.5, 2, 3, EVIL)),
        ],
        pictures=[Picture("evil", EVIL, picture_of_nothing)],
        defects=[EVIL],
    )
    run_study(study, out=folder)
    text, page = _page(folder)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert "\x1b" not in text
    assert "\u202e" not in text
    shown = '</style><script>alert("1")</script><img src=x onerror=alert(1)>&amp;\\u202e\\x1b[31m'
    assert html.escape(shown) in text
    assert page.text.count(shown) >= 10  # title twice, paper, summary, data, claim three times, note, caption, ...


def picture_of_nothing(run: object) -> object:
    from matplotlib.figure import Figure

    return Figure(figsize=(1, 1))


def test_long_cells_are_cut(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    frame = pd.DataFrame({"text": ["x" * 5000], "vector": [[0.5] * 3000]})
    run_study(dataclasses.replace(STUDY, steps=[Step("one", lambda run, unit: frame)], claims=[]), out=folder)
    text, page = _page(folder)
    assert "x" * 99 + "…" in page.text
    assert "x" * 100 not in page.text
    assert len(text) < 20_000
    assert "no claims" in page.text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, "0.1235"),
        (-2, "−2"),
        (float("nan"), "–"),
        (None, "–"),
        (float("-inf"), "−∞"),
        (1234567.0, "1.235e+06"),
    ],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_an_unbounded_interval(tmp_path: Path) -> None:
    claim = Claim("wide", "?", "?", "?", 0.0, lambda run: Finding(1.0, float("-inf"), float("inf"), 1))
    run_study(dataclasses.replace(STUDY, claims=[claim]), scale="smoke", out=tmp_path / "run")
    assert "1 [−∞, ∞], n = 1" in _page(tmp_path / "run")[1].text


def test_names_of_tables_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if such a name came past the manifest's check."""
    folder = tmp_path / "run"
    run_study(STUDY, scale="smoke", out=folder)
    name = '"><script>alert(1)</script> &'
    run = RunFolder.read(folder)
    run.record["steps"]["squares"]["tables"] = [name]
    monkeypatch.setattr(RunFolder, "table", lambda self, name: pd.DataFrame({"a": [1]}))
    shown = _Page(page(STUDY, run, ()))
    assert {tag for tag, _ in shown.tags} <= TAGS
    links = [a["href"] for tag, a in shown.tags if tag == "a"]
    assert "tables/%22%3E%3Cscript%3Ealert%281%29%3C/script%3E%20%26.parquet" in links
    assert f"tables/{name}.parquet" in shown.text


def test_what_changed_since_the_run_began(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_study(STUDY, scale="smoke", out=folder)
    before = _page(folder)[1].text
    assert "since the run began" not in before
    positive, small, rare = STUDY.claims
    claims = [
        dataclasses.replace(positive, threshold=-5.0),
        dataclasses.replace(small, test="another test", side="above"),
        dataclasses.replace(positive, name="new"),
    ]
    for _ in range(2):  # the first report does not become what the second one compares with
        result = report(folder, study=dataclasses.replace(STUDY, claims=claims))
        notes = {name: claim.note for name, claim in result.claims.items()}
        assert notes["positive"] == "changed since the run began (was: normal interval, above 0)"
        assert notes["small"].startswith("changed since the run began (was: normal interval, below 0.5)")
        assert notes["new"].startswith("added since the run began")
        text = _page(folder)[1].text
        assert "changed since the run began (was: normal interval, above 0)" in text
        assert f"Claims that were there when the run began, and are no more: {rare.name}." in text
    kept = json.loads((folder / "manifest.json").read_text())
    assert kept["claims"][0]["note"] == notes["positive"]
    assert kept["tests"]["positive"] == {"test": "normal interval", "side": "above", "threshold": 0.0}
    report(folder, study=STUDY)
    assert _page(folder)[1].text == before
    del kept["tests"]  # of an older version
    (folder / "manifest.json").write_text(json.dumps(kept))
    changed = report(folder, study=dataclasses.replace(STUDY, claims=claims))
    assert not any("since the run began" in outcome.note for outcome in changed.outcomes)


def test_sessions_of_other_sources(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_study(STUDY, scale="smoke", out=folder)
    words = "The code of the study was changed while it ran"
    for sources, warned in (
        (["a" * 64, "a" * 64], False),
        (["a" * 64, "b" * 64], True),
        (["a" * 64, None], False),
        (["a" * 64, ...], False),
    ):
        record = json.loads((folder / "manifest.json").read_text())
        (first, *_) = record["sessions"]
        given = [first | {"source": source} for source in sources]
        record["sessions"] = [{k: v for k, v in session.items() if v is not ...} for session in given]
        (folder / "manifest.json").write_text(json.dumps(record))
        report(folder, study=STUDY)
        assert (words in _page(folder)[1].text) is warned
