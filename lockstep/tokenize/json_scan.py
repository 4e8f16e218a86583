"""Checking JSON one character at a time: is what came so far the beginning of a value, and where does it end?"""

from __future__ import annotations

import enum

_BLANK = " \t\n\r"
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
# State of a number -> character class -> next state. Classes: 0 zero, 1 other digit.
_NUMBER: dict[str, dict[str, str]] = {
    "minus": {"0": "zero", "1": "int"},
    "zero": {".": "point", "e": "exp"},
    "int": {"0": "int", "1": "int", ".": "point", "e": "exp"},
    "point": {"0": "frac", "1": "frac"},
    "frac": {"0": "frac", "1": "frac", "e": "exp"},
    "exp": {"0": "expint", "1": "expint", "+": "expsign", "-": "expsign"},
    "expsign": {"0": "expint", "1": "expint"},
    "expint": {"0": "expint", "1": "expint"},
}
_NUMBER_ENDS = ("zero", "int", "frac", "expint")
MAX_DEPTH = 256


class Scan(enum.Enum):
    """What a character was to the value."""

    MORE = "more"  # part of it
    DONE = "done"  # its last character
    BEFORE = "before"  # not part of it: the number before was already whole
    BAD = "bad"


class JsonScanner:
    """A checker of one JSON value.

    >>> scanner = JsonScanner()
    >>> [scanner.step(c).value for c in '{"a":1}']
    ['more', 'more', 'more', 'more', 'more', 'more', 'done']
    """

    def __init__(self) -> None:
        self._stack: list[str] = []  # "{" or "[" for each open container
        self._want = "value"
        self._number = ""
        self._rest = ""  # of a literal, or hexadecimal digits of an escape ("h")

    @property
    def depth(self) -> int:
        """Containers open now."""
        return len(self._stack)

    @property
    def want(self) -> str:
        """What comes next: value, key, colon, comma, or the rest of a string, key string, number or literal."""
        return self._want

    def step(self, character: str) -> Scan:
        """Take one character. After DONE, BEFORE or BAD the scanner is used up."""
        want = self._want
        if want == "string" or want == "key string":
            return self._in_string(character)
        if want == "number":
            return self._in_number(character)
        if want == "literal":
            if character != self._rest[0]:
                return Scan.BAD
            self._rest = self._rest[1:]
            return Scan.MORE if self._rest else self._value_ended()
        if character in _BLANK:
            return Scan.MORE
        return self._between(character)

    def _between(self, character: str) -> Scan:
        want = self._want
        if want in ("key", "key or end") and character == '"':
            self._want = "key string"
            return Scan.MORE
        if want == "colon" and character == ":":
            self._want = "value"
            return Scan.MORE
        if want == "comma" and character == ",":
            self._want = "key" if self._stack[-1] == "{" else "value"
            return Scan.MORE
        closer = {"{": "}", "[": "]"}.get(self._stack[-1] if self._stack else "")
        if character == closer and want in ("comma", "key or end", "value or end"):
            self._stack.pop()
            return self._value_ended()
        return self._value(character) if want in ("value", "value or end") else Scan.BAD

    def _value(self, character: str) -> Scan:
        if character in "{[":
            if len(self._stack) >= MAX_DEPTH:
                return Scan.BAD
            self._stack.append(character)
            self._want = "key or end" if character == "{" else "value or end"
        elif character == '"':
            self._want = "string"
        elif character in _LITERALS:
            self._want, self._rest = "literal", _LITERALS[character]
        elif character == "-" or character in "0123456789":
            self._want = "number"
            self._number = "minus" if character == "-" else "zero" if character == "0" else "int"
        else:
            return Scan.BAD
        return Scan.MORE

    def _value_ended(self) -> Scan:
        self._want = "comma"
        return Scan.MORE if self._stack else Scan.DONE

    def _in_string(self, character: str) -> Scan:
        if self._rest == "\\":
            self._rest = "hhhh" if character == "u" else ""
            return Scan.MORE if character in '"\\/bfnrtu' else Scan.BAD
        if self._rest:
            self._rest = self._rest[1:]
            return Scan.MORE if character in "0123456789abcdefABCDEF" else Scan.BAD
        if character == "\\":
            self._rest = "\\"
        elif character == '"':
            if self._want == "string":
                return self._value_ended()
            self._want = "colon"
        elif character < " ":
            return Scan.BAD
        return Scan.MORE

    def _in_number(self, character: str) -> Scan:
        kind = character if character in "0.+-" else "1" if character in "123456789" else character.lower()
        following = _NUMBER[self._number].get(kind)
        if following is not None:
            self._number = following
            return Scan.MORE
        if self._number not in _NUMBER_ENDS:
            return Scan.BAD
        if self._value_ended() is Scan.DONE:
            return Scan.BEFORE
        return self.step(character)
