"""Files that contradict themselves: each refused by its own exception, which names what is wrong.

Metadata and shapes are judged before the first weight is read.  To hold that, every file of the
first three tables also has a weight that is not a number: were weights read first, the message
would name that one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType as GgmlType
from tiny import KV, Kind, Tensor

import smallm

NAN, INF = math.nan, math.inf
REFUSALS = (smallm.CorruptModelError, smallm.UnsupportedModelError)
Edit = Callable[[dict[str, Tensor]], None]


def poison(tensors: dict[str, Tensor]) -> None:
    """The weight that must not be read yet."""
    tensors["output_norm.weight"].data[3] = NAN


def refusal(path: Path, **shape: Any) -> str:
    """The message, on one line, with which the file is refused."""
    made = tiny.write_tiny(path, **shape)
    with pytest.raises(REFUSALS) as caught:
        smallm.load(made.path)
    message = str(caught.value)
    assert made.path.name in message, "the message does not name the file"
    return message.replace("\n", " ")


def test_the_unchanged_model_loads_and_the_poisoned_one_is_refused(tmp_path: Path) -> None:
    """The other tests of this file would mean nothing without this one."""
    with smallm.load(tiny.write_tiny(tmp_path / "m.gguf").path) as model:
        assert np.isfinite(model.logits([1, 300, 17])).all()
    assert "output_norm.weight" in refusal(tmp_path / "p.gguf", edit=poison)


# ---- metadata ------------------------------------------------------------------------------------

SIZES = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
)

METADATA: list[tuple[str, Any, str]] = [
    # key, value in the file (None: missing), pattern of the message (default: the key)
    *((f"llama.{key}", value, "") for key in SIZES for value in (None, 0, 2**32 - 1, -1)),
    *((f"llama.{key}", KV(Kind.UINT64, 2**63 + 64), "") for key in SIZES),
    *((f"llama.{key}", KV(Kind.FLOAT32, 2.0), "") for key in SIZES),
    *((f"llama.{key}", "64", "") for key in SIZES),
    *((f"llama.{key}", [64, 64, 64], "") for key in SIZES),
    ("llama.attention.head_count_kv", 0, ""),
    ("llama.attention.head_count_kv", 3, ""),
    ("llama.attention.head_count_kv", 8, ""),
    ("llama.attention.head_count_kv", -2, ""),
    ("llama.attention.key_length", 0, ""),
    ("llama.attention.key_length", 2**30, ""),
    ("llama.attention.key_length", 24, "key_length|value_length|attn_"),
    ("llama.attention.value_length", 24, "attention.value_length"),
    ("llama.attention.sliding_window", -1, ""),
    *(("llama.attention.clamp_kqv", tiny.f32(value), "") for value in (-1.0, NAN, INF)),
    ("llama.attention.layer_norm_rms_epsilon", None, ""),
    *(
        ("llama.attention.layer_norm_rms_epsilon", tiny.f32(value), "")
        for value in (-1e-5, NAN, INF, 1e30)
    ),
    ("llama.attention.layer_norm_rms_epsilon", KV(Kind.FLOAT64, 1e300), ""),
    ("llama.attention.layer_norm_rms_epsilon", "1e-5", ""),
    *(("llama.rope.freq_base", tiny.f32(value), "") for value in (0.0, -1e4, NAN, INF, 1e38)),
    *(("llama.rope.dimension_count", value, "") for value in (0, 7, 18, 2**31, -2)),
    ("llama.rope.scaling.type", "su", "rope.scaling.type.*su"),
    ("llama.rope.scaling.type", "longrope", r"rope_factors_long\.weight is missing"),
    ("llama.rope.scaling.type", 3, ""),
    *(("llama.rope.scaling.factor", tiny.f32(value), "") for value in (0.0, -2.0, NAN, INF)),
    ("llama.expert_count", 8, ""),
    # What is 0 as a float, or turns further than positions can be told apart.
    ("llama.attention.layer_norm_rms_epsilon", KV(Kind.FLOAT64, 1e-60), ""),
    ("llama.attn_logit_softcapping", KV(Kind.FLOAT64, 1e-60), ""),
    ("llama.residual_scale", KV(Kind.FLOAT64, 1e-60), ""),
    ("llama.rope.scaling.factor", tiny.f32(1e-30), ""),
    # One number for each layer.
    *(
        ("llama.attention.head_count_kv", value, "")
        for value in ([2], [2, 2, 2], [2.0, 2.0], [2, 4])
    ),
    ("llama.attention.head_count_kv", KV(Kind.ARRAY, [2**63, 2**63], Kind.UINT64), ""),
    ("llama.attention.sliding_window_pattern", [True], ""),
    ("llama.attention.sliding_window_pattern", [1, 0], ""),
    # Keys that nothing reads: steps that would be left out.
    ("llama.rope.local.freq_base", tiny.f32(1e4), ""),
    ("llama.attention.output_scale", KV(Kind.FLOAT64, -1e-60), ""),
    ("llama.swin_norm", True, ""),
    ("llama.embedding_length_out", 32, ""),
    ("llama.moe.layout", "dense", "llama.moe.layout is dense"),
    ("llama.rope.dimension_sections", [16, 24, 24], ""),
    # Sizes that disagree with the tensors or the vocabulary.
    ("llama.embedding_length", 128, r"embedding_length|token_embd\.weight"),
    ("llama.embedding_length", 62, r"embedding_length|token_embd\.weight|a head has 15"),
    ("llama.feed_forward_length", 128, r"feed_forward_length|blk\.0\.ffn_"),
    ("llama.block_count", 3, r"block_count|blk\.2\."),
    ("llama.block_count", 1, r"block_count|blk\.1\."),
    ("llama.attention.head_count", 128, "a head has 0"),
    ("llama.attention.head_count", 5, r"head_count|blk\.0\.attn_|rope\.dimension_count"),
    ("llama.attention.head_count_kv", 1, r"head_count_kv|blk\.0\.attn_"),
    ("llama.attention.head_count_kv", 4, r"head_count_kv|blk\.0\.attn_"),
    ("llama.vocab_size", 400, r"vocab_size|token_embd\.weight"),
    ("llama.vocab_size", 0, r"vocab_size"),
    # The architecture and the tokenizer.
    ("general.architecture", "mamba", "general.architecture.*mamba.*llama"),
    ("general.architecture", "", "general.architecture"),
    ("tokenizer.ggml.model", None, ""),
    ("tokenizer.ggml.model", "rwkv", "tokenizer.ggml.model.*rwkv"),
    ("tokenizer.ggml.tokens", None, ""),
    ("tokenizer.ggml.tokens", ["a", "b"], r"tokenizer\.ggml|token_embd\.weight"),
    ("tokenizer.ggml.scores", None, ""),
    ("tokenizer.ggml.scores", [0.0, 1.0], ""),
    ("tokenizer.ggml.token_type", KV(Kind.ARRAY, [1, 1], Kind.INT32), ""),
    *(
        (f"tokenizer.ggml.{name}_token_id", value, "")
        for name in ("bos", "eos", "eot")
        for value in (454, 2**31, -2, "1")
    ),
]


def name_of(case: tuple[str, Any, str]) -> str:
    key, value, _ = case
    shown = value.value if isinstance(value, KV) else value
    return f"{key.removeprefix('llama.')}={str(shown)[:24]}"


@pytest.mark.parametrize("case", METADATA, ids=name_of)
def test_metadata_is_judged_before_weights(tmp_path: Path, case: tuple[str, Any, str]) -> None:
    key, value, pattern = case
    extra = {key: value}
    if key == "llama.rope.scaling.factor":
        extra["llama.rope.scaling.type"] = "linear"
    message = refusal(tmp_path / "m.gguf", extra=extra, edit=poison)
    assert re.search(pattern or re.escape(key), message), message
    assert "output_norm" not in message


@pytest.mark.parametrize(
    ("key", "kind", "n_bytes"),
    [("head_count_kv", Kind.INT32, 4), ("sliding_window_pattern", Kind.BOOL, 1)],
    ids=str,
)
def test_an_empty_array(tmp_path: Path, key: str, kind: Kind, n_bytes: int) -> None:
    """Which the `gguf` package does not write: cut out of one with a single value."""
    name = f"llama.attention.{key}"
    made = tiny.write_tiny(
        tmp_path / "m.gguf", extra={name: KV(Kind.ARRAY, [1], kind)}, edit=poison
    )
    raw = made.path.read_bytes()
    at = raw.index(name.encode()) + len(name) + 8  # behind the kinds of the value and its elements
    assert raw[at : at + 8] == (1).to_bytes(8, "little")
    made.path.write_bytes(raw[:at] + bytes(8) + raw[at + 8 + n_bytes :] + bytes(64))
    with pytest.raises(smallm.CorruptModelError, match=f"{key} has 0 values"):
        smallm.load(made.path)


def test_keys_that_say_nothing(tmp_path: Path) -> None:
    keys = {
        "attention.clamp_kqv": tiny.f32(0.0),
        "swin_norm": False,
        "leading_dense_block_count": 0,
        "moe.layout": "",
        "attention.layer_norm_epsilon": tiny.f32(1e-3),
        "use_parallel_residual": True,
    }
    plain = tiny.write_tiny(tmp_path / "plain.gguf")
    made = tiny.write_tiny(
        tmp_path / "m.gguf", extra={f"llama.{key}": value for key, value in keys.items()}
    )
    with smallm.load(made.path) as model, smallm.load(plain.path) as other:
        assert np.array_equal(model.logits([1, 2, 3]), other.logits([1, 2, 3]))


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    made = tiny.write_tiny(tmp_path / "m.gguf", extra={"llama.block_counT": 2}, edit=poison)
    raw = made.path.read_bytes()
    made.path.write_bytes(raw.replace(b"llama.block_counT", b"llama.block_count"))
    with pytest.raises(smallm.CorruptModelError, match=r"llama\.block_count"):
        smallm.load(made.path)


def test_non_finite_scores_and_malformed_merges(tmp_path: Path) -> None:
    keys = tiny.spm_tokenizer()
    keys["tokenizer.ggml.scores"][300] = NAN
    message = refusal(tmp_path / "m.gguf", tokenizer=keys, edit=poison)
    assert "tokenizer.ggml.scores" in message and "300" in message
    for merge in ("nospace", "", "Ġ", "Ġ zzz", "zzz t", "Ġ t t"):
        keys = tiny.bpe_tokenizer()
        keys["tokenizer.ggml.merges"] = [*keys["tokenizer.ggml.merges"][:5], merge]
        message = refusal(tmp_path / "m.gguf", tokenizer=keys, edit=poison)
        assert "tokenizer.ggml.merges" in message, merge


def test_tokens_that_are_there_twice(tmp_path: Path) -> None:
    keys = tiny.bpe_tokenizer()
    keys["tokenizer.ggml.tokens"][300] = keys["tokenizer.ggml.tokens"][299]
    message = refusal(tmp_path / "m.gguf", tokenizer=keys, edit=poison)
    assert re.search("tokens.* 299 .*300", message)


def test_an_unknown_pre_tokenizer(tmp_path: Path) -> None:
    keys = tiny.bpe_tokenizer("never-heard-of")
    message = refusal(tmp_path / "m.gguf", tokenizer=keys, edit=poison)
    assert "tokenizer.ggml.pre" in message and "never-heard-of" in message and "smollm" in message


# ---- which tensors there are ---------------------------------------------------------------------

REQUIRED = [
    "token_embd.weight",
    *(
        f"blk.1.{name}.weight"
        for name in (
            "attn_norm",
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_norm",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
        )
    ),
]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_tensor(tmp_path: Path, name: str) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        poison(tensors)
        del tensors[name]

    assert name in refusal(tmp_path / "m.gguf", edit=edit)


def test_the_last_norm_is_missing(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["output_norm.weight"]

    assert "output_norm.weight" in refusal(tmp_path / "m.gguf", edit=edit)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_tensor_that_is_there_twice(tmp_path: Path, name: str) -> None:
    assert name in refusal(tmp_path / "m.gguf", edit=poison, duplicate=name)


@pytest.mark.parametrize(
    "name",
    [
        "mystery.weight",
        "blk.0.attn_sinks.weight",
        "blk.2.attn_norm.weight",
        "blk.0.attn_norm.weight ",
        "blk.00.attn_q.weight",
        "blk.0.attn_q.weight.extra",
        "blk.+1.attn_q.weight",
        "blk.4294967296.attn_q.weight",
        "blk.0.attn_norm.bias",
        "output_norm.bias",
    ],
)
def test_an_unknown_tensor(tmp_path: Path, name: str) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        poison(tensors)
        tensors[name] = tensors["blk.0.attn_norm.weight"]

    assert name.strip() in refusal(tmp_path / "m.gguf", edit=edit)


# ---- shapes and types of tensors -----------------------------------------------------------------


def ones(*shape: int) -> Tensor:
    return Tensor(GgmlType.F32, shape, np.ones(shape, dtype=np.float32))


SHAPES: list[tuple[str, tuple[int, ...]]] = [
    ("token_embd.weight", (453, 64)),
    ("token_embd.weight", (455, 64)),
    ("token_embd.weight", (64, 454)),
    ("token_embd.weight", (454 * 64,)),
    ("output.weight", (453, 64)),
    ("output.weight", (454, 32)),
    ("blk.0.attn_norm.weight", (63,)),
    ("blk.0.attn_norm.weight", (128,)),
    ("blk.0.attn_norm.weight", (64, 64)),
    ("blk.0.attn_norm.weight", (1,)),
    ("blk.1.attn_q.weight", (32, 64)),
    ("blk.1.attn_q.weight", (64, 32)),
    ("blk.1.attn_k.weight", (64, 64)),
    ("blk.1.attn_v.weight", (16, 64)),
    ("blk.1.attn_output.weight", (64, 32)),
    ("blk.0.ffn_gate.weight", (64, 96)),
    ("blk.0.ffn_up.weight", (95, 64)),
    ("blk.0.ffn_down.weight", (96, 64)),
    ("blk.0.ffn_down.weight", (64, 96, 2)),
    ("blk.0.ffn_down.weight", (1, 64, 96, 2)),
    ("blk.0.attn_q.bias", (32,)),
    ("blk.0.attn_k.bias", (64,)),
    ("blk.0.ffn_down.bias", (96,)),
    ("rope_freqs.weight", (7,)),
    ("rope_freqs.weight", (16,)),
]


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: f"{c[0]}{list(c[1])}")
def test_a_tensor_of_the_wrong_shape(tmp_path: Path, case: tuple[str, tuple[int, ...]]) -> None:
    name, shape = case

    def edit(tensors: dict[str, Tensor]) -> None:
        poison(tensors)
        tensors[name] = ones(*shape)

    message = refusal(tmp_path / "m.gguf", edit=edit)
    assert name in message
    assert str(shape[-1]) in message, "the message does not tell the size it found"


@pytest.mark.parametrize("kind", [GgmlType.Q1_0, GgmlType.Q8_1, GgmlType.I32, GgmlType.F64])
def test_a_format_that_is_not_run(tmp_path: Path, kind: GgmlType) -> None:
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[kind]

    def edit(tensors: dict[str, Tensor]) -> None:
        poison(tensors)
        shape = (256, 256)
        data = np.zeros((256, 256 // n_values * n_bytes), dtype=np.uint8)
        tensors["blk.0.attn_q.weight"] = Tensor(kind, shape, data)

    path = tmp_path / "m.gguf"
    made = tiny.write_tiny(path, n_embd=256, edit=edit)
    with pytest.raises(smallm.UnsupportedModelError) as caught:
        smallm.load(made.path)
    assert "blk.0.attn_q.weight" in str(caught.value) and kind.name in str(caught.value)


# ---- weights that are not finite -----------------------------------------------------------------

MATRICES = ["token_embd.weight", "blk.1.attn_k.weight", "blk.1.ffn_down.weight"]

# Offsets of each float16 scale in a block.
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "IQ4_NL": (0,),
    "IQ3_S": (0,),
}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name", ["token_embd.weight", "blk.1.attn_k.weight", "blk.1.ffn_down.weight"]
)
@pytest.mark.parametrize(
    "case", [(f, at) for f, offsets in SCALES.items() for at in offsets], ids=str
)
def test_a_scale_that_is_not_finite(
    tmp_path: Path, case: tuple[str, int], name: str, value: float
) -> None:
    type_name, at = case
    block = gguf.GGML_QUANT_SIZES[GgmlType[type_name]][1]

    def edit(tensors: dict[str, Tensor]) -> None:
        blocks = tensors[name].data.reshape(-1, block)
        blocks[-1, at : at + 2] = np.array([value], dtype=np.float16).view(np.uint8)

    message = refusal(tmp_path / "m.gguf", types=type_name, n_embd=256, n_ff=256, edit=edit)
    assert name in message


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("type_name", tiny.FLOAT_FORMATS)
@pytest.mark.parametrize(
    "name", ["token_embd.weight", "blk.1.attn_k.weight", "blk.1.ffn_down.weight"]
)
def test_a_float_weight_that_is_not_finite(
    tmp_path: Path, name: str, type_name: str, value: float
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        values = tensors[name].values()
        values[5, 7] = value
        # As bytes: gguf's own bfloat16 rounding would be asked about NaN otherwise.
        if type_name == "BF16":
            tensors[name].data.view(np.uint16)[5, 7] = values[5, 7].view(np.uint32) >> 16
        else:
            tensors[name].data[5, 7] = value

    assert name in refusal(tmp_path / "m.gguf", types=type_name, edit=edit)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_norm.weight", "blk.1.ffn_norm.weight", "blk.1.attn_k.bias", "rope_freqs.weight"],
)
def test_a_vector_that_is_not_finite(tmp_path: Path, name: str, value: float) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].data[-1] = value

    message = refusal(tmp_path / "m.gguf", biases=True, rope_factors=True, edit=edit)
    assert name in message


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-40])
def test_a_rope_factor_that_cannot_divide(tmp_path: Path, value: float) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["rope_freqs.weight"].data[2] = value

    assert "rope_freqs.weight" in refusal(tmp_path / "m.gguf", rope_factors=True, edit=edit)


# ---- what loads must run, or say why not ---------------------------------------------------------


def test_weights_that_overflow_fail_the_call_and_nothing_else(tmp_path: Path) -> None:
    """Finite weights may still give infinite activations: that call fails, the process lives on."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["blk.0.ffn_up.weight"].data[:] = 3e38

    for type_name in ("F32", "Q4_0"):
        made = tiny.write_tiny(
            tmp_path / "m.gguf",
            types=lambda n, t=type_name: "F32" if n == "blk.0.ffn_up.weight" else t,
            edit=edit,
        )
        with smallm.load(made.path) as model:
            for _ in range(2):
                with pytest.raises(smallm.SmallmError):
                    model.logits([1, 300, 17])
                with pytest.raises(smallm.SmallmError):
                    model.generate([1, 300, 17], max_tokens=3)
    with smallm.load(tiny.write_tiny(tmp_path / "good.gguf").path) as model:
        assert np.isfinite(model.logits([1, 300, 17])).all()


@pytest.mark.parametrize("bad", [-1, 454, 2**31 - 1, 2**31, -(2**31) - 1, 2**70])
def test_token_ids_out_of_range(tmp_path: Path, bad: int) -> None:
    with smallm.load(tiny.write_tiny(tmp_path / "m.gguf").path) as model:
        for call in (model.logits, model.generate, model.detokenize):
            with pytest.raises(ValueError, match=r"454|453"):
                call([1, 300, bad, 17])
        assert model.logits([1, 300]).shape == (2, 454)


@pytest.mark.parametrize(
    "extra",
    [
        {"llama.context_length": 1},
        {"llama.context_length": 1 << 24},
        {"llama.rope.freq_base": 1e6},
        {"llama.attention.layer_norm_rms_epsilon": 1e-12},
        {
            "llama.attention.head_count_kv": KV(Kind.INT64, 2),
            "llama.block_count": KV(Kind.UINT8, 2),
        },
        {"llama.attention.head_count_kv": None, "llama.vocab_size": None},
        {"llama.rope.freq_base": KV(Kind.FLOAT64, 1e4), "llama.rope.dimension_count": None},
        {"llama.attention.sliding_window": 1},
    ],
    ids=str,
)
def test_unusual_but_sound_metadata_loads_and_runs(tmp_path: Path, extra: dict[str, Any]) -> None:
    n_head_kv = 4 if extra.get("llama.attention.head_count_kv", 0) is None else 2
    made = tiny.write_tiny(tmp_path / "m.gguf", extra=extra, n_head_kv=n_head_kv)
    with smallm.load(made.path) as model:
        assert np.isfinite(model.logits([1])).all()
        assert len(model.generate([1], max_tokens=1, temperature=0).tokens) <= 1
