"""The GGUF reader: good files read exactly, hostile ones refused with a message that names the key
or tensor, the value and the limit."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gguf_cases
import numpy as np
import pytest
import tiny
from gguf_cases import Case, File, Tensor, key, number, text, u32

import smallm

CTests = Callable[[str], Path]
IDS = [1, 300, 17, 42, 5]
GOOD = list(gguf_cases.good())
HOSTILE = list(gguf_cases.hostile())
NAMES = {
    gguf_cases.U8: "uint8",
    gguf_cases.I8: "int8",
    gguf_cases.U16: "uint16",
    gguf_cases.I16: "int16",
    gguf_cases.U32: "uint32",
    gguf_cases.I32: "int32",
    gguf_cases.F32: "float32",
    gguf_cases.BOOL: "bool",
    gguf_cases.U64: "uint64",
    gguf_cases.I64: "int64",
    gguf_cases.F64: "float64",
}


# ---- well-formed files ---------------------------------------------------------------------------


def quoted(s: str | bytes) -> str:
    return '"' + (s.encode() if isinstance(s, str) else s).hex() + '"'


def bits(value: float) -> str:
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016x}"


def dump(c_tests: CTests, path: Path) -> list[str]:
    """What the reader says of the file, a line for each key and tensor."""
    program = c_tests("gguf_dump")
    return subprocess.run([program, path], capture_output=True, check=True, text=True).stdout.split(
        "\n"
    )[:-1]


def fnv(data: bytes) -> str:
    value = 14695981039346656037
    for byte in data:
        value = (value ^ byte) * 1099511628211 % 2**64
    return f"{value:016x}"


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_value_is_read_exactly(version: int, tmp_path: Path, c_tests: CTests) -> None:
    extremes: dict[int, list[Any]] = {
        gguf_cases.U8: [0, 255],
        gguf_cases.I8: [-128, 127],
        gguf_cases.U16: [0, 65535],
        gguf_cases.I16: [-32768, 32767],
        gguf_cases.U32: [0, 2**32 - 1],
        gguf_cases.I32: [-(2**31), 2**31 - 1],
        gguf_cases.F32: [0.1, -float("inf")],
        gguf_cases.BOOL: [0, 1],
        gguf_cases.U64: [0, 2**63 - 1],
        gguf_cases.I64: [-(2**63), 2**63 - 1],
        gguf_cases.F64: [0.1, 5e-324],
    }
    keys, want = [], []
    for kind, values in extremes.items():
        shown = [str(v) for v in values]
        if kind in (gguf_cases.F32, gguf_cases.F64):
            code = "f" if kind == gguf_cases.F32 else "d"
            shown = [bits(struct.unpack(code, struct.pack(code, v))[0]) for v in values]
        for i, v in enumerate(values):
            name = f"scalar.{NAMES[kind]}.{i}"
            keys.append(key(name, kind, number(kind, v)))
            want.append(f"key {quoted(name)} {NAMES[kind]} {shown[i]}")
        name = f"array.{NAMES[kind]}"
        items = [number(kind, v) for v in values]
        keys.append(key(name, gguf_cases.ARRAY, gguf_cases.array(kind, items)))
        want.append(f"key {quoted(name)} array [ {NAMES[kind]} {' '.join(shown)} ]")
    words = ["", "ü\0\n", b"\xff\xfe", "x" * 300000]  # longer than the reader's window
    for i, word in enumerate(words):
        keys.append(key(f"text.{i}", gguf_cases.STRING, text(word)))
        want.append(f"key {quoted(f'text.{i}')} string {quoted(word)}")
    items = [text(w) for w in words]
    keys.append(key("texts", gguf_cases.ARRAY, gguf_cases.array(gguf_cases.STRING, items)))
    want.append(f"key {quoted('texts')} array [ string {' '.join(map(quoted, words))} ]")
    keys.append(key("deep", gguf_cases.ARRAY, gguf_cases.nested(4)))
    want.append(f"key {quoted('deep')} array [ array [ array [ array [ uint8 7 ] ] ] ]")
    path = tmp_path / "kinds.gguf"
    path.write_bytes(bytes(File(tuple(keys), version=version)))
    assert dump(c_tests, path) == want


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_tensors_are_found_where_they_lie(alignment: int, tmp_path: Path, c_tests: CTests) -> None:
    rng = np.random.default_rng(alignment)
    tensors = (
        Tensor("one.weight", (5,), gguf_cases.TYPE_F32, rng.bytes(20)),
        Tensor("two.weight", (32, 3, 1, 2), gguf_cases.TYPE_Q4_0, rng.bytes(6 * 18)),
        Tensor("t" * 64, (3, 7), gguf_cases.TYPE_F16, rng.bytes(42)),
    )
    keys = (key("general.alignment", gguf_cases.U32, u32(alignment)),)
    file = bytes(File(keys, tensors, alignment=alignment))
    path = tmp_path / "tensors.gguf"
    path.write_bytes(file)
    lines = dump(c_tests, path)[1:]
    assert len(lines) == len(tensors)
    for line, t in zip(lines, tensors, strict=True):
        _, name, kind, part, offset, n_bytes, digest, *dims = line.split()
        assert (name, int(kind), part, int(n_bytes)) == (quoted(t.name), t.type, "0", len(t.data))
        assert tuple(map(int, dims)) == t.dims
        assert int(offset) % alignment == 0
        assert file[int(offset) :].startswith(t.data)
        assert digest == fnv(t.data)


@pytest.mark.parametrize("name,data", GOOD, ids=[name for name, _ in GOOD])
def test_odd_but_legal_files_open(name: str, data: bytes, tmp_path: Path, c_tests: CTests) -> None:
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(data)
    lines = dump(c_tests, path)
    assert not any(line.startswith("error") for line in lines), lines


# ---- well-formed models, through the whole stack -------------------------------------------------


def encode(kv: tiny.KV) -> bytes:
    kind = int(kv.kind)
    if kind == gguf_cases.ARRAY:
        assert kv.sub is not None
        return gguf_cases.array(int(kv.sub), [encode(tiny.KV(kv.sub, v)) for v in kv.value])
    return text(kv.value) if kind == gguf_cases.STRING else number(kind, kv.value)


def keys_of(made: tiny.Tiny) -> tuple[bytes, ...]:
    return tuple(key(k, int(v.kind), encode(v)) for k, v in made.meta.items())


def tensors_of(made: tiny.Tiny) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name, t.shape[::-1], int(t.type), t.data.tobytes())
        for name, t in made.tensors.items()
    )


def split_keys(no: int, count: int, total: int) -> tuple[bytes, ...]:
    return (
        key("split.no", gguf_cases.U16, number(gguf_cases.U16, no)),
        key("split.count", gguf_cases.U16, number(gguf_cases.U16, count)),
        key("split.tensors.count", gguf_cases.I32, u32(total)),
    )


def write_parts(directory: Path, parts: Iterable[bytes]) -> Path:
    """Writes parts under their names; the first one's path."""
    parts = list(parts)
    directory.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(parts):
        (directory / f"m-{i + 1:05d}-of-{len(parts):05d}.gguf").write_bytes(data)
    return directory / f"m-00001-of-{len(parts):05d}.gguf"


def split(made: tiny.Tiny, n: int) -> list[File]:
    """The model in n files; metadata only in the first, as llama.cpp's gguf-split does."""
    tensors = tensors_of(made)
    share = -(-len(tensors) // n)
    return [
        File(
            (keys_of(made) if i == 0 else ()) + split_keys(i, n, len(tensors)),
            tensors[i * share : (i + 1) * share],
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    return tiny.write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def logits(made: tiny.Tiny) -> np.ndarray:
    with smallm.load(made.path) as model:
        return model.logits(IDS)


def same_logits(path: Path, want: np.ndarray) -> None:
    with smallm.load(path) as model:
        np.testing.assert_array_equal(model.logits(IDS), want)


def aligned(made: tiny.Tiny, n: int) -> File:
    keys = (*keys_of(made), key("general.alignment", gguf_cases.U32, u32(n)))
    return File(keys, tensors_of(made), alignment=n)


REWRITES: dict[str, Callable[[tiny.Tiny], File]] = {
    "again": lambda m: File(keys_of(m), tensors_of(m)),
    "version-2": lambda m: File(keys_of(m), tensors_of(m), version=2),
    "keys-reversed": lambda m: File(keys_of(m)[::-1], tensors_of(m)),
    "tensors-reversed": lambda m: File(keys_of(m), tensors_of(m)[::-1]),
    "more-keys": lambda m: File(keys_of(m) + gguf_cases.all_kinds(), tensors_of(m)),
    "alignment-8": lambda m: aligned(m, 8),
    "alignment-4096": lambda m: aligned(m, 4096),
}


@pytest.mark.parametrize("rewrite", REWRITES)
def test_the_same_model_written_otherwise(
    rewrite: str, made: tiny.Tiny, logits: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(REWRITES[rewrite](made)))
    same_logits(path, logits)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_split_models(n: int, made: tiny.Tiny, logits: np.ndarray, tmp_path: Path) -> None:
    same_logits(write_parts(tmp_path, map(bytes, split(made, n))), logits)


def test_split_models_below_a_long_path(
    made: tiny.Tiny, logits: np.ndarray, tmp_path: Path
) -> None:
    directory = tmp_path.joinpath(*["ä" * 60] * 8)  # some 1000 bytes
    same_logits(write_parts(directory, map(bytes, split(made, 3))), logits)


# ---- refusals ------------------------------------------------------------------------------------


def refusal(path: Path, error: str) -> str:
    with pytest.raises(getattr(smallm, error)) as caught:
        smallm.load(path)
    assert type(caught.value) is getattr(smallm, error)
    return str(caught.value)


@pytest.mark.parametrize("case", HOSTILE, ids=[c.name for c in HOSTILE])
def test_hostile_files_are_refused(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(case.data)
    message = refusal(path, case.error)
    assert path.name in message
    for word in case.says:
        assert word in message, f"{word!r} is not in {message!r}"
    assert message.isprintable(), "the file's bytes reach the terminal"


def test_files_cut_short_are_refused(made: tiny.Tiny, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    whole = made.path.read_bytes()
    for case in gguf_cases.cut(whole):
        path.write_bytes(case.data)
        message = refusal(path, case.error)
        assert "cut short" in message or "hold at most" in message, (case.name, message)
    path.write_bytes(whole[:-1])
    assert "tensor" in refusal(path, "CorruptModelError")


def test_single_flipped_bytes_never_crash(made: tiny.Tiny, tmp_path: Path) -> None:
    """A flipped byte of the header gives a model or one of the package's own exceptions."""
    path = tmp_path / "flipped.gguf"
    whole = bytearray(made.path.read_bytes())
    rng = np.random.default_rng(7)
    n_refused = 0
    for at in [*range(24), *rng.integers(24, 4000, 150)]:
        flipped = whole.copy()
        flipped[at] ^= int(rng.integers(1, 256))
        path.write_bytes(flipped)
        try:
            smallm.load(path).close()
        except smallm.SmallmError:
            n_refused += 1
    assert n_refused >= 24, "not even the magic and the counts were judged"


def edit_part(parts: Sequence[File], i: int, **changes: Any) -> list[bytes]:
    """The parts as bytes, with fields of part i replaced."""
    fields = {**parts[i].__dict__, **changes}
    return [bytes(File(**fields)) if j == i else bytes(p) for j, p in enumerate(parts)]


def test_split_models_that_disagree(made: tiny.Tiny, tmp_path: Path) -> None:
    parts = split(made, 3)
    n = len(made.tensors)
    lone = parts[1].tensors

    def judge(name: str, files: list[bytes], error: str, *says: str) -> None:
        path = write_parts(tmp_path / name, files)
        message = refusal(path, error)
        for word in says:
            assert word in message, f"{name}: {word!r} is not in {message!r}"

    corrupt = "CorruptModelError"
    judge("no", edit_part(parts, 1, keys=split_keys(2, 3, n)), corrupt, "00002-of", "part 3")
    judge("count", edit_part(parts, 1, keys=split_keys(1, 4, n)), corrupt, "00002-of", "of 4")
    judge("none", edit_part(parts, 2, keys=()), corrupt, "00003-of", "part 1 of 1")
    few = edit_part(parts, 2, tensors=parts[2].tensors[:-1])
    judge("few", few, corrupt, '"split.tensors.count"', str(n), str(n - 1))
    twice = edit_part(parts, 2, tensors=(lone[0], *parts[2].tensors[1:]))
    judge("twice", twice, corrupt, "00003-of", str(lone[0].name), "twice")
    cut = [bytes(p) for p in parts]
    cut[1] = cut[1][:-200]
    judge("cut", cut, corrupt, "00002-of", "cut short")
    foreign = [bytes(parts[0]), b"<html>", bytes(parts[2])]
    judge("foreign", foreign, corrupt, "00002-of", "not a GGUF file")
    overlap = edit_part(parts, 1, tensors=(*lone[:-1], Tensor("over", (8,), offset=0)))
    judge("overlap", overlap, corrupt, "00002-of", '"over"')


def test_split_models_with_a_part_missing(made: tiny.Tiny, tmp_path: Path) -> None:
    first = write_parts(tmp_path, map(bytes, split(made, 3)))
    third = tmp_path / "m-00003-of-00003.gguf"
    assert "first part" in refusal(third, "UnsupportedModelError")
    renamed = first.rename(tmp_path / "renamed.gguf")
    assert "-00001-of-00003.gguf" in refusal(renamed, "ModelNotFoundError")
    renamed.rename(first)
    third.unlink()
    assert third.name in refusal(first, "ModelNotFoundError")


def test_paths_that_are_no_files(tmp_path: Path, c_tests: CTests) -> None:
    """Nothing hangs, and what is missing is told apart from what cannot be read."""
    absent = tmp_path / "absent.gguf"
    below = tmp_path / "file" / "model.gguf"
    below.parent.write_bytes(b"")
    for path in (absent, below):
        assert path.name in refusal(path, "ModelNotFoundError")
        assert dump(c_tests, path) == [f"error -4 {path}: cannot open: no such file"]
    assert dump(c_tests, tmp_path)[0].startswith(f"error -3 {tmp_path}: not a regular file")
    if hasattr(os, "mkfifo"):
        pipe = tmp_path / "pipe.gguf"
        os.mkfifo(pipe)
        assert dump(c_tests, pipe) == [f"error -3 {pipe}: not a regular file"]
        with pytest.raises(smallm.SmallmError):
            smallm.load(pipe)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_claims_do_not_cost_memory(tmp_path: Path) -> None:
    """A few hundred bytes that claim 2^60 items are refused as corrupt where 64 MB are left."""
    for i, case in enumerate(c for c in HOSTILE if c.kind == "claims"):
        (tmp_path / f"{i}.gguf").write_bytes(case.data)
    program = """
        import pathlib, resource, sys
        import smallm
        try:
            smallm.load(sys.argv[1] + "/0.gguf")
        except smallm.CorruptModelError:
            pass  # all that is loaded lazily is loaded now
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        n = 0
        for path in pathlib.Path(sys.argv[1]).iterdir():
            try:
                smallm.load(path)
            except smallm.CorruptModelError:
                n += 1
        print(n)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # not where the package's source would hide the installed one
    )
    assert done.stdout.strip() == str(len(list(tmp_path.iterdir()))), done.stderr
