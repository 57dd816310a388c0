"""Windows: every token once, in order, with what the tokenizer puts around texts."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest

import logitlab as ll
from logitlab.corpora import corpus, windows
from logitlab.errors import InputError
from tests import zoo

TEXTS = ["the sea is calm", "a", "", "over the cold grey water to the far shore and back again"]


@pytest.fixture(scope="module")
def model() -> ll.Model:
    return ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")


def tokens(model: ll.Model, text: str) -> list[int]:
    tokenizer: Any = model.tokenizer
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_packed_windows_hold_all_texts_one_after_the_other(model: ll.Model) -> None:
    end = model.tokenizer.eos_token_id
    stream = [i for text in TEXTS for i in [*tokens(model, text), end]]
    found = windows(model, corpus(TEXTS), 6)
    ids = [i for w in found for i in w.ids[w.own]]
    assert ids == stream[: len(stream) // found._room * found._room]
    assert found.left_over == len(stream) - len(ids)
    assert found.texts == len(TEXTS)
    assert all(len(w.ids) == 6 for w in found)


def test_texts_apart_have_windows_of_their_own(model: ll.Model) -> None:
    found = list(windows(model, corpus(TEXTS), 8, packed=False))
    for number, text in enumerate(TEXTS):
        mine = [w for w in found if w.text == number]
        assert [i for w in mine for i in w.ids[w.own]] == tokens(model, text)
        assert [w.start for w in mine] == [sum(len(w.ids[w.own]) for w in mine[:n]) for n in range(len(mine))]
        assert all(len(w.ids) <= 8 for w in mine)


def test_a_long_text_is_tokenised_in_pieces(model: ll.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n\n".join(["the sea is calm", "the cold grey water", "on and on to the far shore"] * 9)
    whole = [i for w in windows(model, corpus([text]), 8, packed=False) for i in w.ids[w.own]]
    monkeypatch.setattr(sys.modules["logitlab.corpora.windows"], "PIECE", 50)
    found = list(windows(model, corpus([text]), 8, packed=False))
    ids = [i for w in found for i in w.ids[w.own]]
    assert model.tokenizer.decode(ids) == model.tokenizer.decode(whole)
    assert [w.start for w in found] == list(range(0, len(ids), 8))
    packed = list(windows(model, corpus([text, "a"]), 8))
    assert [i for w in packed for i in w.ids[w.own]][: len(ids)] == ids
    for w in packed:
        assert sum(count for _, _, count in w.spans) == 8


def test_special_tokens_are_put_around_every_window(model: ll.Model) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(zoo.tokenizer())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    other = ll.wrap(zoo.build("bert"), tokenizer, name="bert")
    for packed in (True, False):
        for w in windows(other, corpus(TEXTS), 7, packed=packed):
            assert (w.ids[0], w.ids[-1]) == (1, 2)
            assert w.own == slice(1, len(w.ids) - 1)


def test_what_cannot_be_cut_is_refused(model: ll.Model) -> None:
    with pytest.raises(InputError, match="has room for 1 of a text"):
        windows(model, corpus(TEXTS), 1)
    with pytest.raises(InputError, match="has no tokenizer"):
        windows(ll.wrap(zoo.build("gpt2")), corpus(TEXTS), 8)
