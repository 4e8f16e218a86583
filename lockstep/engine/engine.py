"""The engine: requests in, tokens out, one step at a time. It has no thread; the loop is the caller's:

    while engine.has_work:
        for output in engine.step():
            ...

A step is `Scheduler.plan_step` (-> `Drafter.run`) -> `Runner.run` -> `Sampler.draw` -> `Emitter.take`, with `Structured.ask`
before and `Structured.hear` after: what the grammars of structured output, which run beside it, have to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import torch

from lockstep.core.errors import ConfigError, InputError, ServingError
from lockstep.core.request import Request, Sample, WeightsVersion
from lockstep.engine.adapters import AdapterTable, LoadedAdapter, served_weights
from lockstep.engine.admission import Admission
from lockstep.engine.config import EngineConfig, EnginePlan, resolve
from lockstep.engine.drafting import Drafter
from lockstep.engine.emission import Emitter, Output
from lockstep.engine.guides import GRACE_S
from lockstep.engine.queue import Sequence, State
from lockstep.engine.runner import Runner, ServedModel
from lockstep.engine.sampler import Draws, Sampler
from lockstep.engine.scheduler import Counters, Scheduler, Work
from lockstep.engine.scoring import score_prompts
from lockstep.engine.speculation import Speculator, learn
from lockstep.engine.structured import Structured, guides_of
from lockstep.tokenize.nursery import Hosts
from lockstep.tokenize.tokenizer import Tokenizer

IDLE_WAIT_S = 0.05
"""How long a step waits that has nothing to do until a grammar answers; commands to the engine wait so long too."""


class PauseMode(Enum):
    """What happens to samples that have begun when weights change or the engine pauses."""

    ABORT = "abort"
    WAIT = "wait"
    """They end first; nobody else begins meanwhile."""
    KEEP = "keep"
    """They go on where they are. After new weights their old keys stay: such a sample is of several versions, as its
    `versions` say."""
    RECOMPUTE = "recompute"
    """They go on, and the keys of what they have so far are computed anew."""


class Gate(Enum):
    """What `step` may do."""

    OPEN = "open"
    DRAINING = "draining"
    PAUSED = "paused"
    ASLEEP = "asleep"


@dataclass(frozen=True)
class _Publication:
    weights: WeightsVersion
    update: Callable[[], None] | None
    adapter: LoadedAdapter | None


def replace_model(engine: Engine, model: ServedModel) -> None:
    """Serve this one, which has the same sizes, from the next step on; `Engine.publish` calls it as its `update`."""
    engine.model = engine._runner.model = model


class Engine:
    """Serves one model.

    Args:
        model: a `LanguageModel`.
        tokenizer: None serves ids only: no text, no stop strings.
        draft: a smaller model of the same vocabulary that guesses ahead; texts are the same with and without it. An
            `update` of `publish` may change its weights too.
        memory_bytes: for keys and values, where the config names no number of pages.
        weights: version and digest of what the model holds now.
        hosts: where the grammars of structured output run; None: in processes forked from a `Nursery` of our own.
    """

    def __init__(
        self,
        model: ServedModel,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        draft: ServedModel | None = None,
        memory_bytes: int = 1 << 30,
        weights: WeightsVersion = WeightsVersion(0, ""),  # noqa: B008  (frozen)
        hosts: Hosts | None = None,
    ) -> None:
        eos_ids = tokenizer.eos_ids if tokenizer is not None else ()
        self.plan: EnginePlan = resolve(config or EngineConfig(), model, memory_bytes, eos_ids, draft)
        self.model = model
        self.tokenizer = tokenizer
        self.weights = weights
        self.gate = Gate.OPEN
        self.scheduler = Scheduler(self.plan)
        self.scheduler.version = weights.version
        self.adapters = AdapterTable()
        """Low-rank adapters that requests may name; loaded and unloaded between two steps."""
        guides = guides_of(self.plan, model.vocab_size, tokenizer, hosts)
        self._admission = Admission(self.plan, model.vocab_size, model.max_context, tokenizer, self.adapters, guides)
        self._runner = Runner(model, self.plan, self.scheduler.table)
        self._sampler = Sampler(self.plan.max_sequences)
        self._speculator = Speculator(self.plan.max_draft_tokens, has_draft=draft is not None)
        self._drafter: Drafter | None = None
        if draft is not None:
            self._drafter = Drafter(
                draft, self.plan, model.vocab_size, self.scheduler.table, self._sampler, self.scheduler.counters
            )
        self._emitter = Emitter(self.plan.eos_token_ids)
        self._structured = Structured(guides, self._emitter, self.scheduler)
        self.scheduler.copy_pages = self._runner.copy_pages
        self._live: dict[str, list[Sequence]] = {}
        self._outbox: list[Output] = []
        self._pending: _Publication | None = None

    @property
    def counters(self) -> Counters:
        return self.scheduler.counters

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        if self._outbox:
            return True
        return self.gate in (Gate.OPEN, Gate.DRAINING) and bool(self._live or self._pending is not None)

    @property
    def num_unfinished(self) -> int:
        """Samples that run or wait."""
        return len(self.scheduler.running) + len(self.scheduler.waiting)

    def add(self, request: Request) -> list[Sample]:
        """Takes a request in. Returns its n samples, which grow as the engine steps.

        Raises:
            InputError: nothing that this engine could ever do; the message has the numbers.
            ServingError: too many wait.
        """
        if request.id in self._live:
            raise InputError(f"request id {request.id!r} is in use; ids of running requests must differ", field="id")
        sequences = self._admission.sequences(request, self.scheduler.next_order)
        try:
            self.scheduler.submit(sequences)
        except ServingError:
            self._structured.close(sequences)
            raise
        self._live[request.id] = sequences
        self._structured.add(sequences)
        ranking = sequences[0].ranking
        return ranking.results if ranking is not None else [sequence.sample for sequence in sequences]

    @torch.no_grad()
    def step(self) -> list[Output]:
        """Runs one forward pass at most. Returns what it added, with what ended since the last step. Where nothing can be
        done before a grammar has answered, it waits for that, a moment at most."""
        outputs, self._outbox = self._outbox, []
        if self.gate is Gate.DRAINING:
            self._end_draining()
        if self.gate in (Gate.PAUSED, Gate.ASLEEP):
            return outputs
        self._conclude(self._structured.hear(outputs, 0.0), outputs)
        works = self.scheduler.plan_step(self._speculator)
        if not works:
            if self._structured.is_waiting:
                self._conclude(self._structured.hear(outputs, IDLE_WAIT_S, idle=True), outputs)
            else:
                assert self.gate is Gate.DRAINING or not self._live, "sequences wait and none can run"
            return outputs
        if self._drafter is not None:
            self._drafter.run(works)
        self._structured.ask(works)
        hidden_RE, gathered = self._runner.run(works)
        counters = self.counters
        counters.num_steps += 1
        counters.num_computed_tokens += sum(work.count + len(work.drafts) for work in works)
        if gathered.scored:
            score_prompts(self.model, hidden_RE, gathered)
            hidden_RE = hidden_RE[gathered.draw_rows]
        hidden_RE = self._structured.leave_out_late(works, gathered, hidden_RE)
        if gathered.draws:
            draws = self._sampler.draw(self.model.logits(hidden_RE), gathered.draws)
            self._deliver(works, draws, outputs)
        for work in works:
            if not work.draws and work.sequence.state is State.RUNNING:
                self.scheduler.advance(work.sequence, work.sequence.num_computed + work.count)
        self._settle_beams(outputs)
        self._conclude(self._structured.hear(outputs, GRACE_S), outputs)
        return outputs

    def abort(self, request_id: str) -> bool:
        """Ends all samples of a request at once; their pages are free when this returns. The next step reports them.

        Returns:
            False when the request is unknown or has ended.
        """
        sequences = self._live.pop(request_id, None)
        if sequences is None:
            return False
        for sequence in sequences:
            if sequence.state is not State.FINISHED:
                self.scheduler.finish(sequence)
                if sequence.ranking is None:
                    self._outbox.append(self._emitter.abort(sequence))
        if sequences[0].ranking is not None:
            self._outbox += sequences[0].ranking.abort()
        self._structured.close(sequences)
        return True

    def publish(
        self,
        version: int,
        digest: str,
        *,
        mode: PauseMode = PauseMode.KEEP,
        update: Callable[[], None] | None = None,
        adapter: str = "",
    ) -> bool:
        """The model holds other weights from now on. No prefix computed with the old ones is used again.

        Args:
            version: higher than the current one.
            digest: of the model, or of the adapter alone; a token's is of what was effectively served.
            adapter: the name of one whose numbers changed in place, rather than the model's; empty: the model's.
            mode: what happens to samples that have begun.
            update: puts the weights into the model, called when the mode allows; None: they are in it already.

        Returns:
            True when done; False under WAIT while samples still run: the step after the last of them does it.

        Raises:
            ConfigError: a version that is not higher, or an earlier publication or pause still waits.
        """
        loaded = self.adapters.get(adapter) if adapter else None
        before = self.weights if loaded is None else loaded.weights
        if version <= before.version:
            raise ConfigError(f"version {version} was published after {before.version}; versions must rise")
        if self.gate is Gate.DRAINING:
            raise ConfigError("the engine still drains for an earlier publish or pause; step until it is done")
        publication = _Publication(WeightsVersion(version, digest), update, loaded)
        if mode is PauseMode.WAIT and self._has_started():
            if self.gate is not Gate.OPEN:
                raise ConfigError(f"the engine is {self.gate.value}: samples cannot end; use another mode, or resume")
            self._pending = publication
            self.gate, self.scheduler.only_started = Gate.DRAINING, True
            return False
        self._stop_running(mode)
        self._apply(publication)
        return True

    def pause(self, mode: PauseMode = PauseMode.KEEP) -> bool:
        """Steps do nothing until `resume`. Requests may still come.

        Returns:
            True when paused; False under WAIT while samples still run.
        """
        if self.gate is not Gate.OPEN:
            raise ConfigError(f"the engine is {self.gate.value}; only an open one can be paused")
        if mode is PauseMode.WAIT and self._has_started():
            self.gate, self.scheduler.only_started = Gate.DRAINING, True
            return False
        self._stop_running(mode)
        self.gate = Gate.PAUSED
        return True

    def sleep(self) -> None:
        """Gives the memory of keys and values back. Samples keep their tokens and go on after `wake`."""
        if self.gate is Gate.DRAINING:
            raise ConfigError("the engine drains; step until it is done, then let it sleep")
        self._stop_running(PauseMode.RECOMPUTE)
        self.scheduler.tree.flush()
        self._runner.sleep()
        if self._drafter is not None:
            self._drafter.sleep()
        self.gate = Gate.ASLEEP

    def resume(self) -> None:
        """After `pause`, or `sleep`: the memory is taken again if need be, and steps run."""
        if self.gate not in (Gate.PAUSED, Gate.ASLEEP):
            raise ConfigError(f"the engine is {self.gate.value}; only a paused or sleeping one can be resumed")
        self._runner.wake()
        if self._drafter is not None:
            self._drafter.wake()
        self.gate = Gate.OPEN

    def flush_prefixes(self) -> None:
        """Forgets the prefix cache."""
        self.scheduler.set_version(self.weights.version)

    def audit(self) -> list[str]:
        """What does not add up between pages, tree, slots and requests, in words; empty when all is well.

        O(pages): for idle moments and tests.
        """
        found = self.scheduler.audit()
        live = [s for group in self._live.values() for s in group if s.state is not State.FINISHED]
        if len(live) != self.num_unfinished:
            found.append(f"{len(live)} unfinished samples of live requests, {self.num_unfinished} scheduled")
        return found

    def _deliver(self, works: list[Work], draws: Draws, outputs: list[Output]) -> None:
        """Appends the tokens drawn: a guess that was drawn makes the next row's token valid too."""
        row = 0
        for work in works:
            if not work.draws:
                continue
            sequence, drafts = work.sequence, work.drafts
            weights = served_weights(self.weights, sequence.adapter)
            if sequence.beams is not None:
                if row in draws.errors:
                    sequence.beams.fail(draws.errors[row])
                sequence.beams.offer(sequence, draws.candidates.get(row, []), weights)
                self.scheduler.advance(sequence, len(sequence.tokens))
                row += 1
                continue
            sample, num_known, first, text, right = sequence.sample, len(sequence.tokens), sequence.num_generated, "", 0
            while True:
                if row + right in draws.errors:
                    text += self._emitter.fail(sequence, draws.errors[row + right])
                    break
                token = draws.tokens[row + right]
                logprobs = draws.logprobs[row + right], draws.sampling_logprobs[row + right]
                text += self._emitter.take(sequence, token, logprobs, draws.alternatives[row + right], weights)
                if sample.is_finished or right == len(drafts) or drafts[right] != token:
                    break
                right += 1
            row += len(drafts) + 1
            num_new = len(sequence.tokens) - num_known
            if drafts:
                self.counters.num_draft_tokens += len(drafts)
                self.counters.num_accepted_tokens += right
                learn(sequence, len(drafts), right)
                # Keys of guesses that were wrong are not the text's.
                sequence.num_drafted = min(sequence.num_drafted, num_known + right)
            self.counters.num_generated_tokens += num_new
            self.scheduler.advance(sequence, num_known + right)
            if sequence.ranking is None:
                outputs.append(Output(sample, first, num_new, text, sample.is_finished))
            if sample.is_finished:
                self.scheduler.finish(sequence)
                self._conclude([sequence.request.id], outputs)

    def _settle_beams(self, outputs: list[Output]) -> None:
        for request_id, sequences in list(self._live.items()):
            beams = sequences[0].beams
            if beams is not None:
                self.counters.num_generated_tokens += beams.settle(self.scheduler)
                if beams.has_ended:
                    self._conclude([request_id], outputs)

    def _conclude(self, request_ids: Iterable[str], outputs: list[Output]) -> None:
        """Forgets those requests whose sequences have all ended."""
        for request_id in request_ids:
            group = self._live.get(request_id, [])
            if group and all(sequence.state is State.FINISHED for sequence in group):
                del self._live[request_id]
                if group[0].ranking is not None:
                    outputs += group[0].ranking.conclude(group)
                self._structured.close(group)

    def _has_started(self) -> bool:
        return bool(self.scheduler.running) or any(sequence.started for sequence in self.scheduler.waiting)

    def _stop_running(self, mode: PauseMode) -> None:
        if mode is PauseMode.ABORT:
            for request_id in list(self._live):
                self.abort(request_id)
        elif mode is PauseMode.RECOMPUTE:
            for sequence in reversed(self.scheduler.running[:]):
                self.scheduler.preempt(sequence)

    def _end_draining(self) -> None:
        if self._has_started():
            return
        self.scheduler.only_started = False
        self.gate = Gate.PAUSED
        if self._pending is not None:
            publication, self._pending = self._pending, None
            self.gate = Gate.OPEN
            self._apply(publication)

    def _apply(self, publication: _Publication) -> None:
        if publication.update is not None:
            publication.update()
        if publication.adapter is not None:
            publication.adapter.weights = publication.weights
        else:
            self.weights = publication.weights
        self.scheduler.set_version(self.weights.version)
