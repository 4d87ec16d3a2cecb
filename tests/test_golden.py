"""The golden models: each architecture against an independent implementation (golden/make.py).

And the goldens can tell: with any step of an architecture left out, in what is expected or in the
file, the comparison fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import architectures
import goldens
import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType as GgmlType
from goldens import OTHER_VALUES, Golden, quantize, tiers
from tiny import Tensor

import smallm
import smallm.convert

NAMES = sorted(goldens.names() + goldens.names("encoder-decoder"))
ENCODERS = goldens.names("encoder")  # test_encoders.py runs them
# One per architecture, for what does not depend on the rest of a case.
FIRST = list({Golden(name).arch: name for name in reversed(NAMES)}.values())[::-1]
EXACT = 1e-4  # of the logits' standard deviation, with a float32 cache
ROUNDED = 2e-3  # of the logits' range, with the default one
REFUSALS = (smallm.CorruptModelError, smallm.UnsupportedModelError)
NAN = float("nan")


def compute(path: Path, ids: list[int], chunk: int | None = None, **options: Any) -> np.ndarray:
    with smallm.load(path, **options) as model:
        return goldens.ask(model, ids, chunk=chunk)


@pytest.fixture(scope="session")
def convert_golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Golden]:
    """A golden by its name, converted once."""
    folder = tmp_path_factory.mktemp("goldens")
    return cache(lambda name: Golden(name, folder))


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest, convert_golden: Callable[[str], Golden]) -> Golden:
    return convert_golden(request.param)


@pytest.fixture(params=FIRST)
def first(request: pytest.FixtureRequest, convert_golden: Callable[[str], Golden]) -> Golden:
    return convert_golden(request.param)


# ---- the answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 7, 1], ids=["prefill", "chunks of 7", "token by token"])
def test_the_logits_are_those_of_transformers(golden: Golden, chunk: int | None) -> None:
    got = compute(golden.path, golden.ids, chunk, threads=2, kv="f32")
    assert golden.error(got) < EXACT
    got = compute(golden.path, golden.ids, chunk, threads=2)
    assert np.abs(got[golden.rows] - golden.logits).max() < ROUNDED * np.ptp(golden.logits)


@pytest.mark.parametrize("quantized", [False, True], ids=["F32", "Q8_0"])
def test_threads_chunks_and_tiers_change_no_bit(
    golden: Golden, quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = golden.path
    if quantized:
        path = golden.change(tmp_path / "m.gguf", edit=quantize)
    expected = compute(path, golden.ids, threads=1)
    # Rounding to 8 bits costs a few percent, a wrong bias or a missing step much more; but where a
    # router wavers, a token gets other experts.
    off = np.sqrt(np.mean((expected[golden.rows] - golden.logits) ** 2, axis=1))
    off = np.median(off) if quantized else np.sqrt(np.mean(off**2))
    assert off < (0.07 if quantized else 0.002) * golden.logits.std()
    best = tiers()[-1]
    runs = [(best, 1), (best, 2), (best, 3)]
    runs += [(tier, 1 + i % 3) for i, tier in enumerate(tiers()[:-1])]
    for tier, threads in runs:
        monkeypatch.setenv("SMALLM_ISA", tier)
        with smallm.load(path, threads=threads) as model:
            assert model.info.isa == tier
            for chunk in (None, 7, 2, 1):
                got = goldens.ask(model, golden.ids, chunk=chunk)
                same = np.array_equal(got.view(np.uint32), expected.view(np.uint32))
                assert same, (tier, threads, chunk)


# ---- the goldens can tell ------------------------------------------------------------------------


def test_an_expectation_with_a_broken_step_fails(golden: Golden) -> None:
    got = compute(golden.path, golden.ids, threads=2, kv="f32")
    assert golden.error(got) < EXACT and golden.broken
    for step, broken in golden.broken.items():
        least = 3 * EXACT if step in golden.spec["subtle"] else 300 * EXACT
        off = np.abs(got[-len(broken) :] - broken).max() / golden.logits.std()
        assert off > least, step


# What a row of csrc/arch.c says, and the broken step of one of its goldens that would be the answer
# without it.
BROKEN = {
    "rope": {
        "SM_ROPE_PAIRS": "rope on halves|rope on pairs",
        "SM_ROPE_HALVES": "rope on pairs",
        "SM_ROPE_NONE": "no positions|no ALiBi|no biases by distance",
    },
    "norm": {
        "SM_NORM_RMS": "layer norm",
        "SM_NORM_LAYER": "rms norm",
        "SM_NORM_LAYER_PLAIN": "rms norm",
        "SM_NORM_LAYER_BARE": "rms norm",
    },
    "norms": "no norm after attention",
    "embed_norm": "first layer normed|embeddings not normed",
    "qk_norm": {
        "SM_QK_NORM_HEAD": "(no )?norm of (q|queries)",
        "SM_QK_NORM_HEADS": "no norm of q",
        "SM_QK_NORM_ROW": "keys normed head by head|no norm of queries",
    },
    "ffn": {
        "SM_FFN_SWIGLU": "gelu in place of silu|squared relu in place of silu",
        "SM_FFN_SWIGLU_CLAMPED": "no limits",
        "SM_FFN_GEGLU": "the other gelu",
        "SM_FFN_GEGLU_ERF": "the other gelu",
        "SM_FFN_GELU": "the other gelu",
        "SM_FFN_GELU_ERF": "the other gelu",
        "SM_FFN_RELU2": "relu in place of its square",
    },
    "norms_turned": "norms before rope",
    "rope_by_key": "no rope|rope",
    "max_alibi": "no ALiBi",
    "bias": "no biases|no attention biases",
    "parallel": {
        "SM_PARALLEL_KEY": "the other residual",
        "SM_PARALLEL_SHARED": "one after the other",
        "SM_PARALLEL_IF_SHARED": "one after the other",
        "SM_PARALLEL_SECOND": "one after the other",
    },
    "router": "the other normalisation|softmax over all experts",
    "shared_gate": "shared expert without its gate",
    "sinks": "no sinks",
    "sub_norms": "no norm of attention",
    "yarn_exact": "mixing rounded to pairs",
    "gate_in_up": "gate and up exchanged",
    "window": "no window",
    "window_period": "windows everywhere|windows of the other layers",
    "window_later": "windows of the other layers",
    "unturned_period": "rope everywhere",
    "turns_windows": "rope everywhere",
    "local_base": "one rope for all layers",
    "plain_windows": "windows' rope scaled|one rope for all layers",
    "scaled_embeddings": "embeddings as they are",
    "named_scales": "embeddings as they are",
    "divided_logits": "logits as they are|no logit scale",
    "attn_cap": "no cap of scores",
    "logit_cap": "no cap of logits",
    "wide_layers": "scores scaled by the head",
    "is_encoder": "causal",
    "has_encoder": "no attention across",
    "relu_ungated": "silu in the feed-forward",
    "unscaled": "scaled scores",
    "biased_distances": "no biases by distance",
    "scaled_head": "the head's scale",
}
# Fields that say what a tensor is called, or what files may lack.
NO_STEPS = {"ffn_norm", "output_norm", "may_be_dense"}


@pytest.mark.parametrize("row", architectures.rows(), ids=lambda row: row.name)
def test_each_step_of_a_row_is_broken_in_one_of_its_goldens(row: architectures.Row) -> None:
    of_row = [golden for golden in map(Golden, NAMES + ENCODERS) if golden.arch == row.name]
    broken = {step for golden in of_row for step in golden.broken}
    fields = {k: v for k, v in row.fields.items() if k not in NO_STEPS}
    fields.setdefault("norm", "SM_NORM_RMS")  # what a row has that says nothing
    tensors = {name for golden in of_row for name in golden.spec["tensors"]}
    if any("gate" in name or ".w1." in name for name in tensors):
        fields.setdefault("ffn", "SM_FFN_SWIGLU")
    for field, value in fields.items():
        assert field in BROKEN, f"{field}: say which broken step would be the answer without it"
        known = BROKEN[field]
        pattern = known if isinstance(known, str) else known[value]
        assert any(re.fullmatch(pattern, step) for step in broken), (field, value)


def test_each_small_tensor_moves_the_logits(golden: Golden, tmp_path: Path) -> None:
    """Norms 1, biases and tables 0: what a step that ignored the tensor would answer."""
    small = [
        n
        for n, t in golden.read()[1].items()
        # Of the factors of long and short contexts one or the other is read.
        if "blk.1." not in n and not n.startswith("rope_factors_")
        if len(t.shape) == 1 or re.search(r"_norm|conv|ssm_[ad]$|rel_b|position_embd", n)
    ]
    for name in small:

        def neutral(tensors: dict[str, Tensor], name: str = name) -> None:
            zero = re.search(r"\.bias$|conv|rel_b|position_embd", name)
            value = 0 if zero else -1 if name.endswith("ssm_a") else 1  # a state must not grow
            tensors[name].data[:] = value

        path = golden.change(tmp_path / "m.gguf", edit=neutral)
        assert golden.error(compute(path, golden.ids, threads=2, kv="f32")) > 100 * EXACT, name


def uniform(tensors: dict[str, Tensor]) -> None:
    """All queries zero: attention is a mean."""
    for name, t in tensors.items():
        if "attn_q." in name:
            t.data[:] = 0
        elif "attn_qkv." in name:
            t.data[: tensors["blk.0.attn_output.weight"].shape[1]] = 0


FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")


# Keys that change no logits: a limit, names, and what tensors or the caller say.
QUIET = {
    "context_length",
    "decoder_start_token_id",
    "tensor_data_layout",
    "stablelm.use_parallel_residual",
}


def test_each_key_moves_the_logits_or_does_not_fit(golden: Golden, tmp_path: Path) -> None:
    """Every key of the architecture's in the file has a meaning: with another value the file
    answers something else, or its tensors do not fit."""
    keys, tensors = golden.read()
    quiet = {key.removeprefix(f"{golden.arch}.") for key in QUIET}
    if any(name.startswith("rope_f") for name in tensors):  # has the length that the key asks for
        quiet.add("rope.dimension_count")
    if FACTORS[0] in tensors:  # there it only chooses: test_the_context_chooses_ropes_factors
        quiet.add("rope.scaling.original_context_length")
    own = [key.removeprefix(f"{golden.arch}.") for key in keys if key.startswith(golden.arch + ".")]
    if "expert_feed_forward_length" in own:  # there are no others
        quiet.add("feed_forward_length")
    assert len(own) > 5
    for key in own:
        path = golden.change(
            tmp_path / "m.gguf",
            keys={key: goldens.other_value(key, keys[f"{golden.arch}.{key}"].value)},
        )
        try:
            got = compute(path, golden.ids, threads=2, kv="f32")
        except REFUSALS as error:
            assert key not in OTHER_VALUES or key in quiet, (key, error)
            continue
        assert key in quiet or golden.error(got) > 100 * EXACT, key


def test_attention_is_far_from_uniform(golden: Golden, tmp_path: Path) -> None:
    if not any("attn_" in name for name in golden.read()[1] if "norm" not in name):
        pytest.skip("no attention")
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


def test_the_context_chooses_ropes_factors(
    convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    """Up to the original context the short ones, beyond it the long ones, whatever the text."""
    golden = convert_golden("phi3-long")
    ids, original = golden.ids[:100], 128

    def exchange(tensors: dict[str, Tensor]) -> None:
        a, b = FACTORS
        tensors[a], tensors[b] = tensors[b], tensors[a]

    exchanged = golden.change(tmp_path / "m.gguf", edit=exchange)
    got = {
        (path, ctx): compute(path, ids, ctx=ctx, threads=2).view(np.uint32)
        for path in (golden.path, exchanged)
        for ctx in (original, original + 1, None)
    }
    assert np.array_equal(got[golden.path, original + 1], got[golden.path, None])
    assert np.array_equal(got[golden.path, original], got[exchanged, None])
    assert np.array_equal(got[exchanged, original], got[golden.path, None])
    assert not np.array_equal(got[golden.path, original], got[golden.path, None])


def test_factors_of_rope_come_in_twos_and_without_others(
    convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    golden, path = convert_golden("phi3-long"), tmp_path / "m.gguf"
    for name in FACTORS:
        assert name in refusal(golden.change(path, edit=lambda t, name=name: t.pop(name)))
        assert name in refusal(golden.change(path, edit=lambda t, name=name: zero(t[name])))

    def third(tensors: dict[str, Tensor]) -> None:
        tensors["rope_freqs.weight"] = tensors[FACTORS[0]]

    assert "rope_freqs.weight" in refusal(golden.change(path, edit=third))


def zero(tensor: Tensor) -> None:
    tensor.data[-1] = 0


def test_a_fused_gate_that_does_not_divide_into_panels(
    convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        for i in range(2):
            up, down = (tensors[f"blk.{i}.ffn_{x}.weight"] for x in ("up", "down"))
            tensors[f"blk.{i}.ffn_up.weight"] = Tensor(up.type, (176, 64), up.data[:176].copy())
            tensors[f"blk.{i}.ffn_down.weight"] = Tensor(
                down.type, (64, 88), np.ascontiguousarray(down.data[:, :88])
            )

    golden = convert_golden("phi3")
    path = golden.change(tmp_path / "m.gguf", keys={"feed_forward_length": 88}, edit=cut)
    message = refusal(path)
    assert "ffn_up.weight holds 88 rows" in message and "16" in message


# ---- fused query, key and value ------------------------------------------------------------------


@pytest.fixture(params=["llama-linear", "phi2", "qwen2"])
def fusable(request: pytest.FixtureRequest, convert_golden: Callable[[str], Golden]) -> Golden:
    """Goldens whose queries, keys and values have weights and biases of their own."""
    return convert_golden(request.param)


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


def test_fused_queries_keys_and_values_give_the_same_bits(fusable: Golden, tmp_path: Path) -> None:
    for split, fused in ((None, fuse), (quantize, fuse_quantized)):
        paths = [
            fusable.change(tmp_path / f"{i}.gguf", edit=e) for i, e in enumerate((split, fused))
        ]
        for chunk in (None, 1):
            a, b = (compute(p, fusable.ids, chunk, threads=2) for p in paths)
            assert np.array_equal(a.view(np.uint32), b.view(np.uint32))


# ---- what is refused -----------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(REFUSALS) as caught:
        smallm.load(path)
    assert path.name in str(caught.value)
    return str(caught.value).replace("\n", " ")


def test_every_tensor_is_needed_once_and_finite(first: Golden, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    optional = ("output.weight", "rope_freqs.weight")
    for name, tensor in first.read()[1].items():
        if "blk.1." in name:
            continue
        if name not in optional:
            message = refusal(first.change(path, edit=lambda t, name=name: t.pop(name)))
            # Without a fused tensor those of its parts are looked for.
            assert name.replace("attn_qkv.weight", "attn_q.weight") in message

        def poison(tensors: dict[str, Tensor], name: str = name) -> None:
            tensors[name].data.reshape(-1)[-1] = NAN

        def shorten(tensors: dict[str, Tensor], name: str = name) -> None:
            t = tensors[name]
            tensors[name] = Tensor(t.type, (t.shape[0] - 1, *t.shape[1:]), t.data[:-1].copy())

        assert name in refusal(first.change(path, edit=poison))
        message = refusal(first.change(path, edit=shorten))
        assert name in message and str(tensor.shape[0]) in message


FOREIGN = {
    "falcon": ("blk.0.ffn_norm.weight",),
    "falcon-new": ("blk.0.ffn_norm.weight",),
    "gptneox": ("blk.0.attn_norm_2.weight", "position_embd.weight"),
    "mpt": ("blk.1.attn_norm.bias", "position_embd.weight"),
    "llama": ("blk.0.attn_sinks.weight", "blk.0.attn_sub_norm.weight", "blk.1.ffn_sub_norm.weight"),
    "llama-linear": ("output.scale", "token_embd.scale", "blk.0.attn_norm.scale"),
    "phi3": ("blk.0.ffn_gate.weight", "blk.0.ffn_gate.bias", "blk.0.ffn_gate.scale"),
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
def test_a_tensor_that_the_architecture_lacks(
    tmp_path: Path, convert_golden: Callable[[str], Golden], case: tuple[str, str]
) -> None:
    golden, name = convert_golden(case[0]), case[1]

    def add(tensors: dict[str, Tensor]) -> None:
        shape = (96, 64) if name == "blk.0.ffn_gate.weight" else (64,)
        tensors[name] = Tensor(GgmlType.F32, shape, np.zeros(shape, dtype=np.float32))

    message = refusal(golden.change(tmp_path / "m.gguf", edit=add))
    assert f"{name} is not one that the architecture {golden.arch} has" in message


@pytest.mark.parametrize("name", ["bitnet", "phi3", "gpt2", "lfm2"])
def test_matrices_with_a_scale(
    name: str, convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    """A factor beside a layer's matrix, also beside fused and split ones, biases and residuals."""
    golden = convert_golden(name)
    scaled = []

    def scale(tensors: dict[str, Tensor]) -> None:
        for name, t in list(tensors.items()):
            if re.fullmatch(r"blk\.\d+\..*\.weight", name) and len(t.shape) == 2:
                if "shortconv.conv" in name:
                    continue
                factor = np.float32(2 ** (0.3 * (len(scaled) % 7) - 1))
                t.data /= factor
                scaled.append(f"{name.removesuffix('.weight')}.scale")
                tensors[scaled[-1]] = Tensor(GgmlType.F32, (1,), np.array([factor]))

    path = golden.change(tmp_path / "m.gguf", edit=scale)
    assert len(scaled) >= 8
    assert golden.error(compute(path, golden.ids, threads=2, kv="f32")) < EXACT
    path = golden.change(tmp_path / "m.gguf", edit=lambda t: (scale(t), t.pop(scaled[0])))
    assert golden.error(compute(path, golden.ids, threads=2, kv="f32")) > 100 * EXACT
    path = golden.change(
        tmp_path / "m.gguf", edit=lambda t: (scale(t), t[scaled[1]].data.fill(NAN))
    )
    assert scaled[1] in refusal(path)


def test_no_architecture_takes_a_tensor_it_does_not_know(first: Golden, tmp_path: Path) -> None:
    name = "blk.0.attn_gate.weight"

    def add(tensors: dict[str, Tensor]) -> None:
        tensors[name] = Tensor(GgmlType.F32, (64, 64), np.zeros((64, 64), dtype=np.float32))

    message = refusal(first.change(tmp_path / "m.gguf", edit=add))
    assert f"{name} is not one that the architecture {first.arch} has" in message


def test_an_unknown_architecture_is_refused_with_those_there_are(tmp_path: Path) -> None:
    tiny._write(tmp_path / "m.gguf", "elephant", {}, {})
    message = refusal(tmp_path / "m.gguf")
    assert '"elephant"' in message
    assert message.split("this version runs: ")[1].split(", ") == [
        row.name for row in architectures.rows()
    ]


@pytest.mark.parametrize(
    "key",
    [
        "attention.output_scale",
        "router_logit_softcapping",
        "rope.scaling.yarn_log_multiplier",
    ],
)
def test_steps_that_are_not_run_are_refused(
    convert_golden: Callable[[str], Golden], tmp_path: Path, key: str
) -> None:
    golden = convert_golden("llama")
    message = refusal(golden.change(tmp_path / "m.gguf", keys={key: tiny.f32(0.5)}))
    assert f"llama.{key}" in message
    golden.change(tmp_path / "m.gguf", keys={key: tiny.f32(0.0)})
    assert smallm.load(tmp_path / "m.gguf").info.architecture == "llama"


def test_scales_that_files_must_name(
    convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    """Old files leave them to the program."""
    golden = convert_golden("minicpm")
    for key in ("embedding_scale", "residual_scale", "logit_scale"):
        message = refusal(golden.change(tmp_path / "m.gguf", keys={key: None}))
        assert f"the key minicpm.{key} is missing" in message


def test_a_dense_granite_4_as_llama_cpp_s_converter_writes_it(
    convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    """With keys of experts and state spaces that it does not have."""
    golden = convert_golden("granite-4")
    others = {
        "expert_count": 0,
        "expert_used_count": 0,
        "expert_shared_feed_forward_length": 96,
        "attention.head_count_kv": [2, 2],
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 128,
        "ssm.state_size": 24,
        "ssm.time_step_rank": 8,
        "ssm.group_count": 1,
    }
    path = golden.change(tmp_path / "m.gguf", keys=others)
    assert np.array_equal(compute(path, golden.ids), compute(golden.path, golden.ids))
    path = golden.change(tmp_path / "m.gguf", keys={"rope.scaling.finetuned": None})
    assert np.array_equal(compute(path, golden.ids), compute(golden.path, golden.ids))
    path = golden.change(tmp_path / "m.gguf", keys={"rope.scaling.finetuned": False})
    got, broken = compute(path, golden.ids, kv="f32"), golden.broken["no rope"]
    assert np.abs(got[-len(broken) :] - broken).max() < EXACT * golden.logits.std()


def test_without_alibi_positions_are_learned(
    convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    golden = convert_golden("mpt")
    keys = {"attention.max_alibi_bias": tiny.f32(0.0)}
    message = refusal(golden.change(tmp_path / "m.gguf", keys=keys))
    assert "the tensor position_embd.weight is missing" in message
    table = Tensor.encode(np.zeros((1024, 160), np.float32), "F32", np.random.default_rng(0))
    golden.change(
        tmp_path / "m.gguf", keys=keys, edit=lambda t: t.update({"position_embd.weight": table})
    )
    got = compute(tmp_path / "m.gguf", golden.ids, threads=2, kv="f32")
    broken = golden.broken["no ALiBi"]
    off = np.abs(got[-len(broken) :] - broken).max() / golden.logits.std()
    assert off < EXACT


@pytest.mark.parametrize("dropped", [["blk.0.ffn_norm.weight"], ["blk.1.ffn_norm.bias"]], ids=str)
def test_half_of_a_norm_that_may_be_missing(
    convert_golden: Callable[[str], Golden], tmp_path: Path, dropped: list[str]
) -> None:
    golden = convert_golden("stablelm-zephyr")
    message = refusal(
        golden.change(tmp_path / "m.gguf", edit=lambda t: [t.pop(name) for name in dropped])
    )
    assert re.search(r"blk\.[01]\.ffn_norm\.bias", message)


# ---- layers with and without a window ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"), [("gemma2", 2), ("gemma3", 6), ("cohere2", 4), ("exaone4", 4)]
)
def test_the_pattern_of_windows_as_period_and_as_flags(
    convert_golden: Callable[[str], Golden], tmp_path: Path, name: str, key: int
) -> None:
    golden = convert_golden(name)
    expected = compute(golden.path, golden.ids, threads=2)
    n_layer = golden.spec["config"]["num_hidden_layers"]
    flags = [bool((i + 1) % key) for i in range(n_layer)]
    path = tmp_path / "m.gguf"
    for value in (key, flags):
        golden.change(path, keys={"attention.sliding_window_pattern": value})
        assert np.array_equal(compute(path, golden.ids, threads=2), expected)
    flags[0] = False
    golden.change(path, keys={"attention.sliding_window_pattern": flags})
    assert golden.error(compute(path, golden.ids, threads=2)) > 300 * EXACT
    golden.change(path, keys={"attention.sliding_window_pattern": flags[1:]})
    assert "sliding_window_pattern" in refusal(path)


def test_soft_caps_that_old_files_do_not_name(
    convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    golden, caps = convert_golden("gemma2"), ("attn_logit_softcapping", "final_logit_softcapping")
    paths = [
        golden.change(tmp_path / f"{i}.gguf", keys=dict(zip(caps, values, strict=True)))
        for i, values in enumerate([(None, None), (tiny.f32(50), tiny.f32(30))])
    ]
    a, b = (compute(path, golden.ids, threads=2) for path in paths)
    assert np.array_equal(a, b) and golden.error(a) > 0.1


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_file_with_fused_and_split_tensors(fusable: Golden, tmp_path: Path, kind: str) -> None:
    def both(tensors: dict[str, Tensor]) -> None:
        split = dict(tensors)
        fuse(tensors)
        tensors[f"blk.1.attn_k.{kind}"] = split[f"blk.1.attn_k.{kind}"]

    message = refusal(fusable.change(tmp_path / "m.gguf", edit=both))
    assert f"blk.1.attn_k.{kind}" in message


@pytest.mark.parametrize("name", ["phi2", "qwen2"])
def test_a_fused_tensor_without_its_bias_or_of_another_shape(
    name: str, convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    fusable = convert_golden(name)

    def without_bias(tensors: dict[str, Tensor]) -> None:
        fuse(tensors)
        del tensors["blk.1.attn_qkv.bias"]

    def too_short(tensors: dict[str, Tensor]) -> None:
        fuse(tensors)
        t = tensors["blk.1.attn_qkv.weight"]
        tensors["blk.1.attn_qkv.weight"] = Tensor(t.type, (96, 64), t.data[:96].copy())

    path = tmp_path / "m.gguf"
    assert "blk.1.attn_qkv.bias" in refusal(fusable.change(path, edit=without_bias))
    assert "blk.1.attn_qkv.weight" in refusal(fusable.change(path, edit=too_short))


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


EPSILONS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")


@pytest.mark.parametrize("value", [None, tiny.f32(-1e-5), tiny.f32(NAN), tiny.f32(1.0), "1e-5"])
def test_the_norm_wants_its_own_epsilon(first: Golden, tmp_path: Path, value: Any) -> None:
    keys = first.read()[0]
    (own,) = (key for key in EPSILONS if f"{first.arch}.{key}" in keys)
    other = next(key for key in EPSILONS if key != own)
    path = first.change(tmp_path / "m.gguf", keys={own: value, other: tiny.f32(1e-5)})
    assert f"{first.arch}.{own}" in refusal(path)


# Keys and values that no file may have.
JUDGED = (
    ("rope.dimension_count", 7),
    ("rope.dimension_count", 98),
    ("rope.scaling.type", "spiral"),
    ("attention.head_count_kv", 3),
    ("vocab_size", 299),
    ("embedding_length", 1280),
    ("feed_forward_length", 64),
    ("expert_count", 7),
    ("expert_count", 1025),
    ("expert_used_count", 0),
    ("expert_used_count", 65),
    ("expert_feed_forward_length", 96),
    ("expert_shared_feed_forward_length", 96),
    ("expert_group_count", 2),
    ("expert_gating_func", 2),
    ("expert_weights_scale", -1.0),
    ("hidden_activation", "gelu"),
)


def test_keys_are_judged_in_every_architecture(first: Golden, tmp_path: Path) -> None:
    keys = {k.removeprefix(f"{first.arch}.") for k in first.read()[0]} | {"rope.scaling.type"}
    if "expert_count" in keys:  # a key that few files have is judged where it is
        keys |= {"expert_group_count", "expert_gating_func", "expert_weights_scale"}
        keys -= {"feed_forward_length"}  # of layers without experts
    judged = [(key, value) for key, value in JUDGED if key in keys]
    assert len(judged) >= 3
    for key, value in judged:
        message = refusal(first.change(tmp_path / "m.gguf", keys={key: value}))
        assert key in message or re.search(r"token_embd|ffn_", message), message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("yarn_ext_factor", 0.5),
        ("yarn_log_multiplier", -0.1),
        ("yarn_beta_fast", 0.0),
        ("yarn_attn_factor", NAN),
        ("original_context_length", 0),
    ],
)
def test_yarn_is_judged(
    convert_golden: Callable[[str], Golden], tmp_path: Path, key: str, value: Any
) -> None:
    golden = convert_golden("qwen2-yarn")
    key = f"rope.scaling.{key}"
    assert key in refusal(golden.change(tmp_path / "m.gguf", keys={key: value}))


def test_yarn_of_a_checkpoint(convert_golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """What has no key is refused; a magnitude may be given by its logarithms."""
    spec = convert_golden("qwen2-yarn").spec

    def converted(**rope: Any) -> Path:
        rope = spec["config"]["rope_parameters"] | rope
        changed = spec | {"config": spec["config"] | {"rope_parameters": rope}}
        folder = goldens.write_folder(changed, "qwen2-yarn", tmp_path / "folder")
        return smallm.convert.convert(folder, tmp_path / "m.gguf", type="f32", progress=False)

    with pytest.raises(smallm.UnsupportedModelError, match="truncate False"):
        converted(truncate=False)
    with pytest.raises(smallm.CorruptModelError, match="original_max_position_embeddings"):
        converted(original_max_position_embeddings=None)
    ids = convert_golden("qwen2-yarn").ids
    magnitude = (1 + 0.2 * np.log(4)) / (1 + 0.05 * np.log(4))
    a = compute(converted(attention_factor=None, mscale=2.0, mscale_all_dim=0.5), ids)
    b = compute(converted(attention_factor=float(magnitude)), ids)
    assert np.array_equal(a.view(np.uint32), b.view(np.uint32))


def test_yarn_s_magnitude_as_llama_cpp_s_converter_writes_it(
    convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    """The checkpoint's own attention_factor, in place of what the factor would give."""
    golden = convert_golden("qwen2-yarn")
    magnitude = golden.spec["config"]["rope_parameters"]["attention_factor"]
    keys = {"rope.scaling.attn_factor": None, "rope.scaling.yarn_attn_factor": tiny.f32(magnitude)}
    path = golden.change(tmp_path / "m.gguf", keys=keys)
    assert golden.error(compute(path, golden.ids, threads=2, kv="f32")) < EXACT
    path = golden.change(tmp_path / "m.gguf", keys={"rope.scaling.attn_factor": None})
    assert golden.error(compute(path, golden.ids, threads=2, kv="f32")) > 300 * EXACT


def test_yarn_s_magnitude_as_a_multiplier_of_its_logarithm(
    convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    """As llama.cpp's converter writes mscale_all_dim."""
    golden = convert_golden("mistral3")
    keys = {
        "rope.scaling.attn_factor": None,
        "rope.scaling.yarn_log_multiplier": tiny.f32(1.0),
        "attention.temperature_length": 64,
    }
    path = golden.change(tmp_path / "m.gguf", keys=keys)
    assert golden.error(compute(path, golden.ids, threads=2, kv="f32")) < EXACT
    for key, value in (
        ("rope.scaling.yarn_log_multiplier", 0.5),
        ("attention.temperature_length", 99),
    ):
        path = golden.change(tmp_path / "m.gguf", keys=keys | {key: value})
        assert golden.error(compute(path, golden.ids, threads=2, kv="f32")) > 100 * EXACT, key


def test_longrope_is_a_type_that_wants_its_factors(
    convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    golden, keys = convert_golden("phi3-long"), {"rope.scaling.type": "longrope"}
    path = golden.change(tmp_path / "m.gguf", keys=keys)
    assert np.array_equal(compute(path, golden.ids), compute(golden.path, golden.ids))
    message = refusal(convert_golden("phi3").change(path, keys=keys))
    assert "rope_factors_long.weight is missing" in message


def test_keys_that_llama_cpp_s_converter_leaves_out(first: Golden, tmp_path: Path) -> None:
    """Sizes that others imply: the same answer."""
    keys = {k.removeprefix(f"{first.arch}."): v.value for k, v in first.read()[0].items()}
    dropped = {"vocab_size"}
    if "attention.key_length" in keys or keys["attention.head_count"] > 0:
        head = keys["embedding_length"] // keys["attention.head_count"]
        if keys.get("rope.dimension_count") == keys.get("attention.key_length", head):
            dropped.add("rope.dimension_count")
    if keys.get("expert_feed_forward_length") == keys["feed_forward_length"]:
        dropped.add("expert_feed_forward_length")
    path = first.change(tmp_path / "m.gguf", keys=dict.fromkeys(dropped))
    assert np.array_equal(compute(path, first.ids), compute(first.path, first.ids))


# ---- the folders are what is published -----------------------------------------------------------


def test_configs_from_before_transformers_5(
    convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    """rope_theta and rope_scaling in place of rope_parameters: the same file."""
    for name in ("llama-3.1", "llama-linear", "phi2", "qwen2-yarn"):
        golden = convert_golden(name)
        spec = json.loads(json.dumps(golden.spec))
        rope = spec["config"].pop("rope_parameters")
        spec["config"]["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            spec["config"]["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        if rope["rope_type"] != "default":
            spec["config"]["rope_scaling"] = rope
        folder = goldens.write_folder(spec, name, tmp_path / name / golden.folder.name)
        path = smallm.convert.convert(folder, tmp_path / "old.gguf", type="f32", progress=False)
        assert path.read_bytes() == golden.path.read_bytes()
