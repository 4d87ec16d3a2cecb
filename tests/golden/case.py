"""What a golden case is, and steps that many families can break."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from goldens import N_VOCAB

Steps = dict[str, AbstractContextManager[Any]]

# What a small decoder has in most families.
SMALL: dict[str, Any] = dict(
    vocab_size=N_VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    pad_token_id=None, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def default_rope(theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def causal_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """float64 [n, n_vocab] of ids [n]"""
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None].long(), use_cache=False).logits[0].numpy()


@dataclass(frozen=True)
class Case:
    """One golden model.

    name: of its files.
    arch: the row of csrc/arch.c.
    config: as for `transformers`; random weights of its shapes are made.
    model: the class.
    broken: from the model to its steps, each a context in which the step is left out or done in
        another way.  The test must see each of them.
    subtle: those steps that change little (but more than the test's bound).
    scales: pattern of a tensor's name -> (mean, deviation), before the rules of `make.scale`.
    kind: "decoder" for what test_golden.py runs; other kinds have tests of their own.
    answer: from the model and ids to what is kept, float64 [n, ...].
    """

    name: str
    arch: str
    config: Any
    model: Any
    broken: Callable[[Any], Steps]
    subtle: tuple[str, ...] = ()
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    tokenizer: str = "byte-level"
    kind: str = "decoder"
    n_ids: int = 300
    answer: Callable[[Any, np.ndarray], np.ndarray] = causal_logits


# ---- steps left out or done in another way -------------------------------------------------------

patch = mock.patch.object


def rope_on_pairs(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
    """Turns neighbours where the model turns halves: in place of apply_rotary_pos_emb."""
    half = cos.shape[-1] // 2
    cos = cos[..., :half].repeat_interleave(2, -1).unsqueeze(unsqueeze_dim)
    sin = sin[..., :half].repeat_interleave(2, -1).unsqueeze(unsqueeze_dim)

    def turn(x: Any) -> Any:
        x, rest = x[..., : 2 * half], x[..., 2 * half :]
        swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        return torch.cat((x * cos + swapped * sin, rest), -1)

    return turn(q), turn(k)


def no_rope(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
    return q, k


def layer_norm(self: Any, x: Any) -> Any:
    """In place of an RMS norm's forward."""
    d = x - x.mean(-1, keepdim=True)
    eps = self.variance_epsilon
    return d / torch.sqrt((d * d).mean(-1, keepdim=True) + eps) * self.weight


@contextmanager
def centred_norms(model: Any) -> Iterator[None]:
    """The model's RMS norms as layer norms: of what is left when the mean is taken away."""
    kinds = {type(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")}

    def centred(own: Any) -> Any:
        return lambda self, x: own(self, x - x.mean(-1, keepdim=True))

    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(patch(kind, "forward", centred(kind.forward)))
        yield


def rms_norm(self: Any, x: Any) -> Any:
    """In place of a layer norm's forward."""
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight
    return y if self.bias is None else y + self.bias


def identity(x: Any) -> Any:
    return x


def gelu_tanh(x: Any) -> Any:
    return torch.nn.functional.gelu(x, approximate="tanh")


@contextmanager
def swapped(modules: Iterable[Any], attribute: str, function: Callable[..., Any]) -> Iterator[None]:
    """A module's child (an activation, a norm) replaced by a function, in each of `modules`."""
    with ExitStack() as stack:
        for module in modules:
            child = torch.nn.Module()
            child.forward = function
            stack.enter_context(patch(module, attribute, child))
        yield


@contextmanager
def values(*places: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes set to other values: (object, name, value) each."""
    with ExitStack() as stack:
        for thing, name, value in places:
            stack.enter_context(patch(thing, name, value))
        yield


@contextmanager
def parameters(model: Any, part: str, value: float) -> Iterator[None]:
    """All parameters whose name contains `part` set to one value (0: biases, 1: norms)."""
    found = [(p, p.data.clone()) for name, p in model.named_parameters() if part in name]
    if not found:
        raise ValueError(f"no parameter has {part!r} in its name")
    for p, _ in found:
        p.data.fill_(value)
    yield
    for p, data in found:
        p.data.copy_(data)
