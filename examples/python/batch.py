"""Completes the lines of a file together:  python batch.py lines.txt [model]

Prompts in a list run as one batch, which is much faster than one after the other, and each gets
the very answer it would get alone.
"""

import json
import sys
from pathlib import Path

import smallm


def main() -> None:
    prompts = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    with smallm.load(sys.argv[2] if len(sys.argv) > 2 else None) as model:
        answers = model.generate(prompts, max_tokens=32, stop="\n", seed=1)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(json.dumps({"prompt": prompt, "answer": answer.text, "seed": answer.seed}))


if __name__ == "__main__":
    main()
