"""Weights on their way from the learner to the sampler, with a fingerprint that is checked on the way back.

    learner --deliver--> engine: version, digest of what it holds --> every token --> `check` before learning

The digest is computed from what the engine holds, never told to it: weights or an adapter that did not arrive show as the
old digest under the new version, and are an error before anything is learned from them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

from lockstep.core.digest import effective_digest
from lockstep.core.errors import WeightsError
from lockstep.core.request import WeightsVersion
from lockstep.core.trajectory import Trajectory
from lockstep.engine.engine import PauseMode
from lockstep.layers.low_rank import Adapter
from lockstep.models.dict_source import DictSource
from lockstep.models.digest import adapter_digest, weights_digest
from lockstep.models.families import build_model, family_of, hf_tensors
from lockstep.models.language import LanguageModel
from lockstep.models.weight_table import load_weights

LEARNED = "learned"
"""Name under which the engine has the adapter that is trained."""


class Publishes(Protocol):
    """What is told of new weights: an `Engine`, or a `Fleet` of them."""

    @property
    def weights(self) -> WeightsVersion:
        """Of the model, without adapters."""

    def publish(self, version: int, digest: str, *, mode: PauseMode = PauseMode.KEEP, adapter: str = "") -> bool:
        """See `Engine.publish`."""


@dataclass(frozen=True)
class Digests:
    """What an engine computes with."""

    base: str
    adapter: str = ""
    """Empty: there is none."""

    @property
    def effective(self) -> str:
        """Of both together."""
        return effective_digest(self.base, self.adapter) if self.adapter else self.base


class Delivery(ABC):
    """How weights get into the engine's model."""

    @abstractmethod
    def deliver(self) -> Digests:
        """Puts the learner's present weights where the engine computes. Returns the digests of what it now holds."""

    @abstractmethod
    def expected(self) -> Digests:
        """The digests that the engine must have after a delivery, from the learner's side alone."""


@final
class SharedWeights(Delivery):
    """The engine computes with the learner's own model: nothing is copied, and nothing can get lost on the way."""

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._digests = model, Digests("")

    def deliver(self) -> Digests:
        """Packs the new weights now, so that two threads need not do it at once later."""
        self._digests = Digests(weights_digest(self._model))
        return self._digests

    def expected(self) -> Digests:
        return self._digests


class Expectation:
    """The digest of a learner's weights as a model of another precision stores them.

    Args:
        learner: its float weights are read.
        config: config.json of both.
        dtype, group: of the other one.
    """

    def __init__(self, learner: LanguageModel, config: Mapping[str, Any], dtype: str, group: int) -> None:
        self._learner, self._config, self._dtype, self._group = learner, config, dtype, group
        self._twin: LanguageModel | None = None

    def digest(self) -> str:
        """Of the weights as they are now."""
        own = self._learner.precision
        if (own.compute, own.group) == (self._dtype, self._group):
            return weights_digest(self._learner)
        if self._twin is None:
            self._twin = build_model(self._config, 0, self._dtype, trainable=False, group=self._group)
        fill(self._twin, self._learner, self._config)
        return weights_digest(self._twin)


@final
class CopiedWeights(Delivery):
    """The engine has a model of its own, of another precision perhaps.

    Args:
        learner: its float weights are read.
        engine_model: of the same architecture, packed only.
        config: config.json of both.
    """

    def __init__(self, learner: LanguageModel, engine_model: LanguageModel, config: Mapping[str, Any]) -> None:
        self._learner, self._model, self._config = learner, engine_model, config
        precision = engine_model.precision
        self._expectation = Expectation(learner, config, precision.compute, precision.group)

    def deliver(self) -> Digests:
        fill(self._model, self._learner, self._config)
        return Digests(weights_digest(self._model))

    def expected(self) -> Digests:
        return Digests(self._expectation.digest())


@final
class LearnedAdapter(Delivery):
    """An adapter that is trained beside a frozen model, which is delivered once.

    Args:
        hand_over: brings the adapter to the engine, which has it under `LEARNED`; the digest of what that holds then.
        adapter: the learner's.
        base: delivers the model.
    """

    def __init__(self, hand_over: Callable[[], str], adapter: Adapter, base: Delivery) -> None:
        self._hand_over, self._adapter, self._base = hand_over, adapter, base
        self._delivered = self._expected = ""

    def deliver(self) -> Digests:
        if not self._delivered:
            self._delivered = self._base.deliver().base
            self._expected = self._base.expected().base
        return Digests(self._delivered, self._hand_over())

    def expected(self) -> Digests:
        return Digests(self._expected, adapter_digest(self._adapter))


def fill(model: LanguageModel, learner: LanguageModel, config: Mapping[str, Any]) -> None:
    """Writes the learner's weights into another model of the same architecture, rounded as that one stores them."""
    fill_from(model, DictSource(hf_tensors(learner, config), config), config)


def fill_from(model: LanguageModel, source: DictSource, config: Mapping[str, Any]) -> None:
    """Writes all of a model's weights, rounded as it stores them."""
    family = family_of(config)
    load_weights(model, family.table(family.read_config(config)), source)


class Publisher:
    """Gives out versions and remembers their digests.

    Args:
        engine: that samples.
        delivery: from the learner to it.
    """

    def __init__(self, engine: Publishes, delivery: Delivery) -> None:
        self._engine, self._delivery = engine, delivery
        self._current = engine.weights
        self._ledger: dict[int, str] = {}
        self.seconds = 0.0
        """That the last publication took."""

    @property
    def current(self) -> WeightsVersion:
        """What sampled tokens are told to come from."""
        return self._current

    def publish(self, version: int) -> WeightsVersion:
        """Delivers the learner's weights as this version; samples in flight go on with them.

        Raises:
            WeightsError: what the engine holds afterwards is not what the learner has.
        """
        began = time.perf_counter()
        served = self._delivery.deliver()
        expected = self._delivery.expected()
        if served != expected:
            raise WeightsError(
                f"version {version} did not arrive: the learner's weights have digest {expected.effective[:16]}, the sampler "
                f"holds {served.effective[:16]}; look at what delivers weights and adapters, then resume from the last "
                "checkpoint"
            )
        if not served.adapter or self._engine.weights.digest != served.base:
            self._engine.publish(version, served.base, mode=PauseMode.KEEP)
        if served.adapter:
            self._engine.publish(version, served.adapter, mode=PauseMode.KEEP, adapter=LEARNED)
        self._current = WeightsVersion(version, served.effective)
        self._ledger[version] = served.effective
        self.seconds = time.perf_counter() - began
        return self._current

    def publish_next(self) -> WeightsVersion:
        """`publish` of the version after the current one."""
        return self.publish(self.current.version + 1)

    def check(self, trajectories: Iterable[Trajectory], version: int, staleness: int) -> float:
        """Refuse samples of weights that were never published, or that are too old.

        Args:
            version: of the learner now.
            staleness: versions that a token may be behind.

        Returns:
            How many versions behind the sampled tokens are, on average.

        Raises:
            WeightsError: a token's digest is not that of its version, or its version is out of bounds.
        """
        behind = num = 0
        for trajectory in trajectories:
            for token, sampled, stamp in zip(
                trajectory.tokens, trajectory.is_sampled, trajectory.versions, strict=True
            ):
                if not sampled:
                    continue
                where = f"problem {trajectory.problem}, sample {trajectory.index}, token {token}"
                if stamp is None or self._ledger.get(stamp.version) != stamp.digest:
                    known = None if stamp is None else self._ledger.get(stamp.version)
                    raise WeightsError(
                        f"{where} was sampled by {stamp}; this run published that version with digest {known}: the "
                        "sample is not of this policy and cannot be learned from"
                    )
                if not version - staleness <= stamp.version <= version:
                    raise WeightsError(
                        f"{where} was sampled by version {stamp.version}; the learner is at {version} and staleness is "
                        f"{staleness}: expected {version - staleness} or newer"
                    )
                behind += version - stamp.version
                num += 1
        for old in [known for known in self._ledger if known < version - staleness - 1]:
            del self._ledger[old]
        return behind / num if num else 0.0
