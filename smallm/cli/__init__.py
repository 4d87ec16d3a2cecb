"""The `smallm` command.

Text that was asked for goes to stdout, everything else to stderr.  Exit codes: 0; 1: it failed,
with one clear line; 2: wrong usage; 130: Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from .. import __version__
from .._catalog import CATALOGUE, DEFAULT
from .._errors import SmallmError

F = TypeVar("F", bound=Callable[..., Any])

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
LORA = "lora"
TEXT_FILE = click.Path(exists=True, dir_okay=False, allow_dash=True)
ANSWER_TOKENS = 1024  # a person can stop an answer; a program says -n


def _complete_model(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    from .._catalog import records

    names = {*CATALOGUE, *(record.name for record in records())}
    return [name for name in sorted(names) if name.startswith(incomplete)]


def _complete_file(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[click.shell_completion.CompletionItem]:
    from click.shell_completion import CompletionItem

    names = [CompletionItem(name) for name in _complete_model(context, parameter, incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


def model_options(command: F) -> F:
    """Which model, and how it is loaded."""
    for option in (
        click.option("--offline", is_flag=True, help="Never use the network."),
        click.option(
            "--lora-scaled", metavar="PATH:SCALE", help="As --lora, so many times what it adds."
        ),
        click.option(
            "--lora", type=click.Path(), help="A LoRA adapter: a GGUF file or a folder of peft."
        ),
        click.option(
            "-t", "--threads", type=click.IntRange(1, 256), help="Default: the physical cores."
        ),
        click.option(
            "-c",
            "--ctx-size",
            type=click.IntRange(0),
            help="Tokens a prompt and its answer may have together; 0: the trained length.",
        ),
        click.option(
            "-m",
            "--model",
            default=DEFAULT,
            show_default=True,
            shell_complete=_complete_file,
            help="A path, a catalogue name, hf:user/repo:QUANT or a URL.",
        ),
    ):
        command = option(command)
    return command


def sampling_options(command: F) -> F:
    """How the answer is drawn; the defaults are the model's own."""
    for option in (
        click.option(
            "-r",
            "--reverse-prompt",
            "--stop",
            "stop",
            multiple=True,
            help="Text that ends the answer; may be repeated.",
        ),
        click.option("--repeat-penalty", type=float, help="Above 1: repeats less."),
        click.option("-s", "--seed", type=int, help="-1: a fresh one (the default)."),
        click.option("--min-p", type=float, help="Drop tokens below this times the best."),
        click.option("--top-p", type=float, help="Keep the fewest tokens with this mass."),
        click.option("--top-k", type=int, help="Keep the k most probable tokens; 0: all."),
        click.option("--temp", "temperature", type=float, help="0: always the most probable."),
        click.option(
            "-n",
            "--predict",
            "--max-tokens",
            "max_tokens",
            type=int,
            default=ANSWER_TOKENS,
            show_default=True,
            help="Tokens to generate at most; -1: until the context is full.",
        ),
    ):
        command = option(command)
    return command


def sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword parameters of smallm.Model for the options given."""
    params = {name: value for name, value in options.items() if value is not None}
    if params.get("max_tokens") == -1:
        params["max_tokens"] = 2**31 - 1
    if params.get("seed") == -1:
        del params["seed"]
    return params


def load(
    model: str,
    ctx_size: int | None,
    threads: int | None,
    offline: bool,
    adapter: str | None = None,
) -> Any:
    """adapter: a path; requests name it LORA."""
    from .. import load as load_model

    adapters = None if adapter is None else {LORA: adapter}
    return load_model(
        model, ctx=ctx_size or None, threads=threads, offline=offline, adapters=adapters
    )


def adaptation(lora: str | None, lora_scaled: str | None) -> tuple[str | None, dict[str, Any]]:
    """The adapter's path, or None, and the parameters of requests that use it."""
    if lora is None and lora_scaled is None:
        return None, {}
    if lora_scaled is None:
        return lora, {"adapter": LORA}
    if lora is not None:
        raise click.UsageError("one adapter at a time: give either --lora or --lora-scaled")
    path, _, scale = lora_scaled.rpartition(":")
    try:
        return path, {"adapter": LORA, "adapter_scale": float(scale)}
    except ValueError:
        raise click.UsageError(f"--lora-scaled is PATH:SCALE, not {lora_scaled!r}") from None


def note(message: str) -> None:
    """One line on stderr."""
    click.echo(message, err=True)


def show_text(text: str) -> None:
    """Writes a piece of an answer at once; a terminal gets no control characters from a model."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: object) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
            return result
        except BrokenPipeError:
            # The reader went away (`| head -1`): nobody is left to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise click.exceptions.Exit(0) from None


@click.group(cls=_Group, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="smallm")
def cli() -> None:
    """Small language models on the machine you have."""


@cli.command()
@click.argument("words", metavar="[PROMPT]", nargs=-1)
@click.option("-p", "--prompt", help="The prompt; without one it is read from stdin.")
@click.option("--system", help="A system message.")
@click.option("--raw", is_flag=True, help="Complete the text as it is, without a chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("-v", "--verbose", is_flag=True, help="Tell seed and speed on stderr.")
@sampling_options
@model_options
def run(
    words: tuple[str, ...],
    prompt: str | None,
    system: str | None,
    raw: bool,
    as_json: bool,
    verbose: bool,
    model: str,
    ctx_size: int | None,
    threads: int | None,
    offline: bool,
    lora: str | None,
    lora_scaled: str | None,
    **options: Any,
) -> None:
    """Answer one prompt: the words given, or -p, or stdin.

    \b
    smallm run "Why is the sky blue?"
    smallm run --raw -n 20 --temp 0 "The capital of France is"
    smallm run < question.txt
    """
    if words and prompt is not None:
        raise click.UsageError("give the prompt either as words or with -p, not both")
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template, which --raw leaves out")
    if words and words[0].lower().endswith(".gguf") and os.path.isfile(words[0]):
        raise click.UsageError(
            f'{words[0]} is a file, which would be the prompt: smallm run -m {words[0]} "..."'
        )
    if words:
        prompt = " ".join(words)
    if prompt is None or prompt == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError('no prompt: smallm run "Why is the sky blue?"')
        prompt = _read_stdin()
    if not prompt:
        raise click.UsageError("the prompt is empty")
    messages: Any = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})

    adapter, adapted = adaptation(lora, lora_scaled)
    params = sampling(options) | adapted
    with load(model, ctx_size, threads, offline, adapter) as loaded:
        with loaded.stream(prompt if raw else messages, **params) as stream:
            for chunk in stream:
                if not as_json:
                    show_text(chunk.text)
        answer = stream.completion
    if as_json:
        print_json(
            {
                "model": model,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "seed": answer.seed,
                "usage": answer.usage._asdict(),
                "timings": answer.timings._asdict(),
            }
        )
        return
    if not answer.text.endswith("\n"):
        click.echo()
    if answer.finish_reason == "length" and sys.stderr.isatty():
        note(f"(cut after {answer.usage.completion_tokens} tokens: -n or -c allow more)")
    if verbose:
        speed = answer.timings
        note(
            f"seed {answer.seed}; prompt {answer.usage.prompt_tokens} tokens at "
            f"{speed.prefill_tps:.1f}/s; answer {answer.usage.completion_tokens} tokens at "
            f"{speed.decode_tps:.1f}/s; load {speed.load_s:.2f} s, first token "
            f"{speed.ttft_s:.3f} s, peak memory {speed.peak_rss / 1e6:.0f} MB"
        )


def _read_stdin() -> str:
    return _decoded("stdin", sys.stdin.buffer.read()).removesuffix("\n")


def _decoded(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} is wrong") from None


@cli.command()
@click.option("--system", help="A system message.")
@sampling_options
@model_options
def chat(
    system: str | None,
    model: str,
    ctx_size: int | None,
    threads: int | None,
    offline: bool,
    lora: str | None,
    lora_scaled: str | None,
    **options: Any,
) -> None:
    """Talk with a model.  /reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer."""
    from ._chat import talk

    adapter, adapted = adaptation(lora, lora_scaled)
    with load(model, ctx_size, threads, offline, adapter) as loaded:
        talk(loaded, system, sampling(options) | adapted)


@cli.command()
@click.argument("name", default=DEFAULT, shell_complete=_complete_model)
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def pull(name: str, as_json: bool) -> None:
    """Fetch a model: a catalogue name, hf:user/repo:QUANT or an https URL.

    A URL may end in #sha256=<64 hex digits>, which is then checked.
    """
    from .._catalog import find, is_offline
    from .._catalog import pull as fetch

    if name in CATALOGUE and not as_json and not is_offline() and find(name) is None:
        entry = CATALOGUE[name]
        note(f"{entry.title}, licence {entry.license}, {entry.size / 1e6:.0f} MB")
    record = fetch(name)
    if as_json:
        print_json({**record._asdict(), "path": record.path, "size": record.size})
        return
    if record.license and name not in CATALOGUE:
        note(f"licence {record.license}")
    click.echo(record.path)


@cli.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_models(as_json: bool) -> None:
    """List the models in the cache, and those of the catalogue that are not there yet."""
    from .._catalog import cache_dir, records

    found = records()
    if as_json:
        print_json([{**r._asdict(), "path": r.path, "size": r.size} for r in found])
        return
    rows = [(r.name, f"{r.size / 1e6:.0f} MB", r.license or "-", r.path) for r in found]
    present = {r.name for r in found}
    rows += [
        (name, f"{e.size / 1e6:.0f} MB", e.license, f"(smallm pull {name})")
        for name, e in CATALOGUE.items()
        if name not in present
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for name, size, license, path in rows:
        click.echo(f"{name:{widths[0]}}  {size:>{widths[1]}}  {license:{widths[2]}}  {path}")
    note(f"cache: {cache_dir()}")


@cli.command("rm")
@click.argument("names", nargs=-1, required=True, shell_complete=_complete_model)
def remove(names: tuple[str, ...]) -> None:
    """Delete models from the cache."""
    from .._catalog import remove as delete

    for name in names:
        record = delete(name)
        kept = [f["path"] for f in record.files if os.path.exists(f["path"])]
        note(f"removed {record.name}")
        for path in kept:
            note(f"left in the cache of the Hugging Face hub, which other programs share: {path}")


@cli.command()
@click.argument("model", default=DEFAULT, shell_complete=_complete_file)
@click.option("--metadata", is_flag=True, help="Also the file's own metadata.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(model: str, metadata: bool, offline: bool, as_json: bool) -> None:
    """Show what a model is: architecture, formats, sizes, licence."""
    with load(model, None, None, offline) as loaded:
        facts: dict[str, Any] = loaded.info._asdict()
        entries = loaded.metadata
    for name in ("forward_passes", "forward_tokens", "running", "cache_bytes"):
        del facts[name]  # of a model that runs
    if as_json:
        print_json({**facts, "metadata": entries} if metadata else facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        click.echo(f"{name.replace('_', ' '):{width}}  {shown}")
    if metadata:
        click.echo()
        for name, value in entries.items():
            text = value.replace("\n", "\\n")
            click.echo(f"{name} = {text if len(text) <= 200 else text[:197] + '...'}")


@cli.command()
@click.option(
    "-m", "--model", shell_complete=_complete_file, help="Test with this model; never fetched."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(model: str | None, as_json: bool) -> None:
    """Look at this machine and test smallm on it for two seconds."""
    from ._doctor import examine

    report, healthy = examine(model)
    if as_json:
        print_json(report)
    else:
        width = max(map(len, report))
        for name, value in report.items():
            click.echo(f"{name.replace('_', ' '):{width}}  {value}")
    if not healthy:
        raise SmallmError("the self-test failed: see above")


@cli.command()
@click.argument("source", type=click.Path())
@click.argument("out", type=click.Path(dir_okay=False))
@click.option(
    "--type",
    "type_name",
    default="f16",
    show_default=True,
    help="Format of the matrices, as of smallm quantize: f16, q8_0, q4_k_m, ...",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(source: str, out: str, type_name: str, as_json: bool) -> None:
    """Convert a Hugging Face checkpoint, a folder or hf:user/repo, into the GGUF file OUT.

    \b
    smallm convert SmolLM2-135M-Instruct smollm2.gguf --type q8_0
    """
    from ..convert import convert as convert_folder

    path = convert_folder(source, out, type=type_name)
    if as_json:
        print_json({"path": str(path), "size": path.stat().st_size, "type": type_name.lower()})
        return
    click.echo(path)


@cli.command()
@click.argument("source", metavar="IN", type=click.Path())
@click.argument("out", type=click.Path(dir_okay=False))
@click.argument("type_name", metavar="TYPE")
@click.option(
    "--imatrix",
    type=click.Path(),
    help="Where errors matter: a file of smallm imatrix, or of llama.cpp's llama-imatrix.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="PATTERN=TYPE",
    help="Another format for matrices of such a name; may be repeated.",
)
@click.option("--requantize", is_flag=True, help="Also what is quantized already: loses twice.")
@click.option("-t", "--threads", type=click.IntRange(1, 256), help="Default: the physical cores.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def quantize(
    source: str,
    out: str,
    type_name: str,
    imatrix: str | None,
    keep: tuple[str, ...],
    requantize: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Write the GGUF file IN as OUT with its matrices in the format TYPE.

    TYPE is one of f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1,
    q4_0, iq4_nl, iq4_xs, q3_k_l, q3_k_m, q3_k_s, q2_k, tq2_0, tq1_0, mxfp4_moe.

    \b
    smallm quantize smollm2-f16.gguf smollm2-q4.gguf q4_k_m
    smallm quantize in.gguf out.gguf q4_0 --keep "output.weight=q8_0" --keep "*.attn_v.*=q8_0"
    """
    from ..quantize import quantize as quantize_file

    made = quantize_file(
        source, out, type_name, imatrix=imatrix, keep=keep, requantize=requantize, threads=threads
    )
    if as_json:
        print_json({**made._asdict(), "path": str(made.path), "type": type_name.lower()})
        return
    counts = ", ".join(f"{n} {name}" for name, n in made.tensors.items())
    note(f"{made.size / 1e6:.1f} MB, {made.bits_per_weight:.2f} bits per weight; tensors: {counts}")
    for name, n in made.narrow.items():
        note(f"{n} tensors have {name}, whose blocks do not divide their rows")
    click.echo(made.path)


@cli.command()
@click.argument("base", shell_complete=_complete_file)
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path(dir_okay=False))
@click.option("--scale", type=float, default=1.0, show_default=True, help="How much of it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def merge(base: str, adapter: str, out: str, scale: float, as_json: bool) -> None:
    """Add a LoRA ADAPTER, GGUF or a folder of peft, to the model BASE: the GGUF file OUT.

    Matrices keep their formats; of those that change, what cannot be written becomes Q8_0.

    \b
    smallm merge base.gguf support-lora support.gguf
    """
    from ..convert import merge as merge_files

    path = merge_files(base, adapter, out, scale=scale)
    if as_json:
        print_json({"path": str(path), "size": path.stat().st_size, "scale": scale})
        return
    click.echo(path)


@cli.command()
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option("--raw", is_flag=True, help="Leave the vectors' lengths as they are.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of lists.")
@model_options
def embed(
    texts: tuple[str, ...],
    raw: bool,
    as_json: bool,
    model: str,
    ctx_size: int | None,
    threads: int | None,
    offline: bool,
    lora: str | None,
    lora_scaled: str | None,
) -> None:
    """Turn texts into vectors: each TEXT, or each line of stdin.  One vector a line.

    \b
    smallm embed -m minilm.gguf "a text" "another"
    smallm embed -m minilm.gguf --json < lines.txt
    """
    if not texts:
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError('no texts: smallm embed "a text" "another"')
        texts = tuple(_read_stdin().splitlines())
    adapter, options = adaptation(lora, lora_scaled)
    with load(model, ctx_size, threads, offline, adapter) as loaded:
        vectors = loaded.embed(texts, normalize=not raw, **options).tolist()
    if as_json:
        click.echo(json.dumps(vectors))
        return
    for vector in vectors:
        click.echo(" ".join(f"{value:.9g}" for value in vector))


def evaluation_options(command: F) -> F:
    """How a text is run through a model to judge the model."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--offline", is_flag=True, help="Never use the network."),
        click.option(
            "-t", "--threads", type=click.IntRange(1, 256), help="Default: the physical cores."
        ),
        click.option(
            "--chunks", type=click.IntRange(1), help="Windows to run at most; default: all."
        ),
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("model", shell_complete=_complete_file)
@click.argument("text", type=TEXT_FILE, default="-")
@click.option(
    "-o", "--output", "out", type=click.Path(dir_okay=False), required=True, help="File to write."
)
@click.option(
    "-c",
    "--ctx-size",
    type=click.IntRange(3),
    default=512,
    show_default=True,
    help="Tokens in a window.",
)
@evaluation_options
def imatrix(
    model: str,
    text: str,
    out: str,
    ctx_size: int,
    chunks: int | None,
    threads: int | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Measure on the file TEXT, or on stdin, where errors in MODEL's weights matter.

    The file is for smallm quantize --imatrix, and for llama.cpp's llama-quantize.

    \b
    smallm imatrix smollm2-f16.gguf book.txt -o smollm2.imatrix
    smallm quantize smollm2-f16.gguf smollm2-q3.gguf q3_k_m --imatrix smollm2.imatrix
    """
    from ..quantize import save_importance

    content = _read_text(text)
    with load(model, ctx_size, threads, offline) as loaded, _tokens_bar("importance") as report:
        found = save_importance(
            loaded,
            content,
            out,
            ctx=ctx_size,
            max_windows=chunks,
            dataset="stdin" if text == "-" else os.path.basename(text),
            progress=report,
        )
    if as_json:
        print_json({**found._asdict(), "path": str(found.path)})
        return
    note(
        f"{found.matrices} matrices; {found.tokens} tokens in {found.windows} windows of "
        f"{found.ctx}"
    )
    for name, n in found.unseen.items():
        note(f"{name}: no token chose {n} of its experts; a longer text may")
    click.echo(found.path)


@cli.command()
@click.argument("model", shell_complete=_complete_file)
@click.argument("text", type=TEXT_FILE, default="-")
@click.option(
    "-c",
    "--ctx-size",
    type=click.IntRange(3),
    default=512,
    show_default=True,
    help="Tokens in a window.",
)
@click.option(
    "--stride",
    type=click.IntRange(1),
    help="Windows begin so many tokens apart, and every token is scored; by default they lie back "
    "to back, and the second half of each is.",
)
@evaluation_options
def ppl(
    model: str,
    text: str,
    ctx_size: int,
    stride: int | None,
    chunks: int | None,
    threads: int | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Perplexity of MODEL on the file TEXT, or on stdin.

    Its windows are those of llama.cpp's llama-perplexity.

    \b
    smallm ppl smollm2-135m book.txt
    """
    from ..eval import perplexity

    content = _read_text(text)
    with load(model, ctx_size, threads, offline) as loaded, _tokens_bar("perplexity") as report:
        found = perplexity(
            loaded, content, ctx=ctx_size, stride=stride, max_windows=chunks, progress=report
        )
    if as_json:
        print_json(found._asdict())
        return
    click.echo(f"perplexity  {found.perplexity:.4f} +/- {found.perplexity_error:.4f}")
    click.echo(f"nats/token  {found.nll:.5f} +/- {found.nll_error:.5f}")
    click.echo(f"scored      {found.tokens} tokens in {found.windows} windows of {found.ctx}")
    click.echo(f"speed       {found.tokens_per_second:.1f} tokens/s")


@cli.command()
@click.argument("model", shell_complete=_complete_file)
@click.argument("text", type=TEXT_FILE, required=False)
@click.option("--reference", shell_complete=_complete_file, help="The model to compare with.")
@click.option(
    "--logits",
    type=click.Path(dir_okay=False),
    help="In its place: what --save, or llama-perplexity --kl-divergence-base, has written.",
)
@click.option(
    "--save", type=click.Path(dir_okay=False), help="Write what MODEL expects, for --logits."
)
@click.option(
    "-c",
    "--ctx-size",
    type=click.IntRange(3),
    help="Tokens in a window; default: 512, or those of --logits.",
)
@evaluation_options
def kld(
    model: str,
    text: str | None,
    reference: str | None,
    logits: str | None,
    save: str | None,
    ctx_size: int | None,
    chunks: int | None,
    threads: int | None,
    offline: bool,
    as_json: bool,
) -> None:
    """How far MODEL is from a reference on TEXT, a file or - for stdin, as KL divergence.

    Saved logits hold their text: TEXT may be left out then.

    \b
    smallm kld model-q4_k_m.gguf book.txt --reference model-f16.gguf
    smallm kld model-f16.gguf book.txt --save f16.kld
    smallm kld model-q4_k_m.gguf --logits f16.kld
    """
    from ..eval import divergence, save_logits

    if sum(option is not None for option in (reference, logits, save)) != 1:
        raise click.UsageError("give one of --reference, --logits and --save")
    if text is None and logits is None:
        raise click.UsageError("the text is missing: a file, or - for stdin")
    content = None if text is None else _read_text(text)
    if save is not None:
        assert content is not None
        with load(model, ctx_size or 512, threads, offline) as loaded, _tokens_bar("saving") as bar:
            save_logits(
                loaded, content, save, ctx=ctx_size or 512, max_windows=chunks, progress=bar
            )
        size = os.stat(save).st_size
        if as_json:
            print_json({"path": save, "size": size})
        else:
            note(f"{size / 1e6:.0f} MB")
            click.echo(save)
        return
    with contextlib.ExitStack() as stack:
        loaded = stack.enter_context(load(model, ctx_size, threads, offline))
        other: Any = logits
        if reference is not None:
            other = stack.enter_context(load(reference, ctx_size, threads, offline))
        bar = stack.enter_context(_tokens_bar("divergence"))
        found = divergence(loaded, other, content, ctx=ctx_size, max_windows=chunks, progress=bar)
    if as_json:
        print_json(found._asdict())
        return
    click.echo(f"KL divergence  mean {found.mean:.6f} +/- {found.mean_error:.6f} nats/token")
    click.echo(
        f"               median {found.median:.6f}, 99.9 % {found.quantile_999:.6f}, "
        f"maximum {found.maximum:.6f}"
    )
    click.echo(f"same top token {100 * found.same_top:.3f} +/- {100 * found.same_top_error:.3f} %")
    click.echo(
        f"perplexity     {found.perplexity:.4f}, of the reference "
        f"{found.reference_perplexity:.4f}; ratio {found.ratio:.5f} +/- {found.ratio_error:.5f}"
    )
    click.echo(f"compared       {found.tokens} tokens in {found.windows} windows of {found.ctx}")


def _read_text(path: str) -> str:
    if path != "-":
        with open(path, "rb") as file:
            data = file.read()
    elif sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError("no text: name a file, or pipe one in")
    else:
        data = sys.stdin.buffer.read()
    return _decoded("stdin" if path == "-" else path, data)


def _tokens_bar(
    title: str,
) -> contextlib.AbstractContextManager[Callable[[int, int], object] | None]:
    """A bar where stderr is a terminal."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    from .._bar import bar

    return bar(title, tokens=True)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes smallm's words in a shell.

    \b
    eval "$(smallm completion bash)"     # in ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(cli, {}, "smallm", "_SMALLM_COMPLETE").source())


def main() -> None:
    """Runs the command line and exits."""
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    sys.exit(_run())


def _run() -> int:
    try:
        result = cli.main(prog_name="smallm", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        note("")
        return 130
    except (SmallmError, ValueError, OSError, MemoryError) as error:
        lines = str(error).strip().splitlines()
        note(f"smallm: {' '.join(lines) or type(error).__name__}")
        return 1
