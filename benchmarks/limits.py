"""What a model asks of the machine, and the least time this machine needs for it.

Prefill of n tokens:  2 P n / int8 peak + 2 L H d n (n + 1) / f32 peak
    P matmul parameters per token without the head (those in a float format over the f32 peak),
    L layers, H query heads, d values of a head: a query is multiplied with every key up to its own
    position, and the weights with every value.
Decode of a token at position p:  (weights + 2 L Hkv d * 2 p bytes) / read bandwidth
    weights: the file's bytes of every tensor that is read for a token, the head's included; an
    embedding table only where it is the head, too.  Keys and values are float16.

The peaks and the bandwidth, of a buffer of that size, are measured by probes.c beside the engines,
in every round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import gguf
from common import Probes

FLOATS = ("F32", "F16", "BF16", "NVFP4")
TIERS = ("avx2", "avxvnni", "avx512vnni", "amx")  # those that probes.c knows


@dataclass(frozen=True)
class Work:
    """A model's numbers, from its file."""

    arch: str
    type: str  # what the file calls the mix of its formats, e.g. "Q4_K_M"
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head: int  # values of a head
    n_int: int  # matmul parameters in integer formats, without the head
    n_float: int  # matmul parameters in float formats, without the head
    weight_bytes: int  # read for one token
    kv: str  # type of the cache

    def decode_bytes(self, position: float) -> int:
        """Weights, keys and values of one token that has `position` others before it."""
        part = {"f16": 2 * self.head, "f32": 4 * self.head, "q8": self.head + 4}[self.kv]
        return self.weight_bytes + int(2 * self.n_layer * self.n_head_kv * part * position)

    def prefill_seconds(self, n: int, int8: float, f32: float) -> float:
        """Of n tokens, with both peaks in operations a second."""
        pairs = self.n_layer * self.n_head * self.head * n * (n + 1)
        return 2 * n * self.n_int / int8 + 2 * (n * self.n_float + pairs) / f32


def read(path: str, kv: str = "f16") -> Work:
    file = gguf.GGUFReader(path)

    def value(key: str, missing: Any = None) -> Any:
        field = file.get_field(key)
        return missing if field is None else field.contents()

    arch = value("general.architecture")
    n_head, n_embd = value(f"{arch}.attention.head_count"), value(f"{arch}.embedding_length")
    names = {tensor.name for tensor in file.tensors}
    head = "output." if "output.weight" in names else "token_embd."
    n_int = n_float = weight_bytes = n_vocab = 0
    for tensor in file.tensors:
        in_layer = tensor.name.startswith("blk.")
        if in_layer and len(tensor.shape) == 2:
            n = math.prod(int(x) for x in tensor.shape)
            if tensor.tensor_type.name in FLOATS:
                n_float += n
            else:
                n_int += n
        if in_layer or tensor.name.startswith((head, "output_norm.")):
            weight_bytes += int(tensor.n_bytes)
        if tensor.name == "token_embd.weight":
            n_vocab = int(tensor.shape[1])
    kind = gguf.LlamaFileType(value("general.file_type", gguf.LlamaFileType.GUESSED)).name
    return Work(
        arch=arch,
        type=kind.partition("_")[2],
        n_vocab=n_vocab,
        n_embd=n_embd,
        n_layer=value(f"{arch}.block_count"),
        n_head=n_head,
        n_head_kv=value(f"{arch}.attention.head_count_kv", n_head),
        head=value(f"{arch}.attention.key_length", n_embd // n_head),
        n_int=n_int,
        n_float=n_float,
        weight_bytes=weight_bytes,
        kv=kv,
    )


class Peaks(NamedTuple):
    """What the machine did in one round, in operations or bytes a second."""

    int8_one: float  # of one thread
    int8: float
    f32: float
    read: float


def measure(probes: Probes, tier: str, threads: int, n_bytes: int) -> Peaks:
    """About three seconds; `read` is of a buffer of n_bytes."""
    return Peaks(
        1e9 * probes.ask("int8", tier, 1, 0.3),
        1e9 * probes.ask("int8", tier, threads, 0.3),
        1e9 * probes.ask("f32", tier, threads, 0.3),
        1e9 * probes.ask("read", n_bytes, threads, 1.4),
    )
