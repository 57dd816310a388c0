"""Readings of whole states against the same numbers computed by hand from the models' own parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab import zoo


def states_of(module: Any, path: str, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The input of the first block and the output of every block, by plain hooks."""
    found: list[torch.Tensor] = []
    blocks = module.get_submodule(path)

    def entering(m: Any, args: Any, kwargs: Any) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).clone())

    hooks = [blocks[0].register_forward_pre_hook(entering, with_kwargs=True)]
    hooks += [
        b.register_forward_hook(lambda m, a, out: found.append((out if torch.is_tensor(out) else out[0]).clone()))
        for b in blocks
    ]
    with torch.no_grad():
        module(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def logprobs(z: torch.Tensor) -> np.ndarray[Any, Any]:
    return torch.log_softmax(z.detach().double(), -1).numpy()


def pixels(model: ll.Model, seed: int = 3) -> torch.Tensor:
    shape = model.template.inputs["pixel_values"].shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_vit_by_patch_and_pooled() -> None:
    module: Any = zoo.build("image-classification", "vit")
    model = ll.wrap(module)
    image = pixels(model)
    reading = ll.read(model, {"pixel_values": image}, target=[4], top_k=7)
    states = states_of(module, model.stack.name, {"pixel_values": image})
    with torch.no_grad():
        truth = module(pixel_values=image).logits[0]
        for s, state in enumerate(states):
            z = logprobs(module.classifier(module.vit.layernorm(state[0])))
            np.testing.assert_allclose(reading.logprob.values[0, s, :-1, 0], z[:, 4], atol=1e-5)
            np.testing.assert_allclose(reading.logprob.values[0, s, -1, 0], z[0, 4], atol=1e-5)  # pooled = class token
    np.testing.assert_allclose(reading.logprob.values[0, -1, -1, 0], logprobs(truth)[4], atol=1e-5)
    assert reading.kl.values[0, -1, -1] == pytest.approx(0, abs=1e-6)
    assert reading.prompts[0].tokens[:2] == ("position 0", "patch 0,0")
    (picture,) = reading.prompts[0].pictures
    side = int((len(states[0][0]) - 1) ** 0.5)
    assert picture.grid == (side, side)
    assert picture.patches[side + 1] == (side + 2, 1, 1)
    assert reading.space == "classes"


def test_a_resnet_by_place() -> None:
    module: Any = zoo.build("image-classification", "resnet")
    model = ll.wrap(module)
    image = pixels(model)
    reading = ll.read(model, {"pixel_values": image}, target=[2])
    state = states_of(module, model.stack.name, {"pixel_values": image})[-1]
    z = logprobs(module.classifier(state[0].flatten(1).T[:, :, None, None]))
    np.testing.assert_allclose(reading.logprob.values[0, -1, :-1, 0], z[:, 2], atol=1e-5)
    pooled = logprobs(module.classifier(state.mean((2, 3), keepdim=True)))[0]
    np.testing.assert_allclose(reading.logprob.values[0, -1, -1, 0], pooled[2], atol=1e-5)
    assert reading.prompts[0].pictures[0].grid == tuple(state.shape[2:])


def test_detr_classes_and_boxes_by_layer_and_query() -> None:
    module: Any = zoo.build("object-detection", "detr")
    model = ll.wrap(module)
    inputs = {"pixel_values": pixels(model)}
    reading = ll.read(model, inputs, target=[1])
    states = states_of(module, model.stack.name, inputs)
    with torch.no_grad():
        truth = module(**inputs)
        for s, state in enumerate(states):
            hidden = module.model.decoder.layernorm(state)
            z = logprobs(module.class_labels_classifier(hidden)[0])
            np.testing.assert_allclose(reading.logprob.values[0, s, :, 0], z[:, 1], atol=1e-5)
            box = module.bbox_predictor(hidden).sigmoid()[0]
            np.testing.assert_allclose(reading.box.values[0, s], box, atol=1e-5)
    np.testing.assert_allclose(reading.box.values[0, -1], truth.pred_boxes[0], atol=1e-6)
    assert reading.top_token.values[0, -1, 0, 0] in {*module.config.id2label.values(), "no object"}
    assert reading.prompts[0].tokens[5] == "query 5"


def test_rt_detr_is_sigmoid_and_its_boxes_follow_the_reference_points() -> None:
    module: Any = zoo.build("object-detection", "rt_detr")
    model = ll.wrap(module)
    inputs = {"pixel_values": pixels(model)}
    reading = ll.read(model, inputs, target=[3])
    with torch.no_grad():
        truth = module(**inputs)
    assert reading.activation == "sigmoid"
    np.testing.assert_allclose(reading.prob.values[0, -1, :, 0], truth.logits[0, :, 3].sigmoid(), atol=1e-6)
    np.testing.assert_allclose(reading.box.values[0, -1], truth.pred_boxes[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers_of_an_image_text_model(kind: str) -> None:
    module: Any = zoo.build("zero-shot-image-classification", kind)
    model = ll.wrap(module)
    example = {k: v for k, v in model.template.inputs.items() if isinstance(v, torch.Tensor)}
    inputs = example | {"pixel_values": pixels(model)}
    reading = ll.read(model, inputs, target=[1])
    states = states_of(module, model.stack.name, inputs)
    with torch.no_grad():
        truth = module(**inputs)
        text = truth.text_embeds
        tower = module.vision_model
        for s, state in enumerate(states):
            if kind == "clip":
                image = module.visual_projection(tower.post_layernorm(state[:, 0]))
            else:
                image = tower.head(tower.post_layernorm(state))
            image = image / image.norm(dim=-1, keepdim=True)
            z = image @ text.T * module.logit_scale.exp()
            if kind == "siglip":
                z = z + module.logit_bias
                expected = torch.nn.functional.logsigmoid(z.double())[0, 1]
            else:
                expected = torch.log_softmax(z.double(), -1)[0, 1]
            assert reading.logprob.values[0, s, -1, 0] == pytest.approx(float(expected), abs=1e-5)
    assert reading.activation == ("sigmoid" if kind == "siglip" else "softmax")


def test_an_encoder_is_read_through_its_live_decoder() -> None:
    """The encoder of T5: each layer's state goes through the final norm and the decoder that follows."""
    from transformers.modeling_outputs import BaseModelOutput

    module: Any = zoo.build("seq2seq-lm", "t5")
    model = ll.wrap(module, stack="encoder")
    ids, written = torch.tensor([[11, 40, 17, 25]]), torch.tensor([[0, 33, 52]])
    reading = ll.read(model, {"input_ids": ids, "decoder_input_ids": written}, target=[9])
    states = states_of(module, model.stack.name, {"input_ids": ids, "decoder_input_ids": written})
    with torch.no_grad():
        for s, state in enumerate(states):
            encoded = BaseModelOutput(last_hidden_state=module.encoder.final_layer_norm(state))
            z = module(encoder_outputs=encoded, decoder_input_ids=written).logits[0]
            np.testing.assert_allclose(reading.logprob.values[0, s, :, 0], logprobs(z)[:, 9], atol=1e-5)
    assert len(reading.prompts[0].positions) == 3


def test_an_earlier_stage_is_read_through_the_later_ones() -> None:
    module: Any = zoo.build("image-classification", "swinv2")
    names = [s.name for s in ll.wrap(module).stacks]
    model = ll.wrap(module, stack=names[-1])
    inputs = {"pixel_values": pixels(model)}
    reading = ll.read(model, inputs, positions=-1, target=[0])
    with torch.no_grad():
        truth = logprobs(module(**inputs).logits[0])
    np.testing.assert_allclose(reading.logprob.values[0, -1, 0, 0], truth[0], atol=1e-5)


def test_frames_of_sound() -> None:
    module: Any = zoo.build("ctc", "wav2vec2")
    model = ll.wrap(module)
    sound = torch.randn(model.template.inputs["input_values"].shape, generator=torch.Generator().manual_seed(1))
    reading = ll.read(model, {"input_values": sound}, target=[7])
    with torch.no_grad():
        truth = logprobs(module(input_values=sound).logits[0])
    np.testing.assert_allclose(reading.logprob.values[0, -1, :, 0], truth[:, 7], atol=1e-5)


def test_speech_is_read_at_the_decoders_tokens() -> None:
    module: Any = zoo.build("speech-to-text", "whisper")
    model = ll.wrap(module)
    features = torch.randn(model.template.inputs["input_features"].shape, generator=torch.Generator().manual_seed(1))
    written = torch.tensor([[*model.decoder_start, 20, 30, 40]])
    reading = ll.read(model, {"input_features": features, "decoder_input_ids": written}, target=[50])
    with torch.no_grad():
        truth = logprobs(module(input_features=features, decoder_input_ids=written).logits[0])
    np.testing.assert_allclose(reading.logprob.values[0, -1, :, 0], truth[:, 50], atol=1e-5)
    assert len(reading.prompts[0].tokens) == written.shape[1]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_a_text_classifier(kind: str) -> None:
    module: Any = zoo.build("sequence-classification", kind)
    model = ll.wrap(module)
    ids = [int(i) for i in model.template.inputs["input_ids"][0]]
    reading = ll.read(model, [ids], target=[5])
    with torch.no_grad():
        truth = logprobs(module(input_ids=torch.tensor([ids])).logits[0])
    np.testing.assert_allclose(reading.logprob.values[0, -1, -1, 0], truth[5], atol=1e-5)
    assert reading.prompts[0].tokens[-1] == "pooled"
    assert reading.at(position=-1).logprob.values[0, -1, 0, 0] == reading.logprob.values[0, -1, -1, 0]


def test_several_residual_streams() -> None:
    """Hyper-connections keep several states a token; rows hold all of them."""
    kinds = [t for t in zoo.types("causal-lm") if t in ("deepseek_v4", "gemma3n_text")]
    assert kinds
    for kind in kinds:
        module: Any = zoo.build("causal-lm", kind)
        model = ll.wrap(module)
        assert len(model.stack.shape) == 4, kind
        ids = [12, 55, 31, 8]
        reading = ll.read(model, [ids], target=[5])
        with torch.no_grad():
            truth = logprobs(module(input_ids=torch.tensor([ids])).logits[0])
        np.testing.assert_allclose(reading.logprob.values[0, -1, :, 0], truth[:, 5], atol=1e-5)


def test_the_last_answer_is_checked_for_every_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that goes another way for one input than for the example is refused, not misread."""
    module: Any = zoo.build("image-classification", "vit")
    model = ll.wrap(module)
    image = pixels(model)
    original = module.classifier.forward
    calls = [0]

    def drifting(x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return original(x) + 0.1 * calls[0]

    monkeypatch.setattr(module.classifier, "forward", drifting)
    with pytest.raises(ll.VerificationError, match="differs from the model's own answer for this input"):
        ll.read(model, {"pixel_values": image})


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "paligemma", "gemma3", "idefics3", "mistral3", "florence2"])
def test_a_prompt_with_a_picture(kind: str) -> None:
    """Image tokens take part in the pass; every position is decoded as the model itself does it."""
    from logitlab.models.example import example_inputs

    module: Any = zoo.build("image-text-to-text", kind)
    model = ll.wrap(module)
    inputs = {k: v for k, v in example_inputs(module, vision=True).items() if isinstance(v, torch.Tensor)}
    reading = ll.read(model, inputs, target=[7])
    with torch.no_grad():
        truth = logprobs(module(**inputs, **model.template.options).logits[0])
    np.testing.assert_allclose(reading.logprob.values[0, -1, :, 0], truth[:, 7], atol=1e-5)
    if kind in ("llava", "paligemma"):
        (picture,) = reading.prompts[0].pictures
        assert picture.grid == (4, 4)
        first, row, column = picture.patches[5]
        assert (row, column) == (1, 1)
        assert reading.prompts[0].tokens[first] == "patch 1,1"
        assert reading.rank.coords["column"].values[0, first] == 1
