"""Makes the golden models: tiny random ones built with `transformers`, and what they answer.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 gguf safetensors numpy
    python tests/golden/make.py [NAME ...]            writes the files beside this one
    python tests/golden/make.py [NAME ...] --check    makes them anew and compares

The cases stand in cases/, one module per family with a list CASES; tests/goldens.py says what the
files hold and makes the weights.  A case's folder is loaded by `transformers` as any checkpoint is,
so that the names are those of published models.

Weights are scaled so that every step matters: attention far from uniform, norms and biases random.
--check wants the same descriptions and logits within 1e-5 of their deviation: torch's sums differ
in their last bits from machine to machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from case import Case, centred_norms  # first: it finds the tests' own folder
from goldens import HERE, write_folder
from safetensors import safe_open

N_ROWS, N_BROKEN = 40, 6

# Mean and deviation of a tensor by its name; None: `gain` / sqrt(inputs), gain given after it.
SCALES: tuple[tuple[str, float, float | None, float], ...] = (
    (r".*norm\d?\.weight|.*(?:ln_\w+|LayerNorm)\.weight", 1.0, 0.25, 0),
    (r".*(?:o_proj|dense|down_proj|fc2|c_proj)\.bias", 0.0, 0.2, 0),
    (r".*\.bias", 0.0, 0.5, 0),
    (r".*(?:embed_tokens|wte|embed_in|word_embeddings)\.weight", 0.0, 0.35, 0),
    (r"(?:.*\.)?(?:lm_head|embed_out)\.weight", 0.0, None, 3.0),
    (r".*(?:q_proj|k_proj|gate_proj|up_proj|fc1)\.weight", 0.0, None, 1.4),
    (r".*", 0.0, None, 1.0),
)


def scale(case: Case, name: str, shape: list[int]) -> tuple[float, float]:
    for pattern, (mean, deviation) in case.scales.items():
        if re.fullmatch(pattern, name):
            return mean, deviation
    row = next(row for row in SCALES if re.fullmatch(row[0], name))
    _, mean, deviation, gain = row
    return mean, gain * shape[-1] ** -0.5 if deviation is None else deviation


def describe(case: Case, folder: Path) -> dict[str, Any]:
    """The committed description, from the checkpoint that `transformers` saves."""
    torch.manual_seed(0)
    case.model(case.config).save_pretrained(folder)
    tensors = {}
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        for name in sorted(file.keys()):
            shape = file.get_slice(name).get_shape()
            mean, deviation = scale(case, name, shape)
            tensors[name] = [shape, mean, round(deviation, 6)]
    return {
        "architecture": case.arch,
        "kind": case.kind,
        "tokenizer": case.tokenizer,
        "subtle": list(case.subtle),
        "config": json.loads((folder / "config.json").read_text(encoding="utf-8")),
        "tensors": tensors,
    }


def load(case: Case, folder: Path) -> Any:
    """The model in float64 with the folder's weights, all of them and nothing else."""
    model, told = case.model.from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    wrong = {key: value for key, value in told.items() if value}
    if wrong:
        raise RuntimeError(f"{case.name}: {wrong}")
    return model.eval()


def answers(case: Case, model: Any) -> dict[str, np.ndarray]:
    seed = int.from_bytes(case.name.encode(), "little")
    ids = np.random.default_rng(seed).integers(4, model.config.vocab_size, case.n_ids)
    # The first, both sides of every page and chunk, the last, and some between.
    n = case.n_ids
    fixed = {0, 1, 2, 63, 64, 65, 127, 128, 191, 192, 254, 255, 256, 257}
    fixed = {i for i in fixed | set(range(n - N_BROKEN, n)) if i < n}
    more = [int(i) for i in np.linspace(3, n - 10, N_ROWS) if int(i) not in fixed]
    rows = np.array(sorted([*fixed, *more[: N_ROWS - len(fixed)]]), dtype=np.int32)
    right = case.answer(model, ids)
    spread = right.std()
    arrays = {"ids": ids.astype(np.int32), "rows": rows, "logits": right[rows].astype(np.float32)}
    steps = case.broken(model)
    kinds = {type(module).__name__ for module in model.modules()}
    if case.kind == "decoder" and any(kind.endswith("RMSNorm") for kind in kinds):
        steps.setdefault("layer norm", centred_norms(model))
    for step, patched in steps.items():
        with patched:
            wrong = case.answer(model, ids)[-N_BROKEN:]
        off = np.abs(wrong - right[-N_BROKEN:]).max() / spread
        print(f"{case.name}: without {step}: {off:.2g} deviations off")
        arrays[f"broken: {step}"] = wrong.astype(np.float32)
    if not np.array_equal(case.answer(model, ids), right):
        raise RuntimeError(f"{case.name}: a broken step was not mended")
    return arrays


def differences(case: Case, spec: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[str]:
    """What the committed files of a case differ in from new ones."""
    problems = []
    path = HERE / f"{case.name}.json"
    if not path.exists() or json.loads(path.read_text(encoding="utf-8")) != spec:
        return [f"{path.name} is not what this script makes"]
    were = dict(np.load(HERE / f"{case.name}.npz"))
    if list(were) != list(arrays):
        return [f"{case.name}.npz: {sorted(set(were) ^ set(arrays))} are not in both"]
    for key, array in arrays.items():
        off = np.abs(were[key].astype(float) - array).max()
        limit = 0 if key in ("ids", "rows") else 1e-5 * were["logits"].std()
        if not off <= limit:
            problems.append(f"{case.name}.npz: {key} differs by {off:g}; allowed is {limit:g}")
    return problems


def write(case: Case, spec: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    lines = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in spec["tensors"].items()]
    head = json.dumps({k: v for k, v in spec.items() if k != "tensors"}, indent=1)
    body = ",\n".join(lines)
    text = f'{head[:-2]},\n "tensors": {{\n{body}\n }}\n}}\n'
    (HERE / f"{case.name}.json").write_text(text, encoding="utf-8")
    np.savez_compressed(HERE / f"{case.name}.npz", **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", metavar="NAME", nargs="*", help="cases; all where none is given")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    modules = sorted(path.stem for path in (HERE / "cases").glob("*.py"))
    cases = [c for m in modules for c in importlib.import_module(f"cases.{m}").CASES]
    by_name = {case.name: case for case in cases}
    unknown = set(options.names) - set(by_name)
    if unknown or len(by_name) < len(cases):
        sys.exit(f"no such cases: {sorted(unknown)}" if unknown else "two cases share a name")
    problems = []
    if not options.names:
        stray = {path.stem for path in HERE.glob("*.json")} ^ set(by_name)
        if options.check:
            problems += [f"{name}: only one of case and files is there" for name in sorted(stray)]
    for case in (by_name[name] for name in options.names or by_name):
        with tempfile.TemporaryDirectory() as name:
            spec = describe(case, Path(name) / "random")
            model = load(case, write_folder(spec, case.name, Path(name) / "filled"))
            arrays = answers(case, model)
        if options.check:
            problems += differences(case, spec, arrays)
        else:
            write(case, spec, arrays)
    if options.check:
        print("\n".join(problems) or "the golden files are what this script makes")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
