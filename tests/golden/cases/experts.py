"""Mixtures of experts: Qwen1.5-MoE and Qwen2-MoE."""

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
    no_rope,
    parameters,
    patch,
    rope_on_pairs,
    swapped,
    values,
)
from transformers.models.qwen2_moe import modeling_qwen2_moe

# Shapes of a layer's experts; three of twelve and groups of tokens of very different sizes.
EXPERTS: dict[str, Any] = dict(num_experts=12, num_experts_per_tok=3, moe_intermediate_size=32)
ROUTER = {r".*\.mlp\.gate\.weight": (0.0, 0.3)}


def blocks(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.layers]


def router_steps(model: Any) -> Steps:
    """What every router can get wrong."""
    routers = [block.gate for block in blocks(model)]
    normed = routers[0].norm_topk_prob
    return {
        "one expert less": values(*((r, "top_k", r.top_k - 1) for r in routers)),
        "the other normalisation": values(*((r, "norm_topk_prob", not normed) for r in routers)),
        "gelu in place of silu": swapped([b.experts for b in blocks(model)], "act_fn", gelu_tanh),
        "no gate": swapped([b.experts for b in blocks(model)], "act_fn", torch.ones_like),
        "all experts alike": parameters(model, "mlp.gate.weight", 0),
    }


def qwen2moe(model: Any) -> Steps:
    shared = [block.shared_expert for block in blocks(model)]
    return router_steps(model) | {
        "rope on pairs": patch(modeling_qwen2_moe, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(modeling_qwen2_moe, "apply_rotary_pos_emb", no_rope),
        "no shared expert": swapped(blocks(model), "shared_expert", torch.zeros_like),
        "shared expert without its gate": swapped(
            blocks(model), "shared_expert_gate", lambda x: torch.full_like(x[:, :1], 100.0)
        ),
        "shared expert with gelu": swapped(shared, "act_fn", gelu_tanh),
        "no biases": parameters(model, "_proj.bias", 0),
    }


CASES = [
    Case(
        "qwen2moe",
        "qwen2moe",
        transformers.Qwen2MoeConfig(
            **SMALL,
            **EXPERTS,
            shared_expert_intermediate_size=64,
            norm_topk_prob=False,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            rope_parameters=default_rope(),
        ),
        transformers.Qwen2MoeForCausalLM,
        qwen2moe,
        scales=ROUTER | {r".*\.shared_expert_gate\.weight": (0.0, 0.2)},
    ),
]
