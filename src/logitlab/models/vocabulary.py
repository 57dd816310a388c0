"""Readable labels for token ids, with characters that are split over tokens put together again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


class Vocabulary:
    """Labels for the token ids of a model.

    Args:
        tokenizer: a transformers tokenizer, or None (labels are then the ids themselves).
        size: number of columns of the logits; ids that the tokenizer lacks are labelled ``[id]``.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def _byte_level(self) -> dict[str, int] | None:
        """Map from characters to bytes if the tokenizer writes bytes as characters (GPT-2's way)."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            decoder = getattr(backend, "decoder", None)
            state = b"" if decoder is None else decoder.__getstate__()
            if "ByteLevel" not in json.dumps(json.loads(state) if state else None):
                return None
        elif not hasattr(self.tokenizer, "byte_decoder"):
            return None
        return _byte_characters()

    def bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for (UTF-8, possibly a part of a character)."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._find_bytes(token_id)
        return self._bytes[token_id]

    def _find_bytes(self, token_id: int) -> bytes:
        if self.tokenizer is None:
            return str(token_id).encode()
        token: Any = None
        if 0 <= token_id < max(len(self.tokenizer), self.tokenizer.vocab_size):
            token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return f"[{token_id}]".encode()
        if isinstance(token, bytes):
            return token
        text = str(token)
        single = _BYTE.match(text)
        if single:
            return bytes([int(single[1], 16)])
        table = self._byte_level
        if table is not None and token_id not in self._added and all(c in table for c in text):
            return bytes(table[c] for c in text)
        return text.replace("\u2581", " ").encode("utf-8", "surrogatepass")

    @cached_property
    def _added(self) -> set[int]:
        return set(getattr(self.tokenizer, "added_tokens_decoder", {}))

    def label(self, token_id: int) -> str:
        """A token by itself; bytes that are only part of a character are shown in hexadecimal."""
        return _readable(self.bytes(token_id))

    def labels(self, ids: Sequence[int]) -> list[str]:
        """Labels of a sequence; the tokens of a split character all carry it, numbered.

        Example:
            An emoji in three tokens gives ``🙂(1/3)``, ``🙂(2/3)``, ``🙂(3/3)``.
        """
        result: list[str] = []
        start = 0
        while start < len(ids):
            end = start + 1
            joined = self.bytes(ids[start])
            while _incomplete(joined) and end < len(ids):
                joined += self.bytes(ids[end])
                end += 1
            if end - start > 1 and _decodes(joined):
                text, n = joined.decode("utf-8"), end - start
                result += [f"{text}({i}/{n})" for i in range(1, n + 1)]
                start = end
            else:
                result.append(_readable(self.bytes(ids[start])))
                start += 1
        return result

    def pending(self, ids: Sequence[int]) -> bytes:
        """The bytes at the end of a sequence that begin a character without ending it."""
        tail = b"".join(self.bytes(i) for i in ids[-4:])
        for length in range(min(3, len(tail)), 0, -1):
            if _incomplete(tail[-length:]) and not _decodes(tail[-length:]):
                head = tail[-length:]
                if 0xC0 <= head[0] < 0xF8:
                    return head
        return b""

    def completed(self, pending: bytes, token_id: int) -> str | None:
        """What a token makes of the pending bytes: the finished character, or None."""
        own = self.bytes(token_id)
        return (pending + own).decode("utf-8") if not _decodes(own) and _decodes(pending + own) else None


def _decodes(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _incomplete(data: bytes) -> bool:
    """Whether bytes are the beginning of valid UTF-8 that breaks off inside a character."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def _readable(data: bytes) -> str:
    if _decodes(data):
        return data.decode("utf-8")
    return "".join(
        c if not "\udc80" <= c <= "\udcff" else f"<{ord(c) - 0xDC00:02X}>"
        for c in data.decode("utf-8", "surrogateescape")
    )


def _byte_characters() -> dict[str, int]:
    """The characters that byte-level BPE writes for the 256 bytes.

    Printable Latin-1 characters stand for themselves; the other bytes take the code points from
    256 on, in order.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in own}
    others = [b for b in range(256) if b not in own]
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


class ColumnLabels(Vocabulary):
    """Labels for columns that are no tokens: classes, or concepts.

    Args:
        names: by column.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(None, len(names))
        self.names = list(names)

    def label(self, token_id: int) -> str:
        """The name of a column."""
        return self.names[token_id]

    def labels(self, ids: Sequence[int]) -> list[str]:
        """The names of columns."""
        return [self.names[i] for i in ids]

    def pending(self, ids: Sequence[int]) -> bytes:
        """Nothing: names are whole."""
        return b""
