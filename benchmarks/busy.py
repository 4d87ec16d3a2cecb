"""Decode speed beside other busy processes, and what a loaded model costs while it does nothing.

    python benchmarks/busy.py --peer llama-cpp-python=ENV/bin/python --loops build/loops

As many busy processes as the machine lets this one use cores.  Quiet and busy runs alternate.
The rows "reading" are the same for a program that only reads a buffer, a thread on each core, none
ever waiting for another: what the scheduler's share and the memory leave to anybody.  They are for
a buffer that any last-level cache holds and for one of the model's size.  Where that cache is
shared with other machines' work, a model that just fits loses its place while the busy processes
have their turns, and is then read at the speed of memory.  The row "loops alone" (loops.c, built as
profile.py says) are a token's inner loops on the model's own weights with nothing between them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import limits
from common import (
    Engine,
    EngineError,
    Probes,
    add_loops,
    add_model,
    alternate,
    arguments,
    engines,
    loops_alone,
    machine,
    model_path,
    prompt,
    ratios,
    show,
    spread,
    table,
    write_json,
)

N_PROMPT, N_DECODE, N_LOOPS, IDLE_S = 16, 128, 400, 5.0
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
    add_loops(parser)
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

    def measure(name: str, unit: str, rate: Callable[[], float]) -> dict[str, Any]:
        """Adds the row of what `rate` gives on a quiet machine and on a busy one."""

        def one(way: str, i: int) -> float:
            with busy(n_busy) if way == "busy" else nullcontext():
                return rate()

        rates = alternate(["quiet", "busy"], options.repeats, one)
        kept = ratios(rates["busy"], rates["quiet"])
        quiet, besides = (f"{show(rates[way])} {unit}" for way in ("quiet", "busy"))
        rows.append([name, quiet, besides, spread(kept), "-"])
        results[name] = {**rates, "kept": kept}
        return results[name]

    probes, n_vocab = Probes(), limits.read(path).n_vocab
    for size in (CACHED, os.path.getsize(path)):
        ask = partial(probes.ask, "read", size, options.threads, 1.5)
        measure(f"reading {size / 1e6:.0f} MB", "GB/s", ask)
    if options.loops:
        position = N_PROMPT + N_DECODE // 2
        a_pass = (options.loops, path, options.threads, 1, 1, position, N_LOOPS)
        measure("loops alone", "tok/s", lambda: 1 / loops_alone(*a_pass)["mean"])
    for name, python in engines(options).items():
        with ExitStack() as stack:
            engine = stack.enter_context(Engine(name, python))
            ids = prompt(N_PROMPT, seed=1, n_vocab=n_vocab)
            run = partial(engine.ask, "run", ids, N_DECODE)
            try:
                engine.ask("load", path, options.threads, 1024, False)
                result = measure(name, "tok/s", lambda run=run: 1 / run()[1])
                time.sleep(1)
                result["idle_cpu_share"] = engine.ask("idle", IDLE_S) / IDLE_S
                rows[-1][-1] = f"{100 * result['idle_cpu_share']:.2f} %"
            except EngineError as error:
                print(error, file=sys.stderr)
    print(f"{results['machine']['cpu']}, {options.threads} threads, {n_busy} busy processes")
    print(table(["", "quiet", "busy", "kept", "CPU while idle"], rows))
    write_json(options.json, results)
    if "smallm" not in results:
        sys.exit(1)


if __name__ == "__main__":
    main()
