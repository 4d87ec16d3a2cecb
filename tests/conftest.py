"""Fixtures shared by the tests."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import smallm

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` would find the source folder, which holds no compiled library.
if not (ROOT / "smallm" / "_ffi.py").exists():
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


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


@pytest.fixture(scope="session")
def smollm2() -> Iterator[smallm.Model]:
    """The default model, fetched by smallm's own catalogue; skips where that is impossible."""
    import smallm

    try:
        model = smallm.load()
    except smallm.DownloadError as error:
        pytest.skip(f"the default model cannot be fetched here: {error}")
    with model:
        yield model


@pytest.fixture(scope="session")
def tiny_spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a SentencePiece vocabulary and no chat template."""
    import tiny

    return tiny.write_tiny(tmp_path_factory.mktemp("spm") / "spm.gguf").path


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte-level BPE vocabulary, a ChatML template and a long context."""
    import tiny

    path = tmp_path_factory.mktemp("chat") / "chat.gguf"
    return tiny.write_tiny(path, tokenizer="bpe", n_ctx=1 << 16).path
