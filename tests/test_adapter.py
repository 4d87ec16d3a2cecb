"""LoRA adapters: the answers of an explicit merge, in any company, and files that are refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import goldens
import numpy as np
import pytest
import safetensors.numpy
import tiny
from gguf import GGMLQuantizationType as GgmlType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Reference

import smallm
from smallm.quantize._formats import formats, rewrite

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def random_pairs(tensors: dict[str, tiny.Tensor], rank: Callable[[str], int], seed: int) -> Pairs:
    """A [rank, k] and B [rows, rank] for every matrix of the layers, in proportion to W."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for name, tensor in tensors.items():
        if name.startswith("blk.") and len(tensor.shape) == 2:
            rows, k = tensor.shape
            r = rank(name)
            a = rng.normal(0, 1, (r, k)).astype(np.float32)
            b = rng.normal(0, 0.7 * (k * r) ** -0.5, (rows, r)).astype(np.float32)
            pairs[name] = (a, b)
    return pairs


def write_adapter(
    path: Path,
    pairs: Pairs,
    *,
    alpha: float = 16.0,
    arch: str = "llama",
    keys: dict[str, Any] | None = None,
    dtype: Any = np.float32,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """As llama.cpp's converter writes it.  keys: added or replaced, None drops one."""
    writer = gguf.GGUFWriter(path, arch)
    values: dict[str, Any] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": tiny.f32(alpha),
        **(keys or {}),
    }
    for key, value in values.items():
        if value is not None:
            kv = tiny.as_kv(value)
            writer.add_key_value(key, kv.value, kv.kind, sub_type=kv.sub)
    written = {f"{n}.lora_{x}": v for n, p in pairs.items() for x, v in zip("ab", p, strict=True)}
    for name, value in (written | (tensors or {})).items():
        writer.add_tensor(name, value.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merged(tensors: dict[str, tiny.Tensor], pairs: Pairs, alpha: float, scale: float = 1.0) -> None:
    """W += scale * alpha / rank * B A"""
    for name, (a, b) in pairs.items():
        factor = scale * (alpha / a.shape[0] if alpha else 1.0)
        w = tensors[name]
        product = b.astype(np.float64) @ a.astype(np.float64)
        tensors[name] = tiny.Tensor(w.type, w.shape, (w.data + factor * product).astype(np.float32))


class Setup:
    """A base model, two adapters (ranks of 5 and up to 40) and their explicit merges."""

    def __init__(self, folder: Path) -> None:
        self.base = tiny.write_tiny(folder / "base.gguf", n_ctx=1024)
        self.pairs = {
            "one": random_pairs(self.base.tensors, lambda name: 5, 1),
            "two": random_pairs(self.base.tensors, lambda name: 8 + 2 * len(name), 2),
        }
        self.alpha = {"one": 7.5, "two": 0.0}
        self.paths = {
            name: write_adapter(folder / f"{name}.gguf", pairs, alpha=self.alpha[name])
            for name, pairs in self.pairs.items()
        }
        self.folder = folder
        rng = np.random.default_rng(3)
        self.ids = [int(i) for i in rng.integers(3, self.base.n_vocab, 40)]

    def merge(self, name: str, scale: float = 1.0) -> Path:
        return tiny.write_tiny(
            self.folder / f"merged-{name}-{scale}.gguf",
            n_ctx=1024,
            edit=lambda tensors: merged(tensors, self.pairs[name], self.alpha[name], scale),
        ).path

    def load(self, **options: Any) -> smallm.Model:
        return smallm.load(self.base.path, adapters=self.paths, kv="f32", **options)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("adapters"))


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / expected.std())


@pytest.mark.parametrize(("name", "scale"), [("one", 1.0), ("two", 1.0), ("two", -0.5)])
def test_logits_are_those_of_an_explicit_merge(setup: Setup, name: str, scale: float) -> None:
    expected = Reference(setup.merge(name, scale), np.float64).logits(setup.ids)
    with setup.load() as model:
        got = model.logits(setup.ids, adapter=name, adapter_scale=scale)
        alone = model.logits(setup.ids)
    assert error(got, expected) < 1e-4
    assert error(alone, expected) > 0.5


@pytest.mark.parametrize("matrix", MATRICES)
def test_each_matrix_is_adapted(setup: Setup, tmp_path: Path, matrix: str) -> None:
    pairs = {n: p for n, p in setup.pairs["two"].items() if f".{matrix}." in n}
    assert len(pairs) == 2
    path = write_adapter(tmp_path / "a.gguf", pairs, alpha=0)
    together = tiny.write_tiny(
        tmp_path / "merged.gguf", n_ctx=1024, edit=lambda tensors: merged(tensors, pairs, 0)
    )
    expected = Reference(together.path, np.float64).logits(setup.ids)
    with smallm.load(setup.base.path, adapters={"a": path}, kv="f32") as model:
        assert error(model.logits(setup.ids, adapter="a"), expected) < 1e-4
        assert error(model.logits(setup.ids), expected) > 0.01


def test_biases_fused_and_gelu_layers(tmp_path: Path) -> None:
    """phi2's golden, whose q, k and v are made one tensor: an adapter of the whole."""
    golden = goldens.Golden("phi2", tmp_path)

    def fuse(tensors: dict[str, tiny.Tensor]) -> None:
        for i in range(2):
            for kind in ("weight", "bias"):
                parts = [tensors.pop(f"blk.{i}.attn_{x}.{kind}") for x in "qkv"]
                data = np.concatenate([p.data for p in parts])
                tensors[f"blk.{i}.attn_qkv.{kind}"] = tiny.Tensor(GgmlType.F32, data.shape, data)

    base = golden.change(tmp_path / "fused.gguf", edit=fuse)
    tensors: dict[str, tiny.Tensor] = {}
    golden.change(tmp_path / "again.gguf", edit=lambda t: (fuse(t), tensors.update(t)))
    pairs = random_pairs(tensors, lambda name: 20, 4)
    assert {n.split(".")[2] for n in pairs} == {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}
    path = write_adapter(tmp_path / "a.gguf", pairs, arch="phi2")
    expected = golden.change(
        tmp_path / "merged.gguf", edit=lambda t: (fuse(t), merged(t, pairs, 16.0))
    )
    with smallm.load(expected, kv="f32") as model:
        wanted = model.logits(golden.ids)
    with smallm.load(base, adapters={"a": path}, kv="f32") as model:
        assert error(model.logits(golden.ids, adapter="a"), wanted) < 1e-4
        assert error(model.logits(golden.ids), wanted) > 0.1


def test_other_formats_of_the_file(setup: Setup, tmp_path: Path) -> None:
    """float16 pairs, and quantized bases: the float32 source goes through A."""
    pairs = {n: (a.astype(np.float16), b.astype(np.float16)) for n, (a, b) in
             setup.pairs["one"].items()}  # fmt: skip
    path = write_adapter(tmp_path / "half.gguf", pairs, alpha=7.5, dtype=np.float16)
    wide = {n: (a.astype(np.float32), b.astype(np.float32)) for n, (a, b) in pairs.items()}
    same = write_adapter(tmp_path / "same.gguf", wide, alpha=7.5)
    with smallm.load(setup.base.path, adapters={"half": path, "same": same}) as model:
        half = model.logits(setup.ids, adapter="half")
        assert np.array_equal(half, model.logits(setup.ids, adapter="same"))


# ---- one answer everywhere -----------------------------------------------------------------------


def test_chunks_threads_and_scale_zero_give_the_same_bits(setup: Setup) -> None:
    with setup.load(threads=1) as model:
        expected = {n: model.logits(setup.ids, adapter=n, adapter_scale=1.5) for n in setup.paths}
        alone = model.logits(setup.ids)
        for chunk in (1, 2, 3, 4, 7, 16):
            for name, wanted in expected.items():
                got = model.logits(setup.ids, chunk=chunk, adapter=name, adapter_scale=1.5)
                assert np.array_equal(got, wanted), (chunk, name)
        assert np.array_equal(model.logits(setup.ids, adapter="one", adapter_scale=0), alone)
    with setup.load(threads=3) as model:
        for name, wanted in expected.items():
            assert np.array_equal(model.logits(setup.ids, adapter=name, adapter_scale=1.5), wanted)
        assert np.array_equal(model.logits(setup.ids), alone)
    with smallm.load(setup.base.path, kv="f32") as model:
        assert np.array_equal(model.logits(setup.ids), alone)


def test_company_changes_no_answer(setup: Setup) -> None:
    """Requests with both adapters, at two scales, and without one, all in one batch."""
    kinds: list[dict[str, Any]] = [
        {},
        {"adapter": "one"},
        {"adapter": "two"},
        {"adapter": "two", "adapter_scale": 0.25},
        {"adapter": "one", "adapter_scale": -1.0},
    ]
    settings: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "logprobs": 0}
    with setup.load() as model:
        single = [model.generate(setup.ids[:9], **kind, **settings) for kind in kinds]
    assert len({tuple(c.tokens) for c in single}) == len(kinds)
    with setup.load() as model:
        for _ in range(2):  # the second time from the cache
            streams = [model.stream(setup.ids[:9], **kind, **settings) for kind in kinds]
            for stream, alone in zip(streams, single, strict=True):
                for _chunk in stream:
                    pass
                assert stream.completion.tokens == alone.tokens
                assert stream.completion.logprobs == alone.logprobs


def test_the_cache_knows_adapter_and_scale(setup: Setup) -> None:
    settings: dict[str, Any] = {"max_tokens": 2, "temperature": 0}
    with setup.load() as model:

        def cached(**kind: Any) -> int:
            return model.generate(setup.ids, **kind, **settings).usage.cached_tokens

        n = len(setup.ids) - 1
        assert cached() == 0
        assert cached(adapter="one") == 0
        assert cached(adapter="one", adapter_scale=0.5) == 0
        assert cached(adapter="two") == 0
        assert cached(adapter="one") == n
        assert cached(adapter="one", adapter_scale=0.5) == n
        assert cached(adapter="one", adapter_scale=0) == n
        assert cached() == n


def test_tiers_give_the_same_bits(setup: Setup) -> None:
    code = (
        "import sys, json, smallm, hashlib\n"
        "base, adapters, ids = json.loads(sys.argv[1])\n"
        "with smallm.load(base, adapters=adapters) as m:\n"
        "    for name in adapters:\n"
        "        print(hashlib.sha256(m.logits(ids, adapter=name).tobytes()).hexdigest())\n"
        "        print(m.generate(ids, adapter=name, temperature=0, max_tokens=8).tokens)\n"
    )
    paths = {name: str(path) for name, path in setup.paths.items()}
    argument = json.dumps([str(setup.base.path), paths, setup.ids])
    answers = set()
    for tier in ("generic", "avx2", None):
        env = {**os.environ, **({"SMALLM_ISA": tier} if tier else {})}
        done = subprocess.run(
            [sys.executable, "-c", code, argument],
            env=env,
            cwd=setup.folder,
            capture_output=True,
            text=True,
        )
        if tier == "avx2" and "avx2" in done.stderr:
            continue  # another machine
        assert done.returncode == 0, done.stderr
        answers.add(done.stdout)
    assert len(answers) == 1


# ---- memory --------------------------------------------------------------------------------------


def test_memory_is_counted_and_limited(setup: Setup) -> None:
    with setup.load() as model:
        info = model.info
        model.generate(setup.ids, max_tokens=1)
        before = model.info.scratch_bytes
        model.generate(setup.ids, max_tokens=1, adapter="two")
        assert model.info.scratch_bytes > before
    floats = sum(a.size + b.size for p in setup.pairs.values() for a, b in p.values())
    assert 4 * floats <= info.adapter_bytes < 16 * floats
    with smallm.load(setup.base.path) as model:
        assert model.info.adapter_bytes == 0
    with pytest.raises(smallm.MemoryBudgetError, match=r"one\.gguf.*memory_limit"):
        setup.load(memory_limit=info.bytes + 1000)
    with pytest.raises(smallm.MemoryBudgetError, match="memory_limit"):
        setup.load(memory_limit=info.bytes + info.adapter_bytes + 1000)
    # Enough to open it, too little to run an adapter.
    whole = info.bytes + info.adapter_bytes + info.scratch_bytes
    with setup.load(memory_limit=whole + 300_000) as model:
        model.generate(setup.ids[:4], max_tokens=1)
        with pytest.raises(smallm.MemoryBudgetError, match="adapter of rank"):
            model.generate(setup.ids[:4], max_tokens=1, adapter="two")
        model.generate(setup.ids[:4], max_tokens=1)


# ---- refusals ------------------------------------------------------------------------------------


def test_arguments_are_judged(setup: Setup) -> None:
    with setup.load() as model:
        with pytest.raises(ValueError, match="'three'; this model was loaded with 'one', 'two'"):
            model.generate("a", adapter="three")
        with pytest.raises(TypeError, match="adapter must be a str, not int"):
            model.generate("a", adapter=3)
        with pytest.raises(ValueError, match="adapter_scale must be"):
            model.logits([3], adapter="one", adapter_scale=float("nan"))
    with smallm.load(setup.base.path) as model, pytest.raises(ValueError, match="with none"):
        model.generate("a", adapter="one")
    with pytest.raises(TypeError, match="adapters must be a dict"):
        smallm.load(setup.base.path, adapters=["a.gguf"])
    with pytest.raises(TypeError, match="adapters must be a dict"):
        smallm.load(setup.base.path, adapters={"a": 3})
    with pytest.raises(smallm.ModelNotFoundError, match=r"gone\.gguf"):
        smallm.load(setup.base.path, adapters={"a": setup.folder / "gone.gguf"})


Q = "blk.0.attn_q.weight"
# A merged checkpoint whose weights are then rounded is another model.
PLAIN = [n for n in goldens.names() if "quantization_config" not in goldens.config(n)]
PLAIN += goldens.names("encoder-decoder")


def with_value(pairs: Pairs, value: float) -> Pairs:
    a, b = pairs[Q]
    b = b.copy()
    b[3, 2] = value
    return {Q: (a, b)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"keys": {"general.type": "model"}}, 'general.type is "model"'),
        (lambda p: {"keys": {"general.type": None}}, 'general.type is ""'),
        (lambda p: {"keys": {"adapter.type": "ia3"}}, 'adapter.type is "ia3"'),
        (lambda p: {"arch": "qwen2"}, 'general.architecture is "qwen2".*"llama"'),
        (lambda p: {"alpha": float("inf")}, "adapter.lora.alpha is inf"),
        (
            lambda p: {"keys": {"adapter.alora.invocation_tokens": [1, 2]}},
            "adapter.alora.invocation_tokens",
        ),
        (lambda p: {"pairs": {}}, "no tensors"),
        (lambda p: {"pairs": {"blk.9.attn_q.weight": p[Q]}}, r"blk.9.attn_q.weight.lora_a is not"),
        (lambda p: {"pairs": {"token_embd.weight": p[Q]}}, r"token_embd.weight.lora_a is not"),
        (lambda p: {"tensors": {"blk.0.attn_norm.weight": np.ones(64)}}, "attn_norm.weight is not"),
        (lambda p: {"tensors": {f"{Q}.lora_c": np.ones(64)}}, "attn_q.weight.lora_c is not"),
        (lambda p: {"tensors": {"b": np.ones(64)}}, "the tensor b is not"),
        (
            lambda p: {"tensors": {"blk.1.attn_q.weight.lora_b": p[Q][1]}, "pairs": {Q: p[Q]}},
            r"lora_b is there, but not blk.1.attn_q.weight.lora_a",
        ),
        (
            lambda p: {"pairs": {Q: (p[Q][0][:, :32], p[Q][1])}},
            r"attn_q.weight.lora_a has shape \[32, 5, 1, 1\].*\[64, 5\]",
        ),
        (
            lambda p: {"pairs": {Q: (p[Q][0], p[Q][1][:60])}},
            r"attn_q.weight.lora_b has shape \[5, 60, 1, 1\].*\[5, 64\]",
        ),
        (
            lambda p: {"pairs": {Q: (p[Q][0], p[Q][1][:, :4])}},
            r"attn_q.weight.lora_b has shape \[4, 64, 1, 1\].*\[5, 64\]",
        ),
        (lambda p: {"pairs": with_value(p, float("nan"))}, "lora_b has an infinite .* row 3"),
        (lambda p: {"pairs": with_value(p, float("inf"))}, "lora_b has an infinite .* row 3"),
    ],
)  # fmt: skip
def test_files_are_refused_by_name(
    setup: Setup, tmp_path: Path, change: Callable[[Pairs], dict[str, Any]], message: str
) -> None:
    options = {"pairs": setup.pairs["one"], **change(setup.pairs["one"])}
    path = write_adapter(tmp_path / "bad.gguf", **options)
    with pytest.raises(smallm.SmallmError, match=rf"bad\.gguf: .*{message}"):
        smallm.load(setup.base.path, adapters={"a": path})


def test_cut_files_are_refused(setup: Setup, tmp_path: Path) -> None:
    data = setup.paths["one"].read_bytes()
    path = tmp_path / "cut.gguf"
    for n in (0, 3, 24, 200, len(data) // 2, len(data) - 64):
        path.write_bytes(data[:n])
        with pytest.raises(smallm.SmallmError, match=r"cut\.gguf"):
            smallm.load(setup.base.path, adapters={"a": path})
    with pytest.raises(smallm.UnsupportedModelError, match=r"general\.type is"):
        smallm.load(setup.base.path, adapters={"a": setup.base.path})


# ---- folders of peft -----------------------------------------------------------------------------


def peft_config(**values: Any) -> dict[str, Any]:
    """The keys that peft 0.21 writes, as far as they matter."""
    return {
        "peft_type": "LORA",
        "r": 6,
        "lora_alpha": 9,
        "lora_dropout": 0.05,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "base",
        **values,
    }


def write_peft(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    return folder


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_folders_are_a_merge_of_the_checkpoint(
    tmp_path: Path, case: str, rslora: bool
) -> None:
    """Every linear layer (of models with experts, attention's), its own rank and alpha
    for some; merged into the checkpoint, converted."""
    from smallm.convert import convert

    golden = goldens.Golden(case, tmp_path)
    stored_by_inputs = golden.arch == "gpt2"  # [inputs][outputs], as its layers have them
    has_experts = bool(golden.spec["config"].get("num_experts_per_tok"))
    config = peft_config(
        use_rslora=rslora,
        fan_in_fan_out=stored_by_inputs,
        rank_pattern={"v_proj": 3, r"layers\.1\.self_attn\.q_proj": 17},
        alpha_pattern={"model.layers.0.self_attn.k_proj": 20},
    )
    checkpoint = safetensors.numpy.load_file(golden.folder / "model.safetensors")
    checkpoint = {name: value.astype(np.float32) for name, value in checkpoint.items()}
    rng = np.random.default_rng(5)
    tensors = {}
    for name, w in sorted(checkpoint.items()):
        if w.ndim != 2 or not re.search(r"\.(layers|h|blocks?)\.\d", name):
            continue
        if "norm" in name or "relative_attention_bias" in name:
            continue
        if has_experts and "attn" not in name:
            continue
        w = w.T if stored_by_inputs else w
        module = name.removesuffix(".weight")
        ranks = {"1.self_attn.q_proj": 17, ".v_proj": 3}
        rank = next((r for part, r in ranks.items() if module.endswith(part)), 6)
        alpha = 20 if module.endswith("0.self_attn.k_proj") else 9
        a = rng.normal(0, 1, (rank, w.shape[1])).astype(np.float32)
        b = rng.normal(0, float(w.std()) * 0.05, (w.shape[0], rank)).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        scale = alpha / (rank**0.5 if rslora else rank)
        w += (scale * b.astype(np.float64) @ a.astype(np.float64)).astype(np.float32)
    assert len(tensors) >= (
        8 if has_experts else 12
    )  # three layers of two modules where all are fused
    folder = write_peft(tmp_path / "adapter", config, tensors)
    other = tmp_path / "merged"
    golden.folder.rename(other)
    safetensors.numpy.save_file(checkpoint, other / "model.safetensors", {"format": "pt"})
    path = convert(other, tmp_path / "merged.gguf", type="f32", progress=False)
    with smallm.load(path, kv="f32") as model:
        expected = goldens.ask(model, golden.ids)
        assert golden.error(expected) > 0.1
    with smallm.load(golden.path, kv="f32", adapters={"a": folder}) as model:
        assert error(goldens.ask(model, golden.ids, adapter="a"), expected) < 1e-4
        assert golden.error(goldens.ask(model, golden.ids)) < 1e-4


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"use_dora": True}, {}, "use_dora is True"),
        ({"peft_type": "LOHA"}, {}, 'peft_type is "LOHA"'),
        ({"bias": "all"}, {}, 'bias is "all"'),
        ({"init_lora_weights": "pissa"}, {}, 'init_lora_weights is "pissa"'),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save is"),
        ({"some_new_option": 3}, {}, "some_new_option is 3"),
        ({"r": None}, {}, "r is missing"),
        ({"r": 4}, {}, "says that the rank is 4"),
        ({"rank_pattern": {"(": 4}}, {}, "rank_pattern holds"),
        ({"rank_pattern": {"(([a-z._0-9])+)+x": 4}}, {}, "rank_pattern holds .* repeats"),
        ({"alpha_pattern": {".*a.*a.*a.*a.*x": 4}}, {}, "alpha_pattern holds .* repeats"),
        ({"lora_alpha": 10**400}, {}, "adapter_config.json: .*OverflowError"),
        ({"rank_pattern": {"q_proj": float("nan")}}, {}, "adapter_config.json: .*ValueError"),
        (
            {"r": 0},
            {NAME.format("A"): np.ones((0, 64), np.float32),
             NAME.format("B"): np.ones((64, 0), np.float32)},
            "says that the rank is 0",
        ),
        (
            {"r": 1},
            {NAME.format("A"): np.ones((1, 300_000), np.float32),
             NAME.format("B"): np.ones((300_000, 1), np.float32)},
            r"q_proj is changed by \[300000, 300000\] values",
        ),
        ({}, {NAME.format("B"): None}, "has no partner"),
        ({}, {NAME.format("A"): np.full((6, 64), np.nan, np.float32)}, "lora_A.weight has an inf"),
        ({}, {NAME.format("A"): np.ones((6, 64), np.int8)}, "a matrix of floats"),
        ({}, {NAME.format("B"): np.ones((65, 6), np.float32)}, "does not fit the model"),
        ({}, {"base_model.model.lm_head.weight": np.ones((3, 3), np.float32)}, "lm_head.weight is"),
        (
            {},
            {n.format(NAME.format(x)).replace("q_proj", "x_proj"): np.ones((6, 6), np.float32)
             for n in ("{}",) for x in "AB"},
            "layers.0.self_attn.x_proj.weight",
        ),
    ],
)  # fmt: skip
def test_peft_folders_are_refused_by_name(
    setup: Setup,
    tmp_path: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray | None],
    message: str,
) -> None:
    all_tensors: dict[str, np.ndarray | None] = {
        NAME.format("A"): np.ones((6, 64), np.float32),
        NAME.format("B"): np.ones((64, 6), np.float32),
        **tensors,
    }
    given = {name: value for name, value in all_tensors.items() if value is not None}
    folder = write_peft(tmp_path / "bad", peft_config(**config), given)
    with pytest.raises(smallm.SmallmError, match=message):
        smallm.load(setup.base.path, adapters={"a": folder})


def test_a_config_that_nests_too_deeply(setup: Setup, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", peft_config(), {NAME.format("A"): np.ones((6, 64))})
    (folder / "adapter_config.json").write_text('{"r": ' + "[" * 100_000)
    with pytest.raises(smallm.CorruptModelError, match="not JSON"):
        smallm.load(setup.base.path, adapters={"a": folder})


PLACES = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(places=PLACES, near=st.booleans())
def test_files_with_other_bytes(
    setup: Setup, tmp_path: Path, places: list[tuple[int, int]], near: bool
) -> None:
    """Refused by an error of ours, or loaded and run; of the file's beginning or anywhere."""
    folder = write_peft(
        tmp_path / "bytes",
        peft_config(),
        {NAME.format("A"): np.ones((6, 64), "f"), NAME.format("B"): np.ones((64, 6), "f")},
    )
    changed = [folder / "adapter_model.safetensors", folder / "adapter_config.json"]
    one = tmp_path / "one.gguf"
    one.write_bytes(setup.paths["one"].read_bytes())
    for path in (one, *changed):
        data = bytearray(path.read_bytes())
        for at, value in places:
            data[at % (min(len(data), 600) if near else len(data))] = value
        path.write_bytes(data)
    for path in (one, folder):
        try:
            with smallm.load(setup.base.path, adapters={"a": path}) as model:
                model.logits(setup.ids[:3], adapter="a")
        except smallm.SmallmError as error:
            assert str(error)


def test_a_folder_without_an_adapter(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(smallm.ModelNotFoundError, match=r"adapter_config\.json"):
        smallm.load(setup.base.path, adapters={"a": tmp_path})
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config()))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(smallm.ModelNotFoundError, match=r"adapter_model\.safetensors.*pickle"):
        smallm.load(setup.base.path, adapters={"a": tmp_path})


def test_readme_example(setup: Setup, tmp_path: Path) -> None:
    """README's lines, with small random models in place of the real ones."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```py\n(.*?adapters=.*?)^```$", readme, re.S | re.M)
    base = tiny.write_tiny(tmp_path / "base.gguf", tokenizer="bpe")
    write_adapter(tmp_path / "legal.gguf", setup.pairs["one"])
    tensors = {
        NAME.format("A"): np.ones((6, 64), np.float32),
        NAME.format("B"): np.ones((64, 6), np.float32),
    }
    write_peft(tmp_path / "support-lora", peft_config(), tensors)
    program = f"import smallm\n{text}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=base.path.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


# ---- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_merge(setup: Setup, tmp_path: Path, kind: str) -> None:
    """The file's matrices are base + scale * B A, rounded to the format; all else is the base's."""
    from smallm.convert import merge

    base = tiny.write_tiny(tmp_path / "base.gguf", types=kind, n_ff=128, tied=False)
    pairs = random_pairs(base.tensors, lambda name: 5, 7)
    del pairs[Q]
    path = write_adapter(tmp_path / "a.gguf", pairs, alpha=7.5)
    steps: list[int] = []
    out = merge(
        base.path,
        path,
        tmp_path / "out.gguf",
        scale=0.5,
        progress=lambda done, total: steps.append(done),
    )
    assert steps == sorted(steps)
    before, after = gguf.GGUFReader(base.path), gguf.GGUFReader(out)
    assert {k: f.contents() for k, f in before.fields.items() if not k.startswith("GGUF")} == {
        k: f.contents() for k, f in after.fields.items() if not k.startswith("GGUF")
    }
    assert steps[-1] == sum(t.n_bytes for t in after.tensors)
    assert [t.name for t in before.tensors] == [t.name for t in after.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert old.tensor_type == new.tensor_type and list(old.shape) == list(new.shape)
        if old.name not in pairs:
            assert np.array_equal(old.data, new.data), old.name
            continue
        a, b = pairs[old.name]
        values = gguf.quants.dequantize(old.data, old.tensor_type).astype(np.float64)
        values += 0.5 * 7.5 / 5 * (b.astype(np.float64) @ a)
        known = formats()
        wanted = rewrite(values.astype(np.float32), known["F32"], known[kind], values.shape[1])
        assert np.array_equal(np.asarray(new.data).view(np.uint8), wanted), old.name
    with smallm.load(base.path, adapters={"a": path}, kv="f32") as model:
        beside = model.logits(setup.ids, adapter="a", adapter_scale=0.5)
        assert error(beside, model.logits(setup.ids)) > 0.05
    with smallm.load(out, kv="f32") as model:
        together = model.logits(setup.ids)
    if kind == "F32":  # else what rounding the matrices did is in there
        assert error(together, beside) < 1e-4


@pytest.mark.parametrize(("kind", "merged"), [("Q4_K", "Q4_K"), ("IQ3_S", "Q8_0")])
def test_what_is_merged_has_a_format_that_can_be_written(
    tmp_path: Path, kind: str, merged: str
) -> None:
    from smallm.convert import merge

    base = tiny.write_tiny(tmp_path / "base.gguf", types=kind, n_embd=256, n_ff=256, n_layer=1)
    pairs = {Q: random_pairs(base.tensors, lambda name: 4, 8)[Q]}
    path = write_adapter(tmp_path / "a.gguf", pairs)
    reader = gguf.GGUFReader(merge(base.path, path, tmp_path / "out.gguf", progress=False))
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds.pop(Q) == merged
    assert {other for name, other in kinds.items() if "attn_k" in name} == {kind}
    smallm.load(reader_path(reader, tmp_path)).close()


def test_a_base_whose_matrices_have_scales(setup: Setup, tmp_path: Path) -> None:
    """An adapter adds to the matrix with its scale, beside the file and merged into it."""
    from smallm.convert import merge

    def scale(tensors: dict[str, tiny.Tensor]) -> None:
        for i, name in enumerate([name for name in tensors if name in setup.pairs["one"]]):
            factor = np.float32(2.0 ** (i % 5 - 2))  # so that nothing is rounded
            tensors[name].data /= factor
            values = np.array([factor])
            tensors[f"{name.removesuffix('.weight')}.scale"] = tiny.Tensor.encode(
                values, "F32", np.random.default_rng(0)
            )

    base = tiny.write_tiny(tmp_path / "base.gguf", n_ctx=1024, edit=scale).path
    expected = Reference(setup.merge("one"), np.float64).logits(setup.ids)
    with smallm.load(base, adapters={"one": setup.paths["one"]}, kv="f32") as model:
        assert error(model.logits(setup.ids, adapter="one"), expected) < 1e-4
    with smallm.load(merge(base, setup.paths["one"], tmp_path / "out.gguf"), kv="f32") as model:
        assert error(model.logits(setup.ids), expected) < 1e-4


def reader_path(reader: gguf.GGUFReader, folder: Path) -> Path:
    """The file that was read, after the map of it is gone."""
    del reader
    return folder / "out.gguf"


def test_merge_leaves_no_broken_file(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smallm.convert import merge

    out = tmp_path / "out.gguf"
    out.write_bytes(b"before")

    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(setup.base.path, setup.paths["one"], out, progress=stop)
    with pytest.raises(ValueError, match="scale must be"):
        merge(setup.base.path, setup.paths["one"], out, scale=float("inf"))
    with pytest.raises(smallm.UnsupportedModelError, match=r"general\.type"):
        merge(setup.base.path, setup.base.path, out)
    huge = {Q: tuple(x * np.float32(1e4) for x in setup.pairs["one"][Q])}
    path = write_adapter(tmp_path / "huge.gguf", huge)  # type: ignore[arg-type]
    half = tiny.write_tiny(tmp_path / "half.gguf", types="F16").path
    with pytest.raises(smallm.UnsupportedModelError, match=r"attn_q\.weight.*F16"):
        merge(half, path, out, progress=False)
    assert out.read_bytes() == b"before"
    assert {p.name for p in tmp_path.iterdir()} == {"out.gguf", "huge.gguf", "half.gguf"}


def test_command_line(setup: Setup, tmp_path: Path) -> None:
    def call(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "smallm", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done

    one, out = setup.paths["one"], tmp_path / "out.gguf"
    assert call("merge", setup.base.path, one, out, "--scale", "2").stdout == f"{out}\n"
    run = ("run", "--raw", "--temp", "0", "-n", "12", "-p", "Once upon a time", "-m")
    merged = call(*run, out).stdout
    assert call(*run, setup.base.path, "--lora-scaled", f"{one}:2").stdout == merged
    once = call(*run, setup.base.path, "--lora", one).stdout
    assert once == call(*run, setup.base.path, "--lora-scaled", f"{one}:1").stdout
    assert len({once, merged, call(*run, setup.base.path).stdout}) == 3
    wrong = call(*run, setup.base.path, "--lora-scaled", str(one), code=2)
    assert "PATH:SCALE" in wrong.stderr
    both = call(*run, out, "--lora", one, "--lora-scaled", f"{one}:1", code=2)
    assert "one adapter at a time" in both.stderr
    bad = call(*run, setup.base.path, "--lora", setup.base.path, code=1)
    assert bad.stderr.startswith("smallm: ") and "general.type" in bad.stderr


# ---- goldens of peft itself ----------------------------------------------------------------------


@pytest.mark.parametrize("case", goldens.names("adapter"))
def test_golden(tmp_path: Path, case: str) -> None:
    """Prefill, chunks and single tokens give the logits that `peft` computed in float64."""
    golden = goldens.Golden(case, tmp_path)
    shapes = {name: what[0] for name, what in golden.spec["tensors"].items()}
    folder = goldens.write_adapter(case, shapes, tmp_path / "adapter")
    with smallm.load(golden.path, kv="f32", adapters={"a": folder}) as model:
        got = model.logits(golden.ids, adapter="a")
        assert golden.error(got) < 1e-4
        for chunk in (1, 3, 64):
            assert np.array_equal(model.logits(golden.ids, adapter="a", chunk=chunk), got)
    with smallm.load(golden.path, adapters={"a": folder}) as model:  # the f16 cache
        rows = model.logits(golden.ids, adapter="a")[golden.rows]
        assert np.abs(rows - golden.logits).max() < 2e-3 * np.ptp(golden.logits)
    assert len(golden.broken) == 9
    for step, wrong in golden.broken.items():
        assert error(got[-len(wrong) :], wrong) > 0.1, step
