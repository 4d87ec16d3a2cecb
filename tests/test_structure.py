"""The house's rules that a machine can hold: who may include whom, and what the core may not do."""

import ast
import json
import re
from graphlib import TopologicalSorter
from pathlib import Path

import architectures
import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"

# A module is a header's stem, or its folder for quants and kernels.  Each may include what stands
# here, and base, os-independent helpers and itself.
GROUND = {"base", "smallm"}
MAY_INCLUDE = {
    "base": set(),
    "mem": {"os"},
    "os": set(),
    "os_posix": {"os"},
    "gate": {"os"},
    "os_windows": {"os"},
    "f16": set(),
    "fma": set(),
    "mathx": set(),
    "cpu": {"os", "threads"},
    "threads": {"os", "cpu"},
    "quants": {"f16"},
    "kernels": {"quants", "f16", "fma", "cpu", "os", "peaks"},
    "gguf": {"os", "quants"},
    "utf8": set(),
    "tokenizer": {"gguf", "utf8"},
    "arch": {"gguf", "kernels"},
    "model": {
        "tensors",
        "arch",
        "gguf",
        "kernels",
        "quants",
        "tokenizer",
        "threads",
        "cpu",
        "os",
        "mathx",
    },
    "quantize": {"kernels", "quants", "threads"},
    "adapter": {"model", "os"},
    "cache": {"arch", "kernels"},
    "peaks": set(),
    "timers": {"quants"},
    "statistics": {"model"},
    "ops": {"adapter", "model", "threads", "kernels", "timers", "statistics", "os", "peaks"},
    "forward": {"cache", "model", "ops", "mathx"},
    "experts": {"forward"},
    "mixers": {"forward", "mathx"},
    "session": {"adapter", "model", "forward", "cache", "cpu", "timers", "statistics"},
    "sampler": {"mathx", "peaks"},
    "engine": {"adapter", "session", "sampler", "model", "tokenizer", "cpu", "os", "threads"},
    "api": {
        "adapter",
        "engine",
        "model",
        "kernels",
        "cpu",
        "os",
        "quantize",
        "quants",
        "threads",
        "tokenizer",
    },
}


def module_of(path: Path) -> str:
    parts = path.relative_to(CSRC).parts
    return parts[0] if len(parts) > 1 else path.stem


def included_modules(path: Path) -> set[str]:
    found = set()
    for name in re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), re.M):
        if name == "smallm.h":
            found.add("smallm")
            continue
        target = (path.parent / name).resolve()
        assert target.exists(), f"{path}: includes {name}, which does not exist"
        found.add(module_of(target))
    return found


SOURCES = sorted([*CSRC.rglob("*.c"), *CSRC.rglob("*.h")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_go_down_only(path: Path) -> None:
    module = module_of(path)
    assert module in MAY_INCLUDE, f"{module} is not in the table of this test"
    extra = included_modules(path) - MAY_INCLUDE[module] - GROUND - {module}
    assert not extra, f"{path.name} ({module}) may not include {sorted(extra)}"


def code_of(path: Path) -> str:
    """The file without comments and string literals."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", path.read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r'"(\\.|[^"\\\n])*"', '""', text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_the_library_does_not_exit_or_print(path: Path) -> None:
    forbidden = r"\b(abort|exit|_Exit|assert|printf|fprintf|puts|perror|setjmp|longjmp)\s*\("
    assert re.findall(forbidden, code_of(path)) == []


# Tokenizers have names of their own, some of which are architectures', too.
TOKENIZERS = {"tokenizer.c", "pretok.c"}
TOKENIZER_MODELS = {"smallm.h", "_model.py"}  # say what a tokenizer's model is called


def test_architecture_names_stand_in_one_file() -> None:
    """Not even in comments of the rest of the core and of the package, but for its converter."""
    rows = [row.name for row in architectures.rows()]
    assert {"llama", "qwen2", "phi2"} <= set(rows)
    package = ROOT / "smallm"
    paths = [*SOURCES, *CSRC.rglob("*.def"), *(ROOT / "include").rglob("*.h")]
    paths += [p for p in package.rglob("*.py") if package / "convert" not in p.parents]
    assert CSRC / "arch.c" in paths and package / "_model.py" in paths
    names = "|".join(map(re.escape, rows))
    for path in paths:
        if path.name in {"arch.c"} | TOKENIZERS:
            continue
        text = path.read_text(encoding="utf-8").replace("llama.cpp", "")
        if path.name in TOKENIZER_MODELS:
            text = re.sub('"(gpt2|llama|bert|t5)"', "", text)
        assert not re.findall(rf"(?<![\w.-])({names})(?![\w-])", text), path


def test_each_architecture_has_its_golden() -> None:
    rows = [row.name for row in architectures.rows()]
    paths = (ROOT / "tests" / "golden").glob("*.json")
    assert set(rows) == {json.loads(path.read_text())["architecture"] for path in paths}


def test_forward_knows_no_threads_isas_or_formats() -> None:
    code = code_of(CSRC / "forward.c")
    assert re.findall(r"\b(thread\w*|avx\w*|SM_TYPE_\w+|SM_ACT_\w+)\b", code) == []
    assert len((CSRC / "forward.c").read_text(encoding="utf-8").splitlines()) <= 400


def test_mutable_globals_are_the_known_ones() -> None:
    """Static or file-scope variables that are not const, outside test-only code."""
    allowed = {"built", "state", "known"}  # dispatch.c's table, cpu.c's detected features
    found = set()
    for path in SOURCES:
        code = re.sub(r"#ifdef SMALLM_TEST_ALLOC.*?#endif", " ", code_of(path), flags=re.S)
        for line in re.findall(r"^\s*static\s+([^;{()=]+?)(?:=|;|\[)", code, re.M):
            if "const" not in line.split() and "inline" not in line.split():
                found.add(line.split()[-1].strip("*"))
    assert found <= allowed, found - allowed


PACKAGE = ROOT / "smallm"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(name: str, everywhere: bool) -> set[str]:
    """The package's modules that one of them imports; everywhere: also within functions, and what
    only types need."""
    path, found = MODULES[name], set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        up = name.split(".") + ["__init__"] * (path.name == "__init__.py")
        base = ".".join([*up[: -node.level], *filter(None, [node.module])])
        for alias in node.names:
            module = f"{base}.{alias.name}"
            found.add(module if module in MODULES else base)
    return found & MODULES.keys()


def test_the_package_imports_without_circles() -> None:
    graph = {name: imported(name, everywhere=False) for name in MODULES}
    assert {"smallm._model", "smallm.eval._quality"} <= graph.keys()
    assert "smallm._generate" in graph["smallm._model"]
    list(TopologicalSorter(graph).static_order())  # CycleError


def test_only_the_command_imports_the_command_line() -> None:
    users = {name for name in MODULES if any("smallm.cli" in m for m in imported(name, True))}
    assert users <= {"smallm.__main__"} | {name for name in MODULES if ".cli" in name}
