"""README's examples and the programs in examples/ do what they are there to show."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import architectures
import goldens
import pytest
import tiny
import weight_formats

import smallm
from smallm.convert import TYPES
from smallm.quantize import TYPES as QUANTIZED

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.S | re.M)
SETUP = [
    'pip install . && smallm run "Why is the sky blue?"\n',
    "pip install '.[test]' && pytest\n",
]
PACKAGE = Path(smallm.__file__).parent


def test_the_table_of_architectures_is_that_of_arch_c() -> None:
    assert architectures.written() == architectures.table(), "run tests/architectures.py"


def test_the_table_of_formats_is_that_of_quants_def() -> None:
    rows = weight_formats.rows()
    assert {"F32", "Q4_0", "Q6_K"} <= {row.name for row in rows}
    assert {row.name for row in rows} <= weight_formats.exact(), "test_quants.py lacks a format"
    assert weight_formats.written() == weight_formats.table(), "run tests/weight_formats.py"
    assert weight_formats.measured()["formats"].keys() <= {row.name.lower() for row in rows}


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language and text not in SETUP]


def run(
    command: list[str | Path], folder: Path, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done


def compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        pytest.skip("no C compiler here")
    return found


def compiled(source: Path, folder: Path) -> Path:
    """The program of `source`, against the installed package; a warning is an error."""
    program = folder / source.stem
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{PACKAGE / 'include'}"]
    link = [f"-L{PACKAGE}", "-lsmallm", f"-Wl,-rpath,{PACKAGE}", "-o", str(program)]
    run([compiler(), *flags, source, *link], folder)
    return program


# ---- README --------------------------------------------------------------------------------------


def test_the_two_commands_are_there() -> None:
    texts = [text for kind, text in BLOCKS if kind == "sh"]
    assert texts[:2] == SETUP


def test_readme_has_examples_in_each_language() -> None:
    assert len(blocks("python")) >= 3 and len(blocks("sh")) >= 2 and len(blocks("c")) == 1


@pytest.mark.parametrize("i", range(len(blocks("python"))))
def test_readme_python(smollm2: smallm.Model, tmp_path: Path, i: int) -> None:
    program = tmp_path / "example.py"
    program.write_text(blocks("python")[i], encoding="utf-8")
    done = run([sys.executable, program], tmp_path)
    assert done.stdout.strip()
    if i == 0:
        assert done.stdout.startswith(" Paris")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_readme_shell_and_c(smollm2: smallm.Model, tmp_path: Path) -> None:
    compiler()
    (tmp_path / "hello.c").write_text(blocks("c")[0], encoding="utf-8")
    for text in blocks("sh"):
        if any(
            f"smallm {name}" in text for name in ("convert", "imatrix", "merge", "ppl", "quantize")
        ):
            continue  # tests of their own
        done = run(["bash", "-e", "-c", text], tmp_path)
        assert "Traceback" not in done.stderr
        assert smollm2.info.path in done.stdout or "Paris" in done.stdout
    compiled(tmp_path / "hello.c", tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_readme_convert(tmp_path: Path) -> None:
    """With a small random checkpoint in place of the real one."""
    (text,) = (text for text in blocks("sh") if "smallm convert" in text)
    spec = json.loads((goldens.HERE / "llama.json").read_text(encoding="utf-8"))
    goldens.write_folder(spec, "llama", tmp_path / "SmolLM2-135M-Instruct")
    done = run(["bash", "-e", "-c", text], tmp_path)
    first, _, answer = done.stdout.partition("\n")
    assert first == "smollm2.gguf" and answer.strip()
    for name in TYPES:
        assert f"`{name}`" in README


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_readme_quantize(tmp_path: Path) -> None:
    """With a small random model in place of the real one."""
    text, importance = (text for text in blocks("sh") if "smallm quantize" in text)
    template = {"tokenizer.chat_template": tiny.CHATML}
    tiny.write_tiny(
        tmp_path / "smollm2-f16.gguf", tokenizer="bpe", n_embd=256, types="F16", extra=template
    )
    done = run(["bash", "-e", "-c", text], tmp_path)
    first, _, answer = done.stdout.partition("\n")
    assert first == "smollm2-q4.gguf" and answer.strip()
    for name in QUANTIZED:
        assert f"`{name}`" in README
    (tmp_path / "book.txt").write_text("Once upon a time. " * 200, encoding="utf-8")
    tiny.write_tiny(tmp_path / "smollm2-f16.gguf", n_embd=256, types="F16", n_ctx=512)
    done = run(["bash", "-e", "-c", importance], tmp_path)
    assert done.stdout == "smollm2.imatrix\nsmollm2-q3.gguf\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_readme_quality(tmp_path: Path) -> None:
    (text,) = (text for text in blocks("sh") if "smallm ppl" in text)
    tiny.write_tiny(tmp_path / "model-f16.gguf", types="F16", n_ctx=512)
    tiny.write_tiny(tmp_path / "model-q4.gguf", types="Q4_0", n_ctx=512)
    (tmp_path / "book.txt").write_text("Once upon a time. " * 200, encoding="utf-8")
    done = run(["bash", "-e", "-c", text], tmp_path)
    assert done.stdout.count("perplexity  ") == 3 and done.stdout.count("KL divergence") == 2
    assert (tmp_path / "f16.kld").exists()


def test_readme_names_every_parameter_and_exception() -> None:
    for name in [*smallm.Params.__annotations__, "agenerate", "astream"]:
        assert f"`{name}`" in README
    for name in smallm.__all__:
        kind = getattr(smallm, name)
        later = name in ("GrammarError", "SmallmError")
        if isinstance(kind, type) and issubclass(kind, Exception) and not later:
            assert f"`{name}`" in README


# ---- examples ------------------------------------------------------------------------------------


def test_example_chat(tiny_chat: Path, tmp_path: Path) -> None:
    program = ROOT / "examples" / "python" / "chat.py"
    done = run([sys.executable, program, tiny_chat], tmp_path, "Hello\nAnd then?\n")
    assert done.stdout.count("> ") >= 3 and len(done.stdout) > 20


def test_example_batch(tiny_chat: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("Hello\nThe quick brown fox\n", encoding="utf-8")
    program = ROOT / "examples" / "python" / "batch.py"
    done = run([sys.executable, program, lines, tiny_chat], tmp_path)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(a["prompt"], a["seed"]) for a in answers] == [("Hello", 1), ("The quick brown fox", 2)]


def test_example_surprise(tiny_chat: Path, tmp_path: Path) -> None:
    program = ROOT / "examples" / "python" / "surprise.py"
    done = run([sys.executable, program, "Hello there", tiny_chat], tmp_path)
    with smallm.load(tiny_chat) as model:
        n = len(model.tokenize("Hello there"))
    assert done.stdout.count(" bits  ") == n - 1 and done.stdout.endswith("bits per token\n")


@pytest.mark.skipif(sys.platform == "win32", reason="built with POSIX flags")
def test_examples_in_c(tiny_chat: Path, tmp_path: Path) -> None:
    folder = ROOT / "examples" / "c"
    with smallm.load(tiny_chat) as model:
        expected = model.generate("Hello", temperature=0, max_tokens=12).text
    program = compiled(folder / "generate.c", tmp_path)
    assert run([program, tiny_chat, "Hello", "12"], tmp_path).stdout == expected + "\n"
    missing = subprocess.run([program, "none.gguf", "a"], capture_output=True, text=True)
    assert missing.returncode == 1 and "none.gguf" in missing.stderr
    done = run([compiled(folder / "chat.c", tmp_path), tiny_chat], tmp_path, "Hello\nAnd then?\n")
    assert done.stdout.count("> ") >= 3
