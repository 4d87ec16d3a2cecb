"""Writes smallm/_ffi.py and its type stub from the public C header.

    python scripts/make_ffi.py include/smallm.h OUTPUT_DIR

The header's section between the two BINDING marks goes to cffi (out-of-line ABI mode), so the C
declarations exist once.  The generated module opens the library that lies beside it.
"""

import re
import sys
from pathlib import Path

from cffi import FFI

LOADER = '''
import os as _os
import sys as _sys

_NAME = {"win32": "smallm.dll", "darwin": "libsmallm.dylib"}.get(_sys.platform, "libsmallm.so")
lib = ffi.dlopen(_os.path.join(_os.path.dirname(_os.path.abspath(__file__)), _NAME))
'''

STUB_HEAD = '''"""The C library's binding; generated from smallm.h by scripts/make_ffi.py."""

from typing import Any

class _FFI:
    NULL: Any
    def new(self, cdecl: str, init: Any = ...) -> Any: ...
    def string(self, cdata: Any, maxlen: int = ...) -> bytes: ...
    def buffer(self, cdata: Any, size: int = ...) -> Any: ...
    def unpack(self, cdata: Any, length: int) -> Any: ...
    def from_buffer(self, cdecl: str, buffer: Any, require_writable: bool = ...) -> Any: ...
    def sizeof(self, cdecl: Any) -> int: ...
    def gc(self, cdata: Any, destructor: Any, size: int = ...) -> Any: ...
    def cast(self, cdecl: str, value: Any) -> Any: ...

ffi: _FFI

class _Lib:
'''


def binding_section(header: str) -> str:
    """The declarations between the BINDING marks, comments removed."""
    match = re.search(r"/\* ---- BEGIN BINDING ---- \*/(.*)/\* ---- END BINDING ---- \*/", header, re.S)
    if match is None:
        raise SystemExit("smallm.h: the BINDING marks are missing")
    return re.sub(r"/\*.*?\*/", "", match.group(1), flags=re.S)


def stub(declarations: str) -> str:
    """A type stub that names every constant and function of the library."""
    constants = re.findall(r"\b(SMALLM_[A-Z0-9_]+)\s*=", declarations)
    functions = re.findall(r"\b(smallm_\w+)\s*\(", declarations)
    lines = [f"    {name}: int" for name in constants]
    lines += [f"    def {name}(self, *args: Any) -> Any: ..." for name in functions]
    return STUB_HEAD + "\n".join(lines) + "\n\nlib: _Lib\n"


def main() -> None:
    header, out = Path(sys.argv[1]), Path(sys.argv[2])
    declarations = binding_section(header.read_text(encoding="utf-8"))
    ffi = FFI()
    ffi.cdef(declarations)
    ffi.set_source("smallm._ffi", None)
    module = out / "_ffi.py"
    ffi.emit_python_code(str(module))
    with module.open("a", encoding="utf-8") as file:
        file.write(LOADER)
    (out / "_ffi.pyi").write_text(stub(declarations), encoding="utf-8")


if __name__ == "__main__":
    main()
