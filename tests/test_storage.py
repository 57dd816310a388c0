"""What was saved comes back equal; a killed writer leaves the old file or the new one."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab import zoo as families
from logitlab.files import write_atomically, write_text
from logitlab.reading import Picture, Prompt, Reading
from logitlab.storage import _KEY
from tests import zoo
from tests.views.conftest import build, screened, without


def test_round_trip(llama: ll.Model, tmp_path: Path) -> None:
    for reading in (
        ll.read(llama, zoo.ids()),
        ll.read(llama, ["The capital of France", "x", "The girl and the sea"], target=["a", 200]),
        ll.read(llama, [zoo.ids(3), zoo.ids(8)], sites="head_out,1.neuron.3", positions=[0, -1], top_k=1),
        ll.read(llama, "The girl").at(position=-1, site="2.resid_post"),
    ):
        again = Reading.load(reading.save(tmp_path / "r.parquet"))
        assert again == reading
        assert repr(again) == repr(reading)


def test_hostile_labels_and_completions_survive(llama: ll.Model, tmp_path: Path) -> None:
    plain = ll.read(llama, zoo.ids(3), target=[5])
    first = int(plain.arrays["top_id"][0, 0, 0, 0])
    odd = dataclasses.replace(
        plain,
        labels={**plain.labels, first: "\ud83d lone \x00 'quote\" \u202e"},
        completions={(0, 2): {first: "🧪"}},
        prompts=(Prompt("a\nb", plain.prompts[0].ids, ("\udcff", "b", "🧪(1/3)"), plain.prompts[0].positions),),
    )
    again = Reading.load(odd.save(tmp_path / "r.parquet"))
    assert again == odd
    assert again != plain
    assert again.label(first, 0, 2) == "🧪"


def seen(task: str, model_type: str, size: int, **options: object) -> Reading:
    """A reading of random pixels by a small model."""
    model = ll.wrap(families.build(task, model_type))
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return ll.read(model, {"pixel_values": pixels}, **options)  # type: ignore[arg-type]


def test_pictures_and_boxes_survive(tmp_path: Path) -> None:
    classes = seen("image-classification", "vit", 32, target=[0, 3])
    assert classes.prompts[0].pictures[0].grid == (4, 4)
    boxes = seen("object-detection", "detr", 64)
    assert boxes.arrays["box"].shape[-1] == 4
    assert boxes.prompts[0].pictures
    for reading in (classes, classes.at(position=[-1, 3]), boxes, boxes.at(position=[2, 0], site=boxes.sites[-1])):
        again = Reading.load(reading.save(tmp_path / "r.parquet"))
        assert again == reading
        assert again.prompts[0].pictures == reading.prompts[0].pictures
        assert list(again.rows()) == list(reading.rows())
        assert again.to_xarray().identical(reading.to_xarray())
    np.testing.assert_array_equal(
        boxes.at(position=[2, 0]).arrays["box"], boxes.arrays["box"][:, :, [2, 0]], strict=True
    )


def test_several_pictures_and_prompts_survive(llama: ll.Model, tmp_path: Path) -> None:
    plain = ll.read(llama, [zoo.ids(5), zoo.ids(3)])
    first = (Picture(bytes(range(256)), (1, 2), ((1, 0, 0), (2, 0, 1))), Picture(b"", (0, 0), ()))
    prompts = (dataclasses.replace(plain.prompts[0], pictures=first), plain.prompts[1])
    reading = dataclasses.replace(plain, prompts=prompts)
    again = Reading.load(reading.save(tmp_path / "r.parquet"))
    assert again == reading
    assert again != plain
    assert again.prompts[0].pictures == first
    assert again.prompts[1].pictures == ()
    moved = dataclasses.replace(first[0], patches=((1, 0, 1), (2, 0, 0)))
    other = dataclasses.replace(prompts[0], pictures=(moved, first[1]))
    assert again != dataclasses.replace(reading, prompts=(other, prompts[1]))


def test_a_file_from_before_there_were_pictures(llama: ll.Model, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    reading = ll.read(llama, [zoo.ids(5), zoo.ids(3)], target=[5])
    table = pq.read_table(reading.save(tmp_path / "new.parquet"))
    meta = json.loads(table.schema.metadata[_KEY])
    assert [len(prompt) for prompt in meta["prompts"]] == [5, 5]
    meta["prompts"] = [prompt[:4] for prompt in meta["prompts"]]
    old = tmp_path / "old.parquet"
    pq.write_table(table.replace_schema_metadata({_KEY: json.dumps(meta).encode()}), old)
    assert Reading.load(old) == reading


@pytest.mark.parametrize("names", [(), ("kl",), ("entropy",)])
def test_readings_without_all_statistics_survive(llama: ll.Model, tmp_path: Path, names: tuple[str, ...]) -> None:
    reading = ll.read(llama, [zoo.ids(5), zoo.ids(3)], target=[5], statistics=names)
    again = Reading.load(reading.save(tmp_path / "r.parquet"))
    assert again == reading
    assert set(again.arrays) & {"entropy", "kl"} == set(names)
    assert list(again.rows()) == list(reading.rows())
    assert repr(again) == repr(reading)


def test_bounds_survive(tmp_path: Path) -> None:
    reading = screened(build(n_prompts=2, ragged=True))
    again = Reading.load(reading.save(tmp_path / "r.parquet"))
    assert again == reading
    assert again.cell(1, 0, 1).bound == reading.cell(1, 0, 1).bound
    assert again.bound.identical(reading.bound)
    assert again != without(reading, "bound")
    assert np.isnan(again.arrays["bound"][1, 0, -1])


def test_a_file_without_statistics_that_came_later(tmp_path: Path) -> None:
    """The columns of a file say which statistics it has: there is no list that an old file would have to fit."""
    import pyarrow.parquet as pq

    reading = screened(build(targets=(" Paris",)))
    table = pq.read_table(reading.save(tmp_path / "new.parquet"))
    for dropped in (["bound"], ["bound", "entropy", "kl"], ["bound", "entropy", "kl", "target_logprob", "target_rank"]):
        old = tmp_path / "old.parquet"
        pq.write_table(table.drop_columns(dropped), old)
        again = Reading.load(old)
        assert again == without(reading, *dropped)
        assert again.cell(0, 0, 1).bound is None
        assert len(list(again.rows())) == 7 * 6


@pytest.mark.parametrize("stored", [[["!", [1, 1]]], [["!", [1], []]], [["!", [1, 1], [[1]]]], [3], [None]])
def test_pictures_that_are_not_whole_are_refused(llama: ll.Model, tmp_path: Path, stored: list[object]) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(ll.read(llama, zoo.ids(3)).save(tmp_path / "new.parquet"))
    meta = json.loads(table.schema.metadata[_KEY])
    meta["prompts"][0][4] = stored
    bad = tmp_path / "bad.parquet"
    pq.write_table(table.replace_schema_metadata({_KEY: json.dumps(meta).encode()}), bad)
    with pytest.raises(ll.InputError, match="does not hold a whole Reading"):
        Reading.load(bad)


def test_equality_sees_every_part(llama: ll.Model) -> None:
    a = ll.read(llama, zoo.ids(3), target=[5])
    assert a == dataclasses.replace(a)
    entropy = a.arrays["entropy"].copy()
    entropy[0, 0, 0] += 1e-6
    assert a != dataclasses.replace(a, arrays={**a.arrays, "entropy": entropy})
    assert a != dataclasses.replace(a, provenance={**a.provenance, "model": "other"})
    assert a != dataclasses.replace(a, sites=("x", *a.sites[1:]))
    assert a != 1


def test_the_table_is_readable_without_logitlab(llama: ll.Model, tmp_path: Path) -> None:
    import pandas as pd

    reading = ll.read(llama, ["The girl", "The capital"], target=[5])
    table = pd.read_parquet(reading.save(tmp_path / "r.parquet"))
    assert list(table.columns[:4]) == ["prompt", "site", "position", "token"]
    row = table.iloc[-1]
    assert row["token"] == reading.prompts[1].tokens[-1]
    n, p = 1, len(reading.prompts[1].positions) - 1
    np.testing.assert_array_equal(row["top_id"], reading.arrays["top_id"][n, -1, p])
    assert row["entropy"] == reading.arrays["entropy"][n, -1, p]


def test_labelled_views_agree(llama: ll.Model) -> None:
    reading = ll.read(llama, ["The girl and the sea", "The girl"], target=[5, 9])
    dataset = reading.to_xarray()
    assert dataset["entropy"].attrs["units"] == "nats"
    assert dataset.sizes["prompt"] == 2
    assert reading.rank.dims == ("prompt", "site", "position", "target")
    np.testing.assert_allclose(reading.prob.values, np.exp(reading.logprob.values))
    frame = reading.to_pandas()
    assert len(frame) == 4 * sum(len(p.ids) for p in reading.prompts)
    cell = frame[(frame.prompt == 1) & (frame.site == "1.resid_post")].iloc[-1]
    last = len(reading.prompts[1].ids) - 1
    assert cell.entropy == pytest.approx(float(reading.entropy.values[1, 2, last]))
    assert list(cell.target_rank) == reading.rank.values[1, 2, last].tolist()
    assert cell.top[0] == reading.top_token.values[1, 2, last, 0]
    assert np.isnan(reading.entropy.values[1, 0, -1])
    assert reading.top_token.values[1, 0, -1, 0] == ""


def test_at_selects_from_each_prompts_own_end(llama: ll.Model) -> None:
    reading = ll.read(llama, ["The girl and the sea", "The girl"])
    last = reading.at(position=-1)
    for n, prompt in enumerate(reading.prompts):
        expected = reading.arrays["entropy"][n, :, len(prompt.ids) - 1]
        np.testing.assert_array_equal(last.arrays["entropy"][n, :, 0], expected)
        assert last.prompts[n].positions == (len(prompt.ids) - 1,)
    one = reading.at(prompt=1, site=["1.resid_post"], position=[0, 1])
    assert one.arrays["entropy"].shape == (1, 1, 2)
    for bad in ({"prompt": 2}, {"site": "9.resid_post"}, {"position": 99}):
        with pytest.raises(ll.InputError, match=r"not in this Reading|was not read"):
            reading.at(**bad)  # type: ignore[arg-type]
    with pytest.raises(ll.InputError, match="no target was asked for"):
        _ = reading.rank


def test_write_keeps_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old")
    path.chmod(0o640)

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


SAVE_FOR_EVER = """
import sys
from logitlab.reading import Reading
a, b = Reading.load(sys.argv[1]), Reading.load(sys.argv[2])
print("ready", flush=True)
while True:
    a.save(sys.argv[3])
    b.save(sys.argv[3])
"""


def test_killed_while_saving(llama: ll.Model, tmp_path: Path) -> None:
    a, b = ll.read(llama, zoo.ids(9)), ll.read(llama, zoo.ids(9, seed=9), target=[3])
    files = [a.save(tmp_path / "a.parquet"), b.save(tmp_path / "b.parquet")]
    target = a.save(tmp_path / "c.parquet")
    random.seed(0)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, *map(str, files), str(target)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0.01, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert Reading.load(target) in (a, b)
