"""Writes a GGUF file with random weights in a real model's shape, to time it without a download.

    python scripts/random_model.py --shape llama-3.2-1b --type q4_k_m out.gguf

Tensor names, shapes, formats and keys are those of the real model's file; what it answers is
noise.  A plain type (q4_0, q6_k, f16 ...) gives every matrix that format; q4_k_s, q4_k_m, q5_k_m
give some matrices more bits, as llama.cpp's quantizer does.  In both, the head (a tied embedding,
too) is Q6_K where the rest has fewer bits, and rows that 256 does not divide take the next format
in blocks of 32.  Vectors are F32.  The same arguments give the same bytes.

Needs numpy and `gguf`; holds one tensor in memory at a time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """What a model's file says about its sizes, and which of the optional tensors it has."""

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_ctx: int
    rope_base: float
    pre: str  # tokenizer.ggml.pre
    norm_eps: float = 1e-5
    n_rot: int = 0  # values of a head that turn; 0 = all
    tied: bool = False  # the head is the embedding
    layer_norm: bool = False  # norms have a bias
    gated: bool = True  # the feed-forward block has a gate and a norm of its own
    qkv_bias: bool = False
    bias: bool = False  # of the other matrices, the head's included
    rope_factors: tuple[float, float, float, int] | None = None  # factor, low, high, old context

    @property
    def head(self) -> int:
        return self.n_embd // self.n_head


SHAPES = {
    "smollm2-135m": Shape(
        "llama", 30, 576, 9, 3, 1536, 49152, 8192, 1e5, pre="smollm", tied=True
    ),
    "llama-3.2-1b": Shape(
        "llama", 16, 2048, 32, 8, 8192, 128256, 131072, 5e5, pre="llama-bpe", tied=True,
        rope_factors=(32, 1, 4, 8192),
    ),
    "qwen2.5-0.5b": Shape(
        "qwen2", 24, 896, 14, 2, 4864, 151936, 32768, 1e6, pre="qwen2", norm_eps=1e-6, tied=True,
        qkv_bias=True,
    ),
    "phi-1": Shape(
        "phi2", 24, 2048, 32, 32, 8192, 51200, 2048, 1e4, pre="gpt-2", n_rot=32, layer_norm=True,
        gated=False, qkv_bias=True, bias=True,
    ),
}  # fmt: skip

# Name of a type -> format of the matrices, the file's own name for the whole.
TYPES = {
    "f32": (Type.F32, FileType.ALL_F32),
    "f16": (Type.F16, FileType.MOSTLY_F16),
    "bf16": (Type.BF16, FileType.MOSTLY_BF16),
    "q4_0": (Type.Q4_0, FileType.MOSTLY_Q4_0),
    "q4_1": (Type.Q4_1, FileType.MOSTLY_Q4_1),
    "q5_0": (Type.Q5_0, FileType.MOSTLY_Q5_0),
    "q5_1": (Type.Q5_1, FileType.MOSTLY_Q5_1),
    "q8_0": (Type.Q8_0, FileType.MOSTLY_Q8_0),
    "q2_k": (Type.Q2_K, FileType.MOSTLY_Q2_K),
    "q3_k": (Type.Q3_K, FileType.MOSTLY_Q3_K_S),
    "q4_k": (Type.Q4_K, FileType.MOSTLY_Q4_K_S),
    "q5_k": (Type.Q5_K, FileType.MOSTLY_Q5_K_S),
    "q6_k": (Type.Q6_K, FileType.MOSTLY_Q6_K),
    "iq4_nl": (Type.IQ4_NL, FileType.MOSTLY_IQ4_NL),
    "iq4_xs": (Type.IQ4_XS, FileType.MOSTLY_IQ4_XS),
    "mxfp4": (Type.MXFP4, FileType.MOSTLY_MXFP4_MOE),
    "nvfp4": (Type.NVFP4, FileType.MOSTLY_NVFP4),
    "iq3_s": (Type.IQ3_S, FileType.MOSTLY_IQ3_S),
    "iq3_xxs": (Type.IQ3_XXS, FileType.MOSTLY_IQ3_XXS),
    "iq2_s": (Type.IQ2_S, FileType.MOSTLY_IQ2_S),
    "iq2_xs": (Type.IQ2_XS, FileType.MOSTLY_IQ2_XS),
    "iq2_xxs": (Type.IQ2_XXS, FileType.MOSTLY_IQ2_XXS),
    "iq1_s": (Type.IQ1_S, FileType.MOSTLY_IQ1_S),
    "iq1_m": (Type.IQ1_M, FileType.MOSTLY_IQ1_M),
    "tq2_0": (Type.TQ2_0, FileType.MOSTLY_TQ2_0),
    "tq1_0": (Type.TQ1_0, FileType.MOSTLY_TQ1_0),
    "q4_k_s": (Type.Q4_K, FileType.MOSTLY_Q4_K_S),
    "q4_k_m": (Type.Q4_K, FileType.MOSTLY_Q4_K_M),
    "q5_k_m": (Type.Q5_K, FileType.MOSTLY_Q5_K_M),
}

FLOATS = (Type.F32, Type.F16, Type.BF16)
NO_HEAD_OF_ITS_OWN = (*FLOATS, Type.Q8_0)  # the head of a file of this format has it, too

# For rows that 256 does not divide.  llama.cpp has IQ4_NL for the first two, of Q4_0's size.
NARROW = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
    Type.IQ4_XS: Type.IQ4_NL,
    Type.IQ3_S: Type.IQ4_NL,
    Type.IQ3_XXS: Type.IQ4_NL,
    Type.IQ2_S: Type.IQ4_NL,
    Type.IQ2_XS: Type.IQ4_NL,
    Type.IQ2_XXS: Type.IQ4_NL,
    Type.IQ1_S: Type.IQ4_NL,
    Type.IQ1_M: Type.IQ4_NL,
    Type.TQ1_0: Type.Q4_0,
    Type.TQ2_0: Type.Q4_0,
}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: random values of this mean and standard deviation, or these."""

    name: str
    shape: tuple[int, ...]  # (rows, columns) or (n,)
    type: Type
    std: float = 0.0
    mean: float = 0.0
    values: Floats | None = None

    @property
    def n_bytes(self) -> int:
        n_values, n_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // n_values * n_bytes


# ---- which tensors, in which format --------------------------------------------------------------


def favoured(i: int, n: int) -> bool:
    """Layers that the mixes give more bits: the first and last eighth, every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def matrix_type(type_name: str, part: str, i: int, n_layer: int) -> Type:
    """Format of the matrix `part` of layer i, before its width is looked at."""
    base = TYPES[type_name][0]
    if part in ("attn_v", "ffn_down"):
        if type_name in ("q4_k_m", "q5_k_m") and favoured(i, n_layer):
            return Type.Q6_K
        first = 4 if part == "attn_v" else n_layer // 8
        if type_name == "q4_k_s" and i < first:
            return Type.Q5_K
    return base


def fitting(type_: Type, width: int) -> Type:
    """The format itself, or what stands in for it where its blocks do not divide a row."""
    if width % gguf.GGML_QUANT_SIZES[type_][0]:
        type_ = NARROW.get(type_, type_)
    if width % gguf.GGML_QUANT_SIZES[type_][0]:
        raise ValueError(f"rows of {width} values do not divide into blocks of {type_.name}")
    return type_


def rope_factors(shape: Shape) -> Floats:
    """Llama 3's divisors of the rope frequencies: 1 for short waves, `factor` for those longer
    than the context it was first trained with, and a smooth way between."""
    assert shape.rope_factors is not None
    factor, low, high, old_ctx = shape.rope_factors
    exponents = np.arange(0, shape.head, 2) / shape.head
    turns = old_ctx * shape.rope_base**-exponents / (2 * np.pi)  # over the old context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def plan(shape: Shape, type_name: str) -> list[Tensor]:
    """Every tensor of the file, in its order."""
    tensors = []

    def vector(name: str, n: int, std: float, mean: float = 0.0) -> None:
        tensors.append(Tensor(name, (n,), Type.F32, std, mean))

    def matrix(name: str, rows: int, columns: int, type_: Type) -> None:
        std = columns**-0.5  # keeps the size of what it is multiplied with
        tensors.append(Tensor(name, (rows, columns), fitting(type_, columns), std))

    def norm(name: str) -> None:
        vector(f"{name}.weight", shape.n_embd, 0.1, 1.0)
        if shape.layer_norm:
            vector(f"{name}.bias", shape.n_embd, 0.1)

    base = TYPES[type_name][0]
    head = base if base in NO_HEAD_OF_ITS_OWN else Type.Q6_K
    matrix("token_embd.weight", shape.n_vocab, shape.n_embd, head if shape.tied else base)
    norm("output_norm")
    if not shape.tied:
        matrix("output.weight", shape.n_vocab, shape.n_embd, head)
        if shape.bias:
            vector("output.bias", shape.n_vocab, 0.1)
    if shape.rope_factors is not None:
        factors = rope_factors(shape)
        tensors.append(Tensor("rope_freqs.weight", factors.shape, Type.F32, values=factors))

    n_kv = shape.n_head_kv * shape.head
    parts = [
        ("attn_q", shape.n_embd, shape.n_embd, shape.qkv_bias),
        ("attn_k", n_kv, shape.n_embd, shape.qkv_bias),
        ("attn_v", n_kv, shape.n_embd, shape.qkv_bias),
        ("attn_output", shape.n_embd, shape.n_embd, shape.bias),
        ("ffn_gate", shape.n_ff, shape.n_embd, shape.bias),
        ("ffn_up", shape.n_ff, shape.n_embd, shape.bias),
        ("ffn_down", shape.n_embd, shape.n_ff, shape.bias),
    ]
    for i in range(shape.n_layer):
        norm(f"blk.{i}.attn_norm")
        if shape.gated:
            norm(f"blk.{i}.ffn_norm")
        for part, rows, columns, bias in parts:
            if part == "ffn_gate" and not shape.gated:
                continue
            name = f"blk.{i}.{part}"
            matrix(f"{name}.weight", rows, columns, matrix_type(type_name, part, i, shape.n_layer))
            if bias:
                vector(f"{name}.bias", rows, 0.1)
    return tensors


# ---- their bytes ---------------------------------------------------------------------------------

# Scales of a block: where the numbers lie that multiply it (float16, but see get_scale); True: they
# may be negative.
SCALES = {
    Type.Q4_0: ((0,), True),
    Type.Q4_1: ((0, 2), False),
    Type.Q5_0: ((0,), True),
    Type.Q5_1: ((0, 2), False),
    Type.Q8_0: ((0,), True),
    Type.Q2_K: ((80, 82), False),
    Type.Q3_K: ((108,), True),
    Type.Q4_K: ((0, 2), False),
    Type.Q5_K: ((0, 2), False),
    Type.Q6_K: ((208,), True),
    Type.IQ4_NL: ((0,), True),
    Type.IQ4_XS: ((0,), True),
    Type.IQ3_S: ((0,), True),
    Type.IQ3_XXS: ((0,), True),
    Type.IQ2_S: ((0,), True),
    Type.IQ2_XS: ((0,), True),
    Type.IQ2_XXS: ((0,), True),
    Type.IQ1_S: ((0,), True),
    Type.IQ1_M: ((49,), True),
    Type.TQ1_0: ((52,), True),
    Type.TQ2_0: ((64,), True),
    Type.MXFP4: ((0,), False),
    Type.NVFP4: ((0, 1, 2, 3), False),
}
MEAN_CODE = {Type.Q2_K: 1.5, Type.Q4_K: 7.5, Type.Q5_K: 15.5}  # of formats with sub-mins
N_POOL = 16381  # blocks; a prime, so that no two rows of a tensor begin with the same one


def get_scale(type_: Type, blocks: Bytes, at: int) -> Floats:
    """float32 [n]: the scale at that place of each block."""
    if type_ == Type.MXFP4:  # a power of two
        return np.exp2(blocks[:, at].astype(np.float32) - 128)
    if type_ == Type.NVFP4:  # half an E4M3
        return gguf.quants.NVFP4.ue4m3_to_fp32(blocks[:, at]).astype(np.float32)
    if type_ == Type.IQ1_M:  # in the high nibbles of four bytes
        parts = [(blocks[:, at + 2 * i].astype(np.uint16) >> 4) << 4 * i for i in range(4)]
        return sum(parts).astype(np.uint16).view(np.float16).astype(np.float32)
    return blocks[:, at : at + 2].copy().view(np.float16)[:, 0].astype(np.float32)


def put_scale(type_: Type, blocks: Bytes, at: int, scales: Floats) -> None:
    """Sets it to the nearest number that the format has."""
    if type_ == Type.MXFP4:
        blocks[:, at] = np.rint(np.log2(scales)) + 128
    elif type_ == Type.NVFP4:
        blocks[:, at] = gguf.quants.NVFP4.fp32_to_ue4m3(2 * scales)
    elif type_ == Type.IQ1_M:
        bits = scales.astype(np.float16).view(np.uint16)
        for i in range(4):
            nibble = (bits >> 4 * i & 15).astype(np.uint8)
            blocks[:, at + 2 * i] = blocks[:, at + 2 * i] & 15 | nibble << 4
    else:
        blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)


@cache
def pool(type_: Type) -> tuple[Bytes, dict[int, Floats]]:
    """Random blocks uint8 [N_POOL, bytes] whose values have mean 0 and standard deviation 1, and
    the float32 of their scales by place: gaussian values where gguf.quants can encode them, else
    random codes."""
    rng = np.random.default_rng(int(type_))
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[type_]
    places = SCALES[type_][0]

    def scales(blocks: Bytes) -> dict[int, Floats]:
        return {at: get_scale(type_, blocks, at) for at in places}

    if n_values == 32 and type_ != Type.IQ4_NL:
        values = rng.standard_normal((N_POOL, n_values), dtype=np.float32)
        blocks = gguf.quants.quantize(values, type_)
        return blocks, scales(blocks)

    blocks = rng.integers(0, 256, (N_POOL, n_bytes), dtype=np.uint8)
    # Each sub-min equals its sub-scale, so that dmin / d = mean code takes every mean away.
    if type_ == Type.Q2_K:  # 16 bytes: sub-scale and sub-min of 4 bits
        blocks[:, :16] = (blocks[:, :16] & 15) * 17
    elif type_ in MEAN_CODE:  # 12 bytes: 4 sub-scales, 4 sub-mins, low halves of 4 more of each
        blocks[:, 8:12] = blocks[:, 4:8]
        blocks[:, 12:16] = (blocks[:, 12:16] & 15) * 17
    for i, at in enumerate(places):
        ratio = MEAN_CODE.get(type_, 0.0) if i == 1 and type_ != Type.NVFP4 else 1.0
        put_scale(type_, blocks, at, np.full(N_POOL, ratio, np.float32))
    std = float(gguf.quants.dequantize(blocks, type_).std())
    return blocks, {at: scale / std for at, scale in scales(blocks).items()}


def encode(tensor: Tensor, seed: int) -> npt.NDArray[Any]:
    """The tensor as it lies in the file: float32 or float16 [shape], else uint8 [rows, bytes]."""
    rng = np.random.default_rng(seed)
    if tensor.values is not None:
        return tensor.values
    if tensor.type not in FLOATS:
        return encode_blocks(tensor, rng)
    values = rng.standard_normal(tensor.shape, dtype=np.float32)
    values *= tensor.std
    values += tensor.mean
    if tensor.type == Type.F16:
        return values.astype(np.float16)
    if tensor.type == Type.BF16:  # the upper half, cut off
        return values.view(np.uint8).reshape(*tensor.shape, 4)[..., 2:].reshape(tensor.shape[0], -1)
    return values


def encode_blocks(tensor: Tensor, rng: np.random.Generator) -> Bytes:
    """The pool again and again, each block with a scale of its own: no two rows are alike."""
    blocks, scales = pool(tensor.type)
    n_blocks = tensor.n_bytes // blocks.shape[1]
    out = np.empty((n_blocks, blocks.shape[1]), np.uint8)
    start = int(rng.integers(N_POOL))
    for first in range(0, n_blocks, N_POOL):
        n = min(N_POOL, n_blocks - first)
        turn = (start + np.arange(n)) % N_POOL
        out[first : first + n] = blocks[turn]
        factor = tensor.std * rng.uniform(0.7, 1.3, n)
        if SCALES[tensor.type][1]:
            factor *= rng.choice([-1.0, 1.0], n)
        for at, scale in scales.items():
            put_scale(tensor.type, out[first : first + n], at, scale[turn] * factor)
    return out.reshape(tensor.shape[0], -1)


# ---- the vocabulary ------------------------------------------------------------------------------

NORMAL, CONTROL = 1, 3
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")  # the last ids


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return [chr(b if b in kept else next(moved)) for b in range(256)]


def vocabulary(n: int) -> tuple[list[str], list[str]]:
    """n tokens and their merges: the bytes, all pairs of bytes, bytes appended to those pairs."""
    if n < 256 + 1 + len(SPECIAL):
        raise ValueError(f"a vocabulary has at least {257 + len(SPECIAL)} tokens, not {n}")
    tokens = byte_symbols()
    merges = []

    def pairs() -> Iterator[tuple[str, str]]:
        for left in tokens:  # which grows as it is read: the bytes first, then the pairs
            for right in tokens[:256]:
                yield left, right

    source = pairs()
    while len(tokens) < n - len(SPECIAL):
        left, right = next(source)
        merges.append(f"{left} {right}")
        tokens.append(left + right)
    return [*tokens, *SPECIAL], merges


# ---- the file ------------------------------------------------------------------------------------


def write(path: str | Path, shape: Shape, type_name: str, name: str = "random") -> None:
    """Writes the file.  ValueError where the shape and the type do not go together."""
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_name(f"random weights in the shape of {name}")
    writer.add_file_type(TYPES[type_name][1])
    writer.add_vocab_size(shape.n_vocab)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    if shape.layer_norm:
        writer.add_layer_norm_eps(shape.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_dimension_count(shape.n_rot or shape.head)
    writer.add_rope_freq_base(shape.rope_base)

    tokens, merges = vocabulary(shape.n_vocab)
    n_special = len(SPECIAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(shape.pre)
    writer.add_token_list(tokens)
    writer.add_token_types([NORMAL] * (shape.n_vocab - n_special) + [CONTROL] * n_special)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))
    writer.add_pad_token_id(tokens.index("<|pad|>"))
    writer.add_add_bos_token(False)

    tensors = plan(shape, type_name)
    for t in tensors:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.n_bytes, t.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for seed, t in enumerate(tensors):
        writer.write_tensor_data(encode(t, seed))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--type", choices=TYPES, required=True)
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--vocab", type=int, help="another number of tokens")
    parser.add_argument("--ctx", type=int, help="another trained context length")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    shape = replace(
        shape,
        n_layer=options.layers or shape.n_layer,
        n_vocab=options.vocab or shape.n_vocab,
        n_ctx=options.ctx or shape.n_ctx,
    )
    try:
        write(options.out, shape, options.type, options.shape)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
