"""What may stand in for a format of 256-wide blocks in rows that no 256 divides.

    python benchmarks/mixes.py

Of SmolLM2's `ffn_down`, which both kinds can hold, with the channels permuted so that the weights
are on no format's grid (quantizers.py): bits per weight, and the relative root mean square error of
values and of products with what the model multiplies them with.  For each 256-wide format the last
column has the 32-wide one of fewest bits, and among these the best, whose products are at most
ALLOWED times as wrong.  MXFP4 stands in for none: of IQ4_NL's bytes it saves 6 %.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gguf
from common import add_model, arguments, machine, model_path, table, write_json
from quantizers import N_INPUTS, WIDE, Inputs, errors, manual, matrices, shuffle

import smallm
from smallm.quantize import quantize

ALLOWED = 1.1
STANDING = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
FORMATS = ("TQ1_0", "TQ2_0", "Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K")


def bits(format_name: str) -> float:
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format_name]]
    return 8 * n_bytes / n_values


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0], peers=False)
    add_model(parser)
    options = parser.parse_args()
    found: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "f16.gguf", Path(folder) / "out.gguf"
        quantize(model_path(options.model), source, "f16", requantize=True, progress=False)
        shuffle(source)
        with smallm.load(source, threads=options.threads) as model:
            tokens = model.tokenize(manual())
        passed, originals = Inputs(source), matrices(source, None)
        passed.logits(tokens[:N_INPUTS])
        for name in (*FORMATS, "MXFP4", *STANDING):
            keep = [f"*{WIDE}={name}"]
            quantize(source, out, "f16", keep=keep, threads=options.threads, progress=False)
            found[name] = errors(out, name, originals, passed.kept)[:2]
    rows = []
    results: dict[str, Any] = {"machine": machine(), "errors": found}
    for name in sorted(found, key=bits):
        chosen = ""
        if name in FORMATS:
            enough = [n for n in STANDING if found[n][1] <= ALLOWED * found[name][1]]
            chosen = min(enough, key=lambda n: (bits(n), found[n][1]))
        rows.append([name, f"{bits(name):g}", *(f"{100 * e:.2f} %" for e in found[name]), chosen])
    print(table(["", "bits", "values", "products", "stands in"], rows))
    write_json(options.json, results)


if __name__ == "__main__":
    main()
