"""Embeddings: the hidden states that logits are made of, pooled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from goldens import Golden

import smallm

NAME = "llama"
HERE = Path(__file__).parent  # commands start here, where no source folder hides the package


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(NAME, tmp_path_factory.mktemp("embed"))


def pooled(golden: Golden, kind: int, folder: Path) -> Path:
    return golden.change(folder / f"pooling-{kind}.gguf", keys={"pooling_type": kind})


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint32)


def test_the_last_state_times_the_head_gives_the_expected_logits(
    golden: Golden, tmp_path: Path
) -> None:
    head = golden.read()[1]["output.weight"].values()
    with smallm.load(pooled(golden, 3, tmp_path), threads=2, kv="f32") as model:
        texts = [golden.ids[: row + 1] for row in golden.rows]
        got = model.embed(texts, normalize=False) @ head.T
    assert np.abs(got - golden.logits).max() < 1e-4 * golden.logits.std()


def test_pooling_is_the_mean_of_all_the_first_or_the_last(golden: Golden, tmp_path: Path) -> None:
    ids = golden.ids[:40]
    with smallm.load(pooled(golden, 3, tmp_path), kv="f32") as model:
        states = model.embed([ids[: i + 1] for i in range(len(ids))], normalize=False)
    mean = states.astype(np.float64).mean(0).astype(np.float32)
    expected = {None: mean, 0: mean, 1: mean, 2: states[0], 3: states[-1]}
    for kind, vector in expected.items():
        path = golden.path if kind is None else pooled(golden, kind, tmp_path)
        with smallm.load(path, kv="f32") as model:
            assert np.array_equal(model.embed([ids], normalize=False)[0], vector), kind


def test_a_file_that_ranks_or_pools_in_an_unknown_way_is_refused(
    golden: Golden, tmp_path: Path
) -> None:
    with pytest.raises(smallm.UnsupportedModelError, match=r"pooling_type is 4 \(rank\)"):
        smallm.load(pooled(golden, 4, tmp_path))
    with pytest.raises(smallm.CorruptModelError, match="pooling_type is 5; allowed are 0 to 4"):
        smallm.load(pooled(golden, 5, tmp_path))


def test_threads_tiers_and_company_change_no_bit(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = golden.ids * 2
    assert len(ids) > 512  # more than a pass holds
    texts = [ids, ids[:300], ids[:1], ids[5:9]]
    with smallm.load(golden.path, threads=1) as model:
        expected = np.concatenate([model.embed([text], normalize=False) for text in texts])
        available = model.info.isa
    assert available
    for tier in ("generic", available):
        monkeypatch.setenv("SMALLM_ISA", tier)
        with smallm.load(golden.path, threads=2) as model:
            got = model.embed(texts, normalize=False)
            model.generate(ids[:200], max_tokens=2, temperature=0)
            again = model.embed(texts[1:2], normalize=False)  # a prefix of it is in the cache
        assert np.array_equal(bits(got), bits(expected)), tier
        assert np.array_equal(bits(again), bits(expected[1:2])), tier


def test_vectors_have_length_one_unless_asked_otherwise(golden: Golden) -> None:
    with smallm.load(golden.path) as model:
        raw = model.embed(["one text", "and another"], normalize=False)
        got = model.embed(["one text", "and another"])
        assert got.dtype == np.float32 and got.shape == (2, model.info.embedding)
        lengths = np.linalg.norm(raw.astype(np.float64), axis=1, keepdims=True)
        assert np.abs(lengths - 1).min() > 0.1
        assert np.allclose(got, raw / lengths, rtol=1e-6, atol=0)
        assert np.array_equal(model.embed("one text"), got[:1])
        assert np.array_equal(model.embed([model.tokenize("one text")]), got[:1])
        assert model.embed([]).shape == (0, model.info.embedding)


def test_wrong_texts_are_refused(golden: Golden) -> None:
    with smallm.load(golden.path, ctx=64) as model:
        with pytest.raises(smallm.ContextOverflowError, match=r"texts\[1\] has 65 .* holds 64"):
            model.embed([[5], [5] * 65])
        with pytest.raises(ValueError, match=r"texts\[0\] has no tokens"):
            model.embed([[]])
        with pytest.raises(TypeError, match="texts must be"):
            model.embed(5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"texts\[0\]"):
            model.embed([[model.info.vocabulary]])
    with pytest.raises(smallm.ClosedError):
        model.embed(["text"])


def test_an_encoder_decoder_gives_no_embeddings(tmp_path: Path) -> None:
    with (
        smallm.load(Golden("t5", tmp_path).path) as model,
        pytest.raises(smallm.UnsupportedModelError, match="is an encoder-decoder"),
    ):
        model.embed("text")


def test_the_command_prints_a_vector_for_each_text(golden: Golden) -> None:
    command = [sys.executable, "-m", "smallm", "embed", "-m", str(golden.path)]
    lines = subprocess.run(
        [*command, "one text", "another"], cwd=HERE, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    stdin = subprocess.run(
        [*command, "--json", "--raw"],
        cwd=HERE,
        input="one text\nanother\n",
        capture_output=True,
        text=True,
        check=True,
    )
    with smallm.load(golden.path) as model:
        expected = model.embed(["one text", "another"])
        raw = model.embed(["one text", "another"], normalize=False)
    assert np.array_equal(np.array([line.split() for line in lines], np.float32), expected)
    assert np.array_equal(np.array(json.loads(stdin.stdout), np.float32), raw)
