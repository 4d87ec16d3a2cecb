"""The conversation of `smallm chat`."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from .. import Model, SmallmError
from .._chat import fit
from . import note, show_text

HELP = "/reset begins a new conversation; /exit or Ctrl-D ends; Ctrl-C stops an answer"


def talk(model: Model, system: str | None, params: dict[str, Any]) -> None:
    """Reads lines, streams answers, until the end of the input."""
    model._template()  # a model that cannot chat says so before the first question
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing for input())
        note(HELP)
    beginning = [] if system is None else [{"role": "system", "content": system}]
    messages = list(beginning)
    while True:
        line = _read(interactive)
        if line is None:
            return
        command = line.strip()
        if not command:
            continue
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            messages = list(beginning)
            note("(a new conversation)")
        elif command in ("/help", "/?"):
            note(HELP)
        elif command.startswith("/") and " " not in command:
            note(f"(no command {command}: {HELP})")
        else:
            messages = _turn(model, [*messages, {"role": "user", "content": line}], params)


def _read(interactive: bool) -> str | None:
    """The next line; None at the end of the input."""
    while True:
        try:
            if interactive:
                return input("> ")
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        except EOFError:
            note("")
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            note("\n(/exit or Ctrl-D ends)")


def _turn(model: Model, messages: list[dict[str, str]], params: dict[str, Any]) -> list[Any]:
    """One answer; returns the conversation with it, or without the question that failed."""
    try:
        # At least a quarter of the context stays for the answer.
        ids, n_dropped = fit(model, messages, model.info.context * 3 // 4)
        if n_dropped:
            note(f"(the context is full: the oldest {n_dropped} messages were dropped)")
            head = [m for m in messages[:-1] if m["role"] == "system"]
            rest = [m for m in messages if m["role"] != "system"]
            messages = [*head, *rest[n_dropped:]]
        stream = model.stream(ids, **params)
        try:
            for chunk in stream:
                show_text(chunk.text)
        except KeyboardInterrupt:
            stream.cancel()
        answer = stream.completion
    except (SmallmError, ValueError) as error:
        click.echo()
        note(f"smallm: {error}")
        return messages[:-1]
    except KeyboardInterrupt:  # before the answer began
        note("\n(stopped)")
        return messages[:-1]
    click.echo()
    if answer.finish_reason == "cancelled":
        note("(stopped)")
    elif answer.finish_reason == "length":
        note(f"(cut after {answer.usage.completion_tokens} tokens)")
    return [*messages, {"role": "assistant", "content": answer.text}]
