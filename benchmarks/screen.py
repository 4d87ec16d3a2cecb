"""How much of the head an exact screen would read: a lower-bit shadow of the head's rows, with
a proven error bound, tells which rows can be among the k best; only their panels are read whole.

    python benchmarks/screen.py MODEL.gguf [TEXT]

The shadow is the upper bits of a Q8_0 head's own codes, so that it would need no further memory.
For each position x of a text (found from its logits, which are W x) a row's logit lies within
`sum over blocks of |w - shadow|_max |x|_1` and `|w - shadow|_2 |x|_2` of the shadow's; the smaller
one counts. A row is out when its highest possible logit is below the k-th highest of the lowest
possible ones. Panels have 16 rows, neighbours in the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
from common import table
from numpy.typing import NDArray

import smallm

BLOCK, PANEL, N_TOKENS = 32, 16, 300
TEXT = Path("/usr/share/common-licenses/GPL-3")

Floats = NDArray[np.float32]


def head(path: str) -> tuple[Floats, Floats]:
    """Scales [n_vocab, blocks] and codes [n_vocab, blocks, 32] of a Q8_0 head."""
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    t = tensors.get("output.weight", tensors["token_embd.weight"])
    if t.tensor_type != gguf.GGMLQuantizationType.Q8_0:
        raise SystemExit(f"{path}: the head is {t.tensor_type.name}; this takes Q8_0")
    raw = np.asarray(t.data).reshape(int(t.shape[1]), -1, 2 + BLOCK)
    scales = raw[:, :, :2].copy().view(np.float16).astype(np.float32)[:, :, 0]
    return scales, raw[:, :, 2:].copy().view(np.int8).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("text", nargs="?", default=str(TEXT))
    args = parser.parse_args()
    scales, codes = head(args.model)
    n_vocab = len(codes)
    weights = (scales[:, :, None] * codes).reshape(n_vocab, -1)
    with smallm.load(args.model, kv="f32") as model:
        ids = model.tokenize(Path(args.text).read_text(encoding="utf-8")[3000:6000])[:N_TOKENS]
        logits = model.logits(ids)[len(ids) // 10 :]
    x = np.linalg.lstsq(weights, logits.T, rcond=None)[0].T.astype(np.float32)  # [n, k]
    x_1 = np.abs(x.reshape(len(x), -1, BLOCK)).sum(2)  # [n, blocks]
    x_2 = np.sqrt((x**2).sum(1))[:, None]  # [n, 1]

    rows = []
    for bits in (4, 5, 6):
        step = 2 ** (8 - bits)
        shadow = np.floor((codes + 128) / step) * step + (step - 1) / 2 - 128
        rest = (codes - shadow) * scales[:, :, None]  # [n_vocab, blocks, 32]
        error_1 = x_1 @ np.abs(rest).max(2).T
        error_2 = x_2 * np.sqrt((rest**2).sum((1, 2)))
        error = np.minimum(error_1, error_2)  # [n, n_vocab]
        guess = x @ (shadow * scales[:, :, None]).reshape(n_vocab, -1).T
        for k in (1, 40):
            least = np.partition(guess - error, -k, axis=1)[:, -k][:, None]
            left = guess + error >= least
            panels = left[:, : n_vocab // PANEL * PANEL].reshape(len(x), -1, PANEL).any(2).mean()
            read = bits / 8 + panels * (1 - bits / 8)
            rows.append([f"{bits}", f"{k}", f"{panels:.1%}", f"{read:.1%}"])
    print(
        table(
            ["bits of the shadow", "k best", "panels read whole", "of the head's bytes read"], rows
        )
    )


if __name__ == "__main__":
    main()
