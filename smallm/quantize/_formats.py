"""The C library's weight formats, and numbers from one into another."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._binding import check, ffi, lib, new, text

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class Format(NamedTuple):
    name: str  #: "Q4_K"
    id: int  #: in GGUF files
    n_values: int  #: of a block
    n_bytes: int  #: of a block
    writable: bool

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of a row; n_cols: whole blocks."""
        return n_cols // self.n_values * self.n_bytes


@lru_cache(maxsize=1)
def formats() -> dict[str, Format]:
    """All that the library reads, by name."""
    found: dict[str, Format] = {}
    error, entry = new("error"), new("format")
    while check(lib.smallm_get_format(len(found), entry, error), error) != lib.SMALLM_DONE:
        name = text(entry.name)
        found[name] = Format(
            name, entry.id, entry.n_block_values, entry.n_block_bytes, entry.writable
        )
    return found


def rewrite(
    data: npt.NDArray[Any],
    source: Format,
    target: Format,
    n_cols: int,
    *,
    importance: Floats | None = None,
    threads: int | None = None,
) -> Bytes:
    """Rows of n_cols values in another format: uint8 [n_rows, bytes of a row].

    data: C-contiguous, the rows in `source`.  importance: [n_cols], how much errors in a column
    matter, or None.  CorruptModelError, UnsupportedModelError: a value cannot be written; the
    message names row and column.
    """
    n_rows = data.nbytes // source.row_bytes(n_cols)
    out = np.empty((n_rows, target.row_bytes(n_cols)), np.uint8)
    if n_rows == 0:
        return out
    params, error = new("quantize_params"), new("error")
    held: list[Any] = [ffi.from_buffer("char[]", data), ffi.from_buffer("char[]", out, True)]
    setattr(params, "from", source.id)
    params.to = target.id
    setattr(params, "in", held[0])
    params.out = held[1]
    params.n_in, params.n_out = data.nbytes, out.nbytes
    params.n_rows, params.n_cols = n_rows, n_cols
    params.n_threads = threads or 0
    if importance is not None:
        if importance.shape != (n_cols,):
            raise ValueError(f"importance has the shape {importance.shape}, not [{n_cols}]")
        held.append(ffi.from_buffer("float[]", np.ascontiguousarray(importance, np.float32)))
        params.importance = held[2]
    check(lib.smallm_quantize(params, error), error)
    return out
