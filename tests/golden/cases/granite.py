"""Granite, MiniCPM and SmolLM3: Llama with multipliers, and with layers that have no rope."""

from __future__ import annotations

from typing import Any

import transformers
from case import (
    SMALL,
    Case,
    Steps,
    default_rope,
    gelu_tanh,
    no_rope,
    patch,
    rope_on_pairs,
    swapped,
    values,
)
from transformers.models.granite import modeling_granite
from transformers.models.smollm3 import modeling_smollm3


def common(model: Any, module: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    return {
        "rope on pairs": patch(module, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(module, "apply_rotary_pos_emb", no_rope),
        "gelu in place of silu": swapped(mlps, "act_fn", gelu_tanh),
    }


class MiniCPMConfig(transformers.GraniteConfig):
    """Other names for what Granite has; MiniCPM's own code lies with its checkpoints."""

    model_type = "minicpm"


class MiniCPMForCausalLM(transformers.GraniteForCausalLM):
    config_class = MiniCPMConfig


def granite(model: Any) -> Steps:
    layers = model.model.layers
    return common(model, modeling_granite) | {
        "embeddings as they are": values((model.model, "embedding_multiplier", 1.0)),
        "layers add all": values(*((layer, "residual_multiplier", 1.0) for layer in layers)),
        "scores scaled by the head": values(*((x.self_attn, "scaling", 0.25) for x in layers)),
        "logits as they are": values((model.config, "logits_scaling", 1.0)),
    }


def minicpm(model: Any) -> Steps:
    return {k: v for k, v in granite(model).items() if k != "scores scaled by the head"}


def smollm3(model: Any) -> Steps:
    attentions = [layer.self_attn for layer in model.model.layers]
    return common(model, modeling_smollm3) | {
        "rope everywhere": values(*((attention, "use_rope", 1) for attention in attentions))
    }


CASES = [
    Case(
        "granite",
        "granite",
        transformers.GraniteConfig(
            **SMALL,
            tie_word_embeddings=True,
            rope_parameters=default_rope(),
            embedding_multiplier=6.0,
            residual_multiplier=0.4,
            attention_multiplier=0.35,
            logits_scaling=3.0,
        ),
        transformers.GraniteForCausalLM,
        granite,
    ),
    Case(
        "minicpm",
        "minicpm",
        MiniCPMConfig(
            **SMALL,
            tie_word_embeddings=False,
            rope_parameters=default_rope(),
            scale_emb=6,
            embedding_multiplier=6.0,
            scale_depth=0.6,
            residual_multiplier=0.6 / 2**0.5,
            attention_multiplier=0.25,
            dim_model_base=24,
            logits_scaling=64 / 24,
        ),
        MiniCPMForCausalLM,
        minicpm,
    ),
    Case(
        "smollm3",
        "smollm3",
        transformers.SmolLM3Config(
            **SMALL | {"num_hidden_layers": 4},
            tie_word_embeddings=True,
            rope_parameters=default_rope(1e5),
        ),
        transformers.SmolLM3ForCausalLM,
        smollm3,
    ),
]
