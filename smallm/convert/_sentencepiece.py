"""A SentencePiece model file: the parts of its protobuf that a tokenizer needs.

The wire format is a sequence of (field number << 3 | kind, value); reading the few fields here is
less than the packages that could do it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .._errors import CorruptModelError

UNIGRAM, BPE = 1, 2


@dataclass
class SentencePiece:
    """What the file says; defaults are the format's."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # text, score, type
    model_type: int = UNIGRAM
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            n = {1: 8, 5: 4}.get(kind, 0)
            if kind == 2:
                n, at = _varint(data, at)
            value = data[at : at + n]
            if len(value) != n:
                raise ValueError("it ends inside of a field")
            at += n
        else:
            raise ValueError(f"a field is of kind {kind}")
        yield tag >> 3, value


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def read_sentencepiece(path: Path) -> SentencePiece:
    """CorruptModelError: not such a file."""
    model = SentencePiece()
    try:
        for number, value in _fields(path.read_bytes()):
            if not isinstance(value, bytes):
                continue
            if number == 1:
                model.pieces.append(_piece(value))
            elif number == 2:
                for inner, setting in _fields(value):
                    if inner == 3 and isinstance(setting, int):
                        model.model_type = setting
            elif number == 3:
                for inner, setting in _fields(value):
                    if inner == 2 and isinstance(setting, bytes):
                        model.charsmap = setting
                    elif inner == 3:
                        model.add_dummy_prefix = bool(setting)
                    elif inner == 4:
                        model.remove_extra_whitespaces = bool(setting)
                    elif inner == 5:
                        model.escape_whitespaces = bool(setting)
    except (ValueError, IndexError, struct.error) as error:
        raise CorruptModelError(f"{path}: not a SentencePiece model: {error}") from None
    if not model.pieces:
        raise CorruptModelError(f"{path}: not a SentencePiece model: it has no pieces")
    return model
