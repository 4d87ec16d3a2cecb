"""scripts/random_model.py writes files of a real model's shape that load and run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import smallm

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "random_model.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("random_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses looks for it
    spec.loader.exec_module(module)
    return module


def check(path: Path) -> None:
    """Logits finite, of a sane size, and not the same for every token."""
    with smallm.load(path, threads=1) as model:
        logits = model.logits([1, 40, 7, 300])
        assert np.isfinite(logits).all()
        assert 0.2 < logits.std() < 5
        assert np.abs(logits[0] - logits[1]).max() > 0.1


INTEGER = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
INTEGER += ["iq4_nl", "iq4_xs", "mxfp4", "nvfp4", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs"]
INTEGER += ["iq1_s", "iq1_m", "tq2_0", "tq1_0"]
TYPES = ["f32", "f16", "bf16", *INTEGER, "q4_k_s", "q4_k_m", "q5_k_m"]


@pytest.mark.parametrize("type_name", TYPES)
def test_every_type_loads(script: ModuleType, tmp_path: Path, type_name: str) -> None:
    shape = replace(
        script.SHAPES["llama-3.2-1b"], n_layer=2, n_embd=256, n_head=4, n_head_kv=2, n_ff=512,
        n_vocab=400, n_ctx=64,
    )  # fmt: skip
    path = tmp_path / "random.gguf"
    script.write(path, shape, type_name)
    check(path)
    # The values are of the size that was asked for, without a bias to one side.
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    up = tensors["blk.0.ffn_up.weight"]
    values = gguf.quants.dequantize(up.data, up.tensor_type)
    assert values.shape == (512, 256)
    assert values.std() == pytest.approx(256**-0.5, rel=0.15)
    assert abs(values.mean()) < 0.1 * values.std()
    assert len(np.unique(values, axis=0)) == 512
    if type_name in ("f32", "q4_0"):
        again = tmp_path / "again.gguf"
        script.write(again, shape, type_name)
        assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("shape", ["smollm2-135m", "llama-3.2-1b", "qwen2.5-0.5b", "phi-1"])
def test_every_shape_loads(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "random.gguf"
    small = ["--layers", "1", "--vocab", "400", "--ctx", "64"]
    command: list[Any] = [sys.executable, SCRIPT, "--shape", shape, "--type", "q4_k_m", *small]
    subprocess.run([*command, path], check=True)
    check(path)
    with smallm.load(path) as model:
        assert (model.info.layers, model.info.vocabulary, model.info.context) == (1, 400, 64)
        assert model.generate("Hello", max_tokens=3, temperature=0).tokens


def test_formats_are_those_of_real_files(script: ModuleType) -> None:
    def types(shape: str, type_name: str) -> dict[str, Type]:
        return {t.name: t.type for t in script.plan(script.SHAPES[shape], type_name)}

    # The published SmolLM2-135M-Instruct.Q4_1.gguf, tensor by tensor.
    small = types("smollm2-135m", "q4_1")
    assert small.pop("token_embd.weight") == Type.Q8_0
    assert {t for n, t in small.items() if "norm" not in n} == {Type.Q4_1}
    assert {t for n, t in small.items() if "norm" in n} == {Type.F32}
    # Its neighbours, by the layers that have more bits and by the size of the whole.
    large = types("llama-3.2-1b", "q4_k_m")
    more = [i for i in range(16) if large[f"blk.{i}.ffn_down.weight"] == Type.Q6_K]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    assert more == [i for i in range(16) if large[f"blk.{i}.attn_v.weight"] == Type.Q6_K]
    assert large["blk.0.attn_q.weight"] == Type.Q4_K and large["token_embd.weight"] == Type.Q6_K
    narrow = types("qwen2.5-0.5b", "q4_k_m")
    assert narrow["blk.5.ffn_up.weight"] == Type.Q5_0
    assert narrow["blk.0.attn_v.weight"] == narrow["token_embd.weight"] == Type.Q8_0
    assert narrow["blk.0.ffn_down.weight"] == Type.Q6_K
    for shape, type_name, megabytes in (
        ("smollm2-135m", "q4_1", 96.5),
        ("llama-3.2-1b", "q4_0", 763),
        ("llama-3.2-1b", "q4_k_m", 800),
        ("llama-3.2-1b", "q8_0", 1314),
        ("qwen2.5-0.5b", "q4_k_m", 392),
        ("phi-1", "q4_k_m", 892),
    ):
        n_bytes = sum(t.n_bytes for t in script.plan(script.SHAPES[shape], type_name))
        assert n_bytes / 1e6 == pytest.approx(megabytes, rel=0.005)


def test_rope_factors_are_llama_3s(script: ModuleType) -> None:
    factors = script.rope_factors(script.SHAPES["llama-3.2-1b"])
    assert factors.shape == (32,) and factors.dtype == np.float32
    assert factors[0] == 1 and factors[-1] == 32 and (np.diff(factors) >= 0).all()
    # Wave 2 pi 500000^(36/64) = 10086 is longer than 8192; 500000^(30/64) = 2950 lies between.
    assert factors[18] == 32
    turns = 8192 / (2 * np.pi * 500000 ** (30 / 64))
    assert factors[15] == pytest.approx(1 / ((4 - turns) / 3 / 32 + (turns - 1) / 3), rel=1e-5)


def test_vocabulary_merges_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    command: list[Any] = [sys.executable, SCRIPT, "--shape", "smollm2-135m", "--type", "q4_0"]
    subprocess.run([*command, "--layers", "1", "--vocab", "66100", path], check=True)
    with smallm.load(path) as model:
        for id in (0, 255, 256, 65791, 65792, 66095):  # a byte, pairs, triples
            text = model.detokenize([id])
            if "�" not in text:
                assert model.tokenize(text, add_special=False) == [id]
        assert model.tokenize("<|endoftext|>", parse_special=True) == [66096]


def test_what_does_not_fit_is_refused(script: ModuleType, tmp_path: Path) -> None:
    odd = replace(script.SHAPES["smollm2-135m"], n_embd=80, n_head=5, n_head_kv=5, n_layer=1)
    with pytest.raises(ValueError, match="rows of 80 values"):
        script.plan(odd, "q4_0")
    with pytest.raises(ValueError, match="vocabulary"):
        script.vocabulary(100)
