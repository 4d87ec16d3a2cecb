"""LoRA adapters that `peft` saved, as GGUF adapters.

A folder holds adapter_config.json and adapter_model.safetensors, with A [rank, k] and
B [n_rows, rank] for each matrix W of the checkpoint, which becomes W + scale B A.  Names, and what
happens to W's rows on the way into a file, are those of the base model's family; B's rows go the
same way.

In the file, adapter.lora.alpha is the config's where all matrices share it, and scales are alpha /
rank; else it is 0, which stands for scales of 1, and B is multiplied beforehand.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._errors import CorruptModelError, ModelNotFoundError, SmallmError, UnsupportedModelError
from ._checkpoint import Tensor, _read_header
from ._config import Config, judged, read_json
from ._convert import _lookup, _need
from ._families import FAMILIES, Array, Piece

# What may stand in adapter_config.json: it changes nothing that is stored, or is dealt with here.
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Values of init_lora_weights that leave the base model's weights as they are.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
# Patterns of modules that may take very long: repeated groups, and more than two repeats.
SLOW = re.compile(r"\)\s*[*+{]|\(\?[^:]|(?:[*+{].*){3}", re.DOTALL)
MAX_NAME = 300  # characters of a module's name, and of a pattern
NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Base:
    """The model that an adapter is for."""

    architecture: str
    layers: int
    embedding: int
    heads: int
    kv_heads: int
    head: int
    feed_forward: int

    def config(self, path: Path) -> Config:
        """What the rules of its family ask for."""
        values = {
            "num_hidden_layers": self.layers,
            "hidden_size": self.embedding,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "intermediate_size": self.feed_forward,
            "num_local_experts": 0,  # which no adapter changes
        }
        return Config(path, values)

    def may_have(self, rows: int, k: int) -> bool:
        """Whether the sizes are near those of one of the model's matrices, one of whose sides is
        never beyond the embedding's."""
        widest = max(
            8 * self.embedding, 2 * self.feed_forward, (self.heads + 2 * self.kv_heads) * self.head
        )
        return 0 < min(rows, k) <= self.embedding and max(rows, k) <= widest


class Pair(NamedTuple):
    """What is added to one matrix of the file: scale B A."""

    a: Array  # float32 [rank, k]
    b: Array  # float32 [n_rows, rank]
    scale: float


class Settings:
    """adapter_config.json, judged."""

    def __init__(self, folder: Path) -> None:
        self.config = c = Config(
            folder / "adapter_config.json", read_json(folder / "adapter_config.json")
        )
        if c.get("peft_type", default="LORA") != "LORA":
            raise c.refuse("peft_type", ["LORA"])
        if c.get("bias", default="none") != "none":
            raise c.refuse("bias", ["none"])
        if c.get("init_lora_weights", default=True) not in PLAIN_INITS:
            raise c.refuse("init_lora_weights", PLAIN_INITS)
        for name, value in c.values.items():
            if value and name not in HARMLESS:
                raise UnsupportedModelError(
                    f"{c.path}: {name} is {value!r}; this version takes adapters without it"
                )
        self.transposed = bool(c.get("fan_in_fan_out", default=False))
        self._rslora = bool(c.get("use_rslora", default=False))
        self._patterns = {name: self._pattern(name) for name in ("rank_pattern", "alpha_pattern")}

    def _pattern(self, name: str) -> dict[str, float]:
        values = self.config.get(name, default={})
        if not isinstance(values, dict) or not all(
            isinstance(v, (int, float)) and not isinstance(v, bool) for v in values.values()
        ):
            raise CorruptModelError(f"{self.config.path}: {name} is {values!r}")
        for key in values:
            if len(key) > MAX_NAME or SLOW.search(key):
                raise UnsupportedModelError(
                    f"{self.config.path}: {name} holds {key[:100]!r}; this version takes patterns "
                    f"of up to {MAX_NAME} characters and two repeats, none of them of a group"
                )
        return values

    def _of(self, pattern: str, module: str, default: float) -> float:
        for key, value in self._patterns[pattern].items():
            try:
                if re.fullmatch(rf"(?:.*\.)?(?:{key})", module):
                    return value
            except re.error as error:
                raise CorruptModelError(
                    f"{self.config.path}: {pattern} holds {key!r}: {error}"
                ) from None
        return default

    def rank(self, module: str) -> int:
        return int(self._of("rank_pattern", module, self.config.integer("r")))

    def scale(self, module: str, rank: int) -> tuple[float, float | None]:
        """What B A is multiplied by, and the alpha of which it is alpha / rank, if any."""
        alpha = float(self._of("alpha_pattern", module, self.config.number("lora_alpha")))
        if self._rslora:
            return alpha / math.sqrt(rank), None
        return alpha / rank, alpha


def convert_adapter(folder: Path, base: Base, out: Path) -> Path:
    """Writes the adapter of `folder` for `base` as the GGUF file `out`.

    ModelNotFoundError, CorruptModelError, UnsupportedModelError: a file, key, tensor or value is
    missing, wrong or unknown, by name.  SmallmError: the extra `convert` is not installed.
    """
    _need()
    import gguf

    alpha, pairs = read_adapter(folder, base)
    writer = gguf.GGUFWriter(out, base.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, pair in pairs.items():
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(pair.a, np.float32))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(pair.b, np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return out


def read_adapter(folder: Path, base: Base) -> tuple[float, dict[str, Pair]]:
    """adapter.lora.alpha and the pairs, by the names of the file's matrices; alpha 0: the scales
    stand in B."""
    with judged(folder / "adapter_config.json"):
        return _read_adapter(folder, base)


def _read_adapter(folder: Path, base: Base) -> tuple[float, dict[str, Pair]]:
    settings = Settings(folder)
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise ModelNotFoundError(
            f"{path}: no such file (a .bin is a pickle, which could run code: save the adapter as "
            "safetensors)"
        )
    found: dict[str, Pair] = {}
    alphas = set()
    for module, (a, b) in sorted(_pairs(_read_header(path)).items()):
        rank = settings.rank(module)
        if rank < 1 or a.shape[0] != rank or b.shape[1] != rank:
            raise CorruptModelError(
                f"{path}: {a.name} has the shape {list(a.shape)} and {b.name} {list(b.shape)}; "
                f"{settings.config.path.name} says that the rank is {rank}"
            )
        if not base.may_have(b.shape[0], a.shape[1]):
            raise CorruptModelError(
                f"{path}: {module} is changed by [{b.shape[0]}, {a.shape[1]}] values, which does "
                "not fit the model"
            )
        scale, alpha = settings.scale(module, rank)
        alphas.add(alpha)
        for name, low, high in _place(module, a, b, settings, base):
            if name in found:
                raise CorruptModelError(f"{path}: {module} and another module are both {name}")
            found[name] = Pair(low, high, scale)
    if not found:
        raise CorruptModelError(f"{path}: no matrix is changed")
    shared = alphas.pop() if len(alphas) == 1 else None
    if shared:
        return shared, found
    scaled = {n: Pair(p.a, p.b * np.float32(p.scale), 1.0) for n, p in found.items()}
    return 0.0, scaled


def _pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None or len(name) > MAX_NAME:
            raise UnsupportedModelError(
                f"{tensor.path}: the tensor {name[:MAX_NAME]} is not a lora_A or lora_B of a "
                "linear layer, which is what this version takes"
            )
        if not tensor.is_float or len(tensor.shape) != 2:
            raise UnsupportedModelError(
                f"{tensor.path}: the tensor {name} is {tensor.kind} {list(tensor.shape)}; a matrix "
                "of floats is wanted"
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    for half in halves.values():
        if len(half) != 2:
            (tensor,) = half.values()
            raise CorruptModelError(f"{tensor.path}: the tensor {tensor.name} has no partner")
    return {module: (half["A"], half["B"]) for module, half in halves.items()}


def _place(
    module: str, a: Tensor, b: Tensor, settings: Settings, base: Base
) -> list[tuple[str, Array, Array]]:
    """Names of the file's matrices that a module is (a part of), with their A and B."""
    low, high = a.read(), b.read()
    for tensor, values in ((a, low), (b, high)):
        if not np.isfinite(values).all():
            raise CorruptModelError(
                f"{tensor.path}: the tensor {tensor.name} has an infinite or NaN value"
            )
    config = base.config(settings.config.path)
    pieces = _pieces(module, a, base, config)
    added = high @ low  # what the checkpoint's matrix gets, without the scale
    if settings.transposed:
        added = added.T
    placed = []
    for piece in pieces:
        if not piece.target.endswith(".weight") or piece.type is not None or piece.part != 0:
            raise UnsupportedModelError(
                f"{a.path}: {module} is one of several parts of {piece.target}, or is stored in "
                "another way: this version cannot adapt it"
            )
        try:
            wanted = added if piece.make is None else piece.make(added)
            rows = high if piece.make is None else piece.make(high)
        except ValueError as error:
            raise CorruptModelError(
                f"{a.path}: {module} has the shape {list(added.shape)}, which does not fit the "
                f"model: {error}"
            ) from None
        for candidate in (rows, high):
            if candidate.ndim == 2 and candidate.shape[1] == low.shape[0]:
                made = candidate @ low
                if made.shape == wanted.shape and np.allclose(made, wanted, 1e-4, 1e-6):
                    placed.append((piece.target, low, candidate))
                    break
        else:
            raise UnsupportedModelError(
                f"{a.path}: {module} becomes {piece.target} in a way that a LoRA pair cannot go"
            )
    return placed


def _pieces(module: str, a: Tensor, base: Base, config: Config) -> list[Piece]:
    """What becomes of a module's weight, by the first family of the architecture that has it."""
    families = [family for family in FAMILIES if family.arch == base.architecture]
    if not families:
        raise UnsupportedModelError(
            f"{a.path}: smallm converts no models of the architecture {base.architecture}, so that "
            "it cannot say what the adapter's modules are: convert it to GGUF"
        )
    for i, family in enumerate(families):
        try:
            return _lookup(family, config)(f"{module}.weight", a)
        except (UnsupportedModelError, CorruptModelError) as error:
            if i + 1 == len(families):
                raise error from None
    raise SmallmError("unreachable")
