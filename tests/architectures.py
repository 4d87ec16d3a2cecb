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
    fields: dict[str, str]  # all others, as C has them


def rows() -> list[Row]:
    text = (ROOT / "csrc" / "arch.c").read_text(encoding="utf-8")
    table = text[text.index("sm_arch archs[]") : text.index("\n};\n")]
    found = []
    for body in re.findall(r"\{(\.name = .*?)\}", table, re.S):
        fields = dict(re.findall(r"\.(\w+) =\s*((?:\"[^\"]*\"\s*)+|[^,}\s]+)", body))
        assert len(fields) == len(re.findall(r"\.\w+ =", body)), body
        name, models = (
            "".join(re.findall(r'"([^"]*)"', fields.pop(key))) for key in ("name", "models")
        )
        found.append(Row(name, models, fields))
    assert len(found) == table.count(".name = "), "a row that was not read"
    return found


def table() -> str:
    lines = [f"| `{row.name}` | {row.models} |\n" for row in rows()]
    return "| `general.architecture` | Models |\n|---|---|\n" + "".join(lines)


def written() -> str:
    """What README has."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


if __name__ == "__main__":
    README.write_text(README.read_text(encoding="utf-8").replace(written(), table()))
