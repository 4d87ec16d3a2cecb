"""OLMo 2 and EXAONE 4: norms of what a layer adds, none of what it reads."""

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
from transformers.models.olmo2 import modeling_olmo2

HEAD = 16
NORMS = {r".*[qk]_norm\.weight": (1.5, 0.4)}


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


def olmo2(model: Any) -> Steps:
    norm = modeling_olmo2.Olmo2RMSNorm
    return common(model, modeling_olmo2) | {
        "keys normed head by head": patch(norm, "forward", norm_of_heads)
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
