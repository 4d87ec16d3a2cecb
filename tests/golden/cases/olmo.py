"""OLMo, with norms that have no weights; OLMo 2 and 3 and EXAONE 4: norms of what a layer adds,
none of what it reads."""

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
    patch,
    rope_on_pairs,
    swapped,
    values,
)
from transformers.models.exaone4 import modeling_exaone4
from transformers.models.olmo import modeling_olmo
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.olmo3 import modeling_olmo3

HEAD = 16
NORMS = {r".*[qk]_norm\.weight": (1.5, 0.4)}


def bare_rms_norm(self: Any, x: Any) -> Any:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)


def norm_of_heads(self: Any, x: Any) -> Any:
    """In place of a norm's forward: k's heads each by itself."""
    width = HEAD if self.weight.shape[0] == 2 * HEAD else self.weight.shape[0]
    heads = x.unflatten(-1, (-1, width))
    squares = (heads * heads).mean(-1, keepdim=True)
    normed = (heads / torch.sqrt(squares + self.variance_epsilon)).flatten(-2)
    return normed * self.weight


def common(model: Any, module: Any) -> Steps:
    layers = model.model.layers
    attentions = [layer.self_attn for layer in layers]
    return {
        "rope on pairs": patch(module, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(module, "apply_rotary_pos_emb", no_rope),
        "gelu in place of silu": swapped([x.mlp for x in layers], "act_fn", gelu_tanh),
        "no norm of q": swapped(attentions, "q_norm", identity),
        "no norm of k": swapped(attentions, "k_norm", identity),
        "no norm after attention": swapped(layers, "post_attention_layernorm", identity),
        "no norm after the feed-forward": swapped(layers, "post_feedforward_layernorm", identity),
    }


def olmo(model: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    norm = modeling_olmo.OlmoLayerNorm
    return {
        "rope on pairs": patch(modeling_olmo, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(modeling_olmo, "apply_rotary_pos_emb", no_rope),
        "gelu in place of silu": swapped(mlps, "act_fn", gelu_tanh),
        "rms norm": patch(norm, "forward", bare_rms_norm),
        "no limit of q, k and v": values((model.config, "clip_qkv", None)),
        "another limit": values((model.config, "clip_qkv", 1.3)),
    }


def olmo2(model: Any) -> Steps:
    norm = modeling_olmo2.Olmo2RMSNorm
    return common(model, modeling_olmo2) | {
        "keys normed head by head": patch(norm, "forward", norm_of_heads)
    }


def olmo3(model: Any) -> Steps:
    types, rotary = model.config.layer_types, model.model.rotary_emb
    scaled, plain = (f"{kind}_attention_inv_freq" for kind in ("full", "sliding"))
    return common(model, modeling_olmo3) | {
        "no window": values((model.config, "sliding_window", 4096)),
        "windows everywhere": values((model.config, "layer_types", types[:1] * len(types))),
        "windows' rope scaled": values((rotary, plain, getattr(rotary, scaled))),
        "windows' lengths scaled": values(
            (rotary, "sliding_attention_attention_scaling", rotary.full_attention_attention_scaling)
        ),
        "no rope scaling": values((rotary, scaled, getattr(rotary, plain))),
        "no magnitude": values((rotary, "full_attention_attention_scaling", 1.0)),
    }


def exaone4(model: Any) -> Steps:
    attentions = [layer.self_attn for layer in model.model.layers]
    types = model.config.layer_types
    return common(model, modeling_exaone4) | {
        "no window": values((model.config, "sliding_window", 4096)),
        "windows everywhere": values((model.config, "layer_types", types[:1] * len(types))),
        "rope everywhere": values((attentions[-1], "is_sliding", True)),
    }


CASES = [
    Case(
        "olmo",
        "olmo",
        transformers.OlmoConfig(
            **SMALL, tie_word_embeddings=False, clip_qkv=1.2, rope_parameters=default_rope()
        ),
        transformers.OlmoForCausalLM,
        olmo,
    ),
    Case(
        "olmo2",
        "olmo2",
        transformers.Olmo2Config(
            **SMALL, tie_word_embeddings=False, rope_parameters=default_rope(5e5)
        ),
        transformers.Olmo2ForCausalLM,
        olmo2,
        scales=NORMS,
    ),
    Case(
        "olmo3",
        "olmo2",
        transformers.Olmo3Config(
            **SMALL | {"num_hidden_layers": 4},
            tie_word_embeddings=False,
            sliding_window=70,
            rope_parameters={
                "sliding_attention": default_rope(5e3),
                "full_attention": default_rope(5e3)
                | {
                    "rope_type": "yarn",
                    "factor": 8.0,
                    "original_max_position_embeddings": 128,
                    "beta_fast": 2.0,
                    "beta_slow": 0.5,
                },
            },
        ),
        transformers.Olmo3ForCausalLM,
        olmo3,
        scales=NORMS,
    ),
    Case(
        "exaone4",
        "exaone4",
        transformers.Exaone4Config(
            **SMALL | {"num_hidden_layers": 4},
            tie_word_embeddings=True,
            sliding_window=70,
            sliding_window_pattern=4,
            rope_parameters=default_rope(1e6),
        ),
        transformers.Exaone4ForCausalLM,
        exaone4,
        scales=NORMS,
    ),
]
