"""Where the time of a token goes: the library's own timers (SMALLM_TIMERS=1), in thread time.

    python benchmarks/profile.py --model MODEL.gguf

    cmake -S . -B build -DSMALLM_TESTS=ON && cmake --build build --target loops
    python benchmarks/profile.py --model MODEL.gguf --loops build/loops

The second form adds the time that the inner loops alone need (loops.c), on the model's own
weights, in turn with the passes: what a pass takes longer is not the loops.

Shares of threads x wall time.  "wait" is a thread without work, "serial" the pass's own thread
between phases, "outside" what no pass holds: the engine between passes, and the core that the
Python layer takes away.  Reading the clock so often costs a little itself.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, NamedTuple

from common import (
    add_loops,
    add_model,
    arguments,
    loops_alone,
    machine,
    median,
    model_path,
    prompt,
    table,
    write_json,
)

if TYPE_CHECKING:
    from smallm import Model

ROUNDS = 5
NO_END = {0: -1e9, 2: -1e9}  # tokens that end an answer, in the models of this suite


class Case(NamedTuple):
    name: str
    n_prompt: int
    n_decode: int  # tokens after the first one of each sequence; 0: the prompt is what is timed
    n_sequences: int


CASES = (
    Case("prefill of 512", 512, 0, 1),
    Case("decode after 512", 512, 128, 1),
    Case("8 decode after 16", 16, 128, 8),
)


class Times(NamedTuple):
    wall: float
    parts: dict[str, float]  # thread seconds

    def minus(self, other: Times) -> Times:
        parts = {k: v - other.parts.get(k, 0) for k, v in self.parts.items()}
        return Times(self.wall - other.wall, parts)


def timed(model: Model, case: Case, seed: int, max_tokens: int) -> Times:
    n_vocab = model.info.vocabulary
    texts = [prompt(case.n_prompt, 100 * seed + i, n_vocab) for i in range(case.n_sequences)]
    before, start = model.info.timers, time.perf_counter()
    done = model.generate(texts, max_tokens=max_tokens, temperature=0, logit_bias=NO_END)
    wall = time.perf_counter() - start
    if any(len(c.tokens) != max_tokens for c in done):
        raise SystemExit("an answer ended early: this model needs other tokens in NO_END")
    return Times(wall, model.info.timers).minus(Times(0, before))


def case_alone(program: str, path: str, threads: int, case: Case) -> dict[str, float]:
    """The case's inner loops; the head's, in a prompt, for its last token only."""
    tokens, position, rounds = (
        (1, case.n_prompt + case.n_decode // 2, 20) if case.n_decode else (case.n_prompt, 0, 3)
    )
    alone = loops_alone(program, path, threads, case.n_sequences, tokens, position, rounds)
    return {loop: alone[loop] for loop in ("matrices", "head", "attention")}


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0], peers=False)
    add_model(parser)
    add_loops(parser)
    options = parser.parse_args()
    os.environ["SMALLM_TIMERS"] = "1"
    import smallm

    results: dict[str, dict[str, float]] = {}
    path = model_path(options.model)
    with smallm.load(path, threads=options.threads) as model:
        for number, case in enumerate(CASES):
            rounds, alone = [], []
            for i in range(ROUNDS + 1):
                seed = 1000 * number + 2 * i
                first = timed(model, case, seed, 1)
                rounds.append(
                    timed(model, case, seed + 1, 1 + case.n_decode).minus(first)
                    if case.n_decode
                    else first
                )
                if options.loops:
                    alone.append(case_alone(options.loops, path, options.threads, case))
            rounds, alone = rounds[1:], alone[1:]  # the first one warmed up
            n_tokens = case.n_sequences * (case.n_decode or case.n_prompt)
            shares = {
                name: median([r.parts[name] / (options.threads * r.wall) for r in rounds])
                for name in rounds[0].parts
            }
            results[case.name] = {
                "us a token": 1e6 * median([r.wall for r in rounds]) / n_tokens,
                **{
                    f"us of {loop} alone": 1e6 * median([a[loop] for a in alone])
                    for loop in (alone[0] if alone else ())
                },
                **shares,
                "outside": 1 - sum(shares.values()),
            }
        isa = model.info.isa
    names = list(
        dict.fromkeys(name for c in results.values() for name, share in c.items() if share != 0)
    )
    rows = [
        [
            name,
            *(
                ("{:.1f}" if name[:3] == "us " else "{:.1%}").format(c.get(name, 0))
                for c in results.values()
            ),
        ]
        for name in names
    ]
    print(f"{machine()['cpu']}, {options.threads} threads, {isa}")
    print(table(["", *results], rows))
    write_json(options.json, {"machine": machine(), "isa": isa, "profile": results})


if __name__ == "__main__":
    main()
