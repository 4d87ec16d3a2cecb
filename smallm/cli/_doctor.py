"""`smallm doctor`: facts about the machine, and a short self-test.  Never a download."""

from __future__ import annotations

import os
import platform
import sys
import time
from typing import Any

from .. import SmallmError, __version__, load
from .._binding import check, lib, new, text
from .._catalog import CATALOGUE, DEFAULT, cache_dir, find, is_remote

SECONDS = 2.0
# What the default model says first, greedily; any tier and thread count must agree.
QUESTION, ANSWER = "The capital of France is", " Paris"


def examine(model: str | None) -> tuple[dict[str, Any], bool]:
    """Findings by name, and whether everything that was tested works."""
    report: dict[str, Any] = {
        "smallm": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    cpu, error = new("cpu_info"), new("error")
    try:
        check(lib.smallm_cpu(cpu, error), error)
    except (SmallmError, ValueError) as problem:
        report["cpu"] = f"FAILED: {problem}"
        return report, False
    report["cpu"] = text(cpu.brand) or platform.machine()
    report["tiers"] = text(cpu.available)
    report["tier"] = text(cpu.isa) + (" (SMALLM_ISA)" if os.environ.get("SMALLM_ISA") else "")
    report["cores_usable"] = cpu.n_threads
    report["logical_processors"] = cpu.n_logical
    report["memory"] = f"{cpu.total_memory / 1e9:.1f} GB"
    available = _available()
    if available:
        report["memory_available"] = f"{available / 1e9:.1f} GB"
    report["cache"] = str(cache_dir())

    name = model or DEFAULT
    if model is not None and model not in CATALOGUE and not is_remote(model):
        path: str | None = model
    else:
        record = find(name)
        path = record.path if record else None
    if path is None:
        report["model"] = f"{name} is not in the cache: smallm pull {name}"
        report["self_test"] = "skipped: no model"
        return report, True
    report["model"] = path
    try:
        report["self_test"] = _test(path, is_default=name == DEFAULT)
    except (SmallmError, ValueError) as problem:
        report["self_test"] = f"FAILED: {problem}"
        return report, False
    return report, not str(report["self_test"]).startswith("FAILED")


def _test(path: str, is_default: bool) -> str:
    """Greedy decoding for two seconds, the same answer each time."""
    with load(path, ctx=256) as model:
        ids = model.tokenize(QUESTION) or [0]
        end = time.monotonic() + SECONDS
        first, n_tokens, seconds = "", 0, 0.0
        while True:
            answer = model.generate(ids, max_tokens=32, temperature=0)
            if first and answer.text != first:
                return f"FAILED: two runs differ: {first!r} and {answer.text!r}"
            first = answer.text
            n_tokens += answer.usage.completion_tokens
            if answer.timings.decode_tps:
                seconds += answer.usage.completion_tokens / answer.timings.decode_tps
            if time.monotonic() > end or not first:
                break
        if is_default and not first.startswith(ANSWER):
            return f"FAILED: {QUESTION!r} goes on {first!r} instead of {ANSWER!r}"
        speed = f", {n_tokens / seconds:.0f} tokens/s" if seconds else ""
        return f"passed (load {answer.timings.load_s:.2f} s{speed}, {model.info.threads} threads)"


def _available() -> int:
    """Bytes of memory that programs may still take; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
