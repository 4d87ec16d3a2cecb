"""GGUF files as bytes: where keys and tensors lie, to copy what stays as it is.

Keys are walked, not read: a vocabulary's hundred thousand strings are passed over, and go into the
new file byte by byte.  Every length is checked against the file before it is used.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .._errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError

MAGIC = b"GGUF"
ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_HEADER = 1 << 30
MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
# Kind of a value: struct's letter.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_KINDS = {letter: kind for kind, letter in _SCALARS.items()}

Scalar = bool | int | float | str


class Key(NamedTuple):
    value: Scalar | None  #: None for arrays
    data: bytes  #: the whole entry as it lies in the file


class TensorInfo(NamedTuple):
    name: str
    dims: tuple[int, ...]  #: fastest first, as in the file
    type: int  #: id of its format
    begin: int  #: where its data begin in the file

    @property
    def n_values(self) -> int:
        n = 1
        for dim in self.dims:
            n *= dim
        return n


@dataclass(frozen=True)
class Header:
    path: Path
    keys: dict[str, Key]
    tensors: list[TensorInfo]
    alignment: int
    n_file_bytes: int

    def text(self, key: str) -> str:
        entry = self.keys.get(key)
        return entry.value if entry is not None and isinstance(entry.value, str) else ""

    def number(self, key: str) -> int:
        """An integer, or 0 where there is none."""
        entry = self.keys.get(key)
        value = None if entry is None else entry.value
        return value if isinstance(value, int) and not isinstance(value, bool) else 0


class _Short(Exception):
    """More of the file is needed."""


class _Walk:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def skip(self, n: int) -> int:
        begin, self.at = self.at, self.at + n
        if self.at > len(self.data):
            raise _Short
        return begin

    def take(self, letter: str) -> int:
        size = struct.calcsize("<" + letter)
        value: int = struct.unpack_from("<" + letter, self.data, self.skip(size))[0]
        return value

    def string(self) -> str:
        n = self.take("Q")
        begin = self.skip(n)
        return self.data[begin : begin + n].decode("utf-8", "replace")

    def strings(self, n: int) -> None:
        data, at, end = self.data, self.at, len(self.data)
        length = struct.Struct("<Q").unpack_from
        for _ in range(n):
            if at + 8 > end:
                raise _Short
            at += 8 + length(data, at)[0]
        self.at = at
        self.skip(0)

    def value(self, kind: int) -> Scalar | None:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a value of kind {kind}, which GGUF does not know")
        inner, n = self.take("I"), self.take("Q")
        if inner in _SCALARS:
            self.skip(n * struct.calcsize("<" + _SCALARS[inner]))
        elif inner == _STRING:
            self.strings(n)
        else:
            raise ValueError(f"an array of kind {inner}")
        return None


def read_header(path: str | os.PathLike[str]) -> Header:
    """Keys and tensors of a file.  CorruptModelError, UnsupportedModelError, ModelNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise ModelNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        n_file = os.fstat(file.fileno()).st_size
        data, room = b"", 1 << 23
        while True:
            data += file.read(room - len(data))
            try:
                return _parse(path, data, n_file)
            except _Short:
                if len(data) >= min(n_file, MAX_HEADER):
                    raise CorruptModelError(f"{path}: it ends within its own header") from None
            room *= 4


def _parse(path: Path, data: bytes, n_file: int) -> Header:
    if data[:4] != MAGIC:
        raise CorruptModelError(f"{path}: it begins with {data[:4]!r}, not {MAGIC!r}: no GGUF file")
    walk = _Walk(data)
    walk.skip(4)
    version = walk.take("I")
    if version not in (2, 3):
        raise UnsupportedModelError(f"{path}: GGUF version {version}; 2 and 3 are supported")
    n_tensors, n_keys = walk.take("Q"), walk.take("Q")
    keys: dict[str, Key] = {}
    for _ in range(n_keys):
        begin, name = walk.at, walk.string()
        try:
            value = walk.value(walk.take("I"))
        except ValueError as error:
            raise CorruptModelError(f"{path}: the key {name!r} has {error}") from None
        if name in keys:
            raise CorruptModelError(f"{path}: the key {name!r} stands there twice")
        keys[name] = Key(value, data[begin : walk.at])
    header = Header(path, keys, [], ALIGNMENT, n_file)
    alignment = header.number("general.alignment") or ALIGNMENT
    if alignment & (alignment - 1) or not 8 <= alignment <= MAX_ALIGNMENT:
        raise CorruptModelError(
            f"{path}: general.alignment is {alignment}; allowed are powers of two from 8 to "
            f"{MAX_ALIGNMENT}"
        )
    found = []
    for _ in range(n_tensors):
        name, n_dims = walk.string(), walk.take("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise CorruptModelError(f"{path}: the tensor {name!r} has {n_dims} dimensions")
        dims = tuple(walk.take("Q") for _ in range(n_dims))
        found.append(TensorInfo(name, dims, walk.take("I"), walk.take("Q")))
    first = -(-walk.at // alignment) * alignment
    tensors = [t._replace(begin=first + t.begin) for t in found]
    if len({t.name for t in tensors}) < len(tensors):
        raise CorruptModelError(f"{path}: two tensors have the same name")
    return Header(path, keys, tensors, alignment, n_file)


# ---- writing -------------------------------------------------------------------------------------


def encode_key(name: str, value: Scalar | list[str]) -> bytes:
    """A key as GGUF has it: ints are uint32, floats float32."""
    head = _string(name)
    if isinstance(value, str):
        return head + struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, list):
        strings = b"".join(map(_string, value))
        return head + struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + strings
    letter = "?" if isinstance(value, bool) else "I" if isinstance(value, int) else "f"
    return head + struct.pack("<I" + letter, _KINDS[letter], value)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def write_header(
    file: BinaryIO,
    keys: list[bytes],
    tensors: list[tuple[str, tuple[int, ...], int, int]],
    alignment: int = ALIGNMENT,
) -> None:
    """All that stands before the tensors' data.

    keys: encoded.  tensors: (name, dims fastest first, id of the format, bytes), in the order in
    which their data follow, each filled up to the alignment (`padding`).
    """
    file.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(keys)))
    file.write(b"".join(keys))
    at = 0
    for name, dims, kind, n_bytes in tensors:
        file.write(_string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        file.write(struct.pack("<IQ", kind, at))
        at += n_bytes + len(padding(n_bytes, alignment))
    file.write(padding(file.tell(), alignment))


def padding(n_bytes: int, alignment: int = ALIGNMENT) -> bytes:
    return b"\0" * (-n_bytes % alignment)


def read_pieces(
    file: BinaryIO, header: Header, tensor: TensorInfo, first: int, n_bytes: int, step: int
) -> Iterator[bytearray]:
    """n_bytes from byte `first` of a tensor on, `step` at a time.  CorruptModelError: the file ends
    before them."""
    end = tensor.begin + first + n_bytes
    if end > header.n_file_bytes:
        raise CorruptModelError(
            f"{header.path}: {tensor.name} ends at byte {end} of {header.n_file_bytes}"
        )
    file.seek(tensor.begin + first)
    for at in range(0, n_bytes, step):
        piece = bytearray(min(step, n_bytes - at))
        if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise CorruptModelError(f"{header.path} was cut while it was read")
        yield piece
