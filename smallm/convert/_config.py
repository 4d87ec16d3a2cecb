"""config.json, with names and values in its error messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError

MAX_LAYERS = 1024


def read_json(path: Path) -> dict[str, Any]:
    """An object.  ModelNotFoundError: no such file; CorruptModelError: not JSON, or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise CorruptModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptModelError(f"{path}: a JSON object is wanted, not a {type(value).__name__}")
    return value


@contextmanager
def judged(path: Path) -> Iterator[None]:
    """Whatever a value of a wrong kind does to those who read it is a CorruptModelError of the file
    it came from."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise CorruptModelError(
            f"{path}: a value is missing or not of the kind it should be: {error!r}"
        ) from error


class Config:
    """The values of one config.json; null counts as missing."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these keys that is there."""
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        return default

    def _number(self, kinds: type | tuple[type, ...], names: tuple[str, ...], default: Any) -> Any:
        value = self.get(*names, default=default)
        if value is None:
            raise CorruptModelError(f"{self.path}: {' or '.join(names)} is missing")
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise CorruptModelError(f"{self.path}: {names[0]} is {value!r}; a number is wanted")
        return value

    def integer(self, *names: str, default: int | None = None) -> int:
        return int(self._number(int, names, default))

    def number(self, *names: str, default: float | None = None) -> float:
        return float(self._number((int, float), names, default))

    def refuse(self, name: str, allowed: Iterable[Any]) -> UnsupportedModelError:
        """The error for a value that this version cannot convert."""
        shown = ", ".join(json.dumps(value) for value in allowed)
        value = json.dumps(self.values.get(name))
        return UnsupportedModelError(f"{self.path}: {name} is {value}; this version takes {shown}")

    @property
    def n_head(self) -> int:
        return self.integer("num_attention_heads", "n_head", "num_heads", "n_heads")

    @property
    def n_head_kv(self) -> int:
        return self.integer("num_key_value_heads", default=self.n_head)

    @property
    def head(self) -> int:
        return self.integer(
            "head_dim",
            default=self.integer("hidden_size", "n_embd", "n_embed", "d_model") // self.n_head,
        )

    @property
    def n_layer(self) -> int:
        n = self.integer("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        if not 1 <= n <= MAX_LAYERS:
            raise CorruptModelError(
                f"{self.path}: num_hidden_layers is {n}; allowed are 1 to {MAX_LAYERS}"
            )
        return n
