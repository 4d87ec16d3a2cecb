"""The tokenizer files of a checkpoint to tokenizer.ggml.* keys.

What a tokenizer does is recognised from the structure of tokenizer.json, never from names: a
structure that no row here has is refused, since its ids would be wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .._errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from ._config import Config, read_json

Keys = dict[str, Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# How byte-level BPE cuts text into words: the steps of tokenizer.json's pre_tokenizer, and the name
# of the row in csrc/pretok.c (llama.cpp's names) that does the same.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("gpt-2",)
_BYTES = ("bytes",)
_DIGIT = ("digits", True)
PRES: dict[tuple[tuple[Any, ...], ...], str] = {
    (_GPT2,): "gpt-2",
    (_DIGIT, _GPT2): "smollm",
    (("split", _LLAMA3), _BYTES): "llama-bpe",
    (("split", _LLAMA3.replace("{1,3}", "")), _BYTES): "qwen2",
}


def _steps(path: Path, pre: Any) -> tuple[tuple[Any, ...], ...]:
    """The pre_tokenizer of tokenizer.json as the keys of `PRES`."""
    if pre is None:
        return ()
    kind = pre.get("type")
    if kind == "Sequence":
        return tuple(step for part in pre["pretokenizers"] for step in _steps(path, part))
    if kind == "ByteLevel" and not pre.get("add_prefix_space", True):
        return (_GPT2 if pre.get("use_regex", True) else _BYTES,)
    if kind == "Digits":
        return (("digits", bool(pre.get("individual_digits"))),)
    regex = pre.get("pattern", {}).get("Regex")
    if kind == "Split" and regex and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        return (("split", regex),)
    raise UnsupportedModelError(f"{path}: the pre_tokenizer step {pre!r} is not one that is known")


def read_tokenizer(folder: Path, config: Config, n_vocab: int) -> Keys:
    """tokenizer.ggml.* and tokenizer.chat_template.

    n_vocab: rows of the embedding table; the vocabulary is filled up to it.
    ModelNotFoundError, CorruptModelError, UnsupportedModelError name the file and what is wrong.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ModelNotFoundError(f"{folder}: no tokenizer.json is here")
    data = read_json(path)
    options_path = folder / "tokenizer_config.json"
    options = read_json(options_path) if options_path.exists() else {}
    kind = data.get("model", {}).get("type")
    if kind != "BPE":
        raise UnsupportedModelError(f"{path}: the model is {kind}; this version takes BPE")
    tokens, types = _vocabulary(path, data, n_vocab)
    keys = _byte_level(path, data)
    keys["tokenizer.ggml.tokens"] = tokens
    keys["tokenizer.ggml.token_type"] = np.array(types, np.int32)
    return keys | _special_ids(data, options, config, tokens) | _template(folder, options)


def _vocabulary(path: Path, data: dict[str, Any], n_vocab: int) -> tuple[list[str], list[int]]:
    by_id: dict[int, tuple[str, int]] = {}
    for token, i in data["model"]["vocab"].items():
        if i in by_id:
            raise CorruptModelError(f"{path}: the id {i} is {by_id[i][0]!r} and {token!r}")
        by_id[i] = (token, NORMAL)
    for added in data.get("added_tokens") or []:
        type_ = CONTROL if added.get("special") else USER_DEFINED
        by_id[added["id"]] = (added["content"], type_)
    last = max(by_id, default=-1)
    if min(by_id, default=0) < 0 or last >= n_vocab:
        raise CorruptModelError(f"{path}: the id {last}; the model has {n_vocab} embeddings")
    rows = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(n_vocab)]
    return [token for token, _ in rows], [type_ for _, type_ in rows]


def _byte_level(path: Path, data: dict[str, Any]) -> Keys:
    steps = _steps(path, data.get("pre_tokenizer"))
    if steps not in PRES:
        raise UnsupportedModelError(
            f"{path}: the pre_tokenizer {steps!r} is not one that this version knows "
            f"({', '.join(sorted(set(PRES.values())))})"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRES[steps],
        "tokenizer.ggml.merges": merges,
    }


_SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",  # the key is spelled so
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}


def _special_ids(
    data: dict[str, Any], options: dict[str, Any], config: Config, tokens: list[str]
) -> Keys:
    keys: Keys = {}
    ids = {token: i for i, token in enumerate(tokens)}
    for name, ggml in _SPECIAL.items():
        token = options.get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        found = ids.get(token) if isinstance(token, str) else None
        if found is None:
            found = config.get(f"{name}_token_id")
            found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int) and 0 <= found < len(tokens):
            keys[f"tokenizer.ggml.{ggml}_token_id"] = found
    for name, adds in zip(("bos", "eos"), _adds(data.get("post_processor")), strict=True):
        keys[f"tokenizer.ggml.add_{name}_token"] = adds
    return keys


def _adds(post: Any) -> tuple[bool, bool]:
    """Whether a post_processor puts a token before and after the text."""
    if post is None:
        return False, False
    if post.get("type") == "Sequence":
        parts = [_adds(part) for part in post["processors"]]
        return any(a for a, _ in parts), any(b for _, b in parts)
    single = post.get("single", [])
    special = ["SpecialToken" in part for part in single]
    return bool(special) and special[0], len(special) > 1 and special[-1]


def _template(folder: Path, options: dict[str, Any]) -> Keys:
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.exists() else options.get("chat_template")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}
