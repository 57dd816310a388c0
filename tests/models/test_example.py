"""Made-up inputs: what is given follows from the signature, and every model takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from logitlab import zoo
from logitlab.errors import ModelError
from logitlab.models.example import CAPTIONS, FRAMES, SOUND_FRAMES, example_inputs
from logitlab.models.template import DECODER_TOKENS, ENCODER_TOKENS

MODELS = [
    ("causal-lm", "llama"),
    ("masked-lm", "bert"),
    ("seq2seq-lm", "bart"),
    ("sequence-classification", "t5"),
    ("token-classification", "layoutlm"),
    ("image-classification", "resnet"),
    ("image-classification", "siglip2"),
    ("object-detection", "detr"),
    ("zero-shot-image-classification", "clip"),
    ("speech-to-text", "whisper"),
    ("speech-to-text", "speech_to_text"),
    ("speech-to-text", "dia"),
    ("ctc", "wav2vec2"),
    ("audio-classification", "audio-spectrogram-transformer"),
    ("image-text-to-text", "llava"),
    ("image-text-to-text", "blip-2"),
    ("image-text-to-text", "pix2struct"),
    ("image-text-to-text", "kosmos-2"),
]


def special_ids(config: Any) -> set[int]:
    """Every id the config names, found here by hand."""
    names = ("pad", "bos", "eos", "mask", "decoder_start", "sep", "cls", "image", "audio", "video")
    found: set[int] = set()
    for part in (config, getattr(config, "text_config", None), getattr(config, "decoder_config", None)):
        for name in names:
            for end in ("_token_id", "_token_index"):
                value = getattr(part, name + end, None)
                found |= set(value) if isinstance(value, list) else {value} if value is not None else set()
    return found


@pytest.mark.parametrize(("task", "name"), MODELS)
def test_a_model_takes_what_is_made_up_for_it(task: str, name: str) -> None:
    model = zoo.build(task, name)
    with torch.no_grad():
        first = model(**example_inputs(model))
        other = model(**example_inputs(model, seed=7))
    logits = next(first[key] for key in ("logits", "logits_per_image") if key in first)
    changed = next(other[key] for key in ("logits", "logits_per_image") if key in other)
    assert torch.isfinite(logits).all()
    assert logits.std() > 1e-3
    assert (logits - changed).abs().max() > 1e-3  # the output depends on the input


@pytest.mark.parametrize(("task", "name"), MODELS)
def test_the_same_is_made_up_each_time_and_something_else_for_another_seed(task: str, name: str) -> None:
    model = zoo.build(task, name)
    first, again, other = example_inputs(model), example_inputs(model), example_inputs(model, seed=7)
    assert list(first) == list(again) == list(other)
    tensors = [key for key, value in first.items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(first[key], again[key]) for key in tensors)
    assert any(not torch.equal(first[key], other[key]) for key in tensors)


@pytest.mark.parametrize(
    ("task", "name"), [("causal-lm", "gpt2"), ("masked-lm", "bert"), ("image-text-to-text", "llava")]
)
def test_ids_are_ordinary_ones_of_the_vocabulary(task: str, name: str) -> None:
    model = zoo.build(task, name)
    given = example_inputs(model)
    ids = given["input_ids"]
    assert ids.shape == (1, DECODER_TOKENS)
    assert len(set(ids[0].tolist())) == DECODER_TOKENS
    assert ids.min() >= 0
    assert ids.max() < model.get_input_embeddings().num_embeddings
    assert not set(ids[0].tolist()) & special_ids(model.config)
    assert "pixel_values" not in given
    assert given.get("use_cache") is (False if name == "gpt2" else None)


def test_special_ids_are_avoided_even_if_they_are_nearly_all() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(8, 4)

            class Config:
                def __init__(self) -> None:
                    self.vocab_size, self.pad_token_id, self.eos_token_id, self.image_token_index = 8, 0, [1, 2, 3], 4

            self.config = Config()

        def get_input_embeddings(self) -> nn.Embedding:
            return self.embedding

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.embedding(input_ids)

    assert set(example_inputs(Small())["input_ids"][0].tolist()) == {5, 6, 7}


def test_an_encoder_decoder_gets_two_lengths() -> None:
    given = example_inputs(zoo.build("seq2seq-lm", "t5"))
    assert given["input_ids"].shape == (1, ENCODER_TOKENS)
    assert given["decoder_input_ids"].shape == (1, DECODER_TOKENS)


def test_a_classifier_on_an_encoder_decoder_feeds_its_decoder_itself_and_reads_the_last_end() -> None:
    model = zoo.build("sequence-classification", "bart")
    given = example_inputs(model)
    assert "decoder_input_ids" not in given
    assert (given["input_ids"] == model.config.eos_token_id).nonzero().tolist() == [[0, DECODER_TOKENS - 1]]


def test_texts_that_are_compared_with_an_image_end_in_their_end() -> None:
    model = zoo.build("zero-shot-image-classification", "clip")
    given = example_inputs(model)
    side = model.config.vision_config.image_size
    assert given["pixel_values"].shape == (1, 3, side, side)
    assert given["input_ids"].shape == (CAPTIONS, DECODER_TOKENS)
    assert (given["input_ids"][:, -1] == model.config.text_config.eos_token_id).all()
    with torch.no_grad():
        assert model(**given).logits_per_image.shape == (1, CAPTIONS)


def test_sound_has_the_length_that_the_model_asks_for() -> None:
    whisper = zoo.build("speech-to-text", "whisper")
    given = example_inputs(whisper)
    assert given["input_features"].shape == (1, whisper.config.num_mel_bins, 2 * whisper.config.max_source_positions)
    assert given["decoder_input_ids"].shape == (1, DECODER_TOKENS)
    other = zoo.build("speech-to-text", "speech_to_text")  # time and features the other way round
    assert example_inputs(other)["input_features"].shape == (1, FRAMES, other.config.input_feat_per_channel)
    wave = zoo.build("ctc", "wav2vec2")
    with torch.no_grad():
        assert wave(**example_inputs(wave)).logits.shape[:2] == (1, SOUND_FRAMES)


def test_several_streams_of_ids_get_a_column_each() -> None:
    model = zoo.build("speech-to-text", "dia")
    given = example_inputs(model)
    assert given["input_ids"].shape == (1, ENCODER_TOKENS)
    assert given["decoder_input_ids"].shape == (1, DECODER_TOKENS, model.config.decoder_config.num_channels)
    assert given["decoder_input_ids"].max() < model.config.decoder_config.vocab_size


def test_boxes_are_boxes() -> None:
    model = zoo.build("token-classification", "layoutlm")
    left, top, right, bottom = example_inputs(model)["bbox"][0].T
    assert (left <= right).all()
    assert (top <= bottom).all()
    assert left.min() >= 0
    assert max(right.max(), bottom.max()) < model.config.max_2d_position_embeddings


def test_an_image_in_a_text_has_as_many_tokens_as_the_model_makes_of_it() -> None:
    model = zoo.build("image-text-to-text", "llava")
    vision = model.config.vision_config
    given = example_inputs(model, vision=True)
    patches = (vision.image_size // vision.patch_size) ** 2
    assert (given["input_ids"] == model.config.image_token_index).sum() == patches
    assert given["input_ids"].shape == (1, DECODER_TOKENS + patches)
    with torch.no_grad():
        seen = model(**given).logits[0, -1]
        changed = model(**given | {"pixel_values": given["pixel_values"].flip(-1)}).logits[0, -1]
    assert (seen - changed).abs().max() > 1e-4


def test_an_image_that_cannot_be_placed_is_refused() -> None:
    with pytest.raises(ModelError, match="GPT2LMHeadModel does not say where in its text an image goes"):
        example_inputs(zoo.build("causal-lm", "gpt2"), vision=True)


def test_floats_have_the_type_of_the_parameters() -> None:
    model = zoo.build("image-classification", "vit").to(torch.bfloat16)
    assert example_inputs(model)["pixel_values"].dtype == torch.bfloat16


def test_a_model_without_a_known_input_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, past_values: torch.Tensor, past_time: torch.Tensor) -> torch.Tensor:
            return past_values + past_time

    with pytest.raises(
        ModelError, match=r"Odd takes past_values, past_time, none .* wrap\(module, example=\{\.\.\.\}\)"
    ):
        example_inputs(Odd())


def test_a_needed_input_that_cannot_be_made_up_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, input_ids: torch.Tensor, weather: torch.Tensor) -> torch.Tensor:
            return input_ids + weather

    with pytest.raises(ModelError, match="Odd needs weather, which logitlab cannot make up"):
        example_inputs(Odd())
