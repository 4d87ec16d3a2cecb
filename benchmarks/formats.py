"""Every weight format's share of the machine's limits, on the best tier and on lesser ones.

    python benchmarks/formats.py

For each format a file of random weights is written (scripts/random_model.py: by default two layers
of a 1B model, a small vocabulary), timed as in peers.py, and removed.

    python benchmarks/formats.py --best --limit avx512vnni --write

measures the best tier alone and puts the shares into formats.json and README's table, unless the
run is to be discarded; with --types those of other formats stay as they are.

    python benchmarks/formats.py --best --peer llama-cpp-python=ENV/bin/python

runs other engines beside it, in the same rounds.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import limits
from common import (
    HERE,
    PEERS,
    Engine,
    EngineError,
    Probes,
    arguments,
    machine,
    median,
    ratios,
    show,
    table,
    write_json,
)
from peers import LIMIT, N_DECODE, N_PREFILL, add_limit, judge, measure_speed, percent

sys.path.insert(0, str(HERE.parent / "scripts"))
sys.path.insert(0, str(HERE.parent / "tests"))
import random_model
import weight_formats

TYPES = [row.name.lower() for row in weight_formats.rows()]
TYPES = [name for name in TYPES if name in random_model.TYPES]
KEYS = ("prefill", "decode")
ISAS = ("avx512vnni", "avxvnni", "avx2")  # besides the best


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--types", nargs="+", choices=random_model.TYPES, default=TYPES)
    parser.add_argument("--shape", choices=random_model.SHAPES, default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    add_limit(parser)
    parser.add_argument("--best", action="store_true", help="on the best tier only")
    parser.add_argument(
        "--write", action="store_true", help="write formats.json and README's table"
    )
    options = parser.parse_args()
    shape = random_model.SHAPES[options.shape]
    shape = replace(shape, n_layer=options.layers, n_vocab=options.vocab)
    results: dict[str, Any] = {"machine": machine(), "threads": options.threads, "formats": {}}
    probes = Probes()
    faults = []
    head = ["", "tier", "MB/token", "prefill", "of the limit", "decode", "of the limit"]
    if options.peer:
        head.append("prefill, decode / it")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        for type_name in options.types:
            random_model.write(path, shape, type_name, options.shape)
            work = limits.read(str(path))
            found = measure_format(str(path), work, probes, options)
            found["packed_bits"] = packed_bits(path, shape, type_name, options)
            results["formats"][type_name] = found
            found_faults = judge(
                found["speed"], options.limit or found["tiers"]["smallm"], work, options
            )
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
    if options.write and not faults:
        write_shares(results, options)
    sys.exit(1 if faults else 0)


def measure_format(path: str, work: limits.Work, probes: Probes, options: Any) -> dict[str, Any]:
    """{"tiers": {engine: tier}, "speed": of peers.measure_speed()}; the engines: smallm as it is,
    as it would be on CPUs with less, and the peers that load the file."""
    running: dict[str, Engine] = {}
    tiers: dict[str, str] = {}
    with ExitStack() as stack:
        for isa in (None, *(() if options.best else ISAS)):
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
        for name, python in options.peer:
            engine = stack.enter_context(Engine(name, python))
            try:
                engine.ask("load", path, options.threads, 1024, False)
                running[name] = engine
            except EngineError as error:
                print(error, file=sys.stderr)
        limit = {"smallm": options.limit} if options.limit else {}
        speed = measure_speed(running, tiers | limit, work, probes, N_PREFILL, options)
    return {"work": vars(work), "tiers": tiers, "speed": speed}


def packed_bits(path: Path, shape: Any, type_name: str, options: Any) -> float:
    """Bits of a weight in memory: of what one layer more takes.  Writes the file anew."""
    import smallm

    sizes = []
    for n in (shape.n_layer, shape.n_layer + 1):
        random_model.write(path, replace(shape, n_layer=n), type_name, options.shape)
        with smallm.load(path, threads=options.threads) as model:
            sizes.append((model.info.bytes, model.info.parameters))
    (bytes_less, less), (bytes_more, more) = sizes
    return 8 * (bytes_more - bytes_less) / (more - less)


def write_shares(results: dict[str, Any], options: Any) -> None:
    """formats.json and README; what another machine or shape gave is dropped."""
    tiers = {found["tiers"]["smallm"] for found in results["formats"].values()}
    setting = {
        "cpu": results["machine"]["cpu"],
        "isa": ", ".join(sorted(tiers)),
        "limit": options.limit or "of the tier",
        "threads": options.threads,
        "shape": f"{options.layers} layers of {options.shape}",
    }
    known = weight_formats.measured()
    formats = known["formats"] if {k: known.get(k) for k in setting} == setting else {}
    for type_name, found in results["formats"].items():
        speed = found["speed"]
        shares = {k: median(ratios(speed[k]["smallm"], speed[k][LIMIT])) for k in KEYS}
        formats[type_name] = {"packed_bits": found["packed_bits"], **shares}
        formats[type_name] = {k: round(v, 4) for k, v in formats[type_name].items()}
    text = json.dumps(setting | {"formats": formats}, indent=2)
    weight_formats.MEASURED.write_text(text + "\n", encoding="utf-8")
    weight_formats.write()


def format_rows(type_name: str, work: limits.Work, found: dict[str, Any]) -> list[list[str]]:
    rows = []
    peers = [name for name in PEERS if name in found["speed"]["prefill"]]
    for name in (*found["tiers"], *peers):
        tier = found["tiers"].get(name, name)
        cells = [type_name, tier, f"{work.weight_bytes / 1e6:.1f}"]
        for key in KEYS:
            rates = found["speed"][key]
            own = f"{LIMIT} of {name}"
            limit = rates.get(own if own in rates else LIMIT, [])
            cells += [show(rates[name]), percent(rates[name], limit)]
        if peers:
            best = (found["speed"][key] for key in KEYS)
            quotients = [show(ratios(rates["smallm"], rates[name]), 2) for rates in best]
            cells.append("" if name == "smallm" else ", ".join(quotients))
        rows.append(cells)
    return rows


if __name__ == "__main__":
    main()
