"""Perplexity, and how far a model's distributions are from a reference's.

A text is cut into windows of `ctx` tokens, back to back; where the model begins texts with a token
(BOS), it takes the place of each window's first one.  Scored are the tokens after the first half,
which therefore have at least ctx / 2 tokens before them: llama.cpp's convention, so that figures
can be compared.  With a stride windows overlap, and every token but the first is scored once.

Logits are held a part of a window at a time, LOGIT_BYTES at most.  All sums are of doubles.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .._errors import SmallmError, UnsupportedModelError
from .._files import whole_file
from .._generate import integer, token_ids, utf8
from .._model import Model
from ._saved import Doubles, Floats, SavedLogits, scored, write_head, write_row

LOGIT_BYTES = 1 << 26

Report = Callable[[int, int], object]  # called with (tokens done, tokens in all)


class Perplexity(NamedTuple):
    """What the tokens of a text surprise a model with.  Errors are standard errors of the mean."""

    perplexity: float  #: exp(nll)
    perplexity_error: float
    nll: float  #: mean negative log-likelihood in nats per token
    nll_error: float
    tokens: int  #: that were scored
    windows: int
    ctx: int  #: tokens in a window
    tokens_per_second: float  #: run, scored or not


class Divergence(NamedTuple):
    """How far a model is from a reference on a text: KL divergences in nats per token.  Errors are
    standard errors of the mean."""

    mean: float  #: of sum p (ln p - ln q), p the reference's probabilities, q the model's
    mean_error: float
    median: float
    quantile_999: float  #: 99.9 % of the tokens are not above it
    maximum: float
    same_top: float  #: share of tokens for which both expect the same one most
    same_top_error: float
    perplexity: float
    reference_perplexity: float  #: from a file somewhat low where it lacks what the text says
    ratio: float  #: perplexity / reference_perplexity
    ratio_error: float
    tokens: int  #: that were compared
    windows: int
    ctx: int  #: tokens in a window


class _Window(NamedTuple):
    begin: int  # of the text's tokens
    end: int
    first: int  # the first one that is scored; from there all are


def _windows(n_tokens: int, ctx: int, stride: int | None) -> list[_Window]:
    if stride is None:
        last = n_tokens - n_tokens % ctx
        return [_Window(i, i + ctx, i + ctx - scored(ctx)) for i in range(0, last, ctx)]
    found = [_Window(0, min(ctx, n_tokens), 1)]
    while found[-1].end < n_tokens:
        begin = found[-1].begin + stride
        found.append(_Window(begin, min(begin + ctx, n_tokens), found[-1].end))
    return found


def text_tokens(model: Model, text: str | Sequence[int]) -> list[int]:
    """A text's tokens, with BOS where the model adds it; or tokens, judged."""
    if not isinstance(text, str):
        return token_ids("text", text, model.info.vocabulary)
    utf8("text", text)
    first = model._bos_added
    return ([] if first is None else [first]) + model.tokenize(text, add_special=False)


class _Judged(NamedTuple):
    tokens: list[int]
    windows: list[_Window]
    ctx: int


def judge_windows(
    model: Model,
    tokens: Sequence[int],
    ctx: object,
    stride: object = None,
    max_windows: object = None,
) -> _Judged:
    """Cuts a text into windows.  ValueError: it is too short for one."""
    generates(model)
    size = integer("ctx", ctx, 3, max(3, model.info.context))
    step = None if stride is None else integer("stride", stride, 1, size - 1)
    needed = size if step is None else 2
    if len(tokens) < needed:
        raise ValueError(
            f"the text has {len(tokens)} tokens; {needed} are needed: give a longer one"
            + (", or a smaller ctx" if step is None else "")
        )
    windows = _windows(len(tokens), size, step)
    if max_windows is not None:
        windows = windows[: integer("max_windows", max_windows, 1, 2**31 - 1)]
    return _Judged(list(tokens[: windows[-1].end]), windows, size)


def generates(model: Model) -> None:
    if not isinstance(model, Model):
        raise TypeError(f"model must be a smallm.Model, not {type(model).__name__}")
    if model._info.decoder_start >= 0:
        raise UnsupportedModelError(
            f"{model.info.path} is an encoder-decoder: it has no perplexity of a text by itself"
        )


class _Part(NamedTuple):
    """Logits of some tokens that are scored."""

    begin: int  # the first of them
    rows: Floats  # [n_tokens][n_vocab]: what was expected in their places
    n_run: int  # tokens run so far in this window


def _parts(model: Model, tokens: Sequence[int], window: _Window) -> Iterator[_Part]:
    ids = list(tokens[window.begin : window.end - 1])
    if model._bos_added is not None:
        ids[0] = model._bos_added
    most = max(1, LOGIT_BYTES // (4 * model.info.vocabulary))
    for begin in range(window.first, window.end, most):
        end = min(begin + most, window.end)
        n = end - 1 - window.begin
        yield _Part(begin, model.logits(ids[:n], last=end - begin), n)


def log_sums(model: Model, rows: Floats) -> Doubles:
    """ln of the sum of exp of each row: [n_rows].  SmallmError: something is not finite."""
    sums = np.empty(len(rows))
    for i, row in enumerate(rows):  # one at a time, which stays in the caches
        highest, lowest = row.max(), row.min()
        if not (np.isfinite(highest) and np.isfinite(lowest)):
            raise SmallmError(f"{model.info.path}: its logits are not finite")
        x = row.astype(np.float64) - highest
        sums[i] = highest + np.log(np.exp(x, out=x).sum())
    return sums


def _mean(values: npt.ArrayLike) -> tuple[float, float]:
    """The mean and its standard error."""
    x = np.asarray(values, np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else 0.0


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def perplexity(
    model: Model,
    text: str | Sequence[int],
    *,
    ctx: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: Report | None = None,
) -> Perplexity:
    """What `text` (or its tokens) surprises `model` with.

    ctx: tokens in a window, 3 .. the model's context.
    stride: None: windows lie back to back, and the second half of each is scored; 1 .. ctx - 1:
        they begin so many tokens apart, and each token but the first is scored once.
    max_windows: stop after so many.
    progress: called with (tokens done, tokens in all).

    ValueError: the text is too short for one window; UnsupportedModelError: an encoder;
    SmallmError: logits that are not finite.
    """
    generates(model)
    judged = judge_windows(model, text_tokens(model, text), ctx, stride, max_windows)
    total = sum(w.end - w.begin - 1 for w in judged.windows)
    done, started = 0, time.perf_counter()
    losses: list[float] = []
    for window in judged.windows:
        for part in _parts(model, judged.tokens, window):
            losses += _losses(model, judged.tokens, part).tolist()
            if progress is not None:
                progress(done + part.n_run, total)
        done += window.end - window.begin - 1
    nll, error = _mean(losses)
    value = _exp(nll)
    return Perplexity(
        perplexity=value,
        perplexity_error=value * error,
        nll=nll,
        nll_error=error,
        tokens=len(losses),
        windows=len(judged.windows),
        ctx=judged.ctx,
        tokens_per_second=total / (time.perf_counter() - started),
    )


def _losses(model: Model, tokens: Sequence[int], part: _Part) -> Doubles:
    """-ln of what each token of the part was expected with: [n_tokens]."""
    n = len(part.rows)
    targets = tokens[part.begin : part.begin + n]
    return log_sums(model, part.rows) - part.rows[np.arange(n), targets]


def save_logits(
    model: Model,
    text: str | Sequence[int],
    path: str | os.PathLike[str],
    *,
    ctx: int = 512,
    max_windows: int | None = None,
    progress: Report | None = None,
) -> None:
    """Writes what `model` expects in the place of each scored token of `text` to the file `path`,
    for divergence(): about 2 bytes for each token and entry of the vocabulary, in the format of
    llama.cpp's llama-perplexity --kl-divergence-base.  It is written beside its name and renamed.

    Parameters and errors as for perplexity(); OSError.
    """
    generates(model)
    judged = judge_windows(model, text_tokens(model, text), ctx, None, max_windows)
    n_vocab = model.info.vocabulary
    with whole_file(path) as name, open(name, "wb") as file:
        write_head(file, judged.ctx, n_vocab, judged.tokens)
        for i, window in enumerate(judged.windows):
            for part in _parts(model, judged.tokens, window):
                for row, log_sum in zip(part.rows, log_sums(model, part.rows), strict=True):
                    write_row(file, row, float(log_sum))
            if progress is not None:
                progress((i + 1) * judged.ctx, len(judged.tokens))


def divergence(
    model: Model,
    reference: Model | str | os.PathLike[str],
    text: str | Sequence[int] | None = None,
    *,
    ctx: int | None = None,
    max_windows: int | None = None,
    progress: Report | None = None,
) -> Divergence:
    """How far the distributions of `model` are from those of `reference` on `text`.

    reference: another model with the same vocabulary, or the path of a file that save_logits() or
        llama.cpp wrote, whose tokens and windows are then used: of `text`, where it is given, they
        have to be the tokens, and `ctx` has to be the file's.
    ctx: tokens in a window, 3 .. the context of both models (512).
    max_windows: stop after so many.
    progress: called with (tokens done, tokens in all).

    ValueError: the text is too short for one window, or tokenized differently by the two;
    UnsupportedModelError: an encoder; SmallmError: a broken file, or logits that are not finite.
    """
    generates(model)
    if isinstance(reference, Model):
        generates(reference)
        if text is None:
            raise TypeError("text is missing: only saved logits hold their own")
        size = 512 if ctx is None else ctx
        tokens = text_tokens(model, text)
        _same_tokens(model, tokens, reference.info.path, text_tokens(reference, text))
        _same_vocabulary(model, reference.info.path, reference.info.vocabulary)
        judge_windows(reference, tokens, size)
        return _compare(
            model,
            judge_windows(model, tokens, size, None, max_windows),
            _of_model(reference),
            progress,
        )
    with SavedLogits(reference) as saved:
        _same_vocabulary(model, saved.path, saved.n_vocab)
        if ctx is not None and ctx != saved.ctx:
            raise ValueError(f"ctx is {ctx}; the windows of {saved.path} have {saved.ctx} tokens")
        tokens = saved.tokens.tolist()
        if text is not None:
            _same_tokens(model, text_tokens(model, text)[: len(tokens)], saved.path, tokens)
        return _compare(
            model,
            judge_windows(model, tokens, saved.ctx, None, max_windows),
            _of_file(saved),
            progress,
        )


def _same_vocabulary(model: Model, path: str, n_vocab: int) -> None:
    if model.info.vocabulary != n_vocab:
        raise ValueError(
            f"{model.info.path} has a vocabulary of {model.info.vocabulary} tokens, {path} one of "
            f"{n_vocab}: they cannot be compared"
        )


def _same_tokens(model: Model, own: Sequence[int], path: str, other: Sequence[int]) -> None:
    if list(own) == list(other):
        return
    i = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), None)
    what = f"they have {len(own)} and {len(other)} tokens"
    if i is not None:
        what = f"token {i} is {own[i]} in one and {other[i]} in the other"
    raise ValueError(
        f"{model.info.path} and {path} do not have the same tokens of this text: {what}"
    )


Lost = npt.NDArray[np.bool_] | None  # [n_vocab] those of which a file holds an upper bound only

# Gives the reference's ln p [n_vocab] of each token of a window's part, and what of it is lost.
_Expected = Callable[[Sequence[int], _Window, _Part], Iterator[tuple[Doubles, Lost]]]


def _of_model(reference: Model) -> _Expected:
    def rows(tokens: Sequence[int], window: _Window, part: _Part) -> Iterator[tuple[Doubles, Lost]]:
        window = window._replace(first=part.begin, end=part.begin + len(part.rows))
        for other in _parts(reference, tokens, window):
            for row, log_sum in zip(other.rows, log_sums(reference, other.rows), strict=True):
                yield row.astype(np.float64) - log_sum, None

    return rows


def _of_file(saved: SavedLogits) -> _Expected:
    def rows(tokens: Sequence[int], window: _Window, part: _Part) -> Iterator[tuple[Doubles, Lost]]:
        for _ in part.rows:
            yield saved.row()

    return rows


def _divergence(log_p: Doubles, log_q: Doubles, lost: Lost) -> float:
    """sum p (ln p - ln q).  What is lost is taken to have q's mass: a divergence between sums of 1
    changes with the square of what either is off by, so that rounding hardly shows in it."""
    if lost is not None:
        q_lost = float(np.exp(log_q[lost]).sum())
        log_p, log_q = log_p[~lost], log_q[~lost]
        log_p = log_p + (math.log1p(-q_lost) - math.log(np.exp(log_p).sum()))
    return float(np.exp(log_p) @ (log_p - log_q))


def _compare(
    model: Model, judged: _Judged, expected: _Expected, progress: Report | None
) -> Divergence:
    divergences: list[float] = []
    losses: list[float] = []
    reference_losses: list[float] = []
    same: list[bool] = []
    for i, window in enumerate(judged.windows):
        for part in _parts(model, judged.tokens, window):
            found = _losses(model, judged.tokens, part)
            losses += found.tolist()
            pairs = zip(part.rows, expected(judged.tokens, window, part), strict=True)
            for j, (row, (log_p, lost)) in enumerate(pairs):
                target = judged.tokens[part.begin + j]
                log_q = row.astype(np.float64) - (found[j] + row[target])
                divergences.append(_divergence(log_p, log_q, lost))
                reference_losses.append(-float(log_p[target]))
                same.append(bool(row.argmax() == log_p.argmax()))
        if progress is not None:
            progress((i + 1) * judged.ctx, len(judged.tokens))
    return _summary(divergences, losses, reference_losses, same, judged)


def _summary(
    divergences: list[float],
    losses: list[float],
    reference_losses: list[float],
    same: list[bool],
    judged: _Judged,
) -> Divergence:
    mean, mean_error = _mean(divergences)
    same_top, same_top_error = _mean(same)
    log_ratio, ratio_error = _mean(np.subtract(losses, reference_losses))
    ratio = _exp(log_ratio)
    return Divergence(
        mean=mean,
        mean_error=mean_error,
        median=float(np.median(divergences)),
        quantile_999=float(np.quantile(divergences, 0.999)),
        maximum=max(divergences),
        same_top=same_top,
        same_top_error=same_top_error,
        perplexity=_exp(_mean(losses)[0]),
        reference_perplexity=_exp(_mean(reference_losses)[0]),
        ratio=ratio,
        ratio_error=ratio * ratio_error,
        tokens=len(divergences),
        windows=len(judged.windows),
        ctx=judged.ctx,
    )
