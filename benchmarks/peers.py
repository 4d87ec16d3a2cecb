"""Prefill and decode speed, smallm beside llama-cpp-python in one run.

    python benchmarks/peers.py --peer-python ENV/bin/python

Both engines stay loaded and are asked in turn (a, b, a, b, ...), with the same file, prompts and
thread count; what is not asked sleeps.  The peer is timed without sampling, smallm with it.
A quotient is taken between neighbours in time and its median and range are shown.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

from common import (
    PEER,
    Engine,
    EngineError,
    alternate,
    arguments,
    engines,
    machine,
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


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    path = model_path(options.model)
    results: dict[str, Any] = {"machine": machine(), "model": path, "threads": options.threads}
    with ExitStack() as stack:
        running: dict[str, Engine] = {}
        for name, python in engines(options).items():
            engine = stack.enter_context(Engine(name, python))
            try:
                results[name] = engine.ask("load", path, options.threads, 1024, False)
                running[name] = engine
            except EngineError as error:
                print(error, file=sys.stderr)
        if "smallm" not in running:
            sys.exit(1)
        measure(running, options.repeats, results)
    report(results)
    write_json(options.json, results)


def measure(running: dict[str, Engine], repeats: int, results: dict[str, Any]) -> None:
    """Rates in tokens per second, one list per engine and row, in the order they were taken."""
    names = list(running)
    decode_ids = prompt(N_PREFILL, seed=10**6)

    def prefill(name: str, i: int) -> float:
        return N_PREFILL / running[name].ask("prefill", prompt(N_PREFILL, seed=i))

    def decode(name: str, i: int) -> float:
        return 1 / running[name].ask("decode", decode_ids, N_DECODE)

    results["prefill"] = alternate(names, repeats, prefill)
    results["decode"] = alternate(names, repeats, decode)

    # Five sequences in one batch, and the same five one after the other.
    ways = {"together": "smallm", "apart": "smallm"}
    if PEER in running:
        ways[f"{PEER} apart"] = PEER

    def five(n_answer: int) -> dict[str, list[float]]:
        def rate(way: str, i: int) -> float:
            seeds = (10**7 + 100 * i + 10 * len(way) + j for j in range(N_SEQUENCES))
            prompts = [prompt(N_SHORT, seed) for seed in seeds]
            seconds = running[ways[way]].ask(way.split()[-1], prompts, n_answer)
            return N_SEQUENCES * (N_SHORT + n_answer) / seconds

        return alternate(list(ways), repeats, rate)

    results["five_prefill"] = five(1)
    results["five_generate"] = five(N_ANSWER)


def report(results: dict[str, Any]) -> None:
    print(f"{results['machine']['cpu']}, {results['threads']} threads; tokens per second")
    for name in ("smallm", PEER):
        if name in results:
            print(f"{name} {results[name]['version']}: {results[name]['isa']}")
    rows = []
    for key, label in (
        ("prefill", f"prefill of {N_PREFILL}"),
        ("decode", f"decode of {N_DECODE} after {N_PREFILL}"),
    ):
        ours, theirs = results[key]["smallm"], results[key].get(PEER, [])
        quotient = ratios(ours, theirs)
        results[f"{key}_ratio"] = quotient
        rows.append([label, show(ours), show(theirs), spread(quotient)])
    print(table(["", "smallm", PEER, "times"], rows), end="\n\n")

    rows = []
    for key, label in (
        ("five_prefill", f"{N_SEQUENCES} prompts of {N_SHORT}, 1 token each"),
        ("five_generate", f"{N_SEQUENCES} prompts of {N_SHORT}, {N_ANSWER} tokens each"),
    ):
        together, apart = results[key]["together"], results[key]["apart"]
        quotient = ratios(together, apart)
        results[f"{key}_ratio"] = quotient
        peer = results[key].get(f"{PEER} apart", [])
        rows.append([label, show(together), show(apart), show(peer), spread(quotient)])
    print(table(["", "together", "apart", f"{PEER} apart", "together / apart"], rows))


if __name__ == "__main__":
    main()
