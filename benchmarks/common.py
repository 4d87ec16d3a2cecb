"""What the benchmarks share: engines in processes of their own, alternating runs, tables, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
PEERS = ("llama-cpp-python", "ik-llama-cpp-python", "openvino-genai")  # that worker.py knows


class EngineError(RuntimeError):
    """An engine refused a request, or its process ended."""


class Engine:
    """An engine in a child process, with `environment` added to this one's: a crash is an
    EngineError here."""

    def __init__(
        self, name: str, python: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [python, str(HERE / "worker.py"), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def ask(self, do: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, "with": arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            self.log.seek(0)
            tail = self.log.read()[-600:].strip()
            raise EngineError(f"{self.name} ended with status {status} in {do}: {tail}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return answer["ok"]

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def peer(text: str) -> tuple[str, str]:
    """ "NAME=PYTHON" of the option --peer."""
    name, _, python = text.partition("=")
    if name not in PEERS or not python:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PYTHON, NAME of {PEERS}")
    return name, python


def arguments(description: str, peers: bool = True) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=2)
    if peers:
        parser.add_argument(
            "--peer",
            type=peer,
            action="append",
            default=[],
            metavar="NAME=PYTHON",
            help="another engine and the interpreter of an environment that holds it; "
            f"may be repeated; NAME: {', '.join(PEERS)}",
        )
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="GGUF file (default: smallm's default model)")


def model_path(given: str | None) -> str:
    if given is not None:
        return str(Path(given).resolve())
    import smallm

    with smallm.load() as model:  # fetches it where it is not there yet
        return str(model.info.path)


def add_loops(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loops", help="the program loops, built from loops.c")


def loops_alone(
    program: str, model: str, threads: int, sequences: int, tokens: int, position: int, rounds: int
) -> dict[str, float]:
    """What loops.c measures of a pass of sequences x tokens new tokens, in seconds a token."""
    words = [program, model, threads, sequences, tokens, position, rounds]
    out = subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True).stdout
    return {k: v / (sequences * tokens) for k, v in json.loads(out).items()}


def engines(options: argparse.Namespace) -> dict[str, str]:
    """Names of the engines to run -> their interpreters."""
    return {"smallm": sys.executable, **dict(options.peer)}


def prompt(n: int, seed: int, n_vocab: int) -> list[int]:
    """n token ids that every engine gets alike; another seed is another prompt from its start on,
    so that no engine can answer from a cache of an earlier one.  A vocabulary's first and last
    ids are left out: there are its control tokens."""
    source = random.Random(seed)
    edge = n_vocab // 40
    return [source.randrange(edge, n_vocab - edge) for _ in range(n)]


def alternate(
    names: Sequence[str],
    repeats: int,
    measure: Callable[[str, int], T],
    warm_up: bool = True,
) -> dict[str, list[T]]:
    """measure(name, round) for a, b, a, b, ...; a name whose measurement fails drops out with a
    line on stderr.  A first round, 0, warms up and is not kept."""
    results: dict[str, list[T]] = {name: [] for name in names}
    running = list(names)
    for i in range(0 if warm_up else 1, repeats + 1):
        for name in list(running):
            try:
                value = measure(name, i)
            except EngineError as error:
                print(f"  {error}", file=sys.stderr)
                running.remove(name)
                results[name] = []
                continue
            if i > 0:
                results[name].append(value)
    return results


class Probes:
    """What the machine can do at all (probes.c, compiled for this run by the C compiler)."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.program = str(Path(self.folder.name) / "probes")
        compiler = os.environ.get("CC", "cc").split()
        source = str(HERE / "probes.c")
        subprocess.run([*compiler, "-O2", "-pthread", source, "-o", self.program], check=True)

    def ask(self, what: str, size_or_tier: int | str, threads: int, seconds: float) -> float:
        """read: GB/s; int8 and f32: 1e9 operations a second, multiply and add counted apart."""
        words = [self.program, what, str(size_or_tier), str(threads), str(seconds)]
        return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a / b pair by pair: neighbours in time, so that a drift of the machine cancels."""
    return [x / y for x, y in zip(a, b, strict=False)]


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def show(values: Sequence[float], digits: int = 1) -> str:
    """The median, or "-" where nothing was measured."""
    return f"{median(values):.{digits}f}" if values else "-"


def spread(values: Sequence[float]) -> str:
    """ "1.52 (1.49 to 1.57)": median and range."""
    if not values:
        return "-"
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the software."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {
        "cpu": name,
        "logical_cpus": os.cpu_count(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first to the left."""
    lines = [list(head), *(list(r) for r in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    out = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        out.append("  ".join(cells).rstrip())
    out.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(out)


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n")
