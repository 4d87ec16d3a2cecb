"""Model: a loaded file and its engine; and the module-level functions that keep one loaded."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from . import _adapter, _chat
from ._binding import CData, check, ffi, interruptible, lib, new, on, text
from ._errors import (
    ClosedError,
    ContextOverflowError,
    CorruptModelError,
    MemoryBudgetError,
    SmallmError,
    TemplateError,
)
from ._generate import (
    Adaptation,
    AsyncStream,
    Completion,
    Defaults,
    Options,
    Stream,
    adaptation,
    finish,
    integer,
    submit,
    token_ids,
    utf8,
)

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self, Unpack

    from ._catalog import Progress
    from ._generate import Params
    from ._template import ChatTemplate

Prompt = str | Sequence[int]
Messages = str | Sequence[Mapping[str, Any]]

LONG_TEXT = 1 << 18  # bytes that take long enough to tokenize for Ctrl-C to matter

_KV = {"f16": lib.SMALLM_KV_F16, "f32": lib.SMALLM_KV_F32, "q8": lib.SMALLM_KV_Q8}


class ModelInfo(NamedTuple):
    """Facts about a loaded model; sizes in bytes."""

    path: str
    name: str  #: the file's own name for itself, or ""
    license: str  #: as the file states it, or ""
    architecture: str
    parameters: int
    formats: str  #: weight formats by bytes, e.g. "Q4_1 69 %, Q8_0 31 %"
    context: int  #: tokens a prompt and its answer may have together
    trained_context: int
    vocabulary: int
    layers: int  #: of an encoder and its decoder all
    embedding: int  #: width of the residual stream
    heads: int
    kv_heads: int
    feed_forward: int
    #: "gpt2" (byte-level BPE), "llama" (SentencePiece BPE), "bert" (WordPiece) or "t5" (Unigram)
    tokenizer: str
    bytes: int  #: weights in memory
    adapter_bytes: int  #: of all adapters, besides
    file_bytes: int  #: weights in the file
    token_bytes: int  #: weights read to decode one token
    cache_bytes: int  #: KV cache and states of recurrent layers, allocated so far
    scratch_bytes: int
    kv: str  #: type of the KV cache
    isa: str  #: tier of the kernels in use
    threads: int
    forward_passes: int  #: run so far
    forward_tokens: int  #: that those passes held
    running: int  #: requests running or waiting
    timers: dict[str, float]  #: seconds of the threads by what they did; kept with SMALLM_TIMERS=1


class _Handles:
    """Boxes that own the C objects; the engine is closed before the model it runs is freed."""

    __slots__ = ("engine", "model")

    def __init__(self, model: CData) -> None:
        def close(box: CData, model: CData = model) -> None:
            lib.smallm_engine_close(box[0])

        self.model = model
        self.engine = ffi.gc(ffi.new("smallm_engine **"), close)


class Model:
    """A loaded model; made by load().  Any thread may call any method; calls made together are
    batched.  Close it with close() or `with`; after fork() the child has to load its own.

    Errors of every method: ClosedError after close(), SmallmError in a forked child, TypeError and
    ValueError for arguments of a wrong type or value.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        ctx: int | None = None,
        threads: int | None = None,
        kv: str = "f16",
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        memory_limit: int | None = None,
    ) -> None:
        started = time.perf_counter()
        self._handles: _Handles | None = None
        self._pid = os.getpid()
        self._path = os.fspath(path)
        self._lock = threading.Lock()
        self._chat_template: ChatTemplate | None = None
        n_threads = 0 if threads is None else integer("threads", threads, 1, 256)
        n_ctx = 0 if ctx is None else integer("ctx", ctx, 1, 2**31 - 1)
        limit = 0 if memory_limit is None else integer("memory_limit", memory_limit, 1, 2**63 - 1)
        if kv not in _KV:
            raise ValueError(f"kv must be one of {', '.join(_KV)}, not {kv!r}")

        error, params = new("error"), new("model_params")
        params.n_threads, params.memory_limit = n_threads, limit
        name = os.fsencode(self._path)
        if b"\0" in name:
            raise ValueError("the path holds a NUL character")
        # The boxes own what C writes to them, whatever is raised in between.
        box = ffi.gc(ffi.new("smallm_model **"), lambda box: lib.smallm_model_free(box[0]))
        check(interruptible(lambda: lib.smallm_model_open(name, params, box, error)), error)
        info = new("model_info")
        check(lib.smallm_model_get_info(box[0], info, error), error)
        self._info = info
        self._metadata = _metadata(box[0])

        if n_ctx > info.n_ctx_train:
            raise ValueError(
                f"ctx must be 1 .. {info.n_ctx_train}, the length this model was trained for, "
                f"not {n_ctx}"
            )
        settings = new("engine_params")
        settings.n_threads, settings.n_ctx, settings.kv_type = n_threads, n_ctx, _KV[kv]
        if limit:
            if info.n_packed_bytes >= limit:
                raise MemoryBudgetError(
                    f"{self._path}: the weights take {info.n_packed_bytes} bytes, which leaves "
                    f"nothing of memory_limit={limit} to run them"
                )
            settings.memory_limit = limit - info.n_packed_bytes
        self._adapters: dict[str, CData] = {}
        self._adapter_bytes = 0
        for label, source in _judge_adapters(adapters).items():
            self._open_adapter(box, label, source, settings)
        handles = _Handles(box)
        check(lib.smallm_engine_open(box[0], settings, handles.engine, error), error)
        self._handles = handles
        self._kv = kv
        self._defaults = Defaults.of(self._metadata)
        self._ctx: int = self._engine_info().n_ctx
        self._vocabulary: int = info.n_vocab
        self._bos_added: int | None = info.bos if info.add_bos and info.bos >= 0 else None
        self._load_s = time.perf_counter() - started

    def _open_adapter(self, model: CData, name: str, source: str, settings: CData) -> None:
        """Opens one for `model`; what it takes is taken from the engine's memory limit."""
        error, params, info = new("error"), new("adapter_params"), new("adapter_info")
        limit = params.memory_limit = settings.memory_limit
        box = ffi.gc(ffi.new("smallm_adapter **"), lambda box: lib.smallm_adapter_free(box[0]))
        with _adapter.as_gguf(source, self._info) as path:
            data = os.fsencode(path)
            check(
                interruptible(lambda: lib.smallm_adapter_open(model[0], data, params, box, error)),
                error,
            )
        check(lib.smallm_adapter_get_info(box[0], info, error), error)
        if limit:
            if info.n_bytes >= limit:
                raise MemoryBudgetError(
                    f"{source}: the adapter takes {info.n_bytes} bytes; memory_limit leaves {limit}"
                )
            settings.memory_limit = limit - info.n_bytes
        self._adapters[name] = box
        self._adapter_bytes += info.n_bytes

    def _observer(self, ctx: int) -> _Handles:
        """Another engine of the same weights, which keeps statistics."""
        handles, error, settings = _Handles(self._live().model), new("error"), new("engine_params")
        settings.n_threads, settings.n_ctx = self._engine_info().n_threads, ctx
        settings.statistics = 1
        check(lib.smallm_engine_open(handles.model[0], settings, handles.engine, error), error)
        return handles

    # ---- life ----

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._handles else ", closed"
        return f"<smallm.Model {os.path.basename(self._path)}{state}>"

    def __reduce__(self) -> Any:
        raise TypeError("a Model cannot be pickled: load it in the process that uses it")

    def close(self) -> None:
        """Ends what runs, which raises ClosedError there, and frees the memory."""
        self._handles = None

    def _in_process(self) -> bool:
        return self._pid == os.getpid()

    def _check_process(self) -> None:
        if not self._in_process():
            raise SmallmError(
                "this model was loaded before fork() and does not work in the child process: "
                "call smallm.load() in the child, and pass that model on"
            )

    def _live(self) -> _Handles:
        """The handles, not to be kept in a local: that would put off close()."""
        self._check_process()
        handles = self._handles
        if handles is None:
            raise ClosedError("the model is closed: load it again")
        return handles

    # ---- facts ----

    def _engine_info(self) -> CData:
        out, error = new("engine_info"), new("error")
        check(on(self._live().engine, lib.smallm_engine_get_info, out, error), error)
        return out

    def _timers(self) -> dict[str, float]:
        timer, error = new("timer"), new("error")
        sums: dict[str, float] = {}
        while (
            on(self._live().engine, lib.smallm_engine_timer, len(sums), timer, error)
            == lib.SMALLM_OK
        ):
            sums[text(timer.name)] = timer.seconds
        return sums

    @property
    def info(self) -> ModelInfo:
        """Facts about the model, its memory and what it has run so far."""
        engine, model, cpu, error = self._engine_info(), self._info, new("cpu_info"), new("error")
        check(lib.smallm_cpu(cpu, error), error)
        return ModelInfo(
            path=self._path,
            name=self._metadata.get("general.name", ""),
            license=self._metadata.get("general.license", ""),
            architecture=text(model.architecture),
            parameters=model.n_params,
            formats=text(model.formats),
            context=engine.n_ctx,
            trained_context=model.n_ctx_train,
            vocabulary=model.n_vocab,
            layers=model.n_layer,
            embedding=model.n_embd,
            heads=model.n_head,
            kv_heads=model.n_head_kv,
            feed_forward=model.n_ff,
            tokenizer=text(model.tokenizer),
            bytes=model.n_packed_bytes,
            adapter_bytes=self._adapter_bytes,
            file_bytes=model.n_file_bytes,
            token_bytes=model.n_token_bytes,
            cache_bytes=engine.n_cache_bytes,
            scratch_bytes=engine.n_scratch_bytes,
            kv=self._kv,
            isa=text(cpu.isa),
            threads=engine.n_threads,
            forward_passes=engine.n_forward,
            forward_tokens=engine.n_tokens,
            running=engine.n_running,
            timers=self._timers(),
        )

    @property
    def metadata(self) -> dict[str, str]:
        """The file's scalar metadata as text, by key; a copy."""
        self._live()
        return dict(self._metadata)

    # ---- text and tokens ----

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of `text`.

        add_special: add the begin / end tokens that the model asks for.
        parse_special: "<|im_start|>" in the text becomes that token, instead of its letters.
        """
        data = utf8("text", text)
        flags = lib.SMALLM_ADD_SPECIAL if add_special else 0
        flags |= lib.SMALLM_PARSE_SPECIAL if parse_special else 0
        capacity, n_ids, error = len(data) + 8, ffi.new("size_t *"), new("error")
        while True:
            ids = ffi.new("int32_t[]", capacity)
            arguments = (data, len(data), flags, ids, capacity, n_ids, error)
            call = partial(on, self._live().model, lib.smallm_tokenize, *arguments)
            status = interruptible(call) if len(data) > LONG_TEXT else call()
            del call
            check(status, error)
            if n_ids[0] <= capacity:
                result: list[int] = ffi.unpack(ids, n_ids[0])
                return result
            capacity = n_ids[0]

    def detokenize(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Where a model's tokenizer normalizes a text (Qwen's to Unicode's form NFC, BERT's to lower
        case), that is what comes back.

        skip_special: control tokens give no text.
        """
        tokens = ffi.new("int32_t[]", token_ids("ids", ids, self._vocabulary))
        flags = lib.SMALLM_SKIP_SPECIAL if skip_special else 0
        capacity, n_bytes, error = 16 * len(tokens) + 16, ffi.new("size_t *"), new("error")
        while True:
            buffer = ffi.new("char[]", capacity)
            arguments = (tokens, len(tokens), flags, buffer, capacity, n_bytes, error)
            check(on(self._live().model, lib.smallm_detokenize, *arguments), error)
            if n_bytes[0] <= capacity:
                data: bytes = ffi.unpack(buffer, n_bytes[0])
                return data.decode("utf-8", "replace")
            capacity = n_bytes[0]

    def logits(
        self,
        ids: Sequence[int],
        *,
        last: int | None = None,
        source: Sequence[int] | None = None,
        chunk: int | None = None,
        adapter: str | None = None,
        adapter_scale: float = 1.0,
    ) -> npt.NDArray[np.float32]:
        """What the model expects after each of `ids`: float32 [n_ids, n_vocab], before softmax.

        last: only after the last so many ids: float32 [last, n_vocab], and what lies before them
        may come from the cache.
        source: of an encoder-decoder, and only of one: token ids that the encoder reads.  `ids` are
        then the decoder's, which begin with the model's decoder_start_token_id.
        chunk: tokens computed in one pass, 1 .. 512 (the default).  It changes speed and memory,
        never the result.
        adapter, adapter_scale: see smallm.Params.
        ContextOverflowError: more ids, or longer a source, than the context holds.
        """
        stream, out = self._start_logits(
            ids, last, source, chunk, adaptation(adapter, adapter_scale, self._adapters)
        )
        finish([stream])
        return out

    def _start_logits(
        self,
        ids: Sequence[int],
        last: int | None,
        source: Sequence[int] | None = None,
        chunk: int | None = None,
        adapted: Adaptation | None = None,
    ) -> tuple[Stream, npt.NDArray[np.float32]]:
        """A stream, and what logits() gives, which is there when it has ended."""
        import numpy as np

        tokens = token_ids("ids", ids, self._vocabulary)
        if not tokens:
            raise ValueError("ids is empty: give at least one token")
        n_rows = len(tokens) if last is None else integer("last", last, 1, len(tokens))
        n_chunk = 0 if chunk is None else integer("chunk", chunk, 1, self._engine_info().n_batch)
        self._check_length(tokens)
        if source is not None:
            source = token_ids("source", source, self._vocabulary)
            self._check_length(source, "source")
        if (self._info.decoder_start >= 0) is not bool(source):
            kind = "has no encoder" if source else "has an encoder, which reads a source"
            raise ValueError(
                f"source is {'given' if source else 'missing or empty'}; {self!r} {kind}"
            )
        out = np.empty((n_rows, self._vocabulary), np.float32)
        box = submit(
            lambda: self._live().engine,
            tokens,
            None,
            logits=ffi.from_buffer("float[]", out, require_writable=True),
            n_logits=n_rows,
            n_chunk=n_chunk,
            adapted=adapted,
            source=source,
        )
        return Stream(self, box, 0, -1), out

    def embed(
        self,
        texts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        normalize: bool = True,
        adapter: str | None = None,
        adapter_scale: float = 1.0,
    ) -> npt.NDArray[np.float32]:
        """One vector per text, whose directions tell how near texts are: float32 [n_texts, n_embd].

        texts: a str, which is one text, or a list of str or of lists of token ids; run as a batch.
        normalize: vectors have length 1 (one that is all zero stays so), so that dot products are
        cosines.  What is pooled, all positions or one, is the model's to say (mean where it does
        not); a model that is no encoder gives its last layer's.
        adapter, adapter_scale: see smallm.Params.
        ContextOverflowError: a text is longer than the context.
        """
        import numpy as np

        self._live()
        adapted = adaptation(adapter, adapter_scale, self._adapters)
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, (list, tuple)):
            raise TypeError(
                "texts must be a str, a list of str or a list of lists of token ids, "
                f"not {type(texts).__name__}"
            )
        prompts = [self._embedded(f"texts[{i}]", item) for i, item in enumerate(texts)]
        out = np.empty((len(prompts), self._info.n_embd), np.float32)
        streams: list[Stream] = []
        try:
            for ids, row in zip(prompts, out, strict=True):
                buffer = ffi.from_buffer("float[]", row, require_writable=True)
                box = submit(
                    lambda: self._live().engine, ids, None, adapted=adapted, embedding=buffer
                )
                streams.append(Stream(self, box, 0, -1))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        finish(streams)
        if normalize:
            length = np.sqrt((out.astype(np.float64) ** 2).sum(1, keepdims=True))
            out = (out / np.where(length == 0, 1, length)).astype(np.float32)
        return out

    def perplexity(self, text: str, *, ctx: int = 512) -> float:
        """exp of the mean surprise per token of `text`, in windows of `ctx` tokens; what these are,
        and standard errors, stand at smallm.eval.perplexity().

        ValueError: the text has fewer than `ctx` tokens.
        """
        from .eval import perplexity

        return perplexity(self, text, ctx=ctx).perplexity

    def _embedded(self, name: str, item: object) -> list[int]:
        if isinstance(item, str):
            utf8(name, item)
            ids = self.tokenize(item)
        else:
            ids = token_ids(name, item, self._vocabulary)
        if not ids:
            raise ValueError(f"{name} has no tokens: give at least one")
        if len(ids) > self._ctx:
            raise ContextOverflowError(
                f"{name} has {len(ids)} tokens; the context holds {self._ctx}: shorten it",
                len(ids),
                self._ctx,
            )
        return ids

    # ---- generating ----

    @overload
    def generate(self, prompt: Prompt, **params: Unpack[Params]) -> Completion: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], **params: Unpack[Params]
    ) -> list[Completion]: ...
    def generate(self, prompt: Any, **params: Any) -> Completion | list[Completion]:
        """Completes `prompt`: text or token ids; a list of them gives a list, run as a batch.

        An encoder-decoder's encoder reads all of it, and its decoder writes the answer.
        Text is taken literally: "<|im_start|>" in it is no special token (tokenize() it with
        parse_special for that).  Item i of a list uses seed + i.  Parameters: see smallm.Params.
        ContextOverflowError: a prompt is longer than the context.
        """
        streams, single = self._start("generate", prompt, params)
        completions = finish(streams)
        return completions[0] if single else completions

    def chat(self, messages: Messages, **params: Unpack[Params]) -> Completion:
        """Answers `messages`, a str or a list of {"role", "content"}, by the model's chat template.

        Special tokens in the messages are plain text.  Parameters: see smallm.Params.
        TemplateError: the model has no template, or it refuses the messages.
        """
        return finish([self._start_chat("chat", messages, params)])[0]

    def stream(
        self, prompt: Prompt | Sequence[Mapping[str, Any]], **params: Unpack[Params]
    ) -> Stream:
        """As generate() for text or token ids, as chat() for a list of messages, chunk by chunk."""
        return self._start_stream("stream", prompt, params)

    async def agenerate(self, prompt: Any, **params: Unpack[Params]) -> Any:
        """As generate(), for asyncio; cancelling the task cancels the request."""
        from asyncio import to_thread

        streams, single = self._start("agenerate", prompt, params)
        try:
            completions = await to_thread(finish, streams)
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return completions[0] if single else completions

    def astream(
        self, prompt: Prompt | Sequence[Mapping[str, Any]], **params: Unpack[Params]
    ) -> AsyncStream:
        """As stream(), for asyncio: `async for chunk in model.astream(...)`."""
        return AsyncStream(self._start_stream("astream", prompt, params))

    # ---- prompts ----

    def _start(
        self, where: str, prompt: Any, params: Mapping[str, Any]
    ) -> tuple[list[Stream], bool]:
        """Submits one prompt or a list of them; all are judged before the first is submitted."""
        options = self._options(where, params)
        items = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if not isinstance(items, (str, list, tuple, range)):
            raise TypeError(
                f"prompt must be a str, a list of token ids or a list of those, "
                f"not {type(prompt).__name__}"
            )
        single = isinstance(items, (str, range)) or (
            bool(items)
            and not isinstance(items[0], (str, list, tuple, range, Mapping))
            and not hasattr(items[0], "tolist")
        )
        prompts = [
            self._prompt("prompt" if single else f"prompt[{i}]", item, options)
            for i, item in enumerate([items] if single else items)
        ]
        streams: list[Stream] = []
        try:
            for i, ids in enumerate(prompts):
                streams.append(self._submit(ids, options, i))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return streams, single

    def _start_stream(self, where: str, prompt: Any, params: Mapping[str, Any]) -> Stream:
        if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping):
            return self._start_chat(where, prompt, params)
        if isinstance(prompt, (list, tuple)) and (not prompt or isinstance(prompt[0], (str, list))):
            raise TypeError("stream() takes one prompt: a str, token ids or a list of messages")
        return self._start(where, prompt, params)[0][0]

    def _start_chat(self, where: str, messages: object, params: Mapping[str, Any]) -> Stream:
        options = self._options(where, params)
        judged = _chat.judge_messages(messages)
        if options.truncate:
            ids, _ = _chat.fit(self, judged, self._room(options))
            ids = self._truncated(ids, options)
        else:
            ids = _chat.chat_tokens(self, judged)
        self._check_length(ids)
        return self._submit(ids, options, 0)

    def _options(self, where: str, params: Mapping[str, Any]) -> Options:
        self._live()
        return Options(where, params, self._defaults, self._vocabulary, self._adapters)

    def _prompt(self, name: str, item: object, options: Options) -> list[int]:
        if isinstance(item, str):
            utf8(name, item)
            ids = self.tokenize(item)
            if not ids:
                raise ValueError(
                    f"{name} is empty, and this model has no token to begin a text with: "
                    "give at least one character"
                )
        elif isinstance(item, Mapping):
            raise TypeError(f"{name} is a message: use chat() or stream() for messages")
        else:
            ids = token_ids(name, item, self._vocabulary)
            if not ids:
                raise ValueError(f"{name} is empty: give at least one token id")
        if options.truncate:
            ids = self._truncated(ids, options)
        self._check_length(ids, name)
        return ids

    def _room(self, options: Options) -> int:
        """Prompt tokens that leave room for the answer, of which at most half the context; a source
        leaves all of it."""
        if self._info.decoder_start >= 0:
            return self._ctx
        return max(1, self._ctx - min(options.max_tokens, self._ctx // 2))

    def _truncated(self, ids: list[int], options: Options) -> list[int]:
        if len(ids) <= self._ctx:
            return ids
        room = self._room(options)
        if self._bos_added is not None and ids[0] == self._bos_added and room > 1:
            return [ids[0], *ids[len(ids) - room + 1 :]]
        return ids[len(ids) - room :]

    def _check_length(self, ids: Sequence[int], name: str = "prompt") -> None:
        if len(ids) > self._ctx:
            raise ContextOverflowError(
                f"{name} has {len(ids)} tokens; the context holds {self._ctx}: shorten it, load "
                'with a larger ctx, or pass on_overflow="truncate_left"',
                len(ids),
                self._ctx,
            )

    def _submit(self, ids: Sequence[int], options: Options, i: int) -> Stream:
        seed, source = (options.seed + i) % 2**64, None
        if self._info.decoder_start >= 0:
            source, ids = ids, [self._info.decoder_start]
        box = submit(lambda: self._live().engine, ids, options, seed, source=source)
        return Stream(self, box, seed, options.n_logprobs)

    # ---- chat templates ----

    def _template(self) -> ChatTemplate:
        with self._lock:
            if self._chat_template is None:
                source = self._metadata.get("tokenizer.chat_template")
                if not source:
                    raise TemplateError(
                        f"{self._path} has no chat template: it is not a chat model; "
                        "use generate() to complete text"
                    )
                from ._template import ChatTemplate

                self._chat_template = ChatTemplate(source)
            return self._chat_template

    def _special_text(self, name: str) -> str:
        """Text of the bos / eos token, "" where the model has none."""
        token = getattr(self._info, name)
        return self.detokenize([token], skip_special=False) if token >= 0 else ""


def _judge_adapters(adapters: object) -> dict[str, str]:
    if adapters is None:
        return {}
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must be a dict of name: path, not {type(adapters).__name__}")
    for name, path in adapters.items():
        if not isinstance(name, str) or not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"adapters must be a dict of name: path, not hold {name!r}: {path!r}")
        if not name or "\0" in os.fspath(path):
            raise ValueError(f"adapters: {name!r}: {path!r} has an empty name or a NUL character")
    return {name: os.fspath(path) for name, path in adapters.items()}


def _metadata(model: CData) -> dict[str, str]:
    key, value, n_value = ffi.new("char **"), ffi.new("char **"), ffi.new("size_t *")
    entries: dict[str, str] = {}
    for i in count():
        if lib.smallm_model_metadata(model, i, key, value, n_value) != lib.SMALLM_OK:
            break
        entries[text(key[0])] = ffi.unpack(value[0], n_value[0]).decode("utf-8", "replace")
    return entries


# ---- loading ----


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    ctx: int | None = None,
    threads: int | None = None,
    kv: str = "f16",
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    memory_limit: int | None = None,
    offline: bool = False,
    progress: Progress | bool | None = None,
) -> Model:
    """Loads a model, downloading it first where that is needed.

    model: a path, a catalogue name ("smollm2-135m", the default), "hf:user/repo:QUANT" or a URL.
    ctx: tokens a prompt and its answer may have together; None: the trained length.
    threads: 1 .. 256; None: SMALLM_THREADS, else the physical cores this process may use.
    kv: type of the KV cache: "f16", "f32", or "q8" (int8 with a scale per position and head, half
        of f16's memory).
    adapters: LoRA adapters by the names that requests use (`adapter=`): GGUF files, or folders that
        `peft` saved, for which the extra `convert` is needed.
    memory_limit: bytes for weights, adapters, KV cache and scratch together.
    offline: no network; so does SMALLM_OFFLINE=1.
    progress: called with (bytes done, bytes in all or None) during a download; None: a bar on
        stderr where that is a terminal; False: nothing.

    Errors: ModelNotFoundError, UnsupportedModelError, CorruptModelError, MemoryBudgetError,
    DownloadError; ValueError for arguments, also for a SMALLM_ISA that this CPU lacks.
    """
    from . import _catalog

    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress must be a function or a bool, not {type(progress).__name__}")
    if model is not None and not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be a path or a name, not {type(model).__name__}")
    found = _catalog.resolve(model, offline=offline, progress=progress)
    try:
        return Model(
            found.path,
            ctx=ctx,
            threads=threads,
            kv=kv,
            adapters=adapters,
            memory_limit=memory_limit,
        )
    except CorruptModelError as error:
        if found.name is None:
            raise
        raise CorruptModelError(
            f"{error} (a downloaded file: `smallm rm {found.name}` and fetch it again)"
        ) from None


# The last model that generate() and chat() loaded, under its name.
_kept: tuple[str, Model] | None = None
_kept_lock = threading.Lock()


def _after_fork() -> None:
    global _kept_lock
    _kept_lock = threading.Lock()  # a thread that is not in the child may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _keep(model: str | os.PathLike[str] | Model | None) -> Model:
    global _kept
    if isinstance(model, Model):
        return model
    key = "" if model is None else os.fspath(model)
    with _kept_lock:
        if _kept is None or _kept[0] != key:
            _kept = None  # frees the memory of the last one first
            _kept = (key, load(model))
        return _kept[1]


@overload
def generate(
    prompt: Prompt,
    *,
    model: str | os.PathLike[str] | Model | None = None,
    **params: Unpack[Params],
) -> Completion: ...
@overload
def generate(
    prompt: list[str] | list[list[int]],
    *,
    model: str | os.PathLike[str] | Model | None = None,
    **params: Unpack[Params],
) -> list[Completion]: ...
def generate(
    prompt: Any, *, model: str | os.PathLike[str] | Model | None = None, **params: Any
) -> Completion | list[Completion]:
    """Completes text with `model`, as Model.generate().

    model: as for load(), or a Model.  The last one named stays loaded; the first call fetches the
    default model.  Any thread may call it.
    """
    result: Completion | list[Completion] = _keep(model).generate(prompt, **params)
    return result


def chat(
    messages: Messages,
    *,
    model: str | os.PathLike[str] | Model | None = None,
    **params: Unpack[Params],
) -> Completion:
    """Answers messages with `model`, as Model.chat(); see generate() about `model`."""
    return _keep(model).chat(messages, **params)
