"""The weight formats of csrc/quants/quants.def, and README's table of them.

python tests/weight_formats.py    writes the table into README.md

Speeds are those of benchmarks/formats.json, which `python benchmarks/formats.py --write` writes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import test_quants

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MEASURED = ROOT / "benchmarks" / "formats.json"
BEGIN = "<!-- weight formats: from csrc/quants/quants.def and benchmarks/formats.json -->\n"
END = "<!-- end of weight formats -->"
HEAD = "| | bits per weight | packed | dequantizes bit-exactly | prefill | decode |\n"


class Row(NamedTuple):
    name: str  # Q4_0
    bits: float  # per weight, in a file


def rows() -> list[Row]:
    text = (ROOT / "csrc" / "quants" / "quants.def").read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    pattern = r"SM_QUANT\((\w+),\s*\d+,\s*\w+,\s*(\d+),\s*(\d+),"
    found = [Row(name, 8 * int(n) / int(k)) for name, k, n in re.findall(pattern, text)]
    assert len(found) == text.count("SM_QUANT("), "a row that was not read"
    return sorted(found, key=lambda row: -row.bits)


def exact() -> set[str]:
    """The formats that test_quants.py holds to gguf.quants."""
    (mark,) = (
        mark
        for mark in test_quants.test_values_are_those_of_gguf_quants.pytestmark
        if mark.args[0] == "name"
    )
    return set(mark.args[1])


def measured() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return result


def table() -> str:
    found = measured()
    lines = [HEAD, "|---|---|---|---|---|---|\n"]
    for row in rows():
        speed = found["formats"].get(row.name.lower())
        cells = ["-", "-", "-"]
        if speed:
            shares = (f"{100 * speed[key]:.0f} %" for key in ("prefill", "decode"))
            cells = [f"{round(speed['packed_bits'], 2):g}", *shares]
        cells.insert(1, "yes" if row.name in exact() else "no")
        lines.append(f"| {row.name} | {row.bits:g} | " + " | ".join(cells) + " |\n")
    return "".join(lines)


def written() -> str:
    """What README has."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def write() -> None:
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(BEGIN + written(), BEGIN + table()), encoding="utf-8")


if __name__ == "__main__":
    write()
