"""smallm's quantizer beside llama.cpp's, on the same weights; the sizes are shown.

    python benchmarks/quantizers.py --peer llama-cpp-python=ENV/bin/python

ENV has llama-cpp-python.  The weights are SmolLM2's, made F16.  Formats of 32-wide blocks: mean KL
divergence of the whole model from the F16 one, on windows of the GPL-3 text.  Formats of 256-wide
blocks, of the matrices that can hold them (`ffn_down`: the others' rows are 576 wide): root mean
square error, and error of the product with random inputs, both relative.  Times are those of whole
commands.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from common import add_model, arguments, machine, model_path, table, write_json
from quality import licence_text

import smallm
import smallm.eval
from smallm.quantize import quantize

ON_GRID = "q4_1"  # the default model's weights are of this format
NARROW = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
# Types, and the format of their matrices.
WIDE = {"q2_k": "Q2_K", "q3_k_s": "Q3_K", "q4_k_s": "Q4_K", "q5_k_s": "Q5_K", "q6_k": "Q6_K"}
WIDE |= {"tq1_0": "TQ1_0", "tq2_0": "TQ2_0"}
N_INPUTS = 64
THEIRS = """
import ctypes, sys, llama_cpp
source, out, kind, threads, pure = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread, params.pure = int(kind), int(threads), pure == "1"
@llama_cpp.llama_log_callback
def silent(level, text, data): pass
llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)))
"""


def timed(*command: str | Path) -> float:
    begin = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def both(
    peer: str, source: Path, folder: Path, type_name: str, threads: int, wide: str | None
) -> list[tuple[Path, float]]:
    """Files of both quantizers, and seconds.  wide: the format of all matrices that hold it."""
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    words: list[str | Path] = [sys.executable, "-m", "smallm", "quantize", source, ours, type_name]
    words += ["-t", str(threads)]
    words += [] if wide is None else ["--keep", f"*.ffn_down.weight={wide}"]
    kind = str(int(gguf.LlamaFileType[f"MOSTLY_{type_name.upper()}"]))
    pure = "0" if wide is None else "1"
    return [
        (ours, timed(*words)),
        (theirs, timed(peer, "-c", THEIRS, source, theirs, kind, str(threads), pure)),
    ]


def matrices(path: Path, format_name: str | None) -> dict[str, np.ndarray]:
    """Values of the `ffn_down` that have the format; None: of all."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        for t in gguf.GGUFReader(path).tensors
        if t.name.endswith(".ffn_down.weight")
        and (format_name is None or t.tensor_type.name == format_name)
    }


def errors(path: Path, format_name: str, source: dict[str, np.ndarray]) -> tuple[float, float, int]:
    """Relative error of weights, and of products, over all matrices of the format; their number."""
    rng = np.random.default_rng(0)
    sums = np.zeros(4)
    found = matrices(path, format_name)
    for name, values in found.items():
        x = rng.standard_normal((values.shape[1], N_INPUTS), np.float32)
        off = values - source[name]
        sums += [
            (a.astype(np.float64) ** 2).sum()
            for a in (off, source[name], off @ x, source[name] @ x)
        ]
    return float(np.sqrt(sums[0] / sums[1])), float(np.sqrt(sums[2] / sums[3])), len(found)


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0])
    add_model(parser)
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens")
    options = parser.parse_args()
    if len(options.peer) != 1:
        parser.error("one --peer is wanted")
    ((name, peer),) = options.peer
    text = licence_text(None)
    results: dict[str, Any] = {"machine": machine(), "rows": {}}
    rows = []
    head = ["", "tensors", "measure", "smallm", name, "ratio", "MB", f"{name} MB", "s", f"{name} s"]

    def add(type_name: str, n: int, measure: str, values: list[float], made: list[Any]) -> None:
        ratio = values[0] / values[1] if values[1] else float(values[0] > 0) + 1
        sizes = [path.stat().st_size / 1e6 for path, _ in made]
        seconds = [took for _, took in made]
        results["rows"][f"{type_name} {measure}"] = [*values, *sizes, *seconds]
        row = [type_name, str(n), measure, *(f"{v:.5f}" for v in values), f"{ratio:.3f}"]
        rows.append([*row, *(f"{s:.1f}" for s in sizes), *(f"{s:.2f}" for s in seconds)])

    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        source, saved = folder / "f16.gguf", folder / "f16.kld"
        quantize(model_path(options.model), source, "f16", requantize=True, progress=False)
        with smallm.load(source, threads=options.threads) as model:
            smallm.eval.save_logits(model, text, saved, max_windows=options.windows)
        for type_name in NARROW:
            made = both(peer, source, folder, type_name, options.threads, None)
            divergences = []
            for path, _ in made:
                with smallm.load(path, threads=options.threads) as model:
                    found = smallm.eval.divergence(model, saved, max_windows=options.windows)
                divergences.append(found.mean)
            kinds = [t.tensor_type.name for t in gguf.GGUFReader(made[0][0]).tensors]
            shown = f"{type_name} (on-grid)" if type_name == ON_GRID else type_name
            add(shown, kinds.count(type_name.upper()), "mean KL", divergences, made)
        originals = matrices(source, None)
        for type_name, wide in WIDE.items():
            made = both(peer, source, folder, type_name, options.threads, wide)
            pairs = [errors(path, wide, originals) for path, _ in made]
            for i, measure in enumerate(("weights", "products")):
                add(type_name, pairs[0][2], measure, [p[i] for p in pairs], made)
    print(table(head, rows))
    write_json(options.json, results)


if __name__ == "__main__":
    main()
