"""Frozen config dataclasses as JSON and back, so that a run can be resumed from what its directory says.

A dataclass is written as an object whose first key `class` names it; on the way back that name picks the member of a
union, and a key the class does not have is an error. Infinity and NaN, which JSON lacks, are {"float": "inf"} etc.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from lockstep.core.errors import ConfigError, unknown_name

ConfigT = TypeVar("ConfigT")


def config_to_json(config: Any) -> Any:
    """JSON values of a config: nested dataclasses, tuples, lists, string-keyed dicts, enums, paths and scalars.

    Raises:
        ConfigError: a field holds something else; the message names its place.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Adam:
    ...     lr: float = 3e-4
    >>> config_to_json(Adam())
    {'class': 'Adam', 'lr': 0.0003}
    """
    return _encode(config, type(config).__name__)


def config_from_json(cls: type[ConfigT], data: dict[str, Any]) -> ConfigT:
    """Inverse of `config_to_json` for a config of type `cls`.

    Raises:
        ConfigError: unknown key or a value that does not fit its field's type.
    """
    return typing.cast(ConfigT, _decode(cls, data, cls.__name__))


def _encode(value: Any, place: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _encode(value.__dict__[f.name], f"{place}.{f.name}") for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_encode(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _encode(item, f"{place}[{key!r}]") for key, item in value.items()}
    raise ConfigError(f"{place} is a {type(value).__qualname__}; a config holds dataclasses, containers and scalars")


def _decode(hint: Any, data: Any, place: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _decode(typing.get_args(hint)[0], data, place)
    if origin is typing.Union or isinstance(hint, types.UnionType):
        return _decode_union(typing.get_args(hint), data, place)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _decode_dataclass(hint, data, place)
    if origin is typing.Literal:
        if data in typing.get_args(hint):
            return data
        raise ConfigError(f"{place} = {data!r}; expected one of {typing.get_args(hint)}")
    if origin in (tuple, list, dict):
        return _decode_container(origin, typing.get_args(hint), data, place)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint[data]
        except KeyError:
            raise ConfigError(f"{place}: {unknown_name(hint.__name__, str(data), hint.__members__)}") from None
    return _decode_scalar(hint, data, place)


def _decode_scalar(hint: Any, data: Any, place: str) -> Any:
    if hint is Any or hint is object:
        return data
    if hint is float and data in ({"float": "inf"}, {"float": "-inf"}, {"float": "nan"}):
        return float(data["float"])
    if hint is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if hint is Path and isinstance(data, str):
        return Path(data)
    if data is None and hint in (None, type(None)):
        return None
    if isinstance(data, list) and hint is tuple:
        return tuple(data)
    # type(), because True is an int to isinstance.
    if hint in (bool, int, str, dict, list) and type(data) is hint:
        return data
    raise ConfigError(f"{place} = {data!r}; expected {hint}")


def _decode_union(members: tuple[Any, ...], data: Any, place: str) -> Any:
    if isinstance(data, dict) and "class" in data:
        for member in members:
            if isinstance(member, type) and member.__name__ == data["class"]:
                return _decode(member, data, place)
    failures = []
    # Exact matches first: 3 must stay an int in `float | int`.
    for member in sorted(members, key=lambda member: member is not type(data)):
        try:
            return _decode(member, data, place)
        except ConfigError as error:
            failures.append(str(error))
    raise ConfigError("; ".join(failures))


def _decode_dataclass(cls: type, data: Any, place: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{place} = {data!r}; expected the fields of {cls.__name__}")
    named = data.get("class", cls.__name__)
    if named != cls.__name__:
        raise ConfigError(f"{place} is a {named}; expected {cls.__name__}")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, item in data.items():
        if key == "class":
            continue
        if key not in fields:
            raise ConfigError(f"{place}: {unknown_name('field', key, fields)}")
        if fields[key].init:
            values[key] = _decode(hints[key], item, f"{place}.{key}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{place}: {error}") from error


def _decode_container(origin: type, hints: tuple[Any, ...], data: Any, place: str) -> Any:
    if origin is dict:
        if not isinstance(data, dict):
            raise ConfigError(f"{place} = {data!r}; expected an object")
        return {key: _decode(hints[1], item, f"{place}[{key!r}]") for key, item in data.items()}
    if not isinstance(data, list):
        raise ConfigError(f"{place} = {data!r}; expected a list")
    if origin is tuple and not (len(hints) == 2 and hints[1] is Ellipsis):
        if len(data) != len(hints):
            raise ConfigError(f"{place} has {len(data)} elements; expected {len(hints)}")
        return tuple(_decode(h, item, f"{place}[{i}]") for i, (h, item) in enumerate(zip(hints, data, strict=True)))
    return origin(_decode(hints[0], item, f"{place}[{i}]") for i, item in enumerate(data))
