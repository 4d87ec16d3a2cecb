"""smallm.quantize: files in other formats, and how near the numbers stay."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType as GgmlType
from goldens import Golden
from test_cli import one_line

import smallm
from smallm.quantize import TYPES, quantize, read_importance
from smallm.quantize._formats import formats, rewrite

WRITABLE = [name for name, f in formats().items() if f.writable]
BLOCKS = [name for name in WRITABLE if formats()[name].n_values > 1]


def numbers(n_rows: int = 16, n_cols: int = 512) -> np.ndarray:
    """Sums of six uniform numbers, the same everywhere: float32 [n_rows, n_cols]."""
    x = np.random.default_rng(7).integers(-(1 << 20), 1 << 20, (6, n_rows, n_cols)).sum(0)
    return (x * 2.0**-24).astype(np.float32)


def written(x: np.ndarray, name: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and values of x in the format."""
    known = formats()
    data = rewrite(x, known["F32"], known[name], x.shape[1], **options)
    stored = data.view({"F32": np.float32, "F16": np.float16}.get(name, np.uint8))
    return data, gguf.quants.dequantize(stored, GgmlType[name]).reshape(x.shape)


def loss(x: np.ndarray, values: np.ndarray, weights: Any = 1) -> float:
    return float((weights * (values.astype(np.float64) - x) ** 2).sum())


# ---- numbers -------------------------------------------------------------------------------------

IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
FP4 = [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12]


def least_loss_of_a_scale(x: np.ndarray, steps: np.ndarray) -> float:
    """Of all scales and codes for x [n]: every change of a code is a place to look between."""
    middles = (steps[1:] + steps[:-1]) / 2
    ids = np.unique((middles[None] / x[x != 0][:, None]).ravel())
    ids = np.concatenate([ids[:1] - 1, (ids[1:] + ids[:-1]) / 2, ids[-1:] + 1])
    q = steps[np.searchsorted(middles, x[None] * ids[:, None])]
    qq = (q * q).sum(1)
    gain = np.divide((q @ x) ** 2, qq, out=np.zeros(len(ids)), where=qq > 0)
    return float(x @ x - gain.max())


def least_loss_of_a_line(x: np.ndarray, top: int, below: bool) -> float:
    """Of many lines to 0 .. top, each with the codes next to it and then that of least squares."""
    low, high = min(x.min(), 0 if below else x.min()), x.max()
    inset = np.linspace(-0.05, 0.45, 60) * (high - low)
    m, end = (v.ravel() for v in np.meshgrid(low + inset, high - inset))
    d = np.maximum(end - m, 1e-6) / top
    if below:
        m = np.minimum(m, 0)
    for _ in range(3):
        q = np.clip(np.rint((x - m[:, None]) / d[:, None]), 0, top)
        sq, sqq, sxq, n, sx = q.sum(1), (q * q).sum(1), q @ x, len(x), x.sum()
        det = np.maximum(n * sqq - sq * sq, 1e-12)
        d, m = (n * sxq - sx * sq) / det, (sqq * sx - sq * sxq) / det
        if below:
            d, m = np.where(m > 0, sxq / np.maximum(sqq, 1e-12), d), np.minimum(m, 0)
        d = np.maximum(d, 1e-9)
    losses = ((x - d[:, None] * q - m[:, None]) ** 2).sum(1)
    return float(losses.min())


# How near the losses come to the least that there are with scales (and mins) of any value for each
# sub-block; those of K-quants have 4 (Q2_K), 6 or 8 (Q6_K) bits.  Values of a sub-block, and codes.
WITHIN: dict[str, tuple[float, int, Any]] = {
    "Q4_0": (1.01, 32, range(-8, 8)),
    "Q5_0": (1.01, 32, range(-16, 16)),
    "IQ4_NL": (1.01, 32, IQ4),
    "TQ1_0": (1.001, 256, range(-1, 2)),
    "TQ2_0": (1.001, 256, range(-1, 2)),
    "Q3_K": (1.02, 16, range(-4, 4)),
    "Q6_K": (1.12, 16, range(-32, 32)),
    "IQ4_XS": (1.04, 32, IQ4),
    "Q4_1": (1.08, 32, 15),
    "Q5_1": (1.05, 32, 31),
    "Q2_K": (1.08, 16, -3),
    "Q4_K": (1.06, 32, -15),
    "Q5_K": (1.12, 32, -31),
}


@pytest.mark.parametrize("name", WITHIN)
def test_errors_are_near_the_least_there_are(name: str) -> None:
    x = numbers(2)
    factor, n, codes = WITHIN[name]
    least = 0.0
    for block in x.astype(np.float64).reshape(-1, n):
        if isinstance(codes, int):
            least += least_loss_of_a_line(block, abs(codes), codes < 0)
        else:
            least += least_loss_of_a_scale(block, np.array(codes, np.float64))
    assert loss(x, written(x, name)[1]) < factor * least
    assert not loss(0 * x, written(0 * x, name)[1])


def test_powers_of_two_are_the_best_there_are() -> None:
    x, steps = numbers(4), np.array(FP4)
    blocks = x.astype(np.float64).reshape(-1, 32)
    least = np.full(len(blocks), np.inf)
    for e in range(-20, 5):
        near = np.abs(blocks[..., None] / 2.0**e - steps).argmin(-1)
        least = np.minimum(least, ((blocks - steps[near] * 2.0**e) ** 2).sum(1))
    assert np.isclose(loss(x, written(x, "MXFP4")[1]), least.sum(), rtol=1e-6)


PLAIN = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]


@pytest.mark.parametrize("name", PLAIN)
def test_errors_are_below_those_of_plain_rounding(name: str) -> None:
    x = numbers()
    plain = gguf.quants.quantize(x, GgmlType[name])
    assert loss(x, written(x, name)[1]) < loss(x, gguf.quants.dequantize(plain, GgmlType[name]))


def test_floats_are_rounded_to_the_nearest() -> None:
    x = numbers()
    x[0, :8] = [0, -0.0, 1e-8, -6e-8, 65504, 65519, 1.0009765, 1.00048828125]
    assert np.array_equal(written(x, "F32")[1], x)
    assert np.array_equal(written(x, "F16")[0].view(np.float16), x.astype(np.float16))
    expected = gguf.quants.quantize(x, GgmlType.BF16)
    assert np.array_equal(written(x, "BF16")[0], expected.view(np.uint8).reshape(len(x), -1))


# The 32-wide formats' grids can be found again; those of 256 have scales of scales.
@pytest.mark.parametrize("name", [*PLAIN, "IQ4_NL"])
def test_what_is_on_the_grid_stays(name: str) -> None:
    _, once = written(numbers(), name)
    _, twice = written(once.astype(np.float32), name)
    assert loss(once, twice) < 1e-5 * loss(once, 0 * once)


@pytest.mark.parametrize("name", BLOCKS)
def test_ternary_numbers_are_exact_where_a_format_can(name: str) -> None:
    x = np.float32(0.03125) * np.random.default_rng(1).integers(-1, 2, (4, 256)).astype(np.float32)
    _, values = written(x, name)
    if name in ("TQ1_0", "TQ2_0", "MXFP4"):
        assert np.array_equal(values, x)
    else:
        assert np.abs(values - x).max() < 0.004


@pytest.mark.parametrize("name", BLOCKS)
def test_importance_moves_errors_to_where_they_do_not_matter(name: str) -> None:
    if name in ("Q8_0", "MXFP4"):
        pytest.skip("there is nothing, or next to nothing, to choose")
    x = numbers()
    weights = np.where(np.arange(x.shape[1]) % 3 == 0, 9, 0.2).astype(np.float32)
    _, plain = written(x, name)
    _, weighted = written(x, name, importance=weights)
    assert loss(x, weighted, weights) < 0.99 * loss(x, plain, weights)
    assert np.array_equal(written(x, name, importance=0 * weights)[1], plain)
    assert np.array_equal(written(x, name, importance=weights * 1024)[1], weighted)


DIGEST = "176fdbed139038b0025ee6e52d5d87dbcda7d59bd4d2f18dcb56b4bb8b3c3ca4"


def test_the_bytes_are_the_same_everywhere_and_for_all_threads() -> None:
    x = numbers(37)
    weights = 1 + np.arange(512, dtype=np.float32) % 7
    digests = []
    for threads in (1, 2, 5):
        digest = hashlib.sha256()
        for name in BLOCKS:
            digest.update(written(x, name, threads=threads)[0])
            digest.update(written(x, name, threads=threads, importance=weights)[0])
        digests.append(digest.hexdigest())
    assert digests == [DIGEST] * 3


@pytest.mark.parametrize("name", BLOCKS)
def test_any_magnitude(name: str) -> None:
    """Tiny numbers vanish or are met; the largest that fit are, and larger ones are refused."""
    rng = np.random.default_rng(3)
    for exponent in (-149, -60, -41, -30, -24, -14, 0, 13):
        x = np.ldexp(rng.standard_normal((2, 256)), exponent).astype(np.float32)
        _, values = written(x, name)
        assert np.isfinite(values).all()
        # What half a unit of the smallest float16, as a scale of codes below 32, may cost.
        assert loss(x, values) <= 1.0001 * loss(x, 0 * x) + x.size * (31 * 2.0**-25) ** 2
    for value in (3e38,) if name == "MXFP4" else (1e9, 3e38):
        x = numbers()
        x[3, 300] = -value
        with pytest.raises(smallm.UnsupportedModelError, match="row 3, column 300: the value -"):
            written(x, name)
    for value in (np.inf, np.nan):
        x[5, 17], x[9, 1] = value, np.nan
        x[3, 300] = 0
        with pytest.raises(smallm.CorruptModelError, match="row 5, column 17: the value is"):
            written(x, name, threads=2)


def test_float16_has_an_end() -> None:
    x = numbers()
    x[1, 2] = 65520
    with pytest.raises(smallm.UnsupportedModelError, match=r"row 1, column 2.*65520.*F16"):
        written(x, "F16")
    x[1, 2] = np.nan
    with pytest.raises(smallm.CorruptModelError, match="row 1, column 2"):
        written(x, "BF16")


def test_arguments_of_the_c_function() -> None:
    x, known = numbers(), formats()
    with pytest.raises(ValueError, match="importance"):
        written(x, "Q4_0", importance=np.ones(511, np.float32))
    for bad in (-1, np.nan, np.inf):
        weights = np.ones(512, np.float32)
        weights[7] = bad
        with pytest.raises(ValueError, match=r"importance\[7\]"):
            written(x, "Q4_0", importance=weights)
    with pytest.raises(ValueError, match=r"n_cols is 32.*Q4_K.*256"):
        rewrite(x, known["F32"], known["Q4_K"], 32)
    with pytest.raises(ValueError, match="n_threads"):
        written(x, "Q4_0", threads=999)
    with pytest.raises(ValueError, match="bytes"):
        rewrite(x.reshape(-1)[:-1], known["F32"], known["Q4_0"], 512)
    with pytest.raises(smallm.UnsupportedModelError, match="77"):
        rewrite(x, known["F32"], known["Q4_0"]._replace(id=77), 512)


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that K-quants can hold, float16, with a head of its own."""
    path = tmp_path_factory.mktemp("quantize") / "wide.gguf"
    tiny.write_tiny(path, n_embd=256, n_ff=512, n_layer=4, n_head=8, types="F16", tied=False)
    return path


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "narrow.gguf"
    tiny.write_tiny(path, n_embd=96, n_ff=256, types="F32")
    return path


def types_of(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("type_name", TYPES)
def test_each_type_runs_and_keeps_what_the_file_says(
    wide: Path, tmp_path: Path, type_name: str
) -> None:
    made = quantize(wide, tmp_path / "out.gguf", type_name, threads=2, progress=False)
    old, new = gguf.GGUFReader(wide), gguf.GGUFReader(made.path)
    kept = {n: f.contents() for n, f in old.fields.items() if not n.startswith("GGUF.")}
    found = {n: f.contents() for n, f in new.fields.items() if not n.startswith("GGUF.")}
    name = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}.get(
        type_name, f"MOSTLY_{type_name.upper()}"
    )
    kept["general.file_type"] = int(gguf.LlamaFileType[name])
    kept["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    assert found == kept
    assert made.size == made.path.stat().st_size and not made.narrow
    kinds = types_of(made.path)
    assert {k: list(kinds.values()).count(k) for k in made.tensors} == made.tensors
    assert kinds["blk.1.ffn_gate.weight"] == {
        "mxfp4": "MXFP4", "mxfp4_moe": "Q8_0", "tq1_0": "TQ1_0", "tq2_0": "TQ2_0",
        "iq4_nl": "IQ4_NL", "iq4_xs": "IQ4_XS",
    }.get(type_name, type_name.upper()[:4].rstrip("_"))  # fmt: skip
    for o, n in zip(old.tensors, new.tensors, strict=True):
        assert (o.name, tuple(o.shape)) == (n.name, tuple(n.shape))
        if n.tensor_type == o.tensor_type:
            assert np.array_equal(o.data, n.data)
    ids = list(range(5, 40))
    with smallm.load(wide, threads=2) as model:
        expected = model.logits(ids)
    with smallm.load(made.path, threads=2) as model:
        off = model.logits(ids) - expected
    # Of what this model's logits vary by, which its weights move a lot: about twice with each bit.
    # MXFP4's values and scales are powers of two or next to them: it is between 3 and 4 bits.
    allowed = {"f": 0.001, "b": 0.02, "8": 0.08, "6": 0.18, "5": 0.36, "4": 0.7, "3": 1.0, "2": 1.3}
    error = np.sqrt(np.mean(off**2)) / expected.std()
    kind = {"mxfp4_moe": "8", "mxfp4": "q3"}.get(type_name, type_name.removeprefix("i"))
    assert error < allowed.get(kind[0 if kind[0] in "fb8" else 1], 1.5)


def assert_llama_cpp_agrees(path: Path, ids: list[int]) -> None:
    """Its logits are near ours: it rounds activations to 8 bits, too, but others of them."""
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="the package llama-cpp-python is not installed"
    )
    other = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    other.eval(ids)
    with smallm.load(path, threads=1) as model:
        expected = model.logits(ids)
    off = np.array(other.scores[: len(ids)]) - expected
    error = np.sqrt(np.mean(off**2)) / expected.std()
    assert error < 0.06, path


@pytest.mark.parametrize("type_name", TYPES)
def test_llama_cpp_reads_each_type(wide: Path, tmp_path: Path, type_name: str) -> None:
    path = quantize(wide, tmp_path / type_name, type_name, progress=False).path
    assert_llama_cpp_agrees(path, list(range(5, 40)))


def test_llama_cpp_reads_experts_in_mxfp4(tmp_path: Path) -> None:
    golden = Golden("qwen2moe", tmp_path)
    path = quantize(golden.path, tmp_path / "o", "mxfp4_moe", progress=False).path
    assert "MXFP4" in types_of(path).values()
    assert_llama_cpp_agrees(path, golden.ids[:40])


MIXES = {
    "q2_k": {"Q2_K", "Q3_K", "Q4_K", "Q6_K"},
    "q3_k_s": {"Q3_K", "Q6_K"},
    "q3_k_m": {"Q3_K", "Q4_K", "Q5_K", "Q6_K"},
    "q3_k_l": {"Q3_K", "Q5_K", "Q6_K"},
    "q4_k_s": {"Q4_K", "Q5_K", "Q6_K"},
    "q4_k_m": {"Q4_K", "Q6_K"},
    "q5_k_s": {"Q5_K", "Q6_K"},
    "q5_k_m": {"Q5_K", "Q6_K"},
    "iq4_nl": {"IQ4_NL", "Q5_K", "Q6_K"},
    "iq4_xs": {"IQ4_XS", "Q5_K", "Q6_K"},
    "mxfp4": {"MXFP4", "Q6_K"},
}


@pytest.mark.parametrize("type_name", MIXES)
def test_mixes(wide: Path, tmp_path: Path, type_name: str) -> None:
    path = quantize(wide, tmp_path / "out.gguf", type_name, progress=False).path
    kinds = types_of(path)
    assert kinds["output.weight"] == "Q6_K" and kinds["output_norm.weight"] == "F32"
    used = set(kinds.values()) - {"F32"}
    assert used <= MIXES[type_name] and len(used) >= min(2, len(MIXES[type_name]))


def test_rows_that_no_256_divides_get_a_format_of_their_kind(narrow: Path, tmp_path: Path) -> None:
    made = quantize(narrow, tmp_path / "out.gguf", "q4_k_m", progress=False)
    kinds = types_of(made.path)
    assert kinds["blk.0.attn_q.weight"] == "IQ4_NL" and kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"][-2:] == "_K"
    assert made.narrow["IQ4_NL for Q4_K"] == list(kinds.values()).count("IQ4_NL")
    with smallm.load(made.path, threads=1) as model:
        assert np.isfinite(model.logits([5, 6, 7])).all()
    made = quantize(narrow, tmp_path / "out.gguf", "iq4_xs", progress=False)
    assert types_of(made.path)["blk.0.attn_q.weight"] == "IQ4_NL"


def test_keep(narrow: Path, tmp_path: Path) -> None:
    keep = ["blk.1.attn_?.weight=bf16", "*.attn_v.*=q8_0", "*.attn_q.*=Q5_1"]
    kinds = types_of(quantize(narrow, tmp_path / "o", "q4_0", keep=keep, progress=False).path)
    assert [kinds[f"blk.{i}.attn_v.weight"] for i in (0, 1)] == ["Q8_0", "BF16"]
    assert [kinds[f"blk.{i}.attn_q.weight"] for i in (0, 1)] == ["Q5_1", "BF16"]
    for rule, words in {
        "output": "PATTERN=TYPE",
        "=q4_0": "PATTERN=TYPE",
        "*=q9_9": "q9_9.*q8_0",
        "*.attn_q.*=q4_k": "attn_q.weight has rows of 96 values; those of Q4_K are multiples",
        "nothing=q8_0": "nothing.*no matrix",
    }.items():
        with pytest.raises(ValueError, match=words):
            quantize(narrow, tmp_path / "o2", "q4_0", keep=[rule], progress=False)
    assert not (tmp_path / "o2").exists()


def test_threads_and_pieces_change_nothing(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = quantize(wide, tmp_path / "a", "q4_k_m", threads=1, progress=False).path.read_bytes()
    monkeypatch.setattr("smallm.quantize._quantize.PIECE_VALUES", 3000)
    assert quantize(wide, tmp_path / "b", "q4_k_m", threads=3).path.read_bytes() == one


# ---- importance ----------------------------------------------------------------------------------


def write_imatrix(path: Path, entries: dict[str, np.ndarray], counts: float = 4) -> None:
    """GGUF, as llama.cpp writes it.  entries: [n_experts, n_cols]."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    for name, values in entries.items():
        writer.add_tensor(name + ".in_sum2", values.astype(np.float32) * np.float32(counts))
        writer.add_tensor(name + ".counts", np.full((len(values), 1), counts, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_old_imatrix(path: Path, entries: dict[str, np.ndarray], calls: int = 3) -> None:
    with open(path, "wb") as file:
        file.write(struct.pack("<i", len(entries)))
        for name, values in entries.items():
            file.write(struct.pack("<i", len(name)) + name.encode())
            file.write(struct.pack("<ii", calls, values.size))
            file.write((values * calls).astype("<f4").tobytes())
        file.write(struct.pack("<ii", 7, 4) + b"text")


@pytest.mark.parametrize("write", [write_imatrix, write_old_imatrix])
def test_importance_of_a_file(wide: Path, tmp_path: Path, write: Any) -> None:
    name = "blk.2.ffn_down.weight"
    weights = np.where(np.arange(512) % 4 == 0, 5, 0.1).astype(np.float32)
    write(tmp_path / "i", {name: weights[None]})
    assert np.allclose(read_importance(tmp_path / "i")[name], weights)
    source = {t.name: t for t in gguf.GGUFReader(wide).tensors}[name].data.astype(np.float32)
    errors = []
    for imatrix in (None, tmp_path / "i"):
        made = quantize(wide, tmp_path / "o", "q4_k_s", imatrix=imatrix, progress=False)
        tensor = {t.name: t for t in gguf.GGUFReader(made.path).tensors}[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        errors.append(loss(source, values, weights))
    assert errors[1] < 0.9 * errors[0]


def write_experts(path: Path) -> tuple[str, np.ndarray]:
    """A matrix of three experts, and a plain one."""
    name = "blk.0.ffn_down_exps.weight"
    x = numbers(3 * 8, 64).reshape(3, 8, 64)
    writer = gguf.GGUFWriter(path, "x")
    writer.add_tensor(name, x)
    writer.add_tensor("blk.0.attn_q.weight", x[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return name, x


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    name, x = write_experts(tmp_path / "m.gguf")
    made = quantize(tmp_path / "m.gguf", tmp_path / "o", "MXFP4_MOE", progress=False)
    tensors = {t.name: t for t in gguf.GGUFReader(made.path).tensors}
    assert types_of(made.path) == {name: "MXFP4", "blk.0.attn_q.weight": "Q8_0"}
    values = gguf.quants.dequantize(tensors[name].data, GgmlType.MXFP4).reshape(x.shape)
    assert np.array_equal(values, written(x.reshape(-1, 64), "MXFP4")[1].reshape(x.shape))


def test_importance_of_experts(tmp_path: Path) -> None:
    name, x = write_experts(tmp_path / "m.gguf")
    weights = np.random.default_rng(5).random((3, 64)).astype(np.float32)
    weights[1] = 0  # never asked
    write_imatrix(tmp_path / "i", {name: weights})
    made = quantize(
        tmp_path / "m.gguf", tmp_path / "o", "q4_0", imatrix=tmp_path / "i", progress=False
    )
    data = np.asarray(gguf.GGUFReader(made.path).tensors[0].data).reshape(3, 8, -1)
    for i in range(3):
        assert np.array_equal(data[i], written(x[i], "Q4_0", importance=weights[i])[0])


def test_importance_that_is_none(wide: Path, tmp_path: Path) -> None:
    bad = tmp_path / "i"

    def refusal() -> str:
        with pytest.raises(smallm.SmallmError) as caught:
            quantize(wide, tmp_path / "o", "q4_0", imatrix=bad, progress=False)
        assert not (tmp_path / "o").exists()
        return str(caught.value)

    assert "no such file" in refusal()
    for content in (b"", b"\1\0\0\0", struct.pack("<ii", 1, 1 << 30), b"text, and no numbers" * 9):
        bad.write_bytes(content)
        assert "i: " in refusal()
    bad.write_bytes(wide.read_bytes())
    assert "'imatrix'" in refusal()
    write_imatrix(bad, {"blk.0.ffn_down.weight": np.ones((1, 17))})
    assert "has 17 values; its rows have 512" in refusal()
    write_imatrix(bad, {"other": np.ones((1, 17))})
    assert "none of its names" in refusal()
    write_imatrix(bad, {"blk.0.ffn_down.weight": np.full((1, 512), np.nan)})
    assert "not finite" in refusal()


@pytest.mark.parametrize("write", [write_imatrix, write_old_imatrix])
def test_damaged_importance_is_read_or_refused(tmp_path: Path, write: Any) -> None:
    """Never anything but a SmallmError, and no room for what the file does not have."""
    path, rng = tmp_path / "i", np.random.default_rng(11)
    write(path, {f"blk.{i}.ffn_down.weight": rng.random((1, 8)) for i in range(2)})
    whole, refused = path.read_bytes(), 0
    lengths = [b"\xff" * 8, b"\0" * 8, struct.pack("<q", 1 << 40), struct.pack("<i", 1 << 28)]
    for i in range(600):
        data = bytearray(whole)
        for _ in range(1 + i % 3):
            at = int(rng.integers(len(data)))
            new = lengths[i % 5] if i % 5 < 4 else rng.bytes(1)
            data[at : at + len(new)] = new
        if i % 7 == 0:
            del data[int(rng.integers(len(data))) :]
        path.write_bytes(data)
        try:
            found = read_importance(path)
        except smallm.SmallmError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert all(np.isfinite(v).all() and (v >= 0).all() for v in found.values())
    assert 100 < refused < 600


# ---- the command, and what is refused ------------------------------------------------------------


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "smallm", *map(str, words)]
    return subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parent)


def test_command(narrow: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = command("quantize", narrow, out, "Q4_K")
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    assert "IQ4_NL for Q4_K" in done.stderr and "bits per weight" in done.stderr
    done = command("quantize", narrow, out, "q8_0", "--keep", "*attn_q*=f16", "--json", "-t", "1")
    answer = json.loads(done.stdout)
    assert answer["path"] == str(out) and answer["tensors"]["F16"] == 2
    done = command("quantize", narrow, out, "q9")
    assert done.returncode == 1 and "q9" in done.stderr and "q4_k_m" in done.stderr
    done = command("quantize", out, tmp_path / "b.gguf", "q4_0")
    assert done.returncode == 1 and "Q8_0 already" in done.stderr
    assert command("quantize", out, tmp_path / "b.gguf", "q4_0", "--requantize").returncode == 0


def test_refusals(wide: Path, tmp_path: Path) -> None:
    def refused(source: Path, words: str, error: type[Exception] = smallm.SmallmError) -> None:
        with pytest.raises(error, match=words):
            quantize(source, tmp_path / "o", "q4_0", progress=False)
        assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".*"))

    with pytest.raises(ValueError, match="is the file to read"):
        quantize(wide, wide, "q4_0")
    with pytest.raises(smallm.ModelNotFoundError, match="nowhere"):
        quantize(wide, tmp_path / "nowhere" / "o", "q4_0")
    refused(tmp_path / "none", "no such file", smallm.ModelNotFoundError)
    whole, bad = wide.read_bytes(), tmp_path / "bad.gguf"
    for n in (0, 3, 20, 100, 5000, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:n])
        refused(bad, "bad.gguf", smallm.CorruptModelError)
    bad.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    refused(bad, "version 9")
    for extra, words in (
        ({"split.count": tiny.KV(tiny.Kind.UINT16, 2)}, "split"),
        ({"general.type": "adapter"}, "'adapter'"),
    ):
        tiny.write_tiny(bad, extra=extra)
        refused(bad, words, smallm.UnsupportedModelError)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_weight_is_named(tmp_path: Path, value: float) -> None:
    def edit(tensors: dict[str, tiny.Tensor]) -> None:
        tensors["blk.1.ffn_up.weight"].data[3, 5] = value

    tiny.write_tiny(tmp_path / "m.gguf", edit=edit)
    with pytest.raises(smallm.CorruptModelError, match=r"blk\.1\.ffn_up\.weight.*row 3, column 5"):
        quantize(tmp_path / "m.gguf", tmp_path / "o", "q4_0", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_ctrl_c_leaves_what_was_there(wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"before")

    def stop(done: int, total: int | None) -> None:
        assert total is not None
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(wide, out, "q4_0", progress=stop)
    assert out.read_bytes() == b"before" and list(tmp_path.iterdir()) == [out]


def run_quantize(source: Path, out: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Runs `body` in a process of its own, with the paths as source and out."""
    code = (
        "import os, resource, signal, sys\nfrom smallm.quantize import quantize\n"
        f"source, out = sys.argv[1:]\n{body}"
    )
    program = [sys.executable, "-c", code, str(source), str(out)]
    return subprocess.run(program, stderr=subprocess.PIPE, text=True, cwd=out.parent)


def has_unnamed_files(folder: Path) -> bool:
    if sys.platform != "linux" or not os.path.isdir("/proc/self/fd"):
        return False
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except OSError:
        return False
    return True


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_a_kill_leaves_what_was_there(wide: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"before")
    done = run_quantize(
        wide,
        out,
        "quantize(source, out, 'q8_0', progress=lambda done, total: "
        f"done > total // 2 and os.kill(os.getpid(), signal.{name}))",
    )
    assert done.returncode == -signal.Signals[name] and out.read_bytes() == b"before"
    left = [path.suffix for path in tmp_path.iterdir() if path != out]
    assert left == ([] if has_unnamed_files(tmp_path) else [".part"])


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files")
def test_a_full_disk(wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = run_quantize(
        wide,
        out,
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "quantize(source, out, 'q8_0', progress=False)",
    )
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert re.fullmatch(rf"OSError: \[Errno \d+\] .+: '{out}'", done.stderr.splitlines()[-1])


def test_where_a_file_cannot_be(wide: Path, tmp_path: Path) -> None:
    """The command's one line names the path and says why."""
    for out, words in (
        (wide, "is the file to read"),
        (tmp_path / "link", "is the file to read"),
        (tmp_path / "no" / "out", "no such folder"),
        (Path("/dev/full"), "not a file"),
        (Path("/proc/out.gguf"), "such file|denied|permitted"),
    ):
        if out.name == "link":
            out.symlink_to(wide)
        if out.parent.name in ("dev", "proc") and not out.parent.exists():
            continue  # another system
        before = wide.read_bytes()
        line = one_line(command("quantize", wide, out, "q8_0"))
        named = out.parent if "folder" in words else out
        assert f"{named}:" in line or f"'{named}'" in line or f"{named} is" in line, line
        assert re.search(words, line), line
        assert wide.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link"]


@pytest.mark.skipif(sys.platform == "win32", reason="no modes of folders")
def test_a_folder_that_cannot_be_written(wide: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(0o500)
    line = one_line(command("quantize", wide, tmp_path / "out", "q8_0"))
    tmp_path.chmod(0o700)
    assert str(tmp_path / "out") in line and "denied" in line and not list(tmp_path.iterdir())


def test_another_file_system(wide: Path, tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system here")
    one = quantize(wide, tmp_path / "o", "q4_0", progress=False).path.read_bytes()
    with tempfile.TemporaryDirectory(dir=other) as folder:
        out = Path(folder) / "o"
        out.write_bytes(b"before")
        assert quantize(wide, out, "q4_0", progress=False).path.read_bytes() == one
        assert list(Path(folder).iterdir()) == [out]
        assert out.stat().st_mode & 0o777 == (tmp_path / "o").stat().st_mode & 0o777
