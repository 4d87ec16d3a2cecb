"""Adapters as files that the C library reads; folders that `peft` saved become temporary ones."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._binding import CData, text
from ._errors import ModelNotFoundError


@contextmanager
def as_gguf(path: str, model: CData) -> Iterator[str]:
    """The path of a GGUF adapter while the block runs.  model: a `smallm_model_info`."""
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise ModelNotFoundError(f"{path}: no such adapter, neither a file nor a folder")
        yield path
        return
    from .convert._adapter import Base, convert_adapter

    base = Base(
        architecture=text(model.architecture),
        layers=model.n_layer,
        embedding=model.n_embd,
        heads=model.n_head,
        kv_heads=model.n_head_kv,
        head=model.head_size,
        feed_forward=model.n_ff,
    )
    with tempfile.TemporaryDirectory(prefix="smallm-") as folder:
        out = Path(folder) / "adapter.gguf"
        convert_adapter(Path(path), base, out)
        yield str(out)
