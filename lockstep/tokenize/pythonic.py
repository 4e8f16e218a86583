"""One tool call written as Python, `f(city="Paris", days=[1, 2])`: where it ends, and its arguments as JSON."""

from __future__ import annotations

import ast
import json

from lockstep.tokenize.json_scan import MAX_DEPTH, Scan

_MAX_LENGTH = 1 << 16


class PythonCallScanner:
    """Finds the end of a call, a character at a time: a dotted name, then brackets that close."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._quote = ""
        self._escaped = False
        self._name = ""
        self._length = 0

    def step(self, character: str) -> Scan:
        """MORE, DONE at the bracket that ends the call, or BAD."""
        self._length += 1
        if self._length > _MAX_LENGTH:
            return Scan.BAD
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == self._quote:
                self._quote = ""
            return Scan.BAD if character == "\n" else Scan.MORE
        if not self._open:
            return self._in_name(character)
        if character in "\"'":
            self._quote = character
        elif character in "([{":
            self._open.append({"(": ")", "[": "]", "{": "}"}[character])
            return Scan.BAD if len(self._open) > MAX_DEPTH else Scan.MORE
        elif character in ")]}":
            if self._open.pop() != character:
                return Scan.BAD
            return Scan.MORE if self._open else Scan.DONE
        return Scan.MORE

    def _in_name(self, character: str) -> Scan:
        if character == "(" and self._name:
            self._open.append(")")
            return Scan.MORE
        if not self._name and character.isspace():
            return Scan.MORE
        self._name += character
        return Scan.MORE if self._name.replace(".", "_").isidentifier() else Scan.BAD


def parse_call(text: str) -> tuple[str, str] | None:
    """Name and JSON arguments of a call; None if it is none, or uses more than names and literal values.

    >>> parse_call("weather(city='Paris', days=[1, 2], now=True)")
    ('weather', '{"city": "Paris", "days": [1, 2], "now": true}')
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
            return None
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return ast.unparse(call.func), json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
