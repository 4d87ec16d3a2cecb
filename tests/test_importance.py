"""save_importance(): sums beside an independent forward pass, and what stays the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
from goldens import Golden
from reference import Reference
from test_cli import one_line, smallm_command
from tiny import Tensor

import smallm
from smallm import _ffi
from smallm._binding import check, new
from smallm._generate import submit
from smallm.quantize import Importance, quantize, read_importance, save_importance
from smallm.quantize._measure import _statistics

ffi, lib = _ffi.ffi, _ffi.lib
TEXT = "The quick brown fox jumps over the lazy dog. Once upon a time, a world said hello. " * 12

Sums = dict[str, tuple[np.ndarray, np.ndarray]]  # [n_experts or 1, n_cols], [n_experts or 1]


def read(path: Path) -> Sums:
    """Sums of squares and counts, as the package gguf reads them."""
    found: dict[str, np.ndarray] = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    names = [n.removesuffix(".counts") for n in found if n.endswith(".counts")]
    assert len(found) == 2 * len(names)
    for name in names:
        assert found[name + ".counts"].shape == (len(found[name + ".in_sum2"]), 1)
    return {n: (found[n + ".in_sum2"], found[n + ".counts"][:, 0]) for n in names}


def measure(path: Path, out: Path, text: str | list[int] = TEXT, **options: int) -> Importance:
    threads = options.pop("threads", 2)
    with smallm.load(path, threads=threads) as model:
        return save_importance(model, text, out, **options)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden("qwen2moe", tmp_path_factory.mktemp("importance"))


# ---- the sums ------------------------------------------------------------------------------------


class Observed(Reference):
    """Adds up what each matrix is multiplied with, in float64."""

    def matmul(self, name: str, x: np.ndarray, *, fine: bool = False) -> np.ndarray:
        sums = (x.astype(np.float64) ** 2).sum(0)
        self.sums[name] = self.sums.get(name, 0) + sums
        return super().matmul(name, x, fine=fine)

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sums: dict[str, np.ndarray] = {}


@pytest.mark.parametrize("ctx", [3, 50, 200])
def test_sums_are_those_of_an_independent_pass(tmp_path: Path, ctx: int) -> None:
    path = tiny.write_tiny(tmp_path / "m.gguf", biases=True, tied=False).path
    reference = Observed(path)
    with smallm.load(path) as model:
        tokens = model.tokenize(TEXT)[: 7 * ctx + 2]
        made = save_importance(model, tokens, tmp_path / "i", ctx=ctx)
    n = len(tokens) // ctx
    for i in range(n):
        reference.logits([tokens[0], *tokens[i * ctx + 1 : (i + 1) * ctx]])
    reference.sums.pop("output.weight")
    found = read(tmp_path / "i")
    assert made == Importance(tmp_path / "i", 14, n * ctx, n, ctx, {})
    assert found.keys() == reference.sums.keys() and len(found) == 14
    for name, (sums, counts) in found.items():
        assert counts.tolist() == [n * ctx]
        expected = reference.sums[name]
        assert np.abs(sums[0] - expected).max() < 1e-3 * expected.max(), name
        assert np.abs(sums[0] / expected - 1).max() < 1e-2, name


def test_sums_of_experts(golden: Golden, tmp_path: Path) -> None:
    """The first layer without its attention: its feed-forward reads the embeddings."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["blk.0.attn_output.weight"].data[:] = 0

    path = golden.change(tmp_path / "m.gguf", edit=edit)
    w = {t.name: t.data.astype(np.float64) for t in gguf.GGUFReader(path).tensors}
    x = w["token_embd.weight"][golden.ids]
    epsilon = golden.read()[0]["qwen2moe.attention.layer_norm_rms_epsilon"].value
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + epsilon) * w["blk.0.ffn_norm.weight"]
    chosen = np.argsort(-(x @ w["blk.0.ffn_gate_inp.weight"].T), axis=1)[:, :3]
    measure(path, tmp_path / "i", golden.ids, ctx=len(golden.ids))
    found = read(tmp_path / "i")

    def same(name: str, rows: list[np.ndarray]) -> None:
        sums, counts = found[f"blk.0.ffn_{name}.weight"]
        assert counts.tolist() == [len(r) for r in rows], name
        expected = np.array([(r**2).sum(0) for r in rows])
        assert np.abs(sums - expected).max() < 1e-4 * expected.max(), name

    def hidden(x: np.ndarray, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return (g := x @ gate.T) / (1 + np.exp(-g)) * (x @ up.T)

    inputs = [x[(chosen == e).any(1)] for e in range(12)]
    assert min(map(len, inputs)) > 0
    same("gate_exps", inputs)
    same("up_exps", inputs)
    pairs = zip(w["blk.0.ffn_gate_exps.weight"], w["blk.0.ffn_up_exps.weight"], strict=True)
    same("down_exps", [hidden(x, *p) for x, p in zip(inputs, pairs, strict=True)])
    for name in ("gate_inp", "gate_inp_shexp", "gate_shexp", "up_shexp"):
        same(name, [x])
    shared = w["blk.0.ffn_gate_shexp.weight"], w["blk.0.ffn_up_shexp.weight"]
    same("down_shexp", [hidden(x, *shared)])


def names(path: Path) -> set[str]:
    """The matrices of a file's layers."""
    return {
        t.name
        for t in gguf.GGUFReader(path).tensors
        if "blk." in t.name and t.name.endswith(".weight") and len(t.shape) > 1
        if not any(part in t.name for part in ("_norm", "conv.conv", "conv1d", "rel_b"))
    }


# A split and fused tensors, gates in up, two mixers, norms after, parallel layers, an encoder.
@pytest.mark.parametrize(
    "name", ["gemma2", "gpt2", "gptneox", "lfm2", "mamba2", "phi3", "modern-bert", "olmoe"]
)
def test_every_matrix_counts_every_token_once(name: str, tmp_path: Path) -> None:
    golden = Golden(name, tmp_path)
    made = measure(golden.path, tmp_path / "i", golden.ids * 3, ctx=len(golden.ids))
    found = read(tmp_path / "i")
    assert found.keys() == names(golden.path) and made.tokens == 3 * len(golden.ids)
    for matrix, (sums, counts) in found.items():
        assert np.isfinite(sums).all() and ((sums > 0).any(1) == (counts > 0)).all()
        assert counts.sum() == made.tokens * (3 if "_exps" in matrix else 1)


# ---- what stays the same -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "qwen2moe"])
def test_any_number_of_threads_gives_the_same_file(
    golden: Golden, tmp_path: Path, name: str
) -> None:
    path = golden.path
    if name == "tiny":
        path = tiny.write_tiny(tmp_path / "m.gguf", types="Q4_0", n_ctx=4096).path
    files = []
    for threads in (1, 2, 3):
        measure(path, tmp_path / "i", golden.ids * 4, ctx=len(golden.ids), threads=threads)
        files.append((tmp_path / "i").read_bytes())
    assert files[0] == files[1] == files[2]


def run(handles: object, model: smallm.Model, ids: list[int], **options: int) -> None:
    box = submit(lambda: handles.engine, ids, None, **options)  # type: ignore[attr-defined]
    for _ in smallm._generate.Stream(model, box, 0, -1):
        pass


def test_any_cut_of_a_text_gives_the_same_sums(golden: Golden) -> None:
    """Also one that goes on in passes of less than SM_FEW tokens."""
    found = []
    with smallm.load(golden.path, threads=2) as model:
        for chunk in (0, 1, 3, 17):
            handles = model._observer(len(golden.ids))
            run(handles, model, golden.ids, n_chunk=chunk)
            found.append(_statistics(handles))
    for other in found[1:]:
        for name, (squares, counts) in other.items():
            assert np.array_equal(counts, found[0][name].counts)
            assert np.array_equal(squares, found[0][name].squares), name


# ---- the engine ----------------------------------------------------------------------------------


def ask(handles: object, i: int = 0) -> int:
    entry, error = new("statistic"), new("error")
    engine = handles.engine[0]  # type: ignore[attr-defined]
    return check(lib.smallm_engine_statistic(engine, i, entry, ffi.NULL, ffi.NULL, error), error)


def test_statistics_are_of_whole_texts(tiny_chat: Path, tmp_path: Path) -> None:
    with smallm.load(tiny_chat) as model:
        handles = model._observer(1 << 16)
        options = smallm._generate.Options("t", {"max_tokens": 60000}, model._defaults, 999, {})
        box = submit(lambda: handles.engine, [5], options)
        with pytest.raises(ValueError, match="1 requests run"):
            ask(handles)
        lib.smallm_request_free(box[0])
        box[0] = ffi.NULL
        assert ask(model._observer(9)) == lib.SMALLM_OK
        assert ask(handles, 1 << 20) == ask(model._handles) == lib.SMALLM_DONE

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["blk.0.ffn_up.weight"].data[:] = 1e38

    tiny.write_tiny(tmp_path / "m.gguf", edit=edit)
    with smallm.load(tmp_path / "m.gguf") as model:
        handles = model._observer(9)
        with pytest.raises(smallm.SmallmError, match="infinite"):
            run(handles, model, [5, 6, 7])
        with pytest.raises(smallm.CancelledError, match="broke off"):
            ask(handles)


# ---- the file ------------------------------------------------------------------------------------


def test_the_file_is_read_by_quantize(golden: Golden, tmp_path: Path) -> None:
    """Experts that no token chose, too."""

    def level(tensors: dict[str, Tensor]) -> None:
        for name, t in tensors.items():
            if name.endswith("ffn_gate_inp.weight"):
                t.data[:] = 0  # of equal experts the first ones are chosen

    path, out = golden.change(tmp_path / "m.gguf", edit=level), tmp_path / "i"
    made = measure(path, out, TEXT, ctx=32)
    experts = [
        f"blk.{i}.ffn_{what}_exps.weight" for i in range(2) for what in ("gate", "up", "down")
    ]
    assert made.unseen == dict.fromkeys(experts, 9)
    assert made.matrices == len(names(path)) + 2  # the shared experts' gates, of one row
    reader = gguf.GGUFReader(out)
    keys = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF")}
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["text"],
        "imatrix.chunk_count": made.windows,
        "imatrix.chunk_size": 32,
    }
    means = read_importance(out)
    for name, (sums, counts) in read(out).items():
        assert np.array_equal(means[name], sums / np.maximum(counts, 1)[:, None])
    plain = quantize(path, tmp_path / "a", "q4_0", progress=False)
    weighed = quantize(path, tmp_path / "b", "q4_0", imatrix=out, progress=False)
    changed = {
        a.name: [i for i, (x, y) in enumerate(zip(a.data, b.data, strict=True)) if (x != y).any()]
        for a, b in zip(*(gguf.GGUFReader(m.path).tensors for m in (plain, weighed)), strict=True)
    }
    assert {name: changed[name] for name in experts} == {n: [0, 1, 2] for n in experts}
    assert changed["blk.0.attn_q.weight"] and not changed["token_embd.weight"]


@pytest.fixture
def model(tiny_spm: Path) -> Iterator[smallm.Model]:
    with smallm.load(tiny_spm) as loaded:
        yield loaded


def test_refusals(model: smallm.Model, tmp_path: Path) -> None:
    out = tmp_path / "i"
    with pytest.raises(ValueError, match=r"text has 3 tokens; 64 are needed"):
        save_importance(model, [1, 2, 3], out, ctx=64)
    for ctx in (2, 257):
        with pytest.raises(ValueError, match=r"ctx must be 3 \.\. 256"):
            save_importance(model, TEXT, out, ctx=ctx)
    with pytest.raises(smallm.ModelNotFoundError, match="nowhere"):
        save_importance(model, TEXT, tmp_path / "nowhere" / "i", ctx=64)
    with pytest.raises(TypeError, match=r"smallm\.Model"):
        save_importance("model", TEXT, out)  # type: ignore[arg-type]
    t5 = Golden("t5", tmp_path / "t5")
    with (
        smallm.load(t5.path) as other,
        pytest.raises(smallm.UnsupportedModelError, match="encoder-d"),
    ):
        save_importance(other, TEXT, out, ctx=64)
    assert not out.exists()


def test_ctrl_c_leaves_what_was_there(model: smallm.Model, tmp_path: Path) -> None:
    out = tmp_path / "i"
    out.write_bytes(b"before")
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done >= 192:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_importance(model, TEXT, out, ctx=64, max_windows=4, progress=stop)
    assert seen == [(64, 256), (128, 256), (192, 256)]
    assert out.read_bytes() == b"before" and list(tmp_path.iterdir()) == [out]


def test_command(tiny_spm: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "i", tmp_path / "text.txt"
    text.write_text(TEXT)
    done = smallm_command("imatrix", tiny_spm, text, "-o", out, "-c", 64, "--chunks", 3)
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    assert done.stderr == "14 matrices; 192 tokens in 3 windows of 64\n"
    first = out.read_bytes()
    assert b"text.txt" in first
    done = smallm_command("imatrix", tiny_spm, "-o", out, "-c", 64, "--json", "-t", 1, stdin=TEXT)
    answer = json.loads(done.stdout)
    assert answer["path"] == str(out) and answer["unseen"] == {} and answer["windows"] > 3
    assert out.read_bytes() != first
    line = one_line(smallm_command("imatrix", tiny_spm, "-o", out, "-c", 64, stdin="short"))
    assert "64 are needed" in line
    assert smallm_command("imatrix", tiny_spm, text).returncode == 2
