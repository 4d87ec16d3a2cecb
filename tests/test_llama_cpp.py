"""llama.cpp reads the files that smallm converts, and answers alike.

It is here as the package xllamacpp, a wheel of a few dozen megabytes.
"""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import goldens
import numpy as np
import pytest
import tiny
from goldens import Golden

import smallm

xllamacpp = pytest.importorskip("xllamacpp", reason="the package xllamacpp is not installed")

# What llama.cpp does not take from the file, which is changed to what it takes for granted: keys
# and a pattern of tensors that are dropped, or keys' other values.
OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    # relu2 is too new for it: silu for every file.
    "bitnet": ({"hidden_activation": "silu"}, ""),
    # Norms of q and k are in models of 64 layers or more.
    "command-r": ({}, r"attn_[qk]_norm"),
    # Windows, and layers without rope, are in models of 64 layers.
    "exaone4": ({"attention.sliding_window": None}, ""),
    # Scores are scaled by the head's size, in its largest sizes by n_embd / n_head.
    "gemma2": ({"attention.scale": None}, ""),
    "gemma3": ({"attention.scale": None}, ""),
    # yarn's mixing begins and ends at whole pairs: here at (about) the first and the third.
    "gpt-oss": (
        {
            "rope.scaling.yarn_beta_fast": tiny.f32(3.22),
            "rope.scaling.yarn_beta_slow": tiny.f32(0.3223),
        },
        "",
    ),
}
# Where yarn begins and ends is the reader's choice, not the file's.
BETAS = {
    "olmo3": {"yarn_beta_fast": 2.0, "yarn_beta_slow": 0.5},
    "qwen2-yarn": {"yarn_beta_fast": 1.5, "yarn_beta_slow": 0.15},
    "mistral3": {"yarn_beta_fast": 1.5, "yarn_beta_slow": 0.15},
    "gpt-oss": {"yarn_beta_fast": 3.22, "yarn_beta_slow": 0.3223},
}
LENGTHS = (3, 20, 60, 99)  # of texts; every window has as many


class Server:
    """llama.cpp's server, of one file, one thread."""

    def __init__(self, path: Path, **options: Any) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.cpuparams.n_threads = 1
        usual = {"n_ctx": 512, "n_batch": 512, "n_ubatch": 512, "n_parallel": 1, "verbosity": -1}
        for name, value in (usual | {"warmup": False, "fit_params": False} | options).items():
            setattr(params, name, value)
        self.server = xllamacpp.Server(params)

    def ask(self, what: str, **values: Any) -> Any:
        request = urllib.request.Request(
            f"{self.server.listening_address}/{what}",
            json.dumps(values).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def logprobs(self, ids: list[int], n_vocab: int) -> np.ndarray:
        """[n_vocab] of what follows the ids.  The token it takes is one that is a letter: what is
        no whole character would not be told."""
        answer = self.ask(
            "completion", prompt=ids, n_predict=1, n_probs=n_vocab, temperature=0.0,
            logit_bias=[[70, 1000.0]], cache_prompt=False,
        )  # fmt: skip
        found = np.full(n_vocab, np.nan)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", goldens.names())
def test_llama_cpp_answers_alike(name: str, tmp_path: Path) -> None:
    golden = Golden(name, tmp_path)
    keys, dropped = OTHERWISE.get(name, ({}, ""))

    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if dropped and re.search(dropped, name)]:
            del tensors[name]

    path = golden.change(tmp_path / "m.gguf", keys=keys, edit=drop)
    server = Server(path, **BETAS.get(name, {}))
    with smallm.load(path, threads=1) as model:
        expected = log_softmax(model.logits(golden.ids[: LENGTHS[-1]]))
        text = "Once upon a time, the fox"
        tokens = server.ask("tokenize", content=text, add_special=True, parse_special=True)
        assert model.tokenize(text) == tokens["tokens"]
    for n in LENGTHS:
        got = server.logprobs(golden.ids[:n], goldens.N_VOCAB)
        # It rounds activations to float16 here and there.
        assert np.abs(got - expected[n - 1]).max() < 0.05 * expected[n - 1].std()


@pytest.mark.parametrize("name", goldens.names("encoder"))
def test_llama_cpp_embeds_alike(name: str, tmp_path: Path) -> None:
    golden = Golden(name, tmp_path)
    path = golden.change(tmp_path / "m.gguf", keys={"pooling_type": 1})
    server = Server(path, embedding=True)
    with smallm.load(path, threads=1) as model:
        for n in LENGTHS:
            answer = server.ask("embeddings", content=golden.ids[:n], embd_normalize=-1)
            got = np.array(answer[0]["embedding"][0])
            expected = model.embed([golden.ids[:n]], normalize=True)[0]
            cosine = got @ expected / np.linalg.norm(got)
            assert cosine > 0.9999, n
