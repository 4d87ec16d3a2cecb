"""A folder to a file: plan everything, then stream tensor by tensor.

The plan holds names, shapes and types of all tensors and every key; whatever is unknown, missing
or contradictory is refused while it is made.  Writing goes to a temporary file beside the result,
which is renamed at the end: there is never a broken file of the wanted name.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from .._catalog import Progress, _shown, is_offline
from .._errors import (
    CorruptModelError,
    DownloadError,
    ModelNotFoundError,
    SmallmError,
    UnsupportedModelError,
)
from .._files import whole_file
from ..quantize._formats import Bytes, Format, formats, rewrite
from ..quantize._mix import (
    TERNARY,
    Matrix,
    choose,
    file_type,
    judge_type,
    query_groups,
)
from ..quantize._quantize import PIECE_VALUES, QUANTIZATION_VERSION
from ._checkpoint import Tensor, open_checkpoint
from ._config import Config, judged, read_json
from ._families import DROPPED, Array, Family, Keys, Piece, find, pooling
from ._tokenizer import read_tokenizer

if TYPE_CHECKING:
    import gguf

IMAGES = ("vision_tower.", "multi_modal_projector.")  # of models that see them, what does


@dataclass(frozen=True)
class Source:
    """One piece of a tensor of the file: a tensor of the checkpoint and what becomes of it."""

    tensor: Tensor
    piece: Piece


@dataclass(frozen=True)
class Target:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]  # slowest dimension first
    format: Format
    sources: tuple[Source, ...]  # empty: `values`
    values: Array | None = None

    @property
    def n_bytes(self) -> int:
        return self.format.row_bytes(int(np.prod(self.shape, dtype=np.int64)))

    def blocks(self) -> Iterator[Array]:
        """Values in order, some rows at a time, as `encoded` takes them."""
        if not self.sources:
            assert self.values is not None
            yield self.values
            return
        pieces = [source.piece for source in self.sources]
        tensors = [source.tensor for source in self.sources]
        plain = len(pieces) == 1 and pieces[0].make is None
        if plain or all(piece.by_row for piece in pieces):
            rows = tensors[0].shape[0] if tensors[0].shape else 1
            size = max(int(np.prod(tensor.shape)) for tensor in tensors)
            step = max(1, PIECE_VALUES * rows // max(1, size))
            for at in range(0, rows, step):
                n = min(step, rows - at)
                arrays = [tensor.read(at, n, narrow=plain) for tensor in tensors]
                yield self._made(pieces, arrays)
        elif pieces[0].join is np.stack:
            for piece, tensor in zip(pieces, tensors, strict=True):
                yield self._made([piece], [tensor.read()])
        else:
            yield self._made(pieces, [tensor.read() for tensor in tensors])

    def _made(self, pieces: list[Piece], arrays: list[Array]) -> Array:
        try:
            return _assemble(pieces, arrays)
        except ValueError as error:
            tensor = self.sources[0].tensor
            raise CorruptModelError(f"{tensor.path}: {tensor.name}: {error}") from None


def _assemble(pieces: list[Piece], arrays: list[Array]) -> Array:
    made = [a if p.make is None else p.make(a) for p, a in zip(pieces, arrays, strict=True)]
    return made[0] if len(made) == 1 and pieces[0].join is np.stack else pieces[0].join(made)


def _need() -> None:
    try:
        import gguf
        import safetensors  # noqa: F401
    except ImportError as error:
        raise SmallmError(
            f"converting needs the package {error.name}: pip install 'smallm[convert]'"
        ) from None
    del gguf


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: str = "f16",
    progress: Progress | bool | None = None,
) -> Path:
    """Converts a Hugging Face checkpoint into one GGUF file and gives the file's path.

    source: a folder with config.json, safetensors files and tokenizer files, or "hf:user/repo",
        which is fetched into the hub's own cache (and needs the extra `hf`).
    out: the file to write; one that is there is replaced at the end.
    type: one of TYPES, and what smallm.quantize.quantize() makes of an F32 file.  Norms, biases
        and the like are F32.  tq2_0 and tq1_0 are for models whose layers' weights are ternary,
        which is judged.  What a checkpoint has in MXFP4 stays so.
    progress: called with (bytes done, bytes in all); None: a bar on a terminal; False: none.

    ModelNotFoundError, CorruptModelError, UnsupportedModelError: a file, key, tensor or value is
    missing, wrong or unknown, by name.  ValueError: unknown type.  OSError: it cannot be written.
    Memory: some 50 MB, a tokenizer's vocabulary, and where a tensor is not stored as the file has
    it, that tensor in float32.
    """
    type_name = judge_type(type)
    _need()
    folder, target = _folder(source, progress), Path(out)
    if not target.parent.is_dir():
        raise ModelNotFoundError(f"{target.parent}: no such folder")
    config = Config(folder / "config.json", read_json(folder / "config.json"))
    checkpoint = open_checkpoint(folder)
    name = source.rsplit("/", 1)[-1] if _is_remote(source) else folder.resolve().name
    keys = _general(name, folder)
    with judged(config.path):
        family, config = find(config)
        for read in (*family.keys, pooling):
            for key, value in read(config).items():
                whole = key.startswith("tokenizer.")
                keys[key if whole else f"{family.arch}.{key}"] = value
        heads = [keys.get(f"{family.arch}.attention.head_count{kv}") for kv in ("", "_kv")]
        tensors = plan(config, family, checkpoint, type_name, query_groups(*heads))
    table = next(t for t in tensors if t.name == "token_embd.weight")
    with judged(folder / "tokenizer.json"):
        keys |= read_tokenizer(folder, config, table.shape[0])
    with _shown(target.name, progress) as report:
        _write(target, family.arch, keys, tensors, type_name, report)
    return target


# Keys of generation_config.json that GGUF has names for.
_SAMPLING = {
    "temperature": ("temp", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "repetition_penalty": ("penalty_repeat", float),
}


def _general(name: str, folder: Path) -> Keys:
    """general.*: the model's name and how it wants to be sampled."""
    keys: Keys = {"general.type": "model", "general.name": name}
    path = folder / "generation_config.json"
    wanted = read_json(path) if path.exists() else {}
    for key, (ggml, kind) in _SAMPLING.items():
        value = wanted.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            keys[f"general.sampling.{ggml}"] = kind(value)
    return keys


def _is_remote(source: str | os.PathLike[str]) -> TypeGuard[str]:
    return isinstance(source, str) and source.startswith("hf:")


def _folder(source: str | os.PathLike[str], progress: Progress | bool | None) -> Path:
    if _is_remote(source):
        if is_offline(False):
            raise DownloadError(f"{source}: offline mode forbids fetching it")
        from .._download import checkpoint_from_hub

        with _shown(source, progress) as report:
            return checkpoint_from_hub(source, report)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ModelNotFoundError(f'{folder}: no such folder; or give "hf:user/repo"')
    return folder


# ---- the plan ------------------------------------------------------------------------------------


def plan(
    config: Config, family: Family, checkpoint: dict[str, Tensor], type_name: str, groups: int
) -> list[Target]:
    """All tensors of the file.  Every tensor of the checkpoint is used, or dropped by a rule."""
    sources: dict[str, list[Source]] = {}
    lookup = _lookup(family, config)
    tied = family.tied(config)
    for name, tensor in checkpoint.items():
        if tied and name == "lm_head.weight":
            continue  # a copy of the embedding table that nobody reads
        for piece in lookup(name, tensor):
            if piece.make is None and not tensor.is_float:
                raise UnsupportedModelError(
                    f"{tensor.path}: the tensor {name} is of type {tensor.kind}, as if it were "
                    "quantized; floating-point weights are wanted"
                )
            sources.setdefault(piece.target, []).append(Source(tensor, piece))
    if "token_embd.weight" not in sources:
        raise CorruptModelError(f"{config.path.parent}: no tensor is the embedding table")
    _judge_layers(config, family, set(sources))
    _judge_head(config, "output.weight" in sources)
    shapes = {}
    for name, found in sources.items():
        found.sort(key=lambda s: s.piece.part)
        if [s.piece.part for s in found] != list(range(len(found))):
            names = ", ".join(s.tensor.name for s in found[:4])
            raise CorruptModelError(f"{config.path.parent}: {names} do not add up to one {name}")
        try:
            shapes[name] = _shape(
                tuple(s.piece for s in found),
                tuple((s.tensor.shape, s.tensor.is_float) for s in found),
            )
        except ValueError as error:
            raise CorruptModelError(
                f"{found[0].tensor.path}: {found[0].tensor.name} has the shape "
                f"{list(found[0].tensor.shape)}, which does not fit: {error}"
            ) from None
    matrices = [Matrix(name, shape) for name, shape in shapes.items()]
    choices = choose(type_name, matrices, query_groups=groups)
    known = formats()
    targets = []
    for name, found in sources.items():
        shape, fixed = shapes[name], found[0].piece.type
        choice = known["F32"] if name not in choices else choices[name].format
        if fixed is not None:
            choice = known[fixed]
            shape = (*shape[:-1], shape[-1] // choice.n_bytes * choice.n_values)
        targets.append(Target(name, shape, choice, tuple(found)))
    for name, values in family.extra(config).items():
        targets.append(Target(name, values.shape, known["F32"], (), values.astype(np.float32)))
    return sorted(targets, key=_place)


def _place(target: Target) -> tuple[int, str]:
    """Tensors of no layer come first, then layer by layer."""
    match = re.match(r"(?:enc\.|dec\.)?blk\.(\d+)\.", target.name)
    return (int(match[1]) if match is not None else -1), target.name


def _judge_head(config: Config, has_head: bool) -> None:
    """Without a head the embedding table is it: only where the config does not say otherwise, or
    where nobody wants logits."""
    embeds = (config.path.parent / "modules.json").is_file()
    classes = config.get("architectures", default=[])
    headless = any(name.endswith("Model") for name in classes)
    if not (has_head or embeds or headless) and config.get("tie_word_embeddings") is False:
        raise CorruptModelError(
            f"{config.path.parent}: no tensor is the output head, and {config.path.name} says that "
            "it is not the embedding table (tie_word_embeddings)"
        )


def _judge_layers(config: Config, family: Family, names: set[str]) -> None:
    stacks = family.stacks(config)
    layers: dict[tuple[str, int], set[str]] = {
        (stack, i): set() for stack, n in stacks.items() for i in range(n)
    }
    for name in names:
        match = re.fullmatch(r"((?:enc\.|dec\.)?)blk\.(\d+)\.(.*)", name)
        if match is not None:
            layers.setdefault((match[1], int(match[2])), set()).add(match[3])
    every = set().union(*layers.values()) if family.uniform else set()
    for (stack, i), found in layers.items():
        lacking = sorted(every - found) or ([] if found else ["its tensors"])
        if lacking:
            raise CorruptModelError(
                f"{config.path.parent}: {stack}layer {i} of {stacks.get(stack, 0)} lacks "
                f"{', '.join(lacking)}"
            )


def _lookup(family: Family, config: Config) -> Callable[[str, Tensor], list[Piece]]:
    """What becomes of a tensor: the family's rules, then the gguf package's names."""
    import gguf

    arch = next((a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == family.arch), None)
    if arch is None:
        raise SmallmError(
            f"the package gguf that is installed does not know {family.arch}: pip install -U gguf"
        )
    names = gguf.get_tensor_name_map(arch, max(family.stacks(config).values()))
    rules = [(re.compile(pattern), make) for pattern, make in (*family.rules, *DROPPED)]

    def lookup(name: str, tensor: Tensor) -> list[Piece]:
        if family.text is not None:
            if name.startswith(IMAGES):
                return []
            name = name.removeprefix("language_model.")
        for known in (name, f"model.{name}"):  # models without a head may have shorter names
            for pattern, make in rules:
                match = pattern.fullmatch(known)
                if match is not None:
                    return make(match, config)
            target = names.get_name(known, try_suffixes=(".weight", ".bias"))
            if target is not None:
                return [Piece(target)]
        raise UnsupportedModelError(
            f"{tensor.path}: the tensor {name} is not one that {family.arch} has "
            f"(layers: {config.n_layer})"
        )

    return lookup


@lru_cache(maxsize=256)
def _shape(
    pieces: tuple[Piece, ...], inputs: tuple[tuple[tuple[int, ...], bool], ...]
) -> tuple[int, ...]:
    """The shape that the pieces give together, from a run on zeros of a byte each."""
    if len(pieces) == 1 and pieces[0].make is None:
        return inputs[0][0]
    zeros = [np.zeros(shape, np.uint8) for shape, _ in inputs]
    shape: tuple[int, ...] = _assemble(list(pieces), zeros).shape
    return shape


# ---- writing -------------------------------------------------------------------------------------


def _scalar(key: str, value: Any) -> gguf.GGUFValueType:
    """The kind that llama.cpp's files give a value.  CorruptModelError: none has room for it."""
    from gguf import GGUFValueType as Kind

    if isinstance(value, bool):
        return Kind.BOOL
    if isinstance(value, int) and -(1 << 31) <= value < 1 << 32:
        return Kind.UINT32 if value >= 0 else Kind.INT32
    if isinstance(value, float) and abs(value) <= np.finfo(np.float32).max:
        return Kind.FLOAT32
    if isinstance(value, str):
        return Kind.STRING
    raise CorruptModelError(f"{key} would be {value!r}, which a GGUF file has no room for")


def _kind(key: str, value: Any) -> tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]:
    """Value, its kind and that of its elements, for GGUFWriter."""
    from gguf import GGUFValueType as Kind

    if isinstance(value, np.ndarray):
        kinds = {"i": Kind.INT32, "f": Kind.FLOAT32, "b": Kind.BOOL}
        return value.tolist(), Kind.ARRAY, kinds[value.dtype.kind]
    if isinstance(value, bytes):
        return value, Kind.ARRAY, Kind.UINT8
    if isinstance(value, (list, tuple)):
        inner = {_scalar(key, item) for item in value} or {Kind.STRING}
        if len(inner) > 1:
            raise CorruptModelError(f"{key} would have elements of several kinds")
        return list(value), Kind.ARRAY, inner.pop()
    return value, _scalar(key, value), None


# What holds the values of which format.
SOURCES = {"<f4": "F32", "<f2": "F16", "<u2": "BF16"}


def encoded(target: Target, blocks: Iterator[Array]) -> Iterator[Bytes]:
    """The bytes of a tensor, of which blocks of rows come: values, the bits of bfloat16 as uint16,
    or the tensor's own bytes as uint8.

    CorruptModelError, UnsupportedModelError: a value is not finite, or not to be written in the
    target's format."""
    name = f"{target.sources[0].tensor.name} (for {target.name})" if target.sources else target.name
    known, n_rows = formats(), 0
    for values in blocks:
        if values.dtype == np.uint8:
            yield values
            continue
        source = SOURCES.get(values.dtype.str)
        if source is None:
            source, values = "F32", values.astype(np.float32)
        values = np.ascontiguousarray(values)
        n_cols = values.shape[-1] if values.shape else 1
        try:
            made = rewrite(values, known[source], target.format, n_cols)
        except SmallmError as error:
            place = f"{name}, counted from row {n_rows}" if n_rows else name
            hint = "; take bf16, f32 or q8_0" if target.format.name == "F16" else ""
            raise error.__class__(f"{place}: {error}{hint}") from None
        if target.format.name.lower() in TERNARY:
            back, own = (
                rewrite(data, format, known["F32"], n_cols).view(np.float32)
                for data, format in ((made, target.format), (values, known[source]))
            )
            lost = np.abs(back - own).max(initial=0)
            if lost > 1e-3 * np.abs(own).max(initial=0):  # a scale has 11 bits
                raise UnsupportedModelError(
                    f"{name}: a block holds other values than -s, 0 and s; take another type"
                )
        n_rows += len(made)
        yield made


def _write(
    path: Path, arch: str, keys: Keys, targets: list[Target], type_name: str, report: Progress
) -> None:
    kinds = {key: _kind(key, value) for key, value in keys.items()}
    with gguf_writer(path, arch) as writer:
        for key, (value, kind, inner) in kinds.items():
            writer.add_key_value(key, value, kind, sub_type=inner)
        writer.add_file_type(file_type(type_name))
        writer.add_quantization_version(QUANTIZATION_VERSION)
        write_tensors(writer, targets, lambda t: encoded(t, t.blocks()), report)


def write_tensors(
    writer: gguf.GGUFWriter,
    targets: list[Target],
    data: Callable[[Target], Iterator[Array]],
    report: Progress,
) -> None:
    """Writes header, keys as the writer has got them, and all tensors, whose bytes `data` gives."""
    import gguf

    for t in targets:
        kind = gguf.GGMLQuantizationType(t.format.id)
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.n_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    done, total = 0, sum(t.n_bytes for t in targets)
    for t in targets:
        begin = file.tell()
        for block in data(t):
            file.write(np.ascontiguousarray(block).data)
            report(done + file.tell() - begin, total)
        if file.tell() - begin != t.n_bytes:
            raise CorruptModelError(f"{t.name}: {file.tell() - begin} bytes, not {t.n_bytes}")
        done += t.n_bytes
        writer.write_padding(file, t.n_bytes)


@contextlib.contextmanager
def gguf_writer(path: Path, arch: str) -> Iterator[gguf.GGUFWriter]:
    """A writer of the file `path`, which is there and whole where all went well."""
    import gguf

    with whole_file(path) as name:
        writer = gguf.GGUFWriter(name, arch)
        try:
            yield writer
        except BaseException:
            with contextlib.suppress(OSError):
                writer.close()
            raise
        writer.close()
