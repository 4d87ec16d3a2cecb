"""The tokenizer files of a checkpoint to tokenizer.ggml.* keys.

What a tokenizer does is recognised from the structure of its files, never from a model's name: a
structure that no row here has is refused, since its ids would be wrong.  tokenizer.json comes
first, since that is what `transformers` runs; a SentencePiece model is read where tokenizer.json is
a copy of one, or missing.

Whether a text is first brought to Unicode's form NFC stands under a key of our own, since llama.cpp
knows none.  White space that an added token takes along cannot be said in a GGUF file and is passed
over.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from ._config import Config, read_json
from ._sentencepiece import BPE, SentencePiece, read_sentencepiece

Keys = dict[str, Any]
Row = tuple[str, float, int]  # text, score, type

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"
MODEL_FILES = ("tokenizer.model", "spiece.model")
SCORE_OF_ADDED, SCORE_OF_UNUSED = -1000.0, -10000.0

# ---- words ---------------------------------------------------------------------------------------

# How byte-level BPE cuts text into words: the steps of tokenizer.json's pre_tokenizer, whether a
# word that is a token is taken whole (ignore_merges), and the row in csrc/tokenizer/pretok.c
# (llama.cpp's names) that does the same.
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_END}"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_END}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?"
_SYMBOLS = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_END}"
_GPT4O = (
    rf"{_CASED}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_CASED}{_UPPER}+{_LOWER}*{_ENGLISH}?"
    rf"|\p{{N}}{{1,3}}{_SYMBOLS}"
)
_TEKKEN = rf"{_CASED}{_UPPER}*{_LOWER}+|{_CASED}{_UPPER}+{_LOWER}*|\p{{N}}{_SYMBOLS}"
_DEEPSEEK3 = (
    r'[!"#$%&'
    r"'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
) + _END

_GPT2 = ("gpt-2",)
_BYTES = ("bytes",)


def _split(regex: str) -> tuple[str, str]:
    return ("split", regex)


PRES: dict[tuple[tuple[tuple[Any, ...], ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((("digits", True), _GPT2), False): "smollm",
    ((_split(_LLAMA3), _BYTES), True): "llama-bpe",
    ((_split(_LLAMA3), _BYTES), False): "dbrx",
    ((_split(_QWEN2), _BYTES), False): "qwen2",
    ((_split(_QWEN35), _BYTES), False): "qwen35",
    ((_split(_GPT4O), _BYTES), False): "gpt-4o",
    # Merges lead to every token of OpenAI's vocabularies: none has to be taken whole.
    ((_split(_GPT4O), _BYTES), True): "gpt-4o",
    ((_split(_TEKKEN), _BYTES), True): "tekken",
    (
        (
            _split(r"\p{N}{1,3}"),
            _split("[一-龥぀-ゟ゠-ヿ]+"),
            _split(_DEEPSEEK3),
            _BYTES,
        ),
        False,
    ): "deepseek-v3",
    (
        (("punctuation", "Contiguous"), _GPT2, ("digits", False), _split("[0-9][0-9][0-9]")),
        False,
    ): "falcon",
}
# Patterns that match every character, so that removing what lies between matches changes nothing.
_COVERING = (_LLAMA3, _QWEN2, _QWEN35, _GPT4O, _TEKKEN)


def _steps(path: Path, pre: Any) -> tuple[tuple[Any, ...], ...]:
    """The pre_tokenizer of tokenizer.json as in the keys of `PRES`."""
    if pre is None:
        return ()
    kind, behavior = pre.get("type"), pre.get("behavior")
    if kind == "Sequence":
        return tuple(step for part in pre["pretokenizers"] for step in _steps(path, part))
    if kind == "ByteLevel" and not pre.get("add_prefix_space", True):
        return (_GPT2 if pre.get("use_regex", True) else _BYTES,)
    if kind == "Digits":
        return (("digits", bool(pre.get("individual_digits"))),)
    if kind == "Punctuation":
        return (("punctuation", behavior),)
    if kind == "Split":
        regex, invert = pre.get("pattern", {}).get("Regex"), bool(pre.get("invert"))
        if (behavior, invert) == ("Isolated", False) or (
            (behavior, invert) == ("Removed", True) and regex in _COVERING
        ):
            # DeepSeek's has line ends themselves where others have their escapes.
            return (_split(regex and regex.replace("\r", r"\r").replace("\n", r"\n")),)
    raise UnsupportedModelError(f"{path}: the pre_tokenizer step {pre!r} is not one that is known")


# ---- the kinds of tokenizers ---------------------------------------------------------------------


def read_tokenizer(folder: Path, config: Config, n_vocab: int) -> Keys:
    """tokenizer.ggml.* and tokenizer.chat_template.

    n_vocab: rows of the embedding table; the vocabulary is filled up to it.
    ModelNotFoundError, CorruptModelError, UnsupportedModelError name the file and what is wrong.
    """
    options_path = folder / "tokenizer_config.json"
    options = read_json(options_path) if options_path.exists() else {}
    path = folder / "tokenizer.json"
    data = read_json(path) if path.exists() else {}
    pieces = next((folder / name for name in MODEL_FILES if (folder / name).exists()), None)
    if not data and pieces is None:
        raise ModelNotFoundError(
            f"{folder}: neither tokenizer.json nor {' nor '.join(MODEL_FILES)} is here"
        )
    added = _added(folder, data, options)
    keys, rows = _read_model(path, data, pieces)
    tokens = _fill(pieces if pieces and not data else path, keys, rows, added, n_vocab)
    keys |= _adds(path, data, options, tokens)
    return keys | _special_ids(folder, options, config, keys, tokens) | _templates(folder, options)


def _read_model(path: Path, data: Keys, pieces: Path | None) -> tuple[Keys, dict[int, Row]]:
    """Keys of the kind of tokenizer, and its tokens by id."""
    model = data.get("model", {})
    kind = model.get("type")
    if kind == "BPE" and not model.get("byte_fallback"):
        return _byte_level(path, data)
    if kind == "WordPiece":
        return _word_piece(path, data)
    if kind == "Unigram":
        return _unigram(path, data)
    if pieces is not None and kind in ("BPE", None):
        keys, rows = _sentencepiece(pieces, read_sentencepiece(pieces))
        vocab = model.get("vocab", {})
        if kind is None or all(vocab.get(text) == i for i, (text, _, _) in rows.items()):
            if kind is not None:
                keys["tokenizer.ggml.add_space_prefix"] = _space_steps(path, data)
                return keys, rows
            # In its user's pieces a mark stands for a space; in added tokens for itself.
            marked = ((i, row) for i, row in rows.items() if row[2] == USER_DEFINED)
            return keys, rows | {i: (t.replace(SPACE, " "), s, kind) for i, (t, s, kind) in marked}
    if kind == "BPE":
        return _pieces_of_merges(path, data)
    raise UnsupportedModelError(
        f"{path}: the model is {kind}; this version takes BPE, Unigram and WordPiece"
    )


def _rows(path: Path, vocab: dict[str, int], kind: int = NORMAL) -> dict[int, Row]:
    rows = {i: (token, 0.0, kind) for token, i in vocab.items()}
    if len(rows) != len(vocab):
        raise CorruptModelError(f"{path}: two tokens have the same id")
    return rows


def _byte_level(path: Path, data: Keys) -> tuple[Keys, dict[int, Row]]:
    model = data["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UnsupportedModelError(
            f"{path}: the BPE marks parts of words, which is not known here"
        )
    normalizer = data.get("normalizer") or {}
    if normalizer.get("type") not in (None, "NFC") and normalizer.get("normalizers") != []:
        raise UnsupportedModelError(
            f"{path}: the normalizer is {normalizer!r}; with byte-level BPE this version takes NFC"
        )
    steps, whole = _steps(path, data.get("pre_tokenizer")), bool(model.get("ignore_merges"))
    if (steps, whole) not in PRES:
        raise UnsupportedModelError(
            f"{path}: the pre_tokenizer {steps!r} (ignore_merges: {whole}) is none of "
            f"{', '.join(dict.fromkeys(PRES.values()))}"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRES[steps, whole],
        "tokenizer.ggml.normalizer.nfc": normalizer.get("type") == "NFC",
        "tokenizer.ggml.merges": merges,
    }
    return keys, _rows(path, model["vocab"])


def _sentencepiece(path: Path, model: SentencePiece) -> tuple[Keys, dict[int, Row]]:
    is_bpe = model.model_type == BPE
    if is_bpe and (model.charsmap or not model.escape_whitespaces):
        raise UnsupportedModelError(f"{path}: its normalizer is not the identity")
    keys: Keys = {
        "tokenizer.ggml.model": "llama" if is_bpe else "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": model.add_dummy_prefix,
    }
    if not is_bpe:
        keys["tokenizer.ggml.remove_extra_whitespaces"] = model.remove_extra_whitespaces
        if model.charsmap:
            keys["tokenizer.ggml.precompiled_charsmap"] = model.charsmap
    elif model.remove_extra_whitespaces:
        raise UnsupportedModelError(f"{path}: it removes white space, which is not known here")
    return keys, dict(enumerate(model.pieces))


def _byte_type(token: str) -> int:
    return BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL


def _pieces_of_merges(path: Path, data: Keys) -> tuple[Keys, dict[int, Row]]:
    """SentencePiece's scores of a tokenizer.json with byte_fallback.

    SentencePiece merges the pair whose text is the best token, tokenizer.json the pair that is
    listed first.  They are the same where each token's pairs are listed together and all are.  So
    they are of runs of a character whose pairs come before all others, the longest first parts
    first: both then add one character after the other."""
    model = data["model"]
    vocab: dict[str, int] = model["vocab"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    rank: dict[str, int] = {}
    n_first = _runs_first(pairs)
    for at, (a, b) in enumerate(pairs):
        if at >= n_first and rank.get(a + b, len(rank) - 1) != len(rank) - 1:
            raise UnsupportedModelError(f"{path}: the merges of {a + b!r} are not listed together")
        rank.setdefault(a + b, len(rank))
    rows: dict[int, Row] = {}
    for token, i in vocab.items():
        kind = UNKNOWN if token == model.get("unk_token") else _byte_type(token)
        rows[i] = (token, -float(rank.get(token, len(rank))), kind)
    apart = {entry["id"] for entry in data.get("added_tokens") or []}
    n_pairs = sum(
        token[:at] in vocab and token[at:] in vocab
        for i, (token, _, kind) in rows.items()
        if kind == NORMAL and (i not in apart or token in rank)
        for at in range(1, len(token))
    )
    if n_pairs != len(model["merges"]):
        raise UnsupportedModelError(
            f"{path}: {len(model['merges'])} merges are listed, but its tokens have {n_pairs}; "
            "only SentencePiece's own are known here, which have all"
        )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": _space_steps(path, data),
    }, rows


def _runs_first(pairs: list[list[str]]) -> int:
    """How many of the first pairs make runs of one character, the longest first parts first."""
    last: dict[str, tuple[int, int]] = {}
    for at, (a, b) in enumerate(pairs):
        lengths = (len(a), len(b))
        if len(set(a + b)) != 1 or last.get(a[0], lengths) < lengths:
            return at
        last[a[0]] = lengths
    return len(pairs)


def _flat(part: Any, key: str) -> list[Keys]:
    """The steps of a normalizer or pre_tokenizer."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [step for inner in part[key] for step in _flat(inner, key)]
    return [part]


def _space_steps(path: Path, data: Keys) -> bool:
    """Judges that spaces become SPACE and nothing else happens; whether one is put before."""
    prefix = marked = False
    steps = _flat(data.get("normalizer"), "normalizers")
    for step in steps + _flat(data.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        is_space = step.get("pattern") == {"String": " "}
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind == "Replace" and is_space and step.get("content") == SPACE:
            marked = True
        elif kind == "Metaspace" and step.get("replacement") == SPACE and not step.get("split"):
            prefix, marked = step.get("prepend_scheme", "always") != "never", True
        elif not (kind == "Split" and is_space and marked):  # no space is left to split at
            raise UnsupportedModelError(f"{path}: the step {step!r} is not one that is known")
    if not marked:
        raise UnsupportedModelError(f"{path}: no step marks spaces as {SPACE}")
    return prefix


def _word_piece(path: Path, data: Keys) -> tuple[Keys, dict[int, Row]]:
    """WordPiece as llama.cpp writes it: SPACE before the start of a word, nothing before a part."""
    model, normalizer = data["model"], data.get("normalizer") or {}
    prefix = model.get("continuing_subword_prefix", "##")
    known = (
        normalizer.get("type") == "BertNormalizer"
        and normalizer.get("clean_text", True)
        and normalizer.get("handle_chinese_chars", True)
        and (data.get("pre_tokenizer") or {}).get("type") == "BertPreTokenizer"
        and model.get("max_input_chars_per_word", 100) == 100
    )
    if not known:
        raise UnsupportedModelError(f"{path}: only BERT's own normalizer and words are known")
    lower = bool(normalizer.get("lowercase", True))
    strip = normalizer.get("strip_accents")
    rows: dict[int, Row] = {}
    for token, i in model["vocab"].items():
        if token == model.get("unk_token"):
            rows[i] = (token, 0.0, UNKNOWN)
        elif token.startswith(prefix):
            rows[i] = (token[len(prefix) :], 0.0, NORMAL)
        elif token.startswith("[") and token.endswith("]") and len(token) > 2:
            rows[i] = (token, 0.0, NORMAL)
        else:
            rows[i] = (SPACE + token, 0.0, NORMAL)
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.normalizer.lowercase": lower,
        "tokenizer.ggml.normalizer.strip_accents": lower if strip is None else bool(strip),
    }, rows


def _unigram(path: Path, data: Keys) -> tuple[Keys, dict[int, Row]]:
    model = data["model"]
    keys: Keys = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }
    steps = _flat(data.get("normalizer"), "normalizers")
    for step in steps + _flat(data.get("pre_tokenizer"), "pretokenizers"):
        kind, pattern = step.get("type"), step.get("pattern", {})
        if kind == "Precompiled":
            keys["tokenizer.ggml.precompiled_charsmap"] = base64.b64decode(
                step["precompiled_charsmap"]
            )
        elif kind == "Replace" and pattern.get("Regex") == " {2,}":
            keys["tokenizer.ggml.remove_extra_whitespaces"] = True
        elif kind == "Metaspace" and step.get("replacement") == SPACE:
            scheme = step.get("prepend_scheme", "always")
            keys["tokenizer.ggml.add_space_prefix"] = scheme != "never"
        elif kind in ("Strip", "WhitespaceSplit"):  # at the ends, and between words
            keys["tokenizer.ggml.remove_extra_whitespaces"] = True
        else:
            raise UnsupportedModelError(f"{path}: the step {step!r} is not one that is known")
    rows = {i: (t, float(score), _byte_type(t)) for i, (t, score) in enumerate(model["vocab"])}
    unknown = model.get("unk_id")
    if unknown in rows:
        rows[unknown] = (*rows[unknown][:2], UNKNOWN)
    return keys, rows


# ---- tokens --------------------------------------------------------------------------------------


def _added(folder: Path, data: Keys, options: Keys) -> dict[int, tuple[str, bool]]:
    """Added tokens of all files: id -> (text, whether special)."""
    found: dict[int, tuple[str, bool]] = {}
    path = folder / "added_tokens.json"
    if path.exists():
        for token, i in read_json(path).items():
            found[i] = (token, False)
    for i, entry in (options.get("added_tokens_decoder") or {}).items():
        found[int(i)] = (entry["content"], bool(entry.get("special")))
    for entry in data.get("added_tokens") or []:
        found[entry["id"]] = (entry["content"], bool(entry.get("special")))
    return found


def _fill(
    path: Path,
    keys: Keys,
    rows: dict[int, Row],
    added: dict[int, tuple[str, bool]],
    n_vocab: int,
) -> list[str]:
    """Adds tokens, types and scores to `keys`; gives the tokens."""
    marks_spaces = keys["tokenizer.ggml.model"] in ("llama", "t5")
    for i, (text, special) in added.items():
        if special and i >= n_vocab:
            continue  # a text model's tokenizer has tokens of images, too, which have no embedding
        old = rows.get(i, (text, SCORE_OF_ADDED, NORMAL))
        if old[2] == UNKNOWN:
            continue
        rows[i] = (text, old[1], CONTROL if special else USER_DEFINED)
    last = max(rows, default=-1)
    if min(rows, default=0) < 0 or last >= n_vocab:
        raise CorruptModelError(
            f"{path}: a token has the id {last}; the model has {n_vocab} embeddings"
        )
    unused = ((f"[PAD{i}]", SCORE_OF_UNUSED, UNUSED) for i in range(n_vocab))
    filled = [rows.get(i, other) for i, other in enumerate(unused)]
    tokens = [text for text, _, _ in filled]
    keys["tokenizer.ggml.tokens"] = tokens
    if marks_spaces:
        keys["tokenizer.ggml.scores"] = np.array([score for _, score, _ in filled], np.float32)
    keys["tokenizer.ggml.token_type"] = np.array([kind for _, _, kind in filled], np.int32)
    return tokens


# ---- special tokens ------------------------------------------------------------------------------

_SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",  # the key is spelled so
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}
# The end of a turn, where generation_config.json names several ends.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|return|>")


def _special_ids(
    folder: Path, options: Keys, config: Config, keys: Keys, tokens: list[str]
) -> Keys:
    found: Keys = {}
    ids = {token: i for i, token in enumerate(tokens)}
    path = folder / "special_tokens_map.json"
    named = (read_json(path) if path.exists() else {}) | options
    for name, ggml in _SPECIAL.items():
        token = named.get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        i = ids.get(token) if isinstance(token, str) else None
        if i is None:
            i = config.get(f"{name}_token_id")
            i = i[0] if isinstance(i, list) and i else i
        if isinstance(i, int) and 0 <= i < len(tokens):
            found[f"tokenizer.ggml.{ggml}_token_id"] = i
    path = folder / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.exists() else None
    if isinstance(ends, list):
        more = [i for i in ends if i != found.get("tokenizer.ggml.eos_token_id")]
        turn = [i for i in more if isinstance(i, int) and 0 <= i < len(tokens)]
        turn.sort(key=lambda i: tokens[i] not in _TURN_ENDS)
        if turn:
            found["tokenizer.ggml.eot_token_id"] = turn[0]
    # What the template puts before and after a text is what BOS and EOS are.
    return {key: i for key, i in found.items() if key not in keys}


def _adds(path: Path, data: Keys, options: Keys, tokens: list[str]) -> Keys:
    """add_bos_token and add_eos_token, and which tokens these are."""
    keys: Keys = {}
    if "post_processor" in data:
        try:
            before, after = _around(path, data["post_processor"])
        except UnsupportedModelError:
            if not all(
                isinstance(options.get(f"add_{name}_token"), bool) for name in ("bos", "eos")
            ):
                raise
            before = after = None  # the options say it
        keys = {
            "tokenizer.ggml.add_bos_token": before is not None,
            "tokenizer.ggml.add_eos_token": after is not None,
        }
        ids = {token: i for i, token in enumerate(tokens)}
        for name, token in (("bos", before), ("eos", after)):
            if token in ids:
                keys[f"tokenizer.ggml.{name}_token_id"] = ids[token]
    for name in ("bos", "eos"):
        if isinstance(options.get(f"add_{name}_token"), bool):
            keys[f"tokenizer.ggml.add_{name}_token"] = options[f"add_{name}_token"]
    return keys


def _around(path: Path, post: Any) -> tuple[str | None, str | None]:
    """The tokens that a post_processor puts before and after one text."""
    kind = None if post is None else post.get("type")
    if kind in (None, "ByteLevel"):
        return None, None
    if kind == "Sequence":
        parts = [_around(path, part) for part in post["processors"]]
        return (
            next((a for a, _ in parts if a is not None), None),
            next((b for _, b in parts if b is not None), None),
        )
    if kind in ("BertProcessing", "RobertaProcessing"):
        return post["cls"][0], post["sep"][0]
    if kind == "TemplateProcessing":
        names = [next(iter(part.values()))["id"] for part in post["single"]]
        texts = [i for i, part in enumerate(post["single"]) if "Sequence" in part]
        if len(texts) == 1 and texts[0] <= 1 and len(names) - texts[0] <= 2:
            i = texts[0]
            return (names[0] if i == 1 else None), (names[-1] if i < len(names) - 1 else None)
    raise UnsupportedModelError(f"{path}: the post_processor {kind} is not one that is known")


# ---- chat templates ------------------------------------------------------------------------------


def _templates(folder: Path, options: Keys) -> Keys:
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.exists() else options.get("chat_template")
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {t["name"]: t["template"] for t in template or [] if isinstance(t, dict)}
    keys = {f"tokenizer.chat_template.{name}": t for name, t in named.items() if name != "default"}
    if keys:
        keys["tokenizer.chat_templates"] = [name for name in named if name != "default"]
    if "default" in named:
        keys["tokenizer.chat_template"] = named["default"]
    return keys
