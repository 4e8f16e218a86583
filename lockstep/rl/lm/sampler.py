"""The engine that samples for a learner, and what delivers weights to it."""

from __future__ import annotations

from lockstep.engine.engine import Engine
from lockstep.layers.low_rank import Adapter
from lockstep.learn.model import TrainedModel
from lockstep.models.families import build_model
from lockstep.rl.lm.publish import CopiedWeights, Delivery, LearnedAdapter, Publisher, SharedWeights
from lockstep.rl.lm.rollout import RolloutConfig, new_engine


def new_sampler(made: TrainedModel, config: RolloutConfig, adapter: Adapter | None) -> tuple[Engine, Publisher]:
    """It computes with the learner's own matrices, or with a copy of `config.dtype`; through the adapter where there is one."""
    model = made.model
    if config.dtype != "learner":
        model = build_model(made.config, 0, config.dtype, trainable=False)
    engine = new_engine(model, made.tokenizer, config, adapter)
    delivery: Delivery
    delivery = SharedWeights(model) if model is made.model else CopiedWeights(made.model, model, made.config)
    if adapter is not None:
        delivery = LearnedAdapter(engine, adapter, delivery)
    return engine, Publisher(engine, delivery)
