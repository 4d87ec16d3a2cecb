"""GPT-2, BLOOM, StarCoder 1 and 2, Pythia, Falcon and MPT: layer norms, no gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from case import (
    SMALL,
    Case,
    Steps,
    default_rope,
    gelu_tanh,
    no_rope,
    parameters,
    patch,
    rms_norm,
    rope_on_pairs,
    swapped,
    values,
)
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.mpt import modeling_mpt
from transformers.models.starcoder2 import modeling_starcoder2

gelu_erf = torch.nn.functional.gelu


def forms(mlps: Iterable[Any], other: Callable[..., Any]) -> Steps:
    """The feed-forward's activation: the other gelu, and none at all of them."""
    mlps = list(mlps)
    return {
        "the other gelu": swapped(mlps, "act", other),
        "silu in place of gelu": swapped(mlps, "act", torch.nn.functional.silu),
    }


def ropes(module: Any) -> Steps:
    return {
        "rope on pairs": patch(module, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(module, "apply_rotary_pos_emb", no_rope),
    }


RMS = ("rms norm", torch.nn.LayerNorm, "forward", rms_norm)
NO_DROPOUT: dict[str, Any] = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def gpt2_parallel(self: Any, x: Any, *rest: Any, **options: Any) -> Any:
    return x + self.attn(self.ln_1(x), **options)[0] + self.mlp(self.ln_2(x))


def gpt2(model: Any) -> Steps:
    return forms((layer.mlp for layer in model.transformer.h), gelu_erf) | {
        "no positions": parameters(model, "wpe.weight", 0),
        "rms norm": patch(*RMS[1:]),
        "attention and feed-forward in parallel": patch(
            modeling_gpt2.GPT2Block, "forward", gpt2_parallel
        ),
        "no biases": parameters(model, ".bias", 0),
    }


def starcoder(model: Any) -> Steps:
    return forms((layer.mlp for layer in model.transformer.h), gelu_erf) | {
        "no positions": parameters(model, "wpe.weight", 0),
        "rms norm": patch(*RMS[1:]),
        "no biases": parameters(model, ".bias", 0),
    }


def bloom(model: Any) -> Steps:
    mlps = [layer.mlp for layer in model.transformer.h]
    return {
        "the other gelu": swapped(mlps, "gelu_impl", gelu_erf),
        "silu in place of gelu": swapped(mlps, "gelu_impl", torch.nn.functional.silu),
        "rms norm": patch(*RMS[1:]),
        "no biases": parameters(model, ".bias", 0),
        "no ALiBi": patch(modeling_bloom, "_get_alibi_slopes", lambda n, device: torch.zeros(n)),
        "embeddings not normed": swapped(
            [model.transformer], "word_embeddings_layernorm", lambda x: x
        ),
    }


def neox(model: Any) -> Steps:
    layers = model.gpt_neox.layers
    parallel = layers[0].use_parallel_residual
    return (
        forms((layer.mlp for layer in layers), gelu_tanh)
        | ropes(modeling_gpt_neox)
        | {
            "the other residual": values(
                *((x, "use_parallel_residual", not parallel) for x in layers)
            ),
            "rms norm": patch(*RMS[1:]),
            "no biases": parameters(model, ".bias", 0),
        }
    )


def neox_case(name: str, parallel: bool) -> Case:
    return Case(
        name,
        "gptneox",
        transformers.GPTNeoXConfig(
            **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
            use_parallel_residual=parallel,
            tie_word_embeddings=False,
            rope_parameters=default_rope(partial_rotary_factor=0.25),
        ),
        transformers.GPTNeoXForCausalLM,
        neox,
        subtle=("the other gelu",),
        scales={r".*\.(?:query_key_value|dense_h_to_4h)\.weight": (0.0, 0.17)},
    )


def starcoder2(model: Any) -> Steps:
    return (
        forms((layer.mlp for layer in model.model.layers), gelu_erf)
        | ropes(modeling_starcoder2)
        | {
            "rms norm": patch(*RMS[1:]),
            "no window": values((model.config, "sliding_window", 4096)),
            "window longer by one": values((model.config, "sliding_window", 101)),
            "no biases": parameters(model, ".bias", 0),
        }
    )


def falcon(model: Any) -> Steps:
    return (
        forms((layer.mlp for layer in model.transformer.h), gelu_tanh)
        | ropes(modeling_falcon)
        | {
            "rms norm": patch(*RMS[1:]),
            "no biases of norms": parameters(model, ".bias", 0),
            "one after the other": patch(
                modeling_falcon.FalconDecoderLayer, "forward", falcon_one_by_one
            ),
        }
    )


def falcon_one_by_one(self: Any, x: Any, position_ids: Any = None, **options: Any) -> Any:
    """The feed-forward reads what attention added to x."""
    first, second = (getattr(self, n, None) or self.input_layernorm for n in NORMS)
    out, weights = self.self_attention(first(x), **options)
    x = x + out
    return x + self.mlp(second(x)), weights


def falcon_new(model: Any) -> Steps:
    layers = model.transformer.h
    return falcon(model) | {
        "norms exchanged": values(
            *((x, a, getattr(x, b)) for x in layers for a, b in (NORMS, NORMS[::-1]))
        ),
    }


NORMS = ("ln_attn", "ln_mlp")


def falcon_case(name: str, broken: Callable[[Any], Steps], **options: Any) -> Case:
    small = {
        k: v for k, v in SMALL.items() if k not in ("intermediate_size", "num_key_value_heads")
    }
    return Case(
        name,
        "falcon",
        transformers.FalconConfig(
            **small, **options, ffn_hidden_size=96, rope_parameters=default_rope()
        ),
        transformers.FalconForCausalLM,
        broken,
        subtle=("the other gelu",),
        scales={
            r".*\.(?:query_key_value|dense_h_to_4h)\.weight": (0.0, 0.17),
            r".*ln_(?:attn|mlp)\.bias": (0.0, 0.5),
        },
    )


def no_slopes(n_head: int, n: int, alibi_bias_max: int = 8, device: Any = None) -> Any:
    return torch.zeros(n_head, 1, n)


def bloom_slopes(n_head: int, n: int, alibi_bias_max: int = 8, device: Any = None) -> Any:
    """As for the next power of two of heads, with the heads beyond cut off."""
    slopes = 2.0 ** (-alibi_bias_max * torch.arange(1, 17) / 16)[:n_head]
    return torch.arange(1 - n, 1).view(1, 1, n) * slopes.view(-1, 1, 1)


def mpt(model: Any) -> Steps:
    attentions = [layer.attn for layer in model.transformer.blocks]
    return forms((layer.ffn for layer in model.transformer.blocks), gelu_tanh) | {
        "no ALiBi": patch(modeling_mpt, "build_mpt_alibi_tensor", no_slopes),
        "no limit of q, k and v": values(*((a, "clip_qkv", None) for a in attentions)),
        "slopes in another order": patch(modeling_mpt, "build_mpt_alibi_tensor", bloom_slopes),
        "rms norm": patch(torch.nn.LayerNorm, "forward", plain_rms_norm),
    }


def plain_rms_norm(self: Any, x: Any) -> Any:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


CASES = [
    Case(
        "gpt2",
        "gpt2",
        transformers.GPT2Config(
            vocab_size=SMALL["vocab_size"],
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=2,
            **NO_DROPOUT,
        ),
        transformers.GPT2LMHeadModel,
        gpt2,
        subtle=("the other gelu",),
        scales={
            r".*\.c_(?:attn|fc)\.weight": (0.0, 0.17),
            r".*\.c_proj\.weight": (0.0, 0.1),
            r".*\.wpe\.weight": (0.0, 0.35),
        },
    ),
    Case(
        "starcoder",
        "starcoder",
        transformers.GPTBigCodeConfig(
            vocab_size=SMALL["vocab_size"],
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=2,
            **NO_DROPOUT,
        ),
        transformers.GPTBigCodeForCausalLM,
        starcoder,
        subtle=("the other gelu",),
        scales={
            r".*\.c_(?:attn|fc)\.weight": (0.0, 0.17),
            r".*\.wpe\.weight": (0.0, 0.35),
        },
    ),
    Case(
        "bloom",
        "bloom",
        transformers.BloomConfig(
            vocab_size=SMALL["vocab_size"],
            hidden_size=160,
            n_layer=2,
            n_head=10,
            bos_token_id=1,
            eos_token_id=2,
        ),
        transformers.BloomForCausalLM,
        bloom,
        subtle=("the other gelu",),
        scales={
            r".*layernorm\.weight": (1.0, 0.25),
            r".*\.query_key_value\.weight": (0.0, 0.11),
            r".*\.dense_h_to_4h\.weight": (0.0, 0.12),
            r".*\.dense_4h_to_h\.weight": (0.0, 0.15),
        },
    ),
    neox_case("gptneox", True),
    neox_case("gptneox-sequential", False),
    Case(
        "starcoder2",
        "starcoder2",
        transformers.Starcoder2Config(
            **SMALL,
            use_bias=True,
            sliding_window=100,
            tie_word_embeddings=True,
            rope_parameters=default_rope(1e5),
        ),
        transformers.Starcoder2ForCausalLM,
        starcoder2,
        subtle=("the other gelu",),
        scales={r".*\.c_fc\.weight": (0.0, 0.17)},
    ),
    falcon_case("falcon", falcon, multi_query=True, parallel_attn=True),
    falcon_case("falcon-new", falcon_new, new_decoder_architecture=True, num_kv_heads=2),
    falcon_case(
        "falcon-one-norm",
        falcon,
        new_decoder_architecture=True,
        num_kv_heads=2,
        num_ln_in_parallel_attn=1,
    ),
    Case(
        "mpt",
        "mpt",
        transformers.MptConfig(
            vocab_size=SMALL["vocab_size"],
            d_model=160,
            n_heads=10,
            n_layers=2,
            expansion_ratio=4,
            max_seq_len=1024,
            attn_config={"clip_qkv": 1.5},
            bos_token_id=1,
            eos_token_id=2,
        ),
        transformers.MptForCausalLM,
        mpt,
        subtle=("the other gelu",),
        scales={
            r".*norm_\w\.weight": (1.0, 0.25),
            r".*\.Wqkv\.weight": (0.0, 0.11),
            r".*\.wte\.weight": (0.0, 0.25),
        },
    ),
]
