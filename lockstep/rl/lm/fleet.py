"""Engines in processes of their own, used as one engine. `worker` has the other side and the messages.

    add      -> the worker that has the turns before this one, else the one with least to do
    step     <- samples that ended, from whoever has some; holds every worker to its deadline
    deliver  -> weights into shared memory, all workers read them; <- the digest that they hold
    publish  -> version and digest; a worker that holds another refuses it

Callers take turns (`Collector.weights`); the fleet has no thread. A worker that dies, or is silent for `worker_timeout_s` while
it has something to do, is killed and replaced; what it had not finished begins anew in another, and since sampling noise
belongs to the request, under the same weights it comes out the same.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, final

from torch import Tensor

from lockstep.core.child_process import ChildProcess, fresh_context
from lockstep.core.errors import WeightsError, WorkerError
from lockstep.core.request import Request, Sample, WeightsVersion
from lockstep.engine.config import EnginePlan
from lockstep.engine.emission import Output
from lockstep.engine.engine import PauseMode
from lockstep.layers.low_rank import Adapter
from lockstep.learn.adapter import AdapterConfig
from lockstep.learn.model import TrainedModel
from lockstep.models.families import hf_tensors
from lockstep.rl.lm.publish import LEARNED, Delivery, Digests, Expectation
from lockstep.rl.lm.rollout import RolloutConfig
from lockstep.rl.lm.worker import (
    ADD,
    FAILED,
    HELD,
    LOAD,
    PUBLISH,
    READY,
    SAMPLES,
    Part,
    TensorBlock,
    WorkerPlan,
    work,
)

MAX_FRUITLESS = 3
"""Times in a row that a worker may be lost without having finished a sample."""
MAX_LOSSES = 5
"""Times that one request may lose its worker."""
TURN_S = 0.02
"""How long a step waits for news at most: whoever wants to publish waits for it."""
_HOMES = 4096


@dataclass(slots=True)
class _Flight:
    """A request that is not finished."""

    ticket: int
    request: Request
    missing: dict[int, Sample]
    num_losses: int = 0


@dataclass(slots=True, eq=False)
class _Member:
    """The owner's side of one worker."""

    number: int
    child: ChildProcess
    since: float
    """When it was last heard, or first owed an answer."""
    is_ready: bool = False
    num_loading: int = 0
    """Parts that it was told to load and has not told the digest of."""
    held: dict[Part, str] = field(default_factory=dict)
    """Digests of what it holds."""
    served: dict[Part, WeightsVersion] = field(default_factory=dict)
    """What it was told is published."""
    aboard: dict[int, _Flight] = field(default_factory=dict)
    num_fruitless: int = 0
    """Workers of this number that were lost since one finished a sample."""

    @property
    def num_samples(self) -> int:
        return sum(len(flight.missing) for flight in self.aboard.values())

    def limit_s(self, config: RolloutConfig) -> float | None:
        """How long it may be silent; None: for ever, as it has nothing to do."""
        if not self.is_ready:
            return config.worker_start_s
        return config.worker_timeout_s if self.aboard or self.num_loading else None


@final
class FleetWeights(Delivery):
    """Workers have models of their own, of another precision perhaps."""

    def __init__(self, fleet: Fleet, made: TrainedModel) -> None:
        self._fleet, self._made = fleet, made
        self._expectation = Expectation(made.model, made.config, fleet.dtype, fleet.group)

    def deliver(self) -> Digests:
        return Digests(self._fleet.deliver("model", hf_tensors(self._made.model, self._made.config)))

    def expected(self) -> Digests:
        return Digests(self._expectation.digest())


@final
class Fleet:
    """An engine to `Rollouts` and to `Publisher`; whoever makes it closes it.

    Args:
        made: the learner's model; its weights are not read here.
        config: `workers` of it, and what each does.
        adapter: the learner's, which samples go through.
        lora: what it was built from.
        threads: of the kernels of each worker.
        on_event: told of each worker that was lost: (kind, what happened).
    """

    def __init__(
        self,
        made: TrainedModel,
        config: RolloutConfig,
        adapter: Adapter | None = None,
        lora: AdapterConfig | None = None,
        *,
        threads: int = 1,
        on_event: Callable[[str, str], None] = lambda kind, text: None,
    ) -> None:
        assert config.workers > 0
        precision = made.model.precision
        own = config.dtype == "learner"
        self.config, self.tokenizer, self._on_event = config, made.tokenizer, on_event
        self.dtype = precision.compute if own else config.dtype
        """Of the workers' matrices."""
        self.group = precision.group if own else 32
        """Columns that share a scale in them, where they are quantised."""
        self.adapters: Sequence[str] = (LEARNED,) if adapter is not None else ()
        self.weights = WeightsVersion(-1, "")
        self.num_lost = 0
        """Workers that were killed or died."""
        self._context = fresh_context("lockstep.rl.lm.worker")
        self._blocks: dict[Part, TensorBlock] = {
            "model": TensorBlock(self._context, hf_tensors(made.model, made.config))
        }
        if adapter is not None:
            self._blocks["adapter"] = TensorBlock(self._context, adapter.tensors())
        self._plan = WorkerPlan(
            config=made.config,
            dtype=self.dtype,
            group=self.group,
            tokenizer=made.tokenizer_folder,
            rollout=config,
            adapter=lora or AdapterConfig(),
            threads=threads,
            beat_s=min(1.0, config.worker_timeout_s / 4),
        )
        self._stamps: dict[Part, WeightsVersion | None] = {}
        """Of what was delivered, as it was published; None: not yet."""
        self._tickets = 0
        self._waiting: deque[_Flight] = deque()
        self._homes: OrderedDict[str, int] = OrderedDict()
        self._outbox: list[Output] = []
        self._engine_plan: EnginePlan | None = None
        self._members = [self._hire(number) for number in range(config.workers)]

    @property
    def plan(self) -> EnginePlan:
        """Of each worker's engine.

        Raises:
            WorkerError: no worker starts.
        """
        self._until(lambda: self._engine_plan is not None)
        assert self._engine_plan is not None
        return self._engine_plan

    def add(self, request: Request) -> list[Sample]:
        """Takes a request in, whose seed decides its samples. Those that are returned stay empty: `step` has the full ones.

        Turns of one episode have ids that begin alike, up to the first dot, and go where its earlier tokens are known.
        """
        assert request.params.seed is not None or request.params.temperature == 0.0
        samples = [
            Sample(request_id=request.id, index=index, prompt=request.prompt, seed=0)
            for index in range(request.params.n)
        ]
        self._tickets += 1
        self._place(_Flight(self._tickets, request, dict(enumerate(samples))))
        return samples

    def step(self) -> list[Output]:
        """Samples that ended, after a short wait at most.

        Raises:
            WorkerError: workers end again and again, or one failed in a way that others would too.
        """
        self._turn(TURN_S if not self._outbox else 0.0)
        outputs, self._outbox = self._outbox, []
        return outputs

    def deliver(self, part: Part, tensors: Mapping[str, Tensor]) -> str:
        """All workers load these numbers, and sample no further until `publish`. Returns the digest of what they hold.

        Raises:
            WeightsError: they do not hold the same.
            WorkerError: as `step`.
        """
        self._until(lambda: not any(member.num_loading for member in self._members))  # nobody reads while we write
        self._blocks[part].write(tensors)
        self._stamps[part] = None
        for member in list(self._members):
            if member.is_ready:
                self._load(member, part)
        self._until(
            lambda: (
                not any(member.num_loading for member in self._members)
                and any(part in member.held for member in self._members)
            )
        )
        found = {member.number: member.held[part] for member in self._members if part in member.held}
        digest = next(iter(found.values()))
        if any(other != digest for other in found.values()):
            raise WeightsError(f"rollout workers hold different weights after one delivery of the {part}: {found}")
        return digest

    def publish(self, version: int, digest: str, *, mode: PauseMode = PauseMode.KEEP, adapter: str = "") -> bool:
        """What was delivered is this version from now on; samples in flight go on with it. See `Engine.publish`."""
        assert mode is PauseMode.KEEP
        part: Part = "adapter" if adapter else "model"
        stamp = self._stamps[part] = WeightsVersion(version, digest)
        if part == "model":
            self.weights = stamp
        for member in list(self._members):
            if part in member.held:
                self._serve(member, part, stamp)
        self._send_waiting()
        return True

    def close(self) -> None:
        """Ends all workers. Idempotent."""
        while self._members:
            self._members.pop().child.kill()

    def _hire(self, number: int, num_fruitless: int = 0) -> _Member:
        child = ChildProcess(self._context, work, (self._plan, self._blocks))
        return _Member(number, child, time.monotonic(), num_fruitless=num_fruitless)

    def _place(self, flight: _Flight) -> None:
        """Hand a request to a worker, or keep it until one serves what is published."""
        serving = [m for m in self._members if m.served and m.served == self._stamps]
        if not serving:
            self._waiting.append(flight)
            return
        episode = flight.request.id.partition(".")[0]
        home = self._homes.get(episode)
        at_home = [member for member in serving if member.number == home]
        member = at_home[0] if at_home else min(serving, key=lambda one: (one.num_samples, one.number))
        self._homes[episode] = member.number
        while len(self._homes) > _HOMES:
            self._homes.popitem(last=False)
        if not member.aboard:
            member.since = time.monotonic()
        member.aboard[flight.ticket] = flight
        self._tell(member, ADD, flight.ticket, flight.request)

    def _send_waiting(self) -> None:
        for _ in range(len(self._waiting)):
            self._place(self._waiting.popleft())

    def _load(self, member: _Member, part: Part) -> None:
        if not member.num_loading:
            member.since = time.monotonic()
        member.num_loading += 1
        member.held.pop(part, None)
        member.served.pop(part, None)
        self._tell(member, LOAD, part)

    def _serve(self, member: _Member, part: Part, stamp: WeightsVersion) -> None:
        member.served[part] = stamp
        self._tell(member, PUBLISH, part, stamp.version, stamp.digest)

    def _tell(self, member: _Member, *message: Any) -> None:
        if member not in self._members:
            return  # it was lost a moment ago, with what it had aboard
        try:
            member.child.pipe.send(message)
        except OSError:
            self._lose(member, "ended or reads no more")

    def _until(self, is_done: Callable[[], bool]) -> None:
        """Take turns until something is so. The workers' deadlines are ours."""
        while not is_done():
            self._turn(1.0)

    def _turn(self, patience_s: float) -> None:
        """Read what has arrived, for which we wait so long, and hold workers to their deadlines."""
        pipes = {member.child.pipe: member for member in self._members}
        for pipe in wait(list(pipes), timeout=patience_s):
            self._read(pipes[pipe])  # type: ignore[index]
        now = time.monotonic()
        for member in list(self._members):
            limit_s = member.limit_s(self.config)
            if limit_s is None or now - member.since < limit_s:
                continue
            if member.child.pipe.poll():
                self._read(member)  # we were the late ones
            elif member.is_ready:
                self._lose(member, f"was silent for worker_timeout_s={limit_s:g} s")
            else:
                self._lose(member, f"did not start in worker_start_s={limit_s:g} s")

    def _read(self, member: _Member) -> None:
        """Take all that has arrived from a worker."""
        while member in self._members and member.child.pipe.poll():
            try:
                kind, *rest = member.child.pipe.recv()
            except (EOFError, OSError):
                self._lose(member, "ended", grace_s=1.0)
                return
            member.since = time.monotonic()
            self._take(member, kind, *rest)

    def _take(self, member: _Member, kind: str, *rest: Any) -> None:
        if kind == SAMPLES:
            for sample in rest[0]:
                self._land(member, sample)
        elif kind == HELD:
            self._hold(member, *rest)
        elif kind == READY:
            member.is_ready, self._engine_plan = True, rest[0]
            for part in self._stamps:
                self._load(member, part)
        else:
            assert kind == FAILED
            raise rest[0]

    def _hold(self, member: _Member, part: Part, digest: str) -> None:
        member.num_loading -= 1
        member.held[part] = digest
        stamp = self._stamps[part]
        if stamp is not None:  # a worker that came later
            self._serve(member, part, stamp)
            self._send_waiting()

    def _land(self, member: _Member, sample: Sample) -> None:
        flight = member.aboard.get(int(sample.request_id))
        if flight is None or flight.missing.pop(sample.index, None) is None:
            return  # it had ended already, before an earlier worker was lost
        member.num_fruitless = 0
        if not flight.missing:
            del member.aboard[flight.ticket]
        sample.request_id = flight.request.id
        self._outbox.append(Output(sample, 0, len(sample.tokens), sample.text, True))

    def _lose(self, member: _Member, why: str, grace_s: float = 0.0) -> None:
        """A worker is no more: another one in its place, its requests to whoever serves."""
        ending = member.child.kill(grace_s=grace_s)
        self.num_lost += 1
        place = self._members.index(member)
        num_fruitless = member.num_fruitless + 1
        flights = list(member.aboard.values())
        for flight in flights:
            flight.num_losses += 1
        told = f"rollout worker {member.number} (process {member.child.pid}) {why}: {ending}"
        self._on_event("worker_lost", f"{told}; {member.num_samples} samples begin anew, and so does the worker")
        unlucky = max(flights, key=lambda flight: flight.num_losses, default=None)
        if num_fruitless >= MAX_FRUITLESS:
            raise _too_often(told, f"{num_fruitless} times in a row such a worker finished no sample")
        if unlucky is not None and unlucky.num_losses >= MAX_LOSSES:
            raise _too_often(told, f"request {unlucky.request.id} was aboard {unlucky.num_losses} lost workers")
        self._members[place] = self._hire(member.number, num_fruitless)
        for flight in flights:
            self._place(flight)


def _too_often(told: str, count: str) -> WorkerError:
    return WorkerError(
        f"{told}; {count}. Too little memory (each worker has rollout.memory_mb and a copy of the weights), a "
        "worker_timeout_s too short for a step, a worker_start_s too short for a start, or a fault: rollout.workers=0 "
        "samples in the learner's process. The run resumes from its last checkpoint"
    )
