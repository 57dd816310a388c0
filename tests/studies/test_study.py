"""Declarations: what cannot be one, parameters at scales, and what a user may set them to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from logitlab.errors import InputError
from logitlab.studies import Claim, Finding, Parameter, Picture, Step
from logitlab.studies.parameters import parameters_of, setting_of
from tests.studies.toy import STUDY, mean_is_positive, picture, squares


def test_values_by_scale() -> None:
    one = Parameter(1000, "", small=100, smoke=5)
    assert one.values == [5, 100, 1000]
    assert Parameter(1000, "", small=100).values == [100, 100, 1000]
    assert Parameter(1000, "", smoke=5).values == [5, 1000, 1000]
    assert Parameter(None, "").values == [None, None, None]
    assert Parameter([1, [2]], "", smoke=None).values == [None, (1, (2,)), (1, (2,))]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("draws=8", 8),
        ("mean=2", 2.0),
        ("mean=-2.5e1", -25.0),
        ("label=text with = and spaces", "text with = and spaces"),
        ("label=7", "7"),  # of a text every value is text
        ("label=", ""),
        ('label="7"', "7"),
        ("label=null", "null"),
        ("layers=[3, 4, 5]", (3, 4, 5)),
        ("layers=[]", ()),
        ("quick=true", True),
        ("limit=null", None),
        ("limit=9", 9),
        ("draws =8", 8),
    ],
)
def test_settings(text: str, value: Any) -> None:
    name, given = setting_of(STUDY, text)
    found = parameters_of(STUDY, "full", {name: given})[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draws=eight", "parameter draws is 'eight'; it must be a whole number, for instance 1000"),
        ("draws=8.0", "parameter draws is '8.0'; it must be a whole number, for instance 1000"),
        ("draws=true", "parameter draws is 'True'; it must be a whole number, for instance 1000"),
        ("draws=null", "parameter draws is 'None'; it must be a whole number, for instance 1000"),
        ("mean=NaN", "parameter mean is 'NaN'; it must be a number, for instance 1.0"),
        ("mean=1e999", "parameter mean is 'inf'; it must be a number, for instance 1.0"),
        ("quick=1", "parameter quick is '1'; it must be true or false, for instance false"),
        ("layers=3", "parameter layers is '3'; it must be a list of (a whole number), for instance [1, 2]"),
        (
            'layers=[3, "x"]',
            "parameter layers is \"(3, 'x')\"; it must be a list of (a whole number), for instance [1, 2]",
        ),
        ("limit=x", "parameter limit is 'x'; it must be a whole number or null, for instance null"),
    ],
)
def test_settings_of_another_kind(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parameters_of(STUDY, "full", dict([setting_of(STUDY, text)]))
    assert str(error.value) == message


def test_settings_that_are_none() -> None:
    with pytest.raises(InputError) as error:
        setting_of(STUDY, "layer=4")
    names = "draws, mean, label, layers, quick, limit"
    assert str(error.value) == f"study toy has no parameter 'layer'; it has {names}"
    with pytest.raises(InputError) as error:
        setting_of(STUDY, "draws")
    assert str(error.value) == "--set 'draws': give KEY=VALUE, for instance --set layers=4"
    with pytest.raises(InputError, match="study toy has no parameter 'x'; it has none"):
        setting_of(dataclasses.replace(STUDY, parameters={}), "x=1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "To y"}, "a study is called 'To y'; use lower-case letters, digits and hyphens, at most 60"),
        ({"name": "../toy"}, "a study is called '../toy'; use lower-case letters, digits and hyphens, at most 60"),
        ({"steps": []}, "study 'toy' has no steps"),
        ({"steps": [Step("a", squares), Step("a", squares)]}, "study 'toy' has two steps called 'a'"),
        ({"claims": [*STUDY.claims, STUDY.claims[0]]}, "study 'toy' has two claims called 'positive'"),
        ({"pictures": [Picture("a", "", picture)] * 2}, "study 'toy' has two pictures called 'a'"),
        (
            {"parameters": {"a-b": Parameter(1, "")}},
            "study 'toy': a parameter is called 'a-b'; use letters, digits and _",
        ),
        *(
            (
                {"parameters": {name: Parameter(1, "")}},
                f"study 'toy': a parameter is called {name!r}, so run.parameters.{name} would not give it; "
                "use another name",
            )
            for name in ("items", "keys", "values", "get", "class", "None")
        ),
        (
            {"parameters": {"a": Parameter(1, "", small=math.nan)}},
            "study 'toy': parameter 'a' must be a finite number, text, true, false, null or a list of such",
        ),
        (
            {"parameters": {"a": Parameter([{1}], "")}},
            "study 'toy': parameter 'a' must be a finite number, text, true, false, null or a list of such",
        ),
    ],
)
def test_studies_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        dataclasses.replace(STUDY, **changes)
    assert str(error.value) == message


def test_pieces_that_cannot_be() -> None:
    with pytest.raises(InputError, match="a step is called 'a/b'"):
        Step("a/b", squares)
    with pytest.raises(InputError, match="a picture is called ''"):
        Picture("", "", picture)
    with pytest.raises(InputError, match="claim 'a': its side is 'left'; it must be 'above' or 'below'"):
        Claim("a", "", "", "", 0.0, mean_is_positive, side="left")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="claim 'a': its threshold is nan; it must be a finite number"):
        Claim("a", "", "", "", math.nan, mean_is_positive)
    with pytest.raises(InputError, match=r"a finding's interval ends before it begins: 1\.0 to 0\.5"):
        Finding(0.7, 1.0, 0.5, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("0.5", 0.0, 1.0, 3), "a finding's value is '0.5'; it must be a number"),
        ((0.5, None, 1.0, 3), "a finding's low is 'None'; it must be a number"),
        ((0.5, 0.0, np.ones(2), 3), "a finding's high is '[1. 1.]'; it must be a number"),
        ((True, 0.0, 1.0, 3), "a finding's value is 'True'; it must be a number"),
        ((0.5, 0.0, 1.0, 3.5), "a finding's n is '3.5'; it must be a whole number, at least 0"),
        ((0.5, 0.0, 1.0, -1), "a finding's n is '-1'; it must be a whole number, at least 0"),
        ((0.5, 0.0, 1.0, True), "a finding's n is 'True'; it must be a whole number, at least 0"),
        ((0.7, 0.1, 0.4, 3), "a finding's value, 0.7, is outside of its interval: 0.1 to 0.4"),
        ((0.7, 0.8, 0.9, 3), "a finding's value, 0.7, is outside of its interval: 0.8 to 0.9"),
    ],
)
def test_findings_that_cannot_be(given: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        Finding(*given)
    assert str(error.value) == message


def test_findings_that_can_be() -> None:
    nan, inf = math.nan, math.inf
    assert Finding(np.float32(0.5), np.float64(0.0), 1, np.int64(3)).n == 3  # type: ignore[arg-type]
    for numbers in ((nan, 0.0, 1.0), (0.5, nan, nan), (nan, nan, nan), (0.5, -inf, inf), (0.3, 0.1 + 0.2, 0.9)):
        Finding(*numbers, n=0)
