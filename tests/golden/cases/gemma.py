"""Gemma, Gemma 2, Gemma 3."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from case import (
    SMALL,
    Case,
    Steps,
    default_rope,
    identity,
    no_rope,
    patch,
    rope_on_pairs,
    swapped,
    values,
)
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3

# Norms' weights are stored less 1.
CENTRED = {r".*[qk]_norm\.weight": (0.6, 0.3), r".*norm\.weight": (0.0, 0.25)}
COMMON: dict[str, Any] = SMALL | dict(head_dim=24, tie_word_embeddings=True)


def uncentred_norm(self: Any, x: Any) -> Any:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


def common(model: Any, module: Any, norm: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    return {
        "rope on pairs": patch(module, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(module, "apply_rotary_pos_emb", no_rope),
        "norms that are not centred": patch(norm, "forward", uncentred_norm),
        "silu in place of gelu": swapped(mlps, "act_fn", torch.nn.functional.silu),
        "the other gelu": swapped(mlps, "act_fn", torch.nn.functional.gelu),
        "embeddings as they are": values(
            (model.model.embed_tokens, "embed_scale", torch.tensor(1.0))
        ),
    }


def gemma(model: Any) -> Steps:
    return common(model, modeling_gemma, modeling_gemma.GemmaRMSNorm)


def windows(model: Any) -> Steps:
    layers = model.model.layers
    types = model.config.layer_types
    return {
        "no window": values((model.config, "sliding_window", 4096)),
        "window longer by one": values(
            (model.config, "sliding_window", model.config.sliding_window + 1)
        ),
        "windows everywhere": values((model.config, "layer_types", types[:1] * len(types))),
        "no norm after attention": swapped(layers, "post_attention_layernorm", identity),
        "no norm after the feed-forward": swapped(layers, "post_feedforward_layernorm", identity),
        "scores scaled by the head": values(
            *((layer.self_attn, "scaling", 24**-0.5) for layer in layers)
        ),
    }


def gemma2(model: Any) -> Steps:
    layers = model.model.layers
    capped = ((layer.self_attn, "attn_logit_softcapping", None) for layer in layers)
    return (
        common(model, modeling_gemma2, modeling_gemma2.Gemma2RMSNorm)
        | windows(model)
        | {
            "no cap of scores": values(*capped),
            "no cap of logits": values((model.config, "final_logit_softcapping", None)),
        }
    )


def gemma3(model: Any) -> Steps:
    attentions = [layer.self_attn for layer in model.model.layers]
    rotary = model.model.rotary_emb
    return (
        common(model, modeling_gemma3, modeling_gemma3.Gemma3RMSNorm)
        | windows(model)
        | {
            "no norm of q": swapped(attentions, "q_norm", identity),
            "no norm of k": swapped(attentions, "k_norm", identity),
            "one rope for all layers": values(
                (rotary, "sliding_attention_inv_freq", rotary.full_attention_inv_freq)
            ),
            "the other rope in no layer": values(
                (rotary, "full_attention_inv_freq", rotary.sliding_attention_inv_freq)
            ),
        }
    )


CASES = [
    Case(
        "gemma",
        "gemma",
        transformers.GemmaConfig(**COMMON, rope_parameters=default_rope()),
        transformers.GemmaForCausalLM,
        gemma,
        subtle=("the other gelu",),
        scales=CENTRED,
    ),
    Case(
        "gemma2",
        "gemma2",
        transformers.Gemma2Config(
            **COMMON,
            rope_parameters=default_rope(),
            sliding_window=70,
            query_pre_attn_scalar=12,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=4.0,
        ),
        transformers.Gemma2ForCausalLM,
        gemma2,
        subtle=("the other gelu",),
        scales=CENTRED,
    ),
    Case(
        "gemma3",
        "gemma3",
        transformers.Gemma3TextConfig(
            **COMMON | {"num_hidden_layers": 6},
            rope_parameters={
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": default_rope(),
            },
            sliding_window=70,
            query_pre_attn_scalar=12,
        ),
        transformers.Gemma3ForCausalLM,
        gemma3,
        subtle=("the other gelu",),
        scales=CENTRED,
    ),
]
