"""Every step that a row of csrc/arch.c declares, left out in turn: the row's goldens must miss it.

    cmake -S . -B BUILD -DSMALLM_TESTS=ON && cmake --build BUILD --target sm_static
    python tests/left_out.py BUILD [ROW ...]

For each field of a row the table gets a further row, without it; for a kind, one for each other
kind.  A library with these rows, beside an installed smallm's Python, then runs the row's goldens
under the new rows' names.  A row that answers as before in all of them is an error: either a golden
cannot tell, or the field says nothing.  A file that is refused is noticed, too; a copy of the row
as it is must answer rightly.

Fields that stand for what older files lack are tried in files without it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import architectures
import goldens
import numpy as np
from architectures import ROOT, Row

EXACT, LEAST = 1e-4, 3e-4  # deviations: what the tests allow, and what must be missed
# What a file may say before the row does, or must have by it: keys and tensors to be dropped.
ABSENT = {
    "window": "attention.sliding_window",
    "window_period": "attention.sliding_window_pattern",
    "window_later": "attention.sliding_window_pattern",
    "local_base": "rope.freq_base_swa",
    "attn_cap": "attn_logit_softcapping",
    "logit_cap": "final_logit_softcapping",
    "max_alibi": "attention.max_alibi_bias",
    "wide_layers": "attention.scale",
    "unscaled": "attention.scale",
    "scaled_embeddings": "embedding_scale",
    "named_scales": "embedding_scale",
    "scaled_head": "logit_scale",
    "router": "expert_weights_norm",
    "ffn": "hidden_activation",
    "bias": r"(?!.*norm).*\.bias",
}
# Keys that only some files have, and then a row decides whether they are read.
PRESENT = {"rope_by_key": {"rope.scaling.finetuned": False}}
# What rows have that do not say.
USUAL = {"rope": "SM_ROPE_PAIRS", "norm": "SM_NORM_RMS", "ffn": "SM_FFN_SWIGLU"}
BARE = {"mamba2": {"norm": "SM_NORM_RMS"}}  # neither attention nor feed-forward


def kinds() -> dict[str, list[str]]:
    """The values of each of struct sm_arch's enums, by field."""
    text = (ROOT / "csrc" / "arch.h").read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    values = {
        name: re.findall(r"SM_\w+", body)
        for name, body in re.findall(r"enum (\w+) \{(.*?)\}", text, re.S)
    }
    (struct,) = re.findall(r"struct sm_arch \{(.*?)\n\};", text, re.S)
    return {field: values[name] for name, field in re.findall(r"enum (\w+) (\w+);", struct)}


def changes(row: Row) -> Iterator[tuple[str, str]]:
    """Fields of a row and what they are changed to."""
    # The rule of biases says no more than which of them a file must have; kinds of parallel blocks
    # differ in where their norms are, which tensors say.
    others = {"bias": ["SM_BIAS_FREE"], "parallel": ["SM_PARALLEL_NO"]}
    for field, value in (BARE.get(row.name, USUAL) | row.fields).items():
        if field == "wide_layers":  # models of another depth: let it be the golden's
            others[field] = [str(of(row.name)[0].spec["config"]["num_hidden_layers"])]
        for other in others.get(field) or kinds().get(field, ["0"]):
            if other != value:
                yield field, other


@cache
def of(row: str) -> list[goldens.Golden]:
    """The goldens of a row, not built."""
    every = [n for kind in ("decoder", "encoder", "encoder-decoder") for n in goldens.names(kind)]
    return [golden for golden in map(goldens.Golden, every) if golden.arch == row]


def build(folder: Path, objects: Path, table: list[tuple[str, Row, str, str]]) -> None:
    """A package `smallm` in `folder` whose library has the changed rows, too."""
    import smallm

    package = Path(smallm.__file__).parent
    shutil.copytree(package, folder / "smallm")
    lines = []
    for name, row, field, value in table:
        fields = row.fields | ({field: value} if field else {})
        body = "".join(f", .{key} = {what}" for key, what in fields.items())
        lines.append(f'    {{.name = "{name}", .models = ""{body}}},\n')
    source = (ROOT / "csrc" / "arch.c").read_text(encoding="utf-8")
    begin = source.index("sm_arch archs[]")
    at = source.index("\n};\n", begin) + 1
    (folder / "arch.c").write_text(source[:at] + "".join(lines) + source[at:], encoding="utf-8")
    flags = ["-std=c11", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'include'}", "-I."]
    subprocess.run(["cc", *flags, "-c", "arch.c"], cwd=folder, check=True)
    # The first definition of a symbol is taken: the new table's.
    link = ["-shared", "-pthread", "-Wl,--allow-multiple-definition", "-Wl,--whole-archive"]
    library = folder / "smallm" / "libsmallm.so"
    subprocess.run(
        ["cc", *link, "arch.o", objects, "-Wl,--no-whole-archive", "-lm", "-o", library],
        cwd=folder,
        check=True,
    )


def answer(golden: goldens.Golden, path: Path, ids: list[int]) -> np.ndarray | None:
    """Logits or vectors [n, ...]; None: the file is refused."""
    import smallm

    rows = golden.rows + len(ids) - len(golden.ids)
    try:
        with smallm.load(path, threads=2, kv="f32") as model:
            if golden.spec["kind"] != "encoder":
                return goldens.ask(model, ids)[rows]
            texts = [ids[: row + 1] for row in rows]
            return model.embed(texts, normalize=False)
    except smallm.SmallmError:
        return None


def rename(golden: goldens.Golden, path: Path, name: str, field: str | None) -> Path:
    """The golden's file as one of another row, and changed so that a field matters."""
    import tiny

    keys, tensors = golden.read()
    dropped = re.compile(ABSENT.get(field or "", "$"))
    prefix, written = f"{golden.arch}.", {}
    for key, value in keys.items():
        own = key.removeprefix(prefix)
        if own == key or not dropped.fullmatch(own):
            written[key if own == key else f"{name}.{own}"] = value
    if field == "window":
        written[f"{name}.context_length"] = tiny.u32(8192)
    for key, value in PRESENT.get(field or "", {}).items():
        written[f"{name}.{key}"] = tiny.as_kv(value)
    tensors = {key: t for key, t in tensors.items() if not dropped.fullmatch(key)}
    tiny._write(path, name, written, tensors)
    return path


def compare(golden: goldens.Golden, name: str, field: str, folder: Path) -> float:
    """How far the changed row's answers are off; inf: only one of the two refuses the file."""
    most, path = 0.0, folder / "m.gguf"
    for changed in (None, field) if field in ABSENT | PRESENT else (None,):
        ids = golden.ids
        if changed == "window":  # rows have those of published models
            ids = (ids * 20)[: 4096 + len(ids)]
        right: np.ndarray | None = golden.logits
        if changed is not None:
            right = answer(golden, rename(golden, path, golden.arch, changed), ids)
        got = answer(golden, rename(golden, path, name, changed), ids)
        if (got is None) != (right is None):
            return float("inf")
        if got is not None and right is not None:
            most = max(most, float(np.abs(got - right).max() / golden.logits.std()))
    return most


def forked(call: Callable[[], float]) -> float:
    """What a call gives in a process of its own: inf, too, where a row that cannot be ends it."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, repr(call()).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.wait()
    return float(text or "inf")


def main() -> None:
    objects = Path(sys.argv[1]).resolve() / "libsm_static.a"
    rows = [row for row in architectures.rows() if row.name in sys.argv[2:] or not sys.argv[2:]]
    table = [
        (f"{row.name}~{i}", row, field, value)
        for row in rows
        for i, (field, value) in enumerate([("", ""), *changes(row)])
    ]
    n_wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, objects, table)
        sys.path.insert(0, str(folder))
        for module in [m for m in sys.modules if m.split(".")[0] == "smallm"]:
            del sys.modules[module]
        for row in rows:
            of_row = [goldens.Golden(golden.name, folder) for golden in of(row.name)]
            for changed, _, field, value in (entry for entry in table if entry[1] is row):
                off = 0.0
                for golden in of_row:
                    if not field or off <= LEAST:
                        found = forked(partial(compare, golden, changed, field, folder))
                        off = max(off, found)
                wrong = off < LEAST if field else not 0 < off < EXACT
                n_wrong += wrong
                told = "refused" if off == float("inf") else f"{off:.2g} deviations off"
                step = f"{field} = {value}" if field else "as it is"
                print(f"{row.name}: {step}: {'WRONG, ' * wrong}{told}", flush=True)
    print(f"{len(table) - len(rows)} changes of {len(rows)} rows, {n_wrong} wrong")
    sys.exit(n_wrong > 0)


if __name__ == "__main__":
    main()
