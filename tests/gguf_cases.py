"""GGUF files built byte by byte, independent of the `gguf` package: good ones of every kind, and
hostile ones that have to be refused.

    python tests/gguf_cases.py DIR    writes them all to DIR, as seeds for tests/fuzz/fuzz_gguf.c
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B"}
_FORMATS |= {U64: "Q", I64: "q", F64: "d"}

TYPE_F32, TYPE_F16, TYPE_Q4_0 = 0, 1, 2


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return u64(len(raw)) + raw


def number(kind: int, value: float) -> bytes:
    return struct.pack("<" + _FORMATS[kind], value)


def array(kind: int, items: Sequence[bytes], n: int | None = None) -> bytes:
    """The value of an array key; `n` is the count it claims."""
    return u32(kind) + u64(len(items) if n is None else n) + b"".join(items)


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + u32(kind) + value


@dataclass(frozen=True)
class Tensor:
    name: str | bytes
    dims: tuple[int, ...] = (8,)  # fastest first
    type: int = TYPE_F32
    data: bytes = bytes(32)
    offset: int | None = None  # None: after the one before
    n_dims: int | None = None  # what the header says


@dataclass(frozen=True)
class File:
    """A GGUF file as its parts; `bytes()` puts it together."""

    keys: tuple[bytes, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    version: int = 3
    magic: bytes = b"GGUF"
    alignment: int = 32  # used for the layout; a key has to say it
    n_keys: int | None = None  # what the header says
    n_tensors: int | None = None

    def __bytes__(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        head = self.magic + u32(self.version) + u64(n_tensors) + u64(n_keys) + b"".join(self.keys)
        data = b""
        for t in self.tensors:
            offset = len(data) if t.offset is None else t.offset
            n_dims = len(t.dims) if t.n_dims is None else t.n_dims
            head += text(t.name) + u32(n_dims) + b"".join(map(u64, t.dims))
            head += u32(t.type) + u64(offset)
            if t.offset is None:
                data += t.data + bytes(-len(t.data) % self.alignment)
        return head + bytes(-len(head) % self.alignment) + data


def all_kinds() -> tuple[bytes, ...]:
    """A key of every kind and an array of every kind, nested as deep as it is allowed."""
    keys = [key("k.string", STRING, text("zwölf")), key("k.empty", STRING, text(""))]
    items: list[bytes] = []
    for kind in _FORMATS:
        values = [number(kind, 1), number(kind, 0), number(kind, 1)]
        keys += [key(f"k.{kind}", kind, values[0]), key(f"a.{kind}", ARRAY, array(kind, values))]
        items.append(array(kind, values))
    keys.append(key("a.string", ARRAY, array(STRING, [text("a"), text(""), text("ß\0x")])))
    keys.append(key("a.empty", ARRAY, array(STRING, [])))
    keys.append(key("a.array", ARRAY, array(ARRAY, items)))
    keys.append(key("a.deep", ARRAY, nested(4)))
    keys.append(key("k.negative", I64, number(I64, -(2**63))))
    keys.append(key("k.nan", F32, number(F32, float("nan"))))
    return tuple(keys)


def nested(depth: int) -> bytes:
    """An array value of so many levels."""
    value = array(U8, [b"\x07"])
    for _ in range(depth - 1):
        value = array(ARRAY, [value])
    return value


def good() -> Iterator[tuple[str, bytes]]:
    """(name, content) of well-formed files, though no models."""
    arch = key("general.architecture", STRING, text("llama"))
    a, b = Tensor("a"), Tensor("b.weight", (32, 2), TYPE_Q4_0, bytes(36))
    yield "nothing", bytes(File())
    yield "version2", bytes(File((arch,), (a, b), version=2))
    yield "kinds", bytes(File((arch, *all_kinds()), (a,)))
    for n in (8, 64, 4096):
        aligned = key("general.alignment", U32, u32(n))
        yield f"alignment{n}", bytes(File((arch, aligned), (a, b), alignment=n))
    gap = replace(b, data=bytes(160))  # more than b uses: "z" lies in the rest
    yield "out-of-order", bytes(File((arch,), (Tensor("z", offset=160), a, gap)))
    yield "unknown-type", bytes(File((arch,), (Tensor("q", type=999), a)))


@dataclass(frozen=True)
class Case:
    """A file to be refused: with which exception, and what the message has to say."""

    name: str
    data: bytes
    says: tuple[str, ...] = ()
    error: str = "CorruptModelError"
    kind: str = field(default="", compare=False)


def _claims() -> Iterator[Case]:
    """Counts and lengths far beyond the file."""
    huge = (2**31, 2**40, 2**60, 2**61 + 1, 2**63, 2**64 - 1)
    for n in huge:
        yield Case(f"keys-{n}", bytes(File(n_keys=n)) + bytes(70), (str(n), "keys", "at most"))
        yield Case(f"tensors-{n}", bytes(File(n_tensors=n)) + bytes(70), (str(n), "tensors"))
        yield Case(f"name-{n}", bytes(File((u64(n) + b"general.name",))), ("key 0", str(n)))
        yield Case(
            f"string-{n}",
            bytes(File((u64(1) + b"k" + u32(STRING) + u64(n), bytes(40)), n_keys=1)),
            ('key "k"', str(n)),
        )
        for kind in (U8, F32, F64, STRING, ARRAY):
            yield Case(
                f"array{kind}-{n}",
                bytes(File((key("k", ARRAY, array(kind, [], n)), bytes(100)), n_keys=1)),
                ('key "k"', str(n), "elements"),
            )
        yield Case(
            f"tensor-name-{n}",
            bytes(File(n_tensors=1))[:24] + u64(n) + bytes(60),
            ("tensor 0", str(n)),
        )


def _metadata() -> Iterator[Case]:
    for kind in (13, 99, 2**31, 2**32 - 1):
        yield Case(f"kind-{kind}", bytes(File((key("k", kind, bytes(8)),))), ('key "k"', str(kind)))
        yield Case(
            f"element-kind-{kind}",
            bytes(File((key("k", ARRAY, array(kind, [bytes(8)])),))),
            ('key "k"', str(kind)),
        )
    for depth in (5, 6, 20000):
        yield Case(
            f"nested-{depth}", bytes(File((key("k", ARRAY, nested(depth)),))), ('key "k"', "deeper")
        )
    yield Case("bool-2", bytes(File((key("k", BOOL, b"\2"),))), ('key "k"', "2"))
    flags = array(BOOL, [b"\0", b"\1", b"\xff"])
    yield Case("bools-255", bytes(File((key("k", ARRAY, flags),))), ('key "k"', "255"))
    twice = key("general.name", STRING, text("x"))
    other = key("general.file_type", U32, u32(0))
    yield Case("key-twice", bytes(File((twice, other, twice))), ('"general.name"', "twice"))
    yield Case("key-empty", bytes(File((key("", U8, b"\0"),))), ("key 0", "0 bytes"))
    yield Case("key-nul", bytes(File((key("a\0b", U8, b"\0"),))), ("key 0", "NUL"))
    yield Case("key-long", bytes(File((key("k" * 65536, U8, b"\0"),))), ("65536", "65535"))
    for n in (0, 1, 4, 7, 24, 33, 48, 2**21, 2**31, 2**32 - 1):
        align = key("general.alignment", U32, u32(n))
        yield Case(f"alignment-{n}", bytes(File((align,))), ('"general.alignment"', str(n)))
    minus = key("general.alignment", I32, number(I32, -32))
    yield Case("alignment-minus", bytes(File((minus,))), ('"general.alignment"', "-32"))
    big = key("general.alignment", U64, u64(2**63 + 32))
    yield Case("alignment-u64", bytes(File((big,))), ('"general.alignment"', str(2**63 + 32)))
    for kind, value, name in ((STRING, text("32"), "string"), (F32, bytes(4), "float32")):
        wrong = key("general.alignment", kind, value)
        yield Case(f"alignment-{name}", bytes(File((wrong,))), ('"general.alignment"', name))


def _tensors() -> Iterator[Case]:
    def one(name: str, tensor: Tensor, *says: str) -> Case:
        return Case(name, bytes(File((), (Tensor("first"), tensor))), ('tensor "t"', *says))

    yield one("dims-0", Tensor("t", ()), "0 dimensions")
    yield one("dims-5", Tensor("t", (1, 1, 1, 1, 1)), "5 dimensions", "4")
    yield one("dims-many", Tensor("t", (8,), n_dims=2**32 - 1), str(2**32 - 1))
    yield one("dim-zero", Tensor("t", (0,)), "dimension 0 is 0")
    yield one("dim-zero-last", Tensor("t", (8, 0)), "dimension 1 is 0")
    yield one("product-64", Tensor("t", (2**32, 2**32)), "dimension 1", str(2**32))
    yield one("product-wraps", Tensor("t", (2**62, 4, 4)), "dimension 1")
    yield one("product-wraps-small", Tensor("t", (2**33, 2**31, 2**32, 4)), "dimension 1")
    yield one("bytes-wrap", Tensor("t", (2**62 + 8,)), str(2**62 + 8))
    yield one("dim-63", Tensor("t", (2**63,)), str(2**63))
    yield one("larger-than-file", Tensor("t", (1000, 1000)), "1000000")
    yield one("row-of-half-a-block", Tensor("t", (48,), TYPE_Q4_0), "48", "32")
    yield one("row-below-a-block", Tensor("t", (1, 32), TYPE_Q4_0), "32")
    yield one("offset-odd", Tensor("t", offset=33), "33", "alignment 32")
    yield one("offset-of-8", Tensor("t", offset=40), "40", "alignment 32")
    yield one("offset-beyond", Tensor("t", offset=2**20), str(2**20))
    yield one("offset-wraps", Tensor("t", offset=2**64 - 32), str(2**64 - 32))
    yield one("offset-wraps-data", Tensor("t", offset=2**64 - 96), str(2**64 - 96))
    yield one("ends-beyond", Tensor("t", (9,), offset=32), "cut short")
    first = Tensor("first", (24,), data=bytes(96))
    inside = bytes(File((), (first, Tensor("t", offset=32))))
    yield Case("overlap", inside, ('tensor "t"', 'tensor "first"'))
    same = bytes(File((), (Tensor("first"), Tensor("t", offset=0))))
    yield Case("same-place", same, ('tensor "first"', 'tensor "t"'))
    yield Case("tensor-twice", bytes(File((), (Tensor("t"), Tensor("u"), Tensor("t")))), ("twice",))
    yield Case("tensor-empty-name", bytes(File((), (Tensor(""),))), ("tensor 0", "0 bytes"))
    yield Case("tensor-nul", bytes(File((), (Tensor("a\0"),))), ("tensor 0", "NUL"))
    yield Case("tensor-long-name", bytes(File((), (Tensor("t" * 65),))), ("65", "64"))
    hidden = Tensor("\x1b[31m\xffé%s%n", (0,))
    yield Case("tensor-odd-name", bytes(File((), (hidden,))), ("?[31m", "%s%n"))


def _preamble() -> Iterator[Case]:
    yield Case("empty", b"", ("empty",))
    yield Case("one-byte", b"G", ("not a GGUF file",))
    yield Case("magic-only", b"GGUF", ("cut short",))
    yield Case("text", b"Once upon a time\n", ("not a GGUF file", "Once"))
    yield Case("zip", b"PK\x03\x04" + bytes(100), ("not a GGUF file", "PK??"))
    yield Case("zeros", bytes(4096), ("not a GGUF file",))
    for version in (0, 1, 4, 2**16 + 3, 2**32 - 1):
        data = bytes(File(version=version))
        yield Case(f"version-{version}", data, (str(version), "2 and 3"), "UnsupportedModelError")
    swapped = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    yield Case("big-endian", swapped, ("big-endian",), "UnsupportedModelError")
    backwards = bytes(File(magic=b"FUGG"))
    yield Case("big-endian-magic", backwards, ("big-endian",), "UnsupportedModelError")


def _split() -> Iterator[Case]:
    """Split keys that one file alone shows to be wrong."""

    def of(no: int, count: int, *more: bytes) -> tuple[bytes, ...]:
        return (key("split.no", U16, number(U16, no)), key("split.count", I32, u32(count)), *more)

    yield Case("split-no", bytes(File(of(3, 3))), ('"split.no"', "3", "2"))
    yield Case("split-count-many", bytes(File(of(0, 100000))), ('"split.count"', "100000", "99999"))
    minus = (key("split.count", I32, number(I32, -1)),)
    yield Case("split-count-minus", bytes(File(minus)), ('"split.count"', "-1"))
    wrong = (key("split.count", STRING, text("3")),)
    yield Case("split-count-string", bytes(File(wrong)), ('"split.count"', "string"))
    total = key("split.tensors.count", I32, u32(7))
    lone = bytes(File(of(0, 1, total), (Tensor("t"),)))
    yield Case("split-total", lone, ('"split.tensors.count"', "7", "1"))
    second = bytes(File(of(1, 3)))
    yield Case("split-second", second, ("part 2", "first part"), "UnsupportedModelError")
    yield Case("split-name", bytes(File(of(0, 3))), ("-00001-of-00003",), "ModelNotFoundError")


def cut(data: bytes, pieces: int = 50) -> Iterator[Case]:
    """The file cut short after every 1/50th."""
    for i in range(1, pieces):
        n = len(data) * i // pieces
        yield Case(f"cut-{i}", data[:n])


def hostile() -> Iterator[Case]:
    groups = {
        "claims": _claims,
        "metadata": _metadata,
        "tensors": _tensors,
        "preamble": _preamble,
        "split": _split,
    }
    for name, cases in groups.items():
        for case in cases():
            yield replace(case, kind=name)


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    seeds = [*good(), *((case.name, case.data) for case in hostile())]
    for name, data in seeds:
        (directory / name).write_bytes(data)
    print(f"{len(seeds)} files in {directory}")


if __name__ == "__main__":
    main()
