from __future__ import annotations

from typing import Any

import logitlab as ll
from logitlab.models.vocabulary import Vocabulary
from tests import zoo


class Pieces:
    """A tokenizer as SentencePiece and WordPiece models have them: no byte-level backend."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self.vocab_size = len(pieces)
        self.added_tokens_decoder: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.vocab_size

    def convert_ids_to_tokens(self, i: int) -> str:
        return self.pieces[i]


def test_byte_level_tokens() -> None:
    tokenizer = zoo.tokenizer()
    v = Vocabulary(tokenizer, 300)
    text = "naïve 🧪 x"
    ids = tokenizer(text)["input_ids"]
    assert b"".join(v.bytes(i) for i in ids).decode() == text
    labels = v.labels(ids)
    assert "ï(1/2)" in labels
    assert "ï(2/2)" in labels
    flask = [label for label in labels if "🧪" in label]
    assert [label[-5:] for label in flask] == [f"({i}/{len(flask)})" for i in range(1, len(flask) + 1)]
    assert v.label(tokenizer.convert_tokens_to_ids("<s>")) == "<s>"


def test_byte_fallback_and_wordpiece() -> None:
    v = Vocabulary(Pieces(["\u2581Paris", "<0xE2>", "<0x82>", "<0xAC>", "##ing", "[MASK]"]), 8)
    assert v.label(0) == " Paris"
    assert v.label(1) == "<E2>"
    assert v.labels([0, 1, 2, 3, 4]) == [" Paris", "€(1/3)", "€(2/3)", "€(3/3)", "##ing"]
    assert v.labels([1, 2, 0]) == ["<E2>", "<82>", " Paris"]
    assert v.label(7) == "[7]"  # a padded vocabulary has more columns than the tokenizer has tokens


def test_pending_characters_are_completed() -> None:
    v = Vocabulary(Pieces(["\u2581Paris", "<0xE2>", "<0x82>", "<0xAC>", "a"]), 5)
    assert v.pending([0, 4]) == b""
    assert v.pending([0, 1]) == b"\xe2"
    assert v.pending([0, 1, 2]) == b"\xe2\x82"
    assert v.pending([1, 2, 3]) == b""
    assert v.completed(b"\xe2\x82", 3) == "€"
    assert v.completed(b"\xe2\x82", 4) is None
    assert v.completed(b"\xe2", 3) is None


def test_without_a_tokenizer() -> None:
    v = Vocabulary(None, 10)
    assert v.labels([3, 7]) == ["3", "7"]


def test_every_id_of_the_default_model_has_a_label(default_model: ll.Model) -> None:
    v = default_model.vocabulary
    for i in range(0, v.size, 7):
        label = v.label(i)
        decoded = default_model.tokenizer.decode([i])
        assert label == decoded or "\ufffd" in decoded, (i, label, decoded)
