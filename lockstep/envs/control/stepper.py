"""One canonical view of a vector environment, whatever its autoreset mode.

Gymnasium's vector environments end episodes in three ways. NEXT_STEP: the step after the end is a reset, its action is
ignored and its row is no transition. SAME_STEP: the step of the end already returns the reset observation and puts the
final one into the info. DISABLED: the caller resets. `Stepper` gives all three as the same `EnvStep`, so that a
collector never asks which one it has.
"""

# N environments

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from lockstep.core.errors import EnvError, InputError
from lockstep.core.spaces import BoxSpace, DictSpace, MultiDiscreteSpace, Space
from lockstep.core.tree import tree_map
from lockstep.envs.control.episodes import EpisodeEnd, episode_seed
from lockstep.envs.control.restore import NoRestore, Restorer
from lockstep.envs.control.spaces import MASK_KEY, Obs, ObsCodec, action_space_of, action_writer, mask_size

__all__ = ["EnvStep", "EpisodeEnd", "Stepper"]


@dataclass(slots=True)
class EnvStep:
    """Result of one step of N environments. Arrays are fresh on every step, but must not be written to: they may be
    shared with each other (`obs` is `next_obs` where no episode ended) and with the stepper.
    """

    next_obs: Any
    """What the action led to: the final observation where the episode ended. [N, ...] array or dict of arrays."""
    obs: Any
    """What to act on next: the reset observation where the episode ended. Same form."""
    reward_N: np.ndarray
    """float32."""
    terminated_N: np.ndarray
    """bool: the episode reached an end of its own; do not bootstrap."""
    truncated_N: np.ndarray
    """bool: the episode was cut off; bootstrap from `next_obs`."""
    valid_N: np.ndarray
    """bool: False for the row of a NEXT_STEP reset, which is no transition and must not be learned from."""
    starts_N: np.ndarray
    """bool: `obs` is the first of an episode (reset recurrent state)."""
    episodes: list[EpisodeEnd]
    """Episodes that ended on this step."""


class Stepper:
    """Steps a `gymnasium.vector.VectorEnv` and reports transitions. Build with `make_env`.

    Attributes:
        about: facts that `describe` repeats.
        obs_space, action_space: canonical spaces of one environment.
        num_envs: N.
        obs: what to act on now (after `reset`, `step` or `load_state_dict`).
        starts_N: bool, where `obs` is the first of an episode.
        exact_N: bool, which environments the last `load_state_dict` restored exactly.
    """

    def __init__(
        self,
        env: gym.vector.VectorEnv,
        *,
        mode: AutoresetMode,
        restorer: Restorer | None = None,
        clip_reward: bool = False,
        seed_each: bool = False,
    ) -> None:
        self.env, self.mode, self.num_envs = env, mode, env.num_envs
        self.restorer = NoRestore("the environment offers no way") if restorer is None else restorer
        self.about: dict[str, Any] = {}
        self._clip_reward, self._seed_each = clip_reward, seed_each
        self._codec = ObsCodec(env.single_observation_space)
        self._write_action = action_writer(env.single_action_space)
        self._mask_from_info = False
        self.obs_space: Space = self._codec.space
        self.action_space: Space = action_space_of(env.single_action_space)
        self._action_shape = _batch_shape(self.action_space, self.num_envs)
        self._takes_integers = not isinstance(self.action_space, BoxSpace)
        n = self.num_envs
        self._all_valid_N = np.ones(n, np.bool_)
        self._all_valid_N.flags.writeable = False
        self._plain_dtype, self._plain_shape = _plain(self.obs_space, n)
        self.num_steps, self.seed = 0, 0
        self.obs: Any = None
        self.starts_N = np.ones(n, np.bool_)
        self.exact_N = np.zeros(n, np.bool_)
        self.pending_N = np.zeros(n, np.bool_)
        self.return_N = np.zeros(n, np.float64)
        self.length_N = np.zeros(n, np.int64)
        self.episode_N = np.zeros(n, np.int64)

    def reset(self, seed: int) -> Obs:
        """Start the first episode of every environment under base seed `seed`."""
        seeds: Any = [seed] * self.num_envs if self._seed_each else seed
        obs, infos = self.env.reset(seed=seeds)
        self.seed, self.num_steps = seed, 0
        if MASK_KEY in infos and not self._mask_from_info:
            self._add_mask_to_space()
        for array in (self.return_N, self.length_N, self.episode_N, self.pending_N):
            array.fill(0)
        self.starts_N = np.ones(self.num_envs, np.bool_)
        first = self.obs = self.canonical(obs, infos)
        self._check_finite(first, None)
        self.restorer.on_reset()
        return first

    def step(self, actions: np.ndarray) -> EnvStep:
        """Step every environment.

        Args:
            actions: [N] integers (discrete), [N, parts] integers (multi-discrete) or [N, ...] reals (continuous).

        Raises:
            InputError: actions of the wrong shape or kind.
            EnvError: the environment gave NaN or infinite observations or rewards.
        """
        if self.obs is None:
            raise InputError("step before reset: call reset(seed) first", field="actions")
        actions = self._checked_actions(actions)
        pending_N = self.pending_N
        raw, reward, terminated_N, truncated_N, infos = self.env.step(actions)
        self.num_steps += 1
        reward_N = np.asarray(reward, dtype=np.float64)
        next_obs = obs = self.canonical(raw, infos)
        ended_N = terminated_N | truncated_N
        any_ended = np.count_nonzero(ended_N) > 0
        self.return_N += reward_N
        if self.mode is AutoresetMode.NEXT_STEP:
            starts_N, any_starts = pending_N, np.count_nonzero(pending_N) > 0
            valid_N = ~pending_N if any_starts else self._all_valid_N
            self.pending_N = ended_N
        else:
            valid_N, starts_N, any_starts = self._all_valid_N, ended_N, any_ended
        self.length_N += valid_N
        self._check_finite(next_obs, reward_N)
        episodes: list[EpisodeEnd] = []
        if any_ended:
            episodes = self._ended_episodes(ended_N)
            if self.mode is not AutoresetMode.NEXT_STEP:
                next_obs, obs = self._after_end(obs, infos, ended_N)
                self._check_finite(next_obs, None)
        if any_starts:
            self.return_N[starts_N], self.length_N[starts_N] = 0.0, 0
            self.episode_N += starts_N
        self.restorer.on_step(actions, self.length_N)
        self.obs, self.starts_N = obs, starts_N
        reward_N = np.sign(reward_N) if self._clip_reward else reward_N
        return EnvStep(
            next_obs, obs, reward_N.astype(np.float32), terminated_N, truncated_N, valid_N, starts_N, episodes
        )

    def render(self) -> np.ndarray:
        """Picture of environment 0 as it is now, [height, width, 3] uint8.

        Raises:
            EnvError: this form has no picture; `rendering(config)` is the one that has.
        """
        try:
            frames = self.env.render()
        except NotImplementedError:
            frames = None
        if not frames or frames[0] is None:
            raise EnvError("this form of the environment gives no picture; make it with `rendering(config)`")
        return np.asarray(frames[0])

    def close(self) -> None:
        """Release processes, threads and windows. A closed stepper cannot be used again."""
        self.env.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here: arrays and JSON-able values under flat names."""
        state: dict[str, Any] = {
            "seed": self.seed,
            "num_steps": self.num_steps,
            "num_envs": self.num_envs,
            "mode": self.mode.value,
            "method": self.restorer.method,
            "starts_N": self.starts_N.copy(),
            "pending_N": self.pending_N.copy(),
            "return_N": self.return_N.copy(),
            "length_N": self.length_N.copy(),
            "episode_N": self.episode_N.copy(),
        }
        parts = self.obs if isinstance(self.obs, dict) else {"": self.obs}
        state |= {f"obs/{key}": np.copy(value) for key, value in parts.items()}
        return state | {f"env/{key}": value for key, value in self.restorer.save(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Restore; True if every environment is in exactly the saved state (`exact_N` says which).

        Where nothing can be restored, every environment starts an episode under a seed that the run has not used; `obs`
        and `starts_N` then say so.

        Raises:
            InputError: the state is of another number of environments, autoreset mode or restore method.
        """
        for key, mine in (("num_envs", self.num_envs), ("mode", self.mode.value), ("method", self.restorer.method)):
            if state[key] != mine:
                raise InputError(f"environment state has {key}={state[key]!r}, this one has {mine!r}", field=key)
        self.seed, self.num_steps = int(state["seed"]), int(state["num_steps"])
        self.starts_N, self.pending_N = np.array(state["starts_N"]), np.array(state["pending_N"])
        self.return_N, self.length_N = np.array(state["return_N"]), np.array(state["length_N"])
        self.episode_N = np.array(state["episode_N"])
        parts = {key.removeprefix("obs/"): value for key, value in state.items() if key.startswith("obs/")}
        saved: Obs = parts if self._is_dict() else parts[""]
        inner = {key.removeprefix("env/"): value for key, value in state.items() if key.startswith("env/")}
        loaded = self.restorer.load(self, inner, saved)
        if loaded is None:
            num_steps = self.num_steps
            self.reset(episode_seed(self.seed, self.num_envs, self.num_steps))
            self.num_steps = num_steps
            self.exact_N = np.zeros(self.num_envs, np.bool_)
            return False
        self.obs, restarted_N = loaded
        self.exact_N = _equal_rows(self.obs, saved) & ~restarted_N
        self.starts_N = self.starts_N | restarted_N
        self.return_N[restarted_N], self.length_N[restarted_N] = 0.0, 0
        self.episode_N += restarted_N
        return bool(self.exact_N.all())

    def describe(self) -> dict[str, Any]:
        """What was resolved: vectoriser, autoreset mode, restore method, notes. JSON-able."""
        return {
            "dropped": list(self._codec.dropped),
            **self.about,
            "num_envs": self.num_envs,
            "autoreset": self.mode.name.lower(),
            "restore": self.restorer.method,
            "restore_note": self.restorer.note,
        }

    def canonical(self, raw: Any, infos: dict[str, Any]) -> Obs:
        """Canonical arrays of a raw batched observation."""
        if type(raw) is np.ndarray and raw.dtype == self._plain_dtype and raw.shape == self._plain_shape:
            return raw
        obs = self._codec.batch(raw, self.num_envs)
        if not self._mask_from_info:
            return obs
        if MASK_KEY not in infos:
            raise EnvError("the vector environment gave an action mask in its infos at reset, but not now")
        flat = obs if isinstance(obs, dict) else {"obs": obs}
        return {**flat, MASK_KEY: np.asarray(infos[MASK_KEY]).astype(np.bool_)}

    def _after_end(self, obs: Obs, infos: dict[str, Any], ended_N: np.ndarray) -> tuple[Obs, Obs]:
        """(true next observation, observation to act on) of a step on which episodes ended."""
        if self.mode is AutoresetMode.SAME_STEP:
            final = infos["final_obs"]
            if isinstance(final, np.ndarray) and final.dtype == object:
                next_obs = tree_map(np.copy, obs)
                for i in np.flatnonzero(ended_N):
                    self._set_row(next_obs, int(i), final[i], infos)
                return next_obs, obs
            return tree_map(
                lambda last, first: _pick_rows(ended_N, last, first), self.canonical(final, infos), obs
            ), obs
        raw, reset_infos = self.env.reset(options={"reset_mask": ended_N.copy()})
        return obs, self.canonical(raw, reset_infos)

    def _set_row(self, target: Obs, i: int, final: Any, infos: dict[str, Any]) -> None:
        one = tree_map(lambda leaf: np.asarray(leaf)[None], self._codec.split(final))
        row = self._codec.batch_flat(one, 1)
        if self._mask_from_info:
            flat = row if isinstance(row, dict) else {"obs": row}
            row = {**flat, MASK_KEY: np.asarray(infos["final_info"][MASK_KEY][i])[None]}
        if isinstance(target, dict):
            assert isinstance(row, dict)
            for key, leaf in target.items():
                leaf[i] = row[key][0]
        else:
            assert not isinstance(row, dict)
            target[i] = row[0]

    def _ended_episodes(self, ended_N: np.ndarray) -> list[EpisodeEnd]:
        return [EpisodeEnd(i, float(self.return_N[i]), int(self.length_N[i])) for i in np.flatnonzero(ended_N).tolist()]

    def _checked_actions(self, actions: np.ndarray) -> np.ndarray:
        actions = np.asarray(actions)
        if actions.shape != self._action_shape:
            raise InputError(
                f"actions have shape {actions.shape}, expected {self._action_shape} for {self.action_space}",
                field="actions",
            )
        if self._takes_integers and actions.dtype.kind not in "iu":
            raise InputError(f"actions have dtype {actions.dtype}, expected integers", field="actions")
        return self._write_action(actions)

    def _check_finite(self, obs: Obs, reward_N: np.ndarray | None) -> None:
        """A sum of squares is the cheapest detector: finite unless an element is not, or it overflowed."""
        for key, leaf in obs.items() if isinstance(obs, dict) else (("obs", obs),):
            if leaf.dtype.kind == "f" and not isfinite(np.vdot(leaf, leaf)):
                bad_N = ~np.logical_and.reduce(np.isfinite(leaf.reshape(self.num_envs, -1)), axis=1)
                self._raise_if_bad(bad_N, f"observation {key!r}")
        if reward_N is not None and not isfinite(np.vdot(reward_N, reward_N)):
            self._raise_if_bad(~np.isfinite(reward_N), "reward")

    def _raise_if_bad(self, bad_N: np.ndarray, what: str) -> None:
        if bad_N.any():
            i = int(np.flatnonzero(bad_N)[0])
            raise EnvError(
                f"environment {i} gave a NaN or infinite {what} on step {self.num_steps} (step "
                f"{int(self.length_N[i])} of its episode {int(self.episode_N[i])}); check its dynamics and the actions "
                "it was given"
            )

    def _is_dict(self) -> bool:
        return isinstance(self.obs_space, DictSpace)

    def _add_mask_to_space(self) -> None:
        mask = BoxSpace((mask_size(self.env.single_action_space),), "bool", (0.0,), (1.0,))
        spaces = self.obs_space.spaces if isinstance(self.obs_space, DictSpace) else {"obs": self.obs_space}
        self.obs_space = DictSpace({**spaces, MASK_KEY: mask})
        self._mask_from_info, self._plain_dtype = True, None


def _plain(space: Space, num_envs: int) -> tuple[np.dtype | None, tuple[int, ...]]:
    """(dtype, shape) of a batch that needs no conversion; no dtype where one always does."""
    if isinstance(space, BoxSpace):
        return np.dtype(space.dtype), (num_envs, *space.shape)
    return None, ()


def _equal_rows(one: Obs, two: Obs) -> np.ndarray:
    """bool_N: rows that agree bit for bit."""
    if isinstance(one, dict):
        assert isinstance(two, dict)
        return np.asarray(np.stack([_equal_rows(leaf, two[key]) for key, leaf in one.items()]).all(axis=0))
    assert not isinstance(two, dict)
    same = one.reshape(len(one), -1) == np.asarray(two).reshape(len(one), -1)
    return np.asarray(np.logical_and.reduce(same, axis=1))


def _pick_rows(mask_N: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    out = no.copy()
    out[mask_N] = yes[mask_N]
    return out


def _batch_shape(space: Space, num_envs: int) -> tuple[int, ...]:
    match space:
        case BoxSpace():
            return (num_envs, *space.shape)
        case MultiDiscreteSpace():
            return (num_envs, len(space.nvec))
    return (num_envs,)
