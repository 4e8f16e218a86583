"""Protocol-buffer text format (`.prototxt`): read into fields by name, with the line of each for error messages.

Accepted: nested messages with `{}` or `<>` and an optional colon, quoted texts joined when they follow each other, numbers,
words (enums, true, false), `[lists]`, `#` comments, `;` and `,` as separators.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.core.errors import FormatError, unknown_name
from lockstep.interop.wire import read_file

MAX_BYTES = 1 << 24
MAX_DEPTH = 16
MAX_VALUES = 1 << 20

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\f\v]+|\#[^\n]*)|(?P<line>\n)|(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')"""
    r"""|(?P<word>[A-Za-z_][A-Za-z0-9_.]*)|(?P<number>[+-]?(?:\d|\.\d)[A-Za-z0-9_.+-]*|-inf|-nan)|(?P<mark>[{}<>:;,\[\]])"""
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


@dataclass(frozen=True)
class Scalar:
    """A value as written: quoted text, word or number."""

    text: str
    kind: str
    line: int


class Message:
    """Fields by name in file order. `where` says what it is, for messages of errors."""

    def __init__(self, path: str, line: int, where: str) -> None:
        self.path = path
        self.line = line
        self.where = where
        self.fields: dict[str, list[Scalar | Message]] = {}

    def fail(self, message: str, line: int = 0) -> FormatError:
        """An error that names the file, the line and the message."""
        return FormatError(f"line {line or self.line}: {self.where}: {message}", path=self.path)

    def known(self, names: Sequence[str]) -> None:
        """Refuse fields that are not among `names`."""
        for name, values in self.fields.items():
            if name not in names:
                raise self.fail(unknown_name("field", name, names), values[0].line)

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def scalars(self, name: str) -> list[Scalar]:
        """All values of a repeated scalar field."""
        values = self.fields.get(name, [])
        for value in values:
            if isinstance(value, Message):
                raise self.fail(f"{name} should be a value, not a message", value.line)
        return [value for value in values if isinstance(value, Scalar)]

    def messages(self, name: str) -> list[Message]:
        """All values of a repeated message field."""
        values = self.fields.get(name, [])
        for value in values:
            if isinstance(value, Scalar):
                raise self.fail(f"{name} should be a message {{...}}, not {value.text!r}", value.line)
        return [value for value in values if isinstance(value, Message)]

    def message(self, name: str) -> Message:
        """The message of a field, an empty one if it is not given; several are merged, as protocol buffers do."""
        merged = Message(self.path, self.line, f"{self.where}.{name}")
        for part in self.messages(name):
            merged.line = part.line
            for key, values in part.fields.items():
                merged.fields.setdefault(key, []).extend(values)
        return merged

    def _last(self, name: str) -> Scalar | None:
        values = self.scalars(name)
        return values[-1] if values else None

    def string(self, name: str, default: str = "") -> str:
        """A text field."""
        value = self._last(name)
        return default if value is None else value.text

    def strings(self, name: str) -> list[str]:
        """A repeated text field."""
        return [value.text for value in self.scalars(name)]

    def integer(self, name: str, default: int) -> int:
        """An integer field."""
        value = self._last(name)
        return default if value is None else self._integer(name, value)

    def integers(self, name: str) -> list[int]:
        """A repeated integer field."""
        return [self._integer(name, value) for value in self.scalars(name)]

    def real(self, name: str, default: float) -> float:
        """A floating-point field."""
        value = self._last(name)
        return default if value is None else self._real(name, value)

    def reals(self, name: str) -> list[float]:
        """A repeated floating-point field."""
        return [self._real(name, value) for value in self.scalars(name)]

    def flag(self, name: str, default: bool) -> bool:
        """A boolean field."""
        value = self._last(name)
        if value is None:
            return default
        words = {
            "true": True,
            "1": True,
            "t": True,
            "True": True,
            "false": False,
            "0": False,
            "f": False,
            "False": False,
        }
        if value.text not in words:
            raise self.fail(f"{name}: {value.text} should be true or false", value.line)
        return words[value.text]

    def enum(self, name: str, words: Sequence[str], default: str) -> str:
        """An enum field, by word or by number (the position in `words`)."""
        value = self._last(name)
        if value is None:
            return default
        if value.kind == "number" and value.text.isdigit() and int(value.text) < len(words):
            return words[int(value.text)]
        if value.text not in words or value.text == "":
            raise self.fail(unknown_name(name, value.text, [word for word in words if word]), value.line)
        return value.text

    def _integer(self, name: str, value: Scalar) -> int:
        try:
            number = int(value.text, 0) if value.text.lower().startswith(("0x", "-0x")) else int(value.text)
        except ValueError as error:
            raise self.fail(f"{name}: {value.text!r} is not an integer", value.line) from error
        if not -(1 << 62) < number < 1 << 62:
            raise self.fail(f"{name}: {value.text} is out of range", value.line)
        return number

    def _real(self, name: str, value: Scalar) -> float:
        try:
            return float(value.text.rstrip("f") if value.kind == "number" else value.text)
        except ValueError as error:
            raise self.fail(f"{name}: {value.text!r} is not a number", value.line) from error


def read_text(path: str | Path) -> Message:
    """Read a `.prototxt`.

    Raises:
        FormatError: it is missing or not text format; the message names the line.
    """
    data = read_file(path, MAX_BYTES)
    try:
        return parse_text(data.decode(), str(path))
    except UnicodeDecodeError as error:
        raise FormatError(f"byte {error.start}: is not text; a .prototxt was expected", path=str(path)) from error


def parse_text(text: str, path: str = "<text>") -> Message:
    """Parse text format.

    >>> net = parse_text('name: "a" "b"  layer { pad: [1, 2] bias: false }')
    >>> net.string("name"), net.message("layer").integers("pad"), net.message("layer").flag("bias", True)
    ('ab', [1, 2], False)
    """
    return _Parser(text, path).parse()


class _Parser:
    def __init__(self, text: str, path: str) -> None:
        self.path = path
        self.tokens = self._tokens(text)
        self.at = 0

    def _tokens(self, text: str) -> list[Scalar]:
        tokens: list[Scalar] = []
        at, line = 0, 1
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise FormatError(f"line {line}: cannot be read at {text[at : at + 20]!r}", path=self.path)
            kind = match.lastgroup or ""
            if kind == "line":
                line += 1
            elif kind != "space":
                tokens.append(Scalar(match.group(), kind, line))
                if len(tokens) > MAX_VALUES:
                    raise FormatError(f"line {line}: more than {MAX_VALUES} words", path=self.path)
            at = match.end()
        return tokens

    def fail(self, message: str) -> FormatError:
        line = self.tokens[min(self.at, len(self.tokens) - 1)].line if self.tokens else 1
        return FormatError(f"line {line}: {message}", path=self.path)

    def parse(self) -> Message:
        message = Message(self.path, 1, "file")
        self._fields(message, "", 0)
        return message

    def _peek(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    def _fields(self, message: Message, closer: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self.fail(f"messages nest deeper than {MAX_DEPTH}")
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if token.text == closer:
                self.at += 1
                return
            if token.kind != "word":
                raise self.fail(f"a field name was expected, got {token.text!r}")
            self.at += 1
            values = message.fields.setdefault(token.text, [])
            has_colon = self._peek() == ":"
            self.at += has_colon
            self._value(values, token, has_colon, depth)
            while self._peek() in (";", ",") and self.at < len(self.tokens):
                self.at += 1
        if closer:
            raise self.fail(f"the file ends inside a message; {closer!r} is missing: truncated")

    def _value(self, values: list[Scalar | Message], name: Scalar, has_colon: bool, depth: int) -> None:
        if self.at >= len(self.tokens):
            raise self.fail(f"the file ends after {name.text!r}: truncated")
        if depth > MAX_DEPTH:
            raise self.fail(f"lists nest deeper than {MAX_DEPTH}")
        token = self.tokens[self.at]
        if token.text in ("{", "<"):
            self.at += 1
            message = Message(self.path, token.line, name.text)
            self._fields(message, "}" if token.text == "{" else ">", depth + 1)
            values.append(message)
        elif not has_colon:
            raise self.fail(f"{name.text!r} is followed by {token.text!r}; ':' or '{{' was expected")
        elif token.text == "[":
            self.at += 1
            while self._peek() != "]":
                self._value(values, name, True, depth + 1)
                if self._peek() == ",":
                    self.at += 1
                if self.at >= len(self.tokens):
                    raise self.fail(f"the list of {name.text!r} does not end: truncated")
            self.at += 1
        elif token.kind == "text":
            parts = []
            while self.at < len(self.tokens) and self.tokens[self.at].kind == "text":
                parts.append(_unescape(self.tokens[self.at].text[1:-1]))
                self.at += 1
            values.append(Scalar("".join(parts), "text", token.line))
        elif token.kind in ("word", "number"):
            self.at += 1
            values.append(token)
        else:
            raise self.fail(f"{name.text!r} has no value")


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{1,3}|.)", _unescaped, text)


def _unescaped(match: re.Match[str]) -> str:
    """A byte in octal is the character of that number (Latin-1)."""
    word = match.group(1)
    return chr(int(word, 8) & 0xFF) if word[0] in "01234567" else _ESCAPES.get(word, match.group(0))
