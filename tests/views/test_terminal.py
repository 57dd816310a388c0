from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from logitlab.errors import InputError
from logitlab.views import colour
from logitlab.views.terminal import grid, grid_text
from logitlab.views.tokens import percent, site_names, visible


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Paris", "·Paris"),
        ("a b", "a·b"),
        ("\n\t\r", "↵⇥␍"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u202eevil", "\\u202eevil"),
        ("\u200b\xa0\u3000", "\\u200b\\xa0\\u3000"),
        ("\U000e0041", "\\U000e0041"),
        ("\ud800", "\\ud800"),
        ("\ufffe", "\\ufffe"),
        ("\u0301", "◌\u0301"),
        ("", "∅"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("a\u200db", "a\\u200db"),
        ("\u200d", "\\u200d"),
        ("[bold]$x$</b>", "[bold]$x$</b>"),
    ],
)
def test_visible(token, shown):
    assert visible(token) == shown


def test_site_names():
    assert site_names(["0.resid_pre", "0.resid_post", "11.resid_post"]) == ["in", "0", "11"]
    assert site_names(["3.resid_pre", "3.resid_post"]) == ["3 pre", "3"]
    assert site_names(["3.mlp_out", "3.resid_post"]) == ["3.mlp_out", "3.resid_post"]


@pytest.mark.parametrize(
    ("p", "shown"), [(0, "0%"), (1e-9, "<1%"), (0.5, "50%"), (0.997, ">99%"), (1, "100%"), (np.nan, "nan")]
)
def test_percent(p, shown):
    assert percent(p) == shown


@pytest.mark.parametrize("dark", [False, True])
def test_the_scale_is_legible_and_ordered(dark):
    def light(colour_code):
        return colour.luminance(tuple(int(colour_code[i : i + 2], 16) for i in (1, 3, 5)))

    pairs = [(light(back), light(fore)) for back, fore in colour.table(dark=dark)]
    assert min((max(p) + 0.05) / (min(p) + 0.05) for p in pairs) >= 4.5
    backs = [back for back, _ in pairs]
    assert backs == sorted(backs, reverse=not dark)
    assert colour.background(float("nan")) == colour.background(0)


def test_values(make_reading):
    reading = make_reading(n_sites=4, n_positions=3, targets=(" Paris", " France"))
    lines = grid_text(reading).splitlines()
    assert lines[0].split() == ["0", "1", "2", "rank", "p", "rank", "p"]
    assert lines[1].split() == ["·Paris", "·France", "·the", "p", "·Paris", "·France"]
    for line, site in zip(lines[2:6], range(3, -1, -1), strict=True):
        name, *tokens, p, rank1, p1, rank2, p2 = line.split()
        last = reading.cell(0, site, 2)
        assert name == ("in" if site == 0 else str(site - 1))
        assert tokens == [visible(reading.cell(0, site, position).tokens[0]) for position in range(3)]
        assert p == percent(last.probabilities[0])
        assert (int(rank1), int(rank2)) == last.target_ranks
        assert (p1, p2) == tuple(percent(v) for v in last.target_probabilities)
    assert "SmolLM2-135M-Instruct · logit lens · ✓ tail equals the model's logits within 1.9e-05" in grid_text(reading)


@pytest.mark.parametrize("kind", ["resid_post", "mlp_out"])
@pytest.mark.parametrize("width", [*range(20, 61), 79, 100, 137, 200, 400])
def test_fits_any_width_and_loses_nothing(make_reading, hostile, width, kind):
    reading = make_reading(n_sites=3, n_positions=20, tokens=hostile, kind=kind, targets=hostile[:2])
    text = grid_text(reading, width, panels=None)
    assert max(map(cell_len, text.split("\n"))) <= width
    heads = [re.sub(r"\b(rank|p)\b", "", line).split() for line in text.split("\n")]
    numbers = [word for words in heads if all(map(str.isdigit, words)) for word in words]
    assert numbers == [str(position) for position in range(20)]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e\u2028\ud800-\udfff]", text)
    assert text.isprintable() is False  # only because of its line ends
    assert text.replace("\n", "").replace("\u200d", "").isprintable()


def test_the_last_position_stays_with_its_probability(make_reading):
    for width in range(20, 90):
        lines = grid_text(make_reading(n_positions=9), width).splitlines()
        (head,) = [i for i, line in enumerate(lines) if line.split()[-1:] == ["p"]]
        assert lines[head - 1].split()[-1] == "8"


def test_markup_and_escapes_stay_text(make_reading, hostile):
    file = io.StringIO()
    console = Console(file=file, width=150, force_terminal=True, color_system="truecolor", legacy_windows=False)
    reading = make_reading(n_sites=3, n_positions=20, tokens=hostile)
    console.print(grid(replace(reading, provenance={"model": "\x1b]0;title\x07[red]m"})))
    written = file.getvalue()
    assert "[bold]" in written
    assert "\\x1b[31m" in written
    assert "\\x1b]0;title\\x07[red]m" in written
    assert "\x1b[" in written  # shading
    assert re.sub(r"\x1b\[[\d;]*m", "", written).count("\x1b") == 0
    assert "\x1b[31m" not in written


def test_rows_are_thinned_and_keep_both_ends(make_reading):
    reading = make_reading(n_sites=81)
    for rows in (2, 3, 10, 80):
        text = grid_text(reading, rows=rows)
        names = [line.split()[0] for line in text.split("\n\n")[0].splitlines()[2:]]
        assert len(names) == rows
        assert (names[0], names[-1]) == ("79", "in")
        assert f"{rows} of 81 sites shown" in text
    assert "sites shown" not in grid_text(reading)


def test_panels_can_be_limited(make_reading):
    reading = make_reading(n_sites=2, n_positions=500)
    text = grid_text(reading, 80, panels=3)
    assert text.count(" 0 ") >= 1
    assert " 499" in text
    assert re.search(r"… positions \d+ to \d+ are not shown here …", text)
    assert len(text.splitlines()) < 30
    assert " 499" in grid_text(reading, 80, panels=1)


def test_several_prompts(make_reading):
    reading = make_reading(n_prompts=3, ragged=True)
    text = grid_text(reading)
    assert [f"prompt {n} of 3: " in text for n in (1, 2, 3)] == [True] * 3
    file = io.StringIO()
    Console(file=file, width=80).print(grid(reading, prompt=-1))
    assert file.getvalue().count("prompt ") == 1
    assert "prompt 3 of 3" in file.getvalue()
    with pytest.raises(InputError, match="prompt 3 is not in this Reading"):
        grid(reading, prompt=3)


def test_selected_positions_keep_their_numbers(make_reading):
    lines = grid_text(make_reading().at(position=[1, -1])).splitlines()
    assert lines[0].split() == ["1", "5"]


def test_missing_values_and_provenance(make_reading):
    reading = make_reading(n_sites=2, n_positions=2)
    reading.arrays["top_logprob"][0, 1, 1] = np.nan
    reading.arrays["top_id"][0, 1, 1] = -1
    text = grid_text(replace(reading, provenance={"verification": None}))
    assert "–" in text
    assert "nan" in text
    assert "unnamed model · not verified" in text
    assert "within 2.0e-03" in grid_text(replace(reading, provenance={"verification": {"max_abs_difference": 2e-3}}))
    assert "nothing was read" in grid_text(reading.at(position=[]))


def test_completions_replace_labels(make_reading):
    reading = make_reading(n_sites=2, n_positions=2)
    token = int(reading.arrays["top_id"][0, 1, 1, 0])
    assert "é!" in grid_text(replace(reading, completions={(0, 1): {token: "é!"}}))
