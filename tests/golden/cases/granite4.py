"""Granite 4: Granite with state spaces in place of most attention, with experts and without."""

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
    parameters,
    patch,
    rope_on_pairs,
    swapped,
    values,
)
from transformers.models.granitemoehybrid import modeling_granitemoehybrid

from .experts import GRANITE_ROUTER, of_all
from .recurrent import exact_logits, norm_before_gate, one_tap, turned_taps, ungated

MODEL = transformers.GraniteMoeHybridForCausalLM


def multipliers(model: Any) -> Steps:
    layers = model.model.layers
    attentions = [layer.self_attn for layer in layers if layer.self_attn is not None]
    return {
        "embeddings as they are": values((model.model, "embedding_multiplier", 1.0)),
        "layers add all": values(*((layer, "residual_multiplier", 1.0) for layer in layers)),
        "scores scaled by the head": values(*((a, "scaling", 0.25) for a in attentions)),
        "logits as they are": values(
            (model, "logits_scaling", 1.0), (model.config, "logits_scaling", 1.0)
        ),
    }


def dense(model: Any) -> Steps:
    mlps = [layer.shared_mlp for layer in model.model.layers]
    return multipliers(model) | {"gelu in place of silu": swapped(mlps, "activation", gelu_tanh)}


def turned(model: Any) -> Steps:
    return dense(model) | {
        "rope on pairs": patch(modeling_granitemoehybrid, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": values((model.model, "rotary_emb", None)),
    }


def rotary(model: Any) -> Any:
    config = transformers.GraniteMoeHybridConfig(
        **SMALL, rope_parameters=default_rope(), position_embedding_type="rope"
    )
    return modeling_granitemoehybrid.GraniteMoeHybridRotaryEmbedding(config).double()


def scans(model: Any) -> Steps:
    mixers = [layer.mamba for layer in model.model.layers if layer.mamba is not None]
    gated_norm = modeling_granitemoehybrid.GraniteMoeHybridRMSNormGated
    norms = [m.norm for m in mixers]
    return {
        "groups of the norm": values(*((n, "group_size", n.weight.numel()) for n in norms)),
        "norm after the gate": patch(gated_norm, "forward", norm_before_gate),
        "gate": patch(gated_norm, "forward", ungated),
        "bias of the convolution": parameters(model, "conv1d.bias", 0),
        "taps in time's order": turned_taps([m.conv1d for m in mixers]),
        "earlier taps": one_tap([m.conv1d for m in mixers]),
        "bias of the time step": parameters(model, "dt_bias", 0),
        "skip": parameters(model, "mamba.D", 0),
        "one decay for all heads": parameters(model, "A_log", 0),
    }


def hybrid(model: Any) -> Steps:
    return (
        dense(model) | scans(model) | {"rope": values((model.model, "rotary_emb", rotary(model)))}
    )


def hybrid_experts(model: Any) -> Steps:
    blocks = [layer.block_sparse_moe for layer in model.model.layers]
    return (
        multipliers(model)
        | scans(model)
        | {
            "one expert less": values(
                *((block.router, "top_k", block.router.top_k - 1) for block in blocks)
            ),
            "the other normalisation": patch(type(blocks[0].router), "forward", of_all),
            "gelu in place of silu": swapped(
                [block.experts for block in blocks], "act_fn", gelu_tanh
            ),
            "rope on pairs": patch(
                modeling_granitemoehybrid, "apply_rotary_pos_emb", rope_on_pairs
            ),
            "no rope": values((model.model, "rotary_emb", None)),
            "no shared expert": swapped(model.model.layers, "shared_mlp", torch.zeros_like),
        }
    )


FACTORS: dict[str, Any] = dict(
    embedding_multiplier=6.0,
    residual_multiplier=0.4,
    attention_multiplier=0.35,
    logits_scaling=3.0,
    shared_intermediate_size=96,
    rope_parameters=default_rope(),
)
DENSE: dict[str, Any] = dict(num_local_experts=0, num_experts_per_tok=0)
MAMBA: dict[str, Any] = dict(
    num_hidden_layers=4,
    layer_types=["linear_attention", "full_attention"] * 2,
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_d_state=24,
    mamba_n_groups=2,
    mamba_chunk_size=64,
)
SCALES = {
    r".*\.conv1d\.weight": (0.0, 0.5),
    r".*\.dt_bias": (-2.0, 1.0),
    r".*\.A_log": (0.0, 0.8),
    r".*\.mamba\.D": (1.0, 0.3),
    r".*\.input_linear\.weight": (0.0, 0.17),
}

CASES = [
    Case(
        "granite-4",
        "granite",
        transformers.GraniteMoeHybridConfig(
            **SMALL | FACTORS | DENSE,
            layer_types=["full_attention"] * 2,
            position_embedding_type="rope",
            tie_word_embeddings=True,
        ),
        MODEL,
        turned,
        scales=SCALES,
    ),
    Case(
        "granitehybrid",
        "granitehybrid",
        transformers.GraniteMoeHybridConfig(
            **SMALL | FACTORS | DENSE | MAMBA,
            position_embedding_type="nope",
            tie_word_embeddings=True,
        ),
        MODEL,
        hybrid,
        scales=SCALES,
        answer=exact_logits,
    ),
    Case(
        "granitehybrid-experts",
        "granitehybrid",
        transformers.GraniteMoeHybridConfig(
            **SMALL | FACTORS | MAMBA,
            num_local_experts=12,
            num_experts_per_tok=3,
            position_embedding_type="rope",
            tie_word_embeddings=True,
        ),
        MODEL,
        hybrid_experts,
        scales=SCALES | GRANITE_ROUTER,
        answer=exact_logits,
    ),
]
