"""Hugging Face checkpoints to GGUF files.

>>> import smallm.convert
>>> smallm.convert.convert("SmolLM2-135M-Instruct", "smollm2.gguf", type="q8_0")

Keys and tensor names are those of llama.cpp's files, so that both read what either writes.  What a
model is stands in `_families`, one row each; everything about a folder is judged before the first
byte is written.  Needs the extra `convert` (the packages gguf and safetensors).
"""

from ..quantize import TYPES
from ._convert import convert
from ._merge import merge

__all__ = ["TYPES", "convert", "merge"]
