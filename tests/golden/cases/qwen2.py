"""Qwen2 and 2.5."""

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
    layer_norm,
    no_rope,
    parameters,
    patch,
    rope_on_pairs,
    swapped,
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


CASES = [
    Case(
        "qwen2",
        "qwen2",
        transformers.Qwen2Config(
            **SMALL, rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters=default_rope()
        ),
        transformers.Qwen2ForCausalLM,
        broken,
    )
]
