"""lm-evaluation-harness, in process: importing this registers the model "smallm" with it.

>>> import lm_eval, smallm.eval.harness
>>> lm_eval.simple_evaluate("smallm", model_args="pretrained=model.gguf", tasks=["arc_easy"])

A loaded model does, too: simple_evaluate(HarnessModel(model), ...).  Needs the extra `eval`.

Requests that begin alike share what they compute: continuations whose input is the same are read
off one row of logits, and those with the same context run after the first of them, from its cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .. import _chat
from .._errors import SmallmError
from .._generate import Stream, finish
from .._model import Model, load
from ._quality import LOGIT_BYTES, generates, log_sums
from ._saved import Floats

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness is missing ({error}): pip install 'smallm[eval]'"
    ) from error

MAX_GEN_TOKS = 256
BATCH = 16

_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("top_k", "top_p", "min_p", "typical_p", "seed")  # without effect where greedy

Encoded = tuple[Any, list[int], list[int]]  # the strings, tokens of context and continuation


class _Input:
    """Tokens that are run, and the requests that are read off them."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens
        self.n_last = 0  # rows of logits that are wanted
        self.requests: list[tuple[int, list[int]]] = []  # index, continuation


@register_model("smallm")
class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model as lm-evaluation-harness wants it.

    pretrained: a Model, or what smallm.load() takes: a path, a catalogue name, ...
    ctx, threads, kv: as for smallm.load(), where it is not a Model.
    max_gen_toks: tokens of an answer where a task does not say.
    batch_size: answers that are generated together.
    max_batch_size, device: what the harness passes besides; without effect.

    Texts are tokenized with BOS where the model adds it, and with control tokens parsed, as the
    harness's own models do it.
    """

    def __init__(
        self,
        pretrained: Model | str | os.PathLike[str] | None = None,
        *,
        ctx: int | None = None,
        threads: int | None = None,
        kv: str = "f16",
        max_gen_toks: int = MAX_GEN_TOKS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pretrained, Model):
            pretrained = load(pretrained, ctx=ctx, threads=threads, kv=kv)
        generates(pretrained)
        self.model = pretrained
        self.max_length: int = pretrained.info.context
        self.max_gen_toks = int(max_gen_toks)
        size = str(batch_size)  # or "auto"
        self.batch_size = int(size) if size.isdecimal() else BATCH

    # ---- tokens ----

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token: int = self.model._info.eos
        if token < 0:
            raise SmallmError(f"{self.model.info.path} has no token that ends a text")
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        token: int = self.model._info.bos
        return token if token >= 0 else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Token ids; None: with BOS where the model adds it and the text does not begin with it."""
        ids = self.model.tokenize(string, add_special=False, parse_special=True)
        bos = self.model._bos_added
        if bos is None or add_special_tokens is False:
            return ids
        return ids if add_special_tokens is None and ids[:1] == [bos] else [bos, *ids]

    # ---- chats ----

    @property
    def tokenizer_name(self) -> str:
        """Tells requests of one model from those of another in the harness's cache."""
        return os.path.basename(self.model.info.path)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The file's template, or ""."""
        return self.model.metadata.get("tokenizer.chat_template", "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat."""
        messages = _chat.judge_messages(chat_history)
        return _chat.render(self.model, messages, add_generation_prompt=add_generation_prompt)

    # ---- scoring ----

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """For each request ln of the continuation's probability, and whether it is the greedy
        one."""
        inputs: dict[tuple[int, ...], _Input] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise SmallmError(
                    f"a continuation has {len(continuation)} tokens; the context holds "
                    f"{self.max_length}"
                )
            if continuation:
                tokens = tuple([*context, *continuation][-self.max_length - 1 : -1])
                found = inputs.setdefault(tokens, _Input(tokens))
                found.n_last = max(found.n_last, len(continuation))
                found.requests.append((i, continuation))
        scores = np.zeros(len(requests))
        greedy = np.ones(len(requests), bool)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for batch in self._batches(list(inputs.values())):
                for item, begin, logits in self._run(batch):
                    sums = log_sums(self.model, logits)
                    for i, continuation in item.requests:
                        first = len(item.tokens) - len(continuation)
                        at = max(begin, first)
                        rows = logits[at - begin :]
                        targets = continuation[at - first : at - first + len(rows)]
                        log_p = rows[np.arange(len(rows)), targets] - sums[at - begin :]
                        scores[i] += log_p.sum()
                        greedy[i] &= bool((rows.argmax(-1) == targets).all())
                done = [i for item in batch for i, _ in item.requests]
                for i in done:
                    strings, result = requests[i][0], (float(scores[i]), bool(greedy[i]))
                    if strings is not None:
                        self.cache_hook.add_partial("loglikelihood", strings, result)
                bar.update(len(done))
        return [(float(p), bool(best)) for p, best in zip(scores, greedy, strict=True)]

    def _batches(self, inputs: list[_Input]) -> Iterator[list[_Input]]:
        """Inputs in their order of running.  Of those with one context the first comes alone, so
        that the engine has kept it for the others."""
        groups: dict[tuple[int, ...], list[_Input]] = {}
        for item in inputs:
            groups.setdefault(item.tokens[: len(item.tokens) - item.n_last + 1], []).append(item)
        yield [group[0] for group in groups.values() if len(group) == 1]
        for group in groups.values():
            if len(group) > 1:
                yield group[:1]
                yield group[1:]

    def _run(self, batch: list[_Input]) -> Iterator[tuple[_Input, int, Floats]]:
        """Of each input the logits of its last n_last tokens: the first of these tokens, and
        [n][n_vocab].  Run together are as many as have a context's tokens and LOGIT_BYTES."""
        most = max(1, LOGIT_BYTES // (4 * self.model.info.vocabulary))
        parts = []
        for item in batch:
            n = len(item.tokens)
            parts += [(item, i, min(i + most, n)) for i in range(n - item.n_last, n, most)]
        while parts:
            n_rows = n_tokens = 0
            last, together = None, parts[:0]
            for item, begin, end in parts:
                n_rows, n_tokens = n_rows + end - begin, n_tokens + end
                # A part of an input goes on from the one before it: never two of one.
                if together and (item is last or n_rows > most or n_tokens > self.max_length):
                    break
                together.append((item, begin, end))
                last = item
            parts = parts[len(together) :]
            started: list[tuple[Stream, Floats]] = []
            try:
                for item, begin, end in together:
                    started.append(self.model._start_logits(item.tokens[:end], end - begin))
            except BaseException:
                for stream, _ in started:
                    stream.cancel()
                raise
            finish([stream for stream, _ in started])
            for (item, begin, _), (_, logits) in zip(together, started, strict=True):
                yield item, begin, logits

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """For each text ln of its probability after prefix_token_id, in windows of max_length."""
        windows: list[Encoded] = []
        counts = []
        for request in requests:
            (text,) = request.args
            found = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            new = [(None, *make_disjoint_window(window)) for window in found]
            windows += new
            counts.append(len(new))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        results = []
        for request, n in zip(requests, counts, strict=True):
            results.append(sum(next(scores)[0] for _ in range(n)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    # ---- generating ----

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to the first of the strings in `until`."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for group in groups.values():
                params, room = self._params(requests[group[0]].args[1])
                for start in range(0, len(group), self.batch_size):
                    some = group[start : start + self.batch_size]
                    prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in some]
                    found = self.model.generate(prompts, **params)
                    for i, completion in zip(some, found, strict=True):
                        answers[i] = completion.text
                        self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                    params["seed"] += len(some)
                    bar.update(len(some))
        return answers

    def _params(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Parameters of Model.generate() for the harness's, and the tokens a prompt may have."""
        n = int(next((options[k] for k in _MAX_TOKENS if options.get(k)), self.max_gen_toks))
        if n >= self.max_length:
            raise SmallmError(
                f"max_gen_toks is {n}: it has to be less than the context, {self.max_length}"
            )
        samples = options.get("do_sample", options.get("temperature", 0) > 0)
        until = options.get("until") or []
        params = {
            "max_tokens": n,
            "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
            "temperature": float(options.get("temperature", 1)) if samples else 0.0,
            # Nothing is cut off unless the task says so.
            **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0},
            **{name: options[name] for name in _SAMPLING if options.get(name) is not None},
        }
        return params, self.max_length - n


if __name__ == "__main__":  # python -m smallm.eval.harness run --model smallm ...
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
