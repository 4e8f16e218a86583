"""A lean serial vector environment.

Gymnasium's `SyncVectorEnv` merges every info key of every environment on every step, keeps float64 and copies
observations through generic containers. This one writes each observation into its row, keeps final observations, and
hands over no other info. Measured on 2 contended cores in one run, through a `Stepper`: 1.3 to 1.8 times as fast with
one environment (CartPole 1.5, LunarLander 1.4, Taxi 1.8), 1.1 to 1.5 times with eight (CartPole 1.1, LunarLander 1.2,
Taxi 1.5), where the environments' own time dominates; `lockstep doctor` measures both. It is also the body of the
worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from lockstep.core.errors import EnvError
from lockstep.envs.control.episodes import Replay, SeededEpisodes, broken
from lockstep.envs.control.spaces import canonical_dtype


class SerialVectorEnv(gym.vector.VectorEnv):
    """Steps `SeededEpisodes` environments one after the other; Gymnasium's vector API in any autoreset mode.

    Observations are fresh arrays (float32 for float64 ones). In SAME_STEP mode infos hold `final_obs`, the true
    next observation of all environments as one batch; they hold nothing else.

    Raises:
        EnvError: from `reset` and `step`, naming the environment that raised, gave a malformed step, or an observation
            that its space does not hold (reals of another precision are cast).
    """

    def __init__(self, makers: Sequence[Callable[[], SeededEpisodes]], mode: AutoresetMode) -> None:
        self.envs = [make() for make in makers]
        self.num_envs = len(self.envs)
        self.mode = mode
        self.metadata = {**self.envs[0].metadata, "autoreset_mode": mode}
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        space = self.single_observation_space
        self._leaves = leaf_layout(space, self.num_envs)
        leaves: dict[str, Any] = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {"": space}
        # (shape, dtypes that are copied without a look) of each leaf of one observation.
        self._plain = {
            key: (tuple(leaf.shape), (np.dtype(leaf.dtype), self._leaves[key][1])) for key, leaf in leaves.items()
        }
        self._is_dict = isinstance(space, gym.spaces.Dict)
        self._as_scalars = isinstance(self.single_action_space, gym.spaces.Discrete)
        # The wrapper adds nothing to a step of a plain observation, so the loop calls past it.
        self._steps = [env.env.step if env.is_plain else env.step for env in self.envs]
        self._ended = np.zeros(self.num_envs, dtype=np.bool_)
        self._last: list[Any] = [None] * self.num_envs

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset all environments, or those of `options["reset_mask"]`. `seed` is the base seed of all of them."""
        base = seed[0] if isinstance(seed, list) else seed
        mask = (options or {}).get("reset_mask")
        for i in range(self.num_envs):
            if mask is None or mask[i]:
                self._last[i] = self._reset(i, base)
                self._ended[i] = False
        return self._stack(), {}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of every environment, in order."""
        n = self.num_envs
        rewards: list[Any] = [0.0] * n
        restarts: list[int] = []
        ended = self._ended
        terminated, truncated = [False] * n, [False] * n
        last = self._last
        same_step, next_step = self.mode is AutoresetMode.SAME_STEP, self.mode is AutoresetMode.NEXT_STEP
        for i, action in enumerate(actions.tolist() if self._as_scalars else actions):
            if next_step and ended[i]:
                last[i] = self._reset(i)
                ended[i] = False
                continue
            try:
                result = self._steps[i](action)
            except Exception as error:
                self._fail(i, "step", error)
            try:
                last[i], rewards[i], terminated[i], truncated[i], _ = result
                is_over = terminated[i] or truncated[i]
            except (TypeError, ValueError) as error:
                self._fail(i, "step", _malformed(result), error)
            if is_over:
                if same_step:
                    restarts.append(i)
                else:
                    ended[i] = True
        stacked, infos = self._stack(), {}
        if restarts:
            infos["final_obs"] = stacked
            for i in restarts:
                last[i] = self._reset(i)
            stacked = self._stack()
        try:
            rewards_N, terminated_N = np.array(rewards, np.float64), np.array(terminated, np.bool_)
            truncated_N = np.array(truncated, np.bool_)
            is_flat = rewards_N.ndim == terminated_N.ndim == truncated_N.ndim == 1
        except (TypeError, ValueError):
            is_flat = False
        if not is_flat:
            rewards_N = self._scalars(rewards, np.float64, "reward")
            terminated_N = self._scalars(terminated, np.bool_, "terminated")
            truncated_N = self._scalars(truncated, np.bool_, "truncated")
        return stacked, rewards_N, terminated_N, truncated_N, infos

    def restore(self, base_seed: int, plans: list[Replay]) -> tuple[Any, np.ndarray]:
        """Replay every environment's plan; (observations, whether each replay ended where it should) follow."""
        faithful_N = np.zeros(self.num_envs, dtype=np.bool_)
        for i, env in enumerate(self.envs):
            try:
                self._last[i], faithful_N[i] = env.restore(base_seed, plans, False)
            except Exception as error:
                self._fail(i, "the replay of its episode", error)
            self._ended[i] = plans[env.index].is_pending
        return self._stack(), faithful_N

    def render(self) -> tuple[Any, ...]:
        """Frames of all environments."""
        return tuple(env.render() for env in self.envs)

    def close_extras(self, **kwargs: Any) -> None:
        """Close every environment."""
        for env in self.envs:
            env.close()

    def _reset(self, i: int, base_seed: int | None = None) -> Any:
        try:
            return self.envs[i].reset(seed=base_seed)[0]
        except Exception as error:
            self._fail(i, "reset", error)

    def _stack(self) -> Any:
        out = {key: np.empty(shape, dtype) for key, (shape, dtype) in self._leaves.items()}
        for key, array in out.items():
            shape, dtypes = self._plain[key]
            for i, obs in enumerate(self._last):
                leaf = obs[key] if self._is_dict else obs
                if type(leaf) is not np.ndarray or leaf.shape != shape or leaf.dtype not in dtypes:
                    leaf = self._checked(i, key, leaf)
                array[i] = leaf
        return out if self._is_dict else out[""]

    def _checked(self, i: int, key: str, leaf: Any) -> np.ndarray:
        """Observation part as an array that its space holds; assignment would broadcast, truncate and wrap."""
        name, (shape, dtypes) = f"observation {key!r}" if key else "observation", self._plain[key]
        try:
            array = np.asarray(leaf)
        except ValueError as error:
            self._fail(i, "step or reset", EnvError(f"its {name} is ragged; return one array"), error)
        is_real = dtypes[0].kind == "f"
        if array.shape == shape and array.dtype in dtypes:
            return array
        if array.shape != shape or array.dtype.kind not in ("biuf" if is_real else "biu"):
            wish = f"shape {shape} and dtype {dtypes[0]}"
            got = f"shape {array.shape} and dtype {array.dtype}"
            wrong = EnvError(f"its {name} has {got}, but its space declares {wish}; return that, or declare the other")
            self._fail(i, "step or reset", wrong)
        if not is_real and not np.array_equal(array.astype(dtypes[1]), array):
            wrong = EnvError(
                f"its {name} holds {array.min()}..{array.max()}, which the declared {dtypes[0]} cannot hold"
            )
            self._fail(i, "step or reset", wrong)
        return array

    def _scalars(self, values: list[Any], dtype: type, name: str) -> np.ndarray:
        """[N] of what the environments gave where some row is no number; arrays of one element, which many environments
        return, are taken."""
        out: np.ndarray = np.zeros(self.num_envs, dtype)
        for i, value in enumerate(values):
            try:
                out[i] = np.asarray(value, dtype).item()
            except (TypeError, ValueError) as error:
                self._fail(i, "step", EnvError(f"its {name} is {value!r}; return one number"), error)
        return out

    def _fail(self, i: int, where: str, error: Exception, cause: Exception | None = None) -> NoReturn:
        env = self.envs[i]
        raise broken(env.index, env.env_id, where, error) from (cause or error)


def _malformed(result: Any) -> EnvError:
    kinds = [type(part).__name__ for part in result] if isinstance(result, tuple | list) else [type(result).__name__]
    return EnvError(
        f"step returned ({', '.join(kinds)}); return five values (observation, reward, terminated, truncated, info), "
        "both ends as bool. An environment with `done` follows the API of Gym before 0.26: wrap it"
    )


def leaf_layout(space: gym.Space[Any], num_envs: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape [num_envs, ...] and canonical dtype of each leaf of a flat observation space ("" where it is one array)."""
    leaves: dict[str, Any] = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {"": space}
    return {key: ((num_envs, *leaf.shape), canonical_dtype(leaf.dtype)) for key, leaf in leaves.items()}
