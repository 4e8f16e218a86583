"""Does an exported program do what the policy does? Random observations, several batch sizes, steps with resets.

Legend: N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.core.errors import ExportError
from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace, MultiDiscreteSpace, Space
from lockstep.interop.program import NEXT_STATE, OBSERVATION, STARTS, STATE, distribution_of
from lockstep.models.control.actor import Actor
from lockstep.models.control.policy import Policy
from lockstep.models.control.preprocess import ACTION_MASK
from lockstep.models.control.step import PolicyStep

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Deviation:
    """Largest difference of one output over all checked rows. `relative` is to max(1, |value|); for bounded actions to
    max(half the range, |value|) where that is less. `num_ties` counts rows whose best two choices lie within the
    tolerance and which chose differently.

    >>> str(Deviation("value", 2e-7, 1e-7, 50))
    'value        max abs 2.0e-07  max rel 1.0e-07  over 50 rows'
    """

    name: str
    absolute: float
    relative: float
    num_rows: int
    num_ties: int = 0

    def __str__(self) -> str:
        ties = f", {self.num_ties} ties" if self.num_ties else ""
        errors = f"max abs {self.absolute:.1e}  max rel {self.relative:.1e}"
        return f"{self.name:<12} {errors}  over {self.num_rows} rows{ties}"


def tolerance_of(policy: Policy) -> float:
    """Relative tolerance of a portable program: another order of summation moves a float32 result by far less than
    1e-4; where operands are rounded to bfloat16 it can move one of them by its last bit, 2^-8."""
    return 1e-4 if policy.spec.network.compute_dtype == "fp32" else 1e-2


def compare(
    policy: Policy,
    run: Callable[[Arrays], Arrays],
    *,
    tolerance: float,
    batch_sizes: Sequence[int] = (1, 2, 3, 7, 32),
    num_steps: int = 4,
    seed: int = 0,
) -> list[Deviation]:
    """Compare `run` with the policy in process.

    Args:
        run: inputs by name -> outputs by name, as `PolicyProgram.forward`.
        tolerance: relative; 0 asks for equal bits.

    Returns:
        The largest deviations, one for each output.

    Raises:
        ExportError: naming output, error and input.
    """
    rng = np.random.default_rng(seed)
    worst: dict[str, Deviation] = {}
    for num in batch_sizes:
        actor = Actor(policy, num, seed=0)
        state: Arrays = {name: x.numpy().copy() for name, x in actor.state.items()}
        for _ in range(num_steps):
            obs = random_observations(policy, num, rng)
            before, starts = dict(actor.state), actor.starts
            inputs: Arrays = dict(obs) if isinstance(obs, dict) else {OBSERVATION: obs}
            if state:
                inputs |= {STARTS: starts.numpy().copy(), **{STATE + name: x for name, x in state.items()}}
            step = actor.act(obs, deterministic=True)
            got = run(inputs)
            with torch.no_grad():
                distribution = distribution_of(policy, step.features, before, starts)
            margin = _margin(policy, distribution)
            expected = _expected(step, distribution, got)
            for name, want in expected.items():
                deviation = _deviation(policy, name, got[name], want, margin, tolerance)
                _judge(deviation, tolerance, inputs)
                worst[name] = _worse(worst.get(name), deviation)
            state = {name: got[NEXT_STATE + name].copy() for name in state}
            actor.advance(rng.random(num) < 0.3)
    return list(worst.values())


def _expected(step: PolicyStep, distribution: dict[str, Tensor], got: Arrays) -> dict[str, np.ndarray]:
    want: dict[str, Tensor] = {"action": step.env_action, "logprob": step.logprob, **distribution}
    if step.value is not None:
        want["value"] = step.value
    want |= {NEXT_STATE + name: x for name, x in step.state.items()}
    optional = {"logprob", *distribution}
    missing = [name for name in want if name not in got and name not in optional]
    if missing:
        raise ExportError(f"the exported program lacks the outputs {missing}; it has {list(got)}")
    return {name: x.numpy() for name, x in want.items() if name in got}


def _margin(policy: Policy, distribution: dict[str, Tensor]) -> np.ndarray | None:
    """[N]: difference of the best two choices over max(1, |best|), the least over blocks; None without choices."""
    space = policy.spec.action_space
    scores = distribution.get("logits", distribution.get("action_values"))
    if scores is None:
        return None
    margins = []
    sizes = list(space.nvec) if isinstance(space, MultiDiscreteSpace) else [scores.shape[1]]
    for block in torch.split(scores, sizes, dim=1):
        if block.shape[1] > 1:
            best = block.topk(2, dim=1).values
            margins.append((best[:, 0] - best[:, 1]) / best[:, 0].abs().clamp(min=1.0))
    return torch.stack(margins).amin(0).numpy() if margins else None


def _deviation(
    policy: Policy, name: str, got: np.ndarray, want: np.ndarray, margin: np.ndarray | None, tolerance: float
) -> Deviation:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise ExportError(
            f"output {name!r} is {got.dtype} {got.shape}; the policy gives {want.dtype} {want.shape}; "
            "nothing was written"
        )
    num = len(want)
    if want.dtype.kind != "f":
        differs = (got != want).reshape(num, -1).any(axis=1)
        tie = np.zeros(num, np.bool_) if margin is None else margin <= tolerance
        wrong = float((differs & ~tie).any())
        return Deviation(name, wrong, wrong, num, int((differs & tie).sum()))
    if not np.isfinite(got).all():
        return Deviation(name, float("inf"), float("inf"), num)
    error = np.abs(got.astype(np.float64) - want)
    scale = np.maximum(np.abs(want), 1.0)
    space = policy.spec.action_space
    if name == "action" and isinstance(space, BoxSpace):
        low, high = (bound.astype(np.float64) for bound in space.bounds())
        scale = np.maximum(np.abs(want), np.clip((high - low) / 2, 1e-30, 1.0))
    return Deviation(name, float(error.max(initial=0.0)), float((error / scale).max(initial=0.0)), num)


def _judge(deviation: Deviation, tolerance: float, inputs: Arrays) -> None:
    if deviation.relative <= tolerance:
        return
    shown = {name: np.array2string(x, threshold=20, edgeitems=2).replace("\n", "") for name, x in inputs.items()}
    raise ExportError(
        f"output {deviation.name!r} differs from the policy by {deviation.absolute:.3g} (relative "
        f"{deviation.relative:.3g}, allowed {tolerance:g}) for the input {shown}; nothing was written"
    )


def _worse(one: Deviation | None, two: Deviation) -> Deviation:
    if one is None:
        return two
    return Deviation(
        two.name,
        max(one.absolute, two.absolute),
        max(one.relative, two.relative),
        one.num_rows + two.num_rows,
        one.num_ties + two.num_ties,
    )


def random_observations(policy: Policy, num: int, rng: np.random.Generator) -> Any:
    """Observations [num, ...] that cover the space: uniform within bounds, normal where there are none (around the
    normaliser's statistics, which say where the data lies)."""
    space = policy.spec.obs_space
    if isinstance(space, DictSpace):
        obs = {name: _leaf(sub, num, rng) for name, sub in space.spaces.items()}
        if ACTION_MASK in obs:
            obs[ACTION_MASK] = _mask(policy, obs[ACTION_MASK], rng)
        return obs
    array = _leaf(space, num, rng)
    normaliser = policy.preprocess.normaliser
    if normaliser is not None and isinstance(space, BoxSpace) and not np.isfinite(space.bounds()[0]).all():
        deviation = 1.0 / normaliser.inv_std.numpy()
        flat = normaliser.mean.numpy() + deviation * rng.normal(0.0, 2.0, (num, deviation.size))
        array = flat.reshape(num, *space.shape).astype(array.dtype)
    return array


def _leaf(space: Space, num: int, rng: np.random.Generator) -> np.ndarray:
    match space:
        case DiscreteSpace():
            return rng.integers(0, space.n, num) + space.start
        case MultiDiscreteSpace():
            return rng.integers(0, space.nvec, (num, len(space.nvec))) + np.array(space.lowest)
        case BoxSpace():
            low, high = (bound.astype(np.float64) for bound in space.bounds())
            # Bounds such as 3.4e38 stand for "none".
            low, high = np.where(np.abs(low) < 1e6, low, -5.0), np.where(np.abs(high) < 1e6, high, 5.0)
            if space.dtype.startswith("float"):
                dtype = "float32" if space.dtype == "float64" else space.dtype
                return rng.uniform(low, high, (num, *space.shape)).astype(dtype)
            first, last = low.astype(np.int64), high.astype(np.int64)
            return rng.integers(first, last + 1, (num, *space.shape)).astype(space.dtype)
        case _:
            raise ExportError(f"no random observations for {space}")


def _mask(policy: Policy, like: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the choices, at least one in every block."""
    space = policy.spec.action_space
    sizes = space.nvec if isinstance(space, MultiDiscreteSpace) else (like.reshape(len(like), -1).shape[1],)
    mask = rng.random((len(like), sum(sizes))) < 0.5
    start = 0
    for size in sizes:
        mask[np.arange(len(like)), start + rng.integers(0, size, len(like))] = True
        start += size
    return mask.reshape(like.shape).astype(like.dtype)
