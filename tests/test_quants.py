"""Every weight format against `gguf.quants`, bit for bit."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

# Byte offsets of the float16 scales in a block.
SCALES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "TQ1_0": [52],
    "TQ2_0": [64],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "IQ3_S": [0],
    "IQ3_XXS": [0],
    "IQ2_S": [0],
    "IQ2_XS": [0],
    "IQ2_XXS": [0],
    "IQ1_S": [0],
}
# Whose scales are no float16, or not in one piece: byte -> its values that make a block not finite.
BYTE_SCALES = {"MXFP4": (0, range(253, 256)), "NVFP4": (2, [255]), "IQ1_M": (55, [0x7F, 0xFC])}
FLOATS = {"F32": (4, 0x7F800000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}
N_BLOCKS = 3000

CTests = Callable[[str], Path]


def random_blocks(name: str, rng: np.random.Generator) -> np.ndarray:
    """Random blocks uint8 [N_BLOCKS, block bytes]: any codes, any finite scales."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    blocks = rng.integers(0, 256, (N_BLOCKS, size), dtype=np.uint8)
    for at in SCALES.get(name, []):
        bits = rng.integers(0, 0x10000, N_BLOCKS, dtype=np.uint16)
        bits[:8] = [0, 0x8000, 1, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF]  # zeros, subnormals, max
        bits = np.where(bits & 0x7C00 == 0x7C00, bits & 0x83FF, bits).astype("<u2")
        blocks[:, at : at + 2] = bits.view(np.uint8).reshape(-1, 2)
    if name == "MXFP4":
        blocks[:, 0] = np.arange(N_BLOCKS) % 253
    elif name == "NVFP4":  # each scale there is
        blocks[:, :4] = (np.arange(N_BLOCKS * 4) % 255).reshape(-1, 4)
    elif name == "IQ1_M":  # the high nibbles of bytes 49, 51, 53 and 55 are a float16
        blocks[:, 55] = np.where(blocks[:, 55] & 0x70 == 0x70, blocks[:, 55] & 0xBF, blocks[:, 55])
        blocks[:8, 49:56:2] &= 15  # zeros
    return blocks


def run(program: Path, *args: str, stdin: bytes) -> bytes:
    return subprocess.run([program, *args], input=stdin, capture_output=True, check=True).stdout


@pytest.mark.parametrize("name", [*FLOATS, *SCALES, *BYTE_SCALES])
def test_values_are_those_of_gguf_quants(name: str, c_tests: CTests) -> None:
    blocks = random_blocks(name, np.random.default_rng(1))
    if name == "F16":  # all there are
        blocks = np.arange(0x10000, dtype="<u2").view(np.uint8).reshape(-1, 2)
    with np.errstate(invalid="ignore"):
        want = dequantize(blocks, GGMLQuantizationType[name]).reshape(-1)
    got = np.frombuffer(run(c_tests("dequantize"), name, stdin=blocks.tobytes()), np.float32)
    assert got.shape == want.shape
    same = got.view(np.uint32) == want.view(np.uint32)
    same |= np.isnan(got) & np.isnan(want)
    assert same.all(), f"first difference at value {np.argmin(same)}"
    if name not in FLOATS:
        assert np.isfinite(got).all()


@pytest.mark.parametrize("name", [*SCALES, *BYTE_SCALES])
def test_any_bytes_are_some_values(name: str, c_tests: CTests) -> None:
    """Whatever a file holds, every index into a table is in its range."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    blocks = np.random.default_rng(4).integers(0, 256, (N_BLOCKS, size), dtype=np.uint8)
    blocks[:2] = [[0], [255]]
    with np.errstate(invalid="ignore", over="ignore"):
        want = dequantize(blocks, GGMLQuantizationType[name]).reshape(-1)
    got = np.frombuffer(run(c_tests("dequantize"), name, stdin=blocks.tobytes()), np.float32)
    same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
    assert same.all()


def test_every_format_that_gguf_reads_is_read() -> None:
    known = {t.name for t in gguf.quants._type_traits} | {"F32", "F16"}
    assert known == {*FLOATS, *SCALES, *BYTE_SCALES}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0xFC01])
def test_nonfinite_scale_is_found(name: str, bits: int, c_tests: CTests) -> None:
    rng = np.random.default_rng(2)
    clean = random_blocks(name, rng)
    program = c_tests("dequantize")
    assert int(run(program, "--nonfinite", name, stdin=clean.tobytes())) == N_BLOCKS
    for at in SCALES[name]:
        blocks = clean.copy()
        where = int(rng.integers(N_BLOCKS))
        blocks[where, at : at + 2] = bits & 0xFF, bits >> 8
        assert int(run(program, "--nonfinite", name, stdin=blocks.tobytes())) == where


@pytest.mark.parametrize("name", BYTE_SCALES)
def test_nonfinite_scale_in_other_bytes_is_found(name: str, c_tests: CTests) -> None:
    at, values = BYTE_SCALES[name]
    clean = random_blocks(name, np.random.default_rng(5))
    program = c_tests("dequantize")
    assert int(run(program, "--nonfinite", name, stdin=clean.tobytes())) == N_BLOCKS
    for value in values:
        blocks = clean.copy()
        blocks[1234, at] = value
        if name == "IQ1_M":
            blocks[1234, at - 2] |= 0xC0  # the exponent's other bits
        assert int(run(program, "--nonfinite", name, stdin=blocks.tobytes())) == 1234


@pytest.mark.parametrize("name", FLOATS)
def test_nonfinite_value_is_found(name: str, c_tests: CTests) -> None:
    size, infinity = FLOATS[name]
    dtype = f"<u{size}"
    values = np.random.default_rng(3).integers(0, 1 << 8 * size, N_BLOCKS, dtype=np.uint64)
    values = np.where(values & infinity == infinity, 0, values).astype(dtype)
    program = c_tests("dequantize")
    assert int(run(program, "--nonfinite", name, stdin=values.tobytes())) == N_BLOCKS
    for bits in (infinity, infinity + 1, infinity | 1 << (8 * size - 1)):
        poked = values.copy()
        poked[1234] = bits
        assert int(run(program, "--nonfinite", name, stdin=poked.tobytes())) == 1234
