"""Command R and R7B, Aya: layer norms without biases, one for attention and feed-forward."""

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
    swapped,
    values,
)
from transformers.models.cohere import modeling_cohere
from transformers.models.cohere2 import modeling_cohere2


def rms_norm(self: Any, x: Any) -> Any:
    """In place of a layer norm's forward."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


def rope_on_halves(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
    """In place of apply_rotary_pos_emb, which turns neighbours."""
    cos, sin = (
        torch.cat((x[..., ::2], x[..., ::2]), -1).unsqueeze(unsqueeze_dim) for x in (cos, sin)
    )

    def turn(x: Any) -> Any:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turn(q), turn(k)


def sequential_block(self: Any, x: Any, position_embeddings: Any, **options: Any) -> Any:
    attended, _ = self.self_attn(
        hidden_states=self.input_layernorm(x), position_embeddings=position_embeddings, **options
    )
    x = x + attended
    return x + self.mlp(self.input_layernorm(x))


def common(model: Any, module: Any, norm: Any, block: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    return {
        "rope on halves": patch(module, "apply_rotary_pos_emb", rope_on_halves),
        "no rope": patch(module, "apply_rotary_pos_emb", no_rope),
        "gelu in place of silu": swapped(mlps, "act_fn", gelu_tanh),
        "rms norm": patch(norm, "forward", rms_norm),
        "one after the other": patch(block, "forward", sequential_block),
        "logits as they are": values((model, "logit_scale", 1.0)),
    }


def command_r(model: Any) -> Steps:
    attentions = [layer.self_attn for layer in model.model.layers]
    norm, block = modeling_cohere.CohereLayerNorm, modeling_cohere.CohereDecoderLayer
    return common(model, modeling_cohere, norm, block) | {
        "no norm of q": swapped(attentions, "q_norm", identity),
        "no norm of k": swapped(attentions, "k_norm", identity),
    }


def cohere2(model: Any) -> Steps:
    types = model.config.layer_types
    norm, block = modeling_cohere2.Cohere2LayerNorm, modeling_cohere2.Cohere2DecoderLayer
    return common(model, modeling_cohere2, norm, block) | {
        "no window": values((model.config, "sliding_window", 4096)),
        "windows everywhere": values((model.config, "layer_types", types[:1] * len(types))),
        "rope everywhere": values((model.model.layers[-1].self_attn, "sliding_window", 70)),
    }


CASES = [
    Case(
        "command-r",
        "command-r",
        transformers.CohereConfig(
            **SMALL, logit_scale=0.25, use_qk_norm=True, rope_parameters=default_rope(1e5)
        ),
        transformers.CohereForCausalLM,
        command_r,
        scales={r".*[qk]_norm\.weight": (1.5, 0.4)},
    ),
    Case(
        "cohere2",
        "cohere2",
        transformers.Cohere2Config(
            **SMALL | {"num_hidden_layers": 4},
            logit_scale=0.25,
            sliding_window=70,
            rope_parameters=default_rope(5e4),
        ),
        transformers.Cohere2ForCausalLM,
        cohere2,
    ),
]
