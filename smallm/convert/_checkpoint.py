"""The tensors of a folder's safetensors files, read piece by piece.

The `safetensors` package judges each header; tensors are then read by offset, a block of rows at a
time, since numpy has no bfloat16 and whole tables need not be in memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from ._config import read_json

Array = np.ndarray[Any, Any]

INDEX = "model.safetensors.index.json"
FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
}
NARROW = ("F16", "BF16")
STORED: dict[str, np.dtype[Any]] = {
    **FLOATS,
    "BF16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, not in memory."""

    name: str
    path: Path
    kind: str  # as safetensors names it
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def is_float(self) -> bool:
        return self.kind in FLOATS or self.kind == "BF16"

    def read(self, first: int = 0, n: int | None = None, *, narrow: bool = False) -> Array:
        """Rows first .. first + n - 1 (None: all), floats as float32; narrow: float16 as it is, and
        the bits of bfloat16 as uint16."""
        rows = self.shape[0] if self.shape else 1
        n = rows - first if n is None else n
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        dtype = STORED[self.kind]
        start = self.offset + first * width * dtype.itemsize
        values: Array = np.fromfile(self.path, dtype, n * width, offset=start)
        if values.size != n * width:
            raise CorruptModelError(f"{self.path}: the file ends inside of {self.name}")
        if narrow and self.kind in NARROW:
            pass
        elif self.kind == "BF16":
            wide = values.astype(np.uint32)
            wide <<= 16
            values = wide.view(np.float32)
        elif self.is_float:
            values = values.astype(np.float32, copy=False)
        shaped: Array = values.reshape((n, *self.shape[1:]) if self.shape else ())
        return shaped


def _read_header(path: Path) -> dict[str, Tensor]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # the package has judged the header
        with path.open("rb") as file:
            n = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(n))
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file") from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise CorruptModelError(f"{path}: not a safetensors file: {error}") from None
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in STORED:
            raise UnsupportedModelError(
                f"{path}: the tensor {name} is of type {entry['dtype']}; "
                f"this version takes {', '.join(STORED)}"
            )
        offset = 8 + n + entry["data_offsets"][0]
        found[name] = Tensor(name, path, entry["dtype"], tuple(entry["shape"]), offset)
    return found


def open_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files its index names, by name."""
    index = folder / INDEX
    if not index.exists():
        whole = folder / "model.safetensors"
        if whole.exists():
            return _read_header(whole)
        pickled = sorted(folder.glob("*.bin")) or sorted(folder.glob("*.pt*"))
        if pickled:
            raise UnsupportedModelError(
                f"{folder}: the weights are in {pickled[0].name}, a pickle that could run code; "
                "save them as safetensors first: transformers' "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise ModelNotFoundError(f"{folder}: neither model.safetensors nor {INDEX} is here")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CorruptModelError(f"{index}: weight_map is missing or empty")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if not isinstance(file, str) or Path(file).name != file:
            raise CorruptModelError(f"{index}: weight_map names {file!r}, not a file beside it")
        for name, tensor in _read_header(folder / file).items():
            if places.get(name) != file:
                raise CorruptModelError(
                    f"{folder / file}: holds {name}, which {index.name} places in "
                    f"{places.get(name)}"
                )
            tensors[name] = tensor
    lost = [name for name in places if name not in tensors]
    if lost:
        raise CorruptModelError(f"{index}: {lost[0]} is not in {places[lost[0]]}")
    return tensors
