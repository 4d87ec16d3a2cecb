"""InternLM2 and 2.5, whose code lies with their checkpoints: the mathematics written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import plain
import torch
import transformers
from case import SMALL, Case, Steps, parameters, patch, swapped, values
from plain import RMSNorm, answer, attend, linear, turn
from torch import nn


class InternLM2Config(transformers.PreTrainedConfig):
    model_type = "internlm2"

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)


class Attention(nn.Module):
    """The rows of wqkv are, for each kv head, those of its queries, its key and its value."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.n_kv, self.group = (
            c.num_key_value_heads,
            c.num_attention_heads // c.num_key_value_heads,
        )
        self.theta = c.rope_theta
        self.wqkv = linear(c.hidden_size, 2 * c.hidden_size)
        self.wo = linear(c.hidden_size, c.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.wqkv(x).view(x.shape[0], self.n_kv, self.group + 2, -1)
        q, k, v = heads[:, :, :-2].flatten(1, 2), heads[:, :, -2], heads[:, :, -1]
        return self.wo(attend(q, k, v, self.theta))


class FeedForward(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.w1 = linear(c.hidden_size, c.intermediate_size)
        self.w3 = linear(c.hidden_size, c.intermediate_size)
        self.w2 = linear(c.intermediate_size, c.hidden_size)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(c), FeedForward(c)
        self.attention_norm, self.ffn_norm = (
            RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Trunk(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class InternLM2ForCausalLM(transformers.PreTrainedModel):
    config_class = InternLM2Config

    def __init__(self, c: Any) -> None:
        super().__init__(c)
        self.model = Trunk(c)
        self.output = linear(c.hidden_size, c.vocab_size)
        self.post_init()

    def forward(self, ids: torch.Tensor, **options: Any) -> Any:
        return answer(self.output(self.model(ids[0])))


def broken(model: Any) -> Steps:
    layers = model.model.layers
    attentions = [layer.attention for layer in layers]
    feeds = [layer.feed_forward for layer in layers]
    return {
        "rope on pairs": patch(plain, "turn", partial(turn, pairs=True)),
        "another rope base": values(*((a, "theta", 1e6) for a in attentions)),
        "gelu in place of silu": swapped(feeds, "act", nn.functional.gelu),
        "no norm weights": parameters(model, "attention_norm.weight", 1),
        "gate and up exchanged": values(
            *((f, a, getattr(f, b)) for f in feeds for a, b in (("w1", "w3"), ("w3", "w1")))
        ),
    }


CASES = [
    Case(
        "internlm2",
        "internlm2",
        InternLM2Config(
            **SMALL,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            hidden_act="silu",
            bias=False,
            tie_word_embeddings=False,
        ),
        InternLM2ForCausalLM,
        broken,
        scales={
            r".*tok_embeddings\.weight": (0.0, 0.35),
            r".*\.(?:wqkv|w1|w3)\.weight": (0.0, 0.17),
            r"output\.weight": (0.0, 0.37),
        },
    )
]
