"""Writes csrc/quants/grids.c: the tables that the IQ1, IQ2 and IQ3 weight formats index.

    python scripts/make_grids.py csrc/quants/grids.c

The tables are part of the formats; they are read from the `gguf` package (gguf.quants).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import quants

HEAD = """\
/* Written by scripts/make_grids.py from the `gguf` package's tables.  See grids.h. */
#include "grids.h"
"""
GRIDS = {
    "iq1": quants.IQ1_S,
    "iq2_xxs": quants.IQ2_XXS,
    "iq2_xs": quants.IQ2_XS,
    "iq2_s": quants.IQ2_S,
    "iq3_xxs": quants.IQ3_XXS,
    "iq3_s": quants.IQ3_S,
}
PER_LINE = 13


def entries(cls: type) -> list[int]:
    """Value j of an entry as its place in the format's list of values, in bits b j .. b j + b - 1,
    b = 2 for 8 values and 3 for 4."""
    cls.init_grid()
    grid = cls.grid.reshape(cls.grid_shape)
    bits = 2 if cls.grid_shape[1] == 8 else 3
    places = np.searchsorted(np.array(cls.grid_map, np.float32), grid)
    return [sum(int(p) << bits * j for j, p in enumerate(row)) for row in places]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    text = HEAD
    for name, cls in GRIDS.items():
        numbers = [f"0x{n:04x}" for n in entries(cls)]
        text += f"\nconst uint16_t sm_grid_{name}[{len(numbers)}] = {{\n"
        for i in range(0, len(numbers), PER_LINE):
            text += "    " + ", ".join(numbers[i : i + PER_LINE]) + ",\n"
        text += "};\n"
    parser.parse_args().out.write_text(text, encoding="ascii")


if __name__ == "__main__":
    main()
