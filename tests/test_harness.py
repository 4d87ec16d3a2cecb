"""lm-evaluation-harness over a smallm model: scores are those of its logits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import smallm

pytest.importorskip("lm_eval")
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from smallm.eval import harness

STORIES = [
    ("Once upon a time", [" the fox", " a quick brown world", " hello"], 1),
    ("Once upon a time the dog", [" was", " is", " sat on the hill"], 0),
    ("The world said ", ["hello", "time", "on"], 2),
    ("He was", [" a", " a fox", " a fox."], 1),
    ("The lazy", [" dog", " dog", " fox"], 0),  # two alike
]


@pytest.fixture(scope="module", params=["spm", "bpe"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[smallm.Model]:
    path = tmp_path_factory.mktemp("harness") / "model.gguf"
    with smallm.load(tiny.write_tiny(path, tokenizer=request.param, n_ctx=64).path) as model:
        yield model


@pytest.fixture
def lm(model: smallm.Model) -> harness.HarnessModel:
    return harness.HarnessModel(model)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i, ("", i, 1)) for i, args in enumerate(arguments)]


def log_p(model: smallm.Model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Of whole logits, each text for itself."""
    ids = [*context, *continuation][-65:]
    rows = model.logits(ids[:-1]).astype(np.float64)[-len(continuation) :]
    rows = rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True)
    best = bool((rows.argmax(-1) == continuation).all())
    return sum(rows[i, token] for i, token in enumerate(continuation)), best


def bos(model: smallm.Model) -> list[int]:
    return model.tokenize("")


def pair(model: smallm.Model, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """As the harness cuts a text: spaces belong to the continuation."""
    text = context.rstrip()
    continuation = context[len(text) :] + continuation
    n = len(model.tokenize(text))
    whole = model.tokenize(text + continuation)
    return whole[:n], whole[n:]


def test_scores_are_those_of_the_logits(model: smallm.Model, lm: harness.HarnessModel) -> None:
    pairs = [(context, choice) for context, choices, _ in STORIES for choice in choices]
    long = "The quick brown fox. " * 30  # more than the context
    pairs += [(long, " hello"), (long, " hello world"), ("", "hello")]
    found = lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), got in zip(pairs[:-1], found, strict=False):
        ids = pair(model, context, continuation)
        expected = log_p(model, *ids)
        assert got == (pytest.approx(expected[0], rel=1e-12), expected[1])
    first = bos(model) or [lm.prefix_token_id]
    hello = model.tokenize("hello", add_special=False)
    assert found[-1] == (pytest.approx(log_p(model, first, hello)[0]), False)
    assert lm.loglikelihood([]) == []


def test_what_requests_share_is_run_once(tmp_path: Path) -> None:
    path = tiny.write_tiny(tmp_path / "long.gguf", n_ctx=1024).path
    rng = np.random.default_rng(3)
    with smallm.load(path) as model:
        lm = harness.HarnessModel(model)
        contexts = rng.integers(300, 400, (10, 50)).tolist()
        ends = rng.integers(300, 400, (4, 3)).tolist()
        several = [(None, context, end) for context in contexts for end in ends]
        single = [(None, context, end[:1]) for context in contexts for end in ends]
        for requests, n in ((several, 10 * (52 + 3 * 3)), (single, 10 * 50)):
            before = model.info.forward_tokens
            found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
            assert model.info.forward_tokens - before <= n
            with smallm.load(path) as other:
                for (_, context, end), got in zip(requests, found, strict=True):
                    assert got[0] == pytest.approx(log_p(other, context, end)[0], rel=1e-12)


def test_a_greedy_continuation_is_told(model: smallm.Model, lm: harness.HarnessModel) -> None:
    context = model.tokenize("Once upon")
    answer = model.generate(context, max_tokens=4, temperature=0).tokens
    assert answer
    (got,) = lm._loglikelihood_tokens([(None, context, answer)], disable_tqdm=True)
    assert got[1] and got[0] == pytest.approx(log_p(model, context, answer)[0])
    answer[-1] = (answer[-1] + 1) % model.info.vocabulary
    (got,) = lm._loglikelihood_tokens([(None, context, answer)], disable_tqdm=True)
    assert not got[1]


def test_parts_of_logits_change_nothing(
    lm: harness.HarnessModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(context, choice) for context, choices, _ in STORIES for choice in choices]
    texts = [("The quick brown fox. " * 30,), ("Hello",), ("",)]

    def ask() -> Any:
        return (
            lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True),
            lm.loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True),
        )

    whole = ask()
    monkeypatch.setattr(harness, "LOGIT_BYTES", 3 * 4 * lm.model.info.vocabulary)
    for got, expected in zip(ask(), whole, strict=True):
        assert np.allclose(got, expected, rtol=1e-12, atol=0)


def test_rolling_scores_each_token_once(model: smallm.Model, lm: harness.HarnessModel) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 8
    tokens = model.tokenize(text, add_special=False)
    assert len(tokens) > 2 * 64
    prefix, total, at = [lm.prefix_token_id], 0.0, 0
    while at < len(tokens):
        end = min(at + 64, len(tokens))
        context = prefix if at == 0 else tokens[max(0, end - 65) : at]
        total += log_p(model, context, tokens[at:end])[0]
        at = end
    got = lm.loglikelihood_rolling(
        asked("loglikelihood_rolling", (text,), ("",)), disable_tqdm=True
    )
    assert got == [pytest.approx(total, rel=1e-12), 0]


def test_answers_are_those_of_generate(model: smallm.Model, lm: harness.HarnessModel) -> None:
    long = "The quick brown fox. " * 30
    plain = model.generate("Once upon", max_tokens=10, temperature=0).text
    stop = plain[2:3]
    assert stop
    options: list[tuple[str, dict[str, Any]]] = [
        ("Once upon", {"until": [], "max_gen_toks": 10}),
        ("Once upon", {"until": stop, "max_gen_toks": 10, "do_sample": False, "temperature": 1.0}),
        ("Once upon", {"until": ["", stop], "max_new_tokens": 10}),
        (long, {"until": ["\0"], "max_gen_toks": 10}),
        ("Once upon", {"do_sample": True, "temperature": 0.9, "max_gen_toks": 10}),
        ("Once upon", {"do_sample": True, "temperature": 0.9, "max_gen_toks": 10}),
    ]
    got = lm.generate_until(asked("generate_until", *options), disable_tqdm=True)
    cut = plain[: plain.index(stop)]
    end = model.generate(model.tokenize(long)[-54:], max_tokens=10, temperature=0).text
    drawn = [
        model.generate(
            "Once upon", max_tokens=10, temperature=0.9, top_k=0, top_p=1, min_p=0, seed=seed
        ).text
        for seed in (0, 1)
    ]
    assert got == [plain, cut, cut, end, *drawn]
    with pytest.raises(smallm.SmallmError, match="max_gen_toks is 64"):
        lm.generate_until(asked("generate_until", ("a", {"max_gen_toks": 64})))


def test_chats_are_rendered_by_the_template(lm: harness.HarnessModel) -> None:
    if "tokenizer.chat_template" not in lm.model.metadata:
        with pytest.raises(smallm.TemplateError):
            lm.apply_chat_template([{"role": "user", "content": "Hello"}])
        assert lm.chat_template(True) == ""
        return
    text = lm.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert not lm.apply_chat_template(history, add_generation_prompt=False).endswith("assistant\n")
    assert lm.chat_template(True) == tiny.CHATML
    (answer,) = lm.generate_until(asked("generate_until", (text, {"max_gen_toks": 8})))
    assert answer == lm.model.chat("Hello", max_tokens=8, temperature=0).text


def write_task(folder: Path) -> None:
    rows = [{"story": s, "choices": c, "answer": a} for s, c, a in STORIES]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "stories.jsonl").write_text(text, encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "stories.jsonl")}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    tasks: dict[str, dict[str, Any]] = {
        "stories": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{story}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "stories_ppl": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{story}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "stories_end": {
            "output_type": "generate_until",
            "doc_to_text": "{{story}}",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        config = json.dumps({"task": name, **common, **task})  # JSON is YAML
        (folder / f"{name}.yaml").write_text(config, encoding="utf-8")


def test_a_local_task(
    model: smallm.Model,
    lm: harness.HarnessModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    names = ["stories", "stories_ppl", "stories_end"]
    found = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0)
    right, words, total, same = 0, 0, 0.0, 0
    for story, choices, answer in STORIES:
        scores = [log_p(model, *pair(model, story, choice))[0] for choice in choices]
        right += int(np.argmax(scores)) == answer
        ids = model.tokenize(story, add_special=False)
        total += log_p(model, bos(model) or [lm.prefix_token_id], ids)[0]
        words += len(story.split(" "))
        text = model.generate(story, max_tokens=8, temperature=0, stop=".").text
        same += text == choices[answer]
    results = found["results"]
    assert results["stories"]["acc,none"] == pytest.approx(right / len(STORIES))
    measured = results["stories_ppl"]["word_perplexity,none"]
    assert math.log(measured) == pytest.approx(-total / words, rel=0.05)
    assert results["stories_end"]["exact_match,none"] == same / len(STORIES)


def test_the_name_is_registered_and_the_command_runs(tiny_spm: Path, tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model

    assert get_model("smallm") is harness.HarnessModel
    by_name = harness.HarnessModel.create_from_arg_string(
        f"pretrained={tiny_spm},ctx=32", {"batch_size": "auto", "device": None}
    )
    assert by_name.max_length == 32 and by_name.batch_size == harness.BATCH
    by_name.model.close()
    write_task(tmp_path)
    command = [sys.executable, "-m", "smallm.eval.harness", "run", "--model", "smallm"]
    command += ["--model_args", f"pretrained={tiny_spm}", "--tasks", "stories"]
    done = subprocess.run(
        [*command, "--include_path", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|stories|" in done.stdout.replace(" ", "")


def test_models_with_an_encoder_are_refused(tmp_path: Path) -> None:
    import goldens

    path = goldens.Golden("t5", tmp_path).path
    with pytest.raises(smallm.UnsupportedModelError, match="encoder-decoder"):
        harness.HarnessModel(path)
