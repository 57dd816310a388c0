"""From texts to token ids of bounded length: packed one after the other, or one text a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from logitlab.corpora.texts import Corpus, Text
from logitlab.errors import InputError
from logitlab.models.handle import Model

Span = tuple[int, int, int]

PIECE = 2**17
"""Characters of a text that are tokenised at once: longer ones are parted behind an empty line, or a line."""


@dataclass(frozen=True)
class Window:
    """Tokens that go through a model together.

    Attributes:
        ids: token ids.
        place: where they begin, for messages.
        text: number of the text that they begin in.
        start: number of their first token in that text.
        source: that text.
        own: which of the ids are of the corpus; the others are put around every window by the tokenizer.
        spans: what these ids are: number of a text, number of the first token in it, how many.
    """

    ids: tuple[int, ...]
    place: str
    text: int
    start: int
    source: Text
    own: slice
    spans: tuple[Span, ...]


Around = tuple[tuple[int, ...], tuple[int, ...]]
"""What a tokenizer puts before and after every text."""


class Windows:
    """Windows of a corpus, in order; see `windows`.

    Attributes:
        texts: texts that have been gone through so far.
        left_over: tokens that came into no window, known at the end: what does not fill the last one.
    """

    def __init__(self, model: Model, corpus: Corpus, room: int, around: Around, packed: bool) -> None:
        self._tokenizer: Any = model.tokenizer
        self._corpus, self._room, self._around, self._is_packed = corpus, room, around, packed
        self.texts = self.left_over = 0

    def __iter__(self) -> Iterator[Window]:
        self.texts = self.left_over = 0
        return self._packed() if self._is_packed else self._apart()

    def _tokens(self, text: Text) -> Iterator[list[int]]:
        """Token ids of a text, piece by piece."""
        for piece in _pieces(text.text):
            yield list(self._tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])

    def _packed(self) -> Iterator[Window]:
        end = getattr(self._tokenizer, "eos_token_id", None)
        waiting: list[int] = []
        spans: list[Span] = []
        begin: tuple[Text, int, int] | None = None
        for number, text in enumerate(self._corpus):
            self.texts += 1
            done = 0
            for ids in chain(self._tokens(text), [[end]] if isinstance(end, int) else []):
                place = 0
                while place < len(ids):
                    if begin is None:
                        begin = (text, number, done + place)
                    some = ids[place : place + self._room - len(waiting)]
                    spans.append((number, done + place, len(some)))
                    waiting += some
                    place += len(some)
                    if len(waiting) == self._room:
                        yield _window(self._around, waiting, begin, spans)
                        waiting, spans, begin = [], [], None
                done += len(ids)
        self.left_over = len(waiting)

    def _apart(self) -> Iterator[Window]:
        for number, text in enumerate(self._corpus):
            self.texts += 1
            waiting: list[int] = []
            start = 0
            for ids in self._tokens(text):
                waiting += ids
                while len(waiting) >= self._room:
                    yield self._of(waiting[: self._room], text, number, start)
                    waiting, start = waiting[self._room :], start + self._room
            if waiting:
                yield self._of(waiting, text, number, start)

    def _of(self, ids: list[int], text: Text, number: int, start: int) -> Window:
        return _window(self._around, ids, (text, number, start), [(number, start, len(ids))])


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces of at most `PIECE` characters."""
    place = 0
    while len(text) - place > PIECE:
        marks = (text.rfind(mark, place, place + PIECE) + len(mark) for mark in ("\n\n", "\n", " "))
        end = next((m for m in marks if m > place + 2), place + PIECE)
        yield text[place:end]
        place = end
    if place < len(text):
        yield text[place:]


def windows(model: Model, corpus: Corpus, length: int, *, packed: bool = True) -> Windows:
    """Cut a corpus into windows of token ids.

    Args:
        model: whose tokenizer is used.
        corpus: the texts.
        length: tokens of a window, with those that the tokenizer puts around every text (a first token, say).
        packed: put texts one after the other, with the end-of-text token between them, and cut that into windows of
            exactly ``length``; what is left over at the end is left out. Otherwise each text has windows of its own,
            the last of which is shorter.

    Raises:
        InputError: the model has no tokenizer, the length is not above 1, or the corpus is empty.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: a corpus of texts cannot be read with it")
    around = _around(model)
    room = length - len(around[0]) - len(around[1])
    if room < 2:
        raise InputError(f"a window of {length} tokens cannot be used: it has room for {max(room, 0)} of a text")
    return Windows(model, corpus, room, around, packed)


def _around(model: Model) -> Around:
    tokenizer: Any = model.tokenizer
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()


def _window(around: Around, ids: list[int], begin: tuple[Text, int, int], spans: list[Span]) -> Window:
    text, number, start = begin
    own = slice(len(around[0]), len(around[0]) + len(ids))
    return Window((*around[0], *ids, *around[1]), text.place, number, start, text, own, tuple(spans))
