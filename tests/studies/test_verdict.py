"""From intervals to verdicts."""

from __future__ import annotations

import json
from math import inf, nan

import pytest

from logitlab.studies import Claim, Finding, judge
from tests.studies.toy import mean_is_positive

CONTAINS = "the interval contains the threshold"


def _claim(side: str = "above", threshold: float = 0.5) -> Claim:
    return Claim("a", "?", "?", "?", threshold, mean_is_positive, side=side)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [
        (0.6, 0.9, "reproduced", "not reproduced"),
        (0.1, 0.4, "not reproduced", "reproduced"),
        (0.5 + 1e-15, 0.9, "reproduced", "not reproduced"),
        (0.4, 0.6, "contains", "contains"),
        (0.5, 0.9, "contains", "contains"),  # an end on the threshold is not beyond it
        (0.1, 0.5, "contains", "contains"),
        (0.5, 0.5, "contains", "contains"),
        (-inf, inf, "contains", "contains"),
        (0.6, inf, "reproduced", "not reproduced"),
        (-inf, 0.4, "not reproduced", "reproduced"),
    ],
)
def test_verdicts(low: float, high: float, above: str, below: str) -> None:
    finding = Finding(min(max(0.7, low), high), low, high, 14)
    for side, wanted in (("above", above), ("below", below)):
        outcome = judge(_claim(side), finding)
        if wanted == "contains":
            assert (outcome.verdict, outcome.note) == ("not reproduced", CONTAINS)
        else:
            assert (outcome.verdict, outcome.note) == (wanted, "")


@pytest.mark.parametrize(
    ("finding", "note"),
    [
        (Finding(nan, nan, nan, 0), "the measure is not a number, of n = 0"),
        (Finding(0.9, nan, nan, 1), "the interval is not a number, of n = 1"),
        (Finding(0.9, 0.8, nan, 1), "the interval is not a number, of n = 1"),
        (Finding(0.9, 0.8, 1.0, 0), "there was nothing to measure"),
        (Finding(nan, 0.8, 1.0, 2, "one task"), "the measure is not a number, of n = 2; one task"),
    ],
)
def test_what_is_no_number_tests_nothing(finding: Finding, note: str) -> None:
    outcome = judge(_claim(), finding)
    assert (outcome.verdict, outcome.note) == ("not testable at this scale", note)


def test_notes_are_kept() -> None:
    assert judge(_claim(), Finding(0.7, 0.6, 0.8, 9, "of 9 tasks")).note == "of 9 tasks"
    assert judge(_claim(), Finding(0.7, 0.4, 0.8, 9, "of 9 tasks")).note == f"{CONTAINS}; of 9 tasks"


def test_records_are_json() -> None:
    record = judge(_claim("below", 1), Finding(0.7, -inf, inf, 9)).record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["value"], record["low"], record["high"]) == (0.7, None, None)
    assert (record["threshold"], record["side"], record["n"]) == (1.0, "below", 9)
