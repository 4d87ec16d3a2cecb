"""Llama 2 and 3, Mistral, SmolLM2, TinyLlama, Gorilla, Ministral 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from case import (
    SMALL,
    Case,
    Steps,
    default_rope,
    gelu_tanh,
    layer_norm,
    no_rope,
    parameters,
    patch,
    rope_on_pairs,
    swapped,
    values,
)
from transformers.models.llama import modeling_llama
from transformers.models.ministral3 import modeling_ministral3
from transformers.models.mistral import modeling_mistral

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def plain_rope(model: Any, theta: float) -> Any:
    """The frequencies of an unscaled rope."""
    rotary = model.model.rotary_emb
    n = rotary.inv_freq.shape[0]
    frequency = theta ** -(torch.arange(n, dtype=torch.float64) / n)
    return values((rotary, "inv_freq", frequency), (rotary, "attention_scaling", 1.0))


def common(model: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    return {
        "rope on pairs": patch(modeling_llama, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(modeling_llama, "apply_rotary_pos_emb", no_rope),
        "layer norm": patch(modeling_llama.LlamaRMSNorm, "forward", layer_norm),
        "gelu in place of silu": swapped(mlps, "act_fn", gelu_tanh),
        "heads share other keys": patch(modeling_llama, "repeat_kv", tiled_kv),
    }


def tiled_kv(x: Any, n: int) -> Any:
    """Query head i reads kv head i % n_kv in place of i / group."""
    return x.repeat(1, n, 1, 1)


def scaled(theta: float) -> Callable[[Any], Steps]:
    return lambda model: {"no rope scaling": plain_rope(model, theta)}


def with_biases(model: Any) -> Steps:
    return {
        "no attention biases": parameters(model, "self_attn.q_proj.bias", 0),
        "no feed-forward biases": parameters(model, "up_proj.bias", 0),
        "no rope scaling": plain_rope(model, 10000.0),
    }


def mistral(model: Any) -> Steps:
    return {
        "no window": values((model.config, "sliding_window", 4096)),
        "window longer by one": values((model.config, "sliding_window", 101)),
        "no rope": patch(modeling_mistral, "apply_rotary_pos_emb", no_rope),
    }


def ministral(model: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    return {
        "rope on pairs": patch(modeling_ministral3, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(modeling_ministral3, "apply_rotary_pos_emb", no_rope),
        "gelu in place of silu": swapped(mlps, "act_fn", gelu_tanh),
        "no rope scaling": plain_rope(model, 10000.0),
        "the usual magnitude": values((model.model.rotary_emb, "attention_scaling", 1.1386)),
        "no temperature": patch(modeling_ministral3, "get_llama_4_attn_scale", unscaled),
    }


def unscaled(positions: Any, beta: float, length: int) -> Any:
    return torch.ones_like(positions)[:, None, :, None]


CASES = [
    Case(
        "llama",
        "llama",
        transformers.LlamaConfig(
            **SMALL, tie_word_embeddings=False, rope_parameters=default_rope()
        ),
        transformers.LlamaForCausalLM,
        common,
    ),
    Case(
        "llama-3.1",
        "llama",
        transformers.LlamaConfig(
            **SMALL, tie_word_embeddings=True, head_dim=24, rope_parameters=LLAMA3
        ),
        transformers.LlamaForCausalLM,
        scaled(5000.0),
    ),
    Case(
        "llama-linear",
        "llama",
        transformers.LlamaConfig(
            **SMALL,
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=default_rope() | {"rope_type": "linear", "factor": 4.0},
        ),
        transformers.LlamaForCausalLM,
        with_biases,
    ),
    Case(
        "mistral",
        "llama",
        transformers.MistralConfig(
            **SMALL,
            tie_word_embeddings=False,
            sliding_window=100,
            rope_parameters=default_rope(1e6),
        ),
        transformers.MistralForCausalLM,
        mistral,
    ),
    Case(
        "mistral3",
        "mistral3",
        transformers.Ministral3Config(
            **SMALL,
            head_dim=16,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "beta_fast": 1.5,
                "beta_slow": 0.15,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 64,
                "llama_4_scaling_beta": 0.3,
            },
        ),
        transformers.Ministral3ForCausalLM,
        ministral,
    ),
]
