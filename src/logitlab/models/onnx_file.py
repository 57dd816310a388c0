"""The weights and the nodes of an ONNX file, read without the package ``onnx``; nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DTYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8"}
"""The number types of ONNX that are read; others are skipped."""


@dataclass(frozen=True)
class Node:
    """One operation of the graph."""

    operation: str
    name: str
    inputs: tuple[str, ...]


def read(raw: bytes) -> tuple[dict[str, npt.NDArray[np.generic]], list[Node]]:
    """The stored arrays by name, and the nodes in order.

    Raises:
        ValueError: the bytes are not an ONNX model with its data inside.
    """
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    nodes: list[Node] = []
    try:
        graphs = [value for field, value in _fields(memoryview(raw)) if field == 7 and isinstance(value, memoryview)]
        for field, value in (pair for graph in graphs for pair in _fields(graph)):
            if field == 1 and isinstance(value, memoryview):
                nodes.append(_node(value))
            elif field == 5 and isinstance(value, memoryview):
                arrays.update(_array(value))
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError("the file is not an ONNX model, or is cut off") from error
    if not nodes:
        raise ValueError("the file is not an ONNX model, or has no nodes")
    return arrays, nodes


def _node(raw: memoryview) -> Node:
    text: dict[int, list[str]] = {1: [], 3: [""], 4: [""]}
    for field, value in _fields(raw):
        if field in text and isinstance(value, memoryview):
            text[field].append(str(value, "utf-8"))
    return Node(text[4][-1], text[3][-1], tuple(text[1]))


def _array(raw: memoryview) -> dict[str, npt.NDArray[np.generic]]:
    """One array under its name; none for a type that is not read, or for data kept elsewhere."""
    shape: list[int] = []
    numbers: list[int] = []  # single ones need not be stored as raw bytes
    floats, data = bytearray(), None
    name, kind = "", 0
    for field, value in _fields(raw):
        if field == 1:
            shape += _integers(value)
        elif field == 2 and isinstance(value, int):
            kind = value
        elif field == 5:
            numbers += _integers(value)
        elif isinstance(value, int):
            continue
        elif field == 4:
            floats += value
        elif field == 8:
            name = str(value, "utf-8")
        elif field == 9:
            data = value
    if kind not in _DTYPES:
        return {}
    if data is not None:
        return {name: np.frombuffer(data, dtype=_DTYPES[kind]).reshape(shape)}
    if floats:
        return {name: np.frombuffer(bytes(floats), dtype="<f4").reshape(shape)}
    if numbers:
        return {name: np.array(numbers, dtype=np.uint64).astype(_DTYPES[kind]).reshape(shape)}
    return {}


def _integers(value: int | memoryview) -> list[int]:
    """One whole number, or several that are packed."""
    if isinstance(value, int):
        return [value]
    found: list[int] = []
    at = 0
    while at < len(value):
        number, at = _varint(value, at)
        found.append(number)
    return found


def _fields(raw: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protocol-buffer message: their numbers, and a whole number or the bytes."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == _VARINT:
            number, at = _varint(raw, at)
            yield key >> 3, number
            continue
        if kind == _BYTES:
            length, at = _varint(raw, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError("the file is not an ONNX model")
        if at + length > len(raw):
            raise IndexError
        yield key >> 3, raw[at : at + length]
        at += length


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = raw[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
