"""Group-relative policy optimisation (Shao et al. 2024) and its kin: every algorithm of `ALGORITHMS` is this loop with
another advantage, ratio, clip and aggregation.

    roll out -> score -> advantages -> pack -> step -> publish

With `staleness` 0 these follow each other; above it the roll-out of later batches runs beside them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import partial

from lockstep import kernels
from lockstep.core.collector import collector_spared
from lockstep.core.errors import ConfigError
from lockstep.core.state import Stateful
from lockstep.envs.lm.make import TaskConfig, make_tasks
from lockstep.envs.lm.verify import VerifierConfig, VerifierPool
from lockstep.learn.adapter import AdapterConfig, write_weights
from lockstep.learn.heads import ScalarHead
from lockstep.learn.learner import Learner, LearnerConfig, Weights, evaluated, written
from lockstep.learn.model import ModelConfig
from lockstep.learn.session import Result, Scores, Session, UpdatesConfig
from lockstep.rl.lm.batch import LearnConfig, Update, make_batch
from lockstep.rl.lm.collector import Collector
from lockstep.rl.lm.conflicts import check_advantage, check_lengths, check_prompts, check_sampler
from lockstep.rl.lm.course import Course, told
from lockstep.rl.lm.evaluate import EvaluationConfig, evaluate
from lockstep.rl.lm.problems import ProblemSource, reading
from lockstep.rl.lm.report import alarms, readable, rollout_metrics, shown
from lockstep.rl.lm.rollout import PromptEncoder, RolloutConfig, Rollouts
from lockstep.rl.lm.sampler import new_sampler
from lockstep.rl.lm.start import StartConfig, supervised_start
from lockstep.rl.lm.teacher import TeacherConfig, build_student, reference_examples
from lockstep.rl.lm.threads import ThreadShare

TOKENIZER_PROBLEMS = 2000
"""Problems whose texts a new tokenizer is learned from."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Reinforcement of a language model; with PPO's composition (`ALGORITHMS["ppo"]`) a value head learns along."""

    task: TaskConfig = field(default_factory=TaskConfig)
    """What it learns to do."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank adapter that is trained in its stead."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """A model that it learns from."""
    start: StartConfig = field(default_factory=StartConfig)
    """Supervised start."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling."""
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    """Processes that score."""
    learn: LearnConfig = field(default_factory=LearnConfig)
    """Algorithm, minibatches, exactness."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Optimiser."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation."""
    run: UpdatesConfig = field(default_factory=UpdatesConfig)
    """Length, seed, outputs."""
    staleness: int = 0
    """Versions that a token may be behind the learner when it is learned from; 0: synchronous, exactly on-policy."""

    def check(self) -> None:
        """Refuse settings that make no sense together.

        Raises:
            ConfigError: names both settings.
        """
        self.teacher.check(self.learn.loss)
        check_advantage(self.learn, self.rollout)
        check_sampler(self.learn, self.rollout)
        if self.staleness < 0:
            raise ConfigError(f"staleness={self.staleness}; expected 0 (synchronous) or more")
        self.start.learner.optimiser.ending(self.start.steps)
        self.learner.optimiser.ending(self.num_steps)

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.run.total_steps * self.learn.num_steps


def train(config: GRPOConfig, session: Session) -> Result:
    """Roll out, score, turn scores into advantages, take gradient steps, publish the weights; repeat."""
    config.check()
    threads = ThreadShare.of(config.run.threads, config.rollout.workers, config.staleness)
    kernels.set_num_threads(threads.all)
    folder = session.directory.path / "tokenizer" if session.directory else None
    task, held_out = make_tasks(config.task)
    config.evaluation.check(held_out)
    source = ProblemSource(task, session.seed, config.task.curriculum.first if config.task.levels else 0)
    course = Course(task, config.task, source, config.rollout.groups, config.staleness)
    texts = (reading(source.training(number)) for number in range(TOKENIZER_PROBLEMS))
    teacher = config.teacher.open()
    made = build_student(config.model, texts, session.seed, folder, teacher)
    model, tokenizer = made.model, made.tokenizer
    check_lengths(config.rollout, model.max_context)
    num_groups = config.run.total_steps * config.rollout.groups
    check_prompts(task, source, PromptEncoder(tokenizer), num_groups, config.rollout, model.max_context)
    if not session.restores:
        supervised_start(model, tokenizer, source, config.start, session.note)
    loss = config.learn.loss
    heads = {"value": ScalarHead(model.facts.width)} if loss.advantage == "gae" else {}
    adapter = config.adapter.build(model, session.seed)
    learner = Learner(model, config.learner, adapter=adapter, heads=heads, total_steps=config.num_steps)
    # What a KL penalty pulls to: the model as reinforcement found it, and as every resumed process must find it again. Of an
    # adapter that is the model itself.
    reference = None
    if loss.kl.coef > 0.0:
        reference = model if adapter is not None else copy.deepcopy(model).requires_grad_(False)
    frozen = model if adapter is not None else reference
    sampler = new_sampler(made, config.rollout, adapter, config.adapter, threads=threads.worker, on_event=session.event)
    with VerifierPool(config.verifier) as verifier, sampler as (engine, publisher):
        rollouts = Rollouts(engine, task, course.problem, verifier, config.rollout, session.seed)
        parts: dict[str, Stateful | None] = {"learner": learner, "frozen": frozen, "teacher": teacher}
        parts["course"] = course if course.has_levels else None
        write_model = written(learner, partial(write_weights, made))
        session.begin({name: part for name, part in parts.items() if part is not None}, write_model)
        if config.start.steps:
            session.checkpoint()  # of what the start has cost
        publisher.publish(session.step)
        first_digest = publisher.current.digest

        def ask(now: Weights) -> Scores:
            return evaluate(now.model, tokenizer, held_out, verifier, config.rollout, config.evaluation, now.adapter)[0]

        if session.evaluation_due:
            scores = evaluated(learner, ask)
            if teacher is not None:
                taught = ask(Weights(model=teacher.teacher.model, adapter=None, heads={}))
                scores = replace(scores, extra={**scores.extra, "teacher": taught.mean})
            session.record(scores)
        session.checkpoint()
        with (
            collector_spared(),
            threads.beside(),
            Collector(rollouts, config.rollout.groups, config.staleness, session.step) as collector,
        ):
            while session.running:
                groups, stats = collector.take(session.step)
                behind = publisher.check((t for g in groups for t in g.trajectories), session.step, config.staleness)
                changes = course.observe(session.step, groups)
                given = reference_examples(made, source, session.step, config.teacher.references)
                batch = make_batch(groups, config.learn, config.rollout, session.step, given)
                update = Update(learner, batch, config.learn, reference, teacher)
                update.prepare()
                collector.published(session.step + 1, [update.finish, publisher.publish_next])
                session.advance(
                    rollout_metrics(groups, stats, verifier)
                    | course.metrics(groups)
                    | update.metrics
                    | {"behind": behind, "publish_s": publisher.seconds}
                )
                for kind, text in (*alarms(groups, config.learn, session.events), *map(told, changes)):
                    session.event(kind, text)
                for group in shown(groups):
                    session.log_samples(readable(group, batch.advantages, update.mismatch, tokenizer))
                if session.evaluation_due:
                    session.record(evaluated(learner, ask))
                session.checkpoint()
    digests = {"first": first_digest, "last": publisher.current.digest, "teacher": teacher.digest if teacher else ""}
    return session.finish(digests=digests)
