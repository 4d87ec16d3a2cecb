"""The C library: structs with their size set, statuses turned into exceptions.

Handles are `ffi.gc` objects: C objects are freed when the last Python reference goes, so that a
call in another thread or an exception at any point can neither free twice nor leak.  For closing to
be prompt, frames that may end in an exception do not keep handles in locals.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ._errors import (
    CancelledError,
    ClosedError,
    ContextOverflowError,
    CorruptModelError,
    MemoryBudgetError,
    ModelNotFoundError,
    SmallmError,
    UnsupportedModelError,
)

try:
    from ._ffi import ffi as ffi
    from ._ffi import lib as lib
except ModuleNotFoundError as error:
    raise ImportError(
        "smallm's source folder hides the installed package (it holds no compiled library): "
        "run Python from another folder, or install with `pip install .`"
    ) from error

CData = Any  # a cffi object

_EXCEPTIONS: dict[int, type[Exception]] = {
    lib.SMALLM_E_ARGUMENT: ValueError,
    lib.SMALLM_E_MEMORY: MemoryBudgetError,
    lib.SMALLM_E_NOT_FOUND: ModelNotFoundError,
    lib.SMALLM_E_CORRUPT: CorruptModelError,
    lib.SMALLM_E_UNSUPPORTED: UnsupportedModelError,
    lib.SMALLM_E_CONTEXT: ContextOverflowError,
    lib.SMALLM_E_BUDGET: MemoryBudgetError,
    lib.SMALLM_E_CANCELLED: CancelledError,
    lib.SMALLM_E_CLOSED: ClosedError,
}


def new(name: str) -> CData:
    """A zeroed `smallm_<name>` with its size set."""
    struct = ffi.new(f"smallm_{name} *")
    struct.size = ffi.sizeof(struct[0])
    return struct


def text(chars: CData) -> str:
    """A NUL-terminated C string or char array."""
    return ffi.string(chars).decode("utf-8", "replace")


def check(status: int, error: CData) -> int:
    """Returns `status` unless it is a failure, which is raised with the message of `error`."""
    if status >= 0:
        return status
    message = text(error.message) or f"smallm failed with status {status}"
    raise _EXCEPTIONS.get(status, SmallmError)(message)


def on(box: CData, function: Callable[..., int], *arguments: Any) -> int:
    """Calls a C function on what `box` owns; as an argument of this call, the box outlives it."""
    return function(box[0], *arguments)


def interruptible(call: Callable[[], int]) -> int:
    """Runs a call into C that may take long, so that Ctrl-C ends the wait for it at once.

    After an interrupt `call` still comes to its end; what it writes to and what owns that has to be
    kept alive by `call` itself.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()  # signals are handled elsewhere
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    return result[0]


def version() -> str:
    """The C library's version, e.g. "0.1.0"."""
    return text(lib.smallm_version())
