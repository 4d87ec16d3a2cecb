"""Qwen2 and 2.5."""

from __future__ import annotations

import math
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
from transformers.models.qwen2 import modeling_qwen2


def broken(model: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    return {
        "rope on pairs": patch(modeling_qwen2, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(modeling_qwen2, "apply_rotary_pos_emb", no_rope),
        "layer norm": patch(modeling_qwen2.Qwen2RMSNorm, "forward", layer_norm),
        "gelu in place of silu": swapped(mlps, "act_fn", gelu_tanh),
        "no gate": swapped(mlps, "act_fn", torch.ones_like),
        "no biases": parameters(model, "_proj.bias", 0),
    }


# Mixing goes from 1.66 to 3.66 of 8 pairs: from 1 to 4.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 1.5,
    "beta_slow": 0.15,
    "attention_factor": 1.25,
    "original_max_position_embeddings": 64,
}


def mixed(model: Any, begin: float, end: float, magnitude: float = 1.25) -> Any:
    """A rope whose pairs up to `begin` turn as without scaling, those from `end` on by 1 / 4."""
    rotary = model.model.rotary_emb
    pair = torch.arange(8, dtype=torch.float64)
    share = ((pair - begin) / (end - begin)).clamp(0, 1)
    frequency = 10000.0 ** -(pair / 8) * (1 - share + share / 4)
    return values((rotary, "inv_freq", frequency), (rotary, "attention_scaling", magnitude))


def yarn(model: Any) -> Steps:
    return {
        "no rope scaling": mixed(model, 98, 99, 1.0),
        "only the magnitude": mixed(model, 98, 99),
        "linear scaling": mixed(model, -2, -1),
        "no magnitude": mixed(model, 1, 4, 1.0),
        "the usual magnitude": mixed(model, 1, 4, 1 + 0.1 * math.log(4)),
        "mixing between other pairs": mixed(model, 1.66, 3.66),
    }


CASES = [
    Case(
        "qwen2",
        "qwen2",
        transformers.Qwen2Config(
            **SMALL, rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters=default_rope()
        ),
        transformers.Qwen2ForCausalLM,
        broken,
    ),
    Case(
        "qwen2-yarn",
        "qwen2",
        transformers.Qwen2Config(
            **SMALL, rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters=YARN
        ),
        transformers.Qwen2ForCausalLM,
        yarn,
    ),
]
