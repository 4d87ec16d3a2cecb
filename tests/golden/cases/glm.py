"""GLM-4, GLM-Edge, ERNIE 4.5 and Hunyuan: Llama with another rope, or other norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from transformers.models.ernie4_5 import modeling_ernie4_5
from transformers.models.glm import modeling_glm
from transformers.models.glm4 import modeling_glm4
from transformers.models.hunyuan_v1_dense import modeling_hunyuan_v1_dense as modeling_hunyuan


def rope_on_halves(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
    """Turns halves where the model turns neighbours."""
    half = cos.shape[-1] // 2
    cos, sin = (x[..., :half].unsqueeze(unsqueeze_dim) for x in (cos, sin))

    def turn(x: Any) -> Any:
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

    return turn(q), turn(k)


def neighbours(module: Any, model: Any, activation: str) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    return {
        "rope on halves": patch(module, "apply_rotary_pos_emb", rope_on_halves),
        "no rope": patch(module, "apply_rotary_pos_emb", no_rope),
        "gelu in place of silu": swapped(mlps, activation, gelu_tanh),
    }


def gate_second(self: Any, x: Any) -> Any:
    up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(up * self.activation_fn(gate))


def glm(model: Any) -> Steps:
    return neighbours(modeling_glm, model, "activation_fn") | {
        "gate and up exchanged": patch(modeling_glm.GlmMLP, "forward", gate_second),
    }


def glm4(model: Any) -> Steps:
    layers = model.model.layers
    return neighbours(modeling_glm4, model, "activation_fn") | {
        "gate and up exchanged": patch(modeling_glm4.Glm4MLP, "forward", gate_second),
        "no norm after attention": swapped(layers, "post_self_attn_layernorm", identity),
        "no norm after the feed-forward": swapped(layers, "post_mlp_layernorm", identity),
    }


def ernie(model: Any) -> Steps:
    return neighbours(modeling_ernie4_5, model, "act_fn")


APPLY = modeling_hunyuan.apply_rotary_pos_emb


def hunyuan(model: Any) -> Steps:
    mlps = [layer.mlp for layer in model.model.layers]
    attentions = [layer.self_attn for layer in model.model.layers]
    rotary = model.model.rotary_emb
    n = rotary.inv_freq.shape[0]
    frequency = 10000.0 ** -(torch.arange(n, dtype=torch.float64) / n)
    return {
        "rope on pairs": patch(modeling_hunyuan, "apply_rotary_pos_emb", rope_on_pairs),
        "no rope": patch(modeling_hunyuan, "apply_rotary_pos_emb", no_rope),
        "gelu in place of silu": swapped(mlps, "act_fn", gelu_tanh),
        "no norm of queries": swapped(attentions, "query_layernorm", identity),
        "no norm of keys": swapped(attentions, "key_layernorm", identity),
        "norms before rope": norms_before_rope(attentions),
        "no rope scaling": values(
            (rotary, "inv_freq", frequency), (rotary, "original_inv_freq", frequency)
        ),
    }


class Turned(torch.nn.Module):
    """A norm, and then the rope of the call that came last."""

    call: tuple[Any, ...] = ()

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Any) -> Any:
        x = self.norm(x)
        return APPLY(x, x, *Turned.call)[0]


@contextmanager
def norms_before_rope(attentions: list[Any]) -> Iterator[None]:
    def remember(q: Any, k: Any, *call: Any) -> tuple[Any, Any]:
        Turned.call = call
        return q, k

    names = ("query_layernorm", "key_layernorm")
    norms = [(a, name, Turned(getattr(a, name))) for a in attentions for name in names]
    with patch(modeling_hunyuan, "apply_rotary_pos_emb", remember), values(*norms):
        yield


def case(
    name: str,
    config: Callable[..., Any],
    model: Any,
    broken: Callable[[Any], Steps],
    **options: Any,
) -> Case:
    rope = options.pop("rope_parameters", default_rope())
    scales = {r".*\.gate_up_proj\.weight": (0.0, 0.17)}
    return Case(
        name, name, config(**SMALL, **options, rope_parameters=rope), model, broken, scales=scales
    )


HALF = default_rope(partial_rotary_factor=0.5)
CASES = [
    case(
        "chatglm",
        transformers.GlmConfig,
        transformers.GlmForCausalLM,
        glm,
        head_dim=16,
        attention_bias=False,
        rms_norm_eps=1e-5,
        rope_parameters=HALF,
    ),
    case(
        "glm4",
        transformers.Glm4Config,
        transformers.Glm4ForCausalLM,
        glm4,
        head_dim=24,
        attention_bias=False,
        tie_word_embeddings=False,
        rope_parameters=HALF,
    ),
    case(
        "ernie4_5",
        transformers.Ernie4_5Config,
        transformers.Ernie4_5ForCausalLM,
        ernie,
        head_dim=24,
        rope_parameters=default_rope(500000.0),
    ),
    case(
        "hunyuan-dense",
        transformers.HunYuanDenseV1Config,
        transformers.HunYuanDenseV1ForCausalLM,
        hunyuan,
        head_dim=24,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "alpha": 50.0,
            "factor": 1.0,
        },
    ),
]
