"""Weights on their way from the learner to the sampler, with a fingerprint that is checked on the way back.

    learner --deliver--> engine: version, digest of what it holds --> every token --> `check` before learning

The digest is computed from what the engine holds, never told to it: weights or an adapter that did not arrive show as the
old digest under the new version, and are an error before anything is learned from them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, final

from lockstep.core.errors import WeightsError
from lockstep.core.request import WeightsVersion
from lockstep.core.trajectory import Trajectory
from lockstep.engine.engine import Engine, PauseMode
from lockstep.models.dict_source import DictSource
from lockstep.models.digest import weights_digest
from lockstep.models.families import build_model, family_of, hf_tensors
from lockstep.models.language import LanguageModel
from lockstep.models.weight_table import load_weights


class Delivery(ABC):
    """How weights get into the engine's model."""

    @abstractmethod
    def deliver(self) -> str:
        """Puts the learner's present weights where the engine computes. Returns the digest of what it now holds."""

    @abstractmethod
    def expected(self) -> str:
        """The digest that the engine must hold after a delivery, from the learner's side alone."""


@final
class SharedWeights(Delivery):
    """The engine computes with the learner's own model: nothing is copied, and nothing can get lost on the way."""

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._digest = model, ""

    def deliver(self) -> str:
        """Packs the new weights now, so that two threads need not do it at once later."""
        self._digest = weights_digest(self._model)
        return self._digest

    def expected(self) -> str:
        return self._digest


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

    def deliver(self) -> str:
        fill(self._model, self._learner, self._config)
        return weights_digest(self._model)

    def expected(self) -> str:
        precision = self._model.precision
        twin = build_model(self._config, 0, precision.compute, trainable=False, group=precision.group)
        fill(twin, self._learner, self._config)
        return weights_digest(twin)


def fill(model: LanguageModel, learner: LanguageModel, config: Mapping[str, Any]) -> None:
    """Writes the learner's weights into another model of the same architecture, rounded as that one stores them."""
    family = family_of(config)
    source = DictSource(hf_tensors(learner, config), config)
    load_weights(model, family.table(family.read_config(config)), source)


class Publisher:
    """Gives out versions and remembers their digests.

    Args:
        engine: that samples.
        delivery: from the learner to it.
    """

    def __init__(self, engine: Engine, delivery: Delivery) -> None:
        self._engine, self._delivery = engine, delivery
        self._ledger: dict[int, str] = {}
        self.seconds = 0.0
        """That the last publication took."""

    @property
    def current(self) -> WeightsVersion:
        return self._engine.weights

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
                f"version {version} did not arrive: the learner's weights have digest {expected[:16]}, the sampler holds "
                f"{served[:16]}; look at what delivers weights and adapters, then resume from the last checkpoint"
            )
        self._engine.publish(version, served, mode=PauseMode.KEEP)
        self._ledger[version] = served
        self.seconds = time.perf_counter() - began
        return self._engine.weights

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
