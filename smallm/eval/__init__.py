"""How good a model is, above all a quantized one: perplexity, and divergence from a reference.

>>> import smallm, smallm.eval
>>> with smallm.load("model-q4.gguf") as model, smallm.load("model-f16.gguf") as reference:
...     print(smallm.eval.perplexity(model, text))
...     print(smallm.eval.divergence(model, reference, text))

Importing `smallm.eval.harness` registers the model "smallm" with lm-evaluation-harness (the extra
`eval`).
"""

from ._quality import Divergence, Perplexity, divergence, perplexity, save_logits

__all__ = ["Divergence", "Perplexity", "divergence", "perplexity", "save_logits"]
