"""Training texts: JSON lines on disk, read one by one, rendered as the model will meet them, with a weight a token.

Supervised rows: {"messages": [...]} (OpenAI's form), {"prompt": ..., "completion": ...} or {"text": ...}.
Preference rows: {"prompt": ..., "chosen": ..., "rejected": ...}; prompts may be texts or lists of messages.
Rows of KTO: {"prompt": ..., "completion": ..., "label": true or false}.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lockstep.core.errors import ConfigError, FormatError, InputError
from lockstep.learn.packing import Example
from lockstep.tokenize.chat import ChatTemplate
from lockstep.tokenize.tokenizer import Tokenizer

TooLong = Literal["error", "cut", "skip"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows, and how they become tokens."""

    path: str = ""
    """JSON-lines file."""
    max_tokens: int = 1024
    """Tokens of a row, prompt and answer together; a model's positions are a limit too."""
    too_long: TooLong = "error"
    """A longer row: error names it; cut drops its end; skip leaves it out and counts it."""
    chat_template: str = ""
    """Name or text of the template for messages (empty: the model's own)."""
    last_turn_only: bool = False
    """Of messages, learn the last assistant turn rather than all of them."""

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ConfigError(f"max_tokens={self.max_tokens}; expected 2 or more")
        if self.too_long not in get_args(TooLong):
            raise ConfigError(f"too_long={self.too_long!r}; expected one of {', '.join(get_args(TooLong))}")


class JsonLines:
    """Rows of a JSON-lines file by number, without holding the file. Empty lines are not rows.

    Raises:
        ConfigError: no such file, or no row in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ConfigError(f"{str(path)!r} is not a file; give a JSON-lines file of training rows")
        starts, lines = [], []
        with path.open("rb") as file:
            at = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    starts.append(at)
                    lines.append(number)
                at += len(line)
        if not starts:
            raise ConfigError(f"{path} has no rows")
        self._starts, self._lines = np.array([*starts, at]), np.array(lines)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, row: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.path}:{self._lines[row]}"

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The row's object.

        Raises:
            FormatError: not a JSON object; names file and line.
        """
        text = self._map[self._starts[row] : self._starts[row + 1]]
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"is not JSON: {error}", path=self.where(row)) from error
        if not isinstance(value, dict):
            raise FormatError(f"holds {type(value).__name__}; expected an object", path=self.where(row))
        return value

    def close(self) -> None:
        self._map.close()


def shuffled(num_rows: int, batch: int, seed: int, step: int) -> list[int]:
    """Rows of the batch number `step`: the file in a new order each epoch, one batch running on into the next epoch.

    A function of its arguments, so that a resumed run needs no other state than its step.

    >>> sorted(shuffled(4, 2, 0, 0) + shuffled(4, 2, 0, 1))
    [0, 1, 2, 3]
    """
    rows: list[int] = []
    place = step * batch
    while len(rows) < batch:
        epoch, start = divmod(place, num_rows)
        part = _order(num_rows, seed, epoch)[start : start + batch - len(rows)].tolist()
        rows += part
        place += len(part)
    return rows


@lru_cache(maxsize=4)
def _order(num_rows: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) & 0x7FFF_FFFF_FFFF_FFFF)
    return torch.randperm(num_rows, generator=generator)


class Renderer:
    """Rows to tokens. The tokens of a prompt are those that the engine would be given for it.

    Args:
        context: positions of the model.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, context: int | None = None) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.limit = config.max_tokens if context is None else min(config.max_tokens, context)
        """Tokens of a row."""
        self._chat: ChatTemplate | None = None
        self.num_skipped = 0
        """Rows left out for their length."""

    def supervised(self, row: Mapping[str, Any], where: str) -> Example | None:
        """An example that learns what the assistant said; None for a row that is skipped.

        Raises:
            FormatError: keys or values of another form, a row that is too long, messages that cannot be rendered.
        """
        kinds = [kind for kind in ("messages", "completion", "text") if kind in row]
        if len(kinds) != 1:
            raise FormatError(
                f'has the keys {sorted(row)}; expected "messages", or "prompt" and "completion", or "text"', path=where
            )
        if kinds[0] == "messages":
            tokens, weight = self._conversation(row["messages"], row.get("tools"), where)
        elif kinds[0] == "completion":
            prompt, answer = self.prompt(row, where), self.answer(row, "completion", where)
            tokens, weight = [*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer)
        else:
            tokens = [*self.tokenizer.vocabulary.prefix_ids, *self._encode(_text(row, "text", where))]
            tokens += self.tokenizer.eos_ids[:1]
            weight = [0.0] + [1.0] * (len(tokens) - 1)
        return self.fitted(tokens, weight, where)

    def pair(self, row: Mapping[str, Any], where: str) -> tuple[Example, Example] | None:
        """(chosen, rejected); None for a row of which one is too long and skipped."""
        prompt = self.prompt(row, where)
        made = [self.completion(prompt, self.answer(row, name, where), where) for name in ("chosen", "rejected")]
        return None if made[0] is None or made[1] is None else (made[0], made[1])

    def labelled(self, row: Mapping[str, Any], where: str) -> tuple[list[int], list[int], bool]:
        """(prompt, answer, label) of a row of KTO."""
        if not isinstance(row.get("label"), bool):
            raise FormatError(f'"label" is {row.get("label")!r}; expected true or false', path=where)
        return self.prompt(row, where), self.answer(row, "completion", where), row["label"]

    def completion(self, prompt: Sequence[int], answer: Sequence[int], where: str) -> Example | None:
        """An example that learns `answer` after `prompt`."""
        return self.fitted([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer), where)

    def prompt(self, row: Mapping[str, Any], where: str) -> list[int]:
        """Tokens of "prompt": a text, or messages after which the assistant speaks."""
        prompt = row.get("prompt")
        if isinstance(prompt, list):
            return self._encode_rendered(self._render(prompt, row.get("tools"), True, where))
        tokens = [*self.tokenizer.vocabulary.prefix_ids, *self._encode(_text(row, "prompt", where))]
        if not tokens:
            raise FormatError('"prompt" is empty and the vocabulary has no start token to answer after', path=where)
        return tokens

    def answer(self, row: Mapping[str, Any], name: str, where: str) -> list[int]:
        """Tokens of an answer (a text, or one assistant message) and the end of the text."""
        value, prompt = row.get(name), row.get("prompt")
        if isinstance(value, list) and isinstance(prompt, list):
            before = self._render(prompt, row.get("tools"), True, where)
            return self._turn(before, self._render([*prompt, *value], row.get("tools"), False, where), where)[0]
        return [*self._encode(_text(row, name, where)), *self.tokenizer.eos_ids[:1]]

    def fitted(self, tokens: list[int], weight: list[float], where: str) -> Example | None:
        """The example, within `limit` as `too_long` says."""
        limit, how = self.limit, self.config.too_long
        if len(tokens) > limit:
            if how == "error":
                told = "max_tokens is" if limit == self.config.max_tokens else "the model's positions are"
                raise FormatError(
                    f"has {len(tokens)} tokens, {told} {limit}; raise it, or set too_long to cut or skip",
                    path=where,
                )
            if how == "cut":
                tokens, weight = tokens[:limit], weight[:limit]
            if how == "skip" or not any(weight):
                self.num_skipped += 1
                return None
        if not any(weight):
            raise FormatError("has nothing to learn: no answer follows a prompt", path=where)
        return Example.of(tokens, weight=weight)

    def _conversation(self, messages: Any, tools: Any, where: str) -> tuple[list[int], list[float]]:
        if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
            raise FormatError('"messages" is not a list of objects', path=where)
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if not turns:
            raise FormatError("no message is the assistant's; there is nothing to learn", path=where)
        tokens: list[int] = []
        weight: list[float] = []
        text = ""
        for i in turns[-1:] if self.config.last_turn_only else turns:
            before = self._render(messages[:i], tools, True, where) if i else ""
            if not before.startswith(text):
                raise FormatError(
                    f"the chat template writes the turns before message {i} differently once it is there, so they cannot "
                    "all be learned at once; set last_turn_only",
                    path=where,
                )
            prompt = self._encode_rendered(before[len(text) :])
            text = self._render(messages[: i + 1], tools, False, where)
            answer, rest = self._turn(before, text, where)
            tokens += [*prompt, *answer, *rest]
            weight += [0.0] * len(prompt) + [1.0] * len(answer) + [0.0] * len(rest)
        if rest:
            tokens, weight = tokens[: -len(rest)], weight[: -len(rest)]
        weight[0] = 0.0
        return tokens, weight

    def _turn(self, before: str, after: str, where: str) -> tuple[list[int], list[int]]:
        """What the assistant adds to the rendered prompt: up to the token that ends its turn, and what the template writes
        after that."""
        if not after.startswith(before):
            raise FormatError(
                "the chat template does not write the assistant's turn after the prompt it generates for it", path=where
            )
        ids, ends = self._encode_rendered(after[len(before) :]), self.tokenizer.eos_ids
        last = max((place for place, token in enumerate(ids) if token in ends), default=len(ids) - 1)
        return ids[: last + 1], ids[last + 1 :]

    def _render(self, messages: Sequence[Any], tools: Any, generate: bool, where: str) -> str:
        if self._chat is None:
            self._chat = ChatTemplate.of(self.tokenizer, self.config.chat_template or None)
        try:
            return self._chat.render(messages, tools=tools, add_generation_prompt=generate)
        except InputError as error:
            raise FormatError(str(error), path=where) from error

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special=False, parse_special=False)

    def _encode_rendered(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special=False, parse_special=True)


def texts_of(rows: JsonLines) -> Iterator[str]:
    """Every text in the rows, in order: what the tokenizer of a new model is learned from."""
    for number in range(len(rows)):
        for name, value in rows[number].items():
            if name in ("prompt", "completion", "text", "chosen", "rejected", "messages"):
                turns = value if isinstance(value, list) else [value]
                for turn in turns:
                    content = turn.get("content") if isinstance(turn, dict) else turn
                    if isinstance(content, str):
                        yield content


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        kind = "missing" if name not in row else type(value).__name__
        raise FormatError(f'"{name}" is {kind}; expected a text', path=where)
    return value
