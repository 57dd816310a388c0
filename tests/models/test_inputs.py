"""Inputs of every form become the same ids; what has no ids is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.models.inputs import Encoded, encode
from tests import zoo


def encoded(inputs: Any, tokenizer: Any = None, **options: Any) -> list[Encoded]:
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "encoder_decoder": False,
        "start": [0],
        "decoder": None,
        "limit": None,
    }
    return encode(inputs, tokenizer, **(settings | options))


def told(inputs: Any, tokenizer: Any = None, **options: Any) -> str:
    with pytest.raises(ll.InputError) as caught:
        encoded(inputs, tokenizer, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "inputs",
    [
        [5, 6, 7],
        (5, 6, 7),
        [[5, 6, 7]],
        torch.tensor([5, 6, 7]),
        torch.tensor([[5, 6, 7]]),
        np.array([5, 6, 7]),
        {"input_ids": [5, 6, 7]},
        {"input_ids": torch.tensor([[5, 6, 7]])},
        {"input_ids": [[0, 0, 5, 6, 7]], "attention_mask": [[0, 0, 1, 1, 1]]},
        {"input_ids": torch.tensor([[5, 6, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])},
        {"input_ids": [5, 6, 7, 9], "attention_mask": [1, 1, 1, 0]},
    ],
)
def test_ids_in_every_form(inputs: Any) -> None:
    assert encoded(inputs) == [Encoded(None, (5, 6, 7))]


def test_padding_is_left_out_row_by_row() -> None:
    inputs = {"input_ids": [[5, 6, 0], [0, 7, 8]], "attention_mask": [[1, 1, 0], [0, 1, 1]]}
    assert [p.ids for p in encoded(inputs)] == [(5, 6), (7, 8)]
    assert [p.ids for p in encoded({"input_ids": [[5, 6, 0]]})] == [(5, 6, 0)]  # without a mask all are real


def test_texts() -> None:
    tokenizer = zoo.tokenizer()
    ids = tuple(tokenizer("The capital")["input_ids"])
    assert encoded("The capital", tokenizer) == [Encoded("The capital", ids)]
    assert encoded(["The capital", "x"], tokenizer)[1] == Encoded("x", tuple(tokenizer("x")["input_ids"]))


def test_chats() -> None:
    tokenizer = zoo.tokenizer().__class__(tokenizer_object=zoo.tokenizer().backend_tokenizer)
    chat = [{"role": "user", "content": "The capital"}]
    assert told(chat, tokenizer) == "this model's tokenizer has no chat template: pass the text as one string"
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}!"
    text = "<s>user: The capital!"
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert encoded(chat, tokenizer) == [Encoded(text, ids)]
    assert encoded([chat, chat], tokenizer) == [Encoded(text, ids)] * 2
    assert told([[], chat], tokenizer) == "the chat is empty: give at least one message"
    assert told([{"role": "user"}], tokenizer) == "a chat message needs 'role' and 'content'; got role"
    assert told([{}], tokenizer) == "a chat message needs 'role' and 'content'; got nothing"


def test_an_encoder_decoder_starts_its_decoder() -> None:
    def both(inputs: Any, **options: Any) -> list[tuple[Any, Any]]:
        prompts = encoded(inputs, zoo.tokenizer(), encoder_decoder=True, start=[2], **options)
        return [(p.encoder_ids, p.ids) for p in prompts]

    written = tuple(zoo.tokenizer()("sea", add_special_tokens=False)["input_ids"])
    assert both([[5, 6], [7]]) == [((5, 6), (2,)), ((7,), (2,))]
    assert both([5, 6], decoder=[8, 9]) == [((5, 6), (2, 8, 9))]
    assert both([5, 6], decoder="sea") == [((5, 6), (2, *written))]
    assert both({"input_ids": [[5], [6]], "decoder_input_ids": [[3, 4], [1, 2]]}) == [((5,), (3, 4)), ((6,), (1, 2))]
    assert both({"input_ids": [5], "decoder_input_ids": torch.tensor([3, 4])}) == [((5,), (3, 4))]
    assert told({"input_ids": [[5], [6]], "decoder_input_ids": [[3]]}, encoder_decoder=True) == (
        "decoder_input_ids has 1 rows for 2 rows of input_ids; give one for each"
    )
    assert told([5], encoder_decoder=True, start=[]) == (
        "the decoder's part of the prompt is empty: give at least one token"
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "there is nothing to read: the list of prompts is empty"),
        ([[]], "the prompt is empty: give at least one token"),
        ([[5], []], "prompt 1 is empty: give at least one token"),
        ([5, 300], "the prompt has token id 300, which is not in the vocabulary (0 to 299)"),
        ([[5], [-1]], "prompt 1 has token id -1, which is not in the vocabulary (0 to 299)"),
        ({"ids": [5]}, "the encoded input has no input_ids (it has ids)"),
        (
            {"input_ids": [[5, 6, 7]], "attention_mask": [[1, 0, 1]]},
            "attention_mask has a hole in the middle; only padding at the ends is understood",
        ),
        (
            {"input_ids": [[5, 6]], "attention_mask": [[1]]},
            "attention_mask has 1 entries for 2 input_ids; give one for each",
        ),
        (
            {"input_ids": [[5, 6], [7, 8]], "attention_mask": [[1, 1]]},
            "attention_mask has 1 rows for 2 rows of input_ids; give one for each",
        ),
        ("text", "this model has no tokenizer: pass token ids, or wrap(module, tokenizer)"),
        *(
            (
                value,
                "token ids must be whole numbers in one or two dimensions: [tokens] or [batch, tokens]",
            )
            for value in (torch.tensor(5), torch.ones(2), torch.ones(1, 1, 2, dtype=torch.long))
        ),
        *(
            (
                value,
                f"inputs of type {type(value).__name__} are not understood: give a text, a list of texts, "
                "chat messages, token ids, or encoded tensors",
            )
            for value in (None, 3.5, [1, "a"], [[1], "a"], [None])
        ),
    ],
)
def test_what_is_refused(inputs: Any, message: str) -> None:
    assert told(inputs) == message


def test_the_limit_counts_tokens() -> None:
    assert len(encoded([5] * 64, limit=64)[0].ids) == 64
    assert told([5] * 65, limit=64) == (
        "the prompt has 65 tokens, but the model's context holds 64: shorten it or read it in parts"
    )
