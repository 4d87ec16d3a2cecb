"""smallm's quantizer beside llama.cpp's, on the same weights and at the same size.

    python benchmarks/quantizers.py --peer llama-cpp-python=ENV/bin/python

ENV has llama-cpp-python.  The weights are SmolLM2's, made F16.

Formats of 32-wide blocks: the mean KL divergence of the whole model from the F16 one, on windows
spread over the reference of Python's language that comes with Python and the GPL-3 text.  The
ratio's error is the standard error over the parts of the text, the same ones for both.

Formats of 256-wide blocks: the matrices that can hold them are `ffn_down`, as the others' rows are
576 wide.  Root mean square error of their values, and of their products with what an independent
forward pass (tests/reference.py) multiplies them with on the text's first tokens, both relative.

--shuffled permutes the model's channels first: it computes the same, and its weights are on no
format's grid any more.

Times are those of the two functions, in alternating processes.  --repeats 0 leaves them out,
--parts 0 all that has to do with quality.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import gguf
import numpy as np
from common import (
    HERE,
    add_model,
    arguments,
    machine,
    median,
    model_path,
    ratios,
    spread,
    table,
    write_json,
)
from quality import licence_text

import smallm
import smallm.eval
from smallm.quantize import quantize

sys.path.insert(0, str(HERE.parent / "tests"))
import reference

ON_GRID = "q4_1"  # the default model's weights are of this format
WINDOW = 512
N_INPUTS = 256  # tokens whose products are compared
WIDE = ".ffn_down.weight"


class Type(NamedTuple):
    name: str
    kind: gguf.LlamaFileType
    format: str | None = None  # of all matrices that can hold it; None: as the type mixes them


NARROW = [
    Type(name, gguf.LlamaFileType[f"MOSTLY_{name.upper()}"])
    for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl")
]
NARROW.append(Type("mxfp4", gguf.LlamaFileType.MOSTLY_MXFP4_MOE, "MXFP4"))
FORMATS = {"q2_k": "Q2_K", "q3_k_s": "Q3_K", "q4_k_s": "Q4_K", "q5_k_s": "Q5_K", "q6_k": "Q6_K"}
FORMATS |= {"iq4_xs": "IQ4_XS", "tq1_0": "TQ1_0", "tq2_0": "TQ2_0"}
ALL_WIDE = [
    Type(name, gguf.LlamaFileType[f"MOSTLY_{name.upper()}"], format)
    for name, format in FORMATS.items()
]

OURS = """
import json, sys, time
from smallm.quantize import quantize
source, out, type_name, threads, keep = sys.argv[1:]
begin = time.perf_counter()
quantize(source, out, type_name, threads=int(threads), keep=json.loads(keep), progress=False)
print(time.perf_counter() - begin)
"""
THEIRS = """
import ctypes, sys, time, llama_cpp
source, out, kind, threads, pure = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread, params.pure = int(kind), int(threads), pure == "1"
@llama_cpp.llama_log_callback
def silent(level, text, data): pass
llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
begin = time.perf_counter()
code = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
print(time.perf_counter() - begin)
sys.exit(code)
"""


def timed(python: str, program: str, source: Path, *command: str | Path) -> float:
    """Runs the program, as a file beside the source: a program of its own folder would find the
    checkout's smallm, which has no library."""
    script = source.with_name("quantizer.py")
    script.write_text(program)
    words = [python, script, source, *command]
    return float(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)


def ours(source: Path, out: Path, kind: Type, threads: int) -> float:
    """Writes the file; seconds."""
    pattern = f"*{WIDE}" if kind in ALL_WIDE else "*"
    keep = [] if kind.format is None else [f"{pattern}={kind.format}"]
    name = "q8_0" if kind.name == "mxfp4" else kind.name
    return timed(sys.executable, OURS, source, out, name, str(threads), json.dumps(keep))


def theirs(peer: str, source: Path, out: Path, kind: Type, threads: int) -> float:
    pure = "0" if kind.format is None else "1"
    return timed(peer, THEIRS, source, out, str(int(kind.kind)), str(threads), pure)


def shuffle(path: Path, seed: int = 0) -> None:
    """Permutes the channels of a llama model in F16: it computes the same, and its weights are on
    no format's grid any more."""
    reader = gguf.GGUFReader(path, "r+")
    w = {t.name: t.data for t in reader.tensors}
    n_kv, n_layer = (
        int(reader.fields[f"llama.{key}"].contents())
        for key in ("attention.head_count_kv", "block_count")
    )
    rng = np.random.default_rng(seed)
    n_embd = w["output_norm.weight"].size
    stream = rng.permutation(n_embd)
    for name, x in w.items():
        if x.ndim == 1 or name.endswith(("attn_output.weight", "ffn_down.weight")):
            x[:] = x[stream]
        else:
            x[:] = x[:, stream]
    for i in range(n_layer):
        down, v, output = (w[f"blk.{i}.{n}.weight"] for n in ("ffn_down", "attn_v", "attn_output"))
        hidden = rng.permutation(down.shape[1])
        down[:] = down[:, hidden]
        for name in ("ffn_gate", "ffn_up"):
            w[f"blk.{i}.{name}.weight"][:] = w[f"blk.{i}.{name}.weight"][hidden]
        head = rng.permutation(v.shape[0] // n_kv)  # of every head the same
        v[:] = v.reshape(n_kv, -1, n_embd)[:, head].reshape(v.shape)
        output[:] = output.reshape(n_embd, -1, len(head))[..., head].reshape(output.shape)
    reader.data.flush()


# ---- quality -------------------------------------------------------------------------------------


def manual() -> str:
    """The reference of Python's language."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def runs(tokens: list[int], n_parts: int, n: int) -> list[list[int]]:
    """n_parts runs of n tokens, from first to last."""
    if len(tokens) < n_parts * n:
        sys.exit(f"the text has {len(tokens)} tokens; {n_parts * n} are wanted")
    step = (len(tokens) - n) / max(1, n_parts - 1)
    return [tokens[round(i * step) :][:n] for i in range(n_parts)]


def divergences(
    source: Path, files: list[Path], parts: list[list[int]], options: Any
) -> np.ndarray:
    """Mean KL divergences from the source: [n_files, n_parts]."""
    found = np.zeros((len(files), len(parts)))
    saved = source.with_suffix(".kld")
    for j, part in enumerate(parts):
        with smallm.load(source, threads=options.threads) as model:
            smallm.eval.save_logits(model, part, saved, ctx=WINDOW)
        for i, file in enumerate(files):
            with smallm.load(file, threads=options.threads) as model:
                found[i, j] = smallm.eval.divergence(model, saved).mean
        print(f"part {j + 1} of {len(parts)}", file=sys.stderr, flush=True)
    return found


def quotient(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Of the means of pairs a, b [n], and its standard error."""
    ratio, n = float(a.mean() / b.mean()), len(a)
    return ratio, float(np.sqrt(((a - ratio * b) ** 2).sum() * n / max(1, n - 1)) / b.sum())


class Inputs(reference.Reference):
    """Keeps what the wide matrices are multiplied with."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.kept: dict[str, np.ndarray] = {}

    def matmul(self, name: str, x: np.ndarray, *, fine: bool = False) -> np.ndarray:
        if name.endswith(WIDE):
            self.kept[name] = np.array(x, np.float32)
        return super().matmul(name, x, fine=fine)


def matrices(path: Path, format_name: str | None) -> dict[str, np.ndarray]:
    """Values of the wide ones that have the format; None: of all."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        for t in gguf.GGUFReader(path).tensors
        if t.name.endswith(WIDE) and (format_name is None or t.tensor_type.name == format_name)
    }


def errors(
    path: Path, format_name: str, source: dict[str, np.ndarray], inputs: dict[str, np.ndarray]
) -> tuple[float, float, int]:
    """Relative error of weights, and of products, over all matrices of the format; their number."""
    sums = np.zeros(4)
    found = matrices(path, format_name)
    for name, values in found.items():
        off, x = values - source[name], inputs[name].T
        sums += [
            (a.astype(np.float64) ** 2).sum()
            for a in (off, source[name], off @ x, source[name] @ x)
        ]
    return math.sqrt(sums[0] / sums[1]), math.sqrt(sums[2] / sums[3]), len(found)


def compare(peer: str, source: Path, options: Any, results: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of quality."""
    folder = source.parent
    pairs: list[tuple[Path, Path]] = []
    narrow = [kind for kind in NARROW if kind.name in options.types]
    for kind in narrow:
        pairs.append((folder / f"{kind.name}.ours.gguf", folder / f"{kind.name}.theirs.gguf"))
        ours(source, pairs[-1][0], kind, options.threads)
        theirs(peer, source, pairs[-1][1], kind, options.threads)
    text = manual() + licence_text(None)
    with smallm.load(source, threads=options.threads) as model:
        tokens = model.tokenize(text, add_special=False)
    parts = runs(tokens, options.parts, options.windows * WINDOW)
    files = [path for pair in pairs for path in pair]
    found = divergences(source, files, parts, options) if files else np.empty(0)
    rows = []

    def add(kind: Type, n: int, what: str, values: list[float], ratio: str, sizes: Any) -> None:
        name = f"{kind.name} (on-grid)" if kind.name == ON_GRID else kind.name
        results["quality"][f"{kind.name}: {what}"] = values
        shown = " / ".join(sorted({f"{size / 1e6:.1f}" for size in sizes}))
        rows.append([name, str(n), what, *(f"{v:.5f}" for v in values), ratio, shown])

    for i, (kind, pair) in enumerate(zip(narrow, pairs, strict=True)):
        a, b = found[2 * i : 2 * i + 2]
        ratio, error = quotient(a, b)
        wanted = kind.format or kind.name.upper()
        n = [t.tensor_type.name for t in gguf.GGUFReader(pair[0]).tensors].count(wanted)
        sizes = [path.stat().st_size for path in pair]
        shown = f"{ratio:.3f} +- {error:.3f}"
        add(kind, n, "KL divergence", [float(a.mean()), float(b.mean())], shown, sizes)
        for path in pair:
            path.unlink()
    originals, passed = matrices(source, None), Inputs(source)
    passed.logits(parts[0][:N_INPUTS])
    for kind in [kind for kind in ALL_WIDE if kind.name in options.types]:
        both = [folder / "ours.gguf", folder / "theirs.gguf"]
        ours(source, both[0], kind, options.threads)
        theirs(peer, source, both[1], kind, options.threads)
        assert kind.format is not None
        wide = [errors(path, kind.format, originals, passed.kept) for path in both]
        for j, what in enumerate(("RMSE", "products' RMSE")):
            values = [w[j] for w in wide]
            block, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.format]]
            size = sum(x.size for x in originals.values()) / block * n_bytes
            add(kind, wide[0][2], what, values, f"{values[0] / values[1]:.3f}", [size])
        if wide[0][2] != wide[1][2]:
            sys.exit(f"{kind.name}: {wide[0][2]} and {wide[1][2]} matrices have the format")
    return rows


# ---- speed ---------------------------------------------------------------------------------------


def race(peer: str, name: str, source: Path, options: Any, results: dict[str, Any]) -> str:
    """The table of times."""
    rows, out = [], source.with_name("out.gguf")
    for kind in [kind for kind in [*NARROW, *ALL_WIDE] if kind.name in options.types]:
        mine, other = [], []
        for _ in range(options.repeats):
            mine.append(ours(source, out, kind, options.threads))
            other.append(theirs(peer, source, out, kind, options.threads))
        results["seconds"][kind.name] = [mine, other]
        quotients = spread(ratios(other, mine))
        rows.append([kind.name, f"{median(mine):.2f}", f"{median(other):.2f}", quotients])
        print(*rows[-1], file=sys.stderr, flush=True)
    return table(["", "smallm, s", f"{name}, s", "times as fast"], rows)


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0])
    add_model(parser)
    every = [kind.name for kind in [*NARROW, *ALL_WIDE]]
    parser.add_argument("--types", nargs="+", choices=every, default=every)
    parser.add_argument("--parts", type=int, default=24, help="of the text, 0: no quality")
    parser.add_argument("--windows", type=int, default=6, help="of 512 tokens in a part")
    parser.add_argument("--shuffled", action="store_true", help="with the channels permuted")
    parser.add_argument("--repeats", type=int, default=3, help="of each time")
    options = parser.parse_args()
    if len(options.peer) != 1:
        parser.error("one --peer is wanted")
    ((name, peer),) = options.peer
    results: dict[str, Any] = {"machine": machine(), "quality": {}, "seconds": {}}
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "f16.gguf"
        quantize(model_path(options.model), source, "f16", requantize=True, progress=False)
        if options.shuffled:
            shuffle(source)
        print(f"{results['machine']['cpu']}, {options.threads} threads")
        if options.parts:
            rows = compare(peer, source, options, results)
            head = ["", "tensors", "measure", "smallm", name, "ratio", "MB"]
            print(table(head, rows))
        if options.repeats:
            print(race(peer, name, source, options, results))
    write_json(options.json, results)


if __name__ == "__main__":
    main()
