"""phi-1, phi-1.5, phi-2."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from case import (
    SMALL,
    Case,
    Steps,
    default_rope,
    no_rope,
    parameters,
    patch,
    rms_norm,
    rope_on_pairs,
    swapped,
)
from transformers.models.phi import modeling_phi


def sequential_block(self: Any, x: Any, **options: Any) -> Any:
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(x), **options)
    x = x + attended
    return x + self.mlp(self.input_layernorm(x))


def broken(model: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    return {
        "rope on pairs": patch(modeling_phi, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(modeling_phi, "apply_rotary_pos_emb", no_rope),
        "rms norm": patch(torch.nn.LayerNorm, "forward", rms_norm),
        "one after the other": patch(modeling_phi.PhiDecoderLayer, "forward", sequential_block),
        "the other gelu": swapped(mlps, "activation_fn", torch.nn.functional.gelu),
        "silu in place of gelu": swapped(mlps, "activation_fn", torch.nn.functional.silu),
        "no biases": parameters(model, ".bias", 0),
    }


CASES = [
    Case(
        "phi2",
        "phi2",
        transformers.PhiConfig(
            **SMALL | {"num_key_value_heads": 4},
            layer_norm_eps=1e-5,
            tie_word_embeddings=False,
            hidden_act="gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attention_dropout=0.0,
            rope_parameters=default_rope(partial_rotary_factor=0.5),
        ),
        transformers.PhiForCausalLM,
        broken,
        subtle=("the other gelu",),
    )
]
