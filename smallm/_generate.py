"""Generating: parameters judged, a request submitted, its tokens pulled.

The engine runs on a thread of its own.  A request is pulled in waits of at most PULL_MS, with the
GIL released, so that signals are seen in time; dropping a Stream cancels its request.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from ._binding import CData, check, ffi, lib, new, on
from ._errors import SmallmError

if TYPE_CHECKING:
    from types import TracebackType

    from ._model import Model

PULL_MS = 40  # a wait in C sees no signal: with what cancelling takes, 100 ms are kept

_INT32_MAX = 2**31 - 1
_FINISH = {
    lib.SMALLM_FINISH_STOP: "stop",
    lib.SMALLM_FINISH_LENGTH: "length",
    lib.SMALLM_FINISH_CANCELLED: "cancelled",
}


class Params(TypedDict, total=False):
    """Keyword parameters of generate, chat and stream.

    max_tokens: tokens to generate at most, >= 0 (256).
    temperature: >= 0; 0 is greedy.  Default: the model's own metadata, else 0.7.
    top_p: 0 < p <= 1, keep the fewest tokens with this mass.  Default: metadata, else 0.95.
    top_k: >= 0, keep the k most probable; 0 keeps all.  Default: metadata, else 40.
    min_p: 0 <= p < 1, drop tokens below min_p times the best.  Default: metadata, else 0.05.
    typical_p: 0 < p <= 1, locally typical mass (1.0).
    repeat_penalty: > 0, divides the logits of recent tokens (1.0).
    repeat_last_n: window of the three penalties in tokens; 0: none, -1: all (64).
    frequency_penalty, presence_penalty: subtracted per occurrence, once (0.0).
    seed: 0 .. 2**64 - 1; None draws a fresh one, which the Completion records.
    stop: a string or strings that end the answer and are not part of it.
    logprobs: None, or 0 .. 64 alternatives reported with each token's own log-probability.
    logit_bias: {token id: number added to its logit}; -inf forbids a token.
    adapter: name of one that load() was given; None: the model alone.
    adapter_scale: what the adapter adds is multiplied by this (1.0); -1e6 .. 1e6.
    on_overflow: "error" raises ContextOverflowError for a prompt that is too long;
        "truncate_left" drops its oldest part (in a chat, whole turns).
    """

    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float
    repeat_penalty: float
    repeat_last_n: int
    frequency_penalty: float
    presence_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    logprobs: int | None
    logit_bias: Mapping[int, float] | None
    adapter: str | None
    adapter_scale: float
    on_overflow: str


class Chunk(NamedTuple):
    """A piece of a streamed answer."""

    text: str  #: whole characters; "" while more tokens are needed to decide
    token: int  #: id; -1 where only held-back text came
    logprob: float | None  #: natural log of the token's probability; None unless asked for
    top_logprobs: dict[int, float] | None  #: {id: logprob}, most probable first


class Usage(NamedTuple):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  #: of the prompt, taken from the cache


class Timings(NamedTuple):
    """What a request cost.  A rate is 0.0 where nothing was measured."""

    load_s: float  #: seconds that loading the model took
    ttft_s: float  #: seconds from the call to the first token
    prefill_tps: float  #: prompt tokens per second
    decode_tps: float  #: generated tokens per second, after the first
    peak_rss: int  #: bytes, the process's highest resident memory so far


class Completion:
    """An answer; `str(completion)` is its text.

    Attributes:
        text: the generated text.
        tokens: the generated ids.
        logprobs: one float per token, or None unless asked for.
        top_logprobs: one {id: logprob} per token, or None unless asked for.
        finish_reason: "stop", "length" or "cancelled".
        seed: the seed that was used.
        usage: prompt_tokens, completion_tokens, cached_tokens.
        timings: load_s, ttft_s, prefill_tps, decode_tps, peak_rss.
    """

    __slots__ = (
        "finish_reason",
        "logprobs",
        "seed",
        "text",
        "timings",
        "tokens",
        "top_logprobs",
        "usage",
    )

    def __init__(
        self,
        text: str,
        tokens: list[int],
        logprobs: list[float] | None,
        top_logprobs: list[dict[int, float]] | None,
        finish_reason: str,
        seed: int,
        usage: Usage,
        timings: Timings,
    ) -> None:
        self.text = text
        self.tokens = tokens
        self.logprobs = logprobs
        self.top_logprobs = top_logprobs
        self.finish_reason = finish_reason
        self.seed = seed
        self.usage = usage
        self.timings = timings

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return (
            f"Completion(text={self.text!r}, finish_reason={self.finish_reason!r}, "
            f"seed={self.seed}, usage={self.usage!r})"
        )


# ---- judging arguments ----


def integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int in low .. high; TypeError / ValueError name the argument."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    number = index(value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be {low} .. {high}, not {number}")
    return number


def number(name: str, value: object, allowed: Callable[[float], bool], rule: str) -> float:
    """`value` as a float that float32 can hold and `allowed` accepts."""
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not (abs(result) <= 3e38 and allowed(result)):
        raise ValueError(f"{name} must be {rule}, not {value!r}")
    return result


def utf8(name: str, value: object) -> bytes:
    """`value` (a str) as UTF-8; ValueError names a lone surrogate's place."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise ValueError(
            f"{name} holds a lone surrogate, U+{code:04X}, at character {error.start}, "
            "which is not text: remove or replace it"
        ) from None


def token_ids(name: str, value: object, n_vocab: int) -> list[int]:
    """`value` (a sequence or array of ints) as ids in 0 .. n_vocab - 1."""
    items = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(items, (list, tuple, range)):
        raise TypeError(f"{name} must be a list of token ids, not {type(value).__name__}")
    return [integer(f"{name}[{i}]", item, 0, n_vocab - 1) for i, item in enumerate(items)]


def _stop(value: object) -> list[bytes]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise TypeError(f"stop must be a str or a list of str, not {type(value).__name__}")
    strings = [utf8("stop", item) for item in items]
    if b"" in strings:
        raise ValueError("stop must not hold an empty string: it would end every answer at once")
    return strings


def _bias(value: object, n_vocab: int) -> list[tuple[int, float]]:
    if value is None:
        return []
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias must be a dict, not {type(value).__name__}")
    pairs = []
    for key, bias in value.items():
        token = integer("logit_bias's token id", key, 0, n_vocab - 1)
        if bias == -math.inf:
            pairs.append((token, -math.inf))
        else:
            rule = "a finite number or -inf"
            pairs.append((token, number(f"logit_bias[{token}]", bias, math.isfinite, rule)))
    return pairs


class Adaptation(NamedTuple):
    """An adapter as a request names it."""

    box: CData  #: a `smallm_adapter **`
    scale: float  #: not 0


def adaptation(name: object, scale: object, known: Mapping[str, CData]) -> Adaptation | None:
    """The adapter of this name, at this scale; None where nothing is added."""
    factor = number("adapter_scale", scale, lambda x: abs(x) <= 1e6, "-1e6 .. 1e6")
    if name is None:
        return None
    if not isinstance(name, str):
        raise TypeError(f"adapter must be a str, not {type(name).__name__}")
    if name not in known:
        there = ", ".join(map(repr, known)) or "none: load(..., adapters={name: path})"
        raise ValueError(f"adapter is {name!r}; this model was loaded with {there}")
    return Adaptation(known[name], factor) if factor != 0 else None


class Defaults(NamedTuple):
    """What temperature, top_p, top_k and min_p are when the caller does not say."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Defaults:
        """From the file's `general.sampling.*` keys; values out of range are passed over."""
        keys = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
        found: dict[str, Any] = {}
        for name, key in keys.items():
            text = metadata.get(f"general.sampling.{key}")
            if text is not None:
                try:
                    value: Any = int(text) if name == "top_k" else float(text)
                    found[name] = _SAMPLING[name](value)
                except ValueError:
                    continue
        return cls(**found)


_SAMPLING: dict[str, Callable[[object], Any]] = {
    "temperature": lambda v: number("temperature", v, lambda x: 0 <= x <= 1000, "0 .. 1000"),
    "top_p": lambda v: number("top_p", v, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "top_k": lambda v: integer("top_k", v, 0, _INT32_MAX),
    "min_p": lambda v: number("min_p", v, lambda x: 0 <= x < 1, "at least 0 and below 1"),
}


class Options:
    """Judged parameters of one call; `seed` is always set."""

    def __init__(
        self,
        where: str,
        params: Mapping[str, Any],
        defaults: Defaults,
        n_vocab: int,
        adapters: Mapping[str, CData],
    ) -> None:
        unknown = [name for name in params if name not in Params.__annotations__]
        if unknown:
            raise TypeError(_unexpected(where, unknown[0]))
        given: dict[str, Any] = {**_FIXED, **defaults._asdict()}
        given.update(
            (name, value)
            for name, value in params.items()
            if value is not None or name not in _SAMPLING
        )
        for name, judge in _SAMPLING.items():
            given[name] = judge(given[name])
        self.temperature: float = given["temperature"]
        self.top_p: float = given["top_p"]
        self.top_k: int = given["top_k"]
        self.min_p: float = given["min_p"]
        self.max_tokens = integer("max_tokens", given["max_tokens"], 0, _INT32_MAX)
        self.typical_p = number(
            "typical_p", given["typical_p"], lambda x: 0 < x <= 1, "above 0 and at most 1"
        )
        self.repeat_penalty = number(
            "repeat_penalty", given["repeat_penalty"], lambda x: x > 0, "above 0"
        )
        self.repeat_last_n = integer("repeat_last_n", given["repeat_last_n"], -1, _INT32_MAX)
        self.frequency_penalty = number(
            "frequency_penalty", given["frequency_penalty"], math.isfinite, "finite"
        )
        self.presence_penalty = number(
            "presence_penalty", given["presence_penalty"], math.isfinite, "finite"
        )
        seed = given["seed"]
        self.seed = (
            int.from_bytes(os.urandom(4), "little")
            if seed is None
            else integer("seed", seed, 0, 2**64 - 1)
        )
        self.stop = _stop(given["stop"])
        logprobs = given["logprobs"]
        self.n_logprobs = -1 if logprobs is None else integer("logprobs", logprobs, 0, 64)
        self.bias = _bias(given["logit_bias"], n_vocab)
        self.adaptation = adaptation(given["adapter"], given["adapter_scale"], adapters)
        overflow = given["on_overflow"]
        if overflow not in ("error", "truncate_left"):
            raise ValueError(f'on_overflow must be "error" or "truncate_left", not {overflow!r}')
        self.truncate = overflow == "truncate_left"


_FIXED: dict[str, Any] = {
    "max_tokens": 256,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "seed": None,
    "stop": (),
    "logprobs": None,
    "logit_bias": None,
    "adapter": None,
    "adapter_scale": 1.0,
    "on_overflow": "error",
}


def _unexpected(where: str, name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, list(Params.__annotations__), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{where}() got an unexpected keyword argument {name!r}{hint}"


# ---- requests ----


def submit(
    engine: Callable[[], CData],
    ids: Sequence[int],
    options: Options | None,
    seed: int = 0,
    logits: CData = None,
    n_chunk: int = 0,
    adapted: Adaptation | None = None,
    source: Sequence[int] | None = None,
    embedding: CData = None,
    n_logits: int = 0,
) -> CData:
    """Submits `ids` and returns a `smallm_request **` that owns the request.

    `source` is what the model's encoder reads, where it has one.  `engine` is asked for the
    engine's box at the last moment.  Without `options` only the prompt is run, with `adapted`.
    `logits` is a writable [n_logits][n_vocab] buffer, for the last n_logits ids (0: all of them),
    `embedding` one of [n_embd]; both are kept alive as long as the request.
    """
    params, error = new("request_params"), new("error")
    sampling = params.sampling
    sampling.size = ffi.sizeof(sampling)
    keep = [ffi.new("int32_t[]", ids)]
    params.tokens, params.n_tokens = keep[0], len(ids)
    if source is not None:
        keep.append(ffi.new("int32_t[]", source))
        params.source, params.n_source = keep[-1], len(source)
    params.n_chunk = n_chunk
    params.n_logprobs = -1
    if logits is not None:
        params.logits, params.n_logits = logits, n_logits
    if embedding is not None:
        params.embedding = embedding
    if options is not None:
        adapted = options.adaptation
        params.max_tokens = options.max_tokens
        params.n_logprobs = options.n_logprobs
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "typical_p",
            "repeat_penalty",
            "frequency_penalty",
            "presence_penalty",
            "repeat_last_n",
        ):
            setattr(sampling, name, getattr(options, name))
        sampling.seed = seed
        if options.bias:
            keep.append(ffi.new("int32_t[]", [token for token, _ in options.bias]))
            keep.append(ffi.new("float[]", [bias for _, bias in options.bias]))
            sampling.bias_ids, sampling.bias, sampling.n_bias = keep[-2], keep[-1], len(keep[-1])
        if options.stop:
            strings = [ffi.new("char[]", string) for string in options.stop]
            keep.extend(strings)
            keep.append(ffi.new("char *[]", strings))
            keep.append(ffi.new("size_t[]", [len(string) for string in options.stop]))
            params.stop, params.stop_len, params.n_stop = keep[-2], keep[-1], len(strings)

    if adapted is not None:
        params.adapter, params.adapter_scale = adapted.box[0], adapted.scale

    # The box owns the request from the moment C writes it, whatever is raised in between; the
    # destructor holds the buffers, so that none dies before the request that fills it.
    def free(box: CData, buffers: tuple[CData, CData] = (logits, embedding)) -> None:
        lib.smallm_request_free(box[0])

    box = ffi.gc(ffi.new("smallm_request **"), free)
    check(on(engine(), lib.smallm_engine_submit, params, box, error), error)
    return box


def peak_rss() -> int:
    """The process's highest resident memory so far in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Stream:
    """An answer as it is made: iterate over its chunks.

    Use it as a context manager, or call cancel(), to stop early; dropping it cancels, too.  Any
    thread may cancel; a second thread that iterates waits for the first.
    """

    def __init__(self, model: Model, box: CData, seed: int, n_logprobs: int) -> None:
        self._model = model  # keeps it open while the answer runs
        self._box = box
        self._seed = seed
        self._want_logprobs = n_logprobs >= 0
        self._lock = threading.Lock()
        self._chunk, self._error = new("chunk"), new("error")
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[dict[int, float]] = []
        self._completion: Completion | None = None
        self._failure: Exception | None = None
        self._cancelled = False

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        try:
            while True:
                chunk = self._pull(PULL_MS)
                if chunk is not None:
                    return chunk
                if self._completion is not None:
                    break
        except BaseException:  # Ctrl-C: its traceback may keep this object, so do not wait for that
            self.cancel()
            raise
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Stops the answer; what was made so far stays.  Does nothing once it has ended."""
        self._cancelled = True
        if self._completion is None and self._model._in_process():
            lib.smallm_request_cancel(self._box[0])

    @property
    def completion(self) -> Completion:
        """The whole answer, once it has ended or was cancelled; SmallmError before."""
        if self._completion is None and self._cancelled:
            for _ in self:
                pass
        if self._completion is None:
            raise SmallmError(
                "the answer is not complete: read the stream to its end, or cancel() it, first"
            )
        return self._completion

    def _pull(self, timeout_ms: int) -> Chunk | None:
        """The next chunk; None where there is none yet or, with `_completion` set, no more."""
        while True:
            self._model._check_process()  # before the lock, which a fork may have left taken
            with self._lock:
                if self._completion is not None:
                    return None
                if self._failure is not None:
                    raise self._failure
                chunk, box = self._chunk, self._box
                status = lib.smallm_request_next(box[0], timeout_ms, chunk, self._error)
                if status == lib.SMALLM_AGAIN:
                    return None
                if status == lib.SMALLM_DONE:
                    self._completion = self._complete()
                    return None
                try:
                    check(status, self._error)
                except Exception as error:
                    self._failure = error
                    raise
                result = self._read(chunk)
                if result.token >= 0 or result.text:
                    return result

    def _read(self, chunk: CData) -> Chunk:
        text = (
            ffi.unpack(chunk.text, chunk.n_text).decode("utf-8", "replace") if chunk.n_text else ""
        )
        token = chunk.token
        logprob = top = None
        self._text.append(text)
        if token >= 0:
            self._tokens.append(token)
            if self._want_logprobs:
                n = chunk.n_top
                top = {}
                if n > 0:
                    top = dict(
                        zip(
                            ffi.unpack(chunk.top_ids, n),
                            ffi.unpack(chunk.top_logprobs, n),
                            strict=True,
                        )
                    )
                logprob = chunk.logprob
                self._logprobs.append(logprob)
                self._top.append(top)
        return Chunk(text, token, logprob, top)

    def _complete(self) -> Completion:
        stats = new("request_stats")
        check(lib.smallm_request_get_stats(self._box[0], stats, self._error), self._error)

        def rate(count: int, seconds: float) -> float:
            return count / seconds if count > 0 and seconds > 0 else 0.0

        return Completion(
            text="".join(self._text),
            tokens=self._tokens,
            logprobs=self._logprobs if self._want_logprobs else None,
            top_logprobs=self._top if self._want_logprobs else None,
            finish_reason=_FINISH.get(stats.finish, "cancelled"),
            seed=self._seed,
            usage=Usage(stats.n_prompt, stats.n_completion, stats.n_cached),
            timings=Timings(
                load_s=self._model._load_s,
                ttft_s=stats.ttft_s,
                prefill_tps=rate(stats.n_prompt - stats.n_cached, stats.prefill_s),
                decode_tps=rate(stats.n_completion - 1, stats.decode_s),
                peak_rss=peak_rss(),
            ),
        )


def finish(streams: Sequence[Stream]) -> list[Completion]:
    """Reads all streams to their ends; when one fails, or on Ctrl-C, all are cancelled."""
    try:
        for stream in streams:
            for _ in stream:
                pass
        return [stream.completion for stream in streams]
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise


class AsyncStream:
    """As Stream, for `async for` and `async with`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Chunk:
        from asyncio import to_thread

        chunk = self._stream._pull(0)
        if chunk is None:
            try:
                chunk = await to_thread(next, self._stream, None)
            except BaseException:
                self._stream.cancel()
                raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """As Stream.cancel()."""
        self._stream.cancel()

    @property
    def completion(self) -> Completion:
        """As Stream.completion."""
        return self._stream.completion
