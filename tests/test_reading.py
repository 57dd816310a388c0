"""The table: cells, rows, frames and JSON, with statistics that may be missing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import logitlab as ll
from logitlab.reading import to_json
from tests.views.conftest import build, screened, without

OPTIONAL = {"entropy", "kl", "bound"}


def test_the_bound_is_in_every_form_of_a_screened_reading() -> None:
    reading = screened(build(n_prompts=2, targets=(" Paris",), ragged=True))
    bound = reading.arrays["bound"]
    assert reading.cell(1, 2, 4).bound == float(bound[1, 2, 4]) > 0
    assert reading.cell(0, 0, 0).bound == 0
    expected = [float(bound[n, s, p]) for n in (0, 1) for s in range(7) for p in range(6 - n)]
    assert [row["bound"] for row in reading.rows()] == expected
    assert reading.to_pandas().bound.tolist() == expected
    dataset = reading.to_xarray()
    np.testing.assert_array_equal(dataset["bound"].values, bound)
    assert dataset["bound"].dims == ("prompt", "site", "position")
    assert dataset["bound"].attrs["units"] == "nats"
    assert reading.at(prompt=1, position=4, site="1.resid_post").cell(0, 0, 0).bound == float(bound[1, 2, 4])


@pytest.mark.parametrize("absent", [("entropy",), ("kl",), ("entropy", "kl")])
def test_what_was_not_asked_for_is_in_no_form(absent: tuple[str, ...]) -> None:
    whole = build(targets=(" Paris",))
    reading = without(whole, *absent)
    there = OPTIONAL - {"bound", *absent}
    assert OPTIONAL & set(next(reading.rows())) == there
    assert OPTIONAL & set(reading.to_pandas().columns) == there
    assert OPTIONAL & set(reading.to_xarray().data_vars) == there
    cell = reading.cell(0, 3, 2)
    assert [getattr(cell, name) for name in absent] == [None] * len(absent)
    assert cell.bound is None
    assert [getattr(cell, name) for name in there] == [getattr(whole.cell(0, 3, 2), name) for name in there]
    for name in absent:
        with pytest.raises(ll.InputError, match=f"has no {name}: it was not asked for"):
            getattr(reading, name)


def test_json_has_no_numbers_that_are_not_finite() -> None:
    held = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": None, "d": "NaN", "e": np.float64("inf"), "f": 3}
    text = to_json(held)
    found = json.loads(text, parse_constant=pytest.fail)
    assert found == {"a": [1.5, None, [None, {"b": None}]], "c": None, "d": "NaN", "e": None, "f": 3}
    assert json.loads(to_json(held, indent=2)) == found
    assert held["e"] == math.inf  # what was given is as it was


def test_attributes_of_a_dataset_are_json() -> None:
    reading = build()
    reading = ll.Reading(
        reading.prompts,
        reading.sites,
        reading.targets,
        reading.labels,
        reading.arrays,
        {**reading.provenance, "settings": {"error_bound": math.nan, "max_error": math.inf}},
    )
    settings = json.loads(reading.to_xarray().attrs["settings"], parse_constant=pytest.fail)
    assert settings == {"error_bound": None, "max_error": None}
