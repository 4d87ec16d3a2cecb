"""The mathematics of decoders whose code lies with their checkpoints, written out."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn


def turn(x: torch.Tensor, theta: float, pairs: bool = False) -> torch.Tensor:
    """Rope on the halves of x [n][heads][head], or on neighbours."""
    n, _, head = x.shape
    frequency = theta ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    angle = torch.arange(n, dtype=torch.float64)[:, None, None] * frequency
    a, b = (x[..., 0::2], x[..., 1::2]) if pairs else x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -2 + pairs)
    return turned.flatten(-2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, theta: float) -> torch.Tensor:
    """[n][heads * head] of q [n][heads][head], k and v [n][kv heads][head]."""
    n, heads, head = q.shape
    group = heads // k.shape[1]
    q, k = turn(q, theta), turn(k, theta).repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / head**0.5
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    mixed = torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(group, 1))
    return mixed.flatten(1)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def answer(logits: torch.Tensor) -> Any:
    """What a model of `transformers` gives: logits [n, n_vocab] of one text."""
    return transformers.modeling_outputs.CausalLMOutput(logits=logits[None])
