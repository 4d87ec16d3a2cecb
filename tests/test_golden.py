"""The golden models: each architecture against an independent implementation (golden/make.py).

And the goldens can tell: with any step of an architecture left out, in what is expected or in the
file, the comparison fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType as GgmlType
from tiny import KV, Tensor

import smallm
from smallm import _ffi

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("qwen2", "phi2")
EXACT = 1e-4  # of the logits' standard deviation, with a float32 cache
ROUNDED = 2e-3  # of the logits' range, with the default one
REFUSALS = (smallm.CorruptModelError, smallm.UnsupportedModelError)
NAN = float("nan")


class Golden:
    """What make.py wrote for one architecture."""

    def __init__(self, name: str) -> None:
        arrays = dict(np.load(GOLDEN / f"{name}.npz"))
        self.name, self.path = name, GOLDEN / f"{name}.gguf"
        self.ids = [int(i) for i in arrays["ids"]]
        self.rows, self.logits = arrays["rows"], arrays["logits"]
        self.broken = {k.split(": ")[1]: v for k, v in arrays.items() if k.startswith("broken: ")}

    def error(self, got: np.ndarray) -> float:
        """Largest distance of logits [n_ids, n_vocab] from the expected, in deviations."""
        return float(np.abs(got[self.rows] - self.logits).max() / self.logits.std())

    def read(self) -> tuple[dict[str, KV], dict[str, Tensor]]:
        """Keys and tensors of the file, to be changed and written again."""
        reader = gguf.GGUFReader(self.path)
        keys = {
            name: KV(f.types[0], f.contents(), f.types[-1] if len(f.types) > 1 else None)
            for name, f in reader.fields.items()
            if not name.startswith("GGUF.") and name != "general.architecture"
        }
        tensors = {
            t.name: Tensor(t.tensor_type, tuple(int(n) for n in t.shape[::-1]), t.data.copy())
            for t in reader.tensors
        }
        return keys, tensors

    def change(
        self,
        path: Path,
        *,
        keys: dict[str, Any] | None = None,
        edit: Callable[[dict[str, Tensor]], None] | None = None,
    ) -> Path:
        """The model with other keys (None drops one) and tensors."""
        kvs, tensors = self.read()
        for key, value in (keys or {}).items():
            kvs.pop(f"{self.name}.{key}", None)
            if value is not None:
                kvs[f"{self.name}.{key}"] = tiny.as_kv(value)
        if edit is not None:
            edit(tensors)
        tiny._write(path, self.name, kvs, tensors)
        return path


def compute(path: Path, ids: list[int], chunk: int | None = None, **options: Any) -> np.ndarray:
    with smallm.load(path, **options) as model:
        return model.logits(ids, chunk=chunk)


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


# ---- the answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 7, 1], ids=["prefill", "chunks of 7", "token by token"])
def test_the_logits_are_those_of_transformers(golden: Golden, chunk: int | None) -> None:
    got = compute(golden.path, golden.ids, chunk, threads=2, kv="f32")
    assert golden.error(got) < EXACT
    got = compute(golden.path, golden.ids, chunk, threads=2)
    assert np.abs(got[golden.rows] - golden.logits).max() < ROUNDED * np.ptp(golden.logits)


def tiers() -> list[str]:
    info = _ffi.ffi.new("smallm_cpu_info *", {"size": _ffi.ffi.sizeof("smallm_cpu_info")})
    assert _ffi.lib.smallm_cpu(info, _ffi.ffi.NULL) == 0
    return _ffi.ffi.string(info.available).decode().split(",")


def quantize(tensors: dict[str, Tensor]) -> None:
    """Matrices as Q8_0: activations are rounded, integer kernels run."""
    for name, t in tensors.items():
        if len(t.shape) == 2:
            tensors[name] = Tensor.encode(t.values(), "Q8_0", np.random.default_rng(0))


@pytest.mark.parametrize("quantized", [False, True], ids=["F32", "Q8_0"])
def test_threads_chunks_and_tiers_change_no_bit(
    golden: Golden, quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = golden.path
    if quantized:
        path = golden.change(tmp_path / "m.gguf", edit=quantize)
    expected = compute(path, golden.ids, threads=1)
    # Rounding to 8 bits costs a few percent, a wrong bias or a missing step much more.
    assert golden.error(expected) < (0.15 if quantized else 0.02)
    for chunk in (7, 2, 1):
        got = compute(path, golden.ids, chunk, threads=2)
        assert np.array_equal(got.view(np.uint32), expected.view(np.uint32)), chunk
    for tier in tiers():
        monkeypatch.setenv("SMALLM_ISA", tier)
        with smallm.load(path, threads=2) as model:
            assert model.info.isa == tier
            for chunk in (None, 1):
                got = model.logits(golden.ids, chunk=chunk)
                assert np.array_equal(got.view(np.uint32), expected.view(np.uint32)), tier


# ---- the goldens can tell ------------------------------------------------------------------------

BROKEN = [(name, step) for name in NAMES for step in Golden(name).broken]


@pytest.mark.parametrize("case", BROKEN, ids=": ".join)
def test_an_expectation_with_a_broken_step_fails(case: tuple[str, str]) -> None:
    golden = Golden(case[0])
    broken = golden.broken[case[1]]
    got = compute(golden.path, golden.ids, threads=2, kv="f32")[-len(broken) :]
    # The two GELUs differ by 5e-4 at most; all other steps are far out of any rounding.
    least = 3 * EXACT if case[1] == "the other gelu" else 1e3 * EXACT
    assert np.abs(got - broken).max() / golden.logits.std() > least


def vectors(name: str) -> list[str]:
    return [n for n, t in Golden(name).read()[1].items() if len(t.shape) == 1]


@pytest.mark.parametrize(
    "case", [(name, vector) for name in NAMES for vector in vectors(name)], ids=": ".join
)
def test_each_bias_and_norm_moves_the_logits(tmp_path: Path, case: tuple[str, str]) -> None:
    """Biases 0 and norms 1: what a step that ignored the tensor would answer."""
    golden, tensor = Golden(case[0]), case[1]

    def neutral(tensors: dict[str, Tensor]) -> None:
        tensors[tensor].data[:] = 0 if tensor.endswith(".bias") else 1

    path = golden.change(tmp_path / "m.gguf", edit=neutral)
    assert golden.error(compute(path, golden.ids, threads=2, kv="f32")) > 100 * EXACT


def uniform(tensors: dict[str, Tensor]) -> None:
    """All queries zero: attention is a mean."""
    for name, t in tensors.items():
        if "attn_q." in name:
            t.data[:] = 0


@pytest.mark.parametrize(
    "keys",
    [
        {"rope.freq_base": 1e6},
        {"rope.dimension_count": 4},
        {"attention.layer_norm_epsilon": 0.05, "attention.layer_norm_rms_epsilon": 0.05},
        {"attention.sliding_window": 100},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_each_key_moves_the_logits(golden: Golden, tmp_path: Path, keys: dict[str, Any]) -> None:
    path = golden.change(tmp_path / "m.gguf", keys=keys)
    assert golden.error(compute(path, golden.ids, threads=2, kv="f32")) > 100 * EXACT


def test_attention_is_far_from_uniform(golden: Golden, tmp_path: Path) -> None:
    path = golden.change(tmp_path / "m.gguf", edit=uniform)
    assert golden.error(compute(path, golden.ids, threads=2, kv="f32")) > 0.3


def test_a_head_of_its_own_and_a_tied_one(golden: Golden, tmp_path: Path) -> None:
    """An output.weight that is the embedding table gives what a file without one gives."""

    def tied(tensors: dict[str, Tensor]) -> None:
        tensors.pop("output.weight", None)

    def own(tensors: dict[str, Tensor]) -> None:
        tensors["output.weight"] = tensors["token_embd.weight"]

    a, b = (
        compute(golden.change(tmp_path / f"{i}.gguf", edit=e), golden.ids, threads=2)
        for i, e in enumerate((tied, own))
    )
    assert np.array_equal(a.view(np.uint32), b.view(np.uint32))


# ---- fused query, key and value ------------------------------------------------------------------


def fuse(tensors: dict[str, Tensor]) -> None:
    """attn_qkv in place of attn_q, attn_k, attn_v: the rows of q, then k, then v."""
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"blk.{i}.attn_{x}.{kind}") for x in "qkv"]
            data = np.concatenate([p.data for p in parts])
            shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
            tensors[f"blk.{i}.attn_qkv.{kind}"] = Tensor(parts[0].type, shape, data)


def fuse_quantized(tensors: dict[str, Tensor]) -> None:
    quantize(tensors)
    fuse(tensors)


def test_fused_queries_keys_and_values_give_the_same_bits(golden: Golden, tmp_path: Path) -> None:
    for split, fused in ((None, fuse), (quantize, fuse_quantized)):
        paths = [
            golden.change(tmp_path / f"{i}.gguf", edit=e) for i, e in enumerate((split, fused))
        ]
        for chunk in (None, 1):
            a, b = (compute(p, golden.ids, chunk, threads=2) for p in paths)
            assert np.array_equal(a.view(np.uint32), b.view(np.uint32))


# ---- what is refused -----------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(REFUSALS) as caught:
        smallm.load(path)
    assert path.name in str(caught.value)
    return str(caught.value).replace("\n", " ")


def names_of(architecture: str, *drop: str) -> list[str]:
    return [n for n in Golden(architecture).read()[1] if n not in drop and "blk.1." not in n]


@pytest.mark.parametrize(
    "case", [(name, tensor) for name in NAMES for tensor in names_of(name)], ids=": ".join
)
def test_every_tensor_is_needed_once_and_finite(tmp_path: Path, case: tuple[str, str]) -> None:
    golden, name = Golden(case[0]), case[1]
    path = tmp_path / "m.gguf"
    if name != "output.weight":  # without it the head is tied to the embeddings
        assert name in refusal(golden.change(path, edit=lambda tensors: tensors.pop(name)))

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[name].data.reshape(-1)[-1] = NAN

    def shorten(tensors: dict[str, Tensor]) -> None:
        t = tensors[name]
        tensors[name] = Tensor(t.type, (t.shape[0] - 1, *t.shape[1:]), t.data[:-1].copy())

    assert name in refusal(golden.change(path, edit=poison))
    message = refusal(golden.change(path, edit=shorten))
    assert name in message and str(golden.read()[1][name].shape[0]) in message


FOREIGN = {
    "qwen2": ("blk.0.attn_norm.bias", "blk.1.ffn_norm.bias", "output_norm.bias"),
    "phi2": (
        "blk.0.ffn_gate.weight",
        "blk.0.ffn_gate.bias",
        "blk.1.ffn_norm.weight",
        "blk.1.ffn_norm.bias",
        "blk.0.attn_q_norm.weight",
        "blk.0.attn_qkv.bias",  # without the weight
    ),
}


@pytest.mark.parametrize(
    "case",
    [(name, tensor) for name, foreign in FOREIGN.items() for tensor in foreign],
    ids=": ".join,
)
def test_a_tensor_that_the_architecture_lacks(tmp_path: Path, case: tuple[str, str]) -> None:
    golden, name = Golden(case[0]), case[1]

    def add(tensors: dict[str, Tensor]) -> None:
        shape = (96, 64) if name == "blk.0.ffn_gate.weight" else (64,)
        tensors[name] = Tensor(GgmlType.F32, shape, np.zeros(shape, dtype=np.float32))

    message = refusal(golden.change(tmp_path / "m.gguf", edit=add))
    assert re.search(f"{re.escape(name)} is not one that the architecture {case[0]} has", message)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_file_with_fused_and_split_tensors(golden: Golden, tmp_path: Path, kind: str) -> None:
    def both(tensors: dict[str, Tensor]) -> None:
        split = dict(tensors)
        fuse(tensors)
        tensors[f"blk.1.attn_k.{kind}"] = split[f"blk.1.attn_k.{kind}"]

    message = refusal(golden.change(tmp_path / "m.gguf", edit=both))
    assert f"blk.1.attn_k.{kind}" in message


def test_a_fused_tensor_without_its_bias_or_of_another_shape(
    golden: Golden, tmp_path: Path
) -> None:
    def without_bias(tensors: dict[str, Tensor]) -> None:
        fuse(tensors)
        del tensors["blk.1.attn_qkv.bias"]

    def too_short(tensors: dict[str, Tensor]) -> None:
        fuse(tensors)
        t = tensors["blk.1.attn_qkv.weight"]
        tensors["blk.1.attn_qkv.weight"] = Tensor(t.type, (96, 64), t.data[:96].copy())

    path = tmp_path / "m.gguf"
    assert "blk.1.attn_qkv.bias" in refusal(golden.change(path, edit=without_bias))
    assert "blk.1.attn_qkv.weight" in refusal(golden.change(path, edit=too_short))


def test_fused_rows_that_do_not_divide_into_panels(tmp_path: Path) -> None:
    """Heads of 20 rows, one for k and v: their rows would share a panel of 16."""
    made = tiny.write_tiny(
        tmp_path / "m.gguf",
        n_head=4,
        n_head_kv=1,
        head=20,
        edit=lambda tensors: tensors.update(
            {f"blk.{i}.attn_qkv.weight": _joined(tensors, i) for i in range(2)}
        ),
    )
    message = refusal(made.path)
    assert "attn_qkv.weight" in message and "16" in message


def _joined(tensors: dict[str, Tensor], i: int) -> Tensor:
    parts = [tensors.pop(f"blk.{i}.attn_{x}.weight").data for x in "qkv"]
    data = np.concatenate(parts)
    return Tensor(GgmlType.F32, data.shape, data)


EPSILON = {"qwen2": "attention.layer_norm_rms_epsilon", "phi2": "attention.layer_norm_epsilon"}


@pytest.mark.parametrize("value", [None, tiny.f32(-1e-5), tiny.f32(NAN), tiny.f32(1.0), "1e-5"])
def test_the_norm_wants_its_own_epsilon(golden: Golden, tmp_path: Path, value: Any) -> None:
    other = next(key for name, key in EPSILON.items() if name != golden.name)
    keys = {EPSILON[golden.name]: value, other: tiny.f32(1e-5)}
    message = refusal(golden.change(tmp_path / "m.gguf", keys=keys))
    assert f"{golden.name}.{EPSILON[golden.name]}" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.dimension_count", 7),
        ("rope.dimension_count", 18),
        ("rope.scaling.type", "yarn"),
        ("attention.head_count_kv", 3),
        ("expert_count", 4),
        ("vocab_size", 299),
        ("embedding_length", 128),
        ("feed_forward_length", 64),
    ],
)
def test_keys_are_judged_in_every_architecture(
    golden: Golden, tmp_path: Path, key: str, value: Any
) -> None:
    message = refusal(golden.change(tmp_path / "m.gguf", keys={key: value}))
    assert key in message or re.search(r"token_embd|ffn_", message), message
