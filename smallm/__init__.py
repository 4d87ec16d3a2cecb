"""smallm: small language models on the machine you have.

>>> import smallm
>>> print(smallm.generate("The capital of France is"))
>>> with smallm.load("model.gguf") as model:
...     print(model.chat("Why is the sky blue?"))
"""

from ._binding import version
from ._errors import (
    CancelledError,
    ClosedError,
    ContextOverflowError,
    CorruptModelError,
    DownloadError,
    GrammarError,
    MemoryBudgetError,
    ModelNotFoundError,
    SmallmError,
    TemplateError,
    UnsupportedModelError,
)
from ._generate import AsyncStream, Chunk, Completion, Params, Stream, Timings, Usage
from ._model import Model, ModelInfo, chat, generate, load

__version__ = version()

__all__ = [
    "AsyncStream",
    "CancelledError",
    "Chunk",
    "ClosedError",
    "Completion",
    "ContextOverflowError",
    "CorruptModelError",
    "DownloadError",
    "GrammarError",
    "MemoryBudgetError",
    "Model",
    "ModelInfo",
    "ModelNotFoundError",
    "Params",
    "SmallmError",
    "Stream",
    "TemplateError",
    "Timings",
    "UnsupportedModelError",
    "Usage",
    "__version__",
    "chat",
    "generate",
    "load",
]
