"""Mixtures of experts: Qwen1.5 to Qwen3, OLMoE, Granite, gpt-oss."""

from __future__ import annotations

import copy
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
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.granitemoe import modeling_granitemoe
from transformers.models.granitemoeshared import modeling_granitemoeshared
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe

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


def qwen3moe(model: Any) -> Steps:
    return router_steps(model) | {
        "rope on pairs": patch(modeling_qwen3_moe, "apply_rotary_pos_emb", rope_on_pairs),
        "no norm of queries": swapped(attentions(model), "q_norm", lambda x: x),
        "no norm of keys": swapped(attentions(model), "k_norm", lambda x: x),
    }


def olmoe(model: Any) -> Steps:
    return router_steps(model) | {
        "rope on pairs": patch(modeling_olmoe, "apply_rotary_pos_emb", rope_on_pairs),
        "no norm of queries": swapped(attentions(model), "q_norm", lambda x: x),
        "no norm of keys": swapped(attentions(model), "k_norm", lambda x: x),
    }


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def of_all(self: Any, x: Any) -> tuple[Any, Any, Any]:
    """A softmax over all experts in place of one over the chosen."""
    logits = torch.nn.functional.linear(x, self.weight, getattr(self, "bias", None))
    weights, chosen = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
    return logits, weights, chosen


def granitemoe(module: Any, model: Any) -> Steps:
    layers = model.model.layers
    routers = [layer.block_sparse_moe.router for layer in layers]
    experts = [layer.block_sparse_moe.experts for layer in layers]
    return {
        "one expert less": values(*((r, "top_k", r.top_k - 1) for r in routers)),
        "the other normalisation": patch(type(routers[0]), "forward", of_all),
        "gelu in place of silu": swapped(experts, "act_fn", gelu_tanh),
        "rope on pairs": patch(module, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(module, "apply_rotary_pos_emb", no_rope),
        "the usual attention scale": values(*((a, "scaling", 0.25) for a in attentions(model))),
        "no embedding scale": values((model.model, "embedding_multiplier", 1.0)),
        "no residual scale": values(*((x, "residual_multiplier", 1.0) for x in layers)),
        "no logit scale": values(
            (model, "logits_scaling", 1.0), (model.config, "logits_scaling", 1.0)
        ),
    }


def granitemoeshared(model: Any) -> Steps:
    return granitemoe(modeling_granitemoeshared, model) | {
        "no shared expert": swapped(model.model.layers, "shared_mlp", torch.zeros_like),
    }


def gptoss(model: Any) -> Steps:
    routers = [block.router for block in blocks(model)]
    experts = [block.experts for block in blocks(model)]
    rotary = model.model.rotary_emb
    config = model.config
    return {
        "one expert less": values(*((r, "top_k", r.top_k - 1) for r in routers)),
        "softmax over all experts": patch(type(routers[0]), "forward", of_all),
        "no router bias": parameters(model, "router.bias", 0),
        "no biases of the first matrices": parameters(model, "gate_up_proj_bias", 0),
        "no bias of the last matrix": parameters(model, "down_proj_bias", 0),
        "no attention biases": parameters(model, "q_proj.bias", 0),
        "no output bias": parameters(model, "o_proj.bias", 0),
        "no limits": values(*((e, "limit", 1e9) for e in experts)),
        "silu": values(*((e, "alpha", 1.0) for e in experts)),
        "no sinks": parameters(model, "sinks", -1e9),
        "no window": values((config, "sliding_window", 4096)),
        "windows of the other layers": values((config, "layer_types", config.layer_types[::-1])),
        "no magnitude": values((rotary, "attention_scaling", 1.0)),
        "mixing rounded to pairs": values((rotary, "inv_freq", truncated(config))),
        "rope on pairs": patch(modeling_gpt_oss, "_apply_rotary_emb", turn_pairs),
    }


def turn_pairs(x: Any, cos: Any, sin: Any) -> Any:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def truncated(config: Any) -> Any:
    rounded = copy.deepcopy(config)
    rounded.rope_parameters["truncate"] = True
    return ROPE_INIT_FUNCTIONS["yarn"](rounded)[0]


GRANITE: dict[str, Any] = dict(
    num_local_experts=12,
    num_experts_per_tok=3,
    intermediate_size=32,
    embedding_multiplier=6.0,
    residual_multiplier=0.35,
    attention_multiplier=0.4,
    logits_scaling=5.0,
    rope_parameters=default_rope(),
)
GRANITE_ROUTER = {r".*\.router\.layer\.weight": (0.0, 0.3)}
GPT_OSS = {
    r".*\.router\.weight": (0.0, 0.2),
    r".*\.experts\.gate_up_proj": (0.0, 0.5),  # beyond the limits, too
    r".*\.experts\.gate_up_proj_bias": (0.0, 0.5),
    r".*\.experts\.down_proj": (0.0, 0.1),
    r".*\.experts\.down_proj_bias": (0.0, 0.5),
    r".*\.sinks": (1.0, 1.0),
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
    Case(
        "qwen3moe",
        "qwen3moe",
        transformers.Qwen3MoeConfig(
            **SMALL,
            **EXPERTS,
            head_dim=24,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            rope_parameters=default_rope(),
        ),
        transformers.Qwen3MoeForCausalLM,
        qwen3moe,
        scales=ROUTER,
    ),
    Case(
        "olmoe",
        "olmoe",
        transformers.OlmoeConfig(
            # As published ones, as many kv heads as heads.
            **SMALL | {"intermediate_size": 32, "num_key_value_heads": 4},
            num_experts=12,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            tie_word_embeddings=False,
            rope_parameters=default_rope(),
        ),
        transformers.OlmoeForCausalLM,
        olmoe,
        scales=ROUTER,
    ),
    Case(
        "granitemoe",
        "granitemoe",
        transformers.GraniteMoeConfig(**SMALL | GRANITE, tie_word_embeddings=True),
        transformers.GraniteMoeForCausalLM,
        lambda model: granitemoe(modeling_granitemoe, model),
        scales=GRANITE_ROUTER,
    ),
    Case(
        "granitemoe-shared",
        "granitemoe",
        transformers.GraniteMoeSharedConfig(
            **SMALL | GRANITE, shared_intermediate_size=64, tie_word_embeddings=True
        ),
        transformers.GraniteMoeSharedForCausalLM,
        granitemoeshared,
        scales=GRANITE_ROUTER,
    ),
    Case(
        "gpt-oss",
        "gpt-oss",
        transformers.GptOssConfig(
            **SMALL | {"intermediate_size": 32},
            num_local_experts=12,
            num_experts_per_tok=3,
            head_dim=16,
            sliding_window=70,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "beta_fast": 1.5,
                "beta_slow": 0.15,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        ),
        transformers.GptOssForCausalLM,
        gptoss,
        scales=GPT_OSS,
    ),
]
