"""phi-1, phi-1.5, phi-2; Phi-3, Phi-3.5, Phi-4-mini."""

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
    rms_norm,
    rope_on_pairs,
    swapped,
    values,
)
from transformers.models.phi import modeling_phi
from transformers.models.phi3 import modeling_phi3


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


def phi3(model: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    return {
        "rope on pairs": patch(modeling_phi3, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(modeling_phi3, "apply_rotary_pos_emb", no_rope),
        "layer norm": patch(modeling_phi3.Phi3RMSNorm, "forward", layer_norm),
        "gelu in place of silu": swapped(mlps, "activation_fn", gelu_tanh),
        "gate and up exchanged": patch(modeling_phi3.Phi3MLP, "forward", exchanged),
    }


def exchanged(self: Any, x: Any) -> Any:
    up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(up * self.activation_fn(gate))


def windowed(model: Any) -> Steps:
    return phi3(model) | {
        "no window": values((model.config, "sliding_window", 4096)),
        "window longer by one": values((model.config, "sliding_window", 101)),
    }


def long_rope(model: Any) -> Steps:
    """The other factors (by where short contexts end), none, and lengths as they were."""
    rotary = model.model.rotary_emb
    parameters = model.config.rope_parameters
    short = parameters["original_max_position_embeddings"] >= 300
    n = rotary.inv_freq.shape[0]
    plain = parameters["rope_theta"] ** -(torch.arange(n, dtype=torch.float64) / n)
    which = "long_inv_freq" if not short else "original_inv_freq"
    with_ = rotary.original_inv_freq if not short else LONG
    other = plain / torch.tensor(with_) if short else with_
    return phi3(model) | {
        "the other factors": values((rotary, which, other.to(rotary.inv_freq.dtype))),
        "no factors": values((rotary, which, plain.to(rotary.inv_freq.dtype))),
        "lengths as they were": values((rotary, "attention_scaling", 1.0)),
    }


SHORT = [1.0, 1.1, 1.3, 1.7, 2.0, 2.2]
LONG = [1.2, 2.5, 4.0, 9.0, 15.0, 20.0]


def phi3_case(name: str, n_ctx: int, broken: Any, window: int | None, rope: dict[str, Any]) -> Case:
    return Case(
        name,
        "phi3",
        transformers.Phi3Config(
            **SMALL | {"max_position_embeddings": n_ctx},
            sliding_window=window,
            tie_word_embeddings=window is None,
            original_max_position_embeddings=rope.get("original_max_position_embeddings", n_ctx),
            rope_parameters=rope,
        ),
        transformers.Phi3ForCausalLM,
        broken,
        scales={r".*\.(?:qkv_proj|gate_up_proj)\.weight": (0.0, 0.17)},
    )


def long_rope_to(original: int, **more: Any) -> dict[str, Any]:
    return default_rope(
        partial_rotary_factor=0.75,
        short_factor=SHORT,
        long_factor=LONG,
        original_max_position_embeddings=original,
        **more,
    ) | {"rope_type": "longrope"}


CASES = [
    phi3_case("phi3", 1024, windowed, 100, default_rope()),
    phi3_case("phi3-long", 1024, long_rope, None, long_rope_to(128)),
    phi3_case("phi3-short", 512, long_rope, None, long_rope_to(512, attention_factor=1.3)),
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
    ),
]
