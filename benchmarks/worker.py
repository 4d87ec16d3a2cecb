"""One engine in its own process, told what to do by JSON lines on stdin, answering on stdout.

    PYTHON worker.py smallm|llama-cpp-python

Runs under the interpreter of whichever environment holds the engine, so it imports nothing else.
Anything the engine itself prints goes to stderr.  Only the work asked for is timed, in seconds by
the monotonic clock.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class Smallm:
    """smallm through its public Python API."""

    def load(self, path: str, threads: int, ctx: int, every_logit: bool) -> dict[str, Any]:
        import smallm

        self.model = smallm.load(path, threads=threads, ctx=ctx)
        info = self.model.info
        return {"version": smallm.__version__, "isa": info.isa, "threads": info.threads}

    def prefill(self, ids: list[int]) -> float:
        start = time.perf_counter()
        self.model.generate(ids, max_tokens=1, temperature=0)
        return time.perf_counter() - start

    def decode(self, ids: list[int], n: int) -> float:
        """Seconds per token of the n after the first."""
        stream = self.model.stream(ids, max_tokens=n + 1, temperature=0, logit_bias=self.no_end())
        with stream:
            chunks = iter(stream)
            next(chunks)
            start = time.perf_counter()
            for _ in chunks:
                pass
            seconds = time.perf_counter() - start
            done = len(stream.completion.tokens) - 1
        if done != n:
            raise RuntimeError(f"decoded {done} tokens instead of {n}")
        return seconds / n

    def together(self, prompts: list[list[int]], n: int) -> float:
        start = time.perf_counter()
        self.model.generate(prompts, max_tokens=n, temperature=0, logit_bias=self.no_end())
        return time.perf_counter() - start

    def apart(self, prompts: list[list[int]], n: int) -> float:
        start = time.perf_counter()
        for ids in prompts:
            self.model.generate(ids, max_tokens=n, temperature=0, logit_bias=self.no_end())
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


class LlamaCpp:
    """llama-cpp-python at its best settings; decoding is timed without its sampler."""

    def load(self, path: str, threads: int, ctx: int, every_logit: bool) -> dict[str, Any]:
        import llama_cpp

        self.model = llama_cpp.Llama(
            path,
            n_ctx=ctx,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=512,
            n_ubatch=512,
            flash_attn=True,
            logits_all=every_logit,
            verbose=False,
        )
        system = llama_cpp.llama_print_system_info().decode()
        return {"version": llama_cpp.__version__, "isa": system, "threads": threads}

    def prefill(self, ids: list[int]) -> float:
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(ids)
        return time.perf_counter() - start

    def decode(self, ids: list[int], n: int) -> float:
        self.prefill(ids)
        following = [1000 + i for i in range(n)]
        start = time.perf_counter()
        for token in following:
            self.model.eval([token])
        return (time.perf_counter() - start) / n

    def apart(self, prompts: list[list[int]], n: int) -> float:
        start = time.perf_counter()
        for ids in prompts:
            self.model.reset()
            self.model.eval(ids)
            for i in range(n - 1):
                self.model.eval([1000 + i])
        return time.perf_counter() - start

    def tokenize(self, text: str) -> list[int]:
        return list(self.model.tokenize(text.encode(), add_bos=False, special=False))

    def logits(self, ids: list[int], out: str) -> None:
        import numpy as np

        self.model.reset()
        self.model.eval(ids)
        np.save(out, np.array(self.model.scores[: len(ids)], dtype=np.float32))


def idle(seconds: float) -> float:
    """Processor seconds this process uses while it is asked nothing."""
    before = time.process_time()
    time.sleep(seconds)
    return time.process_time() - before


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = {"smallm": Smallm, "llama-cpp-python": LlamaCpp}[sys.argv[1]]()
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
