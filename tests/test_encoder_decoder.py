"""Models with an encoder beside the decoder: what a prompt is, and that nothing changes an answer.

tests/test_golden.py has their logits, tests/c/check_session.c cuts, forks and cancels at random.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tiny
from goldens import Golden, ask, write_folder
from tiny import Tensor

import smallm
from smallm.convert import convert

START = 3  # the goldens' decoder_start_token_id
REFUSALS = (smallm.CorruptModelError, smallm.UnsupportedModelError)
PARAMS: dict[str, Any] = {"max_tokens": 8, "temperature": 0.8, "seed": 3, "logprobs": 0}


@pytest.fixture(scope="module")
def convert_golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Golden]:
    folder = tmp_path_factory.mktemp("encoder-decoder")
    return cache(lambda name: Golden(name, folder))


@pytest.fixture(scope="module")
def golden(convert_golden: Callable[[str], Golden]) -> Golden:
    return convert_golden("t5")


def same(a: smallm.Completion, b: smallm.Completion) -> bool:
    return a.tokens == b.tokens and a.logprobs == b.logprobs


def compute(path: Path, ids: list[int]) -> np.ndarray:
    with smallm.load(path, threads=2) as model:
        return ask(model, ids)


# ---- answers -------------------------------------------------------------------------------------


def test_the_encoder_reads_the_prompt_and_the_decoder_answers(golden: Golden) -> None:
    ids = golden.ids[:20]
    with smallm.load(golden.path, threads=2) as model:
        answer = [START]
        for _ in range(6):
            answer.append(int(model.logits(answer, source=ids)[-1].argmax()))
        got = model.generate(ids, max_tokens=6, temperature=0)
        assert got.tokens == answer[1:] and got.text == model.detokenize(answer[1:])
        assert got.usage.prompt_tokens == 21
        with model.stream(ids, max_tokens=6, temperature=0) as stream:
            assert [chunk.token for chunk in stream if chunk.token >= 0] == answer[1:]
        text = "A prompt of letters."
        by_ids = model.generate(model.tokenize(text), **PARAMS)
        assert same(model.generate(text, **PARAMS), by_ids)


@pytest.mark.parametrize("kv", ["f16", "f32", "q8"])
def test_company_changes_nothing(golden: Golden, kv: str) -> None:
    """Nor do threads, and who was there before."""
    prompts = [golden.ids[i : i + n] for i, n in enumerate((1, 2, 40, 64, 256, 257, 300, 5))]
    with smallm.load(golden.path, threads=1, kv=kv) as model:
        alone = [model.generate(ids, **PARAMS | {"seed": 3 + i}) for i, ids in enumerate(prompts)]
    assert len({tuple(c.tokens) for c in alone}) > 4
    with smallm.load(golden.path, threads=2, kv=kv) as model:
        for got in (model.generate(prompts, **PARAMS), model.generate(prompts, **PARAMS)):
            assert all(map(same, alone, got))


def test_a_prompt_is_encoded_once_and_answers_go_on(golden: Golden) -> None:
    ids, other = golden.ids[:100], [*golden.ids[:99], 7]
    with smallm.load(golden.path, threads=2) as model:
        first = model.generate(ids, **PARAMS)
        assert first.usage.cached_tokens == 0
        again = model.generate(ids, **PARAMS)
        assert same(first, again) and again.usage.cached_tokens == 100
        # A source that differs in its last token has nothing in common with it.
        assert model.generate(other, **PARAMS).usage.cached_tokens == 0
        passes = model.info.forward_passes
        prefix = [START, *first.tokens]
        got = model.logits(prefix, source=ids)
        assert model.info.forward_passes == passes + 1
    with smallm.load(golden.path, threads=2) as model:
        assert np.array_equal(got.view(np.uint32), model.logits(prefix, source=ids).view(np.uint32))
        assert not np.allclose(got, model.logits(prefix, source=other))


def test_cancelling_one_answer_leaves_the_others(golden: Golden) -> None:
    with smallm.load(golden.path, threads=2) as model:
        ids = golden.ids
        expected = model.generate(ids, **PARAMS | {"max_tokens": 60})
        results: list[smallm.Completion] = []
        thread = threading.Thread(
            target=lambda: results.append(model.generate(ids, **PARAMS | {"max_tokens": 60}))
        )
        thread.start()
        for i in range(20):
            stream = model.stream(ids[i : i + 200], max_tokens=200, temperature=0)
            if i % 2:
                next(iter(stream))
            stream.cancel()
            assert stream.completion.finish_reason in ("cancelled", "stop")
        thread.join()
        assert same(results[0], expected)


def test_memory_for_a_source_is_within_the_limit(golden: Golden) -> None:
    with smallm.load(golden.path, threads=1) as model:
        expected = model.generate(golden.ids, **PARAMS)
        info = model.info
    least = info.bytes + info.scratch_bytes + 10000
    with (
        smallm.load(golden.path, threads=1, memory_limit=least) as model,
        pytest.raises(smallm.MemoryBudgetError),
    ):
        model.generate(golden.ids, **PARAMS)
    limit = least + info.cache_bytes
    with smallm.load(golden.path, threads=1, memory_limit=limit) as model:
        for _ in range(3):  # what is kept of one makes room for the next
            assert same(model.generate(golden.ids, **PARAMS), expected)
            model.generate(golden.ids[::-1], **PARAMS)


def test_a_folder_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    """SentencePiece Unigram, as published: a source ends with EOS, answers begin after PAD."""
    spec = Golden("t5").spec
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "vocab_size": 300}
    folder = write_folder(spec | {"config": spec["config"] | ids}, "t5", tmp_path / "folder")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    text = "Translate English to German: the little fox found its twelve coins in a quiet wood. "
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text * 3, text.upper()]), model_prefix=str(folder / "spiece"),
        model_type="unigram", vocab_size=200, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    source = [*processor.encode(text), 1]
    path = convert(folder, tmp_path / "m.gguf", type="q8_0", progress=False)
    known = {i: -1000.0 for i in range(300) if i < 3 or i >= processor.vocab_size()}
    with smallm.load(path, threads=2) as model:
        got = model.generate(text, temperature=0, max_tokens=12, logit_bias=known)
        assert got.usage.prompt_tokens == len(source) + 1
        assert same(got, model.generate(source, temperature=0, max_tokens=12, logit_bias=known))
        assert got.tokens and got.text == processor.decode(got.tokens)
        first = int(model.logits([0], source=source)[0, 3 : processor.vocab_size()].argmax()) + 3
        assert got.tokens[0] == first


# ---- what is asked for wrongly -------------------------------------------------------------------


def test_a_source_goes_with_an_encoder(golden: Golden, tiny_spm: Path) -> None:
    with smallm.load(golden.path) as model:
        for missing in (None, []):
            with pytest.raises(ValueError, match="source is missing"):
                model.logits([START], source=missing)
        with pytest.raises(ValueError, match="source"):
            model.logits([START], source=[300])
    with smallm.load(tiny_spm) as model, pytest.raises(ValueError, match="has no encoder"):
        model.logits([1], source=[1])


def test_the_context_holds_a_source_and_an_answer_each(golden: Golden) -> None:
    ids, on = golden.ids, dict.fromkeys(range(4), -1000.0)  # without tokens that end an answer
    with smallm.load(golden.path, ctx=100, threads=2) as model:
        got = model.generate(ids[:100], max_tokens=1000, logit_bias=on)
        assert len(got.tokens) == 99 and got.finish_reason == "length"
        with pytest.raises(smallm.ContextOverflowError) as caught:
            model.generate(ids[:101])
        assert "101" in str(caught.value) and "100" in str(caught.value)
        with pytest.raises(smallm.ContextOverflowError):
            model.logits([START], source=ids[:101])
        cut = model.generate(ids[:120], on_overflow="truncate_left", **PARAMS)
        assert same(cut, model.generate(ids[20:120], **PARAMS))


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
def test_files_that_do_not_name_the_scale_of_their_head(
    name: str, convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    """Files of llama.cpp: the first models have it, even beside a copy of their table."""
    golden = convert_golden(name)

    def copy(tensors: dict[str, Tensor]) -> None:
        tensors.setdefault("output.weight", tensors["token_embd.weight"])

    expected = compute(golden.path, golden.ids[:50])
    for edit in (None, copy):
        path = golden.change(tmp_path / "m.gguf", keys={"logit_scale": None}, edit=edit)
        assert np.array_equal(compute(path, golden.ids[:50]), expected)


def test_layers_with_biases_of_their_own(golden: Golden, tmp_path: Path) -> None:
    expected, path = compute(golden.path, golden.ids), tmp_path / "m.gguf"
    for layer in ("dec.blk.1", "enc.blk.2"):

        def own(tensors: dict[str, Tensor], factor: float, layer: str = layer) -> None:
            t = tensors[f"{layer[:3]}.blk.0.attn_rel_b.weight"]
            new = Tensor(t.type, t.shape, t.data * np.float32(factor))
            tensors[f"{layer}.attn_rel_b.weight"] = new

        golden.change(path, edit=lambda t: own(t, 1))
        assert np.array_equal(compute(path, golden.ids), expected)
        golden.change(path, edit=lambda t: own(t, 0.5))
        assert golden.error(compute(path, golden.ids)) > 0.03


def test_biases_across_that_nobody_adds(golden: Golden, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        rows = tensors["dec.blk.0.attn_rel_b.weight"]
        tensors["dec.blk.0.cross_attn_rel_b.weight"] = rows

    path = golden.change(tmp_path / "m.gguf", edit=add)
    assert np.array_equal(compute(path, golden.ids), compute(golden.path, golden.ids))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("decoder_start_token_id", None, "decoder_start_token_id is missing"),
        ("decoder_start_token_id", 300, "allowed are 0 to 299"),
        ("decoder_block_count", 1, "dec.blk.1"),
        ("decoder_block_count", None, "dec.blk.2"),
        ("decoder_block_count", 0, "allowed are 1 to 1024"),
        ("block_count", 2, "enc.blk.2"),
        ("attention.relative_buckets_count", None, "relative_buckets_count is missing"),
        ("attention.relative_buckets_count", 3, "allowed are 4 to 255"),
        ("attention.relative_buckets_count", 16, "attn_rel_b"),
        ("logit_scale", tiny.f32(0), "logit_scale"),
        ("attention.sliding_window", 64, "a layer has a window"),
        ("attention.head_count_kv", [6, 3], "head_count_kv is 3 in layer 1"),
    ],
)
def test_what_a_file_says_is_judged(
    golden: Golden, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    path = golden.change(tmp_path / "m.gguf", keys={key: value})
    with pytest.raises(REFUSALS) as caught:
        smallm.load(path)
    assert message in str(caught.value).replace("\n", " ")


@pytest.mark.parametrize(
    "name",
    ["enc.blk.0.cross_attn_q.weight", "enc.blk.1.cross_attn_rel_b.weight", "blk.0.attn_q.weight"],
)
def test_tensors_of_the_other_stack(golden: Golden, tmp_path: Path, name: str) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors["dec.blk.0.cross_attn_q.weight"]

    path = golden.change(tmp_path / "m.gguf", edit=add)
    with pytest.raises(smallm.UnsupportedModelError, match=name):
        smallm.load(path)


def test_layers_without_attention(golden: Golden, tmp_path: Path) -> None:
    keys = {"shortconv.l_cache": 3, "attention.head_count_kv": [6, 0]}
    path = golden.change(tmp_path / "m.gguf", keys=keys)
    with pytest.raises(smallm.UnsupportedModelError, match="no attention"):
        smallm.load(path)


def test_a_gate_belongs_to_all_layers(
    convert_golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    golden, path = convert_golden("t5-gated"), tmp_path / "m.gguf"
    for name in ("dec.blk.0.ffn_gate.weight", "enc.blk.1.ffn_gate.weight"):
        golden.change(path, edit=lambda t, name=name: t.pop(name))
        with pytest.raises(REFUSALS, match="ffn_gate"):
            smallm.load(path)
