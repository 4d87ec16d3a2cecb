"""AFM and Nemotron: feed-forwards without a gate, of the positive part's square."""

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
)
from transformers.models.arcee import modeling_arcee
from transformers.models.nemotron import modeling_nemotron


def steps(module: Any, model: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    return {
        "rope on pairs": patch(module, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(module, "apply_rotary_pos_emb", no_rope),
        "relu in place of its square": swapped(mlps, "act_fn", torch.nn.functional.relu),
        "gelu in place of the square": swapped(mlps, "act_fn", gelu_tanh),
    }


def arcee(model: Any) -> Steps:
    return steps(modeling_arcee, model)


def rms_norm_1p(self: Any, x: Any) -> Any:
    weight = self.weight + 1
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * weight + self.bias


def nemotron(model: Any) -> Steps:
    return steps(modeling_nemotron, model) | {
        "rms norm": patch(modeling_nemotron.NemotronLayerNorm1P, "forward", rms_norm_1p),
        "no biases of norms": parameters(model, "norm.bias", 0),
    }


CASES = [
    Case(
        "arcee",
        "arcee",
        transformers.ArceeConfig(
            **SMALL, tie_word_embeddings=False, rope_parameters=default_rope()
        ),
        transformers.ArceeForCausalLM,
        arcee,
    ),
    Case(
        "nemotron",
        "nemotron",
        transformers.NemotronConfig(
            **SMALL,
            tie_word_embeddings=False,
            rope_parameters=default_rope(partial_rotary_factor=0.5),
        ),
        transformers.NemotronForCausalLM,
        nemotron,
        scales={r".*norm\.weight": (0.0, 0.25)},
    ),
]
