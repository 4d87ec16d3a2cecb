"""The families of models that can be converted, one row each.

To add one:

1. a `Family` with the name that general.architecture has in llama.cpp's files and the class names
   that config.json's "architectures" may hold;
2. `keys`: functions from the config to GGUF keys (without the architecture's prefix, which those
   of the tokenizer do not get).  `base` has what every decoder has; add `rms_norm` or `layer_norm`,
   `rope`, and a function of your own;
3. `expect`: values of the config that the graph takes for granted.  Everything that changes the
   mathematics and has no key belongs here, so that another value is refused by name;
4. `rules`: tensors that need more than a new name.  A rule is a pattern of the whole name in the
   checkpoint and a function from the match and the config to `Piece`s: what goes where.  No pieces
   drop the tensor.  All other names are looked up in the gguf package's map of the architecture;
5. `uniform=False` where layers differ in their tensors, `extra` for tensors made from the config;
6. a golden (tests/golden/cases), which converts a folder of it and compares logits.

Nothing here reads weights or writes files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from .._errors import CorruptModelError, UnsupportedModelError
from ._config import Config, judged, read_json

Array = np.ndarray[Any, Any]
Keys = dict[str, Any]


class Piece(NamedTuple):
    """What one tensor of the checkpoint gives to one tensor of the file.

    make: from the tensor (float32, or integers as they are) to the piece; None: as it is.
    part, join: where a target has several pieces, `join` gets them ordered by part; the parts must
        be 0, 1, ... without gaps.
    type: the name of a GGML type that the target has whatever was asked for; `join` then gives its
        bytes, as uint8.
    by_row: `make` and `join` may be given some rows of their tensors at a time (the matrices of
        some experts), from the first dimension's, and then give those rows.
    """

    target: str
    make: Callable[[Array], Array] | None = None
    part: int = 0
    join: Callable[[list[Array]], Array] = np.stack
    type: str | None = None
    by_row: bool = False


Rule = tuple[str, Callable[[re.Match[str], Config], list[Piece]]]


@dataclass(frozen=True)
class Family:
    arch: str
    models: tuple[str, ...]
    keys: tuple[Callable[[Config], Keys], ...]
    expect: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    # Every layer has the same tensors: where one lacks another's, the checkpoint is incomplete.
    uniform: bool = True
    # Which of the configs with these class names.
    when: Callable[[Config], bool] = lambda config: True
    # How many layers there are of each stack, by what their tensors' names begin with.
    stacks: Callable[[Config], Mapping[str, int]] = lambda config: {"": config.n_layer}
    # The output head is the embedding table: a copy of it in the checkpoint is read by nobody.
    tied: Callable[[Config], bool] = lambda c: bool(c.get("tie_word_embeddings", default=False))
    # What quantization_config.quant_method may say.
    quantized: tuple[str, ...] = ()
    # Of models that see images, too: what config.json's text_config means where it does not say.
    # The text model's tensors are those that begin with "language_model."; the others are left out.
    text: Mapping[str, Any] | None = None
    # Tensors that the file has and the checkpoint has not: name -> float32 values.
    extra: Callable[[Config], Mapping[str, Array]] = lambda config: {}


# ---- keys ----------------------------------------------------------------------------------------


def base(c: Config) -> Keys:
    keys = {
        "vocab_size": c.integer("vocab_size"),
        "context_length": c.integer(
            "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"
        ),
        "embedding_length": c.integer("hidden_size", "n_embd", "n_embed", "d_model"),
        "block_count": c.n_layer,
        "attention.head_count": c.n_head,
        "attention.head_count_kv": c.n_head_kv,
    }
    if c.get("head_dim") is not None:
        keys |= {"attention.key_length": c.head, "attention.value_length": c.head}
    return keys


def ffn(c: Config) -> Keys:
    return {"feed_forward_length": c.integer("intermediate_size", "n_inner")}


def rms_norm(c: Config) -> Keys:
    return {"attention.layer_norm_rms_epsilon": c.number("rms_norm_eps", default=1e-6)}


def layer_norm(c: Config) -> Keys:
    names = ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
    return {"attention.layer_norm_epsilon": c.number(*names, default=1e-5)}


def sliding_window(c: Config) -> Keys:
    """For models whose every layer has it."""
    window = c.get("sliding_window")
    return {} if window is None else {"attention.sliding_window": window}


def windows(period: int) -> Callable[[Config], Keys]:
    """For models in which of every `period` layers all but the last have a window."""

    def keys(c: Config) -> Keys:
        flags = [bool((i + 1) % period) for i in range(c.n_layer)]
        types = c.get("layer_types")
        if c.get("sliding_window") is None:
            flags = [False] * c.n_layer
        names = ["sliding_attention" if flag else "full_attention" for flag in flags]
        if types is not None and types != names:
            raise c.refuse("layer_types", [names])
        if types is None and c.get("sliding_window_pattern", default=period) != period:
            raise c.refuse("sliding_window_pattern", [period])
        return sliding_window(c)

    return keys


def query_scale(c: Config) -> Keys:
    """query_pre_attn_scalar, where it is not the head's size."""
    width = c.number("query_pre_attn_scalar")
    return {} if width == c.head else {"attention.scale": width**-0.5}


def soft_caps(c: Config) -> Keys:
    return {
        "attn_logit_softcapping": c.number("attn_logit_softcapping"),
        "final_logit_softcapping": c.number("final_logit_softcapping"),
    }


def local_rope(c: Config) -> Keys:
    """The base of layers with a window: a key only where it is not the usual one."""
    local = (c.get("rope_parameters", default={})).get("sliding_attention", {})
    base = c.number("rope_local_base_freq", default=float(local.get("rope_theta", 10000.0)))
    if local.get("rope_type", "default") != "default":
        raise UnsupportedModelError(
            f"{c.path}: the rope scaling of layers with a window is {local['rope_type']!r}; "
            "this version takes default"
        )
    return {} if base == 10000.0 else {"rope.freq_base_swa": base}


def plain_windows(c: Config) -> Keys:
    """Rope in layers with a window: the other layers' base and no scaling, which has no key."""
    both = c.get("rope_parameters", default={})
    local, base = both.get("sliding_attention"), rope_parameters(c).get("rope_theta")
    if local is not None and (local.get("rope_type"), local.get("rope_theta")) != ("default", base):
        raise UnsupportedModelError(
            f"{c.path}: the rope of layers with a window is {local!r}; this version takes "
            f"rope_type default and rope_theta {base}"
        )
    return {}


def multipliers(c: Config) -> Keys:
    return {
        "embedding_scale": c.number("embedding_multiplier"),
        "residual_scale": c.number("residual_multiplier"),
        "logit_scale": c.number("logits_scaling"),
        "attention.scale": c.number("attention_multiplier"),
    }


def minicpm(c: Config) -> Keys:
    """MiniCPM's factors of embeddings and of what layers add, and what logits are divided by."""
    return {
        "embedding_scale": c.number("scale_emb", default=1.0),
        "residual_scale": c.number("scale_depth", default=1.0) / math.sqrt(c.n_layer),
        "logit_scale": c.integer("hidden_size") / c.number("dim_model_base", default=1.0),
    }


def clipped(c: Config) -> Keys:
    """The limit of q, k and v, where there is one."""
    return {} if c.get("clip_qkv") is None else {"attention.clamp_kqv": c.number("clip_qkv")}


def logit_scale(c: Config) -> Keys:
    return {"logit_scale": c.number("logit_scale")}


def fourth_unturned(c: Config) -> Keys:
    """Of every four layers the last has no rope: there is no key for it."""
    turned = [int((i + 1) % 4 != 0) for i in range(c.n_layer)]
    if c.get("no_rope_layers", default=turned) != turned:
        raise c.refuse("no_rope_layers", [turned])
    return {}


def rope_parameters(c: Config) -> dict[str, Any]:
    """rope_parameters as `transformers` 5 writes them, also of configs from before: rope_type,
    rope_theta, partial_rotary_factor and what the type needs."""
    new = c.get("rope_parameters")
    if new is not None:
        new = new.get("full_attention", new)  # layers with a window: `local_rope`
        return {**new, "rope_type": new.get("rope_type", new.get("type", "default"))}
    old = c.get("rope_scaling", default={})
    rope_type = old.get("rope_type", old.get("type", "default"))
    theta = c.number("rope_theta", "rotary_emb_base", default=10000.0)
    parameters = {**old, "rope_type": rope_type, "rope_theta": theta}
    if c.get("partial_rotary_factor", "rotary_pct") is not None:
        parameters["partial_rotary_factor"] = c.number("partial_rotary_factor", "rotary_pct")
    return parameters


ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def rope_number(c: Config, parameters: Mapping[str, Any], name: str) -> float:
    value = parameters.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CorruptModelError(
            f"{c.path}: the {name} of the rope scaling {parameters['rope_type']} is {value!r}; "
            "a number is wanted"
        )
    return float(value)


def yarn(c: Config, p: dict[str, Any], rounded: bool) -> Keys:
    """yarn's keys.  Readers multiply cos and sin by 1 + 0.1 log(factor) themselves, and by
    attn_factor.  rounded: mixing begins and ends at whole pairs, which has no key."""

    def magnitude(mscale: float = 1.0) -> float:
        return 1.0 + 0.1 * mscale * math.log(factor) if factor > 1 else 1.0

    if bool(p.get("truncate", True)) is not rounded:
        raise UnsupportedModelError(
            f"{c.path}: the rope scaling has truncate {p.get('truncate', True)}; with this "
            f"architecture this version takes {rounded}"
        )
    factor = rope_number(c, p, "factor")
    context = int(rope_number(c, p, "original_max_position_embeddings"))
    wanted = None
    if p.get("attention_factor") is not None:
        wanted = rope_number(c, p, "attention_factor")
    elif p.get("mscale") and p.get("mscale_all_dim"):
        wanted = magnitude(rope_number(c, p, "mscale"))
        wanted /= magnitude(rope_number(c, p, "mscale_all_dim"))
    keys: Keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": context,
        "rope.scaling.yarn_beta_fast": float(p.get("beta_fast") or 32),
        "rope.scaling.yarn_beta_slow": float(p.get("beta_slow") or 1),
    }
    if wanted is not None:
        keys["rope.scaling.attn_factor"] = wanted / magnitude()
    return keys


def rope(c: Config, rounded: bool = True) -> Keys:
    """Base, turned dimensions and scaling.  llama3's factors are a tensor: see `rope_factors`."""
    parameters = rope_parameters(c)
    kind = parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f'{c.path}: the rope scaling is "{kind}"; this version takes {", ".join(ROPE_TYPES)}'
        )
    share = parameters.get("partial_rotary_factor", 1.0)
    keys: Keys = {
        "rope.dimension_count": int(c.head * share),
        "rope.freq_base": float(parameters.get("rope_theta", 10000.0)),
    }
    if kind == "linear":
        keys |= {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": rope_number(c, parameters, "factor"),
        }
    elif kind == "yarn":
        keys |= yarn(c, parameters, rounded)
    elif kind == "longrope":
        keys |= long_rope(c, parameters)
    return keys


def long_rope(c: Config, p: Mapping[str, Any]) -> Keys:
    """The context that the short factors are for, and what lengths are multiplied by: unless the
    config says, sqrt(1 + log(factor) / log(original context)), or 1 without an extension."""
    original = original_context(c, p)
    factor = p.get("factor") or c.integer("max_position_embeddings") / original
    magnitude = p.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(magnitude),
    }


def original_context(c: Config, p: Mapping[str, Any]) -> int:
    name = "original_max_position_embeddings"
    return int(rope_number(c, {**p, name: c.get(name, default=p.get(name))}, name))


def long_rope_factors(c: Config) -> dict[str, Array]:
    """rope_factors_long.weight and rope_factors_short.weight [n_rot / 2]."""
    p = rope_parameters(c)
    if p["rope_type"] != "longrope":
        return {}
    n_rot = int(c.head * p.get("partial_rotary_factor", 1.0))
    tensors = {}
    for which in ("long", "short"):
        factors = np.asarray(p.get(f"{which}_factor", ()), np.float32)
        if factors.shape != (n_rot // 2,):
            raise CorruptModelError(
                f"{c.path}: {which}_factor of the rope scaling has the shape "
                f"{list(factors.shape)}; {n_rot // 2} numbers are wanted"
            )
        tensors[f"rope_factors_{which}.weight"] = factors
    return tensors


def rope_factors(c: Config) -> dict[str, Array]:
    """rope_freqs.weight [n_rot / 2] of the llama3 scaling: what each pair's frequency is divided
    by.  Wave lengths up to the original context / high_freq_factor stay, those from the original
    context / low_freq_factor are stretched by `factor`, and between them 1 / factor is blended."""
    p = rope_parameters(c)
    if p["rope_type"] != "llama3":
        return {}
    factor, low, high, context = (
        rope_number(c, p, name)
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    )
    n_rot = int(c.head * p.get("partial_rotary_factor", 1.0))
    frequency = float(p.get("rope_theta", 10000.0)) ** -(np.arange(0, n_rot, 2) / n_rot)
    wave = 2 * math.pi / frequency
    smooth = np.clip((context / wave - low) / (high - low), 0, 1)
    factors = 1 / ((1 - smooth) / factor + smooth)
    return {"rope_freqs.weight": factors.astype(np.float32)}


def wide_ffn(c: Config) -> Keys:
    """Four times the width where the config does not say."""
    width = c.integer("hidden_size", "n_embd", "n_embed", "d_model")
    return {"feed_forward_length": c.integer("n_inner", "ffn_hidden_size", default=4 * width)}


def parallel_residual(default: bool) -> Callable[[Config], Keys]:
    """default: what configs mean that do not say."""
    return lambda c: {
        "use_parallel_residual": bool(c.get("use_parallel_residual", default=default))
    }


def partial_rope(share: float) -> Callable[[Config], Keys]:
    """share: of each head's values, which turn where the config does not say."""

    def keys(c: Config) -> Keys:
        found = rope(c)
        if "partial_rotary_factor" not in rope_parameters(c):
            found["rope.dimension_count"] = int(c.head * share)
        return found

    return keys


def temperature(c: Config) -> Keys:
    """How much scores grow with each original context that lies before a position."""
    share = rope_parameters(c).get("llama_4_scaling_beta")
    return {"attention.temperature_scale": float(share)} if share else {}


def hunyuan_rope(c: Config) -> Keys:
    """A scaling of their own, which is a larger base."""
    p = rope_parameters(c)
    if p["rope_type"] == "dynamic" and p.get("alpha"):
        theta = rope_number(c, p, "rope_theta") * p["alpha"] ** (c.head / (c.head - 2))
        p = {"rope_type": "default", "rope_theta": theta}
    return rope(Config(c.path, {**c.values, "rope_parameters": p}))


def falcon_kv(c: Config) -> int:
    """Heads of keys and values: one, unless the config says that it is a newer model.  Of an
    adapter's base they are known."""
    if c.get("num_key_value_heads") is not None:
        return c.n_head_kv
    if c.get("new_decoder_architecture", default=False):
        return c.integer("num_kv_heads", "n_head_kv", default=c.n_head)
    return 1 if c.get("multi_query", default=True) else c.n_head


def falcon(c: Config) -> Keys:
    if not c.get("new_decoder_architecture", default=False) and not c.get(
        "parallel_attn", default=True
    ):
        raise c.refuse("parallel_attn", (True,))
    # Configs from before `transformers` knew the family do not say how long its context is.
    return base(Config(c.path, {"max_position_embeddings": 2048, **c.values})) | {
        "attention.head_count_kv": falcon_kv(c),
        "tensor_data_layout": "jploski",
    }


def mpt(c: Config) -> Keys:
    attention = c.get("attn_config", default={})
    for name, allowed in (
        ("alibi", True),
        ("softmax_scale", None),
        ("prefix_lm", False),
        ("qk_ln", False),
    ):
        if attention.get(name, allowed) != allowed:
            raise UnsupportedModelError(
                f"{c.path}: attn_config.{name} is {attention[name]!r}; "
                f"this version takes {allowed!r}"
            )
    width = c.integer("d_model") * c.integer("expansion_ratio", default=4)
    return {
        "feed_forward_length": width,
        "attention.max_alibi_bias": float(attention.get("alibi_bias_max", 8)),
    } | clipped(Config(c.path, attention))


# ---- tensors -------------------------------------------------------------------------------------


def pairs(n_head: int) -> Callable[[Array], Array]:
    """The rows of each head, (first half, second half), so that partners in rope are neighbours."""

    def make(x: Array) -> Array:
        halves: Array = x.reshape(n_head, 2, -1, *x.shape[1:])
        rows: Array = halves.swapaxes(1, 2).reshape(x.shape)
        return rows

    return make


def paired_queries(m: re.Match[str], c: Config) -> list[Piece]:
    layer, which, kind = m.groups()
    n_head = c.n_head if which == "q" else c.n_head_kv
    return [Piece(f"blk.{layer}.attn_{which}.{kind}", pairs(n_head))]


def transposed(x: Array) -> Array:
    return np.ascontiguousarray(x.T)


def gpt2_matrix(m: re.Match[str], c: Config) -> list[Piece]:
    """GPT-2 keeps its matrices [inputs][outputs]."""
    names = {
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    layer, name, kind = m.groups()
    target = f"blk.{layer}.{names[name]}.{kind}"
    return [Piece(target, transposed if kind == "weight" else None)]


def grouped(n_head: int, n_kv: int) -> Callable[[Array], Array]:
    """Rows of each kv head's queries, key and value -> those of all queries, keys, values."""

    def make(x: Array) -> Array:
        heads = x.reshape(n_kv, n_head // n_kv + 2, -1, *x.shape[1:])
        parts = (heads[:, :-2], heads[:, -2], heads[:, -1])
        return np.concatenate([p.reshape(-1, *x.shape[1:]) for p in parts])

    return make


def grouped_qkv(m: re.Match[str], c: Config) -> list[Piece]:
    layer, kind = m.groups()
    return [Piece(f"blk.{layer}.attn_qkv.{kind}", grouped(c.n_head, falcon_kv(c)))]


def internlm2_qkv(m: re.Match[str], c: Config) -> list[Piece]:
    """Queries and keys with rope's partners as neighbours, as the architecture has them."""
    group, n_kv = c.n_head // c.n_head_kv, c.n_head_kv

    def rows(which: str) -> Callable[[Array], Array]:
        def make(x: Array) -> Array:
            heads = x.reshape(n_kv, group + 2, c.head, *x.shape[1:])
            part = {"q": heads[:, :-2], "k": heads[:, -2], "v": heads[:, -1]}[which]
            part = part.reshape(-1, *x.shape[1:])
            return part if which == "v" else pairs(part.shape[0] // c.head)(part)

        return make

    return [Piece(f"blk.{m[1]}.attn_{which}.{m[2]}", rows(which)) for which in "qkv"]


def experts(c: Config) -> Keys:
    """How many experts there are, how many a token uses, and the width of one."""
    return {
        "expert_count": c.integer("num_experts", "num_local_experts"),
        "expert_used_count": c.integer("num_experts_per_tok", "experts_per_token"),
        "expert_feed_forward_length": c.integer("moe_intermediate_size", "intermediate_size"),
    }


def shared_expert(c: Config) -> Keys:
    """The width of the expert that all tokens use; 0: there is none."""
    width = c.integer("shared_expert_intermediate_size", "shared_intermediate_size", default=0)
    return {"expert_shared_feed_forward_length": width} if width else {}


def normed_weights(wanted: bool) -> Callable[[Config], Keys]:
    """No key: whether the chosen experts' weights are divided by their sum goes with the
    architecture, so that the other choice is refused."""

    def read(c: Config) -> Keys:
        if bool(c.get("norm_topk_prob", default=False)) is not wanted:
            raise c.refuse("norm_topk_prob", (wanted,))
        return {}

    return read


def one_expert(m: re.Match[str], c: Config) -> list[Piece]:
    layer, expert, which = m.groups()
    return [Piece(f"blk.{layer}.ffn_{which}_exps.weight", part=int(expert))]


def split_experts(m: re.Match[str], c: Config) -> list[Piece]:
    """[experts][gate rows, then up rows][inputs] of a fused tensor, and the same of one expert, or
    of a layer without experts."""
    layer, kind = m.groups()
    suffix = "_exps" if kind == "block_sparse_moe" else "_shexp" if granite_experts(c) else ""
    by_row = suffix == "_exps"

    def half(second: bool) -> Callable[[Array], Array]:
        def make(x: Array) -> Array:
            n = x.shape[-2] // 2
            rows: Array = x[..., n:, :] if second else x[..., :n, :]
            return rows

        return make

    return [
        Piece(f"blk.{layer}.ffn_gate{suffix}.weight", half(False), by_row=by_row),
        Piece(f"blk.{layer}.ffn_up{suffix}.weight", half(True), by_row=by_row),
    ]


def woven_experts(m: re.Match[str], c: Config) -> list[Piece]:
    """Fused tensors [experts][inputs][gate and up rows, alternating] and biases likewise; or, in
    MXFP4, [experts][gate and up rows, alternating][blocks of 32 inputs] of scales, and in these of
    16 bytes."""
    layer, which, suffix = m.groups()
    packed = suffix in ("_blocks", "_scales")
    kind = "bias" if suffix == "_bias" else "weight"

    def make(first: int, step: int) -> Callable[[Array], Array]:
        turned = suffix is None
        return lambda x: (x.swapaxes(1, 2) if turned else x)[:, first::step]

    def piece(name: str, first: int, step: int) -> Piece:
        target = f"blk.{layer}.ffn_{name}_exps.{kind}"
        if not packed:
            return Piece(target, make(first, step), by_row=True)
        part = 0 if suffix == "_scales" else 1
        return Piece(target, make(first, step), part, mxfp4_blocks, "MXFP4", by_row=True)

    if which == "down":
        return [piece("down", 0, 1)]
    return [piece("gate", 0, 2), piece("up", 1, 2)]


def mxfp4_blocks(parts: list[Array]) -> Array:
    """Scales [...][blocks] and codes [...][blocks][16], in whose bytes i are the inputs 2 i and
    2 i + 1, as GGUF has them: the scale, then bytes in which i are the inputs i and i + 16."""
    scales, codes = parts
    if scales.shape != codes.shape[:-1] or codes.shape[-1] != 16 or scales.dtype != codes.dtype:
        raise ValueError(f"scales {list(scales.shape)}, blocks {list(codes.shape)}")
    if (scales == 255).any():
        raise ValueError("a scale is not a number")
    values = np.stack([codes & 15, codes >> 4], -1).reshape(*scales.shape, 2, 16)
    blocks = np.concatenate([scales[..., None], values[..., 0, :] | values[..., 1, :] << 4], -1)
    joined: Array = blocks.reshape(*scales.shape[:-1], -1)
    return joined


EXPERTS: Rule = (
    r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight",
    one_expert,
)


def convolution(c: Config) -> Keys:
    """LFM2: which layers convolve (those without kv heads), over how many tokens, and the width of
    the feed-forward."""
    kinds = c.get("layer_types", default=[])
    if len(kinds) != c.n_layer or not {"conv", "full_attention"}.issuperset(kinds):
        raise CorruptModelError(
            f"{c.path}: layer_types is {kinds!r}; {c.n_layer} of conv and full_attention are wanted"
        )
    width = c.integer("block_ff_dim", "intermediate_size")
    if c.get("block_auto_adjust_ff_dim", default=True):
        width = 2 * width // 3
        if c.get("block_ffn_dim_multiplier") is not None:
            width = int(c.number("block_ffn_dim_multiplier") * width)
            step = c.integer("block_multiple_of")
            width = -(-width // step) * step
    return {
        "feed_forward_length": width,
        "attention.head_count_kv": [c.n_head_kv if kind != "conv" else 0 for kind in kinds],
        "shortconv.l_cache": c.integer("conv_L_cache"),
        "attention.layer_norm_rms_epsilon": c.number("norm_eps", default=1e-5),
    }


def state_space(c: Config) -> Keys:
    """Mamba 2, which has no attention and no feed-forward; a text may have any length."""
    return {
        "vocab_size": c.integer("vocab_size"),
        "context_length": c.integer("max_position_embeddings", default=2**20),
        "embedding_length": c.integer("hidden_size"),
        "block_count": c.n_layer,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": c.number("layer_norm_epsilon", default=1e-5),
        "ssm.conv_kernel": c.integer("conv_kernel"),
        "ssm.inner_size": c.integer("num_heads") * c.integer("head_dim"),
        "ssm.state_size": c.integer("state_size"),
        "ssm.time_step_rank": c.integer("num_heads"),
        "ssm.group_count": c.integer("n_groups"),
    }


def unlimited(c: Config) -> Keys:
    """No key: time steps of any length."""
    if c.get("time_step_limit") not in UNLIMITED:
        raise c.refuse("time_step_limit", UNLIMITED[1:])
    return {}


# What configs call layers with a state space, and with attention.
GRANITE_KINDS = {
    "mamba": True,
    "linear_attention": True,
    "attention": False,
    "full_attention": False,
}


def granite_scans(c: Config) -> list[bool]:
    """Of each layer of Granite 4, whether it has a state space in place of attention."""
    kinds = c.get("layer_types", "layers_block_type", default=["mamba"] * c.n_layer)
    if len(kinds) != c.n_layer or not GRANITE_KINDS.keys() >= set(kinds):
        raise CorruptModelError(
            f"{c.path}: layer_types is {kinds!r}; {c.n_layer} of {', '.join(GRANITE_KINDS)} are "
            "wanted"
        )
    return [GRANITE_KINDS[kind] for kind in kinds]


def granite_experts(c: Config) -> bool:
    return c.integer("num_local_experts", default=8) > 0


def granite_rope(c: Config) -> Keys:
    """Whether queries and keys turn; and how."""
    turns = c.get("position_embedding_type") == "rope"
    return {"rope.scaling.finetuned": turns} | (rope(c) if turns else {})


def granite_ffn(c: Config) -> Keys:
    """Without experts all tokens use what else is the expert that they share."""
    if not granite_experts(c):
        return {"feed_forward_length": c.integer("shared_intermediate_size", default=1024)}
    return ffn(c) | experts(c) | shared_expert(c)


def granite_mixers(c: Config) -> Keys:
    inner = c.integer("mamba_expand", default=2) * c.integer("hidden_size")
    return {
        "attention.head_count_kv": [0 if scans else c.n_head_kv for scans in granite_scans(c)],
        "ssm.conv_kernel": c.integer("mamba_d_conv", default=4),
        "ssm.inner_size": inner,
        "ssm.state_size": c.integer("mamba_d_state", default=256),
        "ssm.time_step_rank": c.integer("mamba_n_heads", default=128),
        "ssm.group_count": c.integer("mamba_n_groups", default=1),
    }


UNLIMITED = (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}])


# ---- ternary weights -----------------------------------------------------------------------------


def activation(c: Config) -> Keys:
    return {"hidden_activation": c.get("hidden_act", default="silu")}


def ternary_layout(c: Config) -> str | None:
    """How a BitNet checkpoint keeps the weights of its layers.  "master": as floats that are yet to
    be rounded to -s, 0, s.  "packed times scale" and "packed over scale": four rows in the bits of
    one, and a number beside it.  None: as they are."""
    quantization = c.get("quantization_config")
    if quantization is None:
        return "master" if "BitnetForCausalLM" in c.get("architectures", default=[]) else None
    how = Config(c.path, quantization)
    for name, allowed, default in (
        ("quant_method", ("bitnet",), None),
        ("linear_class", ("bitlinear", "autobitlinear"), "bitlinear"),
        ("quantization_mode", ("offline", "online"), "offline"),
        ("use_rms_norm", (False,), False),
        ("modules_to_not_convert", (None, [], ["lm_head"]), None),
    ):
        if how.get(name, default=default) not in allowed:
            raise how.refuse(name, allowed)
    if how.get("linear_class") != "autobitlinear":
        return "packed over scale"
    return "master" if how.get("quantization_mode") == "online" else "packed times scale"


def ternary(x: Array) -> Array:
    """Rounded to -s, 0 and s, where s is the mean of all sizes."""
    inverse = 1 / np.maximum(np.abs(x).mean(dtype=np.float32), np.float32(1e-5))
    rounded: Array = np.clip(np.rint(x * inverse), -1, 1) / inverse
    return rounded


def unpacked(x: Array) -> Array:
    """Bits 2 i and 2 i + 1 of row j are row j + i n of n-row x, plus 1."""
    rows: Array = np.concatenate([x >> 2 * i & 3 for i in range(4)]).astype(np.float32) - 1
    return rows


def bitnet_matrix(m: re.Match[str], c: Config) -> list[Piece]:
    layer, which, kind = m.groups()
    name = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}.get(which)
    target, layout = f"blk.{layer}.{name or 'ffn_' + which}.weight", ternary_layout(c)
    if layout is None or layout == "master":
        return [Piece(target, None if layout is None else ternary)]

    def join(parts: list[Array]) -> Array:
        rows, scale = parts
        with np.errstate(all="ignore"):  # also of shapes alone
            scaled: Array = rows * scale if layout == "packed times scale" else rows / scale
        return scaled

    if kind == "weight":
        return [Piece(target, unpacked, 0, join)]
    return [Piece(target, lambda x: x, 1, join)]


def one_column(m: re.Match[str], c: Config) -> list[Piece]:
    """A or D, a number for each head; A is stored as its logarithm."""
    layer, which = m.groups()
    if which == "D":
        return [Piece(f"blk.{layer}.ssm_d", lambda x: x[:, None])]
    return [Piece(f"blk.{layer}.ssm_a", lambda x: -np.exp(x[:, None]))]


def grouped_norm(m: re.Match[str], c: Config) -> list[Piece]:
    groups = c.integer("n_groups", "mamba_n_groups", default=1)
    return [Piece(f"blk.{m[1]}.ssm_norm.weight", lambda x: x.reshape(groups, -1))]


def state_space_tensors(mixer: str) -> tuple[Rule, ...]:
    """mixer: what their names begin with, its group the layer."""
    return (
        (
            rf"{mixer}\.conv1d\.weight",
            lambda m, c: [Piece(f"blk.{m[1]}.ssm_conv1d.weight", lambda x: x[:, 0])],
        ),
        (rf"{mixer}\.dt_bias", lambda m, c: [Piece(f"blk.{m[1]}.ssm_dt.bias")]),
        (rf"{mixer}\.(A_log|D)", one_column),
        (rf"{mixer}\.norm\.weight", grouped_norm),
    )


def encoder_decoder(c: Config) -> Keys:
    """T5 and its kin.  The first checkpoints scale the head's input, and say so by tying it."""
    start = c.get("decoder_start_token_id", "pad_token_id", default=0)
    width = c.integer("d_model")
    return {
        "vocab_size": c.integer("vocab_size"),
        "context_length": c.integer("n_positions", "max_position_embeddings", default=512),
        "embedding_length": width,
        "feed_forward_length": c.integer("d_ff"),
        "block_count": c.n_layer,
        "decoder_block_count": decoder_layers(c),
        "decoder_start_token_id": start,
        "attention.head_count": c.n_head,
        "attention.key_length": c.integer("d_kv"),
        "attention.value_length": c.integer("d_kv"),
        "attention.layer_norm_rms_epsilon": c.number("layer_norm_epsilon", default=1e-6),
        "attention.relative_buckets_count": c.integer("relative_attention_num_buckets", default=32),
        "logit_scale": width**-0.5 if scaled_head(c) else 1.0,
    }


POOLING = {"mean_tokens": 1, "cls_token": 2, "lasttoken": 3}
MODULES = ("Transformer", "Pooling", "Normalize")


def encoder(c: Config) -> Keys:
    """All tokens see all; how many kinds of texts there are."""
    keys: Keys = {"attention.causal": False}
    if c.get("type_vocab_size") is not None:
        keys["tokenizer.ggml.token_type_count"] = c.integer("type_vocab_size")
    return keys


def pooling(c: Config) -> Keys:
    """What an embedding is made of, where sentence-transformers says it beside the config; also of
    decoders.  Whether vectors are normalized is the caller's choice."""
    path = c.path.parent / "modules.json"
    folder = "1_Pooling"
    with judged(path):
        for module in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []:
            kind = module["type"].rsplit(".", 1)[-1]
            folder = module["path"] if kind == "Pooling" else folder
            if kind not in MODULES:
                raise UnsupportedModelError(
                    f"{path}: the module {kind} is none of {', '.join(MODULES)}, which are known"
                )
    path = c.path.parent / folder / "config.json"
    if not path.is_file():
        return {}
    modes = [name for name, value in read_json(path).items() if value is True and "_mode_" in name]
    names = [name.removeprefix("pooling_mode_") for name in modes]
    if len(names) != 1 or names[0] not in POOLING:
        raise UnsupportedModelError(
            f"{path}: the pooling is {', '.join(names) or 'none'}; this version takes one of "
            f"{', '.join(POOLING)}"
        )
    return {"pooling_type": POOLING[names[0]]}


def first_position(c: Config) -> int:
    """RoBERTa counts positions from the one behind that of padding."""
    return c.integer("pad_token_id", default=1) + 1


def roberta(c: Config) -> Keys:
    return {"context_length": c.integer("max_position_embeddings") - first_position(c)}


def nomic(c: Config) -> Keys:
    """Published configs name the length that rope is stretched to, too: the trained one counts."""
    length = c.integer("max_trained_positions", "max_position_embeddings", default=2048)
    return rope(c) | {"context_length": length}


def modern(c: Config) -> Keys:
    """Of every so many layers the first sees all of the text, the others a window; each kind has a
    base of rope.  Configs name these in two ways."""
    period = c.integer("global_attn_every_n_layers", default=3)
    if period < 1:
        raise c.refuse("global_attn_every_n_layers", ["1 or more"])
    types = [f"{'sliding' if i % period else 'full'}_attention" for i in range(c.n_layer)]
    if c.get("layer_types", default=types) != types:
        raise c.refuse("layer_types", [types])
    both, bases = c.get("rope_parameters", default={}), {}
    for kind, name, usual in (("full", "global", 160000.0), ("sliding", "local", 10000.0)):
        base = c.number(f"{name}_rope_theta", default=usual)
        parameters = {"rope_type": "default", "rope_theta": base} | both.get(
            f"{kind}_attention", {}
        )
        if parameters["rope_type"] != "default" or c.get("rope_scaling") is not None:
            raise UnsupportedModelError(
                f"{c.path}: the rope of {kind} attention is scaled; this version takes it as it is"
            )
        bases[kind] = float(parameters["rope_theta"])
    keys: Keys = {
        "attention.sliding_window": c.integer("local_attention", default=128),
        "attention.sliding_window_pattern": period,
        "attention.layer_norm_epsilon": c.number("norm_eps", "layer_norm_eps", default=1e-5),
        "rope.freq_base": bases["full"],
        "rope.freq_base_swa": bases["sliding"],
    }
    activation = c.get("hidden_activation", default="gelu")
    return keys if activation == "gelu" else keys | {"hidden_activation": activation}


ENCODER: tuple[Rule, ...] = (
    (
        r"(?:bert\.)?embeddings\.(token_type|position)_embeddings\.weight",
        lambda m, c: [
            Piece({"token_type": "token_types", "position": "position_embd"}[m[1]] + ".weight")
        ],
    ),
    # Made for other tasks than embeddings.
    (r"(?:bert\.)?pooler\.dense\.(?:weight|bias)", lambda m, c: []),
    (r"(?:bert\.)?embeddings\.position_ids", lambda m, c: []),
)


# Names of layers' tensors, which the gguf package has for checkpoints without a head.
MODERN = {
    "attn_norm": "attn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.Wo": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.Wi": "ffn_up",
    "mlp.Wo": "ffn_down",
}


def decoder_layers(c: Config) -> int:
    return c.integer("num_decoder_layers", default=c.n_layer)


def scaled_head(c: Config) -> bool:
    if "MT5ForConditionalGeneration" in c.get("architectures", default=[]):
        return False  # whatever it says
    return bool(c.get("scale_decoder_outputs", "tie_word_embeddings", default=True))


DROPPED: Iterable[Rule] = (
    # Tables that old checkpoints stored and every implementation computes.
    (r".*\.rotary_emb\.inv_freq", lambda m, c: []),
    (r".*\.attn\.(?:bias|masked_bias)", lambda m, c: []),
    (r".*\.attention\.(?:bias|masked_bias)", lambda m, c: []),
)

PAIRED: Rule = (
    r"model\.layers\.(\d+)\.self_attn\.([qk])_proj\.(weight|bias)",
    paired_queries,
)


# Norms whose weights are stored less 1, and what they are called without "norm".
CENTRED = {"input_layer": "attn_norm", "q_": "attn_q_norm", "k_": "attn_k_norm"}


def centred_norms(names: Mapping[str, str]) -> tuple[Rule, ...]:
    def rule(m: re.Match[str], c: Config) -> list[Piece]:
        target = "output_norm" if m[1] is None else f"blk.{m[1]}.{(CENTRED | dict(names))[m[2]]}"
        return [Piece(f"{target}.weight", lambda x: x + 1)]

    parts = "|".join(CENTRED | dict(names))
    return ((rf"model\.(?:layers\.(\d+)\.(?:self_attn\.)?({parts}))?norm\.weight", rule),)


NORMS_AROUND = {
    "post_attention_layer": "post_attention_norm",
    "pre_feedforward_layer": "ffn_norm",
    "post_feedforward_layer": "post_ffw_norm",
}
SILU: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
NO_WINDOW: Mapping[str, tuple[Any, ...]] = {**SILU, "use_sliding_window": (False,)}
EXPERTS_IN_EVERY_LAYER: Mapping[str, tuple[Any, ...]] = {
    **NO_WINDOW,
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
}
GEGLU: Mapping[str, tuple[Any, ...]] = {
    # Old configs say gelu, which their models never were.
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False,),
}


def layer_norms_less_1(m: re.Match[str], c: Config) -> list[Piece]:
    names = {"input_layer": "attn_norm", "post_attention_layer": "ffn_norm"}
    target = "output_norm" if m[1] is None else f"blk.{m[1]}.{names[m[2]]}"
    return [Piece(f"{target}.{m[3]}", (lambda x: x + 1) if m[3] == "weight" else None)]


def norms_of_heads(m: re.Match[str], c: Config) -> list[Piece]:
    return [Piece(f"blk.{m[1]}.attn_{m[2]}_norm.weight", part=int(m[3]))]


def shared_down(m: re.Match[str], c: Config) -> list[Piece]:
    return [Piece(f"blk.{m[1]}.ffn_down{'_shexp' if granite_experts(c) else ''}.weight")]


GRANITE_MLPS: tuple[Rule, ...] = (
    (
        r"model\.layers\.(\d+)\.(block_sparse_moe|shared_mlp)\.input_linear\.weight",
        split_experts,
    ),
    (r"model\.layers\.(\d+)\.shared_mlp\.output_linear\.weight", shared_down),
)
GRANITE4 = Family(
    "granite",
    ("GraniteMoeHybridForCausalLM",),
    (base, granite_ffn, rms_norm, granite_rope, multipliers),
    expect={
        **SILU,
        "position_embedding_type": ("rope", "nope"),
        "mamba_conv_bias": (True,),
        "mamba_proj_bias": (False,),
    },
    rules=(PAIRED, *GRANITE_MLPS),
    when=lambda c: not any(granite_scans(c)) and not granite_experts(c),
    extra=rope_factors,
)
MISTRAL3 = Family(
    "mistral3",
    ("Ministral3ForCausalLM",),
    (base, ffn, rms_norm, rope, sliding_window, temperature),
    expect=SILU,
    rules=(PAIRED,),
)
GEMMA3 = Family(
    "gemma3",
    ("Gemma3ForCausalLM",),
    (base, ffn, rms_norm, rope, local_rope, windows(6), query_scale),
    # Neither cap may be there: null counts as missing.
    expect={**GEGLU, "attn_logit_softcapping": (), "final_logit_softcapping": ()},
    rules=centred_norms(NORMS_AROUND),
)
BERT = Family(
    "bert",
    ("BertModel",),
    (base, ffn, layer_norm, encoder),
    expect={
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    },
    rules=ENCODER,
)

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        ("LlamaForCausalLM", "MistralForCausalLM", "LlamaModel", "MistralModel"),
        (base, ffn, rms_norm, rope, sliding_window),
        expect=SILU,
        rules=(PAIRED,),
        extra=rope_factors,
    ),
    MISTRAL3,
    replace(MISTRAL3, models=("Mistral3ForConditionalGeneration",), text={}),
    Family(
        "qwen2",
        ("Qwen2ForCausalLM", "Qwen2Model"),
        (base, ffn, rms_norm, rope),
        expect=NO_WINDOW,
    ),
    Family(
        "qwen2moe",
        ("Qwen2MoeForCausalLM",),
        (base, ffn, rms_norm, rope, experts, shared_expert, normed_weights(False)),
        expect=EXPERTS_IN_EVERY_LAYER,
        rules=(
            EXPERTS,
            (
                r"model\.layers\.(\d+)\.mlp\.shared_expert_gate\.weight",
                lambda m, c: [Piece(f"blk.{m[1]}.ffn_gate_inp_shexp.weight", lambda x: x[0])],
            ),
        ),
    ),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM", "Qwen3Model"),
        (base, ffn, rms_norm, rope),
        expect=NO_WINDOW,
    ),
    Family(
        "gemma",
        ("GemmaForCausalLM",),
        (base, ffn, rms_norm, rope),
        expect=GEGLU,
        rules=centred_norms({"post_attention_layer": "ffn_norm"}),
    ),
    Family(
        "gemma2",
        ("Gemma2ForCausalLM",),
        (base, ffn, rms_norm, rope, windows(2), query_scale, soft_caps),
        expect=GEGLU,
        rules=centred_norms(NORMS_AROUND),
    ),
    GEMMA3,
    replace(
        GEMMA3,
        models=("Gemma3ForConditionalGeneration",),
        text={
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "sliding_window": 4096,
        },
    ),
    Family(
        "olmo",
        ("OlmoForCausalLM",),
        # The norms have no weights, and an epsilon that no config names.
        (base, ffn, rope, clipped, lambda c: {"attention.layer_norm_epsilon": 1e-5}),
        expect={**SILU, "attention_bias": (False,)},
        rules=(PAIRED,),
    ),
    Family(
        "olmo2",
        ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        (base, ffn, rms_norm, rope, windows(4), plain_windows),
        expect=SILU,
    ),
    Family(
        "granite",
        ("GraniteForCausalLM",),
        (base, ffn, rms_norm, rope, multipliers),
        expect=SILU,
        rules=(PAIRED,),
        extra=rope_factors,
    ),
    Family(
        "minicpm",
        ("MiniCPMForCausalLM",),
        (base, ffn, rms_norm, rope, minicpm),
        expect={**SILU, "num_experts": (0,), "sparse_config": (), "attention_bias": (False,)},
        rules=(PAIRED,),
        extra=long_rope_factors,
    ),
    Family(
        "smollm3",
        ("SmolLM3ForCausalLM",),
        (base, ffn, rms_norm, rope, fourth_unturned),
        expect=NO_WINDOW,
        rules=(PAIRED,),
        extra=rope_factors,
    ),
    Family(
        "stablelm",
        ("StableLmForCausalLM",),
        (base, ffn, layer_norm, partial_rope(0.25), parallel_residual(False)),
        expect=SILU,
        rules=(
            (
                r"model\.layers\.(\d+)\.self_attn\.([qk])_layernorm\.norms\.(\d+)\.weight",
                norms_of_heads,
            ),
        ),
    ),
    Family(
        "command-r",
        ("CohereForCausalLM",),
        (base, ffn, layer_norm, rope, logit_scale),
        expect=SILU,
    ),
    Family(
        "cohere2",
        ("Cohere2ForCausalLM",),
        (base, ffn, layer_norm, rope, windows(4), logit_scale),
        expect=SILU,
    ),
    Family(
        "exaone",
        ("ExaoneForCausalLM",),
        (
            base,
            ffn,
            rope,
            lambda c: {
                "attention.layer_norm_rms_epsilon": c.number("layer_norm_epsilon", default=1e-5)
            },
        ),
        expect={"activation_function": ("silu",)},
        extra=rope_factors,
    ),
    Family(
        "exaone4",
        ("Exaone4ForCausalLM",),
        (base, ffn, rms_norm, rope, windows(4)),
        expect=SILU,
        extra=rope_factors,
    ),
    Family(
        "qwen3moe",
        ("Qwen3MoeForCausalLM",),
        (base, ffn, rms_norm, rope, experts, normed_weights(True)),
        expect={**EXPERTS_IN_EVERY_LAYER, "attention_bias": (False,)},
        rules=(EXPERTS,),
    ),
    Family(
        "olmoe",
        ("OlmoeForCausalLM",),
        (base, ffn, rms_norm, rope, experts, normed_weights(False)),
        expect={**SILU, "clip_qkv": (None,), "attention_bias": (False,)},
        rules=(EXPERTS,),
    ),
    Family(
        "granitemoe",
        ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        (base, ffn, rms_norm, rope, experts, shared_expert, multipliers),
        expect=SILU,
        rules=(PAIRED, *GRANITE_MLPS),
        extra=rope_factors,
    ),
    GRANITE4,
    replace(
        GRANITE4,
        arch="granitemoe",
        when=lambda c: not any(granite_scans(c)) and granite_experts(c),
    ),
    replace(
        GRANITE4,
        arch="granitehybrid",
        keys=(*GRANITE4.keys, granite_mixers, unlimited),
        rules=(*GRANITE4.rules, *state_space_tensors(r"model\.layers\.(\d+)\.mamba")),
        when=lambda c: any(granite_scans(c)),
        uniform=False,
    ),
    Family(
        "hunyuan-dense",
        ("HunYuanDenseV1ForCausalLM",),
        (base, ffn, rms_norm, hunyuan_rope),
        expect=SILU,
    ),
    Family(
        "ernie4_5",
        ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
        (base, ffn, rms_norm, rope),
        expect=SILU,
    ),
    Family(
        "chatglm",
        ("GlmForCausalLM",),
        (base, ffn, rms_norm, partial_rope(0.5)),
        expect=SILU,
    ),
    Family(
        "glm4",
        ("Glm4ForCausalLM",),
        (base, ffn, rms_norm, partial_rope(0.5)),
        expect=SILU,
    ),
    Family(
        "arcee",
        ("ArceeForCausalLM",),
        (base, ffn, rms_norm, rope),
        expect={"hidden_act": ("relu2",)},
        rules=(PAIRED,),
        extra=rope_factors,
    ),
    Family(
        "nemotron",
        ("NemotronForCausalLM",),
        (base, ffn, layer_norm, partial_rope(0.5)),
        expect={"hidden_act": ("relu2",)},
        rules=(
            (
                r"model\.(?:layers\.(\d+)\.(input_layer|post_attention_layer))?norm\.(weight|bias)",
                layer_norms_less_1,
            ),
        ),
    ),
    Family(
        "gpt-oss",
        ("GptOssForCausalLM",),
        (base, ffn, rms_norm, lambda c: rope(c, rounded=False), experts, windows(2)),
        expect={
            "hidden_act": ("silu",),
            "swiglu_alpha": (1.702,),
            "swiglu_limit": (7.0,),
            "attention_bias": (True,),
        },
        rules=(
            (
                r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias|_blocks|_scales)?",
                woven_experts,
            ),
            (
                r"model\.layers\.(\d+)\.self_attn\.sinks",
                lambda m, c: [Piece(f"blk.{m[1]}.attn_sinks.weight")],
            ),
        ),
        quantized=("mxfp4",),
    ),
    Family(
        "phi3",
        ("Phi3ForCausalLM",),
        (base, ffn, rms_norm, rope, sliding_window),
        expect=SILU,
        extra=long_rope_factors,
    ),
    Family(
        "gpt2",
        ("GPT2LMHeadModel",),
        (base, wide_ffn, layer_norm),
        expect={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_by_inverse_layer_idx": (False,),
            "scale_attn_weights": (True,),
            "add_cross_attention": (False,),
        },
        rules=(
            (
                r"(?:transformer\.)?h\.(\d+)\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)"
                r"\.(weight|bias)",
                gpt2_matrix,
            ),
            (
                r"(?:transformer\.)?h\.(\d+)\.ln_([12])\.(weight|bias)",
                lambda m, c: [Piece(f"blk.{m[1]}.{'attn' if m[2] == '1' else 'ffn'}_norm.{m[3]}")],
            ),
            (r"(?:transformer\.)?wte\.weight", lambda m, c: [Piece("token_embd.weight")]),
            (r"(?:transformer\.)?wpe\.weight", lambda m, c: [Piece("position_embd.weight")]),
            (r"(?:transformer\.)?ln_f\.(weight|bias)", lambda m, c: [Piece(f"output_norm.{m[1]}")]),
        ),
    ),
    Family(
        "starcoder",
        ("GPTBigCodeForCausalLM",),
        (base, wide_ffn, layer_norm, lambda c: {"attention.head_count_kv": 1}),
        expect={
            "activation_function": ("gelu_pytorch_tanh",),
            "multi_query": (True,),
            "scale_attn_weights": (True,),
            "add_cross_attention": (False,),
        },
    ),
    Family(
        "bloom",
        ("BloomForCausalLM", "BloomModel"),
        (
            # Positions have no table, and configs name no length.
            lambda c: base(
                Config(
                    c.path,
                    {"max_position_embeddings": c.get("seq_length", default=2048)} | c.values,
                )
            ),
            wide_ffn,
            layer_norm,
        ),
        expect={"apply_residual_connection_post_layernorm": (False,)},
        rules=(
            (
                r"(?:transformer\.)?h\.(\d+)\.self_attention\.query_key_value\.(weight|bias)",
                lambda m, c: [Piece(f"blk.{m[1]}.attn_qkv.{m[2]}", grouped(c.n_head, c.n_head))],
            ),
            (
                r"(?:transformer\.)?word_embeddings_layernorm\.(weight|bias)",
                lambda m, c: [Piece(f"token_embd_norm.{m[1]}")],
            ),
            (
                r"(?:transformer\.)?h\.(\d+)\.post_attention_layernorm\.(weight|bias)",
                lambda m, c: [Piece(f"blk.{m[1]}.ffn_norm.{m[2]}")],
            ),
        ),
    ),
    Family(
        "gptneox",
        ("GPTNeoXForCausalLM",),
        (base, ffn, layer_norm, partial_rope(0.25), parallel_residual(True)),
        expect={"hidden_act": ("gelu",), "attention_bias": (True,)},
        rules=(
            (
                r"gpt_neox\.layers\.(\d+)\.attention\.query_key_value\.(weight|bias)",
                lambda m, c: [Piece(f"blk.{m[1]}.attn_qkv.{m[2]}", grouped(c.n_head, c.n_head))],
            ),
        ),
    ),
    Family(
        "starcoder2",
        ("Starcoder2ForCausalLM",),
        (base, ffn, layer_norm, rope, sliding_window),
        expect={"hidden_act": ("gelu_pytorch_tanh",), "use_bias": (True,)},
    ),
    Family(
        "falcon",
        ("FalconForCausalLM", "RWForCausalLM"),
        (falcon, wide_ffn, layer_norm, rope),
        expect={"activation": ("gelu",), "alibi": (False,), "bias": (False,)},
        rules=(
            (
                r"transformer\.h\.(\d+)\.self_attention\.query_key_value\.(weight|bias)",
                grouped_qkv,
            ),
        ),
    ),
    Family(
        "internlm2",
        ("InternLM2ForCausalLM",),
        (base, ffn, rms_norm, rope),
        expect={**SILU, "bias": (False,)},
        rules=((r"model\.layers\.(\d+)\.attention\.wqkv\.(weight)", internlm2_qkv),),
    ),
    Family(
        "mpt",
        ("MptForCausalLM", "MPTForCausalLM"),
        (base, layer_norm, mpt),
        expect={"no_bias": (True,), "logit_scale": (1.0,)},
    ),
    Family(
        "lfm2",
        ("Lfm2ForCausalLM",),
        (base, rope, convolution),
        expect={"conv_bias": (False,)},
        uniform=False,
        rules=(
            (
                r"model\.layers\.(\d+)\.conv\.conv\.weight",
                lambda m, c: [Piece(f"blk.{m[1]}.shortconv.conv.weight", lambda x: x[:, 0])],
            ),
        ),
    ),
    Family(
        "mamba2",
        ("Mamba2ForCausalLM",),
        (state_space, unlimited),
        expect={**SILU, "use_bias": (False,), "use_conv_bias": (True,)},
        rules=state_space_tensors(r"backbone\.layers\.(\d+)\.mixer"),
    ),
    Family(
        "bitnet",
        ("BitNetForCausalLM", "BitnetForCausalLM"),
        (base, ffn, rms_norm, rope, activation),
        expect={"hidden_act": ("relu2", "silu"), "attention_bias": (False,)},
        rules=(
            (
                r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\."
                r"(weight|weight_scale)",
                bitnet_matrix,
            ),
            (
                r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(attn|ffn)_sub_norm\.weight",
                lambda m, c: [Piece(f"blk.{m[1]}.{m[2]}_sub_norm.weight")],
            ),
        ),
        quantized=("bitnet",),
    ),
    Family(
        "phi2",
        ("PhiForCausalLM",),
        (base, ffn, layer_norm, partial_rope(0.5)),
        expect={"hidden_act": ("gelu_new",), "qk_layernorm": (False,)},
    ),
    Family(
        "t5",
        tuple(f"{name}ForConditionalGeneration" for name in ("T5", "MT5", "UMT5")),
        (encoder_decoder,),
        expect={
            "feed_forward_proj": ("relu", "gated-gelu"),
            "relative_attention_max_distance": (128,),
            "is_encoder_decoder": (True,),
        },
        rules=(
            # Copies of the table, and biases that no implementation adds.
            (r"(?:en|de)coder\.embed_tokens\.weight", lambda m, c: []),
            (r"decoder\..*\.EncDecAttention\.relative_attention_bias\.weight", lambda m, c: []),
        ),
        uniform=False,
        stacks=lambda c: {"enc.": c.n_layer, "dec.": decoder_layers(c)},
        tied=scaled_head,
    ),
    BERT,
    replace(
        BERT,
        models=("RobertaModel", "XLMRobertaModel"),
        keys=(*BERT.keys, roberta),
        rules=(
            (
                r"embeddings\.position_embeddings\.weight",
                lambda m, c: [Piece("position_embd.weight", lambda x: x[first_position(c) :])],
            ),
            *ENCODER,
        ),
    ),
    Family(
        "nomic-bert",
        ("NomicBertModel",),
        (base, ffn, layer_norm, encoder, nomic),
        expect={
            "hidden_act": ("silu",),
            "activation_function": ("swiglu",),
            "causal": (False,),
            "moe_every_n_layers": (0,),
            "parallel_block": (False,),
            "prenorm": (False,),
            "qkv_proj_bias": (False,),
            "mlp_fc1_bias": (False,),
            "mlp_fc2_bias": (False,),
            "rotary_emb_fraction": (1.0,),
            "rotary_emb_interleaved": (False,),
            "use_rms_norm": (False,),
        },
        rules=ENCODER,
    ),
    Family(
        "modern-bert",
        ("ModernBertModel", "ModernBertForMaskedLM"),
        (base, ffn, encoder, modern),
        expect={
            "hidden_activation": ("gelu", "silu"),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "norm_bias": (False,),
        },
        rules=(
            # Made for other tasks than embeddings.
            (r"(?:head\.dense|head\.norm|decoder)\.(?:weight|bias)", lambda m, c: []),
            (
                r"model\.embeddings\.tok_embeddings\.weight",
                lambda m, c: [Piece("token_embd.weight")],
            ),
            (r"model\.embeddings\.norm\.weight", lambda m, c: [Piece("token_embd_norm.weight")]),
            (r"model\.final_norm\.weight", lambda m, c: [Piece("output_norm.weight")]),
            (
                r"model\.layers\.(\d+)\.(attn_norm|attn\.Wqkv|attn\.Wo|mlp_norm|mlp\.Wi|mlp\.Wo)"
                r"\.weight",
                lambda m, c: [Piece(f"blk.{m[1]}.{MODERN[m[2]]}.weight")],
            ),
        ),
        uniform=False,
    ),
)


def text_config(c: Config, defaults: Mapping[str, Any]) -> Config:
    inner = c.get("text_config", default={})
    outer = {k: v for k, v in c.values.items() if k == "architectures" or k.endswith("_token_id")}
    return Config(c.path, {**defaults, **inner, **outer})


def find(c: Config) -> tuple[Family, Config]:
    """The row for a config, and that of the text model in it.  UnsupportedModelError lists the rows
    there are."""
    wanted = c.get("architectures", default=[])
    method = c.get("quantization_config", default={}).get("quant_method")
    for model in wanted:
        for family in FAMILIES:
            if model not in family.models or not family.when(c):
                continue
            if family.text is not None:
                c = text_config(c, family.text)
            for name, allowed in family.expect.items():
                if c.get(name) is not None and c.get(name) not in allowed:
                    raise c.refuse(name, allowed)
            if method is not None and method not in family.quantized:
                raise UnsupportedModelError(
                    f"{c.path}: quantization_config.quant_method is {json.dumps(method)}: this "
                    "version converts the checkpoint that was quantized, not what came of it"
                )
            return family, c
    known = dict.fromkeys(model for family in FAMILIES for model in family.models)
    raise UnsupportedModelError(
        f"{c.path}: architectures is {wanted!r}; this version converts {', '.join(known)}"
    )
