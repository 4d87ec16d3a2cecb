"""A file to a file, a piece of a tensor at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from .._catalog import Progress, _shown
from .._errors import CorruptModelError, ModelNotFoundError, SmallmError, UnsupportedModelError
from .._files import whole_file
from .._generate import integer
from ._formats import Floats, Format, formats, rewrite
from ._gguf import (
    Header,
    TensorInfo,
    encode_key,
    padding,
    read_header,
    read_pieces,
    write_header,
)
from ._imatrix import read_importance
from ._mix import Choice, Matrix, choose, file_type, judge_rule, judge_type, query_groups

PIECE_VALUES = 1 << 21  # quantized at a time: some 50 ms, between which Ctrl-C is heard
FLOATS = ("F32", "F16", "BF16")
QUANTIZATION_VERSION = 2
_REPLACED = ("general.file_type", "general.quantization_version")


class Quantized(NamedTuple):
    """What was written."""

    path: Path
    size: int  #: bytes of the file
    bits_per_weight: float  #: over all tensors
    tensors: dict[str, int]  #: how many have which format
    narrow: dict[str, int]  #: "IQ4_NL for Q4_K": how many, as no 256 divides their rows


class _Job(NamedTuple):
    tensor: TensorInfo
    source: Format
    target: Format
    importance: Floats | None  # [n_experts or 1, n_cols]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.dims[::-1]

    def n_bytes(self, format: Format) -> int:
        return self.tensor.n_values // format.n_values * format.n_bytes


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str,
    *,
    imatrix: str | os.PathLike[str] | None = None,
    keep: Iterable[str] = (),
    requantize: bool = False,
    threads: int | None = None,
    progress: Progress | bool | None = None,
) -> Quantized:
    """Writes the model `source`, a GGUF file, with its matrices in other formats.

    out: the file to write, not `source`; one that is there is replaced at the end.
    type: one of TYPES.  Norms, biases and the like stay as they are.  Rows that do not divide into
        a format's blocks get another format, which the result tells.
    imatrix: a file of save_importance() or llama.cpp's llama-imatrix: where errors matter.
    keep: "PATTERN=TYPE" each: matrices of such a name (with * and ?) get this format; the first
        that fits decides.
    requantize: also matrices that are quantized already, which then lose twice.
    threads: 1 .. 256; None: the physical cores.  The file is the same for any number.
    progress: called with (bytes done, bytes in all); None: a bar on a terminal; False: none.

    ValueError: an argument is wrong.  ModelNotFoundError, CorruptModelError, UnsupportedModelError:
    a file, key or tensor is missing, wrong or not to be written, by name.  OSError: it cannot be
    written.  Memory: some 30 MB.
    """
    type_name = judge_type(type)
    rules = [judge_rule(rule) for rule in keep]
    if threads is not None:
        integer("threads", threads, 1, 256)
    path, target = Path(source), Path(out)
    header = read_header(path)
    _judge(header)
    if target.exists() and os.path.samefile(path, target):
        raise ValueError(f"{target} is the file to read: give another name")
    if not target.parent.is_dir():
        raise ModelNotFoundError(f"{target.parent}: no such folder")
    importance = {} if imatrix is None else read_importance(imatrix)
    choices = choose(
        type_name,
        [Matrix(t.name, t.dims[::-1]) for t in header.tensors],
        query_groups=_groups(header),
        keep=rules,
    )
    jobs = [_plan(header, t, choices.get(t.name), importance, requantize) for t in header.tensors]
    if imatrix is not None and not any(job.importance is not None for job in jobs):
        raise CorruptModelError(f"{imatrix}: none of its names is a matrix of {path}")
    keys = [key.data for name, key in header.keys.items() if not _is_replaced(name)]
    keys.append(encode_key("general.file_type", file_type(type_name)))
    keys.append(encode_key("general.quantization_version", QUANTIZATION_VERSION))
    if imatrix is not None:
        keys.append(encode_key("quantize.imatrix.file", Path(imatrix).name))
    with _shown(target.name, progress) as report:
        _write(target, header, keys, jobs, threads, report)
    return _summary(target, jobs, choices)


def _is_replaced(key: str) -> bool:
    return key in _REPLACED or key.startswith("quantize.imatrix.")


def _judge(header: Header) -> None:
    if header.number("split.count") > 1:
        raise UnsupportedModelError(
            f"{header.path}: one part of a split file: join its parts first"
        )
    kind = header.text("general.type") or "model"
    if kind != "model":
        raise UnsupportedModelError(f"{header.path}: general.type is {kind!r}, not 'model'")
    if not header.tensors:
        raise CorruptModelError(f"{header.path}: it has no tensors")


def _groups(header: Header) -> int:
    arch = header.text("general.architecture")
    heads = [header.number(f"{arch}.attention.head_count{kv}") for kv in ("", "_kv")]
    return query_groups(*heads)


def _plan(
    header: Header,
    tensor: TensorInfo,
    choice: Choice | None,
    importance: dict[str, Floats],
    requantize: bool,
) -> _Job:
    where = f"{header.path}: {tensor.name}"
    source = next((f for f in formats().values() if f.id == tensor.type), None)
    if source is None:
        raise UnsupportedModelError(
            f"{where} is of the weight format {tensor.type}, which is unknown"
        )
    if tensor.dims[0] % source.n_values or tensor.n_values < 1:
        raise CorruptModelError(f"{where} has the shape {list(tensor.dims)} in {source.name}")
    job = _Job(tensor, source, source if choice is None else choice.format, None)
    if tensor.begin + job.n_bytes(source) > header.n_file_bytes:
        raise CorruptModelError(
            f"{where} ends at byte {tensor.begin + job.n_bytes(source)} of {header.n_file_bytes}"
        )
    if source == job.target:
        return job
    if source.name not in FLOATS and not requantize:
        raise ValueError(
            f"{where} is {source.name} already: take the F16 or F32 file, or say --requantize "
            "(requantize=True), which loses twice"
        )
    weights = importance.get(tensor.name)
    if weights is not None and job.target.name not in FLOATS:
        n_experts = job.shape[0] if len(job.shape) > 2 else 1
        if weights.size == n_experts * tensor.dims[0]:
            weights = weights.reshape(n_experts, tensor.dims[0])
        elif weights.size != tensor.dims[0]:
            raise CorruptModelError(
                f"the importance of {tensor.name} has {weights.size} values; its rows have "
                f"{tensor.dims[0]}"
            )
        job = job._replace(importance=weights)
    return job


def _write(
    path: Path,
    header: Header,
    keys: list[bytes],
    jobs: list[_Job],
    threads: int | None,
    report: Progress,
) -> None:
    done, total = 0, sum(job.n_bytes(job.target) for job in jobs)
    infos = [(j.tensor.name, j.tensor.dims, j.target.id, j.n_bytes(j.target)) for j in jobs]
    with whole_file(path) as name, open(header.path, "rb") as file, open(name, "wb") as to:
        write_header(to, keys, infos, header.alignment)
        for job in jobs:
            for piece in _pieces(file, header, job, threads):
                to.write(piece)
                done += len(piece)
                report(done, total)
            to.write(padding(job.n_bytes(job.target), header.alignment))


def _pieces(
    file: BinaryIO, header: Header, job: _Job, threads: int | None
) -> Iterator[bytearray | memoryview]:
    n_cols = job.tensor.dims[0]
    row = job.source.row_bytes(n_cols)
    n_rows = job.tensor.n_values // n_cols
    step = row * max(1, PIECE_VALUES // n_cols)
    if job.source == job.target:
        yield from read_pieces(file, header, job.tensor, 0, n_rows * row, step)
        return
    groups = [None] if job.importance is None else list(job.importance)
    n_group = n_rows // len(groups)  # rows: those of one expert
    for i, weights in enumerate(groups):
        first = i * n_group
        for piece in read_pieces(file, header, job.tensor, first * row, n_group * row, step):
            data = np.frombuffer(piece, np.uint8)
            try:
                made = rewrite(
                    data, job.source, job.target, n_cols, importance=weights, threads=threads
                )
            except SmallmError as error:
                place = f"{header.path}: {job.tensor.name}, counted from row {first}"
                raise error.__class__(f"{place}: {error}") from None
            first += len(made)
            yield made.reshape(-1).data


def _summary(path: Path, jobs: list[_Job], choices: dict[str, Choice]) -> Quantized:
    narrow = Counter(
        f"{c.format.name} for {c.wanted}" for c in choices.values() if c.format.name != c.wanted
    )
    n_bits = 8 * sum(job.n_bytes(job.target) for job in jobs)
    n_values = sum(job.tensor.n_values for job in jobs)
    return Quantized(
        path,
        path.stat().st_size,
        n_bits / n_values,
        dict(Counter(job.target.name for job in jobs).most_common()),
        dict(narrow.most_common()),
    )
