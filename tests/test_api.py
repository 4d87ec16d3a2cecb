"""The Python package: names, arguments, answers, streams, threads, closing, forking, signals."""

from __future__ import annotations

import asyncio
import gc
import math
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import smallm
from smallm._generate import Defaults

HERE = Path(__file__).parent  # children start here, where no source folder hides the package
EOS = {"bpe": 2, "spm": 2}
ENDLESS = {"max_tokens": 60_000, "logit_bias": {0: -math.inf, 1: -math.inf, 2: -math.inf}}


@pytest.fixture(scope="module")
def model(tiny_chat: Path) -> Iterator[smallm.Model]:
    with smallm.load(tiny_chat) as loaded:
        yield loaded


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Waits for what another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def child(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


# ---- the package ---------------------------------------------------------------------------------


def test_importing_loads_nothing_that_is_not_needed() -> None:
    code = "import sys, smallm; print(*sorted(sys.modules))"
    loaded = set(child(code).stdout.split())
    assert "smallm" in loaded
    heavy = {"numpy", "jinja2", "rich", "click", "asyncio", "urllib.request", "inspect", "logging"}
    assert not loaded & {*heavy, "huggingface_hub", "subprocess", "importlib.metadata"}


def test_one_version() -> None:
    cmake = (HERE.parent / "CMakeLists.txt").read_text(encoding="utf-8")
    match = re.search(r"project\(smallm VERSION ([0-9.]+)", cmake)
    assert match and smallm.__version__ == match.group(1)


def test_the_package_carries_what_c_users_need() -> None:
    folder = Path(smallm.__file__).parent
    assert (folder / "include" / "smallm.h").is_file()
    assert (folder / "py.typed").is_file() and (folder / "_ffi.pyi").is_file()


def test_exceptions_have_one_root() -> None:
    names = """ModelNotFoundError UnsupportedModelError CorruptModelError ContextOverflowError
        MemoryBudgetError GrammarError TemplateError DownloadError CancelledError ClosedError"""
    for name in names.split():
        assert issubclass(getattr(smallm, name), smallm.SmallmError)
    assert issubclass(smallm.ModelNotFoundError, FileNotFoundError)
    assert issubclass(smallm.MemoryBudgetError, MemoryError)


def test_overflow_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(smallm.ContextOverflowError("too long", 9, 4)))
    assert (str(error), error.prompt_tokens, error.limit) == ("too long", 9, 4)


# ---- loading -------------------------------------------------------------------------------------


def test_info_tells_what_the_file_holds(tmp_path: Path) -> None:
    made = tiny.write_tiny(
        tmp_path / "m.gguf", n_layer=3, n_ctx=100, extra={"general.license": "mit"}
    )
    with smallm.load(made.path, threads=2) as model:
        info = model.info
        assert model.metadata["general.architecture"] == "llama"
    assert (info.architecture, info.context, info.trained_context) == ("llama", 100, 100)
    assert (info.layers, info.embedding, info.heads, info.kv_heads) == (3, 64, 4, 2)
    assert (info.vocabulary, info.feed_forward, info.tokenizer) == (made.n_vocab, 96, "llama")
    assert (info.threads, info.kv, info.license, info.name) == (2, "f16", "mit", "tiny")
    assert info.parameters == sum(int(np.prod(t.shape)) for t in made.tensors.values())
    assert "F32" in info.formats and info.bytes > 0 and info.isa


def test_load_takes_a_path_in_any_form_and_a_context(tiny_spm: Path) -> None:
    for path in (tiny_spm, str(tiny_spm)):
        with smallm.load(path, ctx=33, kv="f32") as model:
            assert (model.info.context, model.info.kv) == (33, "f32")
            assert "spm.gguf" in repr(model)


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"ctx": 0}, ValueError, "ctx"),
        ({"ctx": "8"}, TypeError, "ctx"),
        ({"ctx": 257}, ValueError, r"ctx must be 1 \.\. 256"),
        ({"threads": 0}, ValueError, "threads"),
        ({"threads": 257}, ValueError, "256"),
        ({"threads": True}, TypeError, "threads"),
        ({"kv": "q3"}, ValueError, "f16, f32, q8"),
        ({"memory_limit": 0}, ValueError, "memory_limit"),
        ({"memory_limit": 1000}, smallm.MemoryBudgetError, "1000"),
        ({"gpu": True}, TypeError, "gpu"),
        ({"progress": "yes"}, TypeError, "progress"),
    ],
)
def test_load_judges_its_arguments(
    tiny_spm: Path, arguments: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        smallm.load(tiny_spm, **arguments)


def test_a_memory_limit_that_is_kept(tiny_spm: Path) -> None:
    with smallm.load(tiny_spm) as model:
        model.generate("a", max_tokens=4)
        info = model.info
    need = info.bytes + info.cache_bytes + info.scratch_bytes
    with smallm.load(tiny_spm, memory_limit=2 * need) as model:
        assert model.generate("a", max_tokens=4).usage.completion_tokens > 0


def test_threads_come_from_the_environment(tiny_spm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLM_THREADS", "3")
    with smallm.load(tiny_spm) as model:
        assert model.info.threads == 3
    with smallm.load(tiny_spm, threads=1) as model:
        assert model.info.threads == 1


def test_files_that_are_no_models(tmp_path: Path, tiny_spm: Path) -> None:
    with pytest.raises(smallm.ModelNotFoundError, match=r"nothing\.gguf"):
        smallm.load(tmp_path / "nothing.gguf")
    with pytest.raises(smallm.ModelNotFoundError, match="smollm2-135m"):
        smallm.load("smolm2-135m")
    with pytest.raises(smallm.ModelNotFoundError, match="folder"):
        smallm.load(tmp_path)
    with pytest.raises(TypeError, match="bytes"):
        smallm.load(b"model")  # type: ignore[arg-type]
    foreign = tmp_path / "page.gguf"
    foreign.write_text("<!DOCTYPE html>" * 100)
    with pytest.raises((smallm.CorruptModelError, smallm.UnsupportedModelError), match=r"page"):
        smallm.load(foreign)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_spm.read_bytes()[:-1000])
    with pytest.raises(smallm.CorruptModelError, match=r"cut\.gguf"):
        smallm.load(cut)
    with smallm.load(tiny_spm) as model:  # the process lives on
        assert model.generate("a", max_tokens=1).tokens


# ---- text and tokens -----------------------------------------------------------------------------


def test_tokens_and_text(model: smallm.Model) -> None:
    text = "Hello, wörld! 文字 😀\n\ttabs\0nul"
    ids = model.tokenize(text)
    assert all(isinstance(i, int) for i in ids) and model.detokenize(ids) == text
    special = model.tokenize("<|im_end|>a", parse_special=True)
    assert special == [2, *model.tokenize("a")]
    assert len(model.tokenize("<|im_end|>a")) > 3
    assert model.detokenize(special) == "a"
    assert model.detokenize(special, skip_special=False) == "<|im_end|>a"
    assert model.detokenize(np.array(ids)) == text
    assert model.detokenize([]) == "" and model.tokenize("") == []
    broken = model.tokenize("😀")[:-1]
    assert "\ufffd" in model.detokenize(broken)


def test_the_beginning_token_is_added_on_request(tiny_spm: Path) -> None:
    with smallm.load(tiny_spm) as model:
        assert model.tokenize("a")[0] == 1
        assert model.tokenize("a", add_special=False) == model.tokenize("a")[1:]


def test_text_that_is_no_text(model: smallm.Model) -> None:
    for call in (model.tokenize, model.generate, model.chat):
        with pytest.raises(ValueError, match=r"U\+D800.*character 2"):
            call("ab\ud800")
    with pytest.raises(ValueError, match="U\\+DC41"):
        model.generate("a", stop="\udc41")
    with pytest.raises(TypeError, match="bytes"):
        model.tokenize(b"a")  # type: ignore[arg-type]


def test_logits(model: smallm.Model) -> None:
    ids = model.tokenize("The quick brown fox jumps")
    whole = model.logits(ids)
    assert whole.shape == (len(ids), model.info.vocabulary) and whole.dtype == np.float32
    assert np.isfinite(whole).all()
    assert (model.logits(np.array(ids), chunk=1) == whole).all()
    assert (model.logits(tuple(ids[:3])) == whole[:3]).all()
    for bad, kind in (
        ([], ValueError),
        ("text", TypeError),
        ([True], TypeError),
        ([1.0], TypeError),
    ):
        with pytest.raises(kind):
            model.logits(bad)  # type: ignore[arg-type]
    for chunk, kind in ((0, ValueError), (100_000, ValueError), (1.5, TypeError)):
        with pytest.raises(kind, match="chunk"):
            model.logits(ids, chunk=chunk)  # type: ignore[arg-type]
    for last in (1, 2, len(ids)):
        assert (model.logits(ids, last=last) == whole[-last:]).all()
        assert (model.logits(ids, last=last, chunk=2) == whole[-last:]).all()
    for last, kind in ((0, ValueError), (len(ids) + 1, ValueError), (1.5, TypeError)):
        with pytest.raises(kind, match="last"):
            model.logits(ids, last=last)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ids\[1\]"):
        model.logits([1, model.info.vocabulary])


def test_too_many_ids_for_logits(tiny_spm: Path) -> None:
    with smallm.load(tiny_spm, ctx=8) as model:
        assert len(model.logits([5] * 8)) == 8
        with pytest.raises(smallm.ContextOverflowError) as caught:
            model.logits([5] * 9)
    assert (caught.value.prompt_tokens, caught.value.limit) == (9, 8)


# ---- generating ----------------------------------------------------------------------------------


def test_a_completion(model: smallm.Model) -> None:
    answer = model.generate("Hello", max_tokens=20, seed=3, logprobs=None, **_no_end())
    assert str(answer) == answer.text
    assert answer.finish_reason in ("length", "stop") and answer.seed == 3
    assert answer.usage.prompt_tokens == len(model.tokenize("Hello"))
    assert 0 < answer.usage.completion_tokens <= 20
    assert answer.logprobs is None and answer.top_logprobs is None
    timings = answer.timings
    assert timings.load_s > 0 and timings.ttft_s > 0 and timings.prefill_tps > 0
    assert timings.decode_tps > 0 and timings.peak_rss > 1 << 20
    assert "finish_reason" in repr(answer)


def test_the_seed_decides(model: smallm.Model) -> None:
    def tokens(seed: int | None) -> list[int]:
        return model.generate("Hello", max_tokens=24, seed=seed, temperature=1.5).tokens

    assert tokens(1) == tokens(1) != tokens(2)
    drawn = [model.generate("a", max_tokens=0).seed for _ in range(4)]
    assert len(set(drawn)) == 4
    again = model.generate("Hello", max_tokens=24, temperature=1.5)
    assert tokens(again.seed) == again.tokens
    assert model.generate("a", max_tokens=1, seed=2**64 - 1).seed == 2**64 - 1


def test_lists(model: smallm.Model) -> None:
    prompts = ["Hello", "The quick brown", "a"]
    options: dict[str, Any] = {"max_tokens": 16, "temperature": 1.2}
    answers = model.generate(prompts, seed=7, **options)
    alone = [model.generate(p, seed=7 + i, **options) for i, p in enumerate(prompts)]
    assert [a.tokens for a in answers] == [a.tokens for a in alone]
    assert [a.seed for a in answers] == [7, 8, 9]
    ids = [model.tokenize(p) for p in prompts]
    assert [a.text for a in model.generate(ids, seed=7, **options)] == [a.text for a in answers]
    assert model.generate(ids[0], seed=7, **options).text == answers[0].text
    assert model.generate(np.array(ids[0]), seed=7, **options).text == answers[0].text
    assert model.generate([]) == []
    assert len(model.generate(["a"], max_tokens=1)) == 1
    assert len(model.generate(("a", "b"), max_tokens=1)) == 2
    wrapped = model.generate(["a", "b"], max_tokens=1, seed=2**64 - 1)
    assert [a.seed for a in wrapped] == [2**64 - 1, 0]


def test_more_prompts_than_run_at_once(model: smallm.Model) -> None:
    answers = model.generate(["Hello"] * 200, max_tokens=3, temperature=0)
    assert len(answers) == 200 and len({a.text for a in answers}) == 1


def test_greedy_and_logprobs_are_those_of_the_logits(model: smallm.Model) -> None:
    ids = model.tokenize("The quick brown fox")
    answer = model.generate(ids, max_tokens=8, temperature=0, logprobs=5, **_no_end())
    assert answer.logprobs is not None and answer.top_logprobs is not None
    assert len(answer.logprobs) == len(answer.top_logprobs) == len(answer.tokens) == 8
    logits = model.logits(ids + answer.tokens)[len(ids) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    expected -= logits.max(1, keepdims=True)
    for row, token, logprob, top in zip(
        expected, answer.tokens, answer.logprobs, answer.top_logprobs, strict=True
    ):
        assert logprob == pytest.approx(row[token], abs=1e-4)
        assert list(top) == list(np.argsort(-row, kind="stable")[:5])
        assert list(top.values()) == pytest.approx(sorted(row, reverse=True)[:5], abs=1e-4)
    own = model.generate(ids, max_tokens=2, temperature=0, logprobs=0, **_no_end())
    assert own.logprobs == answer.logprobs[:2] and own.top_logprobs == [{}, {}]


def _no_end() -> dict[str, Any]:
    return {"logit_bias": ENDLESS["logit_bias"]}


def test_bias_forbids_and_forces(model: smallm.Model) -> None:
    forced = model.generate("a", max_tokens=5, logit_bias={77: 1e9})
    assert forced.tokens == [77] * 5 and forced.finish_reason == "length"
    first = model.generate("a", max_tokens=1, temperature=0, **_no_end()).tokens[0]
    bias = {**ENDLESS["logit_bias"], first: -math.inf}
    assert first not in model.generate("a", max_tokens=20, temperature=0, logit_bias=bias).tokens


def test_stop_strings(model: smallm.Model) -> None:
    free = model.generate("Hello", max_tokens=30, temperature=0, **_no_end())
    stop = free.text[3:6]
    cut = model.generate("Hello", max_tokens=30, temperature=0, stop=stop, **_no_end())
    assert cut.finish_reason == "stop" and cut.text == free.text[: free.text.index(stop)]
    several = model.generate(
        "Hello", max_tokens=30, temperature=0, stop=["\0never", stop], **_no_end()
    )
    assert several.text == cut.text


def test_an_end_token_ends(model: smallm.Model) -> None:
    answer = model.generate("a", max_tokens=9, logit_bias={2: 1e9})
    assert answer.finish_reason == "stop" and answer.text == ""


def test_no_tokens_asked_for(model: smallm.Model) -> None:
    answer = model.generate("Hello", max_tokens=0)
    assert (answer.text, answer.tokens, answer.finish_reason) == ("", [], "length")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("max_tokens", -1, ValueError),
        ("max_tokens", 1.0, TypeError),
        ("max_tokens", True, TypeError),
        ("max_tokens", None, TypeError),
        ("max_tokens", 2**31, ValueError),
        ("temperature", -0.1, ValueError),
        ("temperature", math.nan, ValueError),
        ("temperature", math.inf, ValueError),
        ("temperature", "1", TypeError),
        ("temperature", 10**400, ValueError),
        ("top_p", 0, ValueError),
        ("top_p", 1.01, ValueError),
        ("top_k", -1, ValueError),
        ("top_k", 1.5, TypeError),
        ("min_p", 1, ValueError),
        ("min_p", -0.1, ValueError),
        ("typical_p", 0, ValueError),
        ("repeat_penalty", 0, ValueError),
        ("repeat_penalty", math.nan, ValueError),
        ("repeat_last_n", -2, ValueError),
        ("frequency_penalty", math.inf, ValueError),
        ("presence_penalty", "no", TypeError),
        ("seed", -1, ValueError),
        ("seed", 2**64, ValueError),
        ("seed", 1.0, TypeError),
        ("seed", True, TypeError),
        ("stop", "", ValueError),
        ("stop", ["a", ""], ValueError),
        ("stop", 7, TypeError),
        ("stop", [7], TypeError),
        ("logprobs", 65, ValueError),
        ("logprobs", True, TypeError),
        ("logit_bias", [1], TypeError),
        ("logit_bias", {"a": 1}, TypeError),
        ("logit_bias", {1: math.nan}, ValueError),
        ("logit_bias", {1: math.inf}, ValueError),
        ("logit_bias", {10**9: 1}, ValueError),
        ("on_overflow", "truncate", ValueError),
    ],
)
def test_bad_parameters(
    model: smallm.Model, name: str, value: object, kind: type[Exception]
) -> None:
    calls: list[Callable[..., Any]] = [model.generate, model.chat, model.stream, model.astream]
    for call in calls:
        with pytest.raises(kind, match=name):
            call("Hello", **{name: value})


def test_unknown_parameters(model: smallm.Model) -> None:
    with pytest.raises(TypeError, match=r"generate\(\).*'temprature'.*'temperature'"):
        model.generate("a", temprature=1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"stream\(\).*'grammar'"):
        model.stream("a", grammar="x")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        (None, TypeError),
        (7, TypeError),
        (b"bytes", TypeError),
        ({"role": "user"}, TypeError),
        ([{"role": "user", "content": "a"}], TypeError),
        ([1, "a"], TypeError),
        ([1, True], TypeError),
        ([1.0], TypeError),
        (["a", None], TypeError),
        ([[1], [2.5]], TypeError),
        ("", ValueError),
        (["a", ""], ValueError),
        ([[]], ValueError),
        ([-1], ValueError),
        ([1, 10**9], ValueError),
        ([2**70], ValueError),
    ],
)
def test_bad_prompts(model: smallm.Model, prompt: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="prompt"):
        model.generate(prompt)
    assert model.info.running == 0


def test_an_empty_text_begins_with_the_beginning_token(tiny_spm: Path) -> None:
    with smallm.load(tiny_spm) as model:
        assert model.generate("", max_tokens=2).usage.prompt_tokens == 1


def test_defaults_come_from_the_file(tmp_path: Path) -> None:
    extra = {"general.sampling.temp": 0.0, "general.sampling.top_k": 7}
    made = tiny.write_tiny(tmp_path / "m.gguf", extra=extra)
    with smallm.load(made.path) as model:
        texts = {model.generate("a", max_tokens=12, seed=seed).text for seed in range(5)}
        assert texts == {model.generate("a", max_tokens=12, temperature=0).text}
        hot = {model.generate("a", max_tokens=12, seed=s, temperature=5.0).text for s in range(5)}
        assert len(hot) > 1


def test_defaults_of_a_file_that_says_nothing_or_nonsense() -> None:
    assert Defaults.of({}) == (0.7, 0.95, 40, 0.05)
    strange = {"temp": "nan", "top_p": "2", "top_k": "-5", "min_p": "x"}
    assert Defaults.of({f"general.sampling.{k}": v for k, v in strange.items()}) == Defaults()
    sane = {"temp": "0.2", "top_p": "0.9", "top_k": "20", "min_p": "0"}
    found = Defaults.of({f"general.sampling.{k}": v for k, v in sane.items()})
    assert found == (0.2, 0.9, 20, 0.0)


# ---- too long ------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long(tiny_chat: Path) -> None:
    with smallm.load(tiny_chat, ctx=32) as model:
        ids = list(range(100, 133))
        with pytest.raises(smallm.ContextOverflowError, match=r"33.*32") as caught:
            model.generate(ids)
        assert (caught.value.prompt_tokens, caught.value.limit) == (33, 32)
        with pytest.raises(smallm.ContextOverflowError, match=r"prompt\[1\]"):
            model.generate([[100], ids])
        with pytest.raises(smallm.ContextOverflowError):
            model.chat("word " * 100)
        assert model.info.running == 0

        kept = model.generate(ids, on_overflow="truncate_left", max_tokens=8, temperature=0)
        assert kept.usage.prompt_tokens == 24
        assert kept.tokens == model.generate(ids[-24:], max_tokens=8, temperature=0).tokens
        whole = model.generate(ids[:32], on_overflow="truncate_left", max_tokens=8)
        assert whole.usage.prompt_tokens == 32
        half = model.generate(ids, on_overflow="truncate_left", max_tokens=1000)
        assert half.usage.prompt_tokens == 16


def test_truncating_keeps_the_beginning_token(tiny_spm: Path) -> None:
    with smallm.load(tiny_spm, ctx=16) as model:
        ids = model.tokenize("abcdefghijklmnopqrstuvwxyz")
        cut = model.generate(ids, on_overflow="truncate_left", max_tokens=4, temperature=0)
        same = model.generate([1, *ids[-11:]], max_tokens=4, temperature=0)
        assert cut.usage.prompt_tokens == 12 and cut.tokens == same.tokens


def test_an_answer_ends_where_the_context_does(tiny_chat: Path) -> None:
    with smallm.load(tiny_chat, ctx=32) as model:
        answer = model.generate([100] * 30, **ENDLESS)
        assert answer.finish_reason == "length" and 1 <= len(answer.tokens) <= 3


# ---- streams -------------------------------------------------------------------------------------


def test_a_stream_is_the_completion_in_pieces(model: smallm.Model) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "seed": 5, "temperature": 1.0, "logprobs": 2}
    whole = model.generate("Hello", **options)
    stream = model.stream("Hello", **options)
    chunks = list(stream)
    assert "".join(c.text for c in chunks) == whole.text == stream.completion.text
    assert [c.token for c in chunks if c.token >= 0] == whole.tokens
    assert [c.logprob for c in chunks if c.token >= 0] == whole.logprobs
    assert [c.top_logprobs for c in chunks if c.token >= 0] == whole.top_logprobs
    assert stream.completion.finish_reason == whole.finish_reason
    assert list(stream) == []
    stream.cancel()  # too late to matter
    assert stream.completion.text == whole.text
    assert all(c.logprob is None for c in model.stream("Hello", max_tokens=3))


def test_a_stream_gives_whole_characters(model: smallm.Model) -> None:
    bias = {model.tokenize("😀")[0]: 9.0, model.tokenize("ö")[-1]: 9.0, **ENDLESS["logit_bias"]}
    stream = model.stream("a", max_tokens=200, temperature=2.0, seed=1, logit_bias=bias)
    text = "".join(chunk.text for chunk in stream)
    assert text == model.detokenize(stream.completion.tokens)
    text.encode("utf-8")


def test_cancelling_a_stream(model: smallm.Model) -> None:
    stream = model.stream("Hello", **ENDLESS)
    with pytest.raises(smallm.SmallmError, match="not complete"):
        _ = stream.completion
    first = next(stream)
    stream.cancel()
    rest = list(stream)
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.text == "".join([first.text, *(c.text for c in rest)])
    assert until(lambda: model.info.running == 0)


def test_leaving_the_block_or_the_loop_cancels(model: smallm.Model) -> None:
    with model.stream("Hello", **ENDLESS) as stream:
        for _ in stream:
            break
    assert stream.completion.finish_reason == "cancelled" and stream.completion.tokens
    for _ in model.stream("Hello", **ENDLESS):
        break
    gc.collect()
    assert until(lambda: model.info.running == 0)


def test_cancelling_from_another_thread(model: smallm.Model) -> None:
    stream = model.stream("Hello", **ENDLESS)
    timer = threading.Timer(0.2, stream.cancel)
    timer.start()
    for _ in stream:
        pass
    timer.join()
    assert stream.completion.finish_reason == "cancelled"


def test_a_stream_read_by_two_threads(model: smallm.Model) -> None:
    options: dict[str, Any] = {"max_tokens": 300, "seed": 5, **_no_end()}
    stream = model.stream("Hello", **options)
    seen: list[list[int]] = [[], []]
    threads = [
        threading.Thread(target=lambda i=i: seen[i].extend(c.token for c in stream)) for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen[0] + seen[1]) == sorted(model.generate("Hello", **options).tokens)


def test_what_stream_takes(model: smallm.Model) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    options: dict[str, Any] = {"max_tokens": 5, "temperature": 0}
    assert _text(model.stream(messages, **options)) == model.chat("Hello", **options).text
    ids = model.tokenize("Hello")
    assert _text(model.stream(ids, **options)) == _text(model.stream("Hello", **options))
    for bad in ([], ["a", "b"], [[1], [2]]):
        with pytest.raises(TypeError, match="one prompt"):
            model.stream(bad)  # type: ignore[arg-type]


def _text(stream: smallm.Stream) -> str:
    return "".join(chunk.text for chunk in stream)


def test_a_stream_keeps_its_model(tiny_spm: Path) -> None:
    stream = smallm.load(tiny_spm).stream("a", max_tokens=50, **_no_end())
    gc.collect()
    assert len([c for c in stream if c.token >= 0]) == 50


# ---- asyncio -------------------------------------------------------------------------------------


def test_asyncio(model: smallm.Model) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0}

    async def run() -> None:
        one, two = await asyncio.gather(
            model.agenerate("Hello", **options), model.agenerate(["a", "b"], **options)
        )
        assert one.text == model.generate("Hello", **options).text
        assert [a.text for a in two] == [model.generate(p, **options).text for p in "ab"]
        stream = model.astream("Hello", **options)
        assert "".join([chunk.text async for chunk in stream]) == one.text
        assert stream.completion.text == one.text
        async with model.astream("Hello", **ENDLESS) as stream:
            async for _ in stream:
                break
        assert stream.completion.finish_reason == "cancelled"
        with pytest.raises(ValueError, match="prompt"):
            await model.agenerate("")

    asyncio.run(run())


def test_cancelling_a_task_cancels_the_request(model: smallm.Model) -> None:
    async def read() -> None:
        async for _ in model.astream("Hello", **ENDLESS):
            pass

    async def run() -> None:
        tasks = [
            asyncio.create_task(model.agenerate("Hello", **ENDLESS)),
            asyncio.create_task(read()),
        ]
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) for r in results)

    asyncio.run(run())
    assert until(lambda: model.info.running == 0)


# ---- closing -------------------------------------------------------------------------------------


def test_a_closed_model(tiny_chat: Path) -> None:
    model = smallm.load(tiny_chat)
    stream = model.stream("Hello", **ENDLESS)
    next(stream)
    model.close()
    model.close()
    with pytest.raises(smallm.ClosedError):
        for _ in stream:
            pass
    with pytest.raises(smallm.ClosedError):
        next(stream)
    calls: list[Callable[[], Any]] = [
        lambda: model.generate("a"),
        lambda: model.chat("a"),
        lambda: model.stream("a"),
        lambda: model.tokenize("a"),
        lambda: model.detokenize([1]),
        lambda: model.logits([1]),
        lambda: model.info,
        lambda: model.metadata,
    ]
    for call in calls:
        with pytest.raises(smallm.ClosedError, match="closed"):
            call()
    assert "closed" in repr(model)


def test_closing_while_threads_work(tiny_chat: Path) -> None:
    begun = threading.Semaphore(0)
    results: list[object] = []

    def work(model: smallm.Model) -> None:
        begun.release()
        try:
            while True:
                model.tokenize("some text " * 200)
                model.generate("Hello", **{**ENDLESS, "max_tokens": 50})
        except Exception as error:
            results.append(type(error))

    for _ in range(5):
        model = smallm.load(tiny_chat)
        results.clear()
        threads = [threading.Thread(target=work, args=(model,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in threads:
            begun.acquire()
        time.sleep(0.05)
        model.close()
        for thread in threads:
            thread.join(60)
        assert results == [smallm.ClosedError] * 4


def test_a_model_that_is_dropped_frees_its_threads(tiny_spm: Path) -> None:
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("needs Linux's /proc")
    before = set(os.listdir(tasks))
    model = smallm.load(tiny_spm, threads=3)
    model.generate("a", max_tokens=2)
    own = set(os.listdir(tasks)) - before
    assert len(own) == 3
    del model
    gc.collect()
    assert until(lambda: not own & set(os.listdir(tasks)))


def test_a_model_is_not_pickled(model: smallm.Model) -> None:
    with pytest.raises(TypeError, match="load it in the process"):
        pickle.dumps(model)


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "s = m.stream('a', **E); next(s)",
        "import threading, time\n"
        "threading.Thread(target=lambda: m.generate('a', **E), daemon=True).start()\n"
        "time.sleep(0.2)",
        "import atexit; atexit.register(lambda: m.generate('a', max_tokens=2))",
        "raise SystemExit(0)",
        "class C:\n def __del__(self): m.close()\nkeep = C()",
    ],
)
def test_the_interpreter_ends_quietly(tiny_chat: Path, ending: str) -> None:
    code = (
        "import sys, smallm\nm = smallm.load(sys.argv[1])\n"
        "E = dict(max_tokens=60000, logit_bias={i: -float('inf') for i in range(3)})\n" + ending
    )
    done = child(code, str(tiny_chat))
    assert (done.returncode, done.stderr) == (0, "")


# ---- fork and signals ----------------------------------------------------------------------------


def _in_child(model: smallm.Model, stream: smallm.Stream, path: str, out: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: model.generate("a"),
        lambda: model.generate(["a", "b"]),
        lambda: model.chat("a"),
        lambda: model.stream("a"),
        lambda: model.tokenize("a"),
        lambda: model.detokenize([1]),
        lambda: model.logits([1]),
        lambda: model.info,
        lambda: next(stream),
        lambda: smallm.generate("a", model=path),
    ]
    messages = []
    for call in calls:
        try:
            call()
            messages.append("no error")
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    stream.cancel()
    model.close()
    with smallm.load(path) as own:
        text = own.generate("Hello", max_tokens=8, temperature=0).text
    out.put((messages, text))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_errors_and_may_load_its_own(tiny_chat: Path) -> None:
    path = str(tiny_chat)
    smallm.generate("a", model=path, max_tokens=1)
    with smallm.load(path) as model:
        expected = model.generate("Hello", max_tokens=8, temperature=0).text
        stream = model.stream("Hello", **ENDLESS)  # the engine is busy while forking
        next(stream)
        context = multiprocessing.get_context("fork")
        out = context.Queue()
        process = context.Process(target=_in_child, args=(model, stream, path, out))
        process.start()
        messages, text = out.get(timeout=60)
        process.join(60)
        assert process.exitcode == 0
        stream.cancel()
        for message in messages:
            assert message.startswith("SmallmError: ") and "load" in message, message
        assert text == expected
        assert model.generate("Hello", max_tokens=8, temperature=0).text == expected


INTERRUPTED = """
import os, signal, sys, threading, time
import smallm
E = dict(max_tokens=60000, logit_bias={i: -float("inf") for i in range(3)})
model = smallm.load(sys.argv[1])
calls = {
    "generate": lambda: model.generate("Hello", **E),
    "list": lambda: model.generate(["Hello"] * 3, **E),
    "chat": lambda: model.chat("Hello", **E),
    "stream": lambda: [chunk for chunk in model.stream("Hello", **E)],
    "logits": lambda: [model.logits([5] * 4000, chunk=1) for _ in range(1000)],
    "tokenize": lambda: [model.tokenize("some text " * 30_000) for _ in range(10_000)],
    "load": lambda: [smallm.load(sys.argv[1]) for _ in range(100_000)],
}
expected = model.generate("Hello", max_tokens=8, temperature=0).text
model.chat("Hello", max_tokens=1)  # Python may lose an interrupt while it imports
times = []
def interrupt():
    time.sleep(0.3)
    times.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
thread = threading.Thread(target=interrupt)
thread.start()
try:
    calls[sys.argv[2]]()
    print("no interrupt")
except KeyboardInterrupt:
    took = time.monotonic() - times[0]
    thread.join()
    while model.info.running:
        time.sleep(0.01)
    assert model.generate("Hello", max_tokens=8, temperature=0).text == expected
    print("interrupted", "quickly" if took < 5 else took)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
@pytest.mark.parametrize(
    "call", ["generate", "list", "chat", "stream", "logits", "tokenize", "load"]
)
def test_ctrl_c_ends_any_call_and_the_model_lives_on(tiny_chat: Path, call: str) -> None:
    done = child(INTERRUPTED, str(tiny_chat), call)
    assert done.stdout.strip() == "interrupted quickly", done.stderr


def test_signals_arrive_while_a_call_waits(model: smallm.Model) -> None:
    """A handler runs during a call: the interpreter lock is not held while the engine works."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("needs POSIX timers")
    ticks = []
    old = signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        stream = model.stream("Hello", **ENDLESS)
        threading.Timer(1.0, stream.cancel).start()
        for _ in stream:
            pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert len(ticks) >= 3


# ---- the module-level functions ------------------------------------------------------------------


def test_the_last_model_stays_loaded(
    tiny_spm: Path, tiny_chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smallm import _model

    loads: list[object] = []

    def counting(model: Any) -> smallm.Model:
        loads.append(model)
        return smallm.load(model)

    monkeypatch.setattr(_model, "load", counting)
    monkeypatch.setattr(_model, "_kept", None)
    options: dict[str, Any] = {"max_tokens": 4, "temperature": 0}
    first = smallm.generate("Hello", model=tiny_spm, **options)
    assert smallm.generate("Hello", model=str(tiny_spm), **options).text == first.text
    assert len(loads) == 1
    smallm.chat("Hello", model=tiny_chat, **options)
    smallm.chat([{"role": "user", "content": "Hello"}], model=tiny_chat, **options)
    assert len(loads) == 2
    with smallm.load(tiny_spm) as own:
        assert smallm.generate("Hello", model=own, **options).text == first.text
    assert len(loads) == 2
    assert [a.text for a in smallm.generate(["Hello"], model=tiny_spm, **options)] == [first.text]


def test_the_default_model_is_fetched_and_knows_the_capital(smollm2: smallm.Model) -> None:
    answer = smallm.generate("The capital of France is", temperature=0, stop=".")
    assert str(answer) == " Paris"
    ids = smollm2.tokenize("The capital of France is")
    assert smollm2.detokenize([int(smollm2.logits(ids)[-1].argmax())]) == " Paris"
    assert str(smallm.chat("Say hello.", temperature=0, max_tokens=16)).strip()


TIMERS = """
import sys, time, smallm
with smallm.load(sys.argv[1], threads=2) as m:
    assert set(m.info.timers.values()) <= {0.0}, m.info.timers
    start = time.perf_counter()
    m.generate([3, 4, 5, 6, 7, 8, 9], max_tokens=20, temperature=0)
    wall = time.perf_counter() - start
    for name, seconds in m.info.timers.items():
        print(f"{name}={seconds}")
    print(f"wall={wall}")
"""


def test_timers_account_for_the_passes(tiny_chat: Path) -> None:
    done = child(TIMERS, str(tiny_chat), env={**os.environ, "SMALLM_TIMERS": "1"})
    assert done.returncode == 0, done.stderr
    seconds = {
        k: float(v) for k, _, v in (line.partition("=") for line in done.stdout.split("\n")) if k
    }
    wall = seconds.pop("wall")
    used = {name for name, value in seconds.items() if value > 0}
    assert {"wait", "attention", "norm and quantize", "head", "sample"} <= used
    assert any(name.startswith("matmul ") for name in used)
    # Two threads, each doing one thing at a time.
    assert 0 < sum(seconds.values()) <= 2 * wall


def test_timers_are_off_unless_asked_for(tiny_chat: Path) -> None:
    code = "import sys, smallm\nprint(smallm.load(sys.argv[1]).info.timers)"
    for value in ("", "0"):
        done = child(code, str(tiny_chat), env={**os.environ, "SMALLM_TIMERS": value})
        assert done.stdout.strip() == "{}", done.stderr
