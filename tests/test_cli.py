"""The `smallm` command, as a user and as a program meet it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import smallm
from smallm import _catalog

HERE = Path(__file__).parent  # commands start here, where no source folder hides the package
COMMAND = [sys.executable, "-m", "smallm"]
NEVER = "--offline"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SMALLM_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path / "cache"


def smallm_command(
    *arguments: object, stdin: str | bytes = b"", **environment: str
) -> subprocess.CompletedProcess[str]:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=HERE,
        input=data,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    out, err = (part.decode("utf-8", "replace") for part in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a command that failed as it should."""
    assert done.returncode == 1 and done.stdout == "", done
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    return line


# ---- run -----------------------------------------------------------------------------------------


def test_run_chats_and_raw_completes(tiny_chat: Path) -> None:
    with smallm.load(tiny_chat) as model:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
        ]
        chat = model.chat("Hello", max_tokens=12, temperature=0).text
        brief = model.chat(messages, max_tokens=12, temperature=0).text
        raw = model.generate("Hello there", max_tokens=12, temperature=0).text
    options = ["-m", tiny_chat, "-n", 12, "--temp", 0]
    for arguments in (["Hello"], ["-p", "Hello"]):
        done = smallm_command("run", *options, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.rstrip("\n") == chat.rstrip("\n")
    done = smallm_command("run", *options, "--system", "Be brief.", "Hello")
    assert done.stdout.rstrip("\n") == brief.rstrip("\n")
    for arguments, stdin in (
        (["Hello", "there"], ""),
        ([], "Hello there\n"),
        (["-"], "Hello there"),
    ):
        done = smallm_command("run", "--raw", *options, *arguments, stdin=stdin)
        assert done.stdout.rstrip("\n") == raw.rstrip("\n")


def test_run_as_json(tiny_chat: Path) -> None:
    done = smallm_command("run", "--json", "-m", tiny_chat, "-n", 5, "-s", 7, "Hello")
    answer = json.loads(done.stdout)
    with smallm.load(tiny_chat) as model:
        expected = model.chat("Hello", max_tokens=5, seed=7)
    assert answer["text"] == expected.text and answer["seed"] == 7
    assert answer["finish_reason"] == expected.finish_reason
    assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert answer["timings"]["peak_rss"] > 0


def test_run_s_options_reach_the_model(tiny_chat: Path) -> None:
    with smallm.load(tiny_chat) as model:
        options: dict[str, Any] = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.01}
        free = model.generate("Hello", max_tokens=20, seed=3, repeat_penalty=1.2, **options)
    arguments = ["-m", tiny_chat, "-n", 20, "-s", 3, "--temp", 1.5, "--top-k", 9, "--top-p", 0.9]
    arguments += ["--min-p", 0.01, "--repeat-penalty", 1.2, "-t", 1, "-c", 512, "--raw", "--json"]
    done = json.loads(smallm_command("run", *arguments, "Hello").stdout)
    assert done["text"] == free.text
    if len(free.text) > 4:
        stop = free.text[2:4]
        cut = json.loads(smallm_command("run", *arguments, "-r", stop, "Hello").stdout)
        assert cut["text"] == free.text[: free.text.index(stop)] and cut["finish_reason"] == "stop"


def test_run_tells_its_speed_on_stderr(tiny_chat: Path) -> None:
    done = smallm_command("run", "-v", "-m", tiny_chat, "-n", 5, "-s", 7, "Hello")
    assert re.search(r"seed 7; prompt \d+ tokens at [\d.]+/s", done.stderr)
    assert "seed" not in done.stdout


def test_text_passes_through_any_locale(tiny_chat: Path) -> None:
    prompt = "Grüße, 世界 😀"
    with smallm.load(tiny_chat) as model:
        n = model.chat(prompt, max_tokens=0).usage.prompt_tokens
    for locale in ("C", "C.UTF-8", "POSIX"):
        done = smallm_command(
            "run", "--json", "-m", tiny_chat, "-n", 0, stdin=prompt, LC_ALL=locale
        )
        assert json.loads(done.stdout)["usage"]["prompt_tokens"] == n


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "a", "-p", "b"],
        ["run", "--raw", "--system", "a", "b"],
        ["run", "--bogus", "a"],
        ["run", "-n", "many", "a"],
        ["run", "-t", "0", "a"],
        ["nothing"],
        ["rm"],
        ["completion", "tcsh"],
        ["pull", "a", "b"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    done = smallm_command(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert "Usage: smallm" in done.stderr and "Error: " in done.stderr


def test_failures_are_one_clear_line(tiny_chat: Path, tiny_spm: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.gguf"
    page.write_text("<!DOCTYPE html>" * 50)
    assert "nothing.gguf" in one_line(smallm_command("run", "-m", "nothing.gguf", "a"))
    assert "page.gguf" in one_line(smallm_command("run", "-m", page, "a"))
    assert "offline" in one_line(smallm_command("run", "a"))
    assert "offline" in one_line(smallm_command("pull"))
    assert "chat template" in one_line(smallm_command("run", "-m", tiny_spm, "a"))
    assert "chat template" in one_line(smallm_command("chat", "-m", tiny_spm))
    assert "temperature" in one_line(smallm_command("run", "-m", tiny_chat, "--temp", -1, "a"))
    assert "UTF-8" in one_line(smallm_command("run", "-m", tiny_chat, stdin=b"\xff\xfe"))
    long = smallm_command("run", "-m", tiny_chat, "-c", 16, "word " * 50)
    assert "16" in one_line(long)
    assert "nope" in one_line(smallm_command("pull", "nope"))
    assert "nope" in one_line(smallm_command("rm", "nope"))
    assert "SMALLM_ISA" in one_line(smallm_command("run", "-m", tiny_chat, "a", SMALLM_ISA="z80"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX pipes")
def test_a_closed_pipe_is_not_an_error(tiny_chat: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "-m", str(tiny_chat), "--raw", "--temp", "2", "-n", "50000", "Hello"],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0
    process.stderr.close()


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_ends_run(tmp_path: Path) -> None:
    def endless(tensors: dict[str, tiny.Tensor]) -> None:
        """No control token is ever likely: the signal comes within the answer."""
        bias = np.zeros(tensors["token_embd.weight"].shape[0], dtype=np.float32)
        bias[:4] = -1e4
        tensors["output.bias"] = tiny.Tensor(tiny.GgmlType.F32, bias.shape, bias)

    path = tmp_path / "endless.gguf"
    tiny.write_tiny(path, tokenizer="bpe", n_ctx=1 << 20, edit=endless)
    process = subprocess.Popen(
        [*COMMAND, "run", "-m", str(path), "--raw", "-n", "-1", "Hello"],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err


# ---- chat ----------------------------------------------------------------------------------------


def test_chat_keeps_the_conversation(tiny_chat: Path) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    with smallm.load(tiny_chat) as model:
        messages: list[dict[str, str]] = []
        answers = []
        for question in ("Hello", "And then?"):
            messages.append({"role": "user", "content": question})
            answers.append(model.chat(messages, **options).text)
            messages.append({"role": "assistant", "content": answers[-1]})
    lines = "Hello\nAnd then?\n/reset\nHello\n\n/help\n/bogus\n/exit\nnever"
    done = smallm_command("chat", "-m", tiny_chat, "-n", 8, "--temp", 0, stdin=lines)
    assert done.returncode == 0
    assert done.stdout == "".join(f"{a}\n" for a in [*answers, answers[0]])
    assert "(a new conversation)" in done.stderr and "no command /bogus" in done.stderr
    assert done.stderr.count("/reset begins") == 2


def test_chat_drops_the_oldest_turns_and_says_so(tiny_chat: Path) -> None:
    lines = (
        "".join(f"question number {i} about words\n" for i in range(12)) + "word " * 200 + "\nend\n"
    )
    done = smallm_command("chat", "-m", tiny_chat, "-n", 8, "-c", 160, "--temp", 0, stdin=lines)
    assert done.returncode == 0
    assert len(re.findall(r"the oldest \d+ messages were dropped", done.stderr)) >= 5
    assert re.search(r"smallm: prompt has \d+ tokens; the context holds 160", done.stderr)
    assert done.stdout.count("\n") >= 14


@contextlib.contextmanager
def terminal(*arguments: object) -> Iterator[Any]:
    """Runs the command on a pseudo-terminal; gives functions to write, and to read until a text."""
    import pty

    pid, descriptor = pty.fork()
    if pid == 0:
        os.chdir(HERE)
        os.execv(sys.executable, [*COMMAND, *map(str, arguments)])
    seen = b""

    def write(text: str) -> None:
        os.write(descriptor, text.encode())

    def read_until(text: str, press: str = "") -> str:
        """Presses `press` every second: a terminal library may miss a key just before it waits."""
        nonlocal seen
        begin = pressed = time.monotonic() - 1
        while text.encode() not in seen:
            now = time.monotonic()
            assert now < begin + 60, f"{text!r} does not come: {seen!r}"
            if press and now >= pressed + 1:
                write(press)
                pressed = now
            if select.select([descriptor], [], [], 0.1)[0]:
                try:
                    seen += os.read(descriptor, 65536)
                except OSError:
                    break
        before, found, seen = seen.partition(text.encode())
        assert found, f"{text!r} does not come: {before!r}"
        return before.decode("utf-8", "replace")

    def wait() -> int:
        with contextlib.suppress(OSError):
            while True:
                assert select.select([descriptor], [], [], 60)[0], "the program does not end"
                if not os.read(descriptor, 65536):
                    break
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    try:
        yield write, read_until, wait
    finally:
        os.close(descriptor)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_in_chat_stops_the_answer_and_not_the_program(tiny_chat: Path) -> None:
    # Greedily this model never comes to its end token.
    with terminal("chat", "-m", tiny_chat, "-n", "-1", "--temp", "0") as (write, read_until, wait):
        read_until("> ")
        write("Hello\n")
        time.sleep(0.5)
        read_until("(stopped)", press="\x03")
        read_until("> ")
        read_until("/exit or Ctrl-D ends)", press="\x03")
        read_until("> ")
        write("/reset\n")
        read_until("(a new conversation)")
        read_until("> ")
        write("\x04")
        assert wait() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_no_control_characters(tiny_chat: Path) -> None:
    code = (
        "import sys; from smallm.cli import show_text\n"
        "show_text('a\\x1b[31mb\\x07\\x9b\\r\\n\\tc\\x7f')"
    )
    piped = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True)
    assert b"\x1b" in piped.stdout
    import pty

    master, slave = pty.openpty()
    subprocess.run([sys.executable, "-c", code], cwd=HERE, stdout=slave, check=True)
    shown = os.read(master, 1000)
    os.close(master)
    os.close(slave)
    assert shown == b"a[31mb\r\n\tc"


# ---- the cache -----------------------------------------------------------------------------------


@pytest.fixture
def cached(cache: Path, tiny_chat: Path) -> str:
    """A cached model, as a download leaves it."""
    name = "https://example.com/toy.gguf"
    folder = cache / _catalog.key_of(name)
    folder.mkdir(parents=True)
    (folder / "toy.gguf").write_bytes(tiny_chat.read_bytes())
    files = [{"path": "toy.gguf", "size": tiny_chat.stat().st_size, "sha256": "0"}]
    _catalog._write_record(folder, _catalog.Record(name, "toy", "MIT", name, files, str(folder)))
    return name


def test_pull_ls_rm(cached: str, cache: Path) -> None:
    done = smallm_command("pull", cached)
    path = done.stdout.strip()
    assert done.returncode == 0 and Path(path).is_file() and "MIT" in done.stderr
    record = json.loads(smallm_command("pull", "--json", cached).stdout)
    assert record["path"] == path and record["name"] == cached
    listed = smallm_command("ls").stdout
    assert cached in listed and "MIT" in listed and "smallm pull smollm2-135m" in listed
    (entry,) = json.loads(smallm_command("ls", "--json").stdout)
    assert entry["name"] == cached and entry["size"] == os.path.getsize(path)
    assert smallm_command("run", "-m", cached, "-n", 2, "Hello").returncode == 0
    assert smallm_command("rm", cached).returncode == 0
    assert not Path(path).exists() and json.loads(smallm_command("ls", "--json").stdout) == []


def test_show(tiny_chat: Path) -> None:
    text = smallm_command("show", tiny_chat, "--metadata")
    assert text.returncode == 0
    assert re.search(r"^architecture +llama$", text.stdout, re.M)
    assert re.search(r"^context +65,536$", text.stdout, re.M)
    assert "tokenizer.ggml.pre = gpt-2" in text.stdout
    facts = json.loads(smallm_command("show", "--json", "--metadata", tiny_chat).stdout)
    assert facts["context"] == 65536 and facts["metadata"]["general.architecture"] == "llama"


# ---- doctor and the rest -------------------------------------------------------------------------


def test_doctor_without_a_model(cache: Path) -> None:
    done = smallm_command("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["self_test"] == "skipped: no model"
    assert report["tier"] in report["tiers"].split(",") and report["cores_usable"] >= 1
    assert report["cache"] == str(cache) and "smallm pull" in report["model"]


def test_doctor_with_a_model(tiny_chat: Path) -> None:
    done = smallm_command("doctor", "-m", tiny_chat)
    assert done.returncode == 0
    assert re.search(r"^self test +passed", done.stdout, re.M)
    assert re.search(r"^memory +[\d.]+ GB$", done.stdout, re.M)


def test_doctor_finds_what_is_wrong(tmp_path: Path) -> None:
    bad = smallm_command("doctor", SMALLM_ISA="z80")
    assert bad.returncode == 1 and "FAILED" in bad.stdout and "z80" in bad.stdout
    missing = smallm_command("doctor", "-m", tmp_path / "none.gguf")
    assert missing.returncode == 1 and "none.gguf" in missing.stdout


def test_version_help_and_completion() -> None:
    assert smallm.__version__ in smallm_command("--version").stdout
    done = smallm_command("--help")
    assert done.returncode == 0
    for name in ("run", "chat", "pull", "ls", "rm", "show", "doctor", "completion"):
        assert re.search(rf"^  {name} ", done.stdout, re.M)
        assert smallm_command(name, "-h").returncode == 0
    for shell in ("bash", "zsh", "fish"):
        assert "_SMALLM_COMPLETE" in smallm_command("completion", shell).stdout
    words = {
        "COMP_WORDS": "smallm pull smo",
        "COMP_CWORD": "2",
        "_SMALLM_COMPLETE": "bash_complete",
    }
    assert "smollm2-135m" in smallm_command(**words).stdout


def test_the_command_is_installed() -> None:
    script = Path(sys.executable).parent / "smallm"
    if not script.exists():
        pytest.skip("this environment has no scripts folder")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0 and smallm.__version__ in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("no_color", [False, True])
def test_the_bar_respects_no_color(no_color: bool) -> None:
    import pty

    code = (
        "import time; from smallm._bar import bar\n"
        "with bar('[red]toy') as report:\n report(50, 100)\n report(100, 100)"
    )
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    if no_color:
        environment["NO_COLOR"] = "1"
    master, slave = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, stderr=slave, env=environment, check=True
    )
    shown = os.read(master, 100_000)
    os.close(master)
    os.close(slave)
    assert b"[red]toy" in shown and b"100/100" in shown
    assert (re.search(rb"\x1b\[[0-9;]*3[0-9]", shown) is None) == no_color
