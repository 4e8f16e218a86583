"""The next turn of a conversation as tokens behind those that are there: never a token that came before is touched.

Rendering the whole conversation anew, as a server does, may change what the model saw when it sampled: templates strip the
thinking of earlier turns or trim text, and text encoded anew may be cut into other tokens. So only what the template
writes between the end of the assistant's words and where it speaks again is rendered, and appended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

from lockstep.core.errors import ConfigError, InputError
from lockstep.tokenize.chat import ChatTemplate, Message
from lockstep.tokenize.tokenizer import Tokenizer

_MARK = "\ue000lockstep-turn\ue000"
_QUESTION = {"role": "user", "content": "question"}
_PLAIN = "word"
_THOUGHT = "<think>\nthought\n</think>\n\nword"


@final
class Turns:
    """Prompts and their continuations for one template and tokenizer.

    Args:
        chat: the template.
        tokenizer: of the same model.
        on_rewrite: what to do with a template that would render earlier turns differently later (Qwen3 strips their
            thinking): "append" leaves them as they were sampled, "refuse" raises.
        extra: more variables for the template, the same at each turn.

    Raises:
        ConfigError: the template rewrites history and `on_rewrite` is "refuse", or it does not write the assistant's
            words once and whole.
    """

    def __init__(
        self,
        chat: ChatTemplate,
        tokenizer: Tokenizer,
        *,
        on_rewrite: Literal["append", "refuse"] = "append",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._chat, self._tokenizer, self._extra = chat, tokenizer, dict(extra or {})
        self.rewrites = rewrites_history(chat, extra=self._extra)
        """How the template would change earlier turns; empty if it does not."""
        if self.rewrites and on_rewrite == "refuse":
            raise ConfigError(
                f"the chat template {self.rewrites}, so a later prompt does not begin with what the model saw; use "
                "on_rewrite='append' to keep earlier turns as they were sampled, or another template"
            )

    def first(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The prompt's tokens, up to where the assistant begins to speak."""
        text = self._chat.render(messages, tools=tools or None, extra=self._extra)
        return self._tokenizer.encode(text, add_special=False, parse_special=True)

    def next(self, sampled: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """The tokens to append after an assistant's turn.

        Args:
            sampled: the turn's tokens as sampled, with or without the token that ended it.
            messages: what others say before the assistant speaks again; at least one, none of the assistant's.

        Raises:
            InputError: messages of a wrong form, or that the template refuses.
        """
        text = turn_suffix(self._chat, messages, extra=self._extra)
        # The template writes the token that ends the turn; the model has written it, unless it was cut off.
        if sampled and self._tokenizer.is_special(sampled[-1]):
            end = self._tokenizer.token_bytes(sampled[-1]).decode("utf-8", errors="replace")
            if text.lstrip().startswith(end):
                text = text.lstrip().removeprefix(end)
        return self._tokenizer.encode(text, add_special=False, parse_special=True)


def turn_suffix(chat: ChatTemplate, messages: Sequence[Message], *, extra: Mapping[str, Any] | None = None) -> str:
    """What a template writes from the end of the assistant's words to where it speaks again.

    Raises:
        InputError: no messages, or one of the assistant's among them.
        ConfigError: the template does not write the assistant's words once and whole.

    >>> turn_suffix(ChatTemplate("plain"), [{"role": "user", "content": "And?"}])
    '\\nuser: And?\\nassistant:'
    """
    if not messages or any(message.get("role") == "assistant" for message in messages):
        raise InputError("the turns of others must be one or more messages, none of the assistant's", field="messages")
    text = chat.render([_QUESTION, {"role": "assistant", "content": _MARK}, *messages], extra=extra)
    _, mark, after = text.partition(_MARK)
    if not mark or _MARK in after:
        raise ConfigError(
            "the chat template does not write the assistant's message once and whole, so a turn cannot be appended to it"
        )
    return after


def rewrites_history(chat: ChatTemplate, *, extra: Mapping[str, Any] | None = None) -> str:
    """How a template changes an assistant's turn once others have spoken; empty if it leaves it as it was.

    Blank space before the words is none: where a prompt ends without it, the model writes it.
    """
    opening = chat.render([_QUESTION], extra=extra)
    following = {"role": "user", "content": "another"}
    suffix = turn_suffix(chat, [following], extra=extra)
    for words, what in ((_PLAIN, "changes earlier turns"), (_THOUGHT, "changes the thinking of earlier turns")):
        text = chat.render([_QUESTION, {"role": "assistant", "content": words}, following], extra=extra)
        if not text.startswith(opening) or text.removeprefix(opening).lstrip() != words + suffix:
            return what
    return ""
