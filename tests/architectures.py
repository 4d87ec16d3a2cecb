"""The architectures of csrc/arch.c, and README's table of them.

python tests/architectures.py    writes the table into README.md
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- architectures: from csrc/arch.c -->\n", "<!-- end -->"


class Row(NamedTuple):
    name: str
    models: str


def rows() -> list[Row]:
    text = (ROOT / "csrc" / "arch.c").read_text(encoding="utf-8")
    table = text[text.index("sm_arch archs[]") : text.index("\n};\n")]
    found = re.findall(r'\{\.name = "([^"]+)",\s*\.models =\s*((?:"[^"]*"\s*)+)', table)
    assert len(found) == table.count(".name = "), "a row without name and models"
    return [Row(name, "".join(re.findall(r'"([^"]*)"', models))) for name, models in found]


def table() -> str:
    lines = [f"| `{row.name}` | {row.models} |\n" for row in rows()]
    return "| `general.architecture` | Models |\n|---|---|\n" + "".join(lines)


def written() -> str:
    """What README has."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


if __name__ == "__main__":
    README.write_text(README.read_text(encoding="utf-8").replace(written(), table()))
