"""Chat templates: Jinja with limits.

A template comes from a model file, so it is foreign code.  The sandbox keeps it from Python; this
file keeps it from using up time and memory.  Invariants:
  - every loop step and every call spends from a budget and looks at the clock;
  - every operation that makes a value (+ * % **, ~, literals, filters, calls) checks its size,
    before the work where the result can be larger than its operands;
  - only filters, methods and globals whose cost these checks bound exist;
  - nothing of the template is evaluated while it is compiled.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from jinja2 import Template, Undefined, nodes, pass_eval_context
from jinja2 import TemplateError as JinjaError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_round
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ._errors import TemplateError

MAX_SOURCE = 1 << 20  # characters of a template
MAX_VALUE = 1 << 23  # characters and elements of one value, nested ones included
MAX_OUTPUT = 1 << 23  # characters of the rendered text
MAX_STEPS = 400_000  # loop steps and calls, plus one per 16 characters of input
MAX_SECONDS = 5.0
MAX_BITS = 4096  # of an integer
MAX_WIDTH = 1000  # an indentation, a precision

_FILTERS = """
    abs capitalize count d default dictsort e escape first float forceescape int items last length
    list lower map max min reject rejectattr reverse safe select selectattr sort title trim
    unique upper
"""
_STR_METHODS = """
    capitalize count endswith find index isalnum isalpha isdecimal isdigit isidentifier islower
    isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace
    rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR_METHODS.split()),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    range: frozenset(),
}
_ATOMS = (int, float, bool, type(None), range)


class _Meter:
    """What one rendering may still spend."""

    def __init__(self, n_input: int) -> None:
        self.steps = MAX_STEPS + n_input // 16
        self.room = MAX_OUTPUT
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self, n: int = 1) -> None:
        self.steps -= n
        if self.steps < 0:
            raise TemplateError("the chat template takes too many steps")
        if time.monotonic() > self.deadline:
            raise TemplateError(f"the chat template takes more than {MAX_SECONDS:g} seconds")

    def emit(self, n: int) -> None:
        self.room -= n
        if self.room < 0:
            raise TemplateError(f"the chat template writes more than {MAX_OUTPUT} characters")

    def size(self, n: int) -> None:
        if n > MAX_VALUE:
            raise TemplateError(
                f"the chat template makes a value of more than {MAX_VALUE} elements"
            )

    def weigh(self, value: object) -> int:
        """Characters and elements of `value`, judged; a cost of one step per element."""
        if isinstance(value, str):
            self.size(len(value))
            return len(value)
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise TemplateError(f"the chat template makes an integer of more than {MAX_BITS} bits")
        total, rest = 0, [value]
        while rest:
            item = rest.pop()
            total += 1
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, (list, tuple)):
                self.step(len(item))
                rest.extend(item)
            elif isinstance(item, dict):
                self.step(2 * len(item))
                rest.extend(item)
                rest.extend(item.values())
            self.size(total + len(rest))
        return total

    def text(self, value: object) -> str:
        """`value` as Jinja prints it."""
        if isinstance(value, str):
            return value
        if isinstance(value, (list, tuple, dict)):
            self.size(4 * self.weigh(value))  # quotes and separators, escapes
        elif isinstance(value, Undefined) and value._undefined_exception is SecurityError:
            value._fail_with_undefined_error()  # a plain undefined value prints as ""
        elif not isinstance(value, (*_ATOMS, Undefined)):
            raise TemplateError(f"the chat template prints a {type(value).__name__}")
        return str(value)

    def arguments(self, values: Iterable[object]) -> None:
        """Pays for reading `values`."""
        self.step()
        for value in values:
            if isinstance(value, (str, list, tuple, dict)):
                self.step(self.weigh(value) // 64)

    def width(self, value: int | None) -> int:
        if value is None or abs(value) <= MAX_WIDTH:
            return value or 0
        raise TemplateError(f"the chat template asks for {value} where {MAX_WIDTH} is the limit")

    def each(self, values: Iterable[Any], cost: int = 0) -> Iterator[Any]:
        """Spends a step per item, and `cost` characters of output."""
        for value in values:
            self.step()
            self.emit(cost)
            yield value

    def result(self, value: Any) -> Any:
        if isinstance(value, (str, int, list, tuple, dict)):
            self.weigh(value)
        elif isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self.each(value)
        return value


def _replaced(text: str, old: str, new: str, count: int | None = None) -> int:
    n = text.count(old)
    if count is not None and 0 <= count < n:
        n = count
    return len(text) + n * (len(new) - len(old))


class _Guard(NodeTransformer):
    """Puts a filter of ours where loops run and values are made."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        cost = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.iter = self._filter(node.iter, "_each", [nodes.Const(cost)])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.Tuple(node.nodes, "load", lineno=node.lineno)
        return self._filter(parts, "_concat", [])

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self._filter(node, "_made", [])

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._filter(node, "_made", [])

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._filter(node, "_made", []) if node.ctx == "load" else node

    @staticmethod
    def _filter(node: nodes.Node, name: str, args: list[nodes.Expr]) -> nodes.Filter:
        return nodes.Filter(node, name, args, [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "%", "**"})
    meter: _Meter

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=self._finalizer(),
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self.filters = {name: self._bounded(self.filters[name]) for name in _FILTERS.split()}
        self.filters["indent"] = self._indent
        self.filters["join"] = self._join
        self.filters["replace"] = self._replace
        self.filters["round"] = self._round
        self.filters["string"] = lambda value: self.meter.text(value)
        self.filters["tojson"] = self._to_json
        self.filters["_each"] = lambda values, cost: self.meter.each(values, cost)
        self.filters["_made"] = lambda value: self.meter.result(value)
        self.filters["_concat"] = self._concat
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals["raise_exception"] = self._raise
        self.globals["strftime_now"] = self._now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Guard().visit(super()._parse(source, name, filename))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return bool(super().is_safe_attribute(obj, attr, value))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        meter = self.meter
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            meter.arguments((owner, *args, *kwargs.values()))
            if obj.__name__ == "replace" and len(args) >= 2:
                meter.size(_replaced(owner, *args[:3]))
            if obj.__name__ == "join" and args:
                args = (self._joinable(owner, args[0]),)
        elif isinstance(obj, Macro):
            meter.emit(self.n_data)
        meter.step()
        return meter.result(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        meter.step()
        sizes = [len(v) if isinstance(v, (str, list, tuple)) else None for v in (left, right)]
        if operator == "*":
            for size, times in ((sizes[0], right), (sizes[1], left)):
                if size is not None and isinstance(times, int):
                    meter.size(size * max(times, 0))
        elif operator == "**" and not (
            abs(right) <= MAX_BITS
            and (not isinstance(left, int) or left.bit_length() * abs(right) <= MAX_BITS)
        ):
            raise TemplateError("the chat template computes too large a power")
        elif operator == "%" and isinstance(left, str):
            if re.search(r"\*|\d{4}", left):
                raise TemplateError("the chat template formats with too large a width")
            meter.size(len(left) * MAX_WIDTH + left.count("%") * 4 * meter.weigh(right))
        return meter.result(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        pattern: str = value.__self__

        def run(*args: Any, **kwargs: Any) -> str:
            if re.search(r"\d{4}|\{[^}]*\{", pattern):
                raise TemplateError("the chat template formats with too large a width")
            weight = self.meter.weigh([*args, *kwargs.values()])
            self.meter.size(len(pattern) * MAX_WIDTH + pattern.count("{") * 4 * weight)
            return inner(*args, **kwargs)

        return run

    n_data = 0  # characters of plain text in the template

    def _finalizer(self) -> Callable[..., object]:
        # Taking the evaluation context keeps Jinja from calling it while it compiles.
        @pass_eval_context
        def finalize(context: nodes.EvalContext, value: object) -> str:
            text = self.meter.text(value)
            self.meter.emit(len(text))
            return text

        return finalize

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result is no larger than its operands."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)  # keeps Jinja's mark of what it passes first
        def run(*args: Any, **kwargs: Any) -> Any:
            self.meter.arguments([*args[first:], *kwargs.values()])
            return self.meter.result(function(*args, **kwargs))

        return run

    def _replace(self, value: object, old: str, new: str, count: int | None = None) -> str:
        text, old, new = map(self.meter.text, (value, old, new))
        self.meter.arguments((text, old, new))
        self.meter.size(_replaced(text, old, new, count))
        return text.replace(old, new, -1 if count is None else count)

    def _indent(
        self, value: object, width: int = 4, first: bool = False, blank: bool = False
    ) -> str:
        text = self.meter.text(value)
        self.meter.arguments((text,))
        lines = text.split("\n")
        self.meter.size(len(text) + len(lines) * width)
        margin = " " * self.meter.width(width)
        return "\n".join(
            margin + line if (i or first) and (line or blank) else line
            for i, line in enumerate(lines)
        )

    def _round(self, value: float, precision: int = 0, method: str = "common") -> float:
        return do_round(value, self.meter.width(precision), method)  # type: ignore[arg-type]

    def _join(self, values: Iterable[object], d: object = "", attribute: Any = None) -> str:
        separator = self.meter.text(d)
        if attribute is not None:
            values = (self.getitem(value, attribute) for value in values)
        return separator.join(self._joinable(separator, values))

    def _joinable(self, separator: str, values: Iterable[object]) -> list[str]:
        total, texts = 0, []
        for value in self.meter.each(values):
            texts.append(self.meter.text(value))
            total += len(texts[-1]) + len(separator)
            self.meter.size(total)
        return texts

    def _concat(self, values: tuple[object, ...]) -> str:
        return "".join(self._joinable("", values))

    def _to_json(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        self.meter.arguments((value,))
        self.meter.size(6 * self.meter.weigh(value) * (1 + self.meter.width(indent)))
        return str(
            self.meter.result(
                json.dumps(
                    value,
                    ensure_ascii=ensure_ascii,
                    indent=indent,
                    separators=separators,
                    sort_keys=sort_keys,
                )
            )
        )

    @staticmethod
    def _raise(message: object) -> NoReturn:
        raise TemplateError(f"the chat template refuses these messages: {str(message)[:500]}")

    @staticmethod
    def _now(format: object) -> str:
        if not isinstance(format, str) or len(format) > 200 or re.search(r"\d{2}", format):
            raise TemplateError("the chat template asks for the time in an unusable format")
        return datetime.now().strftime(format)


class ChatTemplate:
    """A compiled template; any thread may render it."""

    def __init__(self, source: str) -> None:
        """TemplateError: the source is too long or is not a template."""
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                f"the chat template has {len(source)} characters; {MAX_SOURCE} are allowed"
            )
        self.source = source
        self._environment = _Environment()
        self._lock = threading.Lock()
        try:
            tree = self._environment.parse(source)
            self._environment.n_data = sum(len(n.data) for n in tree.find_all(nodes.TemplateData))
            self._template: Template = self._environment.from_string(source)
        except JinjaError as error:
            line = getattr(error, "lineno", None)
            where = f" in line {line}" if line else ""
            raise TemplateError(f"the chat template is not valid{where}: {error}") from None
        except (RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise TemplateError(f"the chat template cannot be compiled: {error}") from None

    def render(self, n_input: int, variables: Mapping[str, object]) -> str:
        """The text; `n_input` is the number of characters in `variables`.

        TemplateError: the template fails, or exceeds a limit of output, steps or time.
        """
        with self._lock:
            self._environment.meter = _Meter(n_input)
            try:
                pieces, total = [], 0
                for piece in self._template.generate(**variables):
                    total += len(piece)
                    if total > MAX_OUTPUT:
                        raise TemplateError(
                            f"the chat template writes more than {MAX_OUTPUT} characters"
                        )
                    pieces.append(piece)
                return "".join(pieces)
            except TemplateError:
                raise
            except SecurityError as error:
                raise TemplateError(f"the chat template is not allowed to: {error}") from None
            except RecursionError:
                raise TemplateError("the chat template recurses too deeply") from None
            except Exception as error:
                raise TemplateError(
                    f"the chat template fails: {type(error).__name__}: {error}"
                ) from error
