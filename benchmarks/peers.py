"""Prefill and decode speed beside the machine's limits and beside other engines, in one run.

    python benchmarks/peers.py MODEL.gguf --peer llama-cpp-python=ENV/bin/python

The engines stay loaded and are asked in turn (a, b, a, b, ...), with the same files, prompts and
thread count; what is not asked sleeps.  The machine itself is one of them: in each round probes.c
measures what limits.py makes the limit of.  Peers are timed without sampling, smallm with it.
Quotients are taken between neighbours in time; their medians and ranges are shown.

The exit code is 1 where nothing was measured, or where the run says that it is to be discarded:
the machine was not quiet.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import limits
from common import (
    PEERS,
    Engine,
    EngineError,
    Probes,
    alternate,
    arguments,
    engines,
    machine,
    median,
    model_path,
    prompt,
    ratios,
    show,
    spread,
    table,
    write_json,
)

N_PREFILL, N_DECODE = 512, 128
N_SEQUENCES, N_SHORT, N_ANSWER = 5, 32, 32
N_BATCH = 8
LIMIT = "limit"  # beside the names of the engines

# Share of this tier's limit that peers reach on a quiet two-core machine with it, of 512 tokens
# and of the 128 after them, in the order of PEERS, by (architecture, layers, width, formats) of
# the file.
USUAL_TIER = "avx512vnni"
USUAL = {
    ("llama", 30, 576, "Q4_1"): ((0.045, 0.27), (0.169, 0.27), (0.131, 0.21)),
    ("llama", 16, 2048, "Q4_0"): ((0.148, 0.43), (0.232, 0.52), (0.158, 0.33)),
    ("llama", 16, 2048, "Q4_K_M"): ((0.186, 0.48), (0.195, 0.54)),
    ("llama", 16, 2048, "Q8_0"): ((0.108, 0.54), (0.247, 0.71)),
    ("qwen2", 24, 896, "Q4_K_M"): ((0.094, 0.42), (0.175, 0.52)),
    ("phi2", 24, 2048, "Q4_K_M"): ((0.173, 0.49), (0.180, 0.54)),
}


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL.gguf", help="default: smallm's default")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--depth",
        type=int,
        help=f"also a prompt of so many tokens less {N_DECODE + 1}, and the {N_DECODE} after it",
    )
    parser.add_argument(
        "--kv",
        choices=("f16", "f32", "q8"),
        default="f16",
        help="type of smallm's KV cache, whose bytes the limit counts; the peers' is float16",
    )
    add_limit(parser)
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "threads": options.threads, "models": []}
    print(f"{results['machine']['cpu']}, {options.threads} threads; tokens per second")
    probes = Probes()
    faults: list[str] = []
    for i, given in enumerate(options.models or [None]):
        with ExitStack() as stack:
            path = model_path(given)
            work = limits.read(path, options.kv)
            ctx = max(1024, options.depth or 0)
            found: dict[str, Any] = {"model": path, "work": vars(work)}
            results["models"].append(found)
            running = load(stack, path, ctx, found, options)
            print(f"\n{Path(path).name}: {work.weight_bytes / 1e6:.1f} MB read per token")
            if "smallm" not in running:
                sys.exit(1)
            for name in running:
                print("  {} {version}: {isa}; {settings}".format(name, **found[name]))
            depths = [N_PREFILL]
            if options.depth:
                depths.append(options.depth - N_DECODE - 1)
            found["speed"] = []
            tier = options.limit or found["smallm"]["isa"]
            for n in depths:
                speed = measure_speed(running, {"smallm": tier}, work, probes, n, options)
                found["speed"].append(speed)
                report_speed(speed)
                found_faults = judge(speed, tier, work, options)
                faults += [f"{Path(path).name}: {fault}" for fault in found_faults]
            if i == 0:
                found["together"] = measure_together(running, work.n_vocab, options.repeats)
                report_together(found["together"])
        write_json(options.json, results)
    for fault in faults:
        print(f"DISCARD THIS RUN: {fault}")
    results["discard"] = faults
    write_json(options.json, results)
    sys.exit(1 if faults else 0)


def add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit",
        choices=limits.TIERS,
        help="whose arithmetic peak is the limit (default: that of the tier that smallm runs on)",
    )


def load(
    stack: ExitStack, path: str, ctx: int, found: dict[str, Any], options: Any
) -> dict[str, Engine]:
    """Starts the engines; one that cannot load the file is left out with a line on stderr."""
    running = {}
    for name, python in engines(options).items():
        own = [options.kv] if name == "smallm" else []
        engine = stack.enter_context(Engine(name, python))
        try:
            found[name] = engine.ask("load", path, options.threads, ctx, False, *own)
            running[name] = engine
        except EngineError as error:
            print(error, file=sys.stderr)
    return running


# ---- one sequence --------------------------------------------------------------------------------


def measure_speed(
    running: Mapping[str, Engine],
    tiers: Mapping[str, str],
    work: limits.Work,
    probes: Probes,
    n: int,
    options: Any,
) -> dict[str, Any]:
    """Tokens per second of a prompt of n tokens and of the N_DECODE after it: {"prefill" or
    "decode": {engine or limit: [rate per round]}}, and the "peaks" of every round.

    tiers: engine -> tier of its kernels; each has a limit of its own, named "limit" for smallm's,
    "limit of ENGINE" for another's.  Peers are put beside smallm's.
    """
    peaks: dict[str, list[limits.Peaks]] = {}
    n_bytes = work.decode_bytes(n + N_DECODE / 2)
    limit_of = {
        LIMIT if engine == "smallm" else f"{LIMIT} of {engine}": tier
        for engine, tier in tiers.items()
        if tier in limits.TIERS
    }

    def rates(name: str, i: int) -> tuple[float, float]:
        if name in limit_of:
            peak = limits.measure(probes, limit_of[name], options.threads, n_bytes)
            if i > 0:
                peaks.setdefault(name, []).append(peak)
            return n / work.prefill_seconds(n, peak.int8, peak.f32), peak.read / n_bytes
        ids = prompt(n, seed=n + i, n_vocab=work.n_vocab)
        prefill, decode = running[name].ask("run", ids, N_DECODE)
        return n / prefill, 1 / decode

    # Deep prompts take long; the engines are warm by then.
    warm_up = n == N_PREFILL
    both = alternate([*running, *limit_of], options.repeats, rates, warm_up)
    return {
        "n": n,
        "prefill": {name: [x[0] for x in pairs] for name, pairs in both.items()},
        "decode": {name: [x[1] for x in pairs] for name, pairs in both.items()},
        "tiers": limit_of,
        "peaks": {name: [p._asdict() for p in taken] for name, taken in peaks.items()},
    }


def report_speed(speed: dict[str, Any]) -> None:
    rows = []
    for key, label in (
        ("prefill", f"prefill of {speed['n']}"),
        ("decode", f"decode of {N_DECODE} after {speed['n']}"),
    ):
        rates = speed[key]
        limit = rates.get(LIMIT, [])
        if limit:
            rows.append([label, LIMIT, show(limit), "", ""])
        for name, values in rates.items():
            if name == LIMIT:
                continue
            quotient = "" if name == "smallm" else spread(ratios(rates["smallm"], values))
            rows.append([label, name, show(values), percent(values, limit), quotient])
    print(table(["", "engine", "tokens/s", "of the limit", "smallm / it"], rows))
    for name, taken in speed["peaks"].items():
        each = {key: median([p[key] for p in taken]) / 1e9 for key in limits.Peaks._fields}
        print(
            f"  {name}, {speed['tiers'][name]}: "
            "int8 {int8:.0f} Gop/s (one thread {int8_one:.0f}), float32 {f32:.0f} GFLOP/s, "
            "reading {read:.1f} GB/s".format(**each)
        )


def percent(values: list[float], limit: list[float]) -> str:
    return f"{100 * median(ratios(values, limit)):.1f} %" if values and limit else "-"


def judge(speed: dict[str, Any], tier: str, work: limits.Work, options: Any) -> list[str]:
    """Why the machine was too busy to believe these figures; tier: smallm's limit's."""
    faults = []
    for name, taken in speed["peaks"].items():
        gain = median([p["int8"] / p["int8_one"] for p in taken])
        if gain < 0.95 * options.threads:
            faults.append(
                f"the int8 peak of {options.threads} threads is {gain:.2f} times that of one "
                f"({speed['tiers'][name]})"
            )
    usual = USUAL.get((work.arch, work.n_layer, work.n_embd, work.type))
    if usual and tier == USUAL_TIER and options.threads == 2 and speed["n"] == N_PREFILL:
        for name, shares in zip(PEERS, usual, strict=False):
            for key, share in zip(("prefill", "decode"), shares, strict=True):
                reached = median(ratios(speed[key].get(name, []), speed[key].get(LIMIT, [])))
                if not math.isnan(reached) and reached < 0.8 * share:
                    faults.append(
                        f"{name} reaches {100 * reached:.1f} % of the limit in {key}, "
                        f"usually {100 * share:.1f} %"
                    )
    return faults


# ---- several sequences ---------------------------------------------------------------------------


def measure_together(
    running: Mapping[str, Engine], n_vocab: int, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second, of all sequences together."""
    # Five sequences in one batch, and the same five one after the other.
    ways = {"together": "smallm", "apart": "smallm"}
    ways.update({f"{name} apart": name for name in running if name != "smallm"})

    def prompts(n: int, seed: int) -> list[list[int]]:
        return [prompt(N_SHORT, 10**7 + 1000 * seed + j, n_vocab) for j in range(n)]

    def five(n_answer: int) -> dict[str, list[float]]:
        def rate(way: str, i: int) -> float:
            ids = prompts(N_SEQUENCES, 10 * i + list(ways).index(way))
            seconds = running[ways[way]].ask(way.split()[-1], ids, n_answer)
            return N_SEQUENCES * (N_SHORT + n_answer) / seconds

        return alternate(list(ways), repeats, rate)

    # Decoding alone: what N_DECODE tokens add to the time of a prompt and its first token.
    def decode(way: str, i: int) -> float:
        n, engine = int(way), running["smallm"]
        first = engine.ask("together", prompts(n, 10**5 + 20 * i + n), 1)
        whole = engine.ask("together", prompts(n, 2 * 10**5 + 20 * i + n), 1 + N_DECODE)
        return n * N_DECODE / (whole - first)

    return {
        "prefill": five(1),
        "generate": five(N_ANSWER),
        "decode": alternate([str(N_BATCH), "1"], repeats, decode),
    }


def report_together(results: dict[str, dict[str, list[float]]]) -> None:
    rows = []
    for key, label in (
        ("prefill", f"{N_SEQUENCES} prompts of {N_SHORT}, 1 token each"),
        ("generate", f"{N_SEQUENCES} prompts of {N_SHORT}, {N_ANSWER} tokens each"),
    ):
        together = results[key]["together"]
        rows.append([label, "smallm, together", show(together), ""])
        for way, values in results[key].items():
            if way != "together":
                name = "smallm, apart" if way == "apart" else way.replace(" apart", ", apart")
                rows.append([label, name, show(values), spread(ratios(together, values))])
    one, many = results["decode"]["1"], results["decode"][str(N_BATCH)]
    label = f"decode of {N_DECODE} after {N_SHORT}"
    rows.append([label, f"smallm, {N_BATCH} sequences", show(many), ""])
    rows.append([label, "smallm, 1 sequence", show(one), spread(ratios(many, one))])
    print(table(["", "", "tokens/s in all", "together / it"], rows))


if __name__ == "__main__":
    main()
