"""Golden models without weights: folders built from a description, and what they must answer.

tests/golden holds, per case, NAME.json and NAME.npz, both written by golden/make.py:

    NAME.json   architecture    the row of csrc/arch.c
                config          config.json, as `transformers` writes it
                tensors         name -> [shape, mean, deviation], as in a checkpoint
                tokenizer       which of this module's tokenizers the folder gets
                subtle          broken steps that differ by little
    NAME.npz    ids [n]                 the text
                rows [n_rows]           positions whose logits were kept
                logits [n_rows, n_vocab]    float32, computed in float64
                broken: STEP [n_broken, n_vocab]   the last positions with one step left out or
                                        done in another way: what a wrong row would answer

Weights are a function of case, name and shape, the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
import tiny
from tiny import KV, Tensor

HERE = Path(__file__).resolve().parent / "golden"
N_MERGES = 40


def names(kind: str = "decoder") -> list[str]:
    """The goldens of a kind, in alphabetical order."""
    found = [path for path in HERE.glob("*.json") if json.loads(path.read_text())["kind"] == kind]
    return sorted(path.stem for path in found)


def config(name: str) -> dict[str, Any]:
    """A golden's config.json."""
    values: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return values["config"]


def weights(case: str, name: str, shape: list[int], mean: float, deviation: float) -> np.ndarray:
    """float16 [shape]: sums of four 16-bit numbers from PCG64, which are nearly normal."""
    seed = int.from_bytes(hashlib.sha256(f"{case}/{name}".encode()).digest()[:16], "little")
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape, dtype=np.int64)))
    parts = raw.reshape(-1, 1).view(np.uint16).astype(np.float64).sum(1)
    normal = (parts - 2 * 65535) / (65536 / 3**0.5)
    return (mean + deviation * normal).astype(np.float16).reshape(shape)


def write_folder(spec: dict[str, Any], case: str, folder: Path) -> Path:
    """A Hugging Face folder of the case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(spec["config"], indent=2), encoding="utf-8")
    tensors = {name: weights(case, name, *what) for name, what in spec["tensors"].items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, text in TOKENIZERS[spec["tokenizer"]]().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


# What `peft` says of the adapters of the goldens of kind "adapter".
ADAPTER_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 6,
    "lora_alpha": 9,
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": True,
    "target_modules": "all-linear",
    "rank_pattern": {"v_proj": 3, r"layers\.1\.self_attn\.q_proj": 17},
    "alpha_pattern": {"model.layers.0.self_attn.k_proj": 30},
    "base_model_name_or_path": None,
    "init_lora_weights": True,
}


def write_adapter(case: str, shapes: dict[str, list[int]], folder: Path, **config: Any) -> Path:
    """A folder of `peft`: pairs for every matrix [rows, k] of the layers among `shapes`, the
    tensors of the case's checkpoint.  config: other values than ADAPTER_CONFIG's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG | config))
    tensors = {}
    for name, shape in shapes.items():
        if ".layers." not in name or len(shape) != 2:
            continue
        module = f"base_model.model.{name.removesuffix('.weight')}"
        rank = 17 if "layers.1.self_attn.q_proj" in name else 3 if "v_proj" in name else 6
        for key, size in (("lora_A", [rank, shape[1]]), ("lora_B", [shape[0], rank])):
            deviation = 0.1 if key == "lora_A" else 0.2 * rank**-0.5
            values = weights(case, f"{module}.{key}", size, 0.0, deviation)
            tensors[f"{module}.{key}.weight"] = values.astype(np.float32)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def ask(model: Any, ids: Any, **options: Any) -> np.ndarray:
    """Logits [n_ids, n_vocab] of a golden's ids, of whatever kind it is."""
    if any(key.endswith(".decoder_start_token_id") for key in model.metadata):
        return model.logits(decoder_ids(ids), source=ids, **options)
    return model.logits(ids, **options)


def decoder_ids(ids: Any) -> np.ndarray:
    """What the decoder of an encoder-decoder gets beside the encoder's ids [n]: as many others, the
    first of them the goldens' decoder_start_token_id."""
    return np.concatenate([[3], np.asarray(ids)[:0:-1]]).astype(np.int32)


# ---- tokenizers ----------------------------------------------------------------------------------


def byte_level() -> dict[str, str]:
    """tiny.py's byte-level vocabulary with its first merges only: 300 tokens, gpt-2's words."""
    keys = tiny.bpe_tokenizer("gpt-2")
    n = 4 + 256 + N_MERGES
    tokens, types = keys["tokenizer.ggml.tokens"][:n], keys["tokenizer.ggml.token_type"].value[:n]
    special = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ == tiny.CONTROL
    ]
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": words | {"use_regex": True},
        "post_processor": None,
        "decoder": words | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [m.split(" ") for m in keys["tokenizer.ggml.merges"][:N_MERGES]],
        },
    }
    options = {
        "bos_token": tokens[1],
        "eos_token": tokens[2],
        "pad_token": tokens[3],
        "chat_template": tiny.CHATML,
    }
    return {"tokenizer.json": json.dumps(tokenizer), "tokenizer_config.json": json.dumps(options)}


TOKENIZERS: dict[str, Callable[[], dict[str, str]]] = {"byte-level": byte_level}
N_VOCAB = 4 + 256 + N_MERGES  # of the byte-level one


# ---- what a test reads ---------------------------------------------------------------------------


class Golden:
    """One golden, its folder converted by smallm to F32."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        """folder: where to build and convert it; None: only what is committed."""
        self.name = name
        self.spec: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
        self.arch: str = self.spec["architecture"]
        arrays = dict(np.load(HERE / f"{name}.npz"))
        self.ids = [int(i) for i in arrays["ids"]]
        self.rows, self.logits = arrays["rows"], arrays["logits"]
        self.broken = {k.split(": ")[1]: v for k, v in arrays.items() if k.startswith("broken: ")}
        if folder is not None:
            from smallm.convert import convert

            # Its name becomes the file's, by which llama.cpp knows some models.
            self.folder = write_folder(self.spec, name, folder / name / "checkpoint")
            self.path = convert(self.folder, folder / f"{name}.gguf", type="f32", progress=False)

    def error(self, got: np.ndarray) -> float:
        """Largest distance of logits [n_ids, n_vocab] from the expected, in deviations."""
        return float(np.abs(got[self.rows] - self.logits).max() / self.logits.std())

    def read(self) -> tuple[dict[str, KV], dict[str, Tensor]]:
        """Keys and tensors of the file, to be changed and written again."""
        reader = gguf.GGUFReader(self.path)
        keys = {
            name: KV(f.types[0], f.contents(), f.types[-1] if len(f.types) > 1 else None)
            for name, f in reader.fields.items()
            if not name.startswith("GGUF.") and name != "general.architecture"
        }
        tensors = {
            t.name: Tensor(t.tensor_type, tuple(int(n) for n in t.shape[::-1]), t.data.copy())
            for t in reader.tensors
        }
        return keys, tensors

    def change(
        self,
        path: Path,
        *,
        keys: dict[str, Any] | None = None,
        edit: Callable[[dict[str, Tensor]], object] | None = None,
    ) -> Path:
        """The file with other keys (None drops one) and tensors."""
        kvs, tensors = self.read()
        for key, value in (keys or {}).items():
            kvs.pop(f"{self.arch}.{key}", None)
            if value is not None:
                kvs[f"{self.arch}.{key}"] = tiny.as_kv(value)
        if edit is not None:
            edit(tensors)
        tiny._write(path, self.arch, kvs, tensors)
        return path


# Other values of keys; a file that has the key must answer something else.
OTHER_VALUES: dict[str, Any] = {
    "rope.freq_base": 1e6,
    "rope.dimension_count": 4,
    "rope.scaling.factor": 1.5,
    "rope.scaling.original_context_length": 512,
    "rope.scaling.yarn_beta_fast": 20.0,
    "rope.scaling.yarn_beta_slow": 0.01,
    "attention.layer_norm_epsilon": 0.05,
    "attention.layer_norm_rms_epsilon": 0.05,
    "attention.sliding_window": 90,
    "attention.sliding_window_pattern": 2,
    "rope.freq_base_swa": 300.0,
    "attention.scale": 0.5,
    "attention.temperature_scale": 0.8,
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 1.0,
    "embedding_scale": 2.0,
    "residual_scale": 1.5,
    "logit_scale": 0.5,
    "expert_used_count": 2,
    "attention.max_alibi_bias": 4.0,
    "attention.clamp_kqv": 0.2,
    "rope.scaling.attn_factor": 1.7,
}


def other_value(key: str, value: Any) -> Any:
    """Another value of a file's key: one that it may have, where OTHER_VALUES has it."""
    if key in OTHER_VALUES:
        other = OTHER_VALUES[key]
        if value == other:
            other = other // 2 if isinstance(other, int) else other / 4
        return other
    if isinstance(value, list):
        return [other_value(key, value[0]), *value[1:]]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value} and more"
    return value + 1 if isinstance(value, int) else value * 1.5 + 0.5


def tiers() -> list[str]:
    """Those this CPU can run, the best last."""
    from smallm import _ffi

    info = _ffi.ffi.new("smallm_cpu_info *", {"size": _ffi.ffi.sizeof("smallm_cpu_info")})
    assert _ffi.lib.smallm_cpu(info, _ffi.ffi.NULL) == 0
    return _ffi.ffi.string(info.available).decode().split(",")


def quantize(tensors: dict[str, Tensor]) -> None:
    """Matrices as Q8_0: activations are rounded, integer kernels run.  As in published files not
    norms and convolutions, and not routers: a token would get other experts."""
    for name, t in tensors.items():
        kept = re.search(r"_norm\.|ffn_gate_inp|\.conv\.|conv1d|attn_rel_b", name)
        if len(t.shape) >= 2 and name.endswith(".weight") and not kept:
            tensors[name] = Tensor.encode(t.values(), "Q8_0", np.random.default_rng(0))


def small_vocabulary() -> dict[str, Any]:
    """tokenizer.ggml.* keys of 16 SentencePiece tokens."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijkl"]
    types = [tiny.UNKNOWN, tiny.CONTROL, tiny.CONTROL] + [tiny.NORMAL] * 13
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": KV(gguf.GGUFValueType.ARRAY, types, gguf.GGUFValueType.INT32),
    }


def write_head(golden: Golden, path: Path) -> None:
    """The golden's file with a small vocabulary and without its tensors' data: a seed for
    tests/fuzz/fuzz_model.c."""
    kvs, tensors = golden.read()
    tokenizer = {key: tiny.as_kv(value) for key, value in small_vocabulary().items()}
    n_vocab = len(tokenizer["tokenizer.ggml.tokens"].value)
    kvs = {key: kv for key, kv in kvs.items() if not key.startswith("tokenizer.")}
    if f"{golden.arch}.vocab_size" in kvs:
        kvs[f"{golden.arch}.vocab_size"] = tiny.u32(n_vocab)
    for name, t in tensors.items():
        if t.shape[0] == N_VOCAB:
            tensors[name] = Tensor(t.type, (n_vocab, *t.shape[1:]), t.data[:n_vocab])
    tiny._write(path, golden.arch, kvs | tokenizer, tensors)
    data = min(t.data_offset for t in gguf.GGUFReader(path).tensors)
    path.write_bytes(path.read_bytes()[:data])


def main() -> None:
    """goldens.py FOLDER NAME...: NAME.gguf for the C tests; --heads FOLDER: all, for the fuzzer."""
    if sys.argv[1] == "--heads":
        heads = Path(sys.argv[2])
        heads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            for name in names() + names("encoder-decoder") + names("encoder"):
                write_head(Golden(name, Path(work)), heads / name)
        return
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:]:
        print(Golden(name, folder).path)


if __name__ == "__main__":
    main()
