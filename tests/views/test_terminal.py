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
from logitlab.views.tokens import percent, rounded_up, site_names, visible
from tests.views.conftest import screened, without


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


@pytest.mark.parametrize(
    ("bound", "shown"),
    [
        (1e-3, 1e-3),
        (float(np.float32(1e-3)), 1e-3),
        (1.04e-3, 1.1e-3),
        (1.06e-3, 1.1e-3),
        (9.94e-5, 1e-4),
        (9.96e-5, 1e-4),
        (3.2e-9, 3.2e-9),
        (3.21e-9, 3.3e-9),
        (0.0, 0.0),
        (np.inf, np.inf),
    ],
)
def test_bounds_are_rounded_up(bound, shown):
    assert rounded_up(bound) == shown


def test_a_screened_reading_says_so(make_reading):
    plain = make_reading(n_prompts=2, n_sites=3, n_positions=4, ragged=True)
    note = "screened: within 3.3e-04 nats of what it would be in full"
    assert note in grid_text(screened(plain))
    assert grid_text(screened(plain)).replace(note + "\n", "") == grid_text(plain)


@pytest.mark.parametrize("bounds", [[0], [np.nan], [0, np.nan]])
def test_nothing_is_said_where_nothing_was_screened(make_reading, bounds):
    plain = make_reading(n_sites=3, n_positions=4)
    assert grid_text(screened(plain, bounds)) == grid_text(plain)
    assert "screened" not in grid_text(screened(plain).at(position=[]))


def test_the_grid_does_without_entropy_and_kl(make_reading, make_seen, make_detected):
    for reading in (make_reading(targets=(" Paris",)), make_seen(targets=(1,)), make_detected()):
        assert grid_text(without(reading, "entropy", "kl")) == grid_text(reading)


def table(text):
    """The rows of the first table, by site."""
    lines = text.split("\n\n")[0].splitlines()[2:]
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_patches_are_summed_up_by_site(make_seen):
    reading = make_seen(labels=[f"class{i}" for i in range(10)], targets=(1,))
    text = grid_text(reading)
    head, below = text.splitlines()[:2]
    assert head.split() == ["answer", "rank", "p", "16", "patches"]
    assert below.split() == ["pooled", "p", "class1", "most", "frequent", "share"]
    rows = table(text)
    assert list(rows) == ["2", "1", "0"]
    for s in range(3):
        answer = reading.cell(0, s, 17)
        tops = [reading.cell(0, s, p).tokens[0] for p in range(1, 17)]
        label = max(tops, key=lambda t: (tops.count(t), -tops.index(t)))
        assert rows[str(s)] == [
            answer.tokens[0],
            percent(answer.probabilities[0]),
            str(answer.target_ranks[0]),
            percent(answer.target_probabilities[0]),
            label,
            percent(tops.count(label) / 16),
        ]
    assert "p: probability of the top class at the answer, then rank and p of each target there" in text
    assert "share: of the patches that have this top class" in text


@pytest.mark.parametrize("site", [None, "0.resid_post"])
def test_the_map_of_patches(make_seen, site):
    reading = make_seen()
    text = grid_text(reading, site=site)
    shown = site or "2.resid_post"
    part = text[text.index(f"patches at {shown}\n") :].split("\n\n")[0].splitlines()[1:]
    key = dict(re.match(r"([A-Z]) = (.*) \((\d+) patch(?:es)?\)", line).groups()[:2] for line in part[4:])
    counts = {line.split(" = ")[0]: int(re.search(r"\((\d+)", line)[1]) for line in part[4:]}
    letters = [line.split() for line in part[:4]]
    for position, row, column in reading.prompts[0].pictures[0].patches:
        assert key[letters[row][column]] == reading.cell(0, shown, position).tokens[0]
    assert counts == {letter: [x for row in letters for x in row].count(letter) for letter in key}
    assert list(counts.values()) == sorted(counts.values(), reverse=True)


def test_many_labels_share_the_last_letter(make_seen):
    text = grid_text(make_seen(labels=[f"class {i}" for i in range(400)], grid=(10, 10)))
    (line,) = [line for line in text.splitlines() if line.startswith("· = ")]
    labels, patches = map(int, re.findall(r"\d+", line))
    assert sum(line.count("·") for line in text.splitlines() if re.fullmatch(r"(?:[A-L·] ?){10}", line)) == patches
    named = [int(n) for n in re.findall(r"^[A-L] = .* \((\d+) patch", text, re.MULTILINE)]
    assert len(named) == 12
    assert sum(named) + patches == 100
    assert labels <= patches


@pytest.mark.parametrize(("width", "step"), [(100, 2), (48, 2), (47, 1), (24, 1), (23, 0)])
def test_a_map_is_whole_or_not_there(make_seen, width, step):
    text = grid_text(make_seen(grid=(6, 24)), width)
    rows = [line for line in text.splitlines() if re.fullmatch(r"[A-L· ]{24,}", line)]
    assert [len(row) for row in rows] == [24 * step - (step == 2)] * 6 * (step > 0)
    told = "6 by 24 patches do not fit here: Reading.figure and Reading.html draw the picture"
    assert (told in " ".join(text.split())) == (step == 0)


def test_patches_that_were_not_read_are_blank(make_seen):
    text = grid_text(make_seen().at(position=[1, 6, 17]))
    assert "2 patches" in text
    assert "A\n  B\n\n\n" in text or "A\n  A\n\n\n" in text
    assert "blank: not read (14 patches)" in text


def test_words_beside_a_picture_keep_their_grid(make_seen):
    reading = make_seen("vocabulary", n_pictures=2, labels=[f" w{i}" for i in range(9)])
    text = grid_text(reading)
    assert "picture 1, 16 patches" in text
    assert "picture 2, 16 patches" in text
    assert "patches of picture 2 at 2.resid_post" in text
    grids = [part for part in text.split("\n\n") if "·What" in part]
    head, names, *rows = [line.split() for line in grids[-1].splitlines()]
    assert head == ["0", "33", "34", "35", "36"]
    assert names == ["<s>", "·What", "·is", "·this", "?", "p"]
    for s, row in zip((2, 1, 0), rows, strict=True):
        cells = [reading.cell(0, s, p) for p in (0, 33, 34, 35, 36)]
        assert row[1:-1] == [visible(c.tokens[0]) for c in cells]
        assert row[-1] == percent(cells[-1].probabilities[0])


def test_detections(make_detected):
    reading = make_detected(targets=(1,))
    text = grid_text(reading)
    lines = text.splitlines()
    assert lines[0].split() == ["queries", "best", "best", "1", "best", "2"]
    assert lines[1].split() == ["p>50%", "dog", *["label", "p", "q", "x", "y", "w", "h"] * 2]
    rows = table(text)
    for s in range(3):
        best = []
        for slot in range(4):
            cell = reading.cell(0, s, slot)
            i = next(i for i, t in enumerate(cell.tokens) if t != "no object")
            box = [f"{side:.2f}" for side in cell.box]
            best.append((cell.probabilities[i], [cell.tokens[i], percent(cell.probabilities[i]), str(slot), *box]))
        best.sort(reverse=True)
        target = max(reading.cell(0, s, slot).target_probabilities[0] for slot in range(4))
        count = sum(p > 0.5 for p, _ in best)
        assert rows[str(s)] == [str(count), percent(target), *best[0][1], *best[1][1]]
    assert "best 4" in grid_text(reading, 200)
    assert "p: probability of a query's best class other than no object" in text


def test_positions_of_a_classifier_of_texts_have_the_grid(make_reading):
    reading = make_reading(n_sites=2, n_positions=3)
    prompt = replace(reading.prompts[0], tokens=("[CLS]", " good", "pooled"), ids=(1, 2))
    provenance = {**reading.provenance, "space": {"name": "classes", "activation": "sigmoid"}}
    labels = {i: f"the label {i}" for i in reading.labels}
    text = grid_text(replace(reading, prompts=(prompt,), provenance=provenance, labels=labels))
    assert text.splitlines()[1].split() == ["[CLS]", "·good", "pooled", "p"]
    assert f"the label {reading.cell(0, 1, 0).ids[0]}" in text
    assert "p: probability of the top class at the last position" in text
    assert "sigmoid: each probability is a question of its own, they do not sum to 1" in text
    assert "sigmoid" not in grid_text(reading)


@pytest.mark.parametrize("width", [*range(20, 61), 79, 100, 200])
def test_pictures_fit_any_width(make_seen, make_detected, hostile, width):
    for reading in (
        make_seen(labels=hostile, targets=(0, 3), grid=(5, 30)),
        make_seen("vocabulary", "sigmoid", labels=hostile, n_pictures=3),
        make_detected(labels=hostile, targets=(0,), n_queries=12),
    ):
        text = grid_text(reading, width, panels=None)
        assert max(map(cell_len, text.split("\n"))) <= width
        assert text.replace("\n", "").replace("\u200d", "").isprintable()


def test_a_prompt_with_a_picture_is_named_by_its_words(make_seen):
    reading = make_seen("vocabulary")
    twice = replace(
        reading, prompts=reading.prompts * 2, arrays={k: np.concatenate([v, v]) for k, v in reading.arrays.items()}
    )
    assert "prompt 2 of 2: <s>[picture] What is this?" in grid_text(twice)


def test_a_site_that_was_not_read(make_seen):
    with pytest.raises(InputError, match=r"site 'x' is not in this Reading: it has 0\.resid_post, 1"):
        grid(make_seen(), site="x")
