"""Decode speed beside other busy processes, and what a loaded model costs while it does nothing.

    python benchmarks/busy.py --peer llama-cpp-python=ENV/bin/python

As many busy processes as the machine lets this one use cores.  Quiet and busy runs alternate.
The rows "reading" are the same for a program that only reads a buffer, a thread on each core, none
ever waiting for another: what the scheduler's share and the memory leave to anybody.  They are for
a buffer that any last-level cache holds and for one of the model's size.  Where that cache is
shared with other machines' work, a model that just fits loses its place while the busy processes
have their turns, and is then read at the speed of memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import limits
from common import (
    Engine,
    EngineError,
    Probes,
    add_model,
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

N_PROMPT, N_DECODE, IDLE_S = 16, 128, 5.0
CACHED = 16_000_000  # bytes


# Counts until it is killed, or its parent is.
COUNT = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""


@contextmanager
def busy(n: int) -> Iterator[None]:
    """n processes that only count, for as long as the block lasts."""
    processes = [subprocess.Popen([sys.executable, "-c", COUNT]) for _ in range(n)]
    try:
        time.sleep(0.3)  # until they count
        yield
    finally:
        for p in processes:
            p.kill()
        for p in processes:
            p.wait()


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0])
    add_model(parser)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    path = model_path(options.model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    n_busy = cores or 1
    results: dict[str, Any] = {
        "machine": machine(),
        "model": path,
        "threads": options.threads,
        "busy_processes": n_busy,
    }
    rows = []
    probes, n_vocab = Probes(), limits.read(path).n_vocab
    for size in (CACHED, os.path.getsize(path)):

        def reading(way: str, i: int, size: int = size) -> float:
            with busy(n_busy) if way == "busy" else nullcontext():
                return probes.ask("read", size, options.threads, 1.5)

        rates = alternate(["quiet", "busy"], options.repeats, reading)
        kept = ratios(rates["busy"], rates["quiet"])
        name = f"reading {size / 1e6:.0f} MB"
        results[name] = {**rates, "kept": kept}
        quiet, besides = (show(rates[way]) + " GB/s" for way in ("quiet", "busy"))
        rows.append([name, quiet, besides, spread(kept), "-"])
    for name, python in engines(options).items():
        with ExitStack() as stack:
            engine = stack.enter_context(Engine(name, python))
            ids = prompt(N_PROMPT, seed=1, n_vocab=n_vocab)

            def rate(way: str, i: int, engine: Engine = engine, ids: list[int] = ids) -> float:
                if way == "quiet":
                    return 1 / engine.ask("run", ids, N_DECODE)[1]
                with busy(n_busy):
                    return 1 / engine.ask("run", ids, N_DECODE)[1]

            try:
                engine.ask("load", path, options.threads, 1024, False)
                rates = alternate(["quiet", "busy"], options.repeats, rate)
                time.sleep(1)
                idle = engine.ask("idle", IDLE_S) / IDLE_S
            except EngineError as error:
                print(error, file=sys.stderr)
                continue
        kept = ratios(rates["busy"], rates["quiet"])
        results[name] = {**rates, "kept": kept, "idle_cpu_share": idle}
        rows.append(
            [
                name,
                show(rates["quiet"]) + " tok/s",
                show(rates["busy"]) + " tok/s",
                spread(kept),
                f"{100 * idle:.2f} %",
            ]
        )
    print(f"{results['machine']['cpu']}, {options.threads} threads, {n_busy} busy processes")
    print(table(["", "quiet", "busy", "kept", "CPU while idle"], rows))
    write_json(options.json, results)
    if "smallm" not in results:
        sys.exit(1)


if __name__ == "__main__":
    main()
