"""Writes _ffi.py and its type stub from the public C header.

    python scripts/make_ffi.py include/smallm.h OUTPUT_DIR

The header's section between the two BINDING marks goes to cffi (out-of-line ABI mode), so the C
declarations exist once.  The generated module opens the library that lies beside it.
"""

import re
import sys
from pathlib import Path

from cffi import FFI

LOADER = """
import os as _os
import sys as _sys

_NAME = {"win32": "smallm.dll", "darwin": "libsmallm.dylib"}.get(_sys.platform, "libsmallm.so")
lib = ffi.dlopen(_os.path.join(_os.path.dirname(_os.path.abspath(__file__)), _NAME))
"""

STUB_HEAD = '''"""The C library's binding; generated from smallm.h by scripts/make_ffi.py."""

from collections.abc import Callable
from typing import Any

CData = Any  # a pointer, struct or array of C

class _FFI:
    NULL: CData
    def new(self, cdecl: str, init: Any = ...) -> CData: ...
    def string(self, cdata: CData, maxlen: int = ...) -> bytes: ...
    def buffer(self, cdata: CData, size: int = ...) -> CData: ...
    def unpack(self, cdata: CData, length: int) -> Any: ...
    def from_buffer(self, cdecl: str, buffer: Any, require_writable: bool = ...) -> CData: ...
    def sizeof(self, cdecl: str | CData) -> int: ...
    def gc(
        self, cdata: CData, destructor: Callable[[CData], object] | None, size: int = ...
    ) -> CData: ...
    def cast(self, cdecl: str, value: Any) -> CData: ...

ffi: _FFI

class _Lib:
'''

MARKED = re.compile(r"/\* ---- BEGIN BINDING ---- \*/(.*)/\* ---- END BINDING ---- \*/", re.S)
FUNCTION = re.compile(r"^([\w ]+[ *])(smallm_\w+)\(([^)]*)\);", re.M)


def binding_section(header: str) -> str:
    """The declarations between the BINDING marks, comments removed."""
    match = MARKED.search(header)
    if match is None:
        raise SystemExit("smallm.h: the BINDING marks are missing")
    return re.sub(r"/\*.*?\*/", "", match.group(1), flags=re.S)


def python_type(declaration: str) -> str:
    """The stub's type for a C type or parameter."""
    if "*" in declaration:
        return "CData"
    if re.search(r"\bvoid\b", declaration):
        return "None"
    if re.search(r"\b(float|double)\b", declaration):
        return "float"
    return "bool" if re.search(r"\bbool\b", declaration) else "int"


def stub_of(result: str, name: str, parameters: str) -> str:
    """One function's line."""
    arguments = []
    for parameter in re.split(r"\s*,\s*", parameters.strip()):
        if parameter == "void":
            continue
        kind, label = python_type(parameter), re.split(r"\W+", parameter)[-1]
        if re.match(r"const char \*\w", parameter):
            kind = "bytes | CData"
        arguments.append(f"{label}: {kind}")
    listed = ", ".join(["self", *arguments, *(["/"] if arguments else [])])
    return f"    def {name}({listed}) -> {python_type(result)}: ..."


def stub(declarations: str) -> str:
    """A type stub that names every constant and function of the library."""
    lines = [f"    {name}: int" for name in re.findall(r"\b(SMALLM_[A-Z0-9_]+)\s*=", declarations)]
    lines += [stub_of(*match.groups()) for match in FUNCTION.finditer(declarations)]
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
