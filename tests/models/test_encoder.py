"""Every form of input, for models of each kind, against plain calls of the model; and what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPProcessor,
    LlavaProcessor,
    ViTImageProcessor,
    WhisperFeatureExtractor,
    WhisperProcessor,
)

import logitlab as ll
from logitlab import zoo
from tests import zoo as texts


def picture(seed: int = 0) -> Any:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def sound(seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(4000).astype(np.float32) / 10


@cache
def classifier() -> ll.Model:
    return ll.wrap(
        zoo.build("image-classification", "vit"), ViTImageProcessor(size={"height": 32, "width": 32}), name="vit"
    )


@cache
def clip(stack: str | None = None) -> ll.Model:
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    module = zoo.build("zero-shot-image-classification", "clip")
    return ll.wrap(module, CLIPProcessor(images, texts.tokenizer()), name="clip", stack=stack)


@cache
def whisper() -> ll.Model:
    extractor = WhisperFeatureExtractor(feature_size=80)
    extractor.n_samples, extractor.nb_max_frames = 128 * 160, 128  # as long as the small model's sound
    module = zoo.build("speech-to-text", "whisper")
    return ll.wrap(module, WhisperProcessor(extractor, texts.tokenizer()), name="whisper")


@cache
def llava() -> ll.Model:
    module: Any = zoo.build("image-text-to-text", "llava")
    tokenizer = texts.tokenizer().__class__(tokenizer_object=texts.tokenizer().backend_tokenizer, pad_token="<pad>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    module.config.image_token_id = module.config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return ll.wrap(module, processor, name="llava")


def plain(model: ll.Model, **inputs: Any) -> torch.Tensor:
    """Log-probabilities by a plain call, float64 [rows, columns]."""
    with torch.no_grad():
        output: Any = model.module(**inputs)
    z = output.logits if hasattr(output, "logits") else output.logits_per_image
    return z.reshape(-1, z.shape[-1]).double().log_softmax(-1)


def answers(model: ll.Model, inputs: Any, **more: Any) -> list[torch.Tensor]:
    """Log-probabilities of all columns at the last site, by input."""
    columns = more.pop("columns", model.vocab_size)
    if model.space.per == "input":
        more["positions"] = -1
    reading = ll.read(model, inputs, target=list(range(columns)), sites=str(model.last_site), **more)
    values = torch.from_numpy(reading.arrays["target_logprob"])
    return [values[n, -1, : len(p.positions)] for n, p in enumerate(reading.prompts)]


def close(found: torch.Tensor, truth: torch.Tensor) -> bool:
    return found.shape == truth.shape and torch.allclose(found.double(), truth, rtol=0, atol=2e-4)


def message(model: ll.Model, inputs: Any, **more: Any) -> str:
    with pytest.raises(ll.InputError) as caught:
        ll.read(model, inputs, **more)
    text = str(caught.value)
    assert "\n" not in text
    return text


# -- a classifier of pictures ----------------------------------------------------------------------


def test_every_form_of_a_picture_for_a_classifier(tmp_path: Path) -> None:
    model, image = classifier(), picture()
    pixels = model.processor(images=[image], return_tensors="pt")["pixel_values"]
    truth = plain(model, pixel_values=pixels)
    path = tmp_path / "a.png"
    image.save(path)
    chat_free: list[Any] = [
        image,
        np.asarray(image),
        path,
        str(path),
        {"image": image},
        {"image": str(path)},
        {"images": [image]},
        {"pixel_values": pixels},
    ]
    for value in chat_free:
        (found,) = answers(model, value)
        assert close(found, truth), value
    many = answers(model, chat_free)
    assert len(many) == len(chat_free)
    assert all(close(found, truth) for found in many)


def test_several_pictures_are_several_prompts() -> None:
    model = classifier()
    for made in ([picture(1), picture(2)], (picture(1), picture(2))):
        found = answers(model, made)
        assert len(found) == 2
        for n, seed in enumerate((1, 2)):
            truth = plain(model, **model.processor(images=[picture(seed)], return_tensors="pt"))
            assert close(found[n], truth)
    both = model.processor(images=[picture(1), picture(2)], return_tensors="pt")["pixel_values"]
    by_tensor = answers(model, [{"pixel_values": both[:1]}, {"pixel_values": both[1:]}])
    assert all(torch.equal(a, b) for a, b in zip(found, by_tensor, strict=True))


def test_a_picture_of_one_pixel_and_a_huge_one() -> None:
    model = classifier()
    for image in (Image.new("RGB", (1, 1), (200, 10, 10)), Image.new("RGB", (4000, 2500), (200, 10, 10))):
        (found,) = answers(model, image)
        assert close(found, plain(model, **model.processor(images=[image], return_tensors="pt")))


TAKES = "vit takes pixel_values, not "
BATCH = "pixel_values holds a batch of 2: give one mapping for each input"


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("a text", TAKES + "text: give a picture or sound (path, PIL image, array), or a mapping with pixel_values"),
        (["a", "b"], TAKES + "text"),
        ([1, 2], TAKES + "int"),
        (None, TAKES + "NoneType"),
        (torch.zeros(1, 3, 32, 32), TAKES + "Tensor [1, 3, 32, 32] of torch.float32"),
        (np.zeros((32, 32, 3)), TAKES + "ndarray [32, 32, 3] of float64"),
        ([picture(), "a text"], TAKES + "text"),
        ([], "there is nothing to read: the list of prompts is empty"),
        ("nowhere.png", "there is no picture at nowhere.png"),
        ([picture(), "nowhere.png"], "there is no picture at nowhere.png"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32)}, BATCH),
        ([{"pixel_values": torch.zeros(2, 3, 32, 32)}], BATCH),
        ({"pixels": torch.zeros(1, 3, 32, 32)}, "vit does not take pixels"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32), "more": torch.zeros(1)}, "vit does not take more"),
        ({"pixel_values": torch.full((1, 3, 32, 32), torch.nan)}, "pixel_values has values that are NaN or infinite"),
        (
            {"pixel_values": torch.zeros(1, 3, 30, 32)},
            "vit does not run on this input (pixel_values [1, 3, 30, 32]): ValueError: Input image size (30*32)",
        ),
        ({"pixel_values": torch.zeros(1, 1, 32, 32)}, "vit does not run on this input (pixel_values [1, 1, 32, 32])"),
        ({"images": [picture(), picture()]}, "vit reads one picture at a time: give a list of inputs"),
        ({"image": picture(), "text": "what?"}, "vit takes no text beside a picture or sound: leave it out"),
        (sound(), "the model's processor refuses this input"),
    ],
)
def test_what_a_classifier_refuses(inputs: Any, expected: str) -> None:
    assert message(classifier(), inputs).startswith(expected)


def test_arguments_of_other_models() -> None:
    assert message(classifier(), picture(), concepts=["a"]).startswith("concepts= is for models that compare pictures")
    assert message(classifier(), picture(), decoder="a").startswith("decoder= is for encoder-decoder models")
    assert message(classifier(), picture(), positions=18).startswith("position 18 is out of range")
    bare = ll.wrap(classifier().module)
    assert "has no processor for pictures or sounds" in message(bare, picture())


def test_nothing_stays_on_a_model_that_refused() -> None:
    model = classifier()
    before = answers(model, picture())[0]
    message(model, {"pixel_values": torch.zeros(1, 3, 30, 32)})
    assert all(not m._forward_hooks and "_call_impl" not in vars(m) for m in model.module.modules())
    assert torch.equal(answers(model, picture())[0], before)


def test_low_precision() -> None:
    module = zoo.build("image-classification", "vit").bfloat16()
    model = ll.wrap(module, ViTImageProcessor(size={"height": 32, "width": 32}))
    (found,) = answers(model, picture())
    pixels = model.processor(images=[picture()], return_tensors="pt")["pixel_values"]
    assert close(found, plain(model, pixel_values=pixels.bfloat16()))


# -- pictures against texts ------------------------------------------------------------------------

CONCEPTS = ["a girl", "the sea", "the stars and the wind"]


def test_pictures_against_texts() -> None:
    model = clip()
    for n in (1, 2, 3):
        concepts = CONCEPTS[:n]
        made = model.processor(text=concepts, images=[picture()], return_tensors="pt", padding=True)
        truth = plain(model, **made)
        for inputs in (picture(), np.asarray(picture()), {"image": picture()}, [picture()], dict(made), [dict(made)]):
            (found,) = answers(model, inputs, concepts=concepts, columns=n)
            assert close(found, truth)
    first, second = answers(model, [picture(1), picture(2)], concepts=tuple(CONCEPTS), columns=3)
    for found, seed in ((first, 1), (second, 2)):
        made = model.processor(text=CONCEPTS, images=[picture(seed)], return_tensors="pt", padding=True)
        assert close(found, plain(model, **made))


@pytest.mark.parametrize("n", [1, 2, 17])
def test_single_positions_do_not_depend_on_how_many_are_asked_for(n: int) -> None:
    """Also of one concept, whose batch of one is not to be taken for that of the picture."""
    concepts = [f"the {i}" for i in range(n)]
    whole = ll.read(clip(), picture(), concepts=concepts, target=0)
    for positions in ([3], [3, 17], [0, 5, 9]):
        part = ll.read(clip(), picture(), concepts=concepts, target=0, positions=positions)
        np.testing.assert_allclose(
            part.arrays["target_logprob"], whole.arrays["target_logprob"][:, :, positions], rtol=0, atol=1e-4
        )
    if n == 1:
        assert float(np.abs(whole.arrays["target_logprob"]).max()) == 0.0
    assert {t.token for t in whole.targets} == {"the 0"}


def test_texts_against_pictures() -> None:
    model = clip("text_model")
    pictures = [picture(1), picture(2), picture(3)]
    reading = ll.read(model, ["the girl", "the sea"], concepts=pictures, target=[0, 1, 2])
    made = model.processor(text=["the girl", "the sea"], images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        truth = model.module(**made).logits_per_text.double().log_softmax(-1)
    for n in range(2):
        found = torch.from_numpy(reading.arrays["target_logprob"][n, -1])
        assert torch.allclose(found.double(), truth[n], rtol=0, atol=2e-4)
        assert reading.prompts[n].text == ["the girl", "the sea"][n]
        assert reading.prompts[n].pictures == ()  # they are what the text is compared with
    assert [t.token for t in reading.targets] == ["concept 0", "concept 1", "concept 2"]


NEED = "clip compares with texts: give them as a list, concepts=[...]"


@pytest.mark.parametrize(
    ("inputs", "concepts", "expected"),
    [
        (picture(), None, NEED),
        (picture(), [], NEED),
        (picture(), "a girl", NEED),
        (picture(), ["a", " "], "the concept ' ' is not a text: give a list of texts"),
        (picture(), ["a", 3], "the concept 3 is not a text"),
        (picture(), ["a", "b", "a"], "the concept 'a' is given twice"),
        ("a girl", CONCEPTS, "clip reads pictures: give a path, a PIL image or an array"),
        (np.zeros((4, 4, 3)), CONCEPTS, "clip reads pictures"),
        ([], CONCEPTS, "there is nothing to read: the list of prompts is empty"),
        ("nowhere.png", CONCEPTS, "there is no picture at nowhere.png"),
        ({"images": [picture(), picture()]}, CONCEPTS, "clip reads one picture at a time"),
        (picture(), ["word " * 200], "clip does not run on this input (input_ids [1, "),
        (
            {"pixel_values": torch.zeros(2, 3, 32, 32), "input_ids": torch.ones(3, 4)},
            CONCEPTS,
            "pixel_values must hold",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 32, 32), "input_ids": torch.ones(3, 4), "x": torch.ones(1)},
            CONCEPTS,
            "clip does not take x",
        ),
    ],
)
def test_what_a_comparison_refuses(inputs: Any, concepts: Any, expected: str) -> None:
    assert message(clip(), inputs, concepts=concepts).startswith(expected)


def test_what_a_text_tower_refuses() -> None:
    model = clip("text_model")
    assert message(model, "a", concepts=None).startswith("clip compares with pictures: give them as a list")
    assert message(model, "a", concepts=["b"]).startswith("concepts= must be pictures where a text tower is read")
    assert message(model, picture(), concepts=[picture()]).startswith("the text tower of clip reads texts; got Image")
    assert message(model, " ", concepts=[picture()]).startswith("the text tower of clip reads texts; got str")


# -- speech ----------------------------------------------------------------------------------------


def test_every_form_of_a_sound(tmp_path: Path) -> None:
    import wave

    model = whisper()
    samples = np.round(sound() * 32768).astype("<i2")
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, len(samples), "NONE", ""))
        file.writeframes(samples.tobytes())
    value = samples.astype(np.float32) / 32768
    features = model.processor.feature_extractor(value, sampling_rate=16000, return_tensors="pt")["input_features"]
    start = model.decoder_start
    for written, decoder in (([], None), ([40, 41], [40, 41]), ([40, 41], torch.tensor([*start, 40, 41]))):
        truth = plain(model, input_features=features, decoder_input_ids=torch.tensor([[*start, *written]]))
        for inputs in (value, path, str(path), {"audio": value}, {"audio": str(path)}, {"input_features": features}):
            (found,) = answers(model, inputs, decoder=decoder)
            assert close(found, truth), inputs
    words = "the girl"
    ids = [*start, *model.tokenizer(words, add_special_tokens=False)["input_ids"]]
    truth = plain(model, input_features=features, decoder_input_ids=torch.tensor([ids]))
    assert close(answers(model, value, decoder=words)[0], truth)
    by_tensor = {"input_features": features, "decoder_input_ids": torch.tensor([ids])}
    assert close(answers(model, by_tensor)[0], truth)
    first, second = answers(model, [value, value[:100]], decoder=words)
    assert close(first, truth)
    assert not close(second, truth)


READS = "whisper reads sound or pictures: give one, not "


@pytest.mark.parametrize(
    ("inputs", "more", "expected"),
    [
        ("hello", {}, READS + "text (decoder= is for its text)"),
        (np.zeros((2, 100), np.float32), {}, READS + "ndarray [2, 100] of float32"),
        (np.zeros(100, np.int16), {}, READS + "ndarray [100] of int16"),
        ([0.1, 0.2], {}, READS + "float"),
        ([], {}, "there is nothing to read"),
        ("nowhere.wav", {}, "there is no sound at nowhere.wav"),
        (picture(), {}, "the model's processor makes nothing of pictures: this model does not read them"),
        ({"audio": sound(), "rate": 8000}, {}, "the model's processor refuses this input: ValueError"),
        ({"audio": sound(), "text": "a"}, {}, "whisper takes no text beside a picture or sound: leave it out"),
        (sound(), {"decoder": [5, 6000]}, "the prompt has token id 6000, which is not in the vocabulary (0 to 319)"),
        (sound(), {"decoder": "\udcff"}, "decoder= has a character at 0 that is not text"),
        (sound(), {"concepts": ["a"]}, "concepts= is for models that compare"),
        ({"input_features": torch.zeros(2, 80, 128)}, {}, "input_features holds a batch of 2"),
        ({"input_features": torch.zeros(1, 80, 99)}, {}, "whisper does not run on this input (input_features [1, 80, "),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, {}, "whisper does not take pixel_values"),
    ],
)
def test_what_a_speech_model_refuses(inputs: Any, more: Any, expected: str) -> None:
    assert message(whisper(), inputs, **more).startswith(expected)


def test_a_decoder_text_needs_a_tokenizer() -> None:
    bare = ll.wrap(whisper().module, whisper().processor.feature_extractor)
    assert message(bare, sound(), decoder="the").startswith("decoder= is text and this model has no tokenizer")


# -- pictures and text -----------------------------------------------------------------------------


def test_a_picture_and_a_text() -> None:
    model = llava()
    mark = model.processor.image_token
    assert mark == "<image>"
    for pictures, text in (([picture()], "the girl"), ([picture(1), picture(2)], "two girls")):
        marked = mark * len(pictures) + text
        made = model.processor(text=[marked], images=pictures, return_tensors="pt")
        truth = plain(model, **made)
        forms: list[Any] = [{"images": pictures, "text": text}, {"images": pictures, "text": marked}, dict(made)]
        for inputs in forms:
            (found,) = answers(model, inputs)
            assert close(found, truth), inputs
        reading = ll.read(model, forms[0])
        assert [p.grid for p in reading.prompts[0].pictures] == [(4, 4)] * len(pictures)
        assert reading.prompts[0].tokens[:2] == ("patch 0,0", "patch 0,1")
        assert reading.prompts[0].text == text


def test_texts_of_a_model_that_reads_pictures() -> None:
    model = llava()
    ids = model.tokenizer("the girl and the sea")["input_ids"]
    truth = plain(model, input_ids=torch.tensor([ids]))
    for inputs in (
        "the girl and the sea",
        ids,
        {"input_ids": torch.tensor([ids])},
        [{"input_ids": torch.tensor([ids])}],
    ):
        assert close(answers(model, inputs)[0], truth)
    mixed = answers(model, ["the girl and the sea", {"image": picture(), "text": "a"}])
    assert close(mixed[0], truth)
    assert close(mixed[1], plain(model, **model.processor(text=["<image>a"], images=[picture()], return_tensors="pt")))
    assert message(model, "a", concepts=["b"]).startswith("concepts= is for")
    assert message(model, {"image": picture(), "text": "a"}, decoder="b").startswith("decoder= is for encoder-decoder")
    two = model.processor(text=["<image>a", "<image>b"], images=[picture(), picture()], return_tensors="pt")
    assert message(model, dict(two)).startswith("tensors beside token ids are understood for a batch of one")


def test_a_picture_and_a_text_for_an_encoder() -> None:
    """What the processor makes goes to the encoder; the decoder has written what decoder= says."""
    module: Any = zoo.build("image-text-to-text", "florence2")
    side = module.config.vision_config.image_size if hasattr(module.config.vision_config, "image_size") else 64
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = module.get_image_features(pixel_values=pixels).pooler_output
    count = features.shape[-2] if isinstance(features, torch.Tensor) else features[0].shape[-2]
    ids = [*[module.config.image_token_id] * count, 5, 6]

    def process(**_: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}

    process.tokenizer = None  # type: ignore[attr-defined]
    model = ll.wrap(module, process, name="florence")
    start = model.decoder_start
    for written in ([], [7, 8, 9]):
        truth = plain(
            model,
            input_ids=torch.tensor([ids]),
            pixel_values=pixels,
            decoder_input_ids=torch.tensor([[*start, *written]]),
        )
        tensors = {"input_ids": torch.tensor([ids]), "pixel_values": pixels}
        for inputs in ({"image": picture(), "text": "what?"}, tensors):
            assert close(answers(model, inputs, decoder=written)[0], truth)
