"""One engine in its own process, told what to do by JSON lines on stdin, answering on stdout.

    PYTHON worker.py ENGINE

Runs under the interpreter of whichever environment holds the engine, so it imports nothing else.
Anything the engine itself prints goes to stderr.  Only the work asked for is timed, in seconds by
the monotonic clock.  An engine has those of the methods below that it can:

    load(path, threads, ctx, every_logit)       {"version", "isa", "settings"}; smallm's takes the
                                                type of the cache, too
    run(ids, n)                                 seconds of the prompt and its first token, seconds
                                                per token of the n after it
    together(prompts, n), apart(prompts, n)     seconds of n tokens for each prompt
    tokenize(text)                              ids
    logits(ids, file)                           writes float32 [n_ids, n_vocab] as .npy
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import cycle, islice
from typing import Any


class Smallm:
    """smallm through its public Python API, greedy sampling and detokenizing included."""

    def load(
        self, path: str, threads: int, ctx: int, every_logit: bool, kv: str = "f16"
    ) -> dict[str, Any]:
        import smallm

        self.model = smallm.load(path, threads=threads, ctx=ctx, kv=kv)
        return {
            "version": smallm.__version__,
            "isa": self.model.info.isa,
            "settings": f"threads={threads}, ctx={ctx}, kv={kv}",
        }

    def run(self, ids: list[int], n: int) -> tuple[float, float]:
        bias = self.no_end()
        start = time.perf_counter()
        stream = self.model.stream(ids, max_tokens=n + 1, temperature=0, logit_bias=bias)
        with stream:
            chunks = iter(stream)
            next(chunks)
            first = time.perf_counter()
            for _ in chunks:
                pass
            end = time.perf_counter()
            done = len(stream.completion.tokens) - 1
        if done != n:
            raise RuntimeError(f"decoded {done} tokens instead of {n}")
        return first - start, (end - first) / n

    def together(self, prompts: list[list[int]], n: int) -> float:
        bias = self.no_end()
        start = time.perf_counter()
        self.model.generate(prompts, max_tokens=n, temperature=0, logit_bias=bias)
        return time.perf_counter() - start

    def apart(self, prompts: list[list[int]], n: int) -> float:
        bias = self.no_end()
        start = time.perf_counter()
        for ids in prompts:
            self.model.generate(ids, max_tokens=n, temperature=0, logit_bias=bias)
        return time.perf_counter() - start

    def no_end(self) -> dict[int, float]:
        """Forbids the tokens that would end the answer."""
        names = ("<|endoftext|>", "<|im_end|>", "</s>", "<|eot_id|>", "<|end_of_text|>")
        found = (self.model.tokenize(n, add_special=False, parse_special=True) for n in names)
        return {ids[0]: float("-inf") for ids in found if len(ids) == 1}

    def tokenize(self, text: str) -> list[int]:
        return list(self.model.tokenize(text, add_special=False))

    def logits(self, ids: list[int], out: str) -> None:
        import numpy as np

        np.save(out, self.model.logits(ids))


class FedTokens:
    """An engine that is handed its next tokens, so that its own sampler is not timed."""

    def begin(self) -> None:
        raise NotImplementedError

    def feed(self, ids: list[int]) -> None:
        raise NotImplementedError

    def run(self, ids: list[int], n: int) -> tuple[float, float]:
        self.begin()
        start = time.perf_counter()
        self.feed(ids)
        first = time.perf_counter()
        for token in islice(cycle(ids), n):
            self.feed([token])
        return first - start, (time.perf_counter() - first) / n

    def apart(self, prompts: list[list[int]], n: int) -> float:
        start = time.perf_counter()
        for ids in prompts:
            self.begin()
            self.feed(ids)
            for token in islice(cycle(ids), n - 1):
                self.feed([token])
        return time.perf_counter() - start


class LlamaCpp(FedTokens):
    """llama-cpp-python at its best settings."""

    def load(self, path: str, threads: int, ctx: int, every_logit: bool) -> dict[str, Any]:
        import llama_cpp

        settings = {
            "n_ctx": ctx,
            "n_threads": threads,
            "n_threads_batch": threads,
            "n_batch": 512,
            "n_ubatch": 512,
            "flash_attn": True,
        }
        self.model = llama_cpp.Llama(path, logits_all=every_logit, verbose=False, **settings)
        return {
            "version": llama_cpp.__version__,
            "isa": llama_cpp.llama_print_system_info().decode(),
            "settings": ", ".join(f"{k}={v}" for k, v in settings.items()),
        }

    def begin(self) -> None:
        self.model.reset()

    def feed(self, ids: list[int]) -> None:
        self.model.eval(ids)

    def tokenize(self, text: str) -> list[int]:
        return list(self.model.tokenize(text.encode(), add_bos=False, special=False))

    def logits(self, ids: list[int], out: str) -> None:
        import numpy as np

        self.model.reset()
        self.model.eval(ids)
        np.save(out, np.array(self.model.scores[: len(ids)], dtype=np.float32))


class IkLlamaCpp(FedTokens):
    """ik-llama-cpp-python at its best settings.  Its class IkLlama offers no run-time repacking
    (llama-bench's -rtr), so the model is made with the package's own ctypes layer."""

    def load(self, path: str, threads: int, ctx: int, every_logit: bool) -> dict[str, Any]:
        import ctypes

        import ik_llama_cpp
        from ik_llama_cpp import _ctypes_api as api
        from ik_llama_cpp._internals import IkContext, IkModel

        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.repack_tensors, params.use_mmap = True, False
        model = IkModel.__new__(IkModel)
        model._model = api.llama_model_load_from_file(path.encode(), params)
        if not model._model:
            raise RuntimeError(f"cannot load {path}")
        self.api = api
        self.model = model
        self.context = IkContext(model, n_ctx=ctx, n_threads=threads, flash_attn=True)
        info = api._lib.llama_print_system_info
        info.restype = ctypes.c_char_p
        return {
            "version": ik_llama_cpp.__version__,
            "isa": info().decode(),
            "settings": f"n_ctx={ctx}, n_threads={threads}, n_ubatch={self.context._n_ubatch}, "
            "flash_attn=True, repack_tensors=True",
        }

    def begin(self) -> None:
        self.context.kv_cache_clear()
        self.n = 0

    def feed(self, ids: list[int]) -> None:
        from ik_llama_cpp._internals import make_batch_range

        size = self.context._n_ubatch
        for i in range(0, len(ids), size):
            part = ids[i : i + size]
            last = i + size >= len(ids)
            batch = make_batch_range(part, pos_start=self.n, logits_last=last)
            status = self.context.decode(batch)
            self.api.llama_batch_free(batch)
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status} at position {self.n}")
            self.n += len(part)
        self.context.get_logits(-1)  # waits for them


class OpenVino:
    """openvino-genai with its defaults; the times are its own, sampling included.  Of GGUF it reads
    the formats Q4_0, Q4_1 and Q8_0 of a few architectures."""

    def load(self, path: str, threads: int, ctx: int, every_logit: bool) -> dict[str, Any]:
        import openvino
        import openvino_genai

        settings = {"INFERENCE_NUM_THREADS": threads}
        self.model = openvino_genai.LLMPipeline(path, "CPU", **settings)
        core = openvino.Core()
        return {
            "version": openvino_genai.__version__,
            "isa": ", ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
            "settings": ", ".join(f"{k}={v}" for k, v in settings.items()),
        }

    def run(self, ids: list[int], n: int) -> tuple[float, float]:
        import numpy as np
        import openvino
        import openvino_genai

        row = np.array([ids], dtype=np.int64)
        tensors = (openvino.Tensor(row), openvino.Tensor(np.ones_like(row)))
        config = openvino_genai.GenerationConfig(
            max_new_tokens=n + 1, ignore_eos=True, do_sample=False
        )
        answer = self.model.generate(openvino_genai.TokenizedInputs(*tensors), config)
        if len(answer.tokens[0]) != n + 1:
            raise RuntimeError(f"decoded {len(answer.tokens[0]) - 1} tokens instead of {n}")
        times = answer.perf_metrics
        return times.get_ttft().mean / 1000, times.get_tpot().mean / 1000


ENGINES = {
    "smallm": Smallm,
    "llama-cpp-python": LlamaCpp,
    "ik-llama-cpp-python": IkLlamaCpp,
    "openvino-genai": OpenVino,
}


def idle(seconds: float) -> float:
    """Processor seconds this process uses while it is asked nothing."""
    before = time.process_time()
    time.sleep(seconds)
    return time.process_time() - before


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = ENGINES[sys.argv[1]]()
    for line in sys.stdin:
        request = json.loads(line)
        call = idle if request["do"] == "idle" else getattr(engine, request["do"], None)
        try:
            if call is None:
                raise NotImplementedError(f"{sys.argv[1]} cannot {request['do']}")
            answer = {"ok": call(*request["with"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
