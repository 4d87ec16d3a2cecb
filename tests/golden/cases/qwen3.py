"""Qwen3."""

from __future__ import annotations

from typing import Any

import transformers
from case import (
    SMALL,
    Case,
    Steps,
    default_rope,
    gelu_tanh,
    identity,
    layer_norm,
    no_rope,
    patch,
    rope_on_pairs,
    swapped,
)
from transformers.models.qwen3 import modeling_qwen3


def broken(model: Any) -> Steps:
    layers = model.model.layers
    attentions = [layer.self_attn for layer in layers]
    return {
        "rope on pairs": patch(modeling_qwen3, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(modeling_qwen3, "apply_rotary_pos_emb", no_rope),
        "layer norm": patch(modeling_qwen3.Qwen3RMSNorm, "forward", layer_norm),
        "gelu in place of silu": swapped([x.mlp for x in layers], "act_fn", gelu_tanh),
        "no norm of q": swapped(attentions, "q_norm", identity),
        "no norm of k": swapped(attentions, "k_norm", identity),
    }


CASES = [
    Case(
        "qwen3",
        "qwen3",
        transformers.Qwen3Config(
            **SMALL,
            head_dim=24,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_parameters=default_rope(1e5),
        ),
        transformers.Qwen3ForCausalLM,
        broken,
        scales={r".*[qk]_norm\.weight": (1.5, 0.4)},
    )
]
