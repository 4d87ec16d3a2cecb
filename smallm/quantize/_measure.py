"""Importance of a model's columns, from a text.

The text is cut into windows as smallm.eval.perplexity() does it.  Each is run by itself, all of its
tokens count, and the sums have the same bits for any number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._binding import check, ffi, lib, new, on, text
from .._errors import ModelNotFoundError, UnsupportedModelError
from .._generate import Stream, finish, submit
from .._model import Model, _Handles
from ..eval._quality import Report, judge_windows, text_tokens
from ._imatrix import Statistic, write_importance


class Importance(NamedTuple):
    """What was measured and written."""

    path: Path
    matrices: int
    tokens: int  #: that were run
    windows: int
    ctx: int  #: tokens in a window
    unseen: dict[str, int]  #: by tensor of experts, how many of them no token chose


def save_importance(
    model: Model,
    text: str | Sequence[int],
    path: str | os.PathLike[str],
    *,
    ctx: int = 512,
    max_windows: int | None = None,
    dataset: str = "text",
    progress: Report | None = None,
) -> Importance:
    """Measures on `text` (or its tokens) what each matrix of the layers of `model` is multiplied
    with, and writes the squares to the file `path`, for quantize(imatrix=): an importance matrix
    as llama.cpp's llama-imatrix writes it.  Some hundred thousand tokens of the kind that the model
    is for are enough; the head is left out.

    ctx: tokens in a window, 3 .. the model's context.
    max_windows: stop after so many.
    dataset: what the text is called in the file.
    progress: called with (tokens done, tokens in all).

    An expert that no token chooses has no importance: quantize() then takes all of its columns for
    alike.  ValueError: the text is too short for one window.  UnsupportedModelError: an
    encoder-decoder.  OSError: the file cannot be written.  It is written beside its name and
    renamed.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model must be a smallm.Model, not {type(model).__name__}")
    if model._info.decoder_start >= 0:
        raise UnsupportedModelError(
            f"{model.info.path} is an encoder-decoder: its importance cannot be measured on a text "
            "by itself"
        )
    out = Path(path)
    if not out.parent.is_dir():
        raise ModelNotFoundError(f"{out.parent}: no such folder")
    judged = judge_windows(model, text_tokens(model, text), ctx, None, max_windows)
    handles = model._observer(judged.ctx)
    total = len(judged.windows) * judged.ctx
    room = np.empty(model.info.embedding, np.float32)
    for i, window in enumerate(judged.windows):
        ids = judged.tokens[window.begin : window.end]
        if model._bos_added is not None:
            ids[0] = model._bos_added
        # What is asked for is the least that any model gives.
        buffer = ffi.from_buffer("float[]", room, require_writable=True)
        finish([Stream(model, submit(lambda: handles.engine, ids, None, embedding=buffer), 0, -1)])
        if progress is not None:
            progress((i + 1) * judged.ctx, total)
    found = _statistics(handles)
    write_importance(out, found, dataset=dataset, windows=len(judged.windows), ctx=judged.ctx)
    unseen = {name: int((s.counts == 0).sum()) for name, s in found.items()}
    return Importance(
        path=out,
        matrices=len(found),
        tokens=total,
        windows=len(judged.windows),
        ctx=judged.ctx,
        unseen={name: n for name, n in unseen.items() if n},
    )


def _statistics(handles: _Handles) -> dict[str, Statistic]:
    """By matrix, in the order of the layers."""
    found: dict[str, Statistic] = {}
    entry, error = new("statistic"), new("error")
    while True:
        at = (lib.smallm_engine_statistic, len(found), entry)
        if check(on(handles.engine, *at, ffi.NULL, ffi.NULL, error), error) == lib.SMALLM_DONE:
            return found
        squares = np.empty((entry.n_experts, entry.n_cols), np.float64)
        counts = np.empty(entry.n_experts, np.uint64)
        buffers = (
            ffi.from_buffer("double[]", squares, require_writable=True),
            ffi.from_buffer("uint64_t[]", counts, require_writable=True),
        )
        check(on(handles.engine, *at, *buffers, error), error)
        found[text(entry.name)] = Statistic(squares, counts)
