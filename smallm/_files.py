"""Files that are whole or not there: they get their name at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write to.  Where the block ends well the file gets the name `path`, in place of one
    that was there; where it raises, nothing of it stays.

    Where the system can, the file has no name until then, so that nothing stays of it either
    when the process is killed; elsewhere it lies beside `path` and ends in ".part".

    OSError names `path`: also where it is there and no regular file, as a device, which nothing may
    replace."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: not a file, and so not replaced by one")
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    descriptor = _unnamed(path.parent)
    name = part if descriptor is None else Path(f"/proc/self/fd/{descriptor}")
    try:
        yield name
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        if descriptor is not None:
            # Follows the link that /proc has, which os.link() does with a folder's descriptor only.
            os.link(name, part, src_dir_fd=descriptor, follow_symlinks=True)
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        own = (None, str(name), str(part))
        if isinstance(error, OSError) and error.filename in own and error.errno:
            # Of a full disk or a missing folder.
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _unnamed(folder: Path) -> int | None:
    """A file without a name, on the file system of `folder`; None: there is no such thing."""
    if sys.platform != "linux" or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError:  # as `folder` itself may be at fault, what opens the file by name says it
        return None


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable, where the platform can."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
