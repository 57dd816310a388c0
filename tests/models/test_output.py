"""What counts as an answer, and how its space is called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.utils import ModelOutput

from logitlab.models.output import Output, configs_of, output_of, space_of

Z = torch.arange(24.0).reshape(2, 3, 4)


class Answer(dict[str, Any]):
    """A mapping whose items are attributes, as those of transformers."""

    __getattr__ = dict.get


def test_a_bare_tensor_is_the_answer() -> None:
    found = output_of(Z)
    assert found is not None
    assert found.logits is Z
    assert (found.boxes, found.name) == (None, "logits")
    assert torch.equal(found.rows, torch.arange(24.0).reshape(6, 4))
    assert torch.equal(found.flat, found.rows)


@pytest.mark.parametrize("name", ["logits", "prediction_logits", "logits_per_image", "logits_per_video"])
@pytest.mark.parametrize("kind", [dict, Answer, SimpleNamespace, ModelOutput])
def test_fields(name: str, kind: Any) -> None:
    found = output_of(kind(**{name: Z}))
    assert found is not None
    assert found.logits is Z
    assert found.name == name


def test_the_first_of_several_fields_counts() -> None:
    value = Answer(logits_per_image=Z + 2, prediction_logits=Z + 1, logits=Z, seq_relationship_logits=Z - 1)
    assert output_of(value).logits is value["logits"]  # type: ignore[union-attr]
    assert output_of(Answer(logits=None, prediction_logits=Z)).name == "prediction_logits"  # type: ignore[union-attr]
    assert output_of(CausalLMOutput(loss=torch.tensor(1.0), logits=Z)).logits is Z  # type: ignore[union-attr]


def test_texts_against_pictures() -> None:
    value = Answer(logits_per_image=Z[0], logits_per_text=Z[0].T)
    pictures, texts = output_of(value), output_of(value, texts=True)
    assert pictures is not None
    assert texts is not None
    assert torch.equal(pictures.rows.T, texts.rows)
    assert (pictures.name, texts.name) == ("logits_per_image", "logits_per_text")
    assert output_of(Answer(logits=Z), texts=True) is None
    assert output_of(Answer(last_hidden_state=Z[0]), texts=True) is None


def test_boxes_are_part_of_what_has_to_be_reproduced() -> None:
    boxes = torch.rand(2, 3, 4)
    found = output_of(Answer(logits=Z, pred_boxes=boxes))
    assert found is not None
    assert found.boxes is boxes
    assert torch.equal(found.flat, torch.cat([Z.reshape(6, 4), boxes.reshape(6, 4)], dim=1))
    plain = output_of(Answer(logits=Z, pred_boxes="none"))
    assert plain is not None
    assert plain.boxes is None


def test_rows_are_float32_and_detached() -> None:
    z = torch.randn(1, 2, 3, dtype=torch.bfloat16, requires_grad=True)
    found = Output(z)
    assert found.rows.dtype == torch.float32
    assert not found.rows.requires_grad
    assert torch.equal(found.rows, z.detach()[0].float())


def test_an_answer_called_last_hidden_state() -> None:
    """Image-to-map and text detectors: one vector for an input, or a map of probabilities."""
    one = output_of(BaseModelOutput(last_hidden_state=Z[0]))  # type: ignore[arg-type]
    assert one is not None
    assert one.logits is not None
    assert torch.equal(one.logits, Z[0])
    assert one.name == "last_hidden_state"
    p = torch.tensor([[[[0.5, 0.75], [0.1, 0.9]]], [[[0.0, 1.0], [0.2, 0.3]]]])  # [2, 1, 2, 2]
    found = output_of(Answer(last_hidden_state=p))
    assert found is not None
    assert found.logits.shape == (2, 4, 1)
    inside = (p > 0) & (p < 1)
    assert torch.allclose(found.logits.sigmoid().reshape(p.shape)[inside], p[inside], rtol=1e-6)
    assert float(found.logits[0, 1, 0]) == pytest.approx(torch.log(torch.tensor(3.0)).item(), rel=1e-6)
    assert bool(torch.isfinite(found.logits).all())  # also where the map says 0 or 1
    assert float(found.logits[1, 0, 0]) < -15
    assert float(found.logits[1, 1, 0]) > 15


@pytest.mark.parametrize(
    "value",
    [
        None,
        "text",
        3,
        (Z,),
        [Z],
        {},
        {"logits": "no"},
        {"logits": torch.zeros(1, 2, dtype=torch.long)},  # ids are no logits
        {"logits": (Z,)},
        {"loss": torch.tensor(1.0)},
        {"pred_boxes": Z},
        {"pooler_output": Z[0]},
        {"last_hidden_state": Z},  # a hidden state [batch, tokens, width]
        {"last_hidden_state": torch.rand(1, 3, 4, 4)},  # three channels
        {"last_hidden_state": torch.rand(1, 1, 4, 4) + 0.5},  # beyond 1
        {"last_hidden_state": -torch.rand(1, 1, 4, 4)},
        {"last_hidden_state": torch.full((1, 1, 2, 2), torch.nan)},
        {"last_hidden_state": torch.zeros(2, 3, dtype=torch.long)},
        SimpleNamespace(last_hidden_state=Z[0]),
    ],
)
def test_what_is_no_answer(value: Any) -> None:
    assert output_of(value) is None
    assert output_of(value, texts=True) is None


class Tiny(nn.Module):
    """A module with embeddings, parameters and a configuration; never called."""

    def __init__(
        self, *, tokens: int = 0, places: int = 0, columns: int = 0, bias: bool = False, **config: Any
    ) -> None:
        super().__init__()
        if tokens:
            self.embed_tokens = nn.Embedding(tokens, 4)
        if places:
            self.position_embeddings = nn.Embedding(places, 4)
        if columns:
            self.head = nn.Linear(4, columns)
        if bias:
            self.logit_bias = nn.Parameter(torch.zeros(1))
        if config:
            self.config = SimpleNamespace(**config)


def space(
    shape: tuple[int, ...], module: nn.Module, positions: int = 7, *, name: str = "logits", boxes: bool = False
) -> tuple[str, int, str, str]:
    output = Output(
        torch.zeros(shape), torch.zeros(*shape[:-1], 4) if boxes else None, name, name == "last_hidden_state"
    )
    found = space_of(output, module, 1, positions)
    return found.name, found.size, found.per, found.activation


def test_a_vocabulary_is_as_large_as_what_is_embedded() -> None:
    assert space((1, 7, 50), Tiny(tokens=50)) == ("vocabulary", 50, "position", "softmax")
    assert space((1, 7, 50), Tiny(vocab_size=50, num_labels=2)) == ("vocabulary", 50, "position", "softmax")
    nested = SimpleNamespace(vocab_size=50, to_dict=dict, model_type="text")
    assert space((1, 7, 50), Tiny(text_config=nested, num_labels=2))[0] == "vocabulary"
    assert space((1, 50), Tiny(tokens=50)) == ("vocabulary", 50, "input", "softmax")  # one word for an input
    assert space((1, 9, 50), Tiny(tokens=50)) == ("vocabulary", 50, "output", "softmax")  # other positions
    assert space((1, 7, 51), Tiny(tokens=50)) == ("vocabulary", 51, "position", "softmax")  # padded head


def test_classes() -> None:
    assert space((1, 5), Tiny(tokens=50, num_labels=5)) == ("classes", 5, "input", "softmax")
    assert space((1, 7, 5), Tiny(tokens=50, num_labels=5)) == ("classes", 5, "position", "softmax")
    assert space((1, 5), Tiny(columns=5)) == ("classes", 5, "input", "softmax")  # no configuration at all
    # a label count counts even where it is that of the tokens, or of the places
    assert space((1, 50), Tiny(tokens=50, num_labels=50))[0] == "classes"
    assert space((1, 64), Tiny(tokens=50, places=64, num_labels=3))[0] == "classes"


def test_questions_of_their_own() -> None:
    several = {"num_labels": 5, "problem_type": "multi_label_classification"}
    assert space((1, 5), Tiny(**several)) == ("classes", 5, "input", "sigmoid")
    assert space((1, 5), Tiny(num_labels=5, problem_type="single_label_classification"))[3] == "softmax"
    assert space((1, 7, 50), Tiny(tokens=50, **several))[3] == "softmax"  # a vocabulary always excludes


@pytest.mark.parametrize("name", ["logits_per_image", "logits_per_text", "logits_per_video"])
def test_concepts(name: str) -> None:
    assert space((1, 3), Tiny(tokens=3), name=name) == ("concepts", 3, "input", "softmax")
    assert space((1, 3), Tiny(bias=True), name=name) == ("concepts", 3, "input", "sigmoid")
    assert space((1, 3), nn.ModuleDict({"inner": Tiny(bias=True)}), name=name)[3] == "sigmoid"


def test_boxes() -> None:
    assert space((1, 7, 6), Tiny(num_labels=5), boxes=True) == ("boxes", 6, "position", "softmax")
    assert space((1, 7, 5), Tiny(num_labels=5), boxes=True) == ("boxes", 5, "position", "sigmoid")
    assert space((1, 9, 6), Tiny(num_labels=5), boxes=True)[2] == "output"


def test_map() -> None:
    module = Tiny(num_labels=1)
    assert space((1, 64, 1), module, 16, name="last_hidden_state") == ("map", 1, "output", "sigmoid")


def test_one_position_and_one_answer() -> None:
    """[batch, columns] is one answer for the input, also where the stack has one position only."""
    assert space((1, 5), Tiny(num_labels=5), positions=1)[2] == "input"
    assert space((1, 1, 5), Tiny(num_labels=5), positions=1)[2] == "position"
    assert space_of(Output(torch.zeros(3, 5)), Tiny(num_labels=5), 3, 7).per == "input"
    assert space_of(Output(torch.zeros(3, 7, 5)), Tiny(num_labels=5), 3, 7).per == "position"


def test_configurations_are_found_inside_one_another_once() -> None:
    inner = SimpleNamespace(to_dict=dict, model_type="inner")
    outer = SimpleNamespace(to_dict=dict, model_type="outer", text=inner, again=inner, number=3)
    inner.parent = outer
    assert configs_of(outer) == [outer, inner]
    assert configs_of(None) == []
