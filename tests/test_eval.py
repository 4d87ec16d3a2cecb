"""smallm.eval beside numpy on whole rows of logits, written anew."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import goldens
import numpy as np
import pytest
import tiny
from test_cli import one_line, smallm_command

import smallm
import smallm.eval
from smallm.eval import _quality
from smallm.eval._saved import SavedLogits, write_head, write_row

TEXT = "The quick brown fox jumps over the lazy dog. Once upon a time, a world said hello. " * 12


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random weights in two formats, and a vocabulary with another size."""

    def calm(tensors: dict[str, tiny.Tensor]) -> None:
        tensors["output_norm.weight"].data *= np.float32(0.25)  # logits within 16 of each other

    folder = tmp_path_factory.mktemp("eval")
    odd = tiny.spm_tokenizer()
    odd["tokenizer.ggml.tokens"] = [*odd["tokenizer.ggml.tokens"], "zzzz"]
    odd["tokenizer.ggml.scores"] = [*odd["tokenizer.ggml.scores"], -1e6]
    types = odd["tokenizer.ggml.token_type"]
    odd["tokenizer.ggml.token_type"] = tiny.KV(types.kind, [*types.value, 1], types.sub)
    return {
        "f32": tiny.write_tiny(folder / "f32.gguf", edit=calm).path,
        "q4": tiny.write_tiny(folder / "q4.gguf", types="Q4_0", edit=calm).path,
        "odd": tiny.write_tiny(folder / "odd.gguf", tokenizer=odd, edit=calm).path,
    }


@pytest.fixture(scope="module")
def models(paths: dict[str, Path]) -> Iterator[dict[str, smallm.Model]]:
    loaded = {name: smallm.load(path) for name, path in paths.items()}
    yield loaded
    for model in loaded.values():
        model.close()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.longdouble)
    return np.asarray(x - np.logaddexp.reduce(x, axis=-1, keepdims=True))


def windows_of(
    model: smallm.Model, ctx: int, n: int | None = None
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """ln p of the scored tokens and these, as llama.cpp cuts a text."""
    bos = model.tokenize("")
    assert len(bos) <= 1
    tokens = model.tokenize(TEXT)
    for i in range(len(tokens) // ctx if n is None else n):
        window = tokens[i * ctx : (i + 1) * ctx]
        logits = model.logits(bos + window[len(bos) :])
        yield log_softmax(logits[ctx // 2 : -1]), window[ctx // 2 + 1 :]


# ---- perplexity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ctx", [3, 4, 63, 64, 256])
def test_perplexity_is_that_of_the_logits(models: dict[str, smallm.Model], ctx: int) -> None:
    model = models["q4"]
    losses = [
        -float(row[target])
        for rows, targets in windows_of(model, ctx)
        for row, target in zip(rows, targets, strict=True)
    ]
    found = smallm.eval.perplexity(model, TEXT, ctx=ctx)
    assert found.tokens == len(losses) and found.windows * (ctx - 1 - ctx // 2) == len(losses)
    mean = math.fsum(losses) / len(losses)
    spread = math.fsum((x - mean) ** 2 for x in losses) / (len(losses) - 1)
    assert found.nll == pytest.approx(mean, rel=1e-12)
    assert found.nll_error == pytest.approx(math.sqrt(spread / len(losses)), rel=1e-9)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-11)
    assert found.perplexity_error == pytest.approx(found.perplexity * found.nll_error)
    assert found.tokens_per_second > 0 and found.ctx == ctx
    assert model.perplexity(TEXT, ctx=ctx) == found.perplexity
    assert smallm.eval.perplexity(model, model.tokenize(TEXT), ctx=ctx)[:7] == found[:7]


@pytest.mark.parametrize(("ctx", "stride"), [(64, 32), (64, 63), (32, 1), (256, 100), (250, 249)])
def test_with_a_stride_each_token_is_scored_once(
    models: dict[str, smallm.Model], ctx: int, stride: int
) -> None:
    model = models["f32"]
    tokens = model.tokenize(TEXT)[:300]
    losses: dict[int, float] = {}
    for begin in range(0, len(tokens), stride):
        window = tokens[begin : begin + ctx]
        rows = log_softmax(model.logits([tokens[0], *window[1:]]))
        for i in range(1, len(window)):
            losses.setdefault(begin + i, -float(rows[i - 1][window[i]]))
    assert sorted(losses) == list(range(1, len(tokens)))
    found = smallm.eval.perplexity(model, tokens, ctx=ctx, stride=stride)
    assert found.tokens == len(losses)
    assert found.nll == pytest.approx(math.fsum(losses.values()) / len(losses), rel=1e-12)


def test_parts_of_windows_change_nothing(
    models: dict[str, smallm.Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, reference = models["q4"], models["f32"]
    whole = smallm.eval.perplexity(model, TEXT, ctx=64)
    far = smallm.eval.divergence(model, reference, TEXT, ctx=64)
    smallm.eval.save_logits(model, TEXT, tmp_path / "whole", ctx=64)
    most = []
    logits = model.logits
    monkeypatch.setattr(_quality, "LOGIT_BYTES", 7 * 4 * model.info.vocabulary + 3)
    monkeypatch.setattr(
        model, "logits", lambda ids, last: most.append(last) or logits(ids, last=last)
    )
    assert smallm.eval.perplexity(model, TEXT, ctx=64)[:7] == whole[:7]
    assert smallm.eval.divergence(model, reference, TEXT, ctx=64) == far
    smallm.eval.save_logits(model, TEXT, tmp_path / "parts", ctx=64)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    assert max(most) == 7


def test_progress_and_max_windows(models: dict[str, smallm.Model]) -> None:
    model = models["f32"]
    seen: list[tuple[int, int]] = []
    found = smallm.eval.perplexity(
        model, TEXT, ctx=64, max_windows=3, progress=lambda *at: seen.append(at)
    )
    assert found.windows == 3
    assert seen[-1] == (3 * 63, 3 * 63) and sorted(seen) == seen
    assert smallm.eval.perplexity(model, TEXT, ctx=64, max_windows=10**6).windows > 3


def test_models_without_bos_keep_every_token(tiny_chat: Path) -> None:
    with smallm.load(tiny_chat) as model:
        assert model.tokenize("") == []
        losses = [
            -float(row[target])
            for rows, targets in windows_of(model, 64)
            for row, target in zip(rows, targets, strict=True)
        ]
        found = smallm.eval.perplexity(model, TEXT, ctx=64)
        assert found.nll == pytest.approx(math.fsum(losses) / len(losses), rel=1e-12)


# ---- divergence ----------------------------------------------------------------------------------


def expected_divergence(
    model: smallm.Model, reference: smallm.Model, ctx: int
) -> tuple[np.ndarray, float]:
    divergences, same = [], 0
    for (q, _), (p, _) in zip(windows_of(model, ctx), windows_of(reference, ctx), strict=True):
        divergences += (np.exp(p) * (p - q)).sum(-1).tolist()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return np.array(divergences, np.float64), same / len(divergences)


def test_divergence_is_that_of_the_logits(models: dict[str, smallm.Model]) -> None:
    model, reference = models["q4"], models["f32"]
    values, same = expected_divergence(model, reference, 64)
    assert 0.001 < values.mean() < 1 and 0 < same < 1  # or nothing is tested
    found = smallm.eval.divergence(model, reference, TEXT, ctx=64)
    assert found.tokens == len(values) and found.ctx == 64
    assert found.mean == pytest.approx(values.mean(), rel=1e-10)
    assert found.mean_error == pytest.approx(values.std(ddof=1) / len(values) ** 0.5, rel=1e-9)
    assert found.median == pytest.approx(np.median(values), rel=1e-9)
    assert found.quantile_999 == pytest.approx(np.quantile(values, 0.999), rel=1e-9)
    assert found.maximum == pytest.approx(values.max(), rel=1e-9)
    assert found.same_top == same
    own, other = (smallm.eval.perplexity(m, TEXT, ctx=64) for m in (model, reference))
    assert found.perplexity == pytest.approx(own.perplexity, rel=1e-12)
    assert found.reference_perplexity == pytest.approx(other.perplexity, rel=1e-12)
    assert found.ratio == pytest.approx(own.perplexity / other.perplexity, rel=1e-12)
    assert 0 < found.ratio_error < 1


def test_a_model_does_not_diverge_from_itself(
    models: dict[str, smallm.Model], tmp_path: Path
) -> None:
    model = models["q4"]
    found = smallm.eval.divergence(model, model, TEXT, ctx=64)
    assert abs(found.mean) < 1e-14 and found.same_top == 1 and found.ratio == 1
    smallm.eval.save_logits(model, TEXT, tmp_path / "own", ctx=64)
    found = smallm.eval.divergence(model, tmp_path / "own")
    assert 0 <= found.mean < 1e-7 and found.maximum < 1e-6
    assert found.ratio == pytest.approx(1, abs=1e-5) and found.same_top > 0.99


# ---- saved logits --------------------------------------------------------------------------------


def write_as_llama_cpp(
    path: Path, model: smallm.Model, ctx: int, n_windows: int
) -> dict[str, list[float]]:
    """What llama-perplexity writes; gives ln p of the tokens scored, in order."""
    n_vocab = model.info.vocabulary
    tokens = model.tokenize(TEXT)[: ctx * n_windows]
    data = struct.pack(f"<8siii{len(tokens)}i", b"_logits_", ctx, n_vocab, n_windows, *tokens)
    losses = []
    for rows, targets in windows_of(model, ctx, n_windows):
        for log_p, target in zip(rows, targets, strict=True):
            low = max(log_p.min(), log_p.max() - 16)
            scale = np.float32((log_p.max() - low) / 65535)
            steps = [max(0, round(float((x - low) / scale))) for x in log_p]
            data += struct.pack(f"<ff{n_vocab}H", scale, low, *(min(q, 65535) for q in steps))
            data += b"\0\0" * (n_vocab % 2)
            losses.append(-float(log_p[target]))
    path.write_bytes(data)
    return {"losses": losses}


@pytest.mark.parametrize("name", ["q4", "odd"])
def test_files_of_llama_cpp_are_read_and_written(
    models: dict[str, smallm.Model], tmp_path: Path, name: str
) -> None:
    reference = models[name]
    assert {models[n].info.vocabulary % 2 for n in ("q4", "odd")} == {0, 1}
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    losses = write_as_llama_cpp(theirs, reference, 64, 3)["losses"]
    smallm.eval.save_logits(reference, TEXT, ours, ctx=64, max_windows=3)
    a, b = theirs.read_bytes(), ours.read_bytes()
    head = 20 + 4 * 3 * 64
    assert len(a) == len(b) and a[:head] == b[:head]
    words = [np.frombuffer(x[head:], "<u2").astype(int) for x in (a, b)]
    assert np.mean(words[0] != words[1]) < 0.01  # a rounding here and there
    model = models["odd" if name == "odd" else "f32"]
    found = [smallm.eval.divergence(model, path, max_windows=3) for path in (theirs, ours)]
    exact = smallm.eval.divergence(model, reference, TEXT, ctx=64, max_windows=3)
    for got in found:
        assert got.mean == pytest.approx(exact.mean, rel=2e-4, abs=1e-7)
        assert got.quantile_999 == pytest.approx(exact.quantile_999, rel=2e-3, abs=1e-6)
        assert got.tokens == exact.tokens == len(losses)
        assert got.perplexity == pytest.approx(exact.perplexity, rel=1e-12)
        assert math.log(got.reference_perplexity) == pytest.approx(np.mean(losses), abs=1.3e-4)
        assert abs(got.same_top - exact.same_top) < 0.02


def test_what_lies_16_below_the_best_is_lost_but_hardly_missed(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    n, ctx = 4000, 64
    n_rows = ctx - 1 - ctx // 2
    p_logits = rng.normal(0, 6, (n_rows, n)).astype(np.float32)
    q_logits = p_logits + rng.normal(0, 0.2, (n_rows, n)).astype(np.float32)
    path = tmp_path / "rows"
    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    with open(path, "wb") as file:
        write_head(file, ctx, n, [0] * ctx)
        for logits in p_logits:
            write_row(file, logits, float(np.logaddexp.reduce(logits.astype(np.float64))))
    with SavedLogits(path) as saved:
        for p, q in zip(log_p, log_q, strict=True):
            row, lost = saved.row()
            below = p.max() - p > 16 + 3e-4
            assert (
                below.sum() > 100 and lost[below].all() and not lost[p.max() - p < 16 - 3e-4].any()
            )
            assert np.abs(row - p)[~lost].max() < 1.3e-4
            assert (row[lost] >= p[lost] - 1.3e-4).all()
            exact = float((np.exp(p) * (p - q)).sum())
            got = _quality._divergence(row, q.astype(np.float64), lost)
            assert got == pytest.approx(exact, rel=1e-3, abs=1e-6)


def test_equal_logits_are_saved(tmp_path: Path) -> None:
    path = tmp_path / "equal"
    with open(path, "wb") as file:
        write_head(file, 3, 5, [1, 2, 3])
        write_row(file, np.full(5, 2.5, np.float32), 2.5 + math.log(5))
    with SavedLogits(path) as saved:
        row, lost = saved.row()
    assert not lost.any() and np.allclose(row, -math.log(5), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"_logitz_" + data[8:], "holds no saved logits"),
        (lambda data: data[:15], "holds no saved logits"),
        (lambda data: data[:-1], "bytes; by its head it has"),
        (lambda data: data + b"\0", "bytes; by its head it has"),
        (lambda data: data[:8] + struct.pack("<i", 2) + data[12:], "n_ctx is 2"),
        (lambda data: data[:8] + struct.pack("<i", 65) + data[12:], "bytes; by its head it has"),
        (lambda data: data[:12] + struct.pack("<i", -1) + data[16:], "n_vocab is -1"),
        (lambda data: data[:16] + struct.pack("<i", 0) + data[20:], "n_windows is 0"),
        (lambda data: data[:16] + struct.pack("<i", 2**31 - 1) + data[20:], "bytes; by its head"),
        (lambda data: data[:24] + struct.pack("<i", -1) + data[28:], "a token is not within"),
        (lambda data: data[:24] + struct.pack("<i", 10**6) + data[28:], "a token is not within"),
        (lambda data: data[:532] + struct.pack("<f", math.nan) + data[536:], "a row has the scale"),
        (lambda data: data[:536] + struct.pack("<f", math.inf) + data[540:], "a row has the scale"),
    ],
)
def test_broken_files_are_refused(
    models: dict[str, smallm.Model], tmp_path: Path, change: Any, says: str
) -> None:
    path = tmp_path / "broken"
    smallm.eval.save_logits(models["f32"], TEXT, path, ctx=64, max_windows=2)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(smallm.SmallmError, match=says) as caught:
        smallm.eval.divergence(models["f32"], path)
    assert str(path) in str(caught.value)


def test_what_cannot_be_saved_leaves_nothing(
    models: dict[str, smallm.Model], tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "saved"
    path.write_text("what was there")
    with pytest.raises(KeyboardInterrupt):
        smallm.eval.save_logits(models["f32"], TEXT, path, ctx=64, progress=stop)
    assert path.read_text() == "what was there" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match=r"none.saved'"):
        smallm.eval.save_logits(models["f32"], TEXT, tmp_path / "none" / "saved", ctx=64)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_an_error(models: dict[str, smallm.Model], tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, smallm, smallm.eval\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))\n"
        "with smallm.load(sys.argv[1]) as model:\n"
        "    smallm.eval.save_logits(model, 'one two three ' * 100, sys.argv[2], ctx=64)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, models["f32"].info.path, tmp_path / "saved"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "OSError" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- what is refused -----------------------------------------------------------------------------


def test_wrong_arguments_are_refused(models: dict[str, smallm.Model], tmp_path: Path) -> None:
    model = models["f32"]
    evaluate, diverge = smallm.eval.perplexity, smallm.eval.divergence
    with pytest.raises(ValueError, match=r"the text has \d tokens; 64 are needed"):
        evaluate(model, "Hello", ctx=64)
    with pytest.raises(ValueError, match="the text has 1 tokens; 2 are needed"):
        evaluate(model, "", ctx=64, stride=1)
    for ctx in (2, 257):
        with pytest.raises(ValueError, match=rf"ctx must be 3 .. 256, not {ctx}"):
            evaluate(model, TEXT, ctx=ctx)
    with pytest.raises(ValueError, match=r"stride must be 1 .. 63, not 64"):
        evaluate(model, TEXT, ctx=64, stride=64)
    with pytest.raises(ValueError, match="max_windows"):
        evaluate(model, TEXT, ctx=64, max_windows=0)
    with pytest.raises(ValueError, match="lone surrogate"):
        evaluate(model, "a\ud800")
    with pytest.raises(TypeError, match=r"smallm\.Model, not PosixPath|smallm\.Model, not Windows"):
        evaluate(tmp_path, TEXT)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text is missing"):
        diverge(model, model)
    with pytest.raises(smallm.ModelNotFoundError, match="none"):
        diverge(model, tmp_path / "none")


def test_what_cannot_be_compared_is_refused(
    models: dict[str, smallm.Model], tiny_chat: Path, tmp_path: Path
) -> None:
    model, odd = models["f32"], models["odd"]
    smallm.eval.save_logits(model, TEXT, tmp_path / "saved", ctx=64, max_windows=2)
    with pytest.raises(ValueError, match=r"vocabulary of .* cannot be compared"):
        smallm.eval.divergence(odd, model, TEXT, ctx=64)
    with pytest.raises(ValueError, match=r"vocabulary of .* cannot be compared"):
        smallm.eval.divergence(odd, tmp_path / "saved")
    with smallm.load(tiny_chat) as other, pytest.raises(ValueError, match="the same tokens"):
        smallm.eval.divergence(other, model, TEXT, ctx=64)
    with pytest.raises(ValueError, match=r"token 2 is \d+ in one and \d+"):
        smallm.eval.divergence(model, tmp_path / "saved", "Another text. " + TEXT)
    with pytest.raises(ValueError, match=r"ctx is 32; the windows of .* have 64"):
        smallm.eval.divergence(model, tmp_path / "saved", ctx=32)
    with smallm.load(model.info.path, ctx=63) as short:
        with pytest.raises(ValueError, match=r"ctx must be 3 .. 63, not 64"):
            smallm.eval.divergence(short, tmp_path / "saved")
        with pytest.raises(ValueError, match=r"ctx must be 3 .. 63, not 64"):
            smallm.eval.divergence(model, short, TEXT, ctx=64)
    assert smallm.eval.divergence(model, tmp_path / "saved", TEXT).windows == 2


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_with_an_encoder_are_refused(tmp_path: Path, name: str) -> None:
    with smallm.load(goldens.Golden(name, tmp_path).path) as model:
        n = 2 * model.info.context
        with pytest.raises(smallm.UnsupportedModelError, match="encoder"):
            smallm.eval.perplexity(model, [5] * n, ctx=20)


def test_logits_that_are_not_finite_are_an_error(
    models: dict[str, smallm.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["f32"]
    for bad in (math.nan, math.inf, -math.inf):
        rows = np.zeros((31, model.info.vocabulary), np.float32)
        rows[3, 7] = bad
        monkeypatch.setattr(model, "logits", lambda ids, last, rows=rows: rows)
        with pytest.raises(smallm.SmallmError, match="not finite"):
            smallm.eval.perplexity(model, TEXT, ctx=64)


# ---- command line --------------------------------------------------------------------------------


def test_smallm_ppl(paths: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    with smallm.load(paths["q4"]) as model:
        expected = smallm.eval.perplexity(model, TEXT, ctx=64, max_windows=4)
        strided = smallm.eval.perplexity(model, TEXT, ctx=64, stride=16)
    options = ["-c", 64, "--chunks", 4, "-t", 1]
    done = smallm_command("ppl", paths["q4"], text, *options)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    error = f"{expected.perplexity_error:.4f}"
    assert lines[0].split() == ["perplexity", f"{expected.perplexity:.4f}", "+/-", error]
    assert f"{expected.tokens} tokens in 4 windows of 64" in lines[2]
    done = smallm_command("ppl", paths["q4"], "--json", *options, stdin=TEXT)
    answer = json.loads(done.stdout)
    assert list(answer) == list(expected._fields)
    assert (answer["nll"], answer["tokens"]) == (expected.nll, expected.tokens)
    done = smallm_command("ppl", paths["q4"], "-", "-c", 64, "--stride", 16, "--json", stdin=TEXT)
    assert json.loads(done.stdout)["nll"] == strided.nll
    assert "tokens; 64 are needed" in one_line(
        smallm_command("ppl", paths["q4"], "-c", 64, stdin="Hello")
    )
    wrong = smallm_command("ppl", paths["q4"], tmp_path / "none.txt")
    assert wrong.returncode == 2 and "does not exist" in wrong.stderr
    assert "byte 1 is wrong" in one_line(smallm_command("ppl", paths["q4"], stdin=b"a\xff"))


def test_smallm_kld(paths: dict[str, Path], tmp_path: Path) -> None:
    text, saved = tmp_path / "text.txt", tmp_path / "f32.kld"
    text.write_text(TEXT, encoding="utf-8")
    with smallm.load(paths["q4"]) as model, smallm.load(paths["f32"]) as reference:
        expected = smallm.eval.divergence(model, reference, TEXT, ctx=64)
    done = smallm_command("kld", paths["q4"], text, "--reference", paths["f32"], "-c", 64)
    assert done.returncode == 0 and done.stderr == ""
    assert f"mean {expected.mean:.6f} +/- {expected.mean_error:.6f}" in done.stdout
    assert f"median {expected.median:.6f}, 99.9 % {expected.quantile_999:.6f}" in done.stdout
    assert f"top token {100 * expected.same_top:.3f}" in done.stdout
    assert f"ratio {expected.ratio:.5f}" in done.stdout
    done = smallm_command("kld", paths["f32"], "-", "--save", saved, "-c", 64, stdin=TEXT)
    assert done.returncode == 0 and done.stdout == f"{saved}\n"
    for more in ([], [text]):
        done = smallm_command("kld", paths["q4"], *more, "--logits", saved, "--json")
        answer = json.loads(done.stdout)
        assert list(answer) == list(expected._fields)
        assert answer["mean"] == pytest.approx(expected.mean, rel=1e-3)
    for wrong in (
        [text],
        [text, "--reference", paths["f32"], "--save", saved],
        ["--reference", paths["f32"]],
        ["--save", saved],
    ):
        done = smallm_command("kld", paths["q4"], *wrong)
        assert done.returncode == 2 and done.stdout == "", wrong
