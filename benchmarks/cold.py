"""Cold start: import, load, first token; and peak memory, beside other engines.

    python benchmarks/cold.py --peer llama-cpp-python=ENV/bin/python

Every measurement is a new process.  Times are taken inside it, from just before the import;
the file is in the page cache.  Run it from a plain virtual environment.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

from common import (
    EngineError,
    add_model,
    alternate,
    arguments,
    engines,
    machine,
    model_path,
    ratios,
    show,
    spread,
    table,
    write_json,
)

IMPORT = "import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"

# Peak resident memory of this process image: ru_maxrss would count the parent's.
PEAK = """
import json
seconds = time.perf_counter() - start
peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(json.dumps([seconds, peak / 1024]))
"""

MODULES = {
    "smallm": "smallm",
    "llama-cpp-python": "llama_cpp",
    "ik-llama-cpp-python": "ik_llama_cpp",
    "openvino-genai": "openvino_genai",
}
FIRST_TOKEN = {
    "smallm": """
import sys, time
start = time.perf_counter()
import smallm
model = smallm.load(sys.argv[1], threads=int(sys.argv[2]))
model.generate("The capital of France is", max_tokens=1, temperature=0)
"""
    + PEAK,
    "llama-cpp-python": """
import sys, time
start = time.perf_counter()
import llama_cpp
n = int(sys.argv[2])
model = llama_cpp.Llama(sys.argv[1], n_threads=n, n_threads_batch=n, flash_attn=True,
                        verbose=False)
model.create_completion("The capital of France is", max_tokens=1, temperature=0)
"""
    + PEAK,
    "ik-llama-cpp-python": """
import sys, time
start = time.perf_counter()
import ik_llama_cpp
model = ik_llama_cpp.IkLlama(sys.argv[1], n_threads=int(sys.argv[2]), n_ctx=512, verbose=False)
model.generate(model.tokenize("The capital of France is"), max_tokens=1, temperature=0)
"""
    + PEAK,
    "openvino-genai": """
import sys, time
start = time.perf_counter()
import openvino_genai
model = openvino_genai.LLMPipeline(sys.argv[1], "CPU", INFERENCE_NUM_THREADS=int(sys.argv[2]))
model.generate("The capital of France is", max_new_tokens=1)
"""
    + PEAK,
}


def run(python: str, code: str, *argv: str) -> str:
    # Not from the checkout, whose source folder would hide the installed package.
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-c", code, *argv]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode != 0:
        raise EngineError(f"{python} ended with status {done.returncode}: {done.stderr[-600:]}")
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0])
    add_model(parser)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    path = model_path(options.model)
    pythons = engines(options)
    results: dict[str, Any] = {"machine": machine(), "model": path, "threads": options.threads}

    def import_time(name: str, i: int) -> float:
        return 1000 * float(run(pythons[name], IMPORT.format(module=MODULES[name])))

    peaks: dict[str, list[float]] = {name: [] for name in pythons}

    def first_token(name: str, i: int) -> float:
        seconds, peak = json.loads(
            run(pythons[name], FIRST_TOKEN[name], path, str(options.threads))
        )
        peaks[name].append(peak)
        return seconds

    names = list(pythons)
    results["import_ms"] = alternate(names, options.repeats, import_time)
    results["first_token_s"] = alternate(names, options.repeats, first_token)
    results["peak_mb"] = peaks

    print(
        f"{results['machine']['cpu']}, {options.threads} threads, {options.repeats} processes each"
    )
    rows = []
    for key, label in (
        ("import_ms", "import (ms)"),
        ("first_token_s", "import, load, first token (s)"),
        ("peak_mb", "peak memory (MB)"),
    ):
        for name, values in results[key].items():
            quotient = "" if name == "smallm" else spread(ratios(results[key]["smallm"], values))
            rows.append([label, name, show(values, 3), quotient])
    print(table(["", "engine", "median", "smallm / it"], rows))
    write_json(options.json, results)
    if not results["first_token_s"]["smallm"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
