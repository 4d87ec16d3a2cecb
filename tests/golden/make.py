"""Makes the golden models: tiny random ones built with `transformers`, and what they answer.

    pip install torch==2.13.0 transformers==5.23.0 gguf numpy
    python tests/golden/make.py            writes the files beside this one
    python tests/golden/make.py --check    makes them anew elsewhere and compares

For each architecture there is NAME.gguf (F32, every weight a float16 value, so that it compresses)
and NAME.npz:

    ids [300]               the text
    rows [40]               positions whose logits were kept
    logits [40, n_vocab]    float32, of those positions, computed in float64
    broken: STEP [n, n_vocab]   the same for the last n positions with one step of the architecture
                                left out or done in another way: what a wrong row would answer

Weights are scaled so that every step matters: attention far from uniform, norms and biases random.
--check wants the same tensors and keys, bit for bit, and logits within 1e-5 of their deviation:
torch's sums differ in their last bits from machine to machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import torch
import transformers
from transformers.models.phi import modeling_phi
from transformers.models.qwen2 import modeling_qwen2

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402  (the tests' own folder)

N_IDS, N_ROWS, N_BROKEN = 300, 40, 6
N_MERGES = 40

# Names in GGUF files, by names in `transformers`; "N" is the layer.
COMMON = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.layers.N.input_layernorm": "blk.N.attn_norm",
    "model.layers.N.self_attn.q_proj": "blk.N.attn_q",
    "model.layers.N.self_attn.k_proj": "blk.N.attn_k",
    "model.layers.N.self_attn.v_proj": "blk.N.attn_v",
}
QWEN2 = COMMON | {
    "model.norm": "output_norm",
    "model.layers.N.self_attn.o_proj": "blk.N.attn_output",
    "model.layers.N.post_attention_layernorm": "blk.N.ffn_norm",
    "model.layers.N.mlp.gate_proj": "blk.N.ffn_gate",
    "model.layers.N.mlp.up_proj": "blk.N.ffn_up",
    "model.layers.N.mlp.down_proj": "blk.N.ffn_down",
}
PHI2 = COMMON | {
    "model.final_layernorm": "output_norm",
    "model.layers.N.self_attn.dense": "blk.N.attn_output",
    "model.layers.N.mlp.fc1": "blk.N.ffn_up",
    "model.layers.N.mlp.fc2": "blk.N.ffn_down",
}


def gguf_name(names: dict[str, str], name: str) -> str:
    """blk.1.attn_q.weight of model.layers.1.self_attn.q_proj.weight"""
    module, kind = name.rsplit(".", 1)
    parts = module.split(".")
    layer = next((p for p in parts if p.isdigit()), "")
    general = ".".join("N" if p == layer else p for p in parts)
    return names[general].replace("N", layer) + "." + kind


def weight_scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor, by its GGUF name."""
    if name.endswith("norm.weight"):
        return 1.0, 0.25
    if name.endswith(".bias"):
        return 0.0, 0.2 if "attn_output" in name or "down" in name else 0.5
    if name == "token_embd.weight":
        return 0.0, 0.35
    gain = {"attn_q": 1.4, "attn_k": 1.4, "ffn_gate": 1.4, "ffn_up": 1.4, "output.": 3.0}
    wanted = (g for part, g in gain.items() if part in name.replace("attn_output.", ""))
    return 0.0, next(wanted, 1.0) * shape[1] ** -0.5


def fill(model: torch.nn.Module, names: dict[str, str], seed: int) -> dict[str, np.ndarray]:
    """Random weights into the model; gives them by their GGUF names, in a fixed order."""
    rng = np.random.default_rng(seed)
    parameters = dict(model.named_parameters())  # a tied head is not in it
    by_name = {gguf_name(names, name): p for name, p in parameters.items()}
    out = {}
    for name in sorted(by_name):
        shape = tuple(by_name[name].shape)
        mean, std = weight_scale(name, shape)
        out[name] = rng.normal(mean, std, shape).astype(np.float16).astype(np.float32)
        by_name[name].data.copy_(torch.from_numpy(out[name]))
    return out


def logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """float64 [n, n_vocab]"""
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None].long()).logits[0].numpy()


# ---- steps left out or done in another way -------------------------------------------------------


def rope_on_pairs(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
    half = cos.shape[-1] // 2
    cos = cos[..., :half].repeat_interleave(2, -1).unsqueeze(unsqueeze_dim)
    sin = sin[..., :half].repeat_interleave(2, -1).unsqueeze(unsqueeze_dim)

    def turn(x: Any) -> Any:
        swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        return x * cos + swapped * sin

    return turn(q), turn(k)


def no_rope(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
    return q, k


def layer_norm(self: Any, x: Any) -> Any:
    d = x - x.mean(-1, keepdim=True)
    eps = self.variance_epsilon
    return d / torch.sqrt((d * d).mean(-1, keepdim=True) + eps) * self.weight


def rms_norm(self: Any, x: Any) -> Any:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


def sequential_block(self: Any, x: Any, **options: Any) -> Any:
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(x), **options)
    x = x + attended
    return x + self.mlp(self.input_layernorm(x))


@contextmanager
def activation(model: Any, attribute: str, function: Callable[[Any], Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in model.model.layers:
            module = torch.nn.Module()
            module.forward = function
            stack.enter_context(mock.patch.object(layer.mlp, attribute, module))
        yield


@contextmanager
def without_biases(model: Any, *parts: str) -> Iterator[None]:
    saved = [(p, p.data.clone()) for n, p in model.named_parameters()
             if n.endswith(".bias") and any(part in n for part in parts)]  # fmt: skip
    for p, _ in saved:
        p.data.zero_()
    yield
    for p, data in saved:
        p.data.copy_(data)


def qwen2() -> tuple[Any, dict[str, Any], dict[str, AbstractContextManager[Any]]]:
    config = transformers.Qwen2Config(
        vocab_size=len(tokens()), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        rms_norm_eps=1e-6, tie_word_embeddings=True, hidden_act="silu", pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).double().eval()
    keys = {
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": tiny.f32(1e-6),
        "rope.freq_base": tiny.f32(10000.0),
    }
    patch = mock.patch.object
    broken = {
        "rope on pairs": patch(modeling_qwen2, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(modeling_qwen2, "apply_rotary_pos_emb", no_rope),
        "layer norm": patch(modeling_qwen2.Qwen2RMSNorm, "forward", layer_norm),
        "gelu in place of silu": activation(
            model, "act_fn", lambda x: torch.nn.functional.gelu(x, approximate="tanh")
        ),
        "no gate": activation(model, "act_fn", torch.ones_like),
        "no biases": without_biases(model, "_proj"),
    }
    return model, keys, broken


def phi2() -> tuple[Any, dict[str, Any], dict[str, AbstractContextManager[Any]]]:
    config = transformers.PhiConfig(
        vocab_size=len(tokens()), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        layer_norm_eps=1e-5, tie_word_embeddings=False, hidden_act="gelu_new", pad_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0, qk_layernorm=False,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5
        },
    )  # fmt: skip
    model = transformers.PhiForCausalLM(config).double().eval()
    keys = {
        "attention.head_count_kv": 4,
        "attention.layer_norm_epsilon": tiny.f32(1e-5),
        "rope.dimension_count": 8,
    }
    patch = mock.patch.object
    broken = {
        "rope on pairs": patch(modeling_phi, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(modeling_phi, "apply_rotary_pos_emb", no_rope),
        "rms norm": patch(torch.nn.LayerNorm, "forward", rms_norm),
        "one after the other": patch(modeling_phi.PhiDecoderLayer, "forward", sequential_block),
        "the other gelu": activation(model, "activation_fn", torch.nn.functional.gelu),
        "silu in place of gelu": activation(model, "activation_fn", torch.nn.functional.silu),
        "no biases": without_biases(model, ""),
    }
    return model, keys, broken


# ---- files ---------------------------------------------------------------------------------------


def tokenizer() -> dict[str, Any]:
    """tiny.py's byte-level vocabulary with its first merges only."""
    keys = tiny.bpe_tokenizer("gpt-2")
    merges = keys["tokenizer.ggml.merges"][:N_MERGES]
    kept = 4 + 256 + N_MERGES
    types = keys["tokenizer.ggml.token_type"]
    return keys | {
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.tokens": keys["tokenizer.ggml.tokens"][:kept],
        "tokenizer.ggml.token_type": tiny.KV(types.kind, types.value[:kept], types.sub),
    }


def tokens() -> list[str]:
    return tokenizer()["tokenizer.ggml.tokens"]


def write(path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        kv = tiny.as_kv(value)
        writer.add_key_value(key, kv.value, kv.kind, sub_type=kv.sub)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(folder: Path) -> list[str]:
    """Writes every golden; gives their names."""
    rows: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
        "qwen2": (qwen2, QWEN2),
        "phi2": (phi2, PHI2),
    }
    for seed, (arch, (build, names)) in enumerate(rows.items()):
        model, keys, broken = build()
        tensors = fill(model, names, seed)
        shape = {
            "context_length": 1024,
            "embedding_length": 64,
            "block_count": 2,
            "feed_forward_length": 96,
            "attention.head_count": 4,
        }
        meta = {f"{arch}.{key}": value for key, value in (shape | keys).items()}
        write(folder / f"{arch}.gguf", arch, {"general.name": arch} | meta | tokenizer(), tensors)

        ids = np.random.default_rng(seed).integers(4, len(tokens()), N_IDS).astype(np.int32)
        # The first, both sides of every page and chunk, the last, and some between.
        fixed = {0, 1, 2, 63, 64, 65, 127, 128, 191, 192, 254, 255, 256, 257}
        fixed |= set(range(N_IDS - N_BROKEN, N_IDS))
        more = [int(i) for i in np.linspace(3, N_IDS - 10, N_ROWS) if int(i) not in fixed]
        kept = np.array(sorted([*fixed, *more[: N_ROWS - len(fixed)]]), dtype=np.int32)
        right = logits(model, ids)
        arrays = {"ids": ids, "rows": kept, "logits": right[kept].astype(np.float32)}
        for step, patched in broken.items():
            with patched:
                arrays[f"broken: {step}"] = logits(model, ids)[-N_BROKEN:].astype(np.float32)
        if not np.array_equal(logits(model, ids), right):
            raise RuntimeError(f"{arch}: a broken step was not mended")
        np.savez(folder / f"{arch}.npz", **arrays)
    return list(rows)


def check() -> list[str]:
    """What the committed files differ in from new ones."""
    problems = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for arch in make(folder):
            old, new = (gguf.GGUFReader(f / f"{arch}.gguf") for f in (HERE, folder))
            if {k: f.contents() for k, f in old.fields.items()} != {
                k: f.contents() for k, f in new.fields.items()
            }:
                problems.append(f"{arch}.gguf: the keys differ")
            data = [{t.name: t.data for t in reader.tensors} for reader in (old, new)]
            if list(data[0]) != list(data[1]) or any(
                not np.array_equal(data[0][n], data[1][n]) for n in data[0]
            ):
                problems.append(f"{arch}.gguf: the tensors differ")
            were, are = (dict(np.load(f / f"{arch}.npz")) for f in (HERE, folder))
            if list(were) != list(are):
                problems.append(f"{arch}.npz: {sorted(set(were) ^ set(are))} are not in both")
                continue
            for key in were:
                off = np.abs(were[key].astype(float) - are[key]).max()
                limit = 0 if key in ("ids", "rows") else 1e-5 * were["logits"].std()
                if off > limit:
                    problems.append(f"{arch}.npz: {key} differs by {off:g}; allowed is {limit:g}")
                print(f"{arch}.npz: {key}: {off:.2g}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    torch.set_num_threads(1)
    if parser.parse_args().check:
        problems = check()
        print("\n".join(problems) or "the golden files are what this script makes")
        sys.exit(bool(problems))
    make(HERE)


if __name__ == "__main__":
    main()
