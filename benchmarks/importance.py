"""What `smallm imatrix` is worth: quantizing with and without it, on a text that it has not seen.

    python benchmarks/importance.py

The weights are the default model's, made F16.  Importance is measured on the reference of Python's
language that comes with Python; shown is the mean KL divergence from the F16 model on windows of
the GPL-3 text, which is of another kind.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from pydoc_data import topics
from typing import Any

from common import add_model, arguments, machine, model_path, table, write_json
from quality import licence_text

import smallm
import smallm.eval
from smallm.quantize import quantize, save_importance

TYPES = ("q2_k", "q3_k_s", "q3_k_m", "q4_0", "q4_k_m", "q5_0")


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0], peers=False)
    add_model(parser)
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, to compare on")
    parser.add_argument("--chunks", type=int, default=128, help="windows to measure on")
    options = parser.parse_args()
    reference = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    results: dict[str, Any] = {"machine": machine(), "rows": {}}
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        source, matrix, out = folder / "f16.gguf", folder / "imatrix", folder / "out.gguf"
        saved = folder / "f16.kld"
        quantize(model_path(options.model), source, "f16", requantize=True, progress=False)
        with smallm.load(source, threads=options.threads) as model:
            began = time.perf_counter()
            made = save_importance(model, reference, matrix, max_windows=options.chunks)
            took = time.perf_counter() - began
            text = licence_text(None)
            smallm.eval.save_logits(model, text, saved, max_windows=options.windows)
        print(f"importance of {made.tokens} tokens: {took:.1f} s")
        results["importance"] = {"tokens": made.tokens, "seconds": took}
        for type_name in TYPES:
            divergences = []
            for imatrix in (None, matrix):
                quantize(
                    source, out, type_name, imatrix=imatrix, threads=options.threads, progress=False
                )
                with smallm.load(out, threads=options.threads) as model:
                    divergences.append(smallm.eval.divergence(model, saved).mean)
            results["rows"][type_name] = divergences
            size = out.stat().st_size / 1e6
            cells = [*(f"{d:.5f}" for d in divergences), f"{divergences[1] / divergences[0]:.3f}"]
            rows.append([type_name, f"{size:.1f}", *cells])
    print(table(["", "MB", "without", "with", "ratio"], rows))
    write_json(options.json, results)


if __name__ == "__main__":
    main()
