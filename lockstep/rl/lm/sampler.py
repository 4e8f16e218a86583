"""What samples for a learner, an engine or several in processes, and what delivers weights to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from lockstep.engine.engine import Engine
from lockstep.layers.low_rank import Adapter
from lockstep.learn.adapter import AdapterConfig
from lockstep.learn.model import TrainedModel
from lockstep.models.digest import adapter_digest
from lockstep.models.families import build_model
from lockstep.rl.lm.fleet import Fleet, FleetWeights
from lockstep.rl.lm.publish import LEARNED, CopiedWeights, Delivery, LearnedAdapter, Publisher, SharedWeights
from lockstep.rl.lm.rollout import RolloutConfig, Sampler, new_engine


@contextmanager
def new_sampler(
    made: TrainedModel,
    config: RolloutConfig,
    adapter: Adapter | None,
    lora: AdapterConfig | None = None,
    *,
    threads: int = 1,
    on_event: Callable[[str, str], None] = lambda kind, text: None,
) -> Iterator[tuple[Sampler, Publisher]]:
    """It computes with the learner's own matrices, or with copies, of `config.dtype` or in `config.workers` processes;
    through the adapter where there is one.

    Args:
        adapter: of the learner.
        lora: what it was built from; workers build theirs alike.
        threads, on_event: see `Fleet`.
    """
    delivery: Delivery
    if config.workers:
        with closing(Fleet(made, config, adapter, lora, threads=threads, on_event=on_event)) as fleet:
            delivery = FleetWeights(fleet, made)
            if adapter is not None:
                delivery = LearnedAdapter(lambda: fleet.deliver("adapter", adapter.tensors()), adapter, delivery)
            yield fleet, Publisher(fleet, delivery)
        return
    model = made.model
    if config.dtype != "learner":
        model = build_model(made.config, 0, config.dtype, trainable=False)
    engine = new_engine(model, made.tokenizer, config, adapter)
    delivery = SharedWeights(model) if model is made.model else CopiedWeights(made.model, model, made.config)
    if adapter is not None:
        delivery = LearnedAdapter(lambda: adapter_digest(_held(engine)), adapter, delivery)
    yield engine, Publisher(engine, delivery)


def _held(engine: Engine) -> Adapter:
    held = engine.adapters.get(LEARNED).adapter
    assert isinstance(held, Adapter)
    return held
