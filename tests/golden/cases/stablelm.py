"""StableLM 2, StableLM 3B and what is made of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from case import (
    SMALL,
    Case,
    Steps,
    default_rope,
    gelu_tanh,
    identity,
    no_rope,
    parameters,
    patch,
    rms_norm,
    rope_on_pairs,
    swapped,
)
from transformers.models.stablelm import modeling_stablelm


def sequential_block(self: Any, x: Any, **options: Any) -> Any:
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(x), **options)
    x = x + attended
    return x + self.mlp(self.input_layernorm(x))


def common(model: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    return {
        "rope on pairs": patch(modeling_stablelm, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(modeling_stablelm, "apply_rotary_pos_emb", no_rope),
        "gelu in place of silu": swapped(mlps, "act_fn", gelu_tanh),
    }


def plain(model: Any) -> Steps:
    return common(model) | {
        "rms norm": patch(torch.nn.LayerNorm, "forward", rms_norm),
        "no biases": parameters(model, "_proj.bias", 0),
    }


def normed(model: Any) -> Steps:
    attentions = [layer.self_attn for layer in model.model.layers]
    block = modeling_stablelm.StableLmDecoderLayer
    return common(model) | {
        "no norm of q": swapped(attentions, "q_layernorm", identity),
        "no norm of k": swapped(attentions, "k_layernorm", identity),
        "one after the other": patch(block, "forward", sequential_block),
    }


def config(**more: Any) -> Any:
    return transformers.StableLmConfig(
        **SMALL,
        layer_norm_eps=1e-5,
        tie_word_embeddings=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        rope_parameters=default_rope(partial_rotary_factor=0.5),
        **more,
    )


CASES = [
    Case(
        "stablelm-zephyr",
        "stablelm",
        config(use_qkv_bias=True),
        transformers.StableLmForCausalLM,
        plain,
    ),
    Case(
        "stablelm-12b",
        "stablelm",
        config(use_parallel_residual=True, qk_layernorm=True),
        transformers.StableLmForCausalLM,
        normed,
        scales={r".*_layernorm\.norms\.\d+\.weight": (1.5, 0.4)},
    ),
]
