"""An adapter added to the matrices of a model's file, for good.

The smallm library has judged both files before Python reads them.  Matrices that the adapter does
not change are copied byte by byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._adapter import as_gguf
from .._catalog import Progress, _shown
from .._errors import UnsupportedModelError
from .._generate import number
from .._model import load
from ..quantize._formats import Bytes, Format, formats
from ..quantize._mix import TERNARY
from ..quantize._quantize import PIECE_VALUES
from ._adapter import Pair
from ._convert import Target, _need, encoded, gguf_writer, write_tensors
from ._families import Array

if TYPE_CHECKING:
    import gguf


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    progress: Progress | bool | None = None,
) -> Path:
    """Writes the model `base` with `adapter` in it as one GGUF file and gives its path.

    base: as for load(), not a split file.  adapter: a GGUF file or a folder that `peft` saved.
    out: the file to write; one that is there is replaced at the end.
    scale: what the adapter adds is multiplied by this, -1e6 .. 1e6.
    progress: called with (bytes done, bytes in all); None: a bar on a terminal; False: none.

    Changed matrices keep their format where smallm.quantize writes it, and are rounded to it once
    more; others, and ternary ones, become Q8_0.

    Errors are those of load(), with adapters; UnsupportedModelError for a split base, and where a
    value is beyond the format's range; OSError: it cannot be written.
    """
    factor = number("scale", scale, lambda x: abs(x) <= 1e6, "-1e6 .. 1e6")
    _need()
    import gguf

    target = Path(out)
    with load(base, adapters={"merged": adapter}, progress=progress) as model:
        path, info = model.info.path, model._info
    with as_gguf(os.fspath(adapter), info) as file:
        pairs = _read_pairs(file, factor)
    reader = gguf.GGUFReader(path)
    if "split.count" in reader.fields and reader.fields["split.count"].contents() > 1:
        raise UnsupportedModelError(f"{path}: a split file cannot be merged: join its parts first")
    with _shown(target.name, progress) as report:
        _write(target, reader, pairs, report)
    return target


def _read_pairs(path: str, factor: float) -> dict[str, Pair]:
    import gguf

    reader = gguf.GGUFReader(path)
    alpha = reader.fields.get(gguf.Keys.Adapter.LORA_ALPHA)
    value = 0.0 if alpha is None else float(alpha.contents())
    halves = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    pairs = {}
    for name, a in halves.items():
        matrix, _, kind = name.rpartition(".")
        if kind == "lora_a":
            rank = a.shape[0]
            pairs[matrix] = Pair(a, halves[f"{matrix}.lora_b"], factor * (value / rank or 1.0))
    return pairs


def _format_of(tensor: gguf.ReaderTensor, pairs: dict[str, Pair]) -> Format:
    own = formats()[tensor.tensor_type.name]
    kept = tensor.name not in pairs or (own.writable and own.name.lower() not in TERNARY)
    return own if kept else formats()["Q8_0"]


def _write(path: Path, reader: gguf.GGUFReader, pairs: dict[str, Pair], report: Progress) -> None:
    import gguf

    arch = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    targets = [
        Target(t.name, tuple(int(n) for n in t.shape[::-1]), _format_of(t, pairs), ())
        for t in reader.tensors
    ]
    sources = {t.name: t for t in reader.tensors}
    for name, pair in list(pairs.items()):
        scale = sources.get(f"{name.removesuffix('.weight')}.scale")
        if scale is not None:  # the matrix is what stands in the file times this
            pairs[name] = pair._replace(scale=pair.scale / float(scale.data[0]))
    with gguf_writer(path, arch) as writer:
        for key, field in reader.fields.items():
            if key.startswith("GGUF.") or key == gguf.Keys.General.ARCHITECTURE:
                continue
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
        writer.data_alignment = reader.alignment
        write_tensors(
            writer, targets, lambda t: _blocks(sources[t.name], t, pairs.get(t.name)), report
        )


def _blocks(
    source: gguf.ReaderTensor, target: Target, pair: Pair | None
) -> Iterator[Bytes] | Iterator[Array]:
    """The bytes of the tensor in order, some rows at a time."""
    rows = source.data.reshape(-1, source.data.shape[-1])
    step = max(1, PIECE_VALUES // target.shape[-1])
    parts = (rows[first : first + step] for first in range(0, len(rows), step))
    return parts if pair is None else encoded(target, _sums(source, parts, pair))


def _sums(source: gguf.ReaderTensor, parts: Iterator[Any], pair: Pair) -> Iterator[Array]:
    import gguf

    first = 0
    for part in parts:
        values = gguf.quants.dequantize(part, source.tensor_type).astype(np.float64)
        high = pair.b[first : first + len(values)].astype(np.float64)
        first += len(values)
        values += pair.scale * (high @ pair.a.astype(np.float64))
        yield values.astype(np.float32)
