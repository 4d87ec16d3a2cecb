"""Messages -> tokens, through the model's chat template.

The text of a message is data: "<|im_end|>" in it must not end the message.  Where a message holds
the text of a control token, that text is replaced by a private character before the template is
rendered, and tokenized as plain text afterwards; the template's own control tokens stay what they
are.  A message without such text, that is nearly every one, goes the ordinary way: the whole
rendered text is tokenized at once, as the model was trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ._errors import TemplateError
from ._generate import utf8

if TYPE_CHECKING:
    from ._model import Model

Message = Mapping[str, Any]
_MAX_DEPTH = 32


def judge_messages(messages: object) -> list[dict[str, Any]]:
    """`messages` (a str, or a list of {"role", "content"}) as plain dicts; copies."""
    if isinstance(messages, str):
        utf8("the message", messages)
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, (list, tuple)):
        raise TypeError(
            f'messages must be a str or a list of {{"role", "content"}}, '
            f"not {type(messages).__name__}"
        )
    if not messages:
        raise ValueError("messages is empty: give at least one")
    result = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{i}] must be a dict, not {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"messages[{i}] has no {key!r}")
            if not isinstance(message[key], str):
                raise TypeError(
                    f"messages[{i}][{key!r}] must be a str, not {type(message[key]).__name__}"
                )
        result.append(_plain(message, f"messages[{i}]", _MAX_DEPTH))
    return result


def _plain(value: object, where: str, depth: int) -> Any:
    """A copy that holds nothing but JSON's types, so that a template gets hold of nothing else."""
    if depth == 0:
        raise ValueError(f"{where} is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, str):
        utf8(where, value)
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{where} has a key that is not a str")
        return {key: _plain(item, f"{where}[{key!r}]", depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]", depth - 1) for i, item in enumerate(value)]
    raise TypeError(f"{where} must be text, numbers, lists or dicts, not {type(value).__name__}")


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []


def _mapped(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    return [_mapped(item, function) for item in value] if isinstance(value, list) else value


class _Neutral:
    """Private characters that stand for the control-token texts found in messages."""

    def __init__(self, model: Model, used: str) -> None:
        self._model = model
        self._taken = set(used)
        self._next = 0xF0000  # a private-use plane
        self.texts: dict[str, str] = {}  # character -> the text it stands for

    def __call__(self, text: str) -> str:
        while found := self._control_texts(text):
            for control in sorted(found, key=len, reverse=True):
                text = text.replace(control, self._character(control))
        return text

    def _control_texts(self, text: str) -> set[str]:
        """Texts of control tokens that the tokenizer would find in `text`."""
        tokenize, model = self._model.tokenize, self._model
        ids = tokenize(text, add_special=False, parse_special=True)
        if ids == tokenize(text, add_special=False):
            return set()
        controls = {i for i in set(ids) if not model.detokenize([i], skip_special=True)}
        found = {model.detokenize([i], skip_special=False) for i in controls}
        return {control for control in found if control and control in text}

    def _character(self, control: str) -> str:
        for character, text in self.texts.items():
            if text == control:
                return character
        while chr(self._next) in self._taken:
            self._next += 1
        character = chr(self._next)
        self._next += 1
        self.texts[character] = control
        return character


def render(
    model: Model, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True
) -> str:
    """The text of `messages`, as the model's template writes it."""
    template = model._template()
    rendered = template.render(
        sum(map(len, _strings(messages))) + len(template.source),
        {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": model._special_text("bos"),
            "eos_token": model._special_text("eos"),
            "tools": None,
        },
    )
    try:
        rendered.encode("utf-8")
    except UnicodeEncodeError:
        raise TemplateError("the chat template writes a lone surrogate: not text") from None
    return rendered


def chat_tokens(model: Model, messages: list[dict[str, Any]]) -> list[int]:
    """The prompt that asks the model for the next message."""
    neutral = _Neutral(model, "".join(_strings(messages)) + model._template().source)
    rendered = render(model, _mapped(messages, neutral))
    pieces = [rendered]
    if neutral.texts:
        pieces = re.split(f"([{''.join(neutral.texts)}])", rendered)
    ids: list[int] = []
    for piece in filter(None, pieces):
        if piece in neutral.texts:
            ids += model.tokenize(neutral.texts[piece], add_special=False)
        else:
            ids += model.tokenize(piece, add_special=False, parse_special=True)
    first = model._bos_added
    if first is not None and ids[:1] != [first]:
        ids.insert(0, first)
    if not ids:
        raise TemplateError("the chat template makes an empty prompt of these messages")
    return ids


def fit(model: Model, messages: Sequence[dict[str, Any]], limit: int) -> tuple[list[int], int]:
    """Prompt tokens and the number of messages dropped so that they are at most `limit`.

    Whole turns go, the oldest first; system messages and the last message stay, so that the
    prompt may still be longer than `limit`.
    """
    kept = list(messages)
    while True:
        ids = chat_tokens(model, kept)
        if len(ids) <= limit:
            break
        turns = [i for i, message in enumerate(kept[:-1]) if message["role"] != "system"]
        if not turns:
            break
        # A turn ends before the next user message: an answer does not outlive its question.
        end = next((i for i in turns[1:] if kept[i]["role"] == "user"), len(kept) - 1)
        kept = [m for i, m in enumerate(kept) if i not in turns or i >= end]
    return ids, len(messages) - len(kept)
