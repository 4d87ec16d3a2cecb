"""The exception tree.  Everything the library raises by itself is a SmallmError; arguments of a
wrong type or value raise TypeError / ValueError, as everywhere in Python."""

from __future__ import annotations


class SmallmError(Exception):
    """Base of all smallm exceptions."""


class ModelNotFoundError(SmallmError, FileNotFoundError):
    """No such file, catalogue name or repository."""


class UnsupportedModelError(SmallmError):
    """A well-formed model of a kind that this version cannot run."""


class CorruptModelError(SmallmError):
    """A model file that contradicts itself or its format."""


class ContextOverflowError(SmallmError):
    """A prompt that is longer than the context.

    Attributes:
        prompt_tokens: tokens of the prompt.
        limit: tokens that the context holds.
    """

    def __init__(self, message: str, prompt_tokens: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.limit = limit


class MemoryBudgetError(SmallmError, MemoryError):
    """More memory would be needed than memory_limit allows or the machine has."""


class GrammarError(SmallmError):
    """A grammar, regular expression or schema that cannot be used."""


class TemplateError(SmallmError):
    """A chat template that is missing, fails or exceeds its limits."""


class DownloadError(SmallmError):
    """A model could not be fetched."""


class CancelledError(SmallmError):
    """The request was cancelled before it had a result."""


class ClosedError(SmallmError):
    """The model was closed."""
