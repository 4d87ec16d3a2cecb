"""EXAONE 3 and 3.5, whose code lies with their checkpoints: Llama's mathematics, other names."""

from __future__ import annotations

from functools import partial
from typing import Any

import plain
import torch
import transformers
from case import SMALL, Case, Steps, parameters, patch, swapped, values
from plain import RMSNorm, answer, attend, linear, turn
from torch import nn


class ExaoneConfig(transformers.PreTrainedConfig):
    model_type = "exaone"

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)


class Attention(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        width, self.head = c.hidden_size, c.hidden_size // c.num_attention_heads
        self.theta = c.rope_theta
        self.q_proj, self.out_proj = linear(width, width), linear(width, width)
        self.k_proj, self.v_proj = (
            linear(width, c.num_key_value_heads * self.head) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend(q, k, v, self.theta))


class FeedForward(nn.Module):
    """c_fc_0 is the gate."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c_fc_0, self.c_fc_1 = (linear(c.hidden_size, c.intermediate_size) for _ in range(2))
        self.c_proj = linear(c.intermediate_size, c.hidden_size)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.act(self.c_fc_0(x)) * self.c_fc_1(x))


class Layer(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.attn, self.mlp = nn.ModuleDict({"attention": Attention(c)}), FeedForward(c)
        self.ln_1, self.ln_2 = (RMSNorm(c.hidden_size, c.layer_norm_epsilon) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn["attention"](self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Trunk(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.hidden_size)
        self.h = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.ln_f = RMSNorm(c.hidden_size, c.layer_norm_epsilon)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        for layer in self.h:
            x = layer(x)
        return self.ln_f(x)


class ExaoneForCausalLM(transformers.PreTrainedModel):
    config_class = ExaoneConfig

    def __init__(self, c: Any) -> None:
        super().__init__(c)
        self.transformer = Trunk(c)
        self.lm_head = linear(c.hidden_size, c.vocab_size)
        self.post_init()

    def forward(self, ids: torch.Tensor, **options: Any) -> Any:
        return answer(self.lm_head(self.transformer(ids[0])))


def broken(model: Any) -> Steps:
    layers = model.transformer.h
    feeds = [layer.mlp for layer in layers]
    return {
        "rope on pairs": patch(plain, "turn", partial(turn, pairs=True)),
        "another rope base": values(*((x.attn["attention"], "theta", 1e6) for x in layers)),
        "gelu in place of silu": swapped(feeds, "act", nn.functional.gelu),
        "no norm weights": parameters(model, "ln_1.weight", 1),
        "gate and up exchanged": values(
            *(
                (f, a, getattr(f, b))
                for f in feeds
                for a, b in (("c_fc_0", "c_fc_1"), ("c_fc_1", "c_fc_0"))
            )
        ),
    }


CASES = [
    Case(
        "exaone",
        "exaone",
        ExaoneConfig(
            **{k: v for k, v in SMALL.items() if k != "num_hidden_layers"},
            num_layers=2,
            layer_norm_epsilon=1e-5,
            rope_theta=10000.0,
            activation_function="silu",
            tie_word_embeddings=False,
        ),
        ExaoneForCausalLM,
        broken,
        scales={r".*\.c_fc_[01]\.weight": (0.0, 0.17)},
    )
]
