"""From a request to sequences that this engine is able to finish."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from lockstep.core.batch import PAGE
from lockstep.core.errors import InputError
from lockstep.core.request import Request, Sample
from lockstep.core.sampling import GrammarKind
from lockstep.engine.adapters import AdapterTable
from lockstep.engine.beams import Beams
from lockstep.engine.config import EnginePlan
from lockstep.engine.emission import TextStream
from lockstep.engine.guides import Guide, Guides
from lockstep.engine.queue import Sequence, sample_seed
from lockstep.engine.ranking import BestOf
from lockstep.engine.shaping import Shaper, bad_sequences, check_tokens
from lockstep.tokenize.grammar import GrammarSpec
from lockstep.tokenize.tokenizer import Tokenizer

_GRAMMAR_KINDS = {
    GrammarKind.JSON_SCHEMA: "json_schema",
    GrammarKind.JSON_OBJECT: "json_object",
    GrammarKind.REGEX: "regex",
    GrammarKind.CHOICE: "choices",
    GrammarKind.LARK: "grammar",
}


class Admission:
    """Checks requests and makes their sequences.

    Args:
        model_context: positions the model knows; the plan's context may be less.
        tokenizer: None: ids only.
        adapters: those that requests may name.
        guides: of structured output.
    """

    def __init__(
        self,
        plan: EnginePlan,
        vocab_size: int,
        model_context: int,
        tokenizer: Tokenizer | None,
        adapters: AdapterTable,
        guides: Guides,
    ) -> None:
        self._plan = plan
        self._adapters = adapters
        self._vocab_size = vocab_size
        self._model_context = model_context
        self._tokenizer = tokenizer
        self._guides = guides
        self._seeds = random.Random(plan.seed)

    def sequences(self, request: Request, order: Callable[[int, int], tuple[int, int, int]]) -> list[Sequence]:
        """One for each of the n samples, or the more that they are chosen from.

        Args:
            order: place in line by priority and index.

        Raises:
            InputError: it could never be served; `field` names the part, the message has the numbers.
        """
        params = request.params
        bad = self._bad_sequences(params.bad_words)
        max_tokens = self._check(request, bad)
        adapter = self._adapters.get(request.adapter) if request.adapter else None
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(62)
        scores: list[float | None] = [] if params.prompt_logprobs is None else [None]
        score_alternatives: list[tuple] = [] if params.prompt_logprobs is None else [()]
        sequences: list[Sequence] = []
        for index in range(params.num_sequences):
            sample = Sample(request_id=request.id, index=index, prompt=request.prompt, seed=sample_seed(seed, index))
            sample.prompt_logprobs, sample.prompt_alternatives = scores, score_alternatives
            sequence = Sequence(request, sample, order(request.priority, index), max_tokens)
            sequence.adapter = adapter
            sequence.leader = sequences[0] if sequences and not params.beam_width else None
            if self._tokenizer is not None:
                sequence.text = TextStream(self._tokenizer, params)
            guide = self._guide(sequence, sequences)
            if guide is not None or Shaper.is_needed(params):
                eos_ids = self._plan.eos_token_ids
                sequence.shaper = Shaper(params, request.prompt, self._vocab_size, eos_ids, guide, bad)
            sequences.append(sequence)
        self._rank(request, sequences)
        return sequences

    def _rank(self, request: Request, sequences: list[Sequence]) -> None:
        """Who chooses among them, where a request asks for fewer samples than run."""
        params, seed = request.params, sequences[0].sample.seed
        if params.beam_width:
            eos = () if params.ignore_eos else self._plan.eos_token_ids
            tokenizer = self._tokenizer
            reader = None if tokenizer is None else partial(TextStream, tokenizer, params)
            beams = Beams(request, seed, sequences, frozenset({*eos, *params.stop_token_ids}), reader)
            for sequence in sequences:
                sequence.ranking = sequence.beams = beams
        elif params.num_sequences > params.n:
            ranking = BestOf(request, seed)
            for sequence in sequences:
                sequence.ranking = ranking

    def _bad_sequences(self, words: tuple[str, ...]) -> list[tuple[int, ...]]:
        if words and self._tokenizer is None:
            raise InputError("bad_words need a tokenizer; this engine serves ids: use bad_token_ids", field="bad_words")
        return bad_sequences(words, self._tokenizer) if self._tokenizer is not None else []

    def _check(self, request: Request, bad: list[tuple[int, ...]]) -> int:
        """The most tokens that a sample may have."""
        params, plan, num_prompt = request.params, self._plan, len(request.prompt)
        if num_prompt == 0:
            raise InputError("the prompt has no tokens; expected at least one", field="prompt")
        for token in (min(request.prompt), max(request.prompt)):
            if not 0 <= token < self._vocab_size:
                raise InputError(f"the prompt has token {token}; expected 0 <= id < {self._vocab_size}", field="prompt")
        if params.stop and self._tokenizer is None:
            raise InputError("stop strings need a tokenizer; this engine serves ids: use stop_token_ids", field="stop")
        most = plan.max_context - num_prompt
        if most < 1 or (params.max_tokens or 0) > most:
            # Clients that shorten a conversation by themselves look for these very words.
            known = f"this model's maximum context length is {plan.max_context} tokens"
            if most < 1:
                known = f"prompt is too long: {num_prompt} tokens > {plan.max_context} maximum; {known}"
            raise InputError(
                f"{known}, of prompt and text together; got a prompt of {num_prompt} and max_tokens={params.max_tokens} (model "
                f"{self._model_context}, cache {plan.num_pages} pages of {PAGE}): shorten either",
                field="max_tokens" if most >= 1 else "prompt",
            )
        if params.min_tokens > most:
            raise InputError(
                f"a prompt of {num_prompt} tokens and min_tokens={params.min_tokens}; the context has room for {most} more",
                field="min_tokens",
            )
        if max(params.num_logprobs, params.prompt_logprobs or 0) > self._vocab_size:
            raise InputError(f"more alternatives wanted than {self._vocab_size} tokens there are", field="num_logprobs")
        if params.num_sequences > plan.max_queue:
            raise InputError(
                f"{params.num_sequences} samples (n, best_of or beam_width); the queue holds max_queue={plan.max_queue}",
                field="n",
            )
        if params.beam_width > plan.max_sequences:
            raise InputError(
                f"beam_width={params.beam_width}; {plan.max_sequences} sequences run at the same time: use that or less",
                field="beam_width",
            )
        if params.grammar is not None and self._tokenizer is None:
            raise InputError("a grammar needs a tokenizer; this engine serves ids", field="grammar")
        check_tokens(params, self._vocab_size, plan.eos_token_ids, bad)
        return params.max_tokens or most

    def _guide(self, sequence: Sequence, earlier: list[Sequence]) -> Guide | None:
        """Of a sample; those of one request share a grammar's process."""
        grammar = sequence.request.params.grammar
        if grammar is None:
            return None
        if earlier:
            first = earlier[0].shaper
            assert first is not None
            assert first.guide is not None
            return first.guide.copy()
        return self._guides.open(GrammarSpec(_GRAMMAR_KINDS[grammar.kind], grammar.text), sequence.order)
