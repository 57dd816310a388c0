"""Pictures and sounds as inputs: every form is recognised, what is wrong is said in one line."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    ConvNextImageProcessor,
    MobileViTImageProcessor,
    ViTImageProcessor,
    WhisperFeatureExtractor,
)

import logitlab as ll
from logitlab.models.media import SHOWN, Media, media_of, prepare, shown


def pixels(height: int = 20, width: int = 30, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(pixels()).save(path)
    return path


def write_wav(path: Path, samples: Any, *, rate: int = 16000, channels: int = 1, size: int = 2) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setframerate(rate)
        file.setnchannels(channels)
        file.setsampwidth(size)
        file.writeframes(np.asarray(samples).tobytes())
    return path


def only_picture(media: Media | None) -> Any:
    assert media is not None
    assert media.sound is None
    (found,) = media.pictures
    assert found.mode == "RGB"
    return np.asarray(found)


def test_every_form_of_a_picture(picture: Path) -> None:
    image = Image.fromarray(pixels())
    chat = [{"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image", "image": image}]}]
    for value in (image, pixels(), picture, {"image": picture}, {"image": image}, {"images": [pixels()]}, chat):
        assert np.array_equal(only_picture(media_of(value, paths=False)), pixels())
    assert np.array_equal(only_picture(media_of(str(picture), paths=True)), pixels())
    assert np.array_equal(only_picture(media_of({"image": str(picture)}, paths=False)), pixels())
    grey = pixels()[..., 0]
    assert np.array_equal(only_picture(media_of({"image": grey}, paths=False)), np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "CMYK", "1"])
def test_pictures_of_other_modes_become_colours(mode: str) -> None:
    image = Image.fromarray(pixels()).convert(mode)
    assert np.array_equal(only_picture(media_of(image, paths=False)), np.asarray(image.convert("RGB")))


def test_a_text_is_a_file_only_where_that_is_meant(picture: Path) -> None:
    assert media_of(str(picture), paths=False) is None
    assert media_of("nowhere.png", paths=False) is None
    assert media_of("a sentence", paths=True) is None


@pytest.mark.parametrize(
    "value",
    [
        "hello",
        [1, 2, 3],
        ["a", "b"],
        [],
        None,
        3,
        np.zeros((2, 3), np.int64),
        np.zeros(4, np.int64),
        np.zeros((4, 4, 3), np.float32),
        torch.zeros(3, 4, 4),
        {"input_ids": [1]},
        [{"role": "user", "content": "hello"}],
        [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        {"text": "alone"},
    ],
)
def test_what_is_something_else(value: Any) -> None:
    assert media_of(value, paths=True) is None


def test_a_mapping_keeps_its_parts() -> None:
    media = media_of({"images": [pixels(), pixels(seed=1)], "text": "two of them"}, paths=False)
    assert media is not None
    assert media.text == "two of them"
    assert [np.asarray(p).tolist() for p in media.pictures] == [pixels().tolist(), pixels(seed=1).tolist()]
    media = media_of({"audio": [0.0, 0.5], "rate": np.int64(8000)}, paths=False)
    assert media is not None
    assert (media.sound.tolist(), media.rate) == ([0.0, 0.5], 8000)
    unsaid = media_of({"audio": [0.0, 0.5], "rate": None}, paths=False)
    assert unsaid is not None
    assert unsaid.rate == 16000


def test_wav_files(tmp_path: Path) -> None:
    values = np.array([0, 1, -1, 32767, -32768], dtype="<i2")
    path = write_wav(tmp_path / "a.WAV", values)
    for value in (path, {"audio": str(path)}):
        media = media_of(value, paths=False)
        assert media is not None
        assert media.sound.dtype == np.float32
        assert media.sound.tolist() == (values.astype(np.float64) / 32768).tolist()
    assert media_of(str(path), paths=True) is not None
    stereo = media_of(write_wav(tmp_path / "b.wav", np.array([100, 300, -4, 8], "<i2"), channels=2), paths=False)
    assert stereo is not None
    assert stereo.sound.tolist() == [200 / 32768, 2 / 32768]


def test_sounds_as_samples() -> None:
    for value in (np.array([0.25, -0.5]), np.array([0.25, -0.5], np.float16), {"audio": (0.25, -0.5)}):
        media = media_of(value, paths=False)
        assert media is not None
        assert (media.sound.tolist(), media.sound.dtype, media.pictures) == ([0.25, -0.5], np.float32, ())


def message(value: Any) -> str:
    with pytest.raises(ll.InputError) as caught:
        media_of(value, paths=True)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("nowhere.png", "there is no picture at nowhere.png: check the path"),
        (Path("nowhere.jpg"), "there is no picture at nowhere.jpg: check the path"),
        ("nowhere.wav", "there is no sound at nowhere.wav: check the path"),
        ({"audio": "nowhere.wav"}, "there is no sound at nowhere.wav: check the path"),
        ({"image": None}, "the input holds no picture and no sound: give image, images or audio something"),
        ({"images": []}, "the input holds no picture and no sound: give image, images or audio something"),
        ({"image": 3}, "a picture that is int is not understood"),
        ({"image": np.zeros((4, 4, 3))}, "a picture that is array of shape (4, 4, 3) and float64 is not understood"),
        (np.zeros((0, 4, 3), np.uint8), "a picture that is array of shape (0, 4, 3) and uint8 is not understood"),
        (np.zeros((4, 4, 7), np.uint8), "an array of shape (4, 4, 7) is not a picture: give [height, width, 3]"),
        (np.zeros((3, 40, 40), np.uint8), "an array of shape (3, 40, 40) is not a picture"),
        ({"image": pixels(), "txet": "a"}, "the input has an unknown part 'txet': give image, images, audio, rate, te"),
        ([{"content": [{"type": "image"}]}], "a picture that is NoneType is not understood"),
        ({"audio": [0.5, float("nan")]}, "the sound has samples that are not finite"),
        (np.array([np.inf], np.float32), "the sound has samples that are not finite"),
        ({"audio": [[0.5], [0.5]]}, "a sound of shape (2, 1) is not understood: give its samples as one row"),
        ({"audio": []}, "a sound of shape (0,) is not understood: give its samples as one row"),
        ({"audio": ["a"]}, "a sound of type list is not understood: give its samples"),
        ({"audio": [0.5], "rate": "fast"}, "rate 'fast' is not a whole number"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(value: Any, expected: str) -> None:
    assert message(value).startswith(expected)


def test_files_that_are_something_else(tmp_path: Path, picture: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("not a picture\n")
    assert message(text).startswith(f"{text} is not a picture that can be read")
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture.read_bytes()[:-900])
    assert message(cut).startswith(f"{cut} is not a picture that can be read")
    noise = tmp_path / "noise.wav"
    noise.write_bytes(b"RIFFnothing")
    assert message(noise).startswith(f"{noise} is not a WAV file that can be read")
    (tmp_path / "empty.wav").write_bytes(b"")
    assert "is not a WAV file that can be read" in message(tmp_path / "empty.wav")
    assert message(tmp_path).startswith(f"there is no picture at {tmp_path}")  # a folder
    silent = write_wav(tmp_path / "silent.wav", np.zeros(0, "<i2"))
    assert message(silent).startswith(f"{silent} holds no samples")


def test_sounds_of_another_make(tmp_path: Path) -> None:
    eight = write_wav(tmp_path / "8.wav", np.zeros(4, np.uint8), size=1)
    assert message(eight) == f"{eight} has samples of 8 bits: give 16-bit ones"
    slow = write_wav(tmp_path / "slow.wav", np.zeros(4, "<i2"), rate=8000)
    assert message(slow).startswith(f"{slow} has 8000 samples a second: give 16000")


def test_prepare_is_the_processor_itself() -> None:
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    image = Image.fromarray(pixels())
    made = prepare(Media((image,)), processor, None)
    assert torch.equal(made["pixel_values"], processor(images=[image], return_tensors="pt")["pixel_values"])
    extractor = WhisperFeatureExtractor(chunk_length=1)
    samples = np.sin(np.arange(4000, dtype=np.float32) / 10)
    made = prepare(Media(sound=samples), extractor, None)
    own = extractor(samples, sampling_rate=16000, return_tensors="pt")["input_features"]
    assert torch.equal(made["input_features"], own)


def refused(media: Media, processor: Any) -> str:
    with pytest.raises(ll.InputError) as caught:
        prepare(media, processor, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_processor() -> None:
    assert "has no processor for pictures or sounds" in refused(Media((Image.new("RGB", (4, 4)),)), None)


def test_the_processor_refuses() -> None:
    sound = Media(sound=np.zeros(10, np.float32), rate=8000)
    found = refused(sound, WhisperFeatureExtractor(chunk_length=1))
    assert found.startswith("the model's processor refuses this input: ValueError: ")
    assert "8000" in found or "16000" in found

    def fail(**_: Any) -> Any:
        raise ValueError("two\nlines\tof reasons")

    found = refused(Media((Image.new("RGB", (4, 4)),)), fail)
    assert found == "the model's processor refuses this input: ValueError: two lines of reasons"


def test_a_processor_that_makes_nothing_of_it() -> None:
    def words(**_: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[1, 2]]), "note": "text"}

    found = refused(Media((Image.new("RGB", (4, 4)),)), words)
    assert found == "the model's processor makes nothing of pictures: this model does not read them"


def seen(made: torch.Tensor | None, processor: Any, original: Any = None) -> Any:
    return np.asarray(Image.open(io.BytesIO(shown(made, processor, original)))).astype(int)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 24, "width": 40}),
        ViTImageProcessor(size={"height": 24, "width": 40}, image_mean=[0.1, 0.5, 0.9], image_std=[0.2, 0.3, 0.4]),
        ViTImageProcessor(size={"height": 24, "width": 40}, do_normalize=False),
        ViTImageProcessor(size={"height": 24, "width": 40}, do_normalize=False, do_rescale=False),
        ViTImageProcessor(
            size={"height": 24, "width": 40}, do_rescale=False, image_mean=[120, 110, 100], image_std=[60, 61, 62]
        ),
        ViTImageProcessor(
            size={"height": 24, "width": 40}, rescale_factor=1 / 127.5, image_mean=[1, 1, 1], image_std=[1, 1, 1]
        ),
        CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 24, "width": 24}),
        ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=0.875),
        MobileViTImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 24, "width": 24}),
    ],
    ids=["half", "means", "unit", "raw", "raw means", "two", "clip", "convnext", "blue first"],
)
def test_what_is_shown_is_what_the_model_saw(processor: Any) -> None:
    """The colours before rescaling and normalising come back within one grey level."""
    image = Image.fromarray(pixels(48, 80)).resize((80, 48))
    made = processor(images=[image], return_tensors="pt")["pixel_values"]
    undone = {"do_rescale": False, "do_normalize": False, "do_flip_channel_order": False}
    plain = type(processor)(**{**processor.to_dict(), **undone})
    expected = plain(images=[image], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0).astype(int)
    found = seen(made.float(), processor)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1


def test_a_dark_picture_is_shown_dark() -> None:
    """Raw values from 0 to 255 that happen to be small are not taken for fractions."""
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False, do_rescale=False)
    made = processor(images=[Image.new("RGB", (8, 8), (1, 0, 1))], return_tensors="pt")["pixel_values"].float()
    assert seen(made, processor).max() <= 1


def test_pixels_of_an_unknown_kind_are_stretched() -> None:
    made = torch.linspace(-3, 5, 3 * 16).reshape(1, 3, 4, 4)
    found = seen(made, None)
    assert (found.min(), found.max()) == (0, 255)
    flat = seen(torch.full((1, 3, 4, 4), -2.0), None)
    assert len(np.unique(flat)) == 1


def test_packed_pixels_show_the_original() -> None:
    image = Image.fromarray(pixels())
    assert np.array_equal(seen(torch.zeros(6, 12), None, image), pixels())
    assert shown(torch.zeros(6, 12), None, None) == b""
    assert shown(None, None, None) == b""


def test_large_pictures_are_shown_small() -> None:
    image = Image.new("RGB", (3000, 30))
    assert Image.open(io.BytesIO(shown(None, None, image))).size == (SHOWN, 5)
    assert image.size == (3000, 30)  # the caller's own is left alone
    assert Image.open(io.BytesIO(shown(None, None, Image.new("RGB", (1, 1))))).size == (1, 1)


def test_low_precision_pixels_can_be_shown() -> None:
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    made = processor(images=[Image.fromarray(pixels(8, 8))], return_tensors="pt")["pixel_values"]
    assert np.abs(seen(made.bfloat16(), processor) - pixels(8, 8).astype(int)).max() <= 2
