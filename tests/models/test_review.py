"""Ways to a wrong number that were found by trying to get one: each is exact now, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import logitlab as ll
from logitlab import zoo


class Step(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Tailed(nn.Module):
    """A small language model whose last step is chosen by the test."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embedding = nn.Embedding(60, 16)
        self.layers = nn.ModuleList([Step() for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 60)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        if self.kind == "centred":
            x = x - x.mean(1, keepdim=True)
        if self.kind == "instance norm":
            x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-3)
        x = self.norm(x)
        if self.kind == "long" and input_ids.shape[1] > 8:
            x = x * 1.5
        return {"logits": self.head(x)}


@pytest.mark.parametrize("kind", ["plain", "centred", "instance norm"])
def test_a_tail_that_mixes_positions_evenly(kind: str) -> None:
    module = Tailed(kind)
    model = ll.wrap(module)
    assert (model.tail.by == "tokens") is (kind == "plain")
    ids = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
    with torch.no_grad():
        truth = torch.log_softmax(module(torch.tensor([ids]))["logits"][0].double(), -1)[:, 17]
    every = ll.read(model, [ids], target=[17]).logprob.values[0, -1, :, 0]
    np.testing.assert_allclose(every, truth, atol=1e-5)
    some = ll.read(model, [ids], target=[17], positions=[0, 5]).logprob.values[0, -1, :, 0]
    np.testing.assert_allclose(some, truth[[0, 5]], atol=1e-5)  # whatever else is asked for


def test_a_step_that_only_long_inputs_take_is_noticed() -> None:
    model = ll.wrap(Tailed("long"))
    assert ll.read(model, [[3, 4, 5]]).prompts
    with pytest.raises(ll.VerificationError, match="does something else than on the few tokens"):
        ll.read(model, [list(range(10, 21))])


def test_a_map_of_classes_has_one_distribution_a_pixel() -> None:
    config = transformers.SegformerConfig(
        num_labels=6, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2]
    )
    module: Any = transformers.SegformerForSemanticSegmentation(config).eval()
    model = ll.wrap(module)
    assert (model.space.name, model.space.size, model.space.per) == ("classes", 6, "output")
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    reading = ll.read(model, {"pixel_values": pixels}, target=[2])
    with torch.no_grad():
        truth = torch.log_softmax(module(pixels).logits[0].double(), 0)[2]
    np.testing.assert_allclose(reading.logprob.values[0, -1, :, 0], truth.flatten(), atol=1e-5)


def test_pixels_that_are_painted_in_have_no_names() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTMAEConfig(
        **sizes, image_size=32, patch_size=8, **{f"decoder_{k}": v for k, v in sizes.items()}
    )
    with pytest.raises(ll.ModelError):
        ll.wrap(transformers.ViTMAEForPreTraining(config))


def test_several_labels_are_questions_of_their_own_for_each_token() -> None:
    module: Any = zoo.build("token-classification", "bert")
    module.config.problem_type = "multi_label_classification"
    model = ll.wrap(module)
    reading = ll.read(model, [[15, 26, 37]], target=[1])
    with torch.no_grad():
        z = module(torch.tensor([[15, 26, 37]])).logits[0].double()
    expected = torch.nn.functional.logsigmoid(z[:, 1])
    np.testing.assert_allclose(reading.logprob.values[0, -1, :, 0], expected, atol=1e-5)
    hidden = torch.randn(2, model.width)
    decoded = ll.decode(model, hidden, targets=[1]).target_logprob
    assert decoded is not None
    by_hand = torch.nn.functional.logsigmoid(model.tail.logits(hidden).double())[:, 1]
    np.testing.assert_allclose(decoded[0, :, 0], by_hand, atol=1e-6)


def test_a_head_with_one_column_says_yes_or_no() -> None:
    module: Any = zoo.build("sequence-classification", "bert")
    config = module.config
    config.num_labels = 1
    model = ll.wrap(type(module)(config).eval())
    reading = ll.read(model, [[15, 26, 37]])
    assert reading.activation == "sigmoid"
    assert float(reading.top_logprob.values[0, -1, -1, 0]) < -0.01


def test_heads_that_weigh_all_layers_are_read_at_the_layers() -> None:
    module: Any = zoo.build("audio-classification", "wav2vec2")
    module.config.use_weighted_layer_sum = True
    model = ll.wrap(type(module)(module.config).eval())
    assert model.stack.name == "wav2vec2.encoder.layers"
    assert not model.tail.alone


def test_what_a_tokenizer_gives_beside_the_ids() -> None:
    module: Any = zoo.build("masked-lm", "bert")
    model = ll.wrap(module)
    ids = torch.tensor([[15, 26, 37, 0, 0], [0, 0, 41, 52, 63]])
    mask = (ids > 0).long()
    kinds = torch.zeros_like(ids)
    together = ll.read(model, {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}, target=[9])
    singly = ll.read(model, [[15, 26, 37], [41, 52, 63]], target=[9])
    np.testing.assert_allclose(together.logprob.values, singly.logprob.values, atol=1e-6)


def test_hashed_ids_have_no_bound() -> None:
    model = ll.wrap(zoo.build("token-classification", "canine"))
    assert ll.read(model, [[20, 1000, 300, 77, 12, 50]]).prompts[0].ids[1] == 1000


def test_a_vision_tower_can_be_named() -> None:
    model = ll.wrap(zoo.build("image-text-to-text", "paligemma"), stack="vision")
    assert "vision" in model.stack.name
    assert model.space.per == "output"


def test_an_encoder_of_the_decoders_length() -> None:
    """Equal lengths in the example must not pass for one answer at each of the encoder's positions."""
    example = {"input_ids": torch.tensor([[11, 12, 13, 14]]), "decoder_input_ids": torch.tensor([[0, 21, 22, 23]])}
    model = ll.wrap(zoo.build("seq2seq-lm", "t5"), stack="encoder", example=example)
    reading = ll.read(model, {"input_ids": torch.tensor([[15] * 6]), "decoder_input_ids": torch.tensor([[0, 9]])})
    assert len(reading.prompts[0].positions) == 2


def test_an_open_vocabulary_detector_has_no_column_for_nothing() -> None:
    both = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, vision = both | {"vocab_size": 99}, both | {"image_size": 32, "patch_size": 16}
    config = transformers.OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = ll.wrap(transformers.OwlViTForObjectDetection(config).eval())
    assert model.space.activation == "sigmoid"
    assert "no object" not in [model.columns.label(i) for i in range(model.space.size)]
