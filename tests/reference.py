"""An independent forward pass of the llama architecture in numpy, straight from a GGUF file.

Written from the formulas, for clarity: no cache, no chunks, no threads, all positions at once.
Weights are what `gguf.quants` says they are.  With `kv` and `activations` it also rounds where
smallm rounds (the cache's type; int8 activations before a quantized matrix), so that what is left
between the two is only the order of float additions.

    x = E[ids]
    per layer:  x += Wo attention(rope(Wq n), rope(Wk n), Wv n)     n = rms_norm(x) * attn_norm
                x += Wdown (silu(Wgate n) * (Wup n))                n = rms_norm(x) * ffn_norm
    logits = Whead rms_norm(x) * output_norm

The file's query and key rows are ordered so that rope turns neighbours (2 i, 2 i + 1).
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType

# NVFP4 is run as floats: its values are bfloat16.
_FLOAT_TYPES = (GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.NVFP4)


def round_int8(x: np.ndarray, block: int) -> np.ndarray:
    """x [..., k] as int8 times one float32 scale per `block` values; the last may be short."""
    k = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-k // block) * block), dtype=np.float32)
    padded[..., :k] = x
    blocks = padded.reshape(*x.shape[:-1], -1, block)
    amax = np.abs(blocks).max(-1, keepdims=True)
    safe = np.where(amax < 2.0**-100, np.float32(1), amax)
    scale = np.where(amax < 2.0**-100, np.float32(0), safe / np.float32(127))
    codes = np.clip(np.rint(blocks * (np.float32(127) / safe)), -127, 127)
    return (codes * scale).reshape(padded.shape)[..., :k].astype(x.dtype)


class Reference:
    """A model's weights and hyperparameters.

    dtype: float32 or float64, of all arithmetic.
    kv: "f32", or "f16" or "q8": keys and values rounded as such a cache holds them.
    activations: "float", or "int8": inputs of quantized matrices rounded, per block of the
      matrix's format (32 or 256 values); the head's in two steps.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: Any = np.float32,
        *,
        kv: str = "f32",
        activations: str = "float",
    ) -> None:
        reader = gguf.GGUFReader(path)
        self.dtype, self.kv, self.activations = np.dtype(dtype), kv, activations
        self.meta = {name: f.contents() for name, f in reader.fields.items()}
        if self.meta["general.architecture"] != "llama":
            raise ValueError("the reference knows the llama architecture only")
        self.types = {t.name: t.tensor_type for t in reader.tensors}
        self.weights = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type)
            .reshape(tuple(int(n) for n in t.shape[::-1]))
            .astype(self.dtype)
            for t in reader.tensors
        }

        def key(name: str, default: Any = None) -> Any:
            value = self.meta.get(f"llama.{name}", default)
            if value is None:
                raise KeyError(f"llama.{name}")
            return value

        self.n_embd = key("embedding_length")
        self.n_layer = key("block_count")
        self.n_head = key("attention.head_count")
        self.n_head_kv = key("attention.head_count_kv", self.n_head)
        self.head = key("attention.key_length", self.n_embd // self.n_head)
        self.eps = key("attention.layer_norm_rms_epsilon")
        self.window = key("attention.sliding_window", 0)
        self.n_rot = key("rope.dimension_count", self.head)
        self.rope_base = key("rope.freq_base", 10000.0)
        scaling = key("rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise ValueError(f"the reference does not know rope scaling {scaling!r}")
        self.rope_factor = key("rope.scaling.factor", 1.0) if scaling == "linear" else 1.0

    def matmul(self, name: str, x: np.ndarray, *, fine: bool = False) -> np.ndarray:
        """x [n, k] -> [n, rows], with the bias where the file has one.  fine: what rounding x to
        int8 lost is rounded to int8, too, and added."""
        kind = self.types[name]
        if self.activations == "int8" and kind not in _FLOAT_TYPES:
            block = gguf.GGML_QUANT_SIZES[kind][0]
            rounded = round_int8(x, block)
            x = rounded + round_int8(x - rounded, block) if fine else rounded
        y = x @ self.weights[name].T
        bias = self.weights.get(name.removesuffix(".weight") + ".bias")
        return y if bias is None else y + bias

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """x / sqrt(mean(x^2) + eps) * w"""
        mean = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean + self.dtype.type(self.eps)) * self.weights[name]

    def rope(self, x: np.ndarray) -> np.ndarray:
        """x [n, heads, head]: pair i of position p turns by p * base^(-2 i / n_rot) / factor_i."""
        pairs = np.arange(self.n_rot // 2)
        freq = np.float64(self.rope_base) ** (-2.0 * pairs / self.n_rot) / self.rope_factor
        factors = self.weights.get("rope_freqs.weight")
        if factors is not None:
            freq = freq / factors.astype(np.float64)
        angle = np.arange(x.shape[0])[:, None, None] * freq
        cos, sin = np.cos(angle).astype(self.dtype), np.sin(angle).astype(self.dtype)
        out = x.copy()
        even, odd = x[..., 0 : self.n_rot : 2], x[..., 1 : self.n_rot : 2]
        out[..., 0 : self.n_rot : 2] = even * cos - odd * sin
        out[..., 1 : self.n_rot : 2] = even * sin + odd * cos
        return out

    def attention(self, layer: int, x: np.ndarray) -> np.ndarray:
        """softmax(q k^T / sqrt(head)) v over positions p - window < j <= p, by groups of heads."""
        n, b = x.shape[0], f"blk.{layer}."
        q = self.rope(self.matmul(b + "attn_q.weight", x).reshape(n, self.n_head, self.head))
        k = self.rope(self.matmul(b + "attn_k.weight", x).reshape(n, self.n_head_kv, self.head))
        v = self.matmul(b + "attn_v.weight", x).reshape(n, self.n_head_kv, self.head)
        if self.kv == "f16":
            k = np.clip(k, -65504, 65504).astype(np.float16).astype(self.dtype)
            v = np.clip(v, -65504, 65504).astype(np.float16).astype(self.dtype)
        if self.kv == "q8":  # a scale for each position and head
            k, v = (
                np.rint(x / (d := np.abs(x).max(axis=-1, keepdims=True) / 127)) * d for x in (k, v)
            )
        position = np.arange(n)
        seen = position[None, :] <= position[:, None]
        if self.window:
            seen &= position[None, :] > position[:, None] - self.window
        out = np.empty_like(q)
        for h in range(self.n_head):
            g = h // (self.n_head // self.n_head_kv)
            scores = q[:, h] @ k[:, g].T / np.sqrt(self.dtype.type(self.head))
            scores = np.where(seen, scores, -np.inf)
            e = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, h] = (e @ v[:, g]) / e.sum(-1, keepdims=True)
        return out.reshape(n, -1)

    def hidden(self, ids: Any) -> np.ndarray:
        """[n, n_embd] after the last norm."""
        x = self.weights["token_embd.weight"][np.asarray(ids)]
        for i in range(self.n_layer):
            b = f"blk.{i}."
            a = self.attention(i, self.norm(b + "attn_norm.weight", x))
            x = x + self.matmul(b + "attn_output.weight", a)
            n = self.norm(b + "ffn_norm.weight", x)
            gate = self.matmul(b + "ffn_gate.weight", n)
            h = gate / (1 + np.exp(-gate)) * self.matmul(b + "ffn_up.weight", n)
            x = x + self.matmul(b + "ffn_down.weight", h)
        return self.norm("output_norm.weight", x)

    def logits(self, ids: Any) -> np.ndarray:
        """[n, n_vocab]"""
        tied = "output.weight" not in self.weights
        head = "token_embd.weight" if tied else "output.weight"
        return self.matmul(head, self.hidden(ids), fine=True)

    def greedy(self, ids: list[int], n: int) -> list[int]:
        """The n tokens that follow."""
        ids = list(ids)
        for _ in range(n):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(ids) - n :]


def logits(path: str | Path, ids: Any, dtype: Any = np.float32, **rounding: str) -> np.ndarray:
    """[n, n_vocab] of a file; `rounding` as in `Reference`."""
    return Reference(path, dtype, **rounding).logits(ids)


def spm_encode(meta: dict[str, Any], text: str) -> list[int]:
    """SentencePiece BPE by its definition, quadratic: BOS, then the best-scored merge first."""
    tokens, scores = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.scores"]
    index = {t: i for i, t in enumerate(tokens)}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [
            (scores[index[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in index
        ]
        if not pairs:
            break
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = [meta["tokenizer.ggml.bos_token_id"]]
    for p in parts:
        ids += [index[p]] if p in index else [index[f"<0x{b:02X}>"] for b in p.encode()]
    return ids
