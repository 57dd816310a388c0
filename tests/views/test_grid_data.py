from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

from logitlab.views import grid_data as module
from logitlab.views.grid_data import grid_data, packed
from logitlab.views.tokens import visible
from tests.views.conftest import screened, without


def held(reading):
    """The data as whoever reads the JSON finds it, with its arrays as arrays."""

    def unpacked(value):
        if isinstance(value, dict) and value.keys() == {"dtype", "shape", "data"}:
            found = np.frombuffer(base64.b64decode(value["data"]), dtype="<" + value["dtype"])
            return found.reshape(value["shape"])
        if isinstance(value, dict):
            return {name: unpacked(part) for name, part in value.items()}
        return [unpacked(part) for part in value] if isinstance(value, list) else value

    return unpacked(json.loads(json.dumps(grid_data(reading), allow_nan=False)))


@pytest.mark.parametrize("ragged", [False, True])
def test_the_numbers_come_back(make_reading, ragged):
    reading = make_reading(n_prompts=3, targets=(" Paris", " the"), ragged=ragged)
    data = held(reading)
    k, m, sites = data["k"], len(data["targets"]), len(data["sites"])
    assert (k, m, sites) == (5, 2, 7)
    for n, prompt in enumerate(data["prompts"]):
        length = len(reading.prompts[n].positions)
        assert prompt["positions"] == list(reading.prompts[n].positions)
        assert prompt["top"].shape == prompt["logprob"].shape == (sites, length, k)
        assert prompt["entropy"].shape == prompt["kl"].shape == (sites, length)
        assert prompt["targetLogprob"].shape == prompt["targetRank"].shape == (sites, length, m)
        assert prompt["logprob"].dtype == prompt["entropy"].dtype == prompt["targetLogprob"].dtype == np.float32
        for s in range(sites):
            for p in range(length):
                cell = reading.cell(n, s, p)
                assert tuple(data["ids"][i] for i in prompt["top"][s, p]) == cell.ids
                assert tuple(data["labels"][i] for i in prompt["top"][s, p]) == tuple(visible(t) for t in cell.tokens)
                np.testing.assert_allclose(np.exp(prompt["logprob"][s, p]), cell.probabilities, rtol=1e-6)
                assert prompt["entropy"][s, p] == np.float32(cell.entropy)
                assert prompt["kl"][s, p] == np.float32(max(cell.kl, 0))
                assert tuple(prompt["targetRank"][s, p]) == cell.target_ranks
                np.testing.assert_allclose(np.exp(prompt["targetLogprob"][s, p]), cell.target_probabilities, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "dtype"), [([0, 65535], "u2"), ([2**32 - 1], "u4"), ([-(2**31)], "i4"), ([1.5], "f4")]
)
def test_arrays_are_little_endian(values, dtype):
    array = packed(np.array([values]), dtype)
    assert (array["dtype"], array["shape"]) == (dtype, [1, len(values)])
    size = int(dtype[1])
    kind = {"u": lambda b: int.from_bytes(b, "little"), "i": lambda b: int.from_bytes(b, "little", signed=True)}
    read = kind.get(dtype[0], lambda b: np.frombuffer(b, "<f4")[0])
    raw = base64.b64decode(array["data"])
    assert [read(raw[i : i + size]) for i in range(0, len(raw), size)] == values


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="no array of 'f8' goes into the grid: take one of u2, u4, i4, f4"):
        packed(np.zeros(2), "f8")


def test_missing_and_infinite_values(make_reading):
    reading = make_reading(targets=(" Paris",))
    reading.arrays["top_id"][0, 0, 0] = -1
    reading.arrays["top_logprob"][0, 0, 0] = np.nan
    reading.arrays["top_logprob"][0, 0, 1, 4] = -np.inf
    reading.arrays["top_logprob"][0, 0, 1, 0] = 1e-7
    reading.arrays["kl"][0, 0, 0] = np.inf
    reading.arrays["kl"][0, 0, 1] = -1e-7
    reading.arrays["entropy"][0, 0, 0] = np.nan
    reading.arrays["target_rank"][0, 0, 0, 0] = -1
    prompt = held(replace(reading, provenance={}))["prompts"][0]
    assert prompt["top"].dtype == np.uint16
    assert prompt["top"][0, 0].tolist() == [65535] * 5
    assert np.isnan(prompt["logprob"][0, 0]).all()
    assert (prompt["logprob"][0, 1, 4], prompt["logprob"][0, 1, 0]) == (-np.inf, 0)
    assert (prompt["kl"][0, 0], prompt["kl"][0, 1]) == (np.inf, 0)
    assert np.isnan(prompt["entropy"][0, 0])
    assert prompt["targetRank"][0, 0, 0] == -1


def test_many_labels_take_four_bytes(make_reading):
    reading = make_reading(n_sites=4, n_positions=5000, k=5)
    ids = np.arange(100_000).reshape(1, 4, 5000, 5)
    for count, dtype, none in ((65_534, np.uint16, 2**16 - 1), (65_535, np.uint32, 2**32 - 1)):
        reading.arrays["top_id"][:] = np.where(ids < count, ids, -1)
        data = held(replace(reading, labels={i: f" t{i}" for i in range(count)}))
        top = data["prompts"][0]["top"]
        assert top.dtype == dtype
        assert len(data["labels"]) == count
        assert (top == none).sum() == 100_000 - count
        np.testing.assert_array_equal(np.array(data["ids"])[top[top != none]], np.arange(count))


def test_only_what_was_asked_for_is_held(make_reading):
    reading = make_reading(n_prompts=2, targets=(" Paris",))
    whole = grid_data(reading)["prompts"]
    for absent in (("entropy",), ("kl",), ("entropy", "kl")):
        for prompt, full in zip(grid_data(without(reading, *absent))["prompts"], whole, strict=True):
            assert prompt == {name: values for name, values in full.items() if name not in absent}
            assert not {"bound", "boxes", "heat"} & prompt.keys()
    assert not {"targetLogprob", "targetRank"} & grid_data(make_reading())["prompts"][0].keys()


def test_bounds_are_held_as_they_are(make_reading):
    reading = screened(make_reading(n_prompts=2, ragged=True), (0, 3.21e-4, 7.04e-9, np.nan, np.inf))
    for n, prompt in enumerate(held(reading)["prompts"]):
        np.testing.assert_array_equal(prompt["bound"], reading.arrays["bound"][n, :, : len(prompt["positions"])])


def test_empty_selection(make_reading):
    (prompt,) = held(make_reading().at(position=[]))["prompts"]
    assert (prompt["top"].shape, prompt["answer"], prompt["tokens"]) == ((7, 0, 5), 0, [])


def test_same_label_different_tokens(make_reading):
    data = grid_data(make_reading(tokens=(" the", " the", " a"), k=3))
    assert data["labels"].count("·the") == 2
    assert len(set(data["ids"])) == len(data["ids"])


def test_completions_apply_to_their_own_position(make_reading):
    reading = make_reading(n_prompts=2)
    token = int(reading.arrays["top_id"][1, 3, 2, 0])
    data = held(replace(reading, completions={(1, 2): {token: "é"}}))
    best = data["prompts"][1]["top"][3, 2, 0]
    assert (data["labels"][best], data["ids"][best]) == ("é", token)
    for n, prompt in enumerate(data["prompts"]):
        where = np.argwhere(np.array(data["labels"])[prompt["top"]] == "é")
        assert set(where[:, 1].tolist()) == ({2} if n else set())


def test_labels_are_as_visible_makes_them(make_reading, hostile):
    reading = make_reading(tokens=hostile, n_positions=20, n_sites=12)
    data = grid_data(reading)
    assert data["labels"] == [visible(reading.labels[i]) for i in data["ids"]]
    for text in [*hostile, "a b", " ", "~", "\x7f", "é è", "\u00a0"]:
        for space in ("·", " "):
            assert module._quick(text, space) == visible(text, space=space)


def test_pictures_and_patches_are_held(make_seen):
    reading = make_seen("vocabulary", n_pictures=2, grid=(3, 5))
    data = held(reading)
    (prompt,) = data["prompts"]
    assert prompt["text"] == "<s>[picture][picture] What is this?"
    assert prompt["answer"] == 34
    for picture, shown in zip(reading.prompts[0].pictures, prompt["pictures"], strict=True):
        assert base64.b64decode(shown["png"]) == picture.png
        assert (shown["size"], shown["grid"]) == ([64, 48], [3, 5])
        assert tuple(map(tuple, shown["patches"])) == picture.patches
        tops = [reading.cell(0, s, p).ids[0] for s in range(3) for p, _, _ in picture.patches]
        assert shown["palette"][0] == reading.cell(0, 2, 34).ids[0]  # the answer
        rest = [tops.count(i) for i in shown["palette"][1:]]
        assert rest == sorted(rest, reverse=True)
        assert len(shown["palette"]) == len(data["categories"]) == 7


def test_slots_of_patches_follow_the_selection(make_seen):
    (prompt,) = held(make_seen().at(position=[17, 6, 1]))["prompts"]
    assert prompt["pictures"][0]["patches"] == [[2, 0, 0], [1, 1, 1]]
    assert prompt["answer"] == 0
    assert prompt["tokens"] == ["pooled", "patch 1,1", "patch 0,0"]


def test_boxes_are_held(make_detected):
    reading = make_detected()
    reading.arrays["box"][0, 0, 2] = np.nan
    data = held(reading)
    (prompt,) = data["prompts"]
    np.testing.assert_array_equal(prompt["boxes"], reading.arrays["box"][0])
    assert np.isnan(prompt["boxes"][0, 2]).all()
    assert [reading.labels[i] for i in data["none"]] == ["no object"]
    assert prompt["answer"] == 1  # the query that is surest at the last site
    assert data["none"][0] not in prompt["palette"]
    assert (data["threshold"], data["fewest"], data["noun"]) == (0.5, 5, "class")


def test_a_class_called_no_object_is_one_elsewhere(make_seen):
    assert held(make_seen(labels=["no object", *"abcd"]))["none"] == []


def test_independent_questions_are_said_to_be(make_seen, make_reading):
    said = "sigmoid: each probability is a question of its own, they do not sum to 1"
    assert held(make_seen("concepts", "sigmoid"))["independent"] == said
    assert held(make_seen())["independent"] == held(make_reading())["independent"] == ""


def test_a_picture_without_patches_is_held(make_reading, make_seen):
    picture = replace(make_seen().prompts[0].pictures[0], grid=(0, 0), patches=())
    reading = make_reading()
    (prompt,) = held(replace(reading, prompts=(replace(reading.prompts[0], pictures=(picture,)),)))["prompts"]
    assert prompt["pictures"][0]["patches"] == prompt["pictures"][0]["palette"] == []
    assert held(make_seen().at(position=[]))["prompts"][0]["pictures"][0]["patches"] == []
