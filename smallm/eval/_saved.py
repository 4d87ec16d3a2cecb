"""Distributions saved to a file, in the format that llama.cpp's llama-perplexity writes with
--kl-divergence-base, so that either reads what the other wrote.

Little-endian:

    8 bytes   "_logits_"
    int32     n_ctx, n_vocab, n_windows
    int32     tokens [n_windows][n_ctx], as tokenized: no window's first one is replaced by BOS yet
    rows      [n_windows][n_ctx - 1 - n_ctx / 2], one for each token that is scored, in order:
        float32  scale, low
        uint16   q [n_vocab], and one more where n_vocab is odd

ln p = low + scale q, which is off by 1.2e-4 at most.  `low` is the least one, or 16 below the best;
q 0 then stands for all that are below it, which are lost: where such a one is the text's own token,
the perplexity that is read off the file is too low.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from .._errors import ModelNotFoundError, SmallmError

MAGIC = b"_logits_"
RANGE = 16.0  # nats below the best that are kept

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def scored(ctx: int) -> int:
    """Tokens of a window of `ctx` that are scored: those after its first half."""
    return ctx - 1 - ctx // 2


def _row_type(n_vocab: int) -> np.dtype[np.void]:
    width = n_vocab + n_vocab % 2
    return np.dtype([("scale", "<f4"), ("low", "<f4"), ("q", "<u2", (width,))])


def write_head(file: BinaryIO, ctx: int, n_vocab: int, tokens: Iterable[int]) -> None:
    """tokens: those of whole windows."""
    ids = np.fromiter(tokens, np.dtype("<i4"))
    file.write(MAGIC + struct.pack("<iii", ctx, n_vocab, len(ids) // ctx))
    file.write(ids.tobytes())


def write_row(file: BinaryIO, logits: Floats, log_sum: float) -> None:
    """logits: [n_vocab] of one token that is scored; log_sum: ln of the sum of their exp."""
    high = logits.max()
    low = max(logits.min(), high - np.float32(RANGE))
    row = np.zeros((), _row_type(len(logits)))
    row["scale"], row["low"] = (high - low) / np.float32(65535), float(low) - log_sum
    if row["scale"] > 0:
        steps = np.rint((logits - low) * (1 / row["scale"]))
        row["q"][: len(logits)] = np.clip(steps, 0, 65535).astype(np.uint16)
    file.write(row.tobytes())


class SavedLogits:
    """A file of that format, judged but for its rows: those as they are read.

    Attributes: path, ctx, n_vocab, n_windows, tokens (int32 [n_windows * ctx]).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """ModelNotFoundError, SmallmError (of another kind, cut short, out of range)."""
        self.path = os.fspath(path)
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            raise ModelNotFoundError(f"{self.path}: no such file") from None
        try:
            self._read_head()
        except BaseException:
            self.close()
            raise

    def _read_head(self) -> None:
        head = self._file.read(20)
        if head[:8] != MAGIC or len(head) < 20:
            raise SmallmError(
                f"{self.path} holds no saved logits: it does not begin with {MAGIC!r}"
            )
        self.ctx, self.n_vocab, self.n_windows = struct.unpack("<iii", head[8:])
        for name, value, least in (
            ("n_ctx", self.ctx, 3),
            ("n_vocab", self.n_vocab, 1),
            ("n_windows", self.n_windows, 1),
        ):
            if value < least:
                raise SmallmError(f"{self.path}: {name} is {value}, and has to be at least {least}")
        self._type = _row_type(self.n_vocab)
        n_tokens = self.n_windows * self.ctx
        expected = 20 + 4 * n_tokens + self.n_windows * scored(self.ctx) * self._type.itemsize
        size = os.fstat(self._file.fileno()).st_size
        if size != expected:
            raise SmallmError(f"{self.path} has {size} bytes; by its head it has {expected}")
        self.tokens = np.frombuffer(self._file.read(4 * n_tokens), "<i4")
        if self.tokens.min() < 0 or self.tokens.max() >= self.n_vocab:
            raise SmallmError(f"{self.path}: a token is not within 0 .. {self.n_vocab - 1}")

    def __enter__(self) -> SavedLogits:
        return self

    def __exit__(self, *what: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def row(self) -> tuple[Doubles, npt.NDArray[np.bool_]]:
        """The next row: ln p, float64 [n_vocab], and which are lost: of these it is the most that
        they can have been."""
        data = self._file.read(self._type.itemsize)
        if len(data) < self._type.itemsize:
            raise SmallmError(f"{self.path} was cut while it was read")
        row = np.frombuffer(data, self._type)[0]
        scale, low = float(row["scale"]), float(row["low"])
        if not (0 <= scale <= 1 and -1e4 < low <= 1e-3):
            raise SmallmError(f"{self.path}: a row has the scale {scale} and the least value {low}")
        steps = row["q"][: self.n_vocab]
        return low + scale * steps.astype(np.float64), (steps == 0) & (scale * 65535 > RANGE - 1e-3)
