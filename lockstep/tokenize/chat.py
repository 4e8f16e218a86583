"""Chat messages to a prompt, by the template that the model brings."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, final

from lockstep.core.errors import ConfigError, InputError, LockstepError
from lockstep.core.extras import require
from lockstep.tokenize import sandbox
from lockstep.tokenize.tokenizer import Tokenizer

Message = Mapping[str, Any]

# For models that bring no template. The forms are public facts; the texts are ours.
BUILT_IN = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama-2": (
        "{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\\n' ~ m.content ~ '\\n<</SYS>>\\n\\n' %}"
        "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ ns.system }}{{ m.content }} [/INST]{% set ns.system = '' %}"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "plain": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    ),
}
_END = "\ue000lockstep-end\ue000"  # marks the end of the last message while the template runs


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@final
class ChatTemplate:
    """One compiled template.

    Args:
        source: the jinja text, or the name of a built-in one: chatml, llama-2, plain.
        bos_token, eos_token, pad_token, unk_token: what the template may write by these names.

    Raises:
        ConfigError: the text is no template.
        MissingExtraError: jinja2 is not installed.

    >>> chat = ChatTemplate("plain")
    >>> chat.render([{"role": "user", "content": "Hi"}])
    'user: Hi\\nassistant:'
    """

    def __init__(
        self, source: str, *, bos_token: str = "", eos_token: str = "", pad_token: str = "", unk_token: str = ""
    ) -> None:
        self.source = BUILT_IN.get(source, source)
        self._tokens = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "pad_token": pad_token,
            "unk_token": unk_token,
        }
        jinja = require("jinja2", extra="lm")
        environment = sandbox.build_environment(_strftime_now)
        try:
            self._template = environment.from_string(self.source)
            self._wants_parts = _loops_over_content(environment.parse(self.source), jinja.nodes)
        except (jinja.TemplateError, RecursionError) as error:
            raise ConfigError(
                f"the chat template cannot be compiled: {error}; correct it, or choose a built-in one of "
                f"{', '.join(BUILT_IN)}"
            ) from error

    @classmethod
    def of(cls, tokenizer: Tokenizer, template: str | None = None) -> ChatTemplate:
        """The template of a tokenizer.

        Args:
            tokenizer: brings templates and the special tokens' texts.
            template: None for the tokenizer's own; else the name of one of its own or of a built-in one, or a text.

        Raises:
            ConfigError: the tokenizer has none and none was given.
        """
        own = tokenizer.chat_templates
        source = own.get("default" if template is None else template, template)
        if source is None:
            named = f" It has {', '.join(own)}." if own else ""
            raise ConfigError(
                f"this model brings no default chat template, so messages cannot become a prompt.{named} Choose one by "
                f"name ({', '.join([*own, *BUILT_IN])}), give its text, or send a plain prompt to completions"
            )
        if source == template and template not in BUILT_IN and "{" not in source:
            raise ConfigError(f"no chat template is called {template!r}; known: {', '.join([*own, *BUILT_IN])}")
        vocabulary = tokenizer.vocabulary
        return cls(
            source,
            bos_token=tokenizer.text_of(vocabulary.bos_id),
            eos_token=tokenizer.text_of(next(iter(vocabulary.eos_ids), None)),
            pad_token=tokenizer.text_of(vocabulary.pad_id),
            unk_token=tokenizer.text_of(vocabulary.unk_id),
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation; encode it with `add_special=False, parse_special=True`.

        Args:
            messages: `role`, `content` (text, parts of text, or None beside tool calls) and what else the template
                knows. Arguments of tool calls may be JSON text or objects. Nothing in them is changed.
            tools: functions offered, in OpenAI's form.
            documents: for templates that take documents.
            add_generation_prompt: end where the assistant begins to speak.
            continue_final_message: end inside the last message, to have it continued.
            extra: more variables for the template (`enable_thinking`).

        Raises:
            InputError: messages of a wrong form, or that the template refuses; a template that loops or grows without
                end, or touches what it must not.
        """
        if add_generation_prompt and continue_final_message:
            raise InputError(
                "add_generation_prompt starts a new message, continue_final_message goes on with the last; choose one",
                field="continue_final_message",
            )
        conversation = _normalised(messages, parts=self._wants_parts)
        if continue_final_message:
            _mark_end(conversation)
        variables = {
            **self._tokens,
            "messages": conversation,
            "tools": copy.deepcopy(list(tools)) if tools else None,
            "documents": copy.deepcopy(list(documents)) if documents else None,
            "add_generation_prompt": add_generation_prompt,
            **(extra or {}),
        }
        text = self._run(variables)
        if not continue_final_message:
            return text
        if _END not in text:
            raise InputError(
                "the template does not write the last message, so it cannot be continued", field="messages"
            )
        return text[: text.rindex(_END)]

    def _run(self, variables: dict[str, Any]) -> str:
        jinja = require("jinja2", extra="lm")
        security = require("jinja2.sandbox", extra="lm").SecurityError
        try:
            return sandbox.render(self._template, variables)
        except LockstepError:
            raise
        except security as error:
            raise InputError(
                f"the chat template does what the sandbox forbids: {error}", field="chat_template"
            ) from error
        except jinja.TemplateError as error:
            raise InputError(f"the chat template cannot render these messages: {error}", field="messages") from error
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, LookupError) as error:
            raise InputError(
                f"the chat template cannot render these messages: {type(error).__name__}: {error}", field="messages"
            ) from error
        except (RecursionError, MemoryError) as error:
            raise InputError(
                f"the chat template nests or grows too far: {type(error).__name__}", field="chat_template"
            ) from error


def _loops_over_content(tree: Any, nodes: Any) -> bool:
    """Whether the template walks over the parts of a message's content, and so wants a list."""
    for loop in tree.find_all(nodes.For):
        source = loop.iter.args[0] if isinstance(loop.iter, nodes.Call) and loop.iter.args else loop.iter
        while isinstance(source, nodes.Filter):
            source = source.node
        if isinstance(source, nodes.Getattr) and source.attr == "content":
            return True
        if isinstance(source, nodes.Getitem) and isinstance(source.arg, nodes.Const) and source.arg.value == "content":
            return True
    return False


def _normalised(messages: Sequence[Message], *, parts: bool) -> list[dict[str, Any]]:
    """A copy of the messages in the one form templates expect."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise InputError("messages must be a list of one or more objects", field="messages")
    return [_message(message, f"messages[{number}]", parts) for number, message in enumerate(messages)]


def _message(message: Message, where: str, parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {type(message).__name__}; expected an object", field=where)
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise InputError(
            f"{where}.role is {message.get('role')!r}; expected a text such as 'user'", field=f"{where}.role"
        )
    result = copy.deepcopy(dict(message))
    if result.get("tool_calls"):
        result["tool_calls"] = [_tool_call(call, f"{where}.tool_calls") for call in result["tool_calls"]]
    content = result.get("content")
    if content is None:
        # Templates that know tool calls look for them first; all others would write the word None.
        if not result.get("tool_calls"):
            result["content"] = ""
    elif isinstance(content, list):
        texts = [_part_text(part, f"{where}.content[{number}]") for number, part in enumerate(content)]
        result["content"] = [{"type": "text", "text": text} for text in texts] if parts else "\n".join(texts)
    elif not isinstance(content, str):
        raise InputError(f"{where}.content is {type(content).__name__}; expected text or a list of parts", field=where)
    return result


_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in _TEXT_PARTS or not isinstance(part, Mapping):
        raise InputError(f"{where} is of type {str(kind)[:80]!r}; this model reads text parts only", field=where)
    name = "refusal" if kind == "refusal" else "text"
    if not isinstance(part.get(name), str):
        raise InputError(f"{where}.{name} is {type(part.get(name)).__name__}; expected a text", field=where)
    return str(part[name])


def _tool_call(call: Any, where: str) -> Any:
    """Clients send arguments as JSON text; templates write them as an object."""
    if not isinstance(call, Mapping):
        raise InputError(f"{where} holds {type(call).__name__}; expected objects", field=where)
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: the arguments are not JSON: {error}", field=where) from error
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_end(conversation: list[dict[str, Any]]) -> None:
    content = conversation[-1].get("content")
    if isinstance(content, list) and content:
        content[-1]["text"] += _END
    elif isinstance(content, str):
        conversation[-1]["content"] = content + _END
    else:
        raise InputError("the last message has no text to continue", field="messages")
