"""The forward pass against an independent one (reference.py), and what real models say."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import tiny
from reference import Reference, spm_encode

import smallm

IDS = [1, 300, 17, 401, 260, 99, 350, 350, 302, 45, 280, 333, 19, 270, 444, 261]

SHAPES = {
    "plain": {},
    "untied": {"tied": False},
    "all heads their own": {"n_head_kv": 4},
    "one kv head": {"n_head": 8, "n_head_kv": 1, "n_embd": 96},
    "many heads of each kv head": {"n_head": 142, "n_head_kv": 2, "head": 8, "n_embd": 32},
    "odd widths": {"n_embd": 40, "n_head": 5, "n_head_kv": 5, "n_ff": 172, "n_layer": 3},
    "rope factors": {"rope_factors": True},
    "biases": {"biases": True},
    "half rope": {"extra": {"llama.rope.dimension_count": 8}},
    "rope base and scale": {
        "extra": {
            "llama.rope.freq_base": 500000.0,
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": 4.0,
        }
    },
    "window": {"extra": {"llama.attention.sliding_window": 5}},
    "head of its own size": {"head": 24},
}


def prompt(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, n_vocab, n)]


def logits(path: Path, ids: list[int], **options: object) -> np.ndarray:
    with smallm.load(path, threads=2, **options) as model:
        return model.logits(ids)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_float_weights_and_cache_agree_with_the_reference(tmp_path: Path, shape: dict) -> None:
    path = tiny.write_tiny(tmp_path / "m.gguf", **shape).path
    expected = Reference(path, np.float64).logits(IDS)
    got = logits(path, IDS, kv="f32")
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert np.abs(got - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_default_cache_stays_close_to_the_reference(tmp_path: Path, shape: dict) -> None:
    path = tiny.write_tiny(tmp_path / "m.gguf", **shape).path
    expected = Reference(path, np.float64).logits(IDS)
    got = logits(path, IDS)
    assert np.abs(got - expected).max() < 2e-3 * np.ptp(expected)
    # It is a float16 cache, not a float32 one: rounding the same way comes closer still.
    rounded = Reference(path, np.float64, kv="f16").logits(IDS)
    assert np.abs(got - rounded).mean() < 0.1 * np.abs(rounded - expected).mean()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_int8_cache_is_what_the_reference_rounds_to(tmp_path: Path, shape: dict) -> None:
    path = tiny.write_tiny(tmp_path / "m.gguf", **shape).path
    expected = Reference(path, np.float64).logits(IDS)
    rounded = Reference(path, np.float64, kv="q8").logits(IDS)
    got = logits(path, IDS, kv="q8")
    assert np.abs(got - logits(path, IDS)).max() < 0.03 * np.ptp(expected)
    assert np.abs(rounded - expected).mean() > 0  # it does round
    assert np.abs(got - rounded).mean() < 0.01 * np.abs(rounded - expected).mean()


def test_the_int8_cache_takes_half_of_the_memory(tmp_path: Path) -> None:
    made = tiny.write_tiny(tmp_path / "m.gguf", n_ctx=1024)
    sizes = {}
    for kv in ("f32", "f16", "q8"):
        with smallm.load(made.path, kv=kv) as model:
            model.logits(prompt(700, made.n_vocab))
            sizes[kv] = model.info.cache_bytes
    assert sizes["f32"] == 2 * sizes["f16"]
    assert (
        0.5 * sizes["f16"] < sizes["q8"] < 0.8 * sizes["f16"]
    )  # heads of few values: scales count


def test_an_infinite_key_fails_its_own_pass_alone(tmp_path: Path) -> None:
    """One token has one; the page that it was written to is used again."""
    bad = 7

    def overflow(tensors: dict[str, tiny.Tensor]) -> None:
        embedding, keys = (
            tensors[name].data for name in ("token_embd.weight", "blk.0.attn_k.weight")
        )
        embedding[:, 0] = 0
        embedding[bad, 0] = 9
        keys[:, 0] = 1e38  # that 9 is about 7.6 after the norm: too much

    path = tiny.write_tiny(tmp_path / "m.gguf", tied=False, edit=overflow).path
    ids = [i for i in IDS if i != bad]
    for at in range(0, len(ids), 5):
        with smallm.load(path, kv="q8") as model, smallm.load(path, kv="q8") as fresh:
            with pytest.raises(smallm.SmallmError, match="infinite or NaN"):
                model.logits([*ids[:at], bad, *ids[at:]])
            for n in range(1, len(ids)):
                assert (model.logits(ids[:n]) == fresh.logits(ids[:n])).all()
            assert model.info.cache_bytes == fresh.info.cache_bytes > 0


def test_a_context_of_several_attention_chunks(tmp_path: Path) -> None:
    """Scores and sums cross the boundaries of 256 positions, pages and prefill chunks."""
    made = tiny.write_tiny(tmp_path / "m.gguf", n_ctx=1024)
    ids = prompt(700, made.n_vocab)
    expected = Reference(made.path, np.float64).logits(ids)
    assert np.abs(logits(made.path, ids, kv="f32") - expected).max() < 1e-4 * expected.std()


def test_a_window_smaller_and_larger_than_a_chunk(tmp_path: Path) -> None:
    for window in (100, 300):
        extra = {"llama.attention.sliding_window": window}
        made = tiny.write_tiny(tmp_path / "m.gguf", n_ctx=1024, extra=extra)
        ids = prompt(700, made.n_vocab)
        expected = Reference(made.path, np.float64).logits(ids)
        assert np.abs(logits(made.path, ids, kv="f32") - expected).max() < 1e-4 * expected.std()


# Float formats have no activation rounding: the same bound as F32 (their values are exact floats).
@pytest.mark.parametrize("name", [*tiny.FLOAT_FORMATS, "NVFP4"])
def test_float_formats(tmp_path: Path, name: str) -> None:
    made = tiny.write_tiny(tmp_path / "m.gguf", types=name, n_ff=128, tied=False)
    ids = [i % made.n_vocab for i in IDS]
    expected = Reference(made.path, np.float64).logits(ids)
    assert np.abs(logits(made.path, ids, kv="f32") - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", tiny.BLOCK_FORMATS + tiny.K_QUANTS)
def test_quantized_formats(tmp_path: Path, name: str, tied: bool) -> None:
    """Two bounds for each format, over 16 prompts of 4 tokens.

    Against the reference that rounds activations to int8 as the contract says, nothing is left but
    the order of float additions (some 4e-7 of the logits' deviation), except where a value lay so
    close to a rounding boundary that the two fall on different sides; one such flip moves the
    logits by about a percent, and meets fewer than one prompt in three.  So the *median* over
    prompts must be below 1e-5: weights that are off by one part in 1e4 give 5e-5 and more, one
    sub-block of eight that is off by one part in 500 gives 2e-4 and more.

    Against the reference without rounding each int8 value is off by up to half a unit, 1 / 254 of
    its block's largest value, which over the few layers here amounts to 2 to 7 percent of the
    deviation; a format whose activations were rounded more coarsely than that would exceed it.
    """
    made = tiny.write_tiny(tmp_path / "m.gguf", types=name, n_embd=256, n_ff=512, tied=tied)
    exact = Reference(made.path)
    rounding = Reference(made.path, activations="int8")
    prompts = [prompt(4, made.n_vocab, seed) for seed in range(16)]
    to_rounded, to_exact = [], []
    with smallm.load(made.path, threads=2, kv="f32") as model:
        for ids in prompts:
            got, expected = model.logits(ids), exact.logits(ids)
            unit = expected.std()
            to_rounded.append(np.sqrt(np.mean((got - rounding.logits(ids)) ** 2)) / unit)
            to_exact.append(np.sqrt(np.mean((got - expected) ** 2)) / unit)
    assert np.median(to_rounded) < 1e-5
    assert np.max(to_exact) < 0.07


@pytest.mark.parametrize("name", tiny.BLOCK_FORMATS)
def test_quantized_formats_with_widths_that_fill_no_panel(tmp_path: Path, name: str) -> None:
    """Rows and columns that are no multiple of 16 rows, 64 or 256 columns."""
    shape = {"n_embd": 160, "n_head": 5, "n_head_kv": 1, "n_ff": 224, "n_layer": 3}
    made = tiny.write_tiny(tmp_path / "m.gguf", types=name, tokenizer="bpe", **shape)
    rounding = Reference(made.path, activations="int8")
    errors = []
    with smallm.load(made.path, threads=2, kv="f32") as model:
        for seed in range(16):
            ids = prompt(3, made.n_vocab, seed)
            expected = rounding.logits(ids)
            errors.append(np.abs(model.logits(ids) - expected).max() / expected.std())
    assert np.median(errors) < 1e-4


@pytest.mark.parametrize("part", [0, 1])
def test_a_file_may_mix_formats(tmp_path: Path, part: int) -> None:
    formats = tiny.FORMATS[part::2]
    names = iter(formats * 3)
    made = tiny.write_tiny(
        tmp_path / "m.gguf", types=lambda _: next(names), n_embd=256, n_ff=512, tied=False
    )
    assert {t.type.name for t in made.tensors.values()} == {"F32", *formats}  # norms are F32
    rounding = Reference(made.path, activations="int8")
    errors = []
    with smallm.load(made.path, kv="f32") as model:
        for seed in range(16):
            ids = prompt(4, made.n_vocab, seed)
            expected = rounding.logits(ids)
            errors.append(np.abs(model.logits(ids) - expected).max() / expected.std())
        for name in formats:
            assert name in str(model.info), f"{name} is in the file but not in info"
    assert np.median(errors) < 1e-4


def test_greedy_text_follows_the_reference(tmp_path: Path) -> None:
    made = tiny.write_tiny(tmp_path / "m.gguf", tied=False)
    reference = Reference(made.path)
    with smallm.load(made.path, kv="f32") as model:
        for seed in range(4):
            ids = prompt(6, made.n_vocab, seed)
            tokens = model.generate(ids, max_tokens=12, temperature=0).tokens
            expected = reference.greedy(ids, len(tokens))
            assert list(tokens) == expected
            assert len(tokens) == 12 or reference.greedy([*ids, *tokens], 1) == [2]


# ---- real models ---------------------------------------------------------------------------------


def story_model() -> Path:
    folder = os.environ.get("SMALLM_TEST_MODELS")
    if not folder:
        pytest.skip("SMALLM_TEST_MODELS is not set")
    path = Path(folder) / "stories260K.gguf"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


STORY = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw"
    " a big, red ball. She wanted to play with it, but it was too high."
)


def test_the_story_model_tells_its_story() -> None:
    with smallm.load(story_model()) as model:
        answer = model.generate("Once upon a time", temperature=0, max_tokens=100)
    assert str(answer).startswith(STORY)


def test_the_story_with_an_int8_cache_is_the_same_for_all_threads() -> None:
    answers = []
    for threads in (1, 2, 3):
        with smallm.load(story_model(), threads=threads, kv="q8") as model:
            answers.append(str(model.generate("Once upon a time", temperature=0, max_tokens=300)))
    assert answers[0].startswith(STORY)
    assert answers == [answers[0]] * 3


def test_the_story_model_agrees_with_the_reference() -> None:
    path = story_model()
    reference = Reference(path, np.float64)
    ids = spm_encode(reference.meta, "Once upon a time" + STORY)
    expected = reference.logits(ids)
    with smallm.load(path, kv="f32") as model:
        assert model.tokenize("Once upon a time" + STORY) == ids
        assert np.abs(model.logits(ids) - expected).max() < 1e-4 * expected.std()


def test_the_default_model_knows_the_capital_of_france() -> None:
    try:
        answer = smallm.generate("The capital of France is", temperature=0, max_tokens=8)
    except smallm.DownloadError as error:
        pytest.skip(f"the default model cannot be fetched here: {error}")
    assert str(answer).startswith(" Paris")
