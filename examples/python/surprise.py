"""How surprising is each token of a text?  python surprise.py "some text" [model]

Logits of a whole text come in one call; their log-softmax at the next token is how probable the
model found it.
"""

import sys

import numpy as np

import smallm


def main() -> None:
    with smallm.load(sys.argv[2] if len(sys.argv) > 2 else None) as model:
        ids = model.tokenize(sys.argv[1])
        logits = model.logits(ids).astype(np.float64)  # [n_ids, n_vocab]
        pieces = [model.detokenize([i]) for i in ids]
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    bits = [-logprobs[i, token] / np.log(2) for i, token in enumerate(ids[1:])]
    for piece, surprise in zip(pieces[1:], bits, strict=True):
        print(f"{surprise:6.2f} bits  {piece!r}")
    print(f"{np.mean(bits):6.2f} bits per token")


if __name__ == "__main__":
    main()
