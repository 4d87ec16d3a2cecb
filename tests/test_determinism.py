"""One answer everywhere: the same bits for any threads, chunks, company and instruction set.

And the knobs are real: threads, chunks, batches and tiers are counted where they happen.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
import tiny
from goldens import Golden, decoder_ids

import smallm
from smallm import _ffi

ffi, lib = _ffi.ffi, _ffi.lib

HERE = Path(__file__).parent  # children start here, where no source folder hides the package
LONG = 600  # positions: three attention chunks, two full prefill chunks

MODELS: dict[str, dict[str, Any]] = {
    "F32": {"types": "F32"},
    "F16": {"types": "F16", "tied": False, "n_head": 71, "n_head_kv": 1, "head": 4, "n_embd": 32},
    "BF16": {"types": "BF16"},
    "Q4_0": {"types": "Q4_0", "n_embd": 160, "n_head": 5, "n_head_kv": 1, "n_ff": 224},
    "Q4_1": {"types": "Q4_1", "biases": True},
    "Q5_0": {"types": "Q5_0", "rope_factors": True},
    "Q5_1": {"types": "Q5_1"},
    "Q8_0": {"types": "Q8_0", "extra": {"llama.attention.sliding_window": 100}},
    "Q2_K": {"types": "Q2_K", "n_embd": 256, "n_ff": 256},
    "Q3_K": {"types": "Q3_K", "n_embd": 256, "n_ff": 256},
    "Q4_K": {"types": "Q4_K", "n_embd": 256, "n_ff": 512, "tied": False},
    "Q5_K": {"types": "Q5_K", "n_embd": 256, "n_ff": 256},
    "Q6_K": {"types": "Q6_K", "n_embd": 256, "n_ff": 512},
    "TQ1_0": {"types": "TQ1_0", "n_embd": 256, "n_ff": 256},
    "TQ2_0": {"types": "TQ2_0", "n_embd": 256, "n_ff": 512},
    "IQ4_NL": {"types": "IQ4_NL", "n_embd": 160, "n_head": 5, "n_head_kv": 1, "n_ff": 224},
    "MXFP4": {"types": "MXFP4", "tied": False},
    "IQ4_XS": {"types": "IQ4_XS", "n_embd": 256, "n_ff": 512},
    "IQ3_S": {"types": "IQ3_S", "n_embd": 256, "n_ff": 256},
    "IQ2_XXS": {"types": "IQ2_XXS", "n_embd": 256, "n_ff": 256},
    "IQ1_M": {"types": "IQ1_M", "n_embd": 256, "n_ff": 256},
    "NVFP4": {"types": "NVFP4", "n_ff": 128},
}

CACHES = {"f16": lib.SMALLM_KV_F16, "f32": lib.SMALLM_KV_F32, "q8": lib.SMALLM_KV_Q8}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        path = folder / f"{name}.gguf"
        if not path.exists():
            tiny.write_tiny(path, n_ctx=1024, **MODELS[name])
        return path

    return get


@pytest.fixture(scope="module")
def real_model() -> Path:
    """The default model's file, fetched where that is possible."""
    try:
        with smallm.load() as model:
            return Path(model.info.path)
    except smallm.DownloadError as error:
        pytest.skip(f"the default model cannot be fetched here: {error}")


def prompt(n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, 300, n)]


class Engine:
    """The C interface, for what the Python one does not count."""

    def __init__(
        self, path: Path, *, threads: int = 2, n_batch: int = 512, kv: str = "f16"
    ) -> None:
        self.error = ffi.new("smallm_error *", {"size": ffi.sizeof("smallm_error")})
        out = ffi.new("smallm_model **")
        self.check(lib.smallm_model_open(str(path).encode(), ffi.NULL, out, self.error))
        self.model = out[0]
        params = ffi.new("smallm_engine_params *", {"size": ffi.sizeof("smallm_engine_params")})
        params.n_threads, params.n_batch, params.kv_type = threads, n_batch, CACHES[kv]
        out = ffi.new("smallm_engine **")
        self.check(lib.smallm_engine_open(self.model, params, out, self.error))
        self.engine = out[0]
        info = self.struct("smallm_model_info")
        self.check(lib.smallm_model_get_info(self.model, info, self.error))
        self.n_vocab, self.n_embd = info.n_vocab, info.n_embd

    def struct(self, name: str) -> Any:
        out = ffi.new(f"{name} *")
        out.size = ffi.sizeof(name)
        return out

    def check(self, status: int) -> None:
        assert status >= 0, ffi.string(self.error.message)

    def counters(self) -> tuple[int, int]:
        """Forward passes and the tokens they held, so far."""
        info = self.struct("smallm_engine_info")
        self.check(lib.smallm_engine_get_info(self.engine, info, self.error))
        return info.n_forward, info.n_tokens

    def logits(
        self,
        prompts: Sequence[Sequence[int]],
        chunk: int = 0,
        source: Sequence[int] = (),
        embed: bool = False,
    ) -> tuple[list[np.ndarray], list[int]]:
        """All prompts submitted before the first is waited for: logits [n, n_vocab] of each, or
        vectors [n_embd], and the number of passes each took part in."""
        requests, results, keep = [], [], []
        for ids in prompts:
            shape = (self.n_embd,) if embed else (len(ids), self.n_vocab)
            result = np.full(shape, np.nan, dtype=np.float32)
            params = self.struct("smallm_request_params")
            text = ffi.new("int32_t[]", list(source))
            if source:
                params.source, params.n_source = text, len(source)
            tokens = ffi.new("int32_t[]", list(ids))
            params.tokens, params.n_tokens, params.n_chunk = tokens, len(ids), chunk
            params.sampling.size = ffi.sizeof("smallm_sampling")
            params.n_logprobs = -1
            buffer = ffi.from_buffer("float[]", result, require_writable=True)
            setattr(params, "embedding" if embed else "logits", buffer)
            out = ffi.new("smallm_request **")
            self.check(lib.smallm_engine_submit(self.engine, params, out, self.error))
            requests.append(out[0])
            results.append(result)
            keep.append((params, tokens, text))
        chunks = []
        for request in requests:
            chunk_out, stats = self.struct("smallm_chunk"), self.struct("smallm_request_stats")
            while (status := lib.smallm_request_next(request, 100, chunk_out, self.error)) < 2:
                self.check(status)
            self.check(lib.smallm_request_get_stats(request, stats, self.error))
            chunks.append(stats.n_chunks)
            lib.smallm_request_free(request)
        return results, chunks

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        lib.smallm_engine_close(self.engine)
        lib.smallm_model_free(self.model)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    assert np.isfinite(a).all() and a.std() > 0
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


# ---- threads, chunks, company --------------------------------------------------------------------


def differences(path: Path, n: int, chunks: Sequence[int], kv: str = "f16") -> list[str]:
    """What of threads 1, 2, 3 x chunks changes a bit of the logits of n tokens."""
    ids, wrong = prompt(n), []
    first = None
    for threads in (1, 2, 3):
        with smallm.load(path, threads=threads, kv=kv) as model:
            for chunk in chunks:
                got = model.logits(ids, chunk=chunk)
                first = got if first is None else first
                if not same_bits(first, got):
                    wrong.append(f"threads {threads}, chunk {chunk}")
    return wrong


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kv", CACHES)
def test_threads_and_chunks_change_no_bit(
    models: Callable[[str], Path], name: str, kv: str
) -> None:
    assert differences(models(name), LONG, (512, 1, 7, 32), kv) == []


def test_threads_and_chunks_change_no_bit_of_the_real_model(real_model: Path) -> None:
    assert differences(real_model, 40, (512, 1, 7, 32)) == []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("chunk", [0, 3], ids=["whole", "chunks of 3"])
def test_company_changes_no_bit(
    models: Callable[[str], Path], name: str, kv: str, chunk: int
) -> None:
    prompts = [prompt(n, seed=n) for n in (300, 40, 1, 17, 64)]
    with Engine(models(name), kv=kv) as engine:
        alone = [engine.logits([p], chunk)[0][0] for p in prompts]
        for _ in range(1000):  # on a busy machine each prompt may end before the next one comes
            before, _ = engine.counters()
            together, chunks = engine.logits(prompts, chunk)
            after, _ = engine.counters()
            for a, b in zip(alone, together, strict=True):
                assert same_bits(a, b)
            if after - before < sum(chunks):
                return
    pytest.fail("no pass held more than one of the sequences")


def test_company_changes_no_bit_of_the_real_model(real_model: Path) -> None:
    prompts = [prompt(n, seed=n) for n in (20, 1, 33, 8, 16)]
    with Engine(real_model) as engine:
        alone = [engine.logits([p])[0][0] for p in prompts]
        together, _ = engine.logits(prompts)
    for a, b in zip(alone, together, strict=True):
        assert same_bits(a, b)


def test_a_list_of_prompts_is_answered_as_each_alone(models: Callable[[str], Path]) -> None:
    prompts = [prompt(n, seed=n) for n in (9, 30, 5, 70, 12)]
    with smallm.load(models("Q4_1"), threads=2) as model:
        options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "logprobs": 0}
        together = model.generate(prompts, seed=7, **options)
        alone = [model.generate(p, seed=7 + i, **options) for i, p in enumerate(prompts)]
    for a, b in zip(alone, together, strict=True):
        assert (a.text, a.tokens, a.finish_reason) == (b.text, b.tokens, b.finish_reason)
        assert a.logprobs == b.logprobs and a.logprobs is not None
    assert len({tuple(a.tokens) for a in alone}) == 5


@pytest.mark.parametrize("name", ["nomic-bert", "modern-bert", "t5"])
def test_a_text_that_is_longer_than_a_pass_is_one(name: str, tmp_path: Path) -> None:
    """What an encoder reads: products take it in several turns, and the bits stay."""
    golden = Golden(name, tmp_path)
    path = golden.change(tmp_path / "m.gguf", keys={"context_length": 3000})
    text, short = (golden.ids * 10)[:3000], golden.ids[:40]
    first = None
    for n_batch, threads in ((2048, 1), (512, 2), (64, 3), (7, 2)):
        with Engine(path, threads=threads, n_batch=n_batch) as engine:
            if name == "t5":
                got = engine.logits([decoder_ids(short)] * 2, source=text)[0]
            else:
                got = engine.logits([short, text, short, text], embed=True)[0]
                assert same_bits(got[0], got[2])
        assert same_bits(got[-1], got[1])
        first = got if first is None else first
        assert all(same_bits(a, b) for a, b in zip(got, first, strict=True)), (n_batch, threads)


# ---- instruction sets ----------------------------------------------------------------------------

HASH = """
import hashlib, json, sys, numpy, smallm
answers = {}
for path, n in json.load(sys.stdin):
    ids = [int(i) for i in numpy.random.default_rng(0).integers(3, 300, n)]
    for kv in ("f16", "q8", "f32"):
        with smallm.load(path, threads=2, kv=kv) as model:
            isa = model.info.isa
            all = [model.logits(ids, chunk=c).tobytes() for c in (n, 1)]
            answers[f"{path} {kv}"] = [hashlib.sha256(bits).hexdigest() for bits in all]
json.dump({"isa": isa, "answers": answers}, sys.stdout)
"""


def run_python(code: str, *, isa: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "SMALLM_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code],
        input=stdin,
        env=env,
        cwd=HERE,
        capture_output=True,
        text=True,
    )


def tiers() -> list[str]:
    info = ffi.new("smallm_cpu_info *", {"size": ffi.sizeof("smallm_cpu_info")})
    assert lib.smallm_cpu(info, ffi.NULL) == 0
    return ffi.string(info.available).decode().split(",")


def hashes(isa: str, work: list[tuple[str, int]]) -> dict[str, list[str]]:
    done = run_python(HASH, isa=isa, stdin=json.dumps(work))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["isa"] == isa
    return answer["answers"]


def test_instruction_sets_change_no_bit(models: Callable[[str], Path]) -> None:
    work = [(str(models(name)), 70) for name in MODELS]
    generic = hashes("generic", work)
    assert len({tuple(v) for v in generic.values()}) == 3 * len(MODELS)  # caches
    for sums in generic.values():
        assert sums[0] == sums[1]
    for isa in tiers():
        assert hashes(isa, work) == generic, isa


def test_instruction_sets_change_no_bit_of_the_real_model(real_model: Path) -> None:
    work = [(str(real_model), 12)]
    generic = hashes("generic", work)
    for isa in tiers():
        assert hashes(isa, work) == generic, isa


# ---- the knobs are real --------------------------------------------------------------------------


def test_the_tier_in_use_is_named(models: Callable[[str], Path]) -> None:
    assert tiers()[0] == "generic"
    if "SMALLM_ISA" not in os.environ:
        with smallm.load(models("F32")) as model:
            assert model.info.isa == tiers()[-1]


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx2 ", "all"])
def test_an_unknown_tier_is_an_error(models: Callable[[str], Path], isa: str) -> None:
    code = f"import smallm; smallm.load({str(models('F32'))!r})"
    done = run_python(code, isa=isa)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "SMALLM_ISA" in last and isa in last and "generic" in last
    assert "ValueError" in last or "SmallmError" in last or "UnsupportedModelError" in last


def test_a_tier_that_the_cpu_lacks_is_an_error(models: Callable[[str], Path]) -> None:
    missing = {"avx2", "avxvnni", "avx512vnni", "neon", "dotprod", "i8mm", "rvv"} - set(tiers())
    assert missing
    for isa in missing:
        done = run_python(f"import smallm; smallm.load({str(models('F32'))!r})", isa=isa)
        assert done.returncode == 1
        assert "SMALLM_ISA" in done.stderr and isa in done.stderr.splitlines()[-1]


TASKS = """
import json, os, sys, numpy, smallm
path, n = json.load(sys.stdin)
before = set(os.listdir("/proc/self/task"))
with smallm.load(path, threads=n) as model:
    model.logits([3, 4, 5, 6, 7] * 10)
    during = set(os.listdir("/proc/self/task")) - before
    info = model.info.threads
after = set(os.listdir("/proc/self/task")) - before
json.dump([len(during), info, len(after)], sys.stdout)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_threads_are_seen_in_the_process(models: Callable[[str], Path]) -> None:
    """The engine's own thread is one of the n that compute."""
    for n in (1, 2, 3):
        done = subprocess.run(
            [sys.executable, "-c", TASKS],
            input=json.dumps([str(models("F32")), n]),
            cwd=HERE,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [n, n, 0]


def test_chunks_are_counted(models: Callable[[str], Path]) -> None:
    with Engine(models("F32")) as engine:
        for n, chunk, passes in [(40, 7, 6), (40, 1, 40), (40, 40, 1), (40, 0, 1), (600, 0, 2)]:
            before = engine.counters()
            _, chunks = engine.logits([prompt(n)], chunk)
            after = engine.counters()
            assert chunks == [passes]
            assert after[0] - before[0] == passes and after[1] - before[1] == n


# ---- several Python threads ----------------------------------------------------------------------


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(i: int) -> None:
        start.wait()
        results[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


def test_threads_that_generate_at_once_get_what_they_get_alone(
    models: Callable[[str], Path],
) -> None:
    with smallm.load(models("Q4_1"), threads=2) as model:

        def answer(seed: int) -> tuple[str, list[int]]:
            ids = prompt(5 + 11 * seed, seed)
            done = model.generate(ids, max_tokens=60, temperature=0.8, seed=seed)
            return done.text, list(done.tokens)

        alone = [answer(0), answer(1)]
        for _ in range(10):
            assert at_once([lambda: answer(0), lambda: answer(1)]) == alone
    assert alone[0] != alone[1] and min(len(t) for _, t in alone) > 0


def test_logits_and_answers_at_once(models: Callable[[str], Path]) -> None:
    ids = prompt(200)
    with smallm.load(models("Q8_0"), threads=2) as model:

        def digest() -> str:
            return hashlib.sha256(model.logits(ids, chunk=16).tobytes()).hexdigest()

        def answer() -> list[int]:
            return list(model.generate(ids[:20], max_tokens=40, temperature=0).tokens)

        alone = [digest(), answer()]
        for _ in range(5):
            assert at_once([digest, answer]) == alone


def test_the_module_level_function_serves_threads_at_once(real_model: Path) -> None:
    prompts = ["The capital of France is", "Two plus two is"]

    def answer(text: str) -> str:
        return str(smallm.generate(text, model=real_model, temperature=0, max_tokens=16))

    alone = [answer(p) for p in prompts]
    assert at_once([lambda: answer(prompts[0]), lambda: answer(prompts[1])]) == alone
