"""Operations on arrays of strings, and those that turn them into numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.core.errors import FormatError
from lockstep.models.graph.call import Call
from lockstep.models.graph.graph import TensorValue
from lockstep.models.graph.values import to_tensor

Function = Callable[..., Any]

MAX_PATTERN = 200
"""Characters of a regular expression from a file."""


def strings(call: Call) -> np.ndarray:
    value: TensorValue = call.need("value")
    return np.array(value.data, dtype=object).reshape(value.shape)


def concat(call: Call, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(x + y, dtype=object)


def matches(call: Call, x: np.ndarray) -> Tensor:
    pattern = call.need("pattern")
    # Python's engine backtracks: a nested repetition in a hostile file could run for ever.
    if len(pattern) > MAX_PATTERN or re.search(r"[+*}]\)*[+*{]", pattern):
        raise FormatError("a pattern with nested repetitions, or too long", op=call.op)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise FormatError(f"pattern {pattern!r}: {error}", op=call.op) from error
    found = [compiled.fullmatch(str(word)) is not None for word in x.reshape(-1)]
    return torch.tensor(found, dtype=torch.bool).reshape(x.shape)


def split(call: Call, x: np.ndarray) -> tuple[np.ndarray, Tensor]:
    delimiter, most = call.get("delimiter", "") or None, call.get("maxsplit", -1)
    parts = [str(word).split(delimiter, most) for word in x.reshape(-1)]
    widest = max((len(words) for words in parts), default=0)
    out = np.full((len(parts), widest), "", dtype=object)
    for row, words in zip(out, parts, strict=True):
        row[: len(words)] = words
    counts = torch.tensor([len(words) for words in parts], dtype=torch.int64)
    return out.reshape(*x.shape, widest), counts.reshape(x.shape)


def normalise(call: Call, x: np.ndarray) -> np.ndarray:
    case, exact = call.get("case_change_action", "NONE"), bool(call.get("is_case_sensitive", 0))
    stop = call.get("stopwords", ())
    stops = set(stop) if exact else {word.lower() for word in stop}
    words = [str(word) for word in x.reshape(-1)]
    words = [word for word in words if (word if exact else word.lower()) not in stops]
    change = {"LOWER": str.lower, "UPPER": str.upper}.get(case, str)
    words = [change(word) for word in words] or [""]
    shape = (len(words),) if x.ndim == 1 else (1, len(words))
    return np.array(words, dtype=object).reshape(shape)


def tf_idf(call: Call, x: Any) -> Tensor:
    """Counts of n-grams, weighted: term frequency, inverse document frequency."""
    x = to_tensor(x)
    rows = x if x.ndim == 2 else x.reshape(1, -1)
    strings_pool = call.get("pool_strings", None)
    pool = list(strings_pool if strings_pool is not None else call.need("pool_int64s"))
    starts, places = list(call.need("ngram_counts")), call.need("ngram_indexes")
    shortest, longest, skips = (call.need(name) for name in ("min_gram_length", "max_gram_length", "max_skip_count"))
    grams: dict[tuple[Any, ...], int] = {}
    for n, start in enumerate(starts, start=1):
        end = starts[n] if n < len(starts) else len(pool)
        for at in range(start, end, n):
            grams[tuple(pool[at : at + n])] = len(grams)
    counts = np.zeros((len(rows), max(places) + 1), np.float32)
    for row, items in zip(counts, rows.tolist(), strict=True):
        for n in range(shortest, longest + 1):
            for skip in range((skips if n > 1 else 0) + 1):
                for at in range(len(items) - (n - 1) * (skip + 1)):
                    index = grams.get(tuple(items[at + i * (skip + 1)] for i in range(n)))
                    if index is not None:
                        row[places[index]] += 1
    weights = np.ones(counts.shape[1], np.float32)
    if call.get("weights", None) is not None:
        weights[list(places)] = call.get("weights", ())
    mode = call.need("mode")
    out = counts if mode == "TF" else (counts > 0) * weights if mode == "IDF" else counts * weights
    return torch.from_numpy(out.astype(np.float32)).reshape(*x.shape[:-1], -1)


OPS: dict[str, Function] = {
    "RegexFullMatch": matches,
    "StringConcat": concat,
    "StringNormalizer": normalise,
    "StringSplit": split,
    "TfIdfVectorizer": tf_idf,
    "lockstep.Strings": strings,
}
