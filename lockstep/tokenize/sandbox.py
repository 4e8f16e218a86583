"""Running a chat template that came with a downloaded model: no attribute tricks, no endless loop, no huge output.

jinja2's sandbox refuses private attributes and changes of its inputs. On top of it, every loop pass and macro call is
counted and looks at the clock, operators and methods that can make something huge out of something small are
bounded, and only the filters that chat templates use are there.
"""

from __future__ import annotations

import json
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lockstep.core.errors import InputError
from lockstep.core.extras import require

MAX_CHARACTERS = 1 << 24
MAX_PASSES = 1 << 20
MAX_SECONDS = 5.0
_MAX_BITS = 4096
_MAX_ITEMS = 1 << 20
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int",
    "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round",
    "safe", "select", "selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper",
)  # fmt: skip
_PADDING_METHODS = ("center", "expandtabs", "ljust", "rjust", "zfill", "translate")
_WIDTH = re.compile(r"\*|\d{4,}|\{[^{}]*\{")  # a width given as an argument, or a very large one
_TICK = "_lockstep_tick"


@dataclass
class Budget:
    """What one rendering has used."""

    deadline: float
    passes: int = 0

    def tick(self) -> None:
        """Count a loop pass or call; InputError when there were too many or they took too long."""
        self.passes += 1
        if self.passes > MAX_PASSES:
            raise InputError(
                f"the chat template loops over {MAX_PASSES} times; it is broken or hostile", field="chat_template"
            )
        if self.passes % 64 == 0:
            self.check_clock()

    def check_clock(self) -> None:
        """InputError once the time is up."""
        if time.monotonic() > self.deadline:
            raise InputError(f"the chat template took more than {MAX_SECONDS} s", field="chat_template")

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each counted."""
        for item in items:
            self.tick()
            yield item


def check_size(size: int) -> None:
    """InputError for a text or list that is too large."""
    if size > MAX_CHARACTERS:
        raise InputError(f"the chat template makes more than {MAX_CHARACTERS} characters", field="chat_template")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _checked_binop(operator: str, left: Any, right: Any) -> None:
    if operator == "*":
        sized, times = (left, right) if _length(left) else (right, left)
        if _length(sized) and isinstance(times, int):
            check_size(_length(sized) * max(times, 0))
    elif operator == "+":
        check_size(_length(left) + _length(right))
        if isinstance(left, list | tuple) and len(left) + _length(right) > _MAX_ITEMS:
            check_size(MAX_CHARACTERS + 1)
    elif operator == "%" and isinstance(left, str) and _WIDTH.search(left):
        check_size(MAX_CHARACTERS + 1)
    for number in (left, right):
        if isinstance(number, int) and number.bit_length() > _MAX_BITS:
            check_size(MAX_CHARACTERS + 1)
    if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_BITS:
        check_size(MAX_CHARACTERS + 1)


def _checked_format(text: Any, method: Any) -> None:
    if method in ("format", "format_map") and isinstance(text, str) and _WIDTH.search(text):
        check_size(MAX_CHARACTERS + 1)


def _checked_call(method: Any, args: tuple[Any, ...]) -> None:
    """Bounds the methods of str whose result may be much larger than what goes in."""
    if not isinstance(method, types.BuiltinMethodType) or not isinstance(method.__self__, str):
        return
    owner = method.__self__
    if method.__name__ == "replace" and len(args) >= 2 and isinstance(args[1], str):
        check_size((len(owner) + 1) * len(args[1]))
    if method.__name__ == "join" and args:
        check_size(len(owner) * _length(args[0]))


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it stands, without the HTML escapes of jinja2's own filter."""
    if indent is not None and not 0 <= int(indent) <= 16:
        raise InputError(f"tojson(indent={indent}); expected 0 to 16", field="chat_template")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _join(items: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    parts = [str(item if attribute is None else item[attribute]) for item in items]
    check_size(sum(map(len, parts)) + len(separator) * len(parts))
    return separator.join(parts)


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    check_size((len(str(text)) + 1) * len(new))
    return str(text).replace(old, new, count)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = width if isinstance(width, str) else " " * min(width, 64)
    lines = str(text).split("\n")
    check_size(len(text) + len(lines) * len(margin))
    kept = [margin + line if (blank or line) and (first or number) else line for number, line in enumerate(lines)]
    return "\n".join(kept)


def _format(text: str, *args: Any, **kwargs: Any) -> str:
    _checked_binop("%", text, None)
    return str(text) % (kwargs or args)


def _concat(*parts: Any) -> str:
    texts = [str(part) for part in parts]
    check_size(sum(map(len, texts)))
    return "".join(texts)


def _raise_exception(message: str) -> None:
    raise InputError(f"the chat template refuses these messages: {message}", field="messages")


def _classes() -> tuple[type, type]:
    """The environment and its extension; built here because jinja2 is optional."""
    jinja = require("jinja2", extra="lm")
    nodes, sandbox, ext = jinja.nodes, require("jinja2.sandbox", extra="lm"), require("jinja2.ext", extra="lm")

    class Environment(sandbox.ImmutableSandboxedEnvironment):  # type: ignore[misc, name-defined]
        intercepted_binops = frozenset(["*", "**", "+", "%"])

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if attr in _PADDING_METHODS:
                return False
            return super().is_safe_attribute(obj, attr, value)

        def getattr(
            self,
            obj: Any,
            attribute: str,
        ) -> Any:
            _checked_format(obj, attribute)
            return super().getattr(obj, attribute)

        def getitem(self, obj: Any, argument: Any) -> Any:
            _checked_format(obj, argument)
            return super().getitem(obj, argument)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _checked_binop(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            context[_TICK].tick()
            _checked_call(obj, args)
            result = super().call(context, obj, *args, **kwargs)
            check_size(_length(result))
            return result

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            tree = super()._parse(source, name, filename)
            for loop in tree.find_all(nodes.For):
                each = nodes.Getattr(nodes.Name(_TICK, "load"), "each", "load")
                loop.iter = nodes.Call(each, [loop.iter], [], None, None)
            return _bound_texts(tree, nodes)

    class GenerationTag(ext.Extension):  # type: ignore[misc, name-defined]
        """`{% generation %}` marks what the assistant says; for rendering it is transparent."""

        tags = frozenset(["generation"])

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Environment, GenerationTag


def _bound_texts(node: Any, nodes: Any) -> Any:
    """`a ~ b` and `{% set x %}...{% endset %}` go through a bounded filter, everywhere below this node."""
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(node, name, _bound_texts(value, nodes))
        elif isinstance(value, list):
            setattr(node, name, [_bound_texts(v, nodes) if isinstance(v, nodes.Node) else v for v in value])
    if isinstance(node, nodes.AssignBlock):
        node.filter = nodes.Filter(node.filter, "_concat", [], [], None, None)
    if isinstance(node, nodes.Concat):
        first, *rest = node.nodes
        return nodes.Filter(first, "_concat", rest, [], None, None)
    return node


def build_environment(strftime: Callable[[str], str]) -> Any:
    """The environment templates are compiled in; `strftime` answers `strftime_now(format)`."""
    environment_class, generation = _classes()
    environment = environment_class(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", generation]
    )
    kept = {name: environment.filters[name] for name in _FILTERS}
    own = {
        "tojson": _tojson,
        "join": _join,
        "replace": _replace,
        "indent": _indent,
        "format": _format,
        "_concat": _concat,
    }
    environment.filters = {**kept, **own}
    environment.globals = {
        name: environment.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")
    }
    environment.globals.update(raise_exception=_raise_exception, strftime_now=strftime)
    return environment


def render(template: Any, variables: dict[str, Any]) -> str:
    """The text of a compiled template within the budget."""
    budget = Budget(deadline=time.monotonic() + MAX_SECONDS)
    parts, size = [], 0
    for part in template.generate(**variables, **{_TICK: budget}):
        size += len(part)
        check_size(size)
        budget.check_clock()
        parts.append(part)
    return "".join(parts)
