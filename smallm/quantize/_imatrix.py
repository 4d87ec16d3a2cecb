"""Files of importance: mean squares of what each matrix of a model is multiplied with.

Both of llama.cpp's kinds are read: GGUF files (general.type "imatrix"), and the older ones without
a magic number.  The former are written: for a matrix NAME the tensors NAME.in_sum2, float32
[n_experts or 1, n_cols], and NAME.counts, float32 [n_experts or 1, 1].
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .._errors import CorruptModelError, ModelNotFoundError, SmallmError, UnsupportedModelError
from .._files import whole_file
from ._formats import Floats, formats
from ._gguf import MAGIC, encode_key, padding, read_header, read_pieces, write_header

SUMS, COUNTS = ".in_sum2", ".counts"


class Statistic(NamedTuple):
    """What one matrix, or those of its experts, was multiplied with."""

    squares: npt.NDArray[np.float64]  #: [n_experts or 1, n_cols] sums of squares
    counts: npt.NDArray[np.uint64]  #: [n_experts or 1] tokens that these are sums over


def write_importance(
    path: str | os.PathLike[str],
    statistics: Mapping[str, Statistic],
    *,
    dataset: str,
    windows: int,
    ctx: int,
) -> None:
    """Writes them, by matrix, beside `path` and renames.

    dataset: what the text is called; it was run as so many windows of ctx tokens.
    SmallmError: a sum is beyond float32.  OSError: it cannot be written.
    """
    arrays: list[tuple[str, Floats]] = []
    for name, (squares, counts) in statistics.items():
        if not (squares <= np.finfo(np.float32).max).all():
            raise SmallmError(f"the squares of what {name} is multiplied with exceed float32")
        arrays.append((name + SUMS, squares.astype("<f4")))
        arrays.append((name + COUNTS, counts.astype("<f4").reshape(-1, 1)))
    keys = [
        encode_key("general.type", "imatrix"),
        encode_key("imatrix.datasets", [dataset]),
        encode_key("imatrix.chunk_count", windows),
        encode_key("imatrix.chunk_size", ctx),
    ]
    kind = formats()["F32"].id
    infos = [(name, values.shape[::-1], kind, values.nbytes) for name, values in arrays]
    with whole_file(path) as part, open(part, "wb") as file:
        write_header(file, keys, infos)
        for _, values in arrays:
            file.write(values.tobytes())
            file.write(padding(values.nbytes))


def read_importance(path: str | os.PathLike[str]) -> dict[str, Floats]:
    """By matrix: float32 [n_experts or 1, n_cols], >= 0, of any scale; 0: that expert was not seen.

    ModelNotFoundError, CorruptModelError, UnsupportedModelError: there is no such file, or it is
    none of these.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        old = file.read(4) != MAGIC
    found = _read_old(path) if old else _read_gguf(path)
    if not found:
        raise CorruptModelError(f"{path}: it knows no matrix")
    return found


def _judged(path: Path, name: str, values: Floats) -> Floats:
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise CorruptModelError(f"{path}: {name} has a value that is negative or not finite")
    return values


def _read_gguf(path: Path) -> dict[str, Floats]:
    header = read_header(path)
    kind = header.text("general.type")
    if kind != "imatrix":
        raise UnsupportedModelError(f"{path}: general.type is {kind!r}, not 'imatrix'")
    tensors: dict[str, Floats] = {}
    with open(path, "rb") as file:
        for t in header.tensors:
            if t.type != 0:
                raise UnsupportedModelError(f"{path}: {t.name} is of type {t.type}, not F32")
            size = 4 * t.n_values
            data = b"".join(read_pieces(file, header, t, 0, size, max(1, size)))
            n_cols = t.dims[0] if t.dims[0] else 1
            values = np.frombuffer(data, "<f4").astype(np.float32).reshape(-1, n_cols)
            tensors[t.name] = _judged(path, t.name, values)
    found: dict[str, Floats] = {}
    for name, sums in tensors.items():
        if not name.endswith(SUMS):
            continue
        matrix = name.removesuffix(SUMS)
        counts = tensors.get(matrix + COUNTS)
        if counts is None or counts.size != sums.shape[0]:
            raise CorruptModelError(f"{path}: {name} has no counts of its {sums.shape[0]} matrices")
        found[matrix] = sums / np.maximum(counts.reshape(-1, 1), np.float32(1))
    return found


def _read_old(path: Path) -> dict[str, Floats]:
    data = path.read_bytes()
    at = 0

    def number() -> int:
        nonlocal at
        if at + 4 > len(data):
            raise CorruptModelError(f"{path}: it ends within its entries: no importance matrix")
        at += 4
        value: int = struct.unpack_from("<i", data, at - 4)[0]
        return value

    found: dict[str, Floats] = {}
    for _ in range(number()):
        n_name = number()
        if not 0 < n_name <= min(1024, len(data) - at):
            raise CorruptModelError(f"{path}: a name of {n_name} bytes: no importance matrix")
        name = data[at : at + n_name].decode("utf-8", "replace")
        at += n_name
        n_calls, n_values = number(), number()
        if n_values < 1 or n_values > (len(data) - at) // 4:
            raise CorruptModelError(f"{path}: {name} has {n_values} values, more than the file")
        values = np.frombuffer(data, "<f4", n_values, at).astype(np.float32)
        at += 4 * n_values
        found[name] = _judged(path, name, values).reshape(1, -1) / np.float32(max(1, n_calls))
    return found
