"""Experts: who is chosen, what is read, what the keys of a file say about them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goldens
import numpy as np
import pytest
from goldens import Golden
from tiny import Tensor

import smallm
import smallm.convert

EXACT = 1e-4  # of the logits' standard deviation
N_EXPERT, N_USED = 12, 3


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden("qwen2moe", tmp_path_factory.mktemp("experts"))


def compute(path: Path, ids: list[int], chunk: int | None = None) -> np.ndarray:
    with smallm.load(path, threads=2, kv="f32") as model:
        return model.logits(ids, chunk=chunk)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("keys", [{"expert_weights_norm": True}, {"expert_gating_func": 3}])
def test_keys_choose_what_the_softmax_goes_over(
    golden: Golden, tmp_path: Path, keys: dict[str, Any]
) -> None:
    """Both say: over the chosen experts, which the row does not."""
    expected = golden.broken["the other normalisation"]
    got = compute(golden.change(tmp_path / "m.gguf", keys=keys), golden.ids)[-len(expected) :]
    assert np.abs(got - expected).max() < EXACT * golden.logits.std()


def test_the_scale_of_the_weights(golden: Golden, tmp_path: Path) -> None:
    """Twice the weights are twice the experts' last matrix, to the bit; the shared one stays."""

    def double(tensors: dict[str, Tensor]) -> None:
        for name, t in tensors.items():
            if "ffn_down_exps" in name:
                t.data *= 2

    scaled = golden.change(tmp_path / "a.gguf", keys={"expert_weights_scale": 2.0})
    doubled = golden.change(tmp_path / "b.gguf", edit=double)
    assert same(compute(scaled, golden.ids), compute(doubled, golden.ids))
    assert golden.error(compute(scaled, golden.ids)) > 0.1


Change = Callable[[np.ndarray], None]


def level(change: Change | None = None) -> Callable[[dict[str, Tensor]], None]:
    """All experts of equal logits (0); then `change` on the experts' last matrices."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for name, t in tensors.items():
            if name.endswith("ffn_gate_inp.weight"):
                t.data[:] = 0
            if change is not None and "ffn_down_exps" in name:
                change(t.data)

    return edit


def test_of_equal_experts_the_first_are_chosen_and_only_they_matter(
    golden: Golden, tmp_path: Path
) -> None:
    def compute_with(change: Change | None) -> np.ndarray:
        return compute(golden.change(tmp_path / "m.gguf", edit=level(change)), golden.ids, 7)

    def others(w: np.ndarray) -> None:
        w[N_USED:] = 1e30

    def third(w: np.ndarray) -> None:
        w[N_USED - 1] *= 1.01

    plain = compute_with(None)
    assert same(compute_with(others), plain)
    assert not same(compute_with(third), plain)


def test_what_a_token_reads(golden: Golden) -> None:
    tensors = golden.read()[1]
    size = {
        name: t.data.nbytes // N_EXPERT * N_USED if "_exps" in name else t.data.nbytes
        for name, t in tensors.items()
        if len(t.shape) > 1 and "token_embd" not in name
    }
    # The router's 12 rows, and the one of the shared expert's gate, lie in panels of 16.
    size |= {f"blk.{i}.ffn_gate_inp.weight": 16 * 64 * 4 for i in range(2)}
    size |= {f"blk.{i}.ffn_gate_inp_shexp.weight": 16 * 64 * 4 for i in range(2)}
    head = size.pop("output.weight")
    with smallm.load(golden.path) as model:
        assert model.info.parameters == sum(int(np.prod(t.shape)) for t in tensors.values())
        assert model.info.token_bytes == sum(size.values()) + -(-300 // 16) * 16 * 64 * 4
        assert head == 300 * 64 * 4


def test_company_changes_nothing(golden: Golden) -> None:
    """Texts that are decoded together go to other experts together."""
    prompts = [golden.ids[i : i + 5 + i % 7] for i in range(0, 180, 9)]
    with smallm.load(golden.path, threads=2) as model:
        together = model.generate(prompts, max_tokens=12, temperature=0, seed=1)
        for prompt, answer in zip(prompts, together, strict=True):
            alone = model.generate(prompt, max_tokens=12, temperature=0, seed=1)
            assert alone.tokens == answer.tokens


def test_a_router_that_overflows_fails_the_call(golden: Golden, tmp_path: Path) -> None:
    def huge(tensors: dict[str, Tensor]) -> None:
        for name, t in tensors.items():
            if name.endswith("ffn_gate_inp.weight"):
                t.data[:] = 3e38

    path = golden.change(tmp_path / "m.gguf", edit=huge)
    for ids in (golden.ids, golden.ids[:1]):
        with smallm.load(path) as model, pytest.raises(smallm.SmallmError, match="infinite or NaN"):
            model.logits(ids)


@pytest.mark.parametrize("width", [24, 40])
@pytest.mark.parametrize("kind", ["exps", "shexp"])
def test_experts_of_a_width_that_does_not_divide_into_panels(
    golden: Golden, tmp_path: Path, kind: str, width: int
) -> None:
    def narrow(tensors: dict[str, Tensor]) -> None:
        for name, t in list(tensors.items()):
            if f"_{kind}" in name and "inp" not in name:
                shape = (*t.shape[:-1], width) if "down" in name else (*t.shape[:-2], width, 64)
                tensors[name] = Tensor(t.type, shape, np.resize(t.data, shape))

    part = "expert" if kind == "exps" else "expert_shared"
    keys = {f"{part}_feed_forward_length": width}
    path = golden.change(tmp_path / "m.gguf", keys=keys, edit=narrow)
    with pytest.raises(smallm.UnsupportedModelError) as caught:
        smallm.load(path)
    assert re.search(rf"blk\.0\.ffn_(gate|up)_{kind}\.weight has {width} rows", str(caught.value))


def test_rows_without_experts_take_none(tmp_path: Path) -> None:
    plain = Golden("qwen2", tmp_path)
    keys = {"expert_count": 4, "expert_used_count": 2}
    with pytest.raises(smallm.UnsupportedModelError, match=r"qwen2\.expert_count"):
        smallm.load(plain.change(tmp_path / "m.gguf", keys=keys))


def test_lost_and_missing_experts_are_named(tmp_path: Path) -> None:
    """A checkpoint without one of its experts, and one whose weights would be normed otherwise."""
    spec = Golden("qwen2moe").spec
    tensors = {k: v for k, v in spec["tensors"].items() if "experts.4.up" not in k}
    folder = goldens.write_folder(spec | {"tensors": tensors}, "qwen2moe", tmp_path / "a")
    with pytest.raises(smallm.CorruptModelError, match=r"do not add up to one blk\.0\.ffn_up_exps"):
        smallm.convert.convert(folder, tmp_path / "m.gguf", progress=False)
    config = spec["config"] | {"norm_topk_prob": True}
    folder = goldens.write_folder(spec | {"config": config}, "qwen2moe", tmp_path / "b")
    with pytest.raises(smallm.UnsupportedModelError, match="norm_topk_prob is true"):
        smallm.convert.convert(folder, tmp_path / "m.gguf", progress=False)
