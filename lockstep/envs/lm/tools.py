"""Episodes with tools: the model calls Python functions, their results are appended, until it answers without a call."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from lockstep.core.errors import ConfigError, EnvError
from lockstep.core.trajectory import Problem
from lockstep.envs.lm.task import Episode, EpisodeTask, Task, Turn
from lockstep.tokenize.events import ContentDelta, ToolArgumentsDelta, ToolCallStart
from lockstep.tokenize.reasoning import ReasoningSplitter
from lockstep.tokenize.tools import OutputParser, tool_parser

_TYPES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
    type(None): "null",
}
MAX_RESULT = 8000


@dataclass(frozen=True, kw_only=True)
class ToolsConfig:
    """How calls are written and how long an episode may be."""

    format: str = "hermes"
    """A name in `lockstep.tokenize.tools.TOOL_PARSERS`; `tool_format_of` tells it from a chat template."""
    has_reasoning: bool = True
    """Split `<think>` off before calls and the answer are read."""
    max_turns: int = 8
    """Turns of the model; an episode still calling tools after them ends as truncated, with reward 0."""


@dataclass(frozen=True)
class Call:
    """One tool call of the model's."""

    id: str
    name: str
    arguments: str
    """JSON text, as the model wrote it."""


@final
class ToolTask(EpisodeTask):
    """A single-turn task whose problems may be solved with tools; its verifier judges the answer without calls.

    A call that fails, be it the model's fault or the tool's, is answered by a message that says so.

    Args:
        task: brings problems in chat form, and the verifier.
        tools: functions with annotated parameters and a docstring. Deterministic; importable, so that verifier
            processes have them too.

    Raises:
        ConfigError: a tool whose parameters have no JSON schema, or two of one name.
    """

    def __init__(self, task: Task, tools: Sequence[Callable[..., Any]], config: ToolsConfig | None = None) -> None:
        self.config = config or ToolsConfig()
        if self.config.max_turns < 1:
            raise ConfigError(f"max_turns={self.config.max_turns}; expected 1 or more")
        self.task = task
        self.schemas = tuple(tool_schema(tool) for tool in tools)
        self.tools = {schema["function"]["name"]: tool for schema, tool in zip(self.schemas, tools, strict=True)}
        if len(self.tools) < len(tools):
            raise ConfigError(f"tools {[schema['function']['name'] for schema in self.schemas]}: names must differ")
        tool_parser(self.config.format)

    @property
    def name(self) -> str:
        return f"{self.task.name}+tools"

    @property
    def num_problems(self) -> int | None:
        return self.task.num_problems

    def episode(self, index: int) -> Episode:
        return _ToolEpisode(self, replace(self.task.problem(index), tools=self.schemas))


class _ToolEpisode(Episode):
    def __init__(self, task: ToolTask, problem: Problem) -> None:
        if problem.messages is None:
            raise ConfigError(f"{task.name}: tools need a task in chat form, whose template writes them")
        self._task, self._problem = task, problem
        self._num_turns = self._num_calls = 0

    def start(self) -> Problem:
        return self._problem

    def step(self, text: str) -> Turn:
        self._num_turns += 1
        config = self._task.config
        content, calls = read_calls(
            text, format=config.format, has_reasoning=config.has_reasoning, first=self._num_calls
        )
        self._num_calls += len(calls)
        if not calls:
            score = self._task.task.score(self._problem, content)
            if not score.is_scored:
                raise EnvError(score.detail)
            return Turn(reward=score.value, is_done=True)
        if self._num_turns >= config.max_turns:
            return Turn(is_done=True, is_truncated=True)
        return Turn(messages=tuple(self._answer(call) for call in calls))

    def _answer(self, call: Call) -> Mapping[str, Any]:
        result = run_call(self._task.tools, call)
        return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result}


def read_calls(text: str, *, format: str, has_reasoning: bool = True, first: int = 0) -> tuple[str, list[Call]]:
    """(content without reasoning and calls, calls) of what the model wrote.

    Args:
        first: number of the first call's id.
    """
    reasoning = ReasoningSplitter(starts_inside="</think>" in text and "<think>" not in text) if has_reasoning else None
    parser = OutputParser(reasoning, tool_parser(format, call_id=lambda number: f"call_{first + number}"))
    content, calls = "", list[Call]()
    for event in [*parser.push(text), *parser.finish()]:
        if isinstance(event, ContentDelta):
            content += event.text
        elif isinstance(event, ToolCallStart):
            calls.append(Call(event.id, event.name, ""))
        elif isinstance(event, ToolArgumentsDelta):
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + event.text)
    return content, calls


def run_call(tools: Mapping[str, Callable[..., Any]], call: Call) -> str:
    """The tool's result as text, or what was wrong with the call, for the model to read."""
    if call.name not in tools:
        return f"Error: no tool is called {call.name!r}; there are {', '.join(tools)}"
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError) as error:
        return f"Error: the arguments are not JSON: {error}"
    if not isinstance(arguments, dict):
        return "Error: the arguments must be an object"
    try:
        inspect.signature(tools[call.name]).bind(**arguments)
    except TypeError as error:
        return f"Error: {error}"
    try:
        result = tools[call.name](**arguments)
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    except Exception as error:
        text = f"Error: {type(error).__name__}: {error}"
    return text if len(text) <= MAX_RESULT else f"{text[:MAX_RESULT]} [cut at {MAX_RESULT} characters]"


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """A function as a tool in OpenAI's form: name, first paragraph of the docstring, JSON schema of the parameters.

    Raises:
        ConfigError: a parameter without a type that JSON has.

    >>> def add(a: int, b: int = 1) -> int:
    ...     "Add two numbers."
    >>> tool_schema(add)["function"]["parameters"]["required"]
    ['a']
    """
    name = function.__name__
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise ConfigError(f"tool {name}: parameter {parameter.name!r} cannot be given by name")
        if parameter.name not in hints:
            raise ConfigError(
                f"tool {name}: parameter {parameter.name!r} has no type; annotate it, for example `: int`"
            )
        properties[parameter.name] = _schema(hints[parameter.name], f"tool {name}: parameter {parameter.name!r}")
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    description = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    if origin is Literal:
        return {"enum": list(parts)}
    if origin is list:
        return {"type": "array", "items": _schema(parts[0], where)}
    if origin is dict and parts[0] is str:
        return {"type": "object", "additionalProperties": _schema(parts[1], where)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(part, where) for part in parts]}
    raise ConfigError(
        f"{where} is of type {hint}; expected one that JSON has: str, int, float, bool, list, dict, Literal"
    )
