"""`lockstep chat`: a conversation in the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from lockstep.cli.generate import ModelArgs, SamplingArgs
from lockstep.core.errors import ConfigError, InputError
from lockstep.core.request import Request
from lockstep.engine.llm import LLM
from lockstep.tokenize.chat import ChatTemplate

HELP = "/reset forgets the conversation, /help shows this, /exit or ctrl-d ends; ctrl-c stops an answer"
ENDS, HELPS, RESETS = ("/exit", "/bye", "/quit"), ("/help", "/?"), ("/reset", "/clear")
"""With the words of other programs that people chat in."""


@dataclass(frozen=True)
class ChatArgs:
    """Talk to a model. When the input is not a terminal, every line of it is a turn and only answers are printed."""

    model: Annotated[str, tyro.conf.Positional]
    """A GGUF file, a Hugging Face folder, a name in the store, or a hub id."""
    system: str = ""
    """What the model is told first."""
    chat_template: str | None = None
    """Name of one of the model's templates or of a built-in one (chatml, llama-2, plain), or a template's text."""
    sampling: Annotated[SamplingArgs, tyro.conf.arg(name="")] = field(default_factory=SamplingArgs)
    held: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)


class Conversation:
    """The turns so far, and the model that answers.

    Args:
        llm: with a tokenizer.
        system: what every conversation begins with; empty for nothing.
    """

    def __init__(self, llm: LLM, template: ChatTemplate, sampling: SamplingArgs, system: str = "") -> None:
        self._llm = llm
        self._template = template
        self._sampling = sampling
        self._system = system
        self._num_turns = 0
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def answer(self, text: str) -> Iterator[str]:
        """Pieces of the answer as they come. An answer that is left early is kept as far as it came.

        Raises:
            InputError: the conversation no longer fits the context, or the template refuses it; the turn is forgotten.
        """
        tokenizer = self._llm.tokenizer
        assert tokenizer is not None
        self.messages.append({"role": "user", "content": text})
        self._num_turns += 1
        engine, said = self._llm.engine, ""
        request_id = f"chat-{self._num_turns}"
        try:
            prompt = tokenizer.encode(self._template.render(self.messages), add_special=False, parse_special=True)
            engine.add(Request(id=request_id, prompt=tuple(prompt), params=self._sampling.params()))
        except InputError:
            self.messages.pop()
            raise
        try:
            while engine.has_work:
                for output in engine.step():
                    said += output.text
                    if output.text:
                        yield output.text
        finally:
            engine.abort(request_id)
            engine.step()
            self.messages.append({"role": "assistant", "content": said})


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(ChatArgs, args=list(args), prog="lockstep chat")
    llm = wish.held.load(wish.model, max_sequences=1)
    if llm.tokenizer is None:
        raise ConfigError(f"{wish.model} has no tokenizer, so it cannot chat")
    template = ChatTemplate.of(llm.tokenizer, wish.chat_template)
    conversation = Conversation(llm, template, wish.sampling, wish.system)
    return talk(conversation, interactive=sys.stdin.isatty())


def talk(conversation: Conversation, *, interactive: bool) -> int:
    """Turns until the input ends."""
    if interactive:
        # Gives the line editor and its history to `input`.
        import readline  # noqa: F401

        print(HELP)
    for line in _lines(interactive):
        word = line.strip()
        if word in ENDS:
            break
        if word in RESETS:
            conversation.reset()
        elif word in HELPS:
            print(HELP)
        elif interactive and re.match(r"/[a-z]+( |$)", word):
            print(f"there is no command {word.split()[0]}: {HELP}")
        elif line.strip():
            _answer(conversation, line)
    return 0


def _lines(interactive: bool) -> Iterator[str]:
    while interactive:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
    yield from (line.rstrip("\n") for line in sys.stdin)


def _answer(conversation: Conversation, line: str) -> None:
    pieces = conversation.answer(line)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]  # a generator: what it said so far is kept
        print(" [stopped]", end="")
    except InputError as error:
        print(f"{error}; /reset begins anew", file=sys.stderr)
    print()
