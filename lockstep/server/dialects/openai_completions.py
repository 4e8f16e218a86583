"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from lockstep.core.request import Alternative, FinishReason
from lockstep.server.dialects.openai_chat import DONE
from lockstep.server.dialects.openai_envelope import usage
from lockstep.server.fields import Fields
from lockstep.server.generation import Choice, Job, Piece
from lockstep.server.service import LanguageService
from lockstep.server.stream import Exchange, data_frame
from lockstep.server.tokens import finite, read_prompts, token_text, version_runs
from lockstep.server.wishes import MAX_ALTERNATIVES, response_format, sampling_params

MAX_TOKENS = 16
"""The protocol's default."""


class Completion(Exchange):
    """One request, of one or several prompts."""

    def __init__(self, service: LanguageService, body: dict[str, Any]) -> None:
        fields = Fields(body)
        adapter = service.check_name(fields.text("model"))
        self._tokenizer = service.tokenizer
        special = fields.flag("add_special_tokens", True)
        prompts = tuple(
            service.encode(prompt, add_special=special) if isinstance(prompt, str) else prompt
            for prompt in read_prompts(fields, "prompt")
        )
        self._echo = fields.flag("echo")
        self._num_alternatives = fields.integer("logprobs", None, low=0, high=MAX_ALTERNATIVES)
        wanted = fields.integer("max_tokens", MAX_TOKENS, low=0)
        # Nothing is to be written, but the prompt is to be read: one token is drawn and dropped.
        self._drops = wanted == 0
        options = fields.section("stream_options") or Fields({})
        self.is_stream = fields.flag("stream")
        self._tells_versions = fields.flag("return_weight_versions")
        self._sends_usage = options.flag("include_usage")
        self._continuous = options.flag("continuous_usage_stats")
        scores = self._num_alternatives if self._echo else fields.integer("prompt_logprobs", None, low=0, high=64)
        self.job = Job(
            id="cmpl-" + secrets.token_hex(12),
            prompts=prompts,
            params=sampling_params(
                fields,
                max_tokens=max(wanted or 0, 1),
                stop=fields.texts("stop"),
                num_logprobs=self._num_alternatives or 0,
                prompt_logprobs=scores,
                grammar=response_format(fields),
            ),
            priority=fields.integer("priority", 0) or 0,
            cache_salt=fields.text("cache_salt", "") or "",
            adapter=adapter,
        )
        self._head = {
            "id": self.job.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": adapter or service.name,
        }
        self._seen: dict[int, Choice] = {}
        self._offsets: dict[int, int] = {}

    def whole(self, choices: list[Choice]) -> Any:
        documents = []
        for choice in choices:
            text = ("" if self._drops else choice.content) if not self._echo else self._echoed(choice)
            num = 0 if self._drops else len(choice.sample.tokens)
            logprobs = self._logprobs(choice, 0, num, with_prompt=self._echo)
            documents.append(self._choice(choice, text, _finish_reason(choice), logprobs))
        return {**self._head, "choices": documents, "usage": self._usage(choices)}

    def _echoed(self, choice: Choice) -> str:
        prompt = self._tokenizer.decode(choice.sample.prompt, skip_special=True)
        return prompt if self._drops else prompt + choice.content

    def piece(self, piece: Piece) -> Iterable[bytes]:
        choice = piece.choice
        if choice.index not in self._seen:
            self._seen[choice.index] = choice
            if self._echo:
                text = self._tokenizer.decode(choice.sample.prompt, skip_special=True)
                yield self._chunk(choice, text, None, self._logprobs(choice, 0, 0, with_prompt=True))
        text = "" if self._drops else "".join(event.text for event in piece.events)  # type: ignore[union-attr]
        wants = self._num_alternatives is not None and piece.end > piece.first and not self._drops
        logprobs = self._logprobs(choice, piece.first, piece.end, with_prompt=False) if wants else None
        if text or wants or piece.is_finished:
            yield self._chunk(choice, text, _finish_reason(choice) if piece.is_finished else None, logprobs)

    def end(self) -> Iterable[bytes]:
        if self._sends_usage:
            yield data_frame({**self._head, "choices": [], "usage": self._usage(list(self._seen.values()))})
        yield DONE

    def _usage(self, choices: list[Choice]) -> dict[str, Any]:
        count = usage(self.job, choices)
        if self._drops:
            count |= {"completion_tokens": 0, "total_tokens": count["prompt_tokens"]}
        return count

    def _choice(self, choice: Choice, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
        document = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        sample = choice.sample
        if self._tells_versions and reason is not None:
            document["weight_versions"] = version_runs(sample)
        if not self._echo and sample.prompt_logprobs and reason is not None:
            document["prompt_logprobs"] = [
                None if own is None else self._top(token, own, others)
                for token, own, others in zip(
                    sample.prompt, sample.prompt_logprobs, sample.prompt_alternatives, strict=True
                )
            ]
        return document

    def _chunk(self, choice: Choice, text: str, reason: str | None, logprobs: Any) -> bytes:
        document = {**self._head, "choices": [self._choice(choice, text, reason, logprobs)]}
        if self._sends_usage:
            document["usage"] = self._usage(list(self._seen.values())) if self._continuous else None
        return data_frame(document)

    def _logprobs(self, choice: Choice, first: int, end: int, *, with_prompt: bool) -> dict[str, Any] | None:
        if self._num_alternatives is None:
            return None
        sample = choice.sample
        entries: list[tuple[int, float | None, tuple[Alternative, ...]]] = []
        if with_prompt:
            entries += zip(sample.prompt, sample.prompt_logprobs, sample.prompt_alternatives, strict=True)
        for place in range(first, end):
            others = sample.alternatives[place] if sample.alternatives else ()
            entries.append((sample.tokens[place], sample.logprobs[place], others))
        tokens = [token_text(self._tokenizer, token) for token, _, _ in entries]
        offsets, offset = [], self._offsets.get(choice.index, 0)
        for text in tokens:
            offsets.append(offset)
            offset += len(text)
        self._offsets[choice.index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [None if own is None else finite(own) for _, own, _ in entries],
            "top_logprobs": [None if own is None else self._top(token, own, others) for token, own, others in entries],
            "text_offset": offsets,
        }

    def _top(self, token: int, own: float, others: tuple[Alternative, ...]) -> dict[str, float]:
        top = {token_text(self._tokenizer, other.token): finite(other.logprob) for other in others}
        top.setdefault(token_text(self._tokenizer, token), finite(own))
        return top


def _finish_reason(choice: Choice) -> str:
    return "length" if choice.sample.finish_reason is FinishReason.LENGTH else "stop"
