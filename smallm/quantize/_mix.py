"""Which tensor gets which format.

The types' names, and where they spend more bits, are those that users of llama.cpp's files know, so
that sizes compare: the head always, and in the mixes the values of attention and the matrices that
lead back into the residual stream, whose errors go furthest.

The K-quants' blocks are of 256 values.  A row that no 256 divides gets the smallest format of
32-wide blocks that loses about as much or less, as benchmarks/mixes.py measures it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ._formats import Format, formats

# A type's name: the number of GGUF's general.file_type, and the format of most matrices.
_FILE_TYPES = {
    "f32": (0, "F32"),
    "f16": (1, "F16"),
    "bf16": (32, "BF16"),
    "q8_0": (7, "Q8_0"),
    "q6_k": (18, "Q6_K"),
    "q5_k_m": (17, "Q5_K"),
    "q5_k_s": (16, "Q5_K"),
    "q5_1": (9, "Q5_1"),
    "q5_0": (8, "Q5_0"),
    "q4_k_m": (15, "Q4_K"),
    "q4_k_s": (14, "Q4_K"),
    "q4_1": (3, "Q4_1"),
    "q4_0": (2, "Q4_0"),
    "q3_k_l": (13, "Q3_K"),
    "q3_k_m": (12, "Q3_K"),
    "q3_k_s": (11, "Q3_K"),
    "q2_k": (10, "Q2_K"),
    "iq4_nl": (25, "IQ4_NL"),
    "iq4_xs": (30, "IQ4_XS"),
    "mxfp4": (38, "MXFP4"),
    "mxfp4_moe": (38, "MXFP4"),
    "tq2_0": (37, "TQ2_0"),
    "tq1_0": (36, "TQ1_0"),
}
TYPES = tuple(_FILE_TYPES)
TERNARY = ("tq2_0", "tq1_0")
LISTED = ("iq4_nl", "iq4_xs")
_ALIASES = {"q5_k": "q5_k_m", "q4_k": "q4_k_m", "q3_k": "q3_k_m"}

# For rows that no 256 divides.  Ternary values are in Q4_0 what they are, in IQ4_NL they are not.
_NARROW = {
    "Q2_K": "IQ4_NL",
    "Q3_K": "IQ4_NL",
    "Q4_K": "IQ4_NL",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
}

# Matrices that stay as they are: small, and read value by value or feeding a choice.
STAYS = re.compile(
    r".*(?:_norm\.weight|\.ffn_gate_inp(?:_shexp)?\.weight|\.ssm_conv1d\.weight"
    r"|\.shortconv\.conv\.weight|\.attn_rel_b\.weight)"
    r"|(?:position_embd|token_types)\.weight|.*(?<!\.weight)"
)


class Matrix(NamedTuple):
    name: str
    shape: tuple[int, ...]  #: slowest first


class Choice(NamedTuple):
    format: Format
    wanted: str  #: the format of the mix, which this one may stand in for


class Rule(NamedTuple):
    """`--keep PATTERN=TYPE`."""

    pattern: str  #: with * and ?, of the whole name
    format: Format


def judge_type(name: str) -> str:
    """The type's own name.  ValueError: there is none such."""
    lower = _ALIASES.get(name.lower(), name.lower())
    if lower not in _FILE_TYPES:
        raise ValueError(f"type is {name!r}; known are {', '.join(TYPES)}")
    return lower


def file_type(type_name: str) -> int:
    return _FILE_TYPES[type_name][0]


def judge_rule(text: str) -> Rule:
    """PATTERN=TYPE.  ValueError: it is none."""
    pattern, equals, name = text.partition("=")
    writable = {f.name: f for f in formats().values() if f.writable}
    if not pattern or not equals:
        raise ValueError(f"keep is PATTERN=TYPE, as in 'output.weight=q8_0', not {text!r}")
    if name.upper() not in writable:
        known = ", ".join(n.lower() for n in writable)
        raise ValueError(f"keep {text!r}: the format {name!r} is none of {known}")
    return Rule(pattern, writable[name.upper()])


def query_groups(heads: object, kv_heads: object) -> int:
    """Query heads of a kv head by a file's keys; 0 where they do not say it in one number."""
    if not isinstance(heads, int):
        return 0
    return heads // ((kv_heads if isinstance(kv_heads, int) else 0) or heads or 1)


def stays(matrix: Matrix) -> bool:
    """Norms, biases and the like, which no type changes."""
    return len(matrix.shape) < 2 or STAYS.fullmatch(matrix.name) is not None


def choose(
    type_name: str,
    matrices: Iterable[Matrix],
    *,
    query_groups: int = 1,
    keep: Sequence[Rule] = (),
) -> dict[str, Choice]:
    """The formats of a file's matrices, by name; those that stay as they are are not there.

    type_name: one of TYPES.  query_groups: query heads of a kv head, where they are known.
    keep: the first rule whose pattern is a matrix's name decides on it.
    ValueError: a rule's format cannot hold the rows of a matrix, or it fits none.
    """
    every = [m for m in matrices if not stays(m)]
    named = {m.name for m in every}
    head = "output.weight" if "output.weight" in named else "token_embd.weight"
    places = _places(sorted(named))
    chosen = {}
    unused = {rule.pattern for rule in keep}
    for m in every:
        rule = next((r for r in keep if fnmatch.fnmatchcase(m.name, r.pattern)), None)
        if rule is not None:
            unused.discard(rule.pattern)
            if m.shape[-1] % rule.format.n_values:
                raise ValueError(
                    f"keep {rule.pattern!r}: {m.name} has rows of {m.shape[-1]} values; those of "
                    f"{rule.format.name} are multiples of {rule.format.n_values}"
                )
            chosen[m.name] = Choice(rule.format, rule.format.name)
            continue
        if type_name == "mxfp4_moe":
            wanted = "MXFP4" if len(m.shape) > 2 else "Q8_0"
        else:
            wanted = _wanted(type_name, m.name, head, places.get(m.name), query_groups)
        chosen[m.name] = Choice(_fitting(wanted, m.shape[-1]), wanted)
    if unused:
        raise ValueError(f"keep {sorted(unused)[0]!r}: no matrix of the file has such a name")
    return chosen


class _Place(NamedTuple):
    """Where a matrix stands among those of its kind, from first to last layer."""

    kind: str  # "attn_v"
    i: int
    n: int

    @property
    def first(self) -> bool:
        return self.i < self.n // 8

    @property
    def matters(self) -> bool:
        """First and last eighth, and every third between: a mix's better half."""
        eighth = self.n // 8
        return self.first or self.i >= 7 * self.n // 8 or (self.i - eighth) % 3 == 2


def _places(names: Sequence[str]) -> dict[str, _Place]:
    kinds: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = re.fullmatch(r"(?:enc\.|dec\.)?blk\.(\d+)\.(\w+?)(?:_exps)?\.weight", name)
        if match is not None:
            kinds.setdefault(match[2], []).append((int(match[1]), name))
    return {
        name: _Place(kind, i, len(found))
        for kind, found in kinds.items()
        for i, (_, name) in enumerate(sorted(found))
    }


def _wanted(type_name: str, name: str, head: str, place: _Place | None, groups: int) -> str:
    """The name of the format that the mix gives a matrix."""
    base = _FILE_TYPES[type_name][1]
    if base in ("F32", "F16", "BF16", "Q8_0"):
        return base
    if name == head:
        return "F16" if type_name in TERNARY else "Q6_K"
    if name == "token_embd.weight" and type_name in TERNARY:
        return "F16"
    if place is None:
        return base
    by_kind = {"attn_v": _values, "attn_qkv": _fused, "attn_output": _back, "ffn_down": _down}
    find = by_kind.get(place.kind)
    return (find(type_name, place, groups) if find is not None else None) or base


def _values(type_name: str, place: _Place, groups: int) -> str | None:
    if type_name == "q2_k":
        return "Q4_K" if groups >= 4 else "Q3_K"
    if type_name == "q3_k_m":
        return "Q5_K" if place.i < 2 else "Q4_K"
    if type_name == "q4_k_s":
        return "Q5_K" if place.i < 4 else None
    if type_name in ("q4_k_m", "q5_k_m"):
        return "Q6_K" if place.matters else None
    if type_name in LISTED:
        return "Q5_K" if groups >= 4 else None
    return {"q3_k_l": "Q5_K"}.get(type_name)


def _fused(type_name: str, place: _Place, groups: int) -> str | None:
    return {"q3_k_m": "Q4_K", "q3_k_l": "Q4_K", "q4_k_m": "Q5_K", "q5_k_m": "Q6_K"}.get(type_name)


def _back(type_name: str, place: _Place, groups: int) -> str | None:
    return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(type_name)


def _down(type_name: str, place: _Place, groups: int) -> str | None:
    if type_name == "q3_k_m":
        return "Q5_K" if place.i < place.n // 16 else "Q4_K"
    if type_name == "q4_k_s" or type_name in LISTED:
        return "Q5_K" if place.first else None
    if type_name in ("q4_k_m", "q5_k_m"):
        return "Q6_K" if place.matters else None
    return {"q2_k": "Q3_K", "q3_k_l": "Q5_K"}.get(type_name)


def _fitting(wanted: str, n_cols: int) -> Format:
    known = formats()
    for name in (wanted, _NARROW.get(wanted, wanted)):
        if n_cols % known[name].n_values == 0:
            return known[name]
    return known["F16"]
