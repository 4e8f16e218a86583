"""Episodes from an engine: groups of samples, one group a problem.

    collect(groups) -> add requests -> engine.step ... -> an episode of several turns goes on as a new request whose
    prompt is all of its tokens so far -> verdicts of the verifier -> groups, in the order asked for

Sampling noise is keyed by (run seed, group, sample, turn): a group's texts do not depend on what else is in flight.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lockstep.core.errors import ConfigError, InputError
from lockstep.core.request import FinishReason, Request, Sample, WeightsVersion
from lockstep.core.sampling import SamplingParams
from lockstep.core.trajectory import Problem, Score, Trajectory
from lockstep.engine.config import EngineConfig, EnginePlan
from lockstep.engine.emission import Output
from lockstep.engine.engine import Engine
from lockstep.envs.lm.task import EpisodeTask, Task, Turn
from lockstep.envs.lm.verify import VerifierPool
from lockstep.layers.low_rank import Adapter
from lockstep.learn.logprobs import Truncation
from lockstep.models.language import LanguageModel
from lockstep.rl.lm.problems import AnyTask
from lockstep.rl.lm.publish import LEARNED, Publishes
from lockstep.tokenize.chat import ChatTemplate
from lockstep.tokenize.tokenizer import Tokenizer
from lockstep.tokenize.turns import Turns

RolloutDtype = Literal["learner", "bf16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How texts are sampled for learning."""

    groups: int = 16
    """Problems of an update."""
    group_size: int = 8
    """Samples of each problem."""
    max_tokens: int = 64
    """Tokens that the model may write in a turn."""
    max_turns: int = 8
    """Turns of an episode, where the task has several."""
    temperature: float = 1.0
    """Of sampling; the learner's log-probabilities are of the same distribution."""
    top_p: float = 1.0
    """Nucleus sampling (1: all tokens)."""
    top_k: int = 0
    """Most probable tokens kept (0: all)."""
    min_p: float = 0.0
    """Least probability relative to the largest (0: all)."""
    greedy_baseline: bool = False
    """Also take each problem's greedy answer (ReMax)."""
    max_sequences: int = 256
    """Samples that run at the same time."""
    memory_mb: int = 512
    """Memory of keys and values, MB."""
    dtype: RolloutDtype = "learner"
    """Of the sampler's matrices. learner: it computes with the learner's own, exactly; bf16, int8 and int4 are copies, whose
    log-probabilities differ, so that `learn.loss.correction` must weigh the samples and `learn.exact` cannot be."""
    workers: int = 0
    """Processes that sample, each with an engine, `memory_mb` and a copy of the weights of its own (0: sample in the
    learner's process). One that dies or hangs is replaced, and its samples begin anew; texts do not depend on how many."""
    worker_timeout_s: float = 120.0
    """Silence after which a worker hangs: a step of its engine must fit, and the loading of weights (seconds)."""
    worker_start_s: float = 300.0
    """Deadline for a worker to start (seconds)."""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.worker_timeout_s <= 0 or self.worker_start_s <= 0:
            raise ConfigError(
                f"rollout.workers={self.workers}, worker_timeout_s={self.worker_timeout_s}, worker_start_s="
                f"{self.worker_start_s}; expected 0 or more workers, and seconds above 0"
            )

    @property
    def step_tokens(self) -> int:
        """Tokens of a step of the engine: all texts, and room for prompts."""
        return 2 * self.max_sequences + 512

    @property
    def truncation(self) -> Truncation | None:
        """Which tokens may be drawn, as the learner takes it; None: all."""
        return Truncation.of(SamplingParams(top_p=self.top_p, top_k=self.top_k, min_p=self.min_p))


@dataclass(kw_only=True)
class Group:
    """Samples of one problem."""

    number: int
    """Which group of the run."""
    problem: Problem
    trajectories: list[Trajectory]
    """None where the prompt leaves no room for an answer."""
    baseline: Trajectory | None = None
    """The greedy answer, where an algorithm subtracts its reward."""


@dataclass
class RolloutStats:
    """Of one collection; beside a learner, of what was done since the batch before was taken."""

    seconds: float = 0.0
    """In which samples were drawn and judged, without waiting for weights."""
    verify_seconds: float = 0.0
    num_sampled: int = 0
    num_prompt_tokens: int = 0
    num_cached: int = 0
    """Prompt tokens that came from the prefix cache."""


@dataclass(slots=True)
class _Flight:
    """A sample in the air: its trajectory, and what an episode of several turns has come to."""

    trajectory: Trajectory
    problem: Problem
    group: int
    texts: list[str] = field(default_factory=list)
    """What the model wrote, turn by turn."""
    is_cut: bool = False
    """The last of them ended at the limit of tokens."""
    reward: float = 0.0
    """Of the turns so far."""


@dataclass(slots=True)
class _Pending:
    """A group that is being sampled."""

    problem: Problem
    num_open: int
    trajectories: list[Trajectory] = field(default_factory=list)


class Sampler(Publishes, Protocol):
    """What samples: an `Engine` in this process, or a `Fleet` of them in others."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the model."""

    @property
    def plan(self) -> EnginePlan:
        """Limits of context."""

    @property
    def adapters(self) -> Container[object]:
        """Names that requests may give."""

    def add(self, request: Request) -> list[Sample]:
        """See `Engine.add`."""

    def step(self) -> list[Output]:
        """See `Engine.step`; of a fleet, what has arrived from it."""


class Rollouts:
    """Samples groups by an engine that nobody else steps.

    Args:
        engine: with a tokenizer.
        task: judges what is written, or plays episodes of several turns.
        problem: of a group, by its number.
        verifier: processes that run the task's verifier, and its episodes.
        seed: of the run.
    """

    def __init__(
        self,
        engine: Sampler,
        task: AnyTask,
        problem: Callable[[int], Problem],
        verifier: VerifierPool,
        config: RolloutConfig,
        seed: int,
    ) -> None:
        assert engine.tokenizer is not None
        self.engine, self.task, self.verifier, self.config = engine, task, verifier, config
        self._problem = problem
        self.stats = RolloutStats()
        self.prompts = PromptEncoder(engine.tokenizer)
        self._seed = seed
        self._adapter = LEARNED if LEARNED in engine.adapters else ""
        self._flights: dict[tuple[str, int], _Flight] = {}
        self._pending: dict[int, _Pending] = {}
        self._done: dict[int, Group] = {}

    def start(self, number: int) -> None:
        """Begins a group; `advance` moves it."""
        problem, config = self._problem(number), self.config
        prompt = self.prompts.first(problem)
        if len(prompt) + config.max_tokens > self.engine.plan.max_context:
            self._done[number] = Group(number=number, problem=problem, trajectories=[])
            return
        params = self._params(number, n=config.group_size)
        request = Request(id=f"g{number}", prompt=prompt, params=params, adapter=self._adapter)
        self._pending[number] = _Pending(problem, config.group_size + config.greedy_baseline)
        samples = self.engine.add(request)
        if config.greedy_baseline:
            greedy = self._params(number, config.group_size)
            samples += self.engine.add(
                Request(id=f"g{number}.greedy", prompt=prompt, params=greedy, adapter=self._adapter)
            )
        for place, sample in enumerate(samples):
            trajectory = Trajectory(
                problem=problem.index,
                index=place,
                tokens=list(prompt),
                is_sampled=[False] * len(prompt),
                logprobs=[0.0] * len(prompt),
                sampling_logprobs=[0.0] * len(prompt),
                versions=[None] * len(prompt),
            )
            self._flights[sample.request_id, sample.index] = _Flight(trajectory, problem, number)
        self.stats.num_prompt_tokens += len(prompt) * config.group_size

    def advance(self) -> None:
        """One step of the engine for all groups in flight; groups that end are scored."""
        landed = []
        for output in self.engine.step():
            if output.is_finished:
                flight = self._flights.pop((output.sample.request_id, output.sample.index))
                self._append(flight, output.sample)
                landed.append((flight, output.sample))
        if isinstance(self.task, EpisodeTask):
            landed = self._play(self.task, landed)
        ended: list[int] = []
        for flight, _ in landed:
            flight.trajectory.is_truncated |= flight.is_cut
            pending = self._pending[flight.group]
            pending.trajectories.append(flight.trajectory)
            pending.num_open -= 1
            if pending.num_open == 0:
                ended.append(flight.group)
        if ended:
            self._score(ended)

    def pop(self, number: int) -> Group | None:
        """A finished group, once; None while it is still sampled."""
        return self._done.pop(number, None)

    def collect(self, numbers: Iterable[int]) -> list[Group]:
        """Samples these groups to their end. Statistics are of this call."""
        began, self.stats = time.perf_counter(), RolloutStats()
        wanted = list(numbers)
        for number in wanted:
            self.start(number)
        while any(number not in self._done for number in wanted):
            self.advance()
        self.stats.seconds = time.perf_counter() - began
        return [self._done.pop(number) for number in wanted]

    def _append(self, flight: _Flight, sample: Sample) -> None:
        """What was sampled joins the trajectory."""
        if sample.finish_reason is FinishReason.ERROR:
            raise InputError(f"sampling failed on problem {flight.problem.index}: {sample.error}")
        trajectory, num = flight.trajectory, len(sample.tokens)
        trajectory.tokens += sample.tokens
        trajectory.is_sampled += [True] * num
        trajectory.logprobs += sample.logprobs
        trajectory.sampling_logprobs += sample.sampling_logprobs
        trajectory.versions += sample.versions
        trajectory.text = sample.text
        self.stats.num_sampled += num
        self.stats.num_cached += sample.num_cached
        flight.texts.append(sample.text)
        trajectory.num_turns = len(flight.texts)
        flight.is_cut = sample.finish_reason is FinishReason.LENGTH

    def _play(self, task: EpisodeTask, landed: Sequence[tuple[_Flight, Sample]]) -> list[tuple[_Flight, Sample]]:
        """A turn of episodes, by the verifier's processes: the environments answer, and samples go on as new requests.
        Returns those that are over; one whose environment raised or hung is, and has no reward."""
        if not landed:
            return []
        began = time.perf_counter()
        turns = self.verifier.step_all(task, [(flight.problem.index, tuple(flight.texts)) for flight, _ in landed])
        self.stats.verify_seconds += time.perf_counter() - began
        return [(f, s) for (f, s), turn in zip(landed, turns, strict=True) if not self._goes_on(f, s, turn)]

    def _goes_on(self, flight: _Flight, sample: Sample, turn: Turn | Score) -> bool:
        trajectory = flight.trajectory
        if isinstance(turn, Score):
            trajectory.score = turn
            return False
        flight.reward += turn.reward
        if turn.is_done or flight.is_cut or len(flight.texts) >= self.config.max_turns:
            trajectory.is_truncated = turn.is_truncated or not turn.is_done
            trajectory.score = Score.of(flight.reward)
            return False
        suffix = self.prompts.more(sample.tokens, turn)
        if len(trajectory.tokens) + len(suffix) + self.config.max_tokens > self.engine.plan.max_context:
            trajectory.is_truncated = True
            trajectory.score = Score.of(flight.reward)
            return False
        trajectory.tokens += suffix
        trajectory.is_sampled += [False] * len(suffix)
        trajectory.logprobs += [0.0] * len(suffix)
        trajectory.sampling_logprobs += [0.0] * len(suffix)
        trajectory.versions += [None] * len(suffix)
        request = Request(
            id=f"g{flight.group}.{trajectory.index}.{len(flight.texts)}",
            prompt=tuple(trajectory.tokens),
            params=self._params(flight.group, trajectory.index, len(flight.texts)),
            adapter=self._adapter,
        )
        self.engine.add(request)
        self._flights[request.id, 0] = flight
        return True

    def _score(self, numbers: list[int]) -> None:
        began = time.perf_counter()
        groups = []
        for number in numbers:
            pending = self._pending.pop(number)
            trajectories = sorted(pending.trajectories, key=lambda one: one.index)
            baseline = trajectories.pop() if self.config.greedy_baseline else None
            groups.append(Group(number=number, problem=pending.problem, trajectories=trajectories, baseline=baseline))
        everyone = [(g.problem, one) for g in groups for one in (*g.trajectories, g.baseline) if one is not None]
        waiting = [(problem, one) for problem, one in everyone if one.score is None]
        if waiting:
            assert isinstance(self.task, Task)
            scores = self.verifier.score_all(self.task, [(problem, one.text) for problem, one in waiting])
            for (_, one), score in zip(waiting, scores, strict=True):
                one.score = score
        for group in groups:
            self._done[group.number] = group
        self.stats.verify_seconds += time.perf_counter() - began

    def _params(self, number: int, index: int = 0, turn: int = 0, n: int = 1) -> SamplingParams:
        config = self.config
        if index == config.group_size:  # the baseline, at every turn of an episode
            return SamplingParams(max_tokens=config.max_tokens, temperature=0.0)
        return SamplingParams(
            n=n,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            seed=noise_seed(self._seed, number, index, turn),
        )


def new_engine(
    model: LanguageModel, tokenizer: Tokenizer, config: RolloutConfig, adapter: Adapter | None = None
) -> Engine:
    """An engine for rollouts, with the adapter that samples go through; what it holds is yet to be published."""
    engine = Engine(
        model,
        tokenizer,
        EngineConfig(max_sequences=config.max_sequences, max_queue=1 << 30, max_step_tokens=config.step_tokens),
        memory_bytes=config.memory_mb << 20,
        weights=WeightsVersion(-1, ""),
    )
    if adapter is not None:
        engine.adapters.load(LEARNED, adapter, WeightsVersion(-1, ""))
    return engine


class PromptEncoder:
    """Problems and turns as token ids, append-only.

    Args:
        tokenizer: its chat template renders messages; plain prompts need none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._chat = ChatTemplate.of(tokenizer) if tokenizer.chat_template() is not None else None
        self._turns: Turns | None = None

    def first(self, asked: Problem) -> tuple[int, ...]:
        """Ids of what the model is asked first."""
        if asked.messages is None:
            assert asked.prompt is not None
            return tuple(self._tokenizer.encode(asked.prompt, add_special=True, parse_special=False))
        if self._chat is None:
            raise ConfigError(
                "the task asks in messages and the model has no chat template; give it one, or plain prompts"
            )
        text = self._chat.render(asked.messages, tools=asked.tools or None)
        return tuple(self._tokenizer.encode(text, add_special=False, parse_special=True))

    def more(self, sampled: Sequence[int], turn: Turn) -> list[int]:
        """Ids to append after what the model wrote last: the turn's text, or what the template writes around its messages.
        Tokens that are there stay, whatever the template would make of earlier turns now.

        Raises:
            ConfigError: messages and no chat template, or one that messages cannot be appended to.
        """
        if turn.text or not turn.messages:
            return self._tokenizer.encode(turn.text, add_special=False, parse_special=False)
        if self._turns is None:
            if self._chat is None:
                raise ConfigError(
                    "the task answers in messages and the model has no chat template; give it one, or a task of plain texts"
                )
            self._turns = Turns(self._chat, self._tokenizer)
        return self._turns.next(sampled, turn.messages)


def noise_seed(seed: int, group: int, index: int, turn: int) -> int:
    """Seed of a request's sampling noise."""
    digest = hashlib.blake2b(f"{seed}/{group}/{index}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
