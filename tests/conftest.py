"""Fixtures shared by the tests."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def find_tool(name: str, directory: str) -> str:
    """A build tool: from PATH, beside the interpreter, or from its Python package, whose attribute
    `directory` says where it lies."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found:
        return found
    return str(Path(getattr(importlib.import_module(name), directory)) / name)


@pytest.fixture(scope="session")
def c_tests(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """Builds the C tests (-DSMALLM_TESTS=ON) once; gives the path of one by its name."""
    assert pytestconfig.cache is not None
    build = pytestconfig.cache.mkdir("c-tests")
    cmake = find_tool("cmake", "CMAKE_BIN_DIR")
    ninja = find_tool("ninja", "BIN_DIR")
    configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DSMALLM_TESTS=ON"]
    for command in (configure, [cmake, "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            pytest.fail(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return lambda name: build / name
