"""Which positions stand for which part of a picture, against pictures in which only one part is changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import logitlab as ll
from logitlab import zoo
from logitlab.models.hooks import Taps, hidden_input
from logitlab.models.patches import NONE, Grid, state_patches, token_patches


def wrapped(model_type: str) -> ll.Model:
    return ll.wrap(zoo.build("image-classification", model_type))


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def entering(model: ll.Model, pixels: torch.Tensor) -> torch.Tensor:
    """What the first block is given, [positions, width]."""
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = hidden_input(args, kwargs)
        assert given is not None
        seen.append(model.stack.layout.rows(given).clone())

    with Taps() as taps, torch.no_grad():
        taps.before(model.stack.blocks[0].module, keep)
        model.module(pixel_values=pixels)
    return seen[0]


def found(model: ll.Model, pixels: torch.Tensor) -> tuple[Grid, int]:
    """The grid, and the number of positions."""
    reading = ll.read(model, {"pixel_values": pixels}, positions=-1)
    shape = list(model.stack.shape)
    count = len(reading.prompts[0].tokens) - 1  # the last one is the pooled answer
    if len(model.stack.layout.positions) == 1:
        shape[model.stack.layout.positions[0]] = count
    (shown,) = reading.prompts[0].pictures
    return (shown.grid, shown.patches), count


@pytest.mark.parametrize(
    ("model_type", "size", "grid", "first"),
    [
        ("vit", (32, 32), (4, 4), 1),  # a class token
        ("ijepa", (32, 32), (4, 4), 0),  # none
        ("deit", (32, 32), (4, 4), 2),  # a class and a distillation token
        ("dinov2_with_registers", (32, 32), (4, 4), 5),  # a class token and four registers
        ("dinov2_with_registers", (24, 40), (3, 5), 5),
        ("dinov2", (32, 48), (4, 6), 1),  # positions are interpolated
        ("dinov2", (48, 16), (6, 2), 1),
        ("dinov2", (8, 40), (1, 5), 1),
        ("dinov2", (40, 8), (5, 1), 1),
        ("dinov2", (8, 8), (1, 1), 1),
        ("dinov2", (30, 30), (3, 3), 1),  # the rest of the picture is not looked at
        ("dinov2", (48, 39), (6, 4), 1),
        ("dinov2", (16, 15), (2, 1), 1),
        ("beit", (32, 32), (4, 4), 1),
        ("beit", (32, 64), (4, 8), 1),
    ],
)
def test_each_patch_is_where_its_pixels_are(
    model_type: str, size: tuple[int, int], grid: tuple[int, int], first: int
) -> None:
    """Change the pixels of one patch of eight by eight: its position moves, and no other patch does."""
    model, pixels = wrapped(model_type), picture(*size)
    (shape, patches), count = found(model, pixels)
    assert shape == grid
    assert [p for p, _, _ in patches] == list(range(first, first + grid[0] * grid[1]))
    assert patches[-1][0] == count - 1
    base = entering(model, pixels)
    for position, row, column in patches:
        changed = pixels.clone()
        changed[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
        moved = (entering(model, changed) - base).abs().amax(1).nonzero().flatten().tolist()
        assert moved == [position]


@pytest.mark.parametrize(
    ("model_type", "size", "grid"),
    [
        ("swin", (64, 64), (2, 2)),  # windows and shifts have mixed everything before the last stage
        ("swin", (64, 128), (2, 4)),
        ("swin", (60, 100), (2, 4)),
        ("focalnet", (64, 96), (2, 3)),
        ("segformer", (64, 96), (2, 3)),  # sequences, but told height and width
        ("convnext", (64, 96), (2, 3)),  # image-shaped states
        ("convnext", (70, 97), (2, 3)),
        ("resnet", (64, 96), (2, 3)),
        ("resnet", (1, 1), (1, 1)),
    ],
)
def test_grids_of_later_stages(model_type: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    (shape, patches), count = found(wrapped(model_type), picture(*size))
    assert shape == grid
    assert count == grid[0] * grid[1]
    assert patches == tuple((i, i // grid[1], i % grid[1]) for i in range(count))


def test_the_labels_and_coordinates_follow_the_grid() -> None:
    model = wrapped("dinov2_with_registers")
    reading = ll.read(model, {"pixel_values": picture(24, 40)}, positions=[0, 5, 9, 10, 19, -1])
    prompt = reading.prompts[0]
    names = [prompt.tokens[p] for p in prompt.positions]
    assert names == ["position 0", "patch 0,0", "patch 0,4", "patch 1,0", "patch 2,4", "pooled"]
    entropy = reading.entropy
    assert entropy.coords["row"].values[0].tolist() == [-1, 0, 0, 1, 2, -1]
    assert entropy.coords["column"].values[0].tolist() == [-1, 0, 4, 0, 4, -1]
    last = [row for row in reading.rows() if row["site"] == reading.sites[-1]]
    assert [(row.get("picture"), row.get("row"), row.get("column")) for row in last] == [
        (None, None, None),
        (0, 0, 0),
        (0, 0, 4),
        (0, 1, 0),
        (0, 2, 4),
        (None, None, None),
    ]
    chosen = reading.at(position=[10])
    assert chosen.entropy.coords["row"].values.tolist() == [[1]]
    assert float(chosen.entropy[0, -1, 0]) == float(entropy[0, -1, 3])


@pytest.mark.parametrize("model_type", ["perceiver", "levit"])
def test_positions_that_stand_for_no_patch(model_type: str) -> None:
    """Latents that have looked at the whole picture; stages that are told nothing."""
    model = wrapped(model_type)
    grid, _ = found(model, model.template.inputs["pixel_values"])
    assert grid == NONE


def test_pixels_that_are_no_picture() -> None:
    model = wrapped("vit")
    shape = model.stack.shape
    for pixels in (None, "no", torch.zeros(16, 12), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        assert state_patches(model.module, model.stack, {"pixel_values": pixels}, shape) == NONE
    assert state_patches(model.module, model.stack, {}, shape) == NONE


IMAGE = 99


def multimodal(**more: Any) -> Any:
    """A module that is a configuration only."""
    module = nn.Module()
    module.config = SimpleNamespace(**({"image_token_id": IMAGE} | more))
    return module


def part(**values: Any) -> Any:
    return SimpleNamespace(**values, to_dict=dict, model_type="part")


def line_by_line(start: int, rows: int, columns: int) -> Grid:
    return (rows, columns), tuple((start + i, i // columns, i % columns) for i in range(rows * columns))


def test_one_picture_in_a_text() -> None:
    ids = [1, 2, *[IMAGE] * 9, 3, 4]
    expected = [line_by_line(2, 3, 3)]
    assert token_patches(multimodal(), None, ids, {}) == expected
    assert token_patches(multimodal(image_token_id=None, image_token_index=IMAGE), None, ids, {}) == expected
    nested = multimodal(image_token_id=None, text_config=part(image_token_id=IMAGE))
    assert token_patches(nested, None, ids, {}) == expected
    by_processor = token_patches(nn.Module(), SimpleNamespace(image_token_id=IMAGE), ids, {})
    assert by_processor == expected


def test_two_pictures_in_a_text() -> None:
    apart = [1, *[IMAGE] * 4, 2, *[IMAGE] * 9, 3]
    assert token_patches(multimodal(), None, apart, {}) == [line_by_line(1, 2, 2), line_by_line(6, 3, 3)]
    # side by side the number of pictures tells them apart: four of 2 x 2 are not one of 4 x 4
    together = [1, *[IMAGE] * 16, 2]
    pixels = {"pixel_values": torch.zeros(4, 3, 8, 8)}
    assert token_patches(multimodal(), None, together, pixels) == [line_by_line(1 + 4 * i, 2, 2) for i in range(4)]
    one = {"pixel_values": torch.zeros(1, 3, 8, 8)}
    assert token_patches(multimodal(), None, together, one) == [line_by_line(1, 4, 4)]


def test_the_processor_says_how_large() -> None:
    merged = multimodal(vision_config=part(spatial_merge_size=2))
    ids = [1, *[IMAGE] * 6, 2, *[IMAGE] * 10, 3]
    extra = {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 10, 4]])}
    assert token_patches(merged, None, ids, extra) == [line_by_line(1, 2, 3), line_by_line(8, 5, 2)]
    plain = [1, *[IMAGE] * 6]
    assert token_patches(multimodal(), None, plain, {"image_grid_thw": torch.tensor([[1, 2, 3]])}) == [
        line_by_line(1, 2, 3)
    ]
    # separators inside a picture: its tokens still follow one another line by line
    broken = [IMAGE, IMAGE, IMAGE, 7, IMAGE, IMAGE, IMAGE]
    found = token_patches(multimodal(), None, broken, {"image_grid_thw": torch.tensor([[1, 2, 3]])})
    assert found == [((2, 3), ((0, 0, 0), (1, 0, 1), (2, 0, 2), (4, 1, 0), (5, 1, 1), (6, 1, 2)))]


@pytest.mark.parametrize(
    ("module", "ids", "extra"),
    [
        (multimodal(), [1, 2, 3], {}),  # no picture
        (multimodal(), [], {}),
        (multimodal(image_token_id=None), [IMAGE] * 4, {}),  # no image token
        (nn.Module(), [IMAGE] * 4, {}),  # no configuration
        (multimodal(), [1, *[IMAGE] * 5], {}),  # no square
        (multimodal(), [1, *[IMAGE] * 4, 2, *[IMAGE] * 3], {}),  # one of two is none
        (multimodal(), [1, *[IMAGE] * 5], {"image_grid_thw": torch.tensor([[1, 2, 3]])}),  # one token is missing
        (multimodal(), [1, *[IMAGE] * 7], {"image_grid_thw": torch.tensor([[1, 2, 3]])}),  # one too many
        (multimodal(vision_config=part(spatial_merge_size=2)), [IMAGE] * 6, {"image_grid_thw": [[1, 2, 3]]}),
    ],
)
def test_where_the_numbers_do_not_fit_there_are_no_patches(module: Any, ids: list[int], extra: Any) -> None:
    assert token_patches(module, None, ids, extra) == []


def test_pictures_of_a_model_that_reads_text_too() -> None:
    """Two pictures between words: the labels, the pictures and their patches."""
    model = ll.wrap(zoo.build("image-text-to-text", "llava"))
    token = model.module.config.image_token_id
    ids = [1, *[token] * 16, 5, 6, *[token] * 16, 7]
    pixels = torch.cat([picture(32, 32, 1), picture(32, 32, 2)])
    reading = ll.read(model, {"input_ids": torch.tensor([ids]), "pixel_values": pixels})
    prompt = reading.prompts[0]
    assert [(p.grid, p.patches) for p in prompt.pictures] == [line_by_line(1, 4, 4), line_by_line(19, 4, 4)]
    assert prompt.pictures[0].png != prompt.pictures[1].png
    assert [prompt.tokens[i] for i in (0, 1, 16, 17, 19, 34, 35)] == [
        "1",
        "patch 0,0",
        "patch 3,3",
        "5",
        "patch 0,0",
        "patch 3,3",
        "7",
    ]
    with torch.no_grad():
        truth = model.module(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0].double().log_softmax(-1)
    entropy = -(truth.exp() * truth).sum(-1)
    assert reading.entropy.values[0, -1].tolist() == pytest.approx(entropy.tolist(), rel=1e-4)
    shifted = {"input_ids": torch.tensor([ids[:-1] + [token] * 2]), "pixel_values": pixels}
    with pytest.raises(
        ll.InputError, match=r"does not run on this input \(.*pixel_values \[2, 3, 32, 32\].*\): ValueE"
    ):
        ll.read(model, shifted)
