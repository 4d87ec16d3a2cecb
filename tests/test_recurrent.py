"""Layers with a state in place of keys and values: a text that is cut costs, and changes nothing.

tests/c/check_session.c cuts, forks and cancels at random; here are the promises to a caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from goldens import Golden
from tiny import KV, Kind

import smallm

NAMES = ("granitehybrid", "lfm2", "mamba2")
REFUSALS = (smallm.CorruptModelError, smallm.UnsupportedModelError)


@pytest.fixture(scope="module")
def convert_golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Golden]:
    folder = tmp_path_factory.mktemp("recurrent")
    return cache(lambda name: Golden(name, folder))


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest, convert_golden: Callable[[str], Golden]) -> Golden:
    return convert_golden(request.param)


PARAMS: dict[str, Any] = {"max_tokens": 8, "temperature": 0.8, "seed": 3, "logprobs": 0}


def fresh(golden: Golden, ids: list[int], **params: Any) -> smallm.Completion:
    with smallm.load(golden.path, threads=2, **params) as model:
        return model.generate(ids, **PARAMS)


def same(a: smallm.Completion, b: smallm.Completion) -> bool:
    return a.tokens == b.tokens and a.logprobs == b.logprobs


def test_logits_of_the_last_tokens_go_on_from_what_is_known(golden: Golden) -> None:
    ids = (golden.ids * 8)[:100]
    with smallm.load(golden.path, threads=2) as model:
        whole = model.logits(ids)
        for n, last in ((100, 3), (100, 40), (60, 1), (61, 1), (90, 29), (100, 100)):
            assert np.array_equal(model.logits(ids[:n], last=last), whole[n - last : n])


def test_prompts_go_on_from_what_is_known_of_them(golden: Golden) -> None:
    ids = golden.ids
    with smallm.load(golden.path, threads=2) as model:
        first = model.generate(ids[:100], **PARAMS)
        assert same(first, fresh(golden, ids[:100]))
        # The same prompt again: its last token runs.
        again = model.generate(ids[:100], **PARAMS)
        assert same(first, again) and again.usage.cached_tokens == 99
        # A next turn: all that has run is there.
        turn = ids[:100] + first.tokens + ids[100:120]
        got = model.generate(turn, **PARAMS)
        assert same(got, fresh(golden, turn))
        assert got.usage.cached_tokens == 100 + len(first.tokens) - 1
        # Texts that part earlier begin where the latest state is that both have.
        for n in (1, 63, 64, 80, 98, 99):
            other = ids[:n] + ids[200:230]
            got = model.generate(other, **PARAMS)
            assert same(got, fresh(golden, other)), n
            assert got.usage.cached_tokens <= n


def test_long_prompts_leave_states_on_their_way(golden: Golden) -> None:
    ids = golden.ids
    with smallm.load(golden.path, threads=2) as model:
        model.logits(ids, chunk=50)
        other = ids[:160] + ids[10:20]
        got = model.generate(other, **PARAMS)
        assert same(got, fresh(golden, other))
        assert 49 <= got.usage.cached_tokens <= 160


def test_company_changes_nothing(golden: Golden) -> None:
    ids = golden.ids
    prompts = [ids[:90], ids[:90] + ids[5:30], ids[:40], ids[50:52], ids[:90]]
    with smallm.load(golden.path, threads=2) as model:
        together = model.generate(prompts, **PARAMS)
    for i, (prompt, got) in enumerate(zip(prompts, together, strict=True)):
        with smallm.load(golden.path, threads=1) as model:
            assert same(got, model.generate(prompt, **PARAMS | {"seed": 3 + i})), i


def test_cancelled_passes_leave_texts_as_they_were(golden: Golden) -> None:
    ids = golden.ids
    expected = fresh(golden, ids[:120])
    with smallm.load(golden.path, threads=2) as model:
        for n in (1, 3, 8):
            stream = model.stream(ids[:100], max_tokens=50, temperature=0)
            for _ in zip(range(n), stream, strict=False):
                pass
            stream.cancel()
            assert same(model.generate(ids[:120], **PARAMS), expected)


def test_the_cache_counts_layers_by_their_kind(convert_golden: Callable[[str], Golden]) -> None:
    """Bytes after texts of 60 and of 250 tokens: pages of 64 positions of two attention layers with
    two heads of 16 in float16; none where no layer attends."""
    page = 64 * 2 * 2 * 16 * 2 * 2
    for name, pages in (("lfm2", 3), ("mamba2", 0)):
        golden = convert_golden(name)
        used = []
        for n in (60, 250):
            with smallm.load(golden.path, threads=2) as model:
                model.generate(golden.ids[:n], max_tokens=1)
                used.append(model.info.cache_bytes)
        assert used[1] - used[0] == pages * page, name
        assert used[0] > page * bool(pages)  # states, too
    info = smallm.load(convert_golden("mamba2").path).info
    assert (info.heads, info.kv_heads) == (0, 0)


# ---- files that contradict themselves ------------------------------------------------------------

NEGATIVE = KV(Kind.ARRAY, [0, -1, 0, 2], Kind.INT32)
FILES: list[tuple[str, dict[str, Any], str]] = [
    ("lfm2", {"shortconv.l_cache": 1}, "shortconv.l_cache is 1"),
    ("lfm2", {"shortconv.l_cache": 400}, "shortconv.l_cache is 400"),
    ("lfm2", {"shortconv.l_cache": 4}, "shortconv.conv.weight"),
    ("lfm2", {"shortconv.l_cache": None}, "head_count_kv is 0 in layer 0"),
    ("lfm2", {"attention.head_count_kv": [0, 2, 0]}, "head_count_kv has 3 values"),
    ("lfm2", {"attention.head_count_kv": [0, 2, 0, 1]}, "head_count_kv is 1 in layer 3"),
    ("lfm2", {"attention.head_count_kv": [0, 8, 0, 8]}, "head_count_kv is 8 in layer 1"),
    (
        "lfm2",
        {"attention.head_count_kv": NEGATIVE},
        "head_count_kv is -1 in layer 1",
    ),
    ("lfm2", {"attention.head_count_kv": [0.0, 2.0, 0.0, 2.0]}, "head_count_kv has 4 values"),
    ("lfm2", {"attention.head_count_kv": [2, 2, 0, 2]}, "blk.0.attn_q.weight is missing"),
    ("lfm2", {"attention.head_count_kv": [0, 0, 0, 2]}, "blk.1.shortconv.* is missing"),
    ("lfm2", {"feed_forward_length": 0}, "feed_forward_length is 0"),
    ("mamba2", {"attention.head_count": 4}, "feed_forward_length is 0"),
    ("mamba2", {"ssm.inner_size": None}, "head_count is 0"),
    ("mamba2", {"ssm.inner_size": 2**20}, "ssm.inner_size"),
    ("mamba2", {"ssm.conv_kernel": None}, "ssm.conv_kernel is missing"),
    ("mamba2", {"ssm.conv_kernel": 3}, "ssm_conv1d.weight"),
    ("mamba2", {"ssm.state_size": 23}, "ssm_in.weight|ssm_conv1d"),
    ("mamba2", {"ssm.state_size": 0}, "ssm.state_size is 0"),
    ("mamba2", {"ssm.time_step_rank": 7}, "inner_size 128 in 7 heads"),
    ("mamba2", {"ssm.time_step_rank": 4}, "ssm_in.weight|ssm_dt"),
    ("mamba2", {"ssm.group_count": 3}, "in 3 groups"),
    ("mamba2", {"ssm.group_count": None}, "ssm.group_count is missing"),
    ("mamba2", {"feed_forward_length": 96}, "ffn_"),
]


@pytest.mark.parametrize(("name", "keys", "message"), FILES)
def test_sizes_that_do_not_fit_are_refused(
    convert_golden: Callable[[str], Golden],
    tmp_path: Path,
    name: str,
    keys: dict[str, Any],
    message: str,
) -> None:
    path = convert_golden(name).change(tmp_path / "m.gguf", keys=keys)
    with pytest.raises(REFUSALS) as caught:
        smallm.load(path)
    assert re.search(message, str(caught.value)), caught.value


def test_attention_in_a_layer_that_convolves_is_refused(golden: Golden, tmp_path: Path) -> None:
    """Every tensor binds, or refuses the load: those of the other kinds of layer, too."""
    for name in ("attn_q.bias", "attn_sinks.weight", "attn_q_norm.weight", "ssm_dt.bias"):
        name = f"blk.0.{name}"
        if name in golden.read()[1]:
            continue
        add = tiny.Tensor.encode(np.zeros(8), "F32", np.random.default_rng(0))
        path = golden.change(tmp_path / "m.gguf", edit=lambda t, n=name, a=add: t.update({n: a}))
        with pytest.raises(REFUSALS, match=re.escape(name)):
            smallm.load(path)
