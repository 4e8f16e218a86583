"""Reading a client's JSON object field by field: each value has the type it should have, or the reply names the field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.server.replies import Refusal, shown

MAX_ITEMS = 100_000


class Fields:
    """One JSON object. `null` counts as a field that is not there.

    >>> Fields({"n": 2}).integer("n", 1, low=1)
    2
    >>> Fields({"n": "2"}).integer("n", 1)
    Traceback (most recent call last):
    ...
    lockstep.server.replies.Refusal: n: expected an integer; got '2'
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values = values
        self._where = where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def path(self, name: str) -> str:
        """The field's name from the body's root on."""
        return f"{self._where}.{name}" if self._where else name

    def wrong(self, name: str, expected: str, status: int = 400) -> Refusal:
        """The refusal of a field."""
        return Refusal(
            status, f"{self.path(name)}: expected {expected}; got {shown(self.values.get(name))}", field=self.path(name)
        )

    def refused(self, name: str, reason: str) -> Refusal:
        """The refusal of a wish that is understood and not met."""
        return Refusal(400, f"{self.path(name)}: {reason}", field=self.path(name))

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def needed_text(self, name: str) -> str:
        """A string that must be there."""
        value = self.text(name)
        if value is None:
            raise self.wrong(name, "a string")
        return value

    def one_of(self, name: str, allowed: Sequence[str], default: str | None = None) -> str | None:
        """One of a few strings."""
        value = self.text(name, default)
        if value is not None and value not in allowed:
            raise self.wrong(name, " or ".join(map(repr, allowed)))
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def integer(
        self, name: str, default: int | None = None, *, low: int = -(2**63), high: int = 2**63 - 1
    ) -> int | None:
        """An integer within bounds, both included."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "an integer")
        if not low <= value <= high:
            raise self.wrong(name, _bounds("an integer", low, high))
        return value

    def number(self, name: str, default: float, *, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number within bounds, both included."""
        value = self.values.get(name)
        if value is None:
            return default
        if not _is_number(value):
            raise self.wrong(name, "a number")
        if not low <= value <= high:
            raise self.wrong(name, _bounds("a number", low, high))
        return float(value)

    def listing(self, name: str) -> list[Any]:
        """An array; empty when not there."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(name, "an array")
        if len(value) > MAX_ITEMS:
            raise self.wrong(name, f"at most {MAX_ITEMS} items")
        return value

    def objects(self, name: str) -> list[Fields]:
        """An array of objects."""
        items = self.listing(name)
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                where = f"{self.path(name)}[{index}]"
                raise Refusal(400, f"{where}: expected an object; got {shown(item)}", field=where)
        return [Fields(item, f"{self.path(name)}[{index}]") for index, item in enumerate(items)]

    def section(self, name: str) -> Fields | None:
        """An object."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, self.path(name))

    def texts(self, name: str) -> tuple[str, ...]:
        """A string or an array of strings, none empty."""
        value = self.values.get(name)
        if value is None:
            return ()
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
            raise self.wrong(name, "a string or an array of strings, none empty")
        return tuple(items)

    def ids(self, name: str) -> tuple[int, ...]:
        """An array of token ids."""
        items = self.listing(name)
        if not all(is_id(item) for item in items):
            raise self.wrong(name, "an array of token ids")
        return tuple(items)

    def addends(self, name: str) -> tuple[tuple[int, float], ...]:
        """An object from token ids, written as strings, to numbers between -100 and 100."""
        section = self.section(name)
        pairs = []
        for key, value in ({} if section is None else section.values).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise self.refused(name, f"key {shown(key)} is no token id")
            if not _is_number(value) or not -100 <= value <= 100:
                raise self.refused(name, f"token {key}: expected a number between -100 and 100; got {shown(value)}")
            pairs.append((int(key), float(value)))
        return tuple(pairs)


def is_id(value: Any) -> bool:
    """Whether a JSON value may be a token id; the engine knows how many there are."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def _bounds(kind: str, low: float, high: float) -> str:
    above, below = low > -(2**63), high < 2**63 - 1
    if above and below:
        return f"{kind} between {low} and {high}"
    return f"{kind} of {low} or more" if above else f"{kind} of {high} or less" if below else f"{kind} of 64 bits"
