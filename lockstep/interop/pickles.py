"""Pickles nobody vouches for: arrays, containers and inert records, nothing else.

A pickle is a program that names functions to call. Here the names it may use are a short table of functions of ours that build
arrays from bytes that are there; classes that a format needs become `Record`s, which hold what the pickle said and run nothing.
Any other name is an error that tells it.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.core.errors import FormatError

KINDS = "biufc"
"""Kinds of NumPy dtypes that hold numbers."""
_ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric", "numpy.core.numeric")


class Record:
    """An object of a class that is known by name only: what it was made from, and its state.

    >>> made = record_class("gymnasium.spaces.discrete.Discrete")(2)
    >>> made.name, made.arguments, made.state
    ('gymnasium.spaces.discrete.Discrete', (2,), {})
    """

    name = ""

    def __new__(cls, *arguments: Any, **named: Any) -> Record:
        made = super().__new__(cls)
        made.arguments = arguments
        made.state = dict(named)
        return made

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.state: dict[Any, Any]

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = {**(state[0] or {}), **state[1]}
        self.state = state if isinstance(state, dict) else {"": state}

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state[key] = value


def record_class(name: str) -> type[Record]:
    """The class that stands for another framework's in a pickle."""
    return type("Record", (Record,), {"name": name})


def load_pickle(
    data: bytes,
    path: str,
    *,
    records: Collection[str] = (),
    functions: Mapping[str, Callable[..., Any]] | None = None,
    persistent: Callable[[Any], Any] | None = None,
    hint: str = "",
) -> Any:
    """The object that a pickle describes.

    Args:
        data: the pickle.
        path: file that an error names.
        records: names of classes that become `Record`s, or beginnings of them that end in a dot.
        functions: further names and the functions of ours that stand for them.
        persistent: what a persistent id stands for.
        hint: how to get a file without the name that is refused.

    Raises:
        FormatError: damaged, or it names something else.
    """
    stream = io.BytesIO(data)
    try:
        return _settled(_Unpickler(stream, records, functions or {}, persistent, hint).load(), {})
    except FormatError as error:
        raise FormatError(error.reason, path=path, offset=stream.tell()) from error
    except RecursionError as error:
        raise FormatError("nests too deeply", path=path, offset=stream.tell()) from error
    except Exception as error:  # damaged opcodes fail in every way Python can
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise FormatError(f"is a damaged pickle: {reason}", path=path, offset=stream.tell()) from error


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """The interpreter in Python: the compiled one sizes its memo by a number in the file."""

    def __init__(
        self,
        stream: io.BytesIO,
        records: Collection[str],
        functions: Mapping[str, Callable[..., Any]],
        persistent: Callable[[Any], Any] | None,
        hint: str,
    ) -> None:
        super().__init__(stream, encoding="latin1")
        self._records, self._functions, self._persistent, self._hint = records, functions, persistent, hint

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        known = self._functions.get(full) or FUNCTIONS.get(full)
        if known is not None:
            return known
        if any(full == own or (own.endswith(".") and full.startswith(own)) for own in self._records):
            return record_class(full)
        hint = f"; {self._hint}" if self._hint else ""
        raise FormatError(f"its pickle names {full}, which this format does not need and which is not called{hint}")

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise FormatError("its pickle refers to something outside of it")
        return self._persistent(pid)

    def get_extension(self, code: int) -> Any:
        raise FormatError(f"its pickle uses the extension code {code}")


def _dtype(word: Any, *rest: Any) -> Any:
    text = word if isinstance(word, str) else ""
    if len(text) > 4 or np.dtype(text).kind not in KINDS:
        raise FormatError(f"an array of the type {word!r:.40}")
    return _Dtype(np.dtype(text))


@dataclass
class _Dtype:
    dtype: np.dtype[Any]

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            order = state[1]
            self.dtype = self.dtype if order in "|=" else self.dtype.newbyteorder(order)


class Pending:
    """An array whose bytes come with its state; `value` is the array afterwards."""

    def __init__(self) -> None:
        self.value: np.ndarray = np.zeros(0, np.float32)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _from_bytes(raw, dtype, tuple(shape), "F" if fortran else "C")


def _from_bytes(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray | memoryview):
        raise FormatError("an array without bytes or without a type of numbers")
    if any(not isinstance(n, int) or n < 0 for n in shape):
        raise FormatError(f"an array of the shape {shape}")
    array = np.frombuffer(raw, dtype.dtype)
    if array.size != math.prod(shape):
        raise FormatError(f"an array of shape {list(shape)} has {array.size} numbers")
    native = dtype.dtype.newbyteorder("=")
    return array.reshape(shape, order="F" if order == "F" else "C").astype(native)


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return _from_bytes(raw, dtype, shape, order)


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    return _from_bytes(raw.encode("latin1") if isinstance(raw, str) else raw, dtype, ()).item()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise FormatError(f"text encoded as {encoding!r:.40}")
    return text.encode("latin1")


def _bytes(*arguments: Any) -> bytes:
    if not arguments:
        return b""
    if len(arguments) == 1 and isinstance(arguments[0], bytes):
        return arguments[0]
    return _encode(*arguments)


def _items(kind: type) -> Callable[..., Any]:
    def make(items: Any = ()) -> Any:
        if not isinstance(items, list | tuple):
            raise FormatError(f"a {kind.__name__} made of {type(items).__name__}")
        return kind(items)

    return make


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _dtype,
    "numpy.ndarray": lambda *arguments: Pending(),
    "collections.OrderedDict": lambda items=(): collections.OrderedDict(items),
    "_codecs.encode": _encode,
    "builtins.bytes": _bytes,
    "__builtin__.bytes": _bytes,
    "builtins.bytearray": lambda *a: bytearray(_bytes(*a)),
    "builtins.set": _items(set),
    "builtins.frozenset": _items(frozenset),
    "__builtin__.set": _items(set),
    **{f"{module}._reconstruct": lambda *arguments: Pending() for module in _ARRAYS},
    **{f"{module}._frombuffer": _frombuffer for module in _ARRAYS},
    **{f"{module}.scalar": _scalar for module in _ARRAYS},
}
"""Names that every pickle of numbers may use, and what stands for them."""


def _settled(value: Any, done: dict[int, Any]) -> Any:
    """A loaded object with arrays in the place of `Pending` ones. What a pickle shares is visited once."""
    if not isinstance(value, Pending | _Dtype | Record | dict | tuple | list):
        return value
    if id(value) in done:
        if done[id(value)] is _OPEN:
            raise FormatError("an object that holds itself")
        return done[id(value)]
    done[id(value)] = _OPEN
    new: Any
    if isinstance(value, Pending):
        new = value.value
    elif isinstance(value, _Dtype):
        new = value.dtype
    elif isinstance(value, Record):
        new = type(value)(*_settled(value.arguments, done))
        new.state = {key: _settled(item, done) for key, item in value.state.items()}
    elif isinstance(value, dict):
        new = {key: _settled(item, done) for key, item in value.items()}
    else:
        new = type(value)(_settled(item, done) for item in value) if type(value) in (list, tuple) else value
    done[id(value)] = new
    return new


_OPEN = object()
