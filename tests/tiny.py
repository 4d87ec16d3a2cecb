"""Small random GGUF models of the llama architecture, written with the `gguf` package.

`write_tiny` is what the tests use where no real model is wanted: the widths are small, but every
part of a model is there, and the weights are scaled so that each part matters (attention far from
uniform, random norms, scales of both signs), so that a mistake in any of them moves the logits.
The same arguments give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFValueType as Kind

# Formats that `gguf.quants` only reads; random valid blocks of them are made here.
IQ_QUANTS = ("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", *IQ_QUANTS)  # blocks of 256
BLOCK_FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
FLOAT_FORMATS = ("F32", "F16", "BF16")
FORMATS = FLOAT_FORMATS + BLOCK_FORMATS + ("NVFP4",) + K_QUANTS
MADE = (*K_QUANTS, "IQ4_NL", "NVFP4")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n'"
    " + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_HEAD_KEYS = ("llama.attention.key_length", "llama.attention.value_length")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class KV:
    """A metadata value and its kind in the file (`sub`: the kind of an array's elements)."""

    kind: Kind
    value: Any
    sub: Kind | None = None


def u32(value: int) -> KV:
    return KV(Kind.UINT32, value)


def f32(value: float) -> KV:
    return KV(Kind.FLOAT32, value)


def as_kv(value: Any) -> KV:
    """The kind llama.cpp's converter gives a plain Python value."""
    if isinstance(value, KV):
        return value
    if isinstance(value, bool):
        return KV(Kind.BOOL, value)
    if isinstance(value, int):
        return KV(Kind.UINT32 if value >= 0 else Kind.INT32, value)
    if isinstance(value, float):
        return KV(Kind.FLOAT32, value)
    if isinstance(value, str):
        return KV(Kind.STRING, value)
    if isinstance(value, (list, tuple)):
        return KV(Kind.ARRAY, list(value), as_kv(value[0]).kind)
    raise TypeError(f"no GGUF kind for {value!r}")


@dataclass
class Tensor:
    """One tensor as it goes to the file."""

    type: GgmlType
    shape: tuple[int, ...]  # (rows, columns) or (n,): the slowest dimension first
    data: np.ndarray  # F32, F16: values [shape]; else uint8 [rows, bytes of a row]

    @classmethod
    def encode(cls, values: np.ndarray, type_name: str, rng: np.random.Generator) -> Tensor:
        """`values` in the format; for those of MADE random blocks of about the same spread."""
        kind = GgmlType[type_name]
        values = np.ascontiguousarray(values, dtype=np.float32)
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if values.shape[-1] % block:
            raise ValueError(f"rows of {values.shape[-1]} values do not divide into {type_name}")
        if type_name == "F32":
            data = values
        elif type_name == "F16":
            data = values.astype(np.float16)
        elif type_name in MADE:
            data = random_blocks(kind, values.shape, float(values.std()), rng)
        else:
            data = gguf.quants.quantize(values, kind)
        return cls(kind, values.shape, data)

    def values(self) -> np.ndarray:
        """float32 [shape], as `gguf.quants` defines them."""
        return gguf.quants.dequantize(self.data, self.type).reshape(self.shape)


def random_blocks(
    kind: GgmlType, shape: tuple[int, ...], std: float, rng: np.random.Generator
) -> np.ndarray:
    """uint8 [rows, bytes]: random codes and sub-scales, float16 scales that give about `std`.

    Scales differ from block to block by up to a factor of 3; where the format has no mins their
    sign is random, too, as it is in real files.
    """
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    n_blocks = int(np.prod(shape)) // n_values
    raw = rng.integers(0, 256, size=(n_blocks, n_bytes), dtype=np.uint8)
    spread = rng.uniform(0.5, 1.5, size=n_blocks).astype(np.float32)
    # Where d and dmin lie, and dmin / d so that the mins' mean cancels the codes' mean.
    d_at, min_at, min_ratio = {
        GgmlType.Q2_K: (80, 82, 1.5),
        GgmlType.Q3_K: (108, None, 0.0),
        GgmlType.Q4_K: (0, 2, 7.5),
        GgmlType.Q5_K: (0, 2, 15.5),
        GgmlType.Q6_K: (208, None, 0.0),
        GgmlType.TQ1_0: (52, None, 0.0),
        GgmlType.TQ2_0: (64, None, 0.0),
    }.get(kind, (0, None, 0.0))
    if min_at is None:
        spread *= rng.choice(np.array([-1, 1], dtype=np.float32), size=n_blocks)

    def put(at: int, values: np.ndarray) -> None:
        if kind == GgmlType.NVFP4:  # a byte for each 16 values, without a sign
            raw[:, :4] = gguf.quants.NVFP4.fp32_to_ue4m3(np.abs(values)).reshape(-1, 1)
            return
        if kind == GgmlType.IQ1_M:  # the high nibbles of four bytes
            bits = values.astype(np.float16).view(np.uint16).astype(int)
            for i in range(4):
                raw[:, 49 + 2 * i] = raw[:, 49 + 2 * i] & 15 | (bits >> 4 * i & 15) << 4
            return
        raw[:, at : at + 2] = values.astype(np.float16).reshape(-1, 1).view(np.uint8)

    def build(unit: float) -> np.ndarray:
        put(d_at, spread * unit)
        if min_at is not None:
            put(min_at, spread * unit * min_ratio)
        return raw

    unit = 2.0**-4
    measured = float(gguf.quants.dequantize(build(unit), kind).std())
    build(unit * std / measured)
    return raw.reshape(shape[0], -1)


# ---- tokenizers ----------------------------------------------------------------------------------

_SPM_PIECES = (
    "▁t|he|in|er|an|▁a|on|re|▁the|or|at|en|▁s|▁w|es|it|is|ou|ar|▁b|ed|al|▁c|▁h|as|to|ing|▁and|"
    "le|▁to|ll|▁of|▁m|om|ow|ay|▁he|▁was|▁in|▁it|gh|ver|ld|▁st|▁once|▁upon|▁time|▁on|▁up|ce|"
    "im|ime|st|▁day|▁li|▁ti|▁hello|wor|world|▁world|qu|ick|▁quick|▁br|own|▁brown|▁f|ox|▁fox|"
    # Longer pieces must be reachable by merging two others:
    "▁th|nc|onc|▁onc|▁o|▁u|▁upo|ck|ic|ui|▁q|▁qu|▁qui|wo|rld|▁hel|lo|▁da|ve|nd|▁an"
)

_BPE_MERGES = (
    "Ġ t|h e|i n|Ġ a|r e|o n|Ġt he|e r|Ġ s|a t|Ġ w|Ġ o|e n|Ġ c|i t|i s|a n|o r|e s|Ġ b|e d|Ġ f|"
    "in g|Ġ p|o u|Ġa n|a l|a r|Ġt o|Ġ m|Ġo f|Ġ in|Ġ d|Ġ h|Ġan d|i c|a s|l e|Ġt h|i on|o m|l l|"
    "en t|Ġ n|Ġ l|s t|Ġ re|v e|Ġ e|r o|l y|Ġb e|Ġ g|Ġ T|c t|Ġ S|i d|o t|Ġ I|u t|e t|Ġ A|Ġ is|"
    "Ġ on|i m|a m|o w|a y|a d|s e|Ġth at|Ġ C|i g|Ġf or|a c|Ġ y|v er|u r|Ġ u|l d|Ġs t|Ġ Ġ|ĠĠ ĠĠ|"
    "h a|Ġh e|Ġw as|O n|On c|Onc e|Ġu p|Ġup on|Ġt im|Ġtim e|H e|He ll|Hell o|Ġw or|Ġwor ld"
)


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = [""] * 256, 0
    for b in range(256):
        if b in keep:
            table[b] = chr(b)
        else:
            table[b] = chr(256 + extra)
            extra += 1
    return table


def spm_tokenizer() -> dict[str, Any]:
    """tokenizer.ggml.* keys of a SentencePiece-like vocabulary with byte tokens."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    pieces = list(dict.fromkeys(_SPM_PIECES.split("|")))
    chars = ["▁"] + [chr(c) for c in range(33, 127)] + list("äöüéßñ中文字😀")
    scores = [0.0] * len(tokens) + [-float(i) for i in range(len(pieces) + len(chars))]
    tokens += pieces + chars
    types += [NORMAL] * (len(pieces) + len(chars))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": KV(Kind.ARRAY, types, Kind.INT32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }


def bpe_tokenizer(pre: str = "gpt-2") -> dict[str, Any]:
    """tokenizer.ggml.* keys of a byte-level BPE with chat tokens, and a ChatML template."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    merges = _BPE_MERGES.split("|")
    tokens = control + byte_symbols()
    tokens += [t for t in dict.fromkeys(m.replace(" ", "") for m in merges) if t not in tokens]
    types = [CONTROL] * len(control) + [NORMAL] * (len(tokens) - len(control))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": KV(Kind.ARRAY, types, Kind.INT32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHATML,
    }


# ---- the model -----------------------------------------------------------------------------------


@dataclass
class Tiny:
    """What was written."""

    path: Path
    n_vocab: int
    tokens: list[str]
    meta: dict[str, KV] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)


def write_tiny(
    path: str | Path,
    *,
    tokenizer: str | Mapping[str, Any] = "spm",
    n_embd: int = 64,
    n_layer: int = 2,
    n_head: int = 4,
    n_head_kv: int = 2,
    head: int | None = None,
    n_ff: int = 96,
    n_ctx: int = 256,
    types: str | Callable[[str], str] = "F32",
    tied: bool = True,
    rope_factors: bool = False,
    biases: bool = False,
    seed: int = 0,
    extra: Mapping[str, Any] | None = None,
    edit: Callable[[dict[str, Tensor]], None] | None = None,
    duplicate: str | None = None,
) -> Tiny:
    """Writes the file and says what is in it.

    tokenizer: "spm", "bpe", or the tokenizer.* keys themselves ("tokenizer.ggml.tokens" and so on).
    head: size of a head where it is not n_embd / n_head.
    types: format of the matrices: one name for all, or name of a tensor -> name of its format.
      K-quants need n_embd and n_ff divisible by 256, the other block formats by 32.
      Norms, biases and rope factors are F32.
    extra: metadata to add or replace; None drops a key; `KV` chooses the kind in the file.
    edit: may drop, rename, add or change tensors (a dict name -> Tensor, written in its order).
    duplicate: a tensor to be written twice, under the same name.
    """
    rng = np.random.default_rng(seed)
    keys = (
        {"spm": spm_tokenizer, "bpe": bpe_tokenizer}[tokenizer]()
        if isinstance(tokenizer, str)
        else dict(tokenizer)
    )
    tokens = list(as_kv(keys["tokenizer.ggml.tokens"]).value)
    n_vocab = len(tokens)
    sizes = {} if head is None else dict.fromkeys(_HEAD_KEYS, head)
    head = head or n_embd // n_head

    meta: dict[str, Any] = {
        "general.name": "tiny",
        "llama.vocab_size": n_vocab,
        "llama.context_length": n_ctx,
        "llama.embedding_length": n_embd,
        "llama.block_count": n_layer,
        "llama.feed_forward_length": n_ff,
        "llama.attention.head_count": n_head,
        "llama.attention.head_count_kv": n_head_kv,
        "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
        "llama.rope.dimension_count": head,
        "llama.rope.freq_base": f32(10000.0),
        **sizes,
        **keys,
    }
    for key, value in (extra or {}).items():
        if value is None:
            meta.pop(key, None)
        else:
            meta[key] = value
    kvs = {key: as_kv(value) for key, value in meta.items()}
    arch = kvs.pop("general.architecture", KV(Kind.STRING, "llama"))

    tensors: dict[str, Tensor] = {}

    def add(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        values = rng.normal(mean, std, size=shape)
        type_name = "F32"
        if len(shape) == 2:
            type_name = types if isinstance(types, str) else types(name)
        tensors[name] = Tensor.encode(values, type_name, rng)

    # Queries and keys give scores of spread 2; each sub-layer adds about as much as the embedding,
    # so that the tied head does not simply repeat its input.
    wide = n_embd**-0.5
    add("token_embd.weight", (n_vocab, n_embd), 0.35)
    add("output_norm.weight", (n_embd,), 0.25, 1.0)
    if not tied:
        add("output.weight", (n_vocab, n_embd), 3.0 * wide)
    if rope_factors:
        factors = np.geomspace(1.0, 8.0, head // 2)
        tensors["rope_freqs.weight"] = Tensor.encode(factors, "F32", rng)
    for i in range(n_layer):
        b = f"blk.{i}."
        add(b + "attn_norm.weight", (n_embd,), 0.25, 1.0)
        add(b + "attn_q.weight", (n_head * head, n_embd), 1.4 * wide)
        add(b + "attn_k.weight", (n_head_kv * head, n_embd), 1.4 * wide)
        add(b + "attn_v.weight", (n_head_kv * head, n_embd), wide)
        add(b + "attn_output.weight", (n_embd, n_head * head), wide)
        if biases:
            add(b + "attn_q.bias", (n_head * head,), 0.5)
            add(b + "attn_k.bias", (n_head_kv * head,), 0.5)
            add(b + "attn_v.bias", (n_head_kv * head,), 0.5)
            add(b + "attn_output.bias", (n_embd,), 0.2)
        add(b + "ffn_norm.weight", (n_embd,), 0.25, 1.0)
        add(b + "ffn_gate.weight", (n_ff, n_embd), 1.4 * wide)
        add(b + "ffn_up.weight", (n_ff, n_embd), 1.4 * wide)
        add(b + "ffn_down.weight", (n_embd, n_ff), n_ff**-0.5)
        if biases:
            add(b + "ffn_gate.bias", (n_ff,), 0.5)
            add(b + "ffn_up.bias", (n_ff,), 0.5)
            add(b + "ffn_down.bias", (n_embd,), 0.2)
    if edit is not None:
        edit(tensors)

    written = dict(tensors)
    stand_in = ""
    if duplicate is not None:
        stand_in = duplicate[:-1] + "\x01"  # gguf refuses the same name: put it in afterwards
        written[stand_in] = tensors[duplicate]
    path = Path(path)
    _write(path, str(arch.value), kvs, written)
    if duplicate is not None:
        raw = path.read_bytes()
        if raw.count(stand_in.encode()) != 1:
            raise ValueError("the stand-in of the duplicate is not unique")
        path.write_bytes(raw.replace(stand_in.encode(), duplicate.encode()))
    return Tiny(path, n_vocab, tokens, {"general.architecture": arch, **kvs}, tensors)


def _write(path: Path, arch: str, kvs: Mapping[str, KV], tensors: Mapping[str, Tensor]) -> None:
    writer = gguf.GGUFWriter(path, arch)
    for key, kv in kvs.items():
        writer.add_key_value(key, kv.value, kv.kind, sub_type=kv.sub)
    for name, t in tensors.items():
        writer.add_tensor(name, t.data, raw_dtype=t.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
