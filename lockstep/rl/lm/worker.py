"""A rollout worker: an engine in a process of its own. `Fleet` is the other side.

    fleet                                          worker
    -----                                          ------
    start, with a `WorkerPlan`                     builds model and engine,       -- (READY, engine's plan) -->
    -- (LOAD, part) -->                            takes the part from shared memory,
                                                                    -- (HELD, part, digest of what it holds) -->
    -- (PUBLISH, part, version, digest) -->        another digest than its own: an error; no step before it came
    -- (ADD, ticket, request) -->                  steps while it has work,       -- (SAMPLES, what ended) -->
    close the pipe                                 ends; so it does when the owner dies

SAMPLES goes out with nothing in it too, at least every `beat_s` while there is work: a worker that is silent hangs. What it
raises goes out as (FAILED, error), and is the run's error: another worker would raise the same.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.child_process import describe, settle
from lockstep.core.collector import collector_spared
from lockstep.core.errors import LockstepError, WeightsError, WorkerError
from lockstep.core.request import Request, Sample
from lockstep.learn.adapter import AdapterConfig
from lockstep.models.dict_source import DictSource
from lockstep.models.digest import adapter_digest, weights_digest
from lockstep.models.families import build_model
from lockstep.rl.lm.publish import LEARNED, fill_from
from lockstep.rl.lm.rollout import RolloutConfig, new_engine
from lockstep.tokenize.tokenizer import Tokenizer

Part = Literal["model", "adapter"]
READY, LOAD, HELD, PUBLISH, ADD, SAMPLES, FAILED = "ready", "load", "held", "publish", "add", "samples", "failed"
OWNER_GONE = (EOFError, BrokenPipeError, ConnectionResetError)


class TensorBlock:
    """Named tensors over one block of shared memory that has no name and is gone with its last user; travels to a child.

    Args:
        context: `fresh_context()`.
        tensors: their names, types and shapes are the block's for good; `write` puts numbers into it.
    """

    def __init__(self, context: Any, tensors: Mapping[str, Tensor]) -> None:
        self._layout: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        end = 0
        for name, tensor in tensors.items():
            self._layout[name] = tensor.dtype, tuple(tensor.shape), end
            end += (tensor.nbytes + 63) // 64 * 64
        self._memory = context.RawArray("b", max(end, 1))

    def tensors(self) -> dict[str, Tensor]:
        """Views of all of them."""
        return {
            name: torch.frombuffer(self._memory, dtype=dtype, count=torch.Size(shape).numel(), offset=start).view(shape)
            for name, (dtype, shape, start) in self._layout.items()
        }

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Numbers of all of them."""
        views = self.tensors()
        assert views.keys() == tensors.keys()
        for name, view in views.items():
            view.copy_(tensors[name].detach())


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """What a worker builds; its weights come later."""

    config: Mapping[str, Any]
    """config.json."""
    dtype: str
    """Of its matrices."""
    group: int
    """Columns that share a scale, where they are quantised."""
    tokenizer: Path
    """Folder."""
    rollout: RolloutConfig
    adapter: AdapterConfig
    threads: int
    """Of the kernels; the numbers do not depend on it."""
    beat_s: float
    """Longest silence of a worker that has work, but for a step of the engine (seconds)."""


def work(pipe: Connection, plan: WorkerPlan, blocks: Mapping[Part, TensorBlock]) -> None:
    """A worker's life."""
    settle()
    kernels.set_num_threads(plan.threads)
    with collector_spared():
        serve(pipe, plan, blocks)


def serve(pipe: Connection, plan: WorkerPlan, blocks: Mapping[Part, TensorBlock]) -> None:
    """Answers until the pipe closes or something is raised."""
    try:
        worker = _Worker(plan, blocks)
        pipe.send((READY, worker.engine.plan))
        last = time.monotonic()
        while True:
            while pipe.poll(0.0 if worker.steps else None):
                kind, *rest = pipe.recv()
                answer = worker.take(kind, *rest)
                if answer is not None:
                    pipe.send(answer)
                last = time.monotonic()
            ended = worker.step()
            if ended or time.monotonic() - last > plan.beat_s:
                pipe.send((SAMPLES, ended))
                last = time.monotonic()
    except OWNER_GONE:
        return
    except Exception as error:
        _tell(pipe, error)


def _tell(pipe: Connection, error: Exception) -> None:
    told = error if isinstance(error, LockstepError) else WorkerError(f"a rollout worker failed: {describe(error)}")
    try:
        pickle.loads(pickle.dumps(told))
    except Exception:
        told = WorkerError(f"a rollout worker failed: {describe(error)}")
    try:
        pipe.send((FAILED, told))
    except OWNER_GONE:
        return


class _Worker:
    """The engine, and which of its weights are not published yet."""

    def __init__(self, plan: WorkerPlan, blocks: Mapping[Part, TensorBlock]) -> None:
        self._config, self._blocks = plan.config, blocks
        self._model = build_model(plan.config, 0, plan.dtype, trainable=False, group=plan.group)
        self._adapter = plan.adapter.build(self._model, 0)
        tokenizer = Tokenizer.from_folder(plan.tokenizer)
        self.engine = new_engine(self._model, tokenizer, plan.rollout, self._adapter)
        self._held: dict[Part, str] = {}
        """Digests of what was loaded and is not published yet."""

    @property
    def steps(self) -> bool:
        """Whether there is work that may go on."""
        return not self._held and self.engine.has_work

    def take(self, kind: str, *rest: Any) -> tuple[Any, ...] | None:
        """Do what a message asks for; the answer, if it has one."""
        if kind == LOAD:
            return HELD, *self._load(*rest)
        if kind == PUBLISH:
            self._publish(*rest)
        else:
            assert kind == ADD
            self._add(*rest)
        return None

    def step(self) -> list[Sample]:
        """One step of the engine; the samples that ended, each under its ticket."""
        return [output.sample for output in self.engine.step() if output.is_finished]

    def _load(self, part: Part) -> tuple[Part, str]:
        # Copies: a table that is stored as it comes would otherwise change under the engine at the next delivery.
        tensors = {name: tensor.clone() for name, tensor in self._blocks[part].tensors().items()}
        if part == "model":
            fill_from(self._model, DictSource(tensors, self._config), self._config)
            self._held[part] = weights_digest(self._model)
        else:
            assert self._adapter is not None
            self._adapter.fill(tensors)
            self._held[part] = adapter_digest(self._adapter)
        return part, self._held[part]

    def _publish(self, part: Part, version: int, digest: str) -> None:
        held = self._held.pop(part, "")
        if held != digest:
            raise WeightsError(
                f"version {version} was published with digest {digest} of the {part}; this rollout worker holds {held}: "
                "nothing is sampled from it. Resume from the last checkpoint"
            )
        self.engine.publish(version, digest, adapter=LEARNED if part == "adapter" else "")

    def _add(self, ticket: int, request: Request) -> None:
        self.engine.add(replace(request, id=str(ticket)))
