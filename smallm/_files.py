"""Files that are whole or not there: written beside their name, which they get at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` to write to.  Where the block ends well the file gets the name `path`,
    in place of one that was there; where it raises, nothing of it stays.

    OSError names `path`: also where it is there and no regular file, as a device, which nothing may
    replace."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: not a file, and so not replaced by one")
    name = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield name
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError) and error.filename in (None, str(name)) and error.errno:
            # Of a full disk or a missing folder.
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


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
