"""Every weight format's share of the machine's limits, on the best tier and on lesser ones.

    python benchmarks/formats.py

For each format a file of random weights is written (scripts/random_model.py: by default two layers
of a 1B model, a small vocabulary), timed as in peers.py, and removed.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import limits
from common import HERE, Engine, EngineError, Probes, arguments, machine, show, table, write_json
from peers import LIMIT, N_DECODE, N_PREFILL, judge, measure_speed, percent

sys.path.insert(0, str(HERE.parent / "scripts"))
import random_model

INTEGER = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
TYPES = [*INTEGER, "f16", "bf16", "f32"]
ISAS = ("avx512vnni", "avxvnni", "avx2")  # besides the best


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0], peers=False)
    parser.add_argument("--types", nargs="+", choices=random_model.TYPES, default=TYPES)
    parser.add_argument("--shape", choices=random_model.SHAPES, default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    shape = random_model.SHAPES[options.shape]
    shape = replace(shape, n_layer=options.layers, n_vocab=options.vocab)
    results: dict[str, Any] = {"machine": machine(), "threads": options.threads, "formats": {}}
    probes = Probes()
    faults = []
    head = ["", "tier", "MB/token", "prefill", "of the limit", "decode", "of the limit"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        for type_name in options.types:
            random_model.write(path, shape, type_name, options.shape)
            work = limits.read(str(path))
            found = measure_format(str(path), work, probes, options)
            results["formats"][type_name] = found
            found_faults = judge(found["speed"], found["tiers"]["smallm"], work, options)
            faults += [f"{type_name}: {fault}" for fault in found_faults]
            new = format_rows(type_name, work, found)
            print(table(head, new), file=sys.stderr, flush=True)  # all of it takes a while
            rows += new
    print(
        f"{results['machine']['cpu']}, {options.threads} threads; {options.layers} layers of "
        f"{options.shape}, {options.vocab} tokens; prefill of {N_PREFILL}, decode of {N_DECODE}"
    )
    print(table(head, rows))
    for fault in faults:
        print(f"DISCARD THIS RUN: {fault}")
    results["discard"] = faults
    write_json(options.json, results)
    sys.exit(1 if faults else 0)


def measure_format(path: str, work: limits.Work, probes: Probes, options: Any) -> dict[str, Any]:
    """{"tiers": {engine: tier}, "speed": of peers.measure_speed()}; the engines: smallm as it is,
    and as it would be on CPUs with less."""
    running: dict[str, Engine] = {}
    tiers: dict[str, str] = {}
    with ExitStack() as stack:
        for isa in (None, *ISAS):
            environment = {"SMALLM_ISA": isa} if isa else {}
            engine = stack.enter_context(Engine("smallm", sys.executable, environment))
            try:
                tier = engine.ask("load", path, options.threads, 1024, False)["isa"]
            except EngineError:
                if isa is None:
                    raise
                continue  # this CPU lacks it
            if tier not in tiers.values():
                name = isa or "smallm"
                running[name], tiers[name] = engine, tier
        speed = measure_speed(running, tiers, work, probes, N_PREFILL, options)
    return {"work": vars(work), "tiers": tiers, "speed": speed}


def format_rows(type_name: str, work: limits.Work, found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, tier in found["tiers"].items():
        cells = [type_name, tier, f"{work.weight_bytes / 1e6:.1f}"]
        for key in ("prefill", "decode"):
            rates = found["speed"][key]
            limit = rates.get(LIMIT if name == "smallm" else f"{LIMIT} of {name}", [])
            cells += [show(rates[name]), percent(rates[name], limit)]
        rows.append(cells)
    return rows


if __name__ == "__main__":
    main()
