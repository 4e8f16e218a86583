"""`lockstep doctor`: what is odd about an environment, how fast it steps in each form, and what to choose."""

# N environments

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from lockstep.core.errors import LockstepError
from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace, MultiDiscreteSpace, Space
from lockstep.core.tree import tree_leaves
from lockstep.envs.control.config import EnvConfig, Vectoriser
from lockstep.envs.control.gymnasium_forms import gymnasium_stepper
from lockstep.envs.control.make import MODES, find_native, make_env, resolve_vectoriser, seeded_makers
from lockstep.envs.control.spaces import MASK_KEY
from lockstep.envs.control.stepper import Stepper

NUM_PROBE_STEPS = 200
SEED = 0


@dataclass(frozen=True)
class Finding:
    """One remark. `level`: ok, note (know it), warning (likely costs learning or time), problem (will not work)."""

    level: Literal["ok", "note", "warning", "problem"]
    text: str


@dataclass(frozen=True)
class Rate:
    """Stepping rate of one form under random actions."""

    form: str
    steps_per_s: float
    """Environment steps (of all copies) per second; 0 where it failed."""
    error: str = ""

    @property
    def us_per_step(self) -> float:
        """Microseconds per environment step."""
        return 1e6 / self.steps_per_s if self.steps_per_s else float("inf")


@dataclass(frozen=True)
class Threads:
    """Time of a 256 x 256 x 256 float32 product with one and with two threads (microseconds, median)."""

    one_us: float
    two_us: float
    num_cores: int

    @property
    def advice(self) -> str:
        """What to set, and why."""
        ratio = self.two_us / self.one_us
        measured = f"a 256x256 product takes {self.one_us:,.0f} us on one thread and {self.two_us:,.0f} us on two"
        if self.num_cores == 1:
            return f"one core: use one thread ({measured})"
        if ratio > 1.2:
            return f"use one thread: {measured}; another process holds a core, and two threads would wait for it"
        if ratio > 0.8:
            return f"use one thread: {measured}, so a second one gains nothing"
        return f"two threads pay for large products: {measured}; small policies are still faster on one"


@dataclass
class DoctorReport:
    """Result of `diagnose`. `str(report)` is the text that the command prints."""

    config: EnvConfig
    about: dict[str, Any]
    obs_space: Space
    action_space: Space
    findings: list[Finding] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)
    threads: Threads | None = None
    auto: str = ""
    auto_why: str = ""

    @property
    def fastest(self) -> Rate | None:
        """The fastest form that can be asked for."""
        able = [rate for rate in self.rates if not rate.error and not rate.form.startswith("gymnasium")]
        return max(able, key=lambda rate: rate.steps_per_s, default=None)

    def predict_wall_time(self, num_steps: int, learner_us_per_step: float) -> float:
        """Seconds for `num_steps` environment steps with the form that "auto" takes, collecting and learning in turn.

        Args:
            num_steps: environment steps of all copies together.
            learner_us_per_step: acting and learning, in microseconds per environment step.

        Raises:
            ValueError: the form could not be measured.
        """
        chosen = [rate for rate in self.rates if rate.form == self.auto and not rate.error]
        if not chosen:
            raise ValueError(f"no rate was measured for {self.auto!r}")
        return num_steps * (chosen[0].us_per_step + learner_us_per_step) * 1e-6

    def __str__(self) -> str:
        """Plain text, one fact per line."""
        lines = [f"{self.config.id} x {self.config.num_envs}", f"  observation  {_space_line(self.obs_space)}"]
        lines += [f"  action       {_space_line(self.action_space)}"]
        lines += [f"  autoreset    {self.about['autoreset']} (asked: {self.config.autoreset})"]
        lines += [f"  resume       {self.about['restore']}: {self.about['restore_note']}", "", "Findings"]
        lines += [f"  {finding.level:8} {finding.text}" for finding in self.findings]
        lines += ["", "Stepping rate, random actions"]
        for rate in self.rates:
            fact = rate.error or f"{rate.steps_per_s:10,.0f} steps/s {rate.us_per_step:9.1f} us/step"
            lines.append(f"  {rate.form:16} {fact}")
        lines += ["", f"vectoriser='auto' takes {self.auto}: {self.auto_why}"]
        fastest = self.fastest
        if fastest is not None and fastest.form != self.auto:
            lines.append(f"measured here, {fastest.form} is faster: set vectoriser={fastest.form!r}")
        if self.threads is not None:
            lines.append(f"threads: {self.threads.advice}")
        return "\n".join(lines)


def diagnose(config: EnvConfig, *, seconds_per_rate: float = 1.0) -> DoctorReport:
    """Check an environment and measure how fast it steps.

    Args:
        config: the environment as it will be trained on.
        seconds_per_rate: time spent on each form (seconds).

    Raises:
        EnvError, MissingExtraError, ConfigError: it cannot be made at all.
    """
    stepper = make_env(config, seed=SEED)
    report = DoctorReport(config, stepper.describe(), stepper.obs_space, stepper.action_space)
    report.auto, report.auto_why = resolve_vectoriser(replace(config, vectoriser="auto"))
    report.findings += _space_findings(stepper)
    try:
        report.findings += _reward_findings(stepper)
    except LockstepError as error:
        report.findings.append(Finding("problem", str(error)))
        return report
    finally:
        stepper.close()
    report.findings.append(_determinism(config))
    report.rates = measure_rates(config, seconds_per_rate)
    report.threads = measure_threads()
    return report


def random_actions(stepper: Stepper, rng: np.random.Generator) -> np.ndarray:
    """Uniform actions that the current masks allow; a standard normal where the space has no bounds. [N, ...]"""
    space, n = stepper.action_space, stepper.num_envs
    if isinstance(space, BoxSpace):
        low, high = space.bounds()
        bounded = np.isfinite(low) & np.isfinite(high)
        uniform = rng.uniform(np.where(bounded, low, 0), np.where(bounded, high, 1), (n, *space.shape))
        return np.where(bounded, uniform, rng.standard_normal((n, *space.shape))).astype(space.dtype)
    assert isinstance(space, DiscreteSpace | MultiDiscreteSpace), space
    sizes = (space.n,) if isinstance(space, DiscreteSpace) else space.nvec
    scores = rng.random((n, sum(sizes)))
    if isinstance(stepper.obs, dict) and MASK_KEY in stepper.obs:
        scores = np.where(stepper.obs[MASK_KEY], scores, -1.0)
    blocks = np.split(scores, np.cumsum(sizes)[:-1], axis=1)
    parts = [block.argmax(axis=1) + first for block, first in zip(blocks, space.lowest, strict=True)]
    return parts[0] if isinstance(space, DiscreteSpace) else np.stack(parts, axis=1)


def measure_rates(config: EnvConfig, seconds: float) -> list[Rate]:
    """Stepping rate of every form that this environment has, and of Gymnasium's own serial loop beside ours."""
    native = find_native(config)
    builders: dict[str, Callable[[], Stepper]] = {}
    vectorisers: list[Vectoriser] = ["native"] if native is not None else []
    if native is None or not native.is_only_form:
        vectorisers += ["sync", "async"]
        builders["gymnasium sync"] = lambda: gymnasium_stepper(seeded_makers(config), MODES["next_step"], "sync")
    vectorisers.append("envpool")
    for vectoriser in vectorisers:
        builders[vectoriser] = _builder(replace(config, vectoriser=vectoriser))
    return [_rate(form, build, seconds) for form, build in builders.items()]


def measure_threads() -> Threads:
    """Median time of a product on one and on two threads; the number of threads is put back."""
    import torch

    before = torch.get_num_threads()
    times = []
    try:
        x = torch.ones(256, 256)
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            samples = []
            for _ in range(60):
                start = time.perf_counter()
                torch.mm(x, x)
                samples.append(time.perf_counter() - start)
            times.append(float(np.median(samples[10:])) * 1e6)
    finally:
        torch.set_num_threads(before)
    return Threads(times[0], times[1], os.cpu_count() or 1)


def _builder(config: EnvConfig) -> Callable[[], Stepper]:
    return lambda: make_env(config, seed=SEED)


def _rate(form: str, build: Callable[[], Stepper], seconds: float) -> Rate:
    try:
        stepper = build()
    except LockstepError as error:
        return Rate(form, 0.0, str(error).splitlines()[0])
    try:
        rng = np.random.default_rng(SEED)
        stepper.reset(SEED)
        actions = [random_actions(stepper, rng) for _ in range(64)]
        is_masked = isinstance(stepper.obs, dict) and MASK_KEY in stepper.obs
        num_steps, spent = 0, 0.0
        while spent < seconds:
            action = random_actions(stepper, rng) if is_masked else actions[num_steps % 64]
            start = time.perf_counter()
            stepper.step(action)
            spent += time.perf_counter() - start
            num_steps += 1
        return Rate(form, num_steps * stepper.num_envs / spent)
    except LockstepError as error:
        return Rate(form, 0.0, str(error).splitlines()[0])
    finally:
        stepper.close()


def _space_findings(stepper: Stepper) -> list[Finding]:
    findings = []
    action = stepper.action_space
    if isinstance(action, BoxSpace):
        low, high = action.bounds()
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            findings.append(Finding("warning", "actions have no bounds: a squashed policy cannot scale to them"))
        elif not (np.allclose(low, -1) and np.allclose(high, 1)):
            findings.append(Finding("note", "actions are not in [-1, 1]; the policy scales them"))
    raw = stepper.env.single_observation_space
    if raw.dtype == np.float64:
        findings.append(Finding("note", "observations are float64 and become float32"))
    dropped = stepper.describe()["dropped"]
    if dropped:
        findings.append(Finding("note", f"observation parts without an array form are dropped: {', '.join(dropped)}"))
    for name, space in _boxes(stepper.obs_space):
        if space.dtype.startswith("float") and not np.isfinite(np.stack(space.bounds())).all():
            findings.append(Finding("note", f"{name} is unbounded: normalise observations"))
    if isinstance(stepper.obs, dict) and MASK_KEY in stepper.obs:
        findings.append(Finding("ok", "gives an action mask"))
    if stepper.restorer.method == "none":
        findings.append(Finding("warning", "a resumed run starts new episodes: the environment cannot be restored"))
    return findings


def _reward_findings(stepper: Stepper) -> list[Finding]:
    rng = np.random.default_rng(SEED)
    rewards, returns, lengths, largest = [], [], [], 0.0
    for _ in range(NUM_PROBE_STEPS):
        step = stepper.step(random_actions(stepper, rng))
        rewards.append(step.reward_N[step.valid_N])
        returns += [end.episode_return for end in step.episodes]
        lengths += [end.length for end in step.episodes]
        floats = [leaf for leaf in tree_leaves(step.next_obs) if leaf.dtype.kind == "f"]
        largest = max([largest, *(float(np.abs(leaf).max()) for leaf in floats)])
    flat = np.concatenate(rewards)
    spread = (
        f"rewards of random actions: mean {flat.mean():.3g}, std {flat.std():.3g}, {flat.min():.3g}..{flat.max():.3g}"
    )
    findings = [Finding("ok", spread)]
    if np.abs(flat).max() > 100:
        findings.append(Finding("warning", f"rewards reach {np.abs(flat).max():.3g}: scale or normalise them"))
    if not flat.any():
        findings.append(Finding("warning", f"no reward in {flat.size} random steps: exploration will be hard"))
    if largest > 100:
        findings.append(Finding("warning", f"observations reach {largest:.3g}: normalise them"))
    if lengths:
        text = f"{len(lengths)} episodes ended: mean length {np.mean(lengths):.0f}, mean return {np.mean(returns):.3g}"
        findings.append(Finding("ok", text))
    else:
        findings.append(Finding("note", f"no episode ended in {NUM_PROBE_STEPS} steps"))
    return findings


def _determinism(config: EnvConfig) -> Finding:
    traces = []
    for _ in range(2):
        stepper = make_env(config, seed=SEED)
        rng = np.random.default_rng(SEED)
        trace: list[np.ndarray] = []
        for _ in range(NUM_PROBE_STEPS // 2):
            step = stepper.step(random_actions(stepper, rng))
            trace += [step.reward_N, *tree_leaves(step.next_obs)]
        stepper.close()
        traces.append(trace)
    if all(np.array_equal(one, two) for one, two in zip(*traces, strict=True)):
        return Finding("ok", "deterministic: the same seed and actions give the same trajectory")
    return Finding(
        "warning", "not deterministic: the same seed and actions give different trajectories; runs will differ"
    )


def _boxes(space: Space) -> list[tuple[str, BoxSpace]]:
    if isinstance(space, BoxSpace):
        return [("the observation", space)]
    if isinstance(space, DictSpace):
        return [(f"observation {key!r}", sub) for key, sub in space.spaces.items() if isinstance(sub, BoxSpace)]
    return []


def _space_line(space: Space) -> str:
    match space:
        case BoxSpace():
            low, high = space.bounds()
            return f"{space.dtype}{list(space.shape)} in [{low.min(initial=np.inf):g}, {high.max(initial=-np.inf):g}]"
        case DiscreteSpace():
            return f"{space.n} choices"
        case MultiDiscreteSpace():
            return f"{len(space.nvec)} choices of {list(space.nvec)}"
    return ", ".join(f"{name}: {_space_line(sub)}" for name, sub in space.spaces.items())
