"""Compiles every C file of the core for platforms other than this one.

    pip install ziglang && python scripts/cross_compile.py [TARGET ...]

Compiles only: nothing is linked or run.  Prints one line per target; exit status 1 where a file
fails or gives a warning.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FLAGS = ["-std=c11", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing"]
FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", '-DSMALLM_VERSION="0"']
FLAGS += ["-I", str(ROOT / "include")]
TARGETS = ("x86_64-windows-gnu", "x86_64-macos", "aarch64-macos", "aarch64-linux-musl")

# The tiers with their symbols' suffix, folder and flags, as in CMakeLists.txt.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni"))]
GENERIC = [("generic", "generic", [])]
X86 = [
    ("generic_fma", "generic", AVX2),
    ("avx2", "x86_avx2", AVX2),
    ("avxvnni", "x86_avxvnni", [*AVX2, "-mavxvnni"]),
    ("avx512vnni", "x86_avx512vnni", AVX512),
    ("amx", "x86_amx", [*AVX512, "-mamx-tile", "-mamx-int8"]),
]


def commands(target: str) -> list[tuple[Path, list[str]]]:
    """(file, flags) of everything that the library consists of on `target`."""
    flags = [*FLAGS, "-target", target]
    tiers = list(GENERIC)
    if "linux" in target:
        flags += ["-D_GNU_SOURCE"]
    if "windows" not in target:
        flags += ["-fPIC"]
    if target.startswith("x86_64"):
        flags += ["-DSM_HAVE_X86"]
        tiers += X86
    other = "os_posix.c" if "windows" in target else "os_windows.c"
    core = [f for d in (".", "quants", "mixers", "kernels") for f in sorted((CSRC / d).glob("*.c"))]
    jobs = [(f, flags) for f in core if f.name != other]
    for suffix, folder, more in tiers:
        files = sorted((CSRC / "kernels" / folder).glob("*.c"))
        jobs += [(f, [*flags, *more, f"-DSM_TIER={suffix}"]) for f in files]
    return jobs


def check(target: str) -> bool:
    """Compiles for one target and prints its line."""
    jobs = commands(target)
    failed = []
    with tempfile.TemporaryDirectory() as directory:
        for file, flags in jobs:
            command = [sys.executable, "-m", "ziglang", "cc", "-c", *flags, str(file)]
            command += ["-o", str(Path(directory) / "object.o")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                failed.append(f"{file.relative_to(ROOT)}\n{done.stderr}")
    print(f"{target}: {len(jobs) - len(failed)} of {len(jobs)} files compile", flush=True)
    for text in failed:
        print(text, file=sys.stderr)
    return not failed


def main() -> int:
    results = [check(target) for target in sys.argv[1:] or TARGETS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
