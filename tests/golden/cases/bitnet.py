"""BitNet b1.58."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from case import (
    SMALL,
    Case,
    Steps,
    causal_logits,
    default_rope,
    identity,
    layer_norm,
    no_rope,
    patch,
    rope_on_pairs,
    swapped,
)
from transformers.integrations import bitnet
from transformers.models.bitnet import modeling_bitnet

# As the checkpoints that hold floats, which become ternary when they are used.
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


def squared(x: Any) -> Any:
    return x * x


def common(model: Any) -> Steps:
    layers = model.model.layers
    return {
        "rope on pairs": patch(modeling_bitnet, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(modeling_bitnet, "apply_rotary_pos_emb", no_rope),
        "layer norm": patch(modeling_bitnet.BitNetRMSNorm, "forward", layer_norm),
        "no norm of attention": swapped([x.self_attn for x in layers], "attn_sub_norm", identity),
        "no norm in the feed-forward": swapped([x.mlp for x in layers], "ffn_sub_norm", identity),
    }


def relu2(model: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    return common(model) | {
        "silu in place of squared relu": swapped(mlps, "act_fn", torch.nn.functional.silu),
        "relu that is not squared": swapped(mlps, "act_fn", torch.relu),
        "a square without relu": swapped(mlps, "act_fn", squared),
        "weights that are not ternary": patch(bitnet.WeightQuant, "apply", identity),
    }


def silu(model: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    return common(model) | {
        "squared relu in place of silu": swapped(mlps, "act_fn", lambda x: squared(torch.relu(x)))
    }


def float_activations(model: Any, ids: np.ndarray) -> np.ndarray:
    """As if activations were not rounded to 8 bits before each matrix: that is left to the format
    of its weights, here as elsewhere."""
    with torch.compiler.set_stance("force_eager"), patch(bitnet.ActQuant, "apply", identity):
        return causal_logits(model, ids)


CASES = [
    Case(
        "bitnet",
        "bitnet",
        transformers.BitNetConfig(
            **SMALL | {"hidden_size": 256, "intermediate_size": 512},
            hidden_act="relu2",
            rope_parameters=default_rope(5e5),
            tie_word_embeddings=True,
            quantization_config=ONLINE,
        ),
        transformers.BitNetForCausalLM,
        relu2,
        # Rounding leaves two thirds of the deviation.
        scales={r".*[qk]_proj\.weight": (0.0, 0.17)},
        answer=float_activations,
    ),
    Case(
        "bitnet-silu",
        "bitnet",
        transformers.BitNetConfig(
            **SMALL,
            hidden_act="silu",
            rope_parameters=default_rope(),
            tie_word_embeddings=True,
        ),
        transformers.BitNetForCausalLM,
        silu,
    ),
]
