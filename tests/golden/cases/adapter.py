"""LoRA adapters as `peft` reads and runs them, beside models of two families."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import transformers
from case import SMALL, Case, Steps, causal_logits, default_rope, values
from goldens import write_adapter

STEP = SimpleNamespace(config={}, without="")  # what a broken step does to the folder


def adapted(case: str, model: Any, ids: np.ndarray) -> np.ndarray:
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    if STEP.without:
        shapes = {name: shape for name, shape in shapes.items() if STEP.without not in name}
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(case, shapes, Path(folder), **STEP.config)
        wrapped = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()
    try:
        return causal_logits(wrapped, ids)
    finally:
        wrapped.unload()


def broken(model: Any) -> Steps:
    matrices = ("q", "k", "v", "o", "gate", "up", "down")
    steps: Steps = {f"no {m}": values((STEP, "without", f"{m}_proj.weight")) for m in matrices}
    return steps | {
        "alpha / rank": values((STEP, "config", {"use_rslora": False})),
        "one alpha": values((STEP, "config", {"alpha_pattern": {}})),
    }


def case(name: str, arch: str, config: Any, model: Callable[..., Any]) -> Case:
    return Case(name, arch, config, model, broken, kind="adapter", answer=partial(adapted, name))


CASES = [
    case(
        "llama-lora",
        "llama",
        transformers.LlamaConfig(
            **SMALL, tie_word_embeddings=False, rope_parameters=default_rope()
        ),
        transformers.LlamaForCausalLM,
    ),
    case(
        "qwen2-lora",
        "qwen2",
        transformers.Qwen2Config(**SMALL, tie_word_embeddings=True, rope_parameters=default_rope()),
        transformers.Qwen2ForCausalLM,
    ),
]
