"""Layers that carry a state: LFM2's convolutions beside attention, and Mamba 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    gelu_tanh,
    layer_norm,
    no_rope,
    parameters,
    patch,
    rope_on_pairs,
    swapped,
    values,
)
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.mamba2 import modeling_mamba2

# ---- LFM2 ----------------------------------------------------------------------------------------


def convolutions(model: Any) -> list[Any]:
    return [layer.conv for layer in model.model.layers if not layer.is_attention_layer]


@contextmanager
def changed_rows(modules: list[Any], change: Any) -> Iterator[None]:
    """The first product of each module with what `change` makes of its three parts."""

    def hook(module: Any, args: Any, out: Any) -> Any:
        return torch.cat(change(*out.chunk(3, -1)), -1)

    handles = [m.in_proj.register_forward_hook(hook) for m in modules]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def turned_taps(modules: list[Any]) -> Iterator[None]:
    """The convolutions' weights in the opposite order of time."""
    kept = [(m.weight, m.weight.data.clone()) for m in modules]
    for weight, _ in kept:
        weight.data = weight.data.flip(-1)
    yield
    for weight, data in kept:
        weight.data = data


@contextmanager
def one_tap(modules: list[Any]) -> Iterator[None]:
    """Convolutions that see the newest token only."""
    kept = [(m.weight, m.weight.data.clone()) for m in modules]
    for weight, _ in kept:
        weight.data = weight.data.clone()
        weight.data[..., :-1] = 0
    yield
    for weight, data in kept:
        weight.data = data


def lfm2(model: Any) -> Steps:
    convs = convolutions(model)
    attentions = [layer.self_attn for layer in model.model.layers if layer.is_attention_layer]
    return {
        "the gate before": changed_rows(convs, lambda b, c, x: (torch.ones_like(b), c, x)),
        "the gate after": changed_rows(convs, lambda b, c, x: (b, torch.ones_like(c), x)),
        "gates exchanged": changed_rows(convs, lambda b, c, x: (c, b, x)),
        "taps in time's order": turned_taps([m.conv for m in convs]),
        "earlier taps": one_tap([m.conv for m in convs]),
        "norm of q": swapped(attentions, "q_layernorm", lambda x: x),
        "norm of k": swapped(attentions, "k_layernorm", lambda x: x),
        "rope on pairs": patch(modeling_lfm2, "apply_rotary_pos_emb", rope_on_pairs),
        "rope": patch(modeling_lfm2, "apply_rotary_pos_emb", no_rope),
        "layer norm": patch(modeling_lfm2.Lfm2RMSNorm, "forward", layer_norm),
        "gelu in place of silu": patch(modeling_lfm2.Lfm2MLP, "forward", gelu_gated),
    }


def gelu_gated(self: Any, x: Any) -> Any:
    return self.w2(gelu_tanh(self.w1(x)) * self.w3(x))


# ---- Mamba 2 -------------------------------------------------------------------------------------


def exact_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """causal_logits where the model goes through float32 whatever its type."""
    with patch(torch, "float32", torch.float64), patch(torch.Tensor, "float", torch.Tensor.double):
        return causal_logits(model, ids)


def ungrouped(model: Any) -> Any:
    norms = [layer.mixer.norm for layer in model.backbone.layers]
    return values(*((n, "group_size", n.weight.numel()) for n in norms))


def norm_before_gate(self: Any, x: Any, gate: Any = None) -> Any:
    groups = x.unflatten(-1, (-1, self.group_size))
    groups = groups / torch.sqrt((groups * groups).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * groups.flatten(-2) * torch.nn.functional.silu(gate)


def ungated(self: Any, x: Any, gate: Any = None) -> Any:
    groups = x.unflatten(-1, (-1, self.group_size))
    groups = groups / torch.sqrt((groups * groups).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * groups.flatten(-2)


def mamba2(model: Any) -> Steps:
    mixers = [layer.mixer for layer in model.backbone.layers]
    gated_norm = modeling_mamba2.MambaRMSNormGated
    return {
        "groups of the norm": ungrouped(model),
        "norm after the gate": patch(gated_norm, "forward", norm_before_gate),
        "gate": patch(gated_norm, "forward", ungated),
        "activation of the convolution": values(*((m, "activation", None) for m in mixers)),
        "bias of the convolution": parameters(model, "conv1d.bias", 0),
        "taps in time's order": turned_taps([m.conv1d for m in mixers]),
        "earlier taps": one_tap([m.conv1d for m in mixers]),
        "bias of the time step": parameters(model, "dt_bias", 0),
        "skip": parameters(model, "mixer.D", 0),
        "decay": parameters(model, "A_log", -30),
        "one decay for all heads": parameters(model, "A_log", 0),
        "layer norm": patch(modeling_mamba2.Mamba2RMSNorm, "forward", layer_norm),
    }


CASES = [
    Case(
        "lfm2",
        "lfm2",
        transformers.Lfm2Config(
            **SMALL
            | dict(num_hidden_layers=4, intermediate_size=140, block_multiple_of=32),
            layer_types=["conv", "full_attention", "conv", "full_attention"],
            norm_eps=1e-5,
            tie_word_embeddings=True,
            rope_parameters=default_rope(1e6),
        ),
        transformers.Lfm2ForCausalLM,
        lfm2,
        scales={
            r".*\.conv\.conv\.weight": (0.0, 0.6),
            r".*\.feed_forward\.w[13]\.weight": (0.0, 0.17),
        },
    ),
    Case(
        "mamba2",
        "mamba2",
        transformers.Mamba2Config(
            vocab_size=SMALL["vocab_size"], hidden_size=64, num_hidden_layers=3,
            num_heads=8, head_dim=16, state_size=24, n_groups=2, conv_kernel=4, chunk_size=64,
            tie_word_embeddings=False, pad_token_id=None, bos_token_id=1, eos_token_id=2,
        ),
        transformers.Mamba2ForCausalLM,
        mamba2,
        scales={
            r".*\.embeddings\.weight": (0.0, 0.35),
            r".*\.conv1d\.weight": (0.0, 0.5),
            r".*\.dt_bias": (-2.0, 1.0),
            r".*\.A_log": (0.0, 0.8),
            r".*\.mixer\.D": (1.0, 0.3),
            r".*norm_f\.weight": (1.0, 0.25),
        },
        answer=exact_logits,
    ),
]  # fmt: skip
