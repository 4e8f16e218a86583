"""Recorded transitions for offline algorithms: read from NumPy or Minari, checked, and turned into batches.

A NumPy data set is an `.npz` file of arrays with one row for each transition, in the order they happened:

    observations [num, ...]       or observations/NAME for each entry of a dictionary observation
    actions      [num, ...]       as the environment takes them
    rewards      [num]
    terminals    [num] bool       the episode reached an end of its own
    timeouts     [num] bool       the episode was cut off here (optional; no timeouts)
    next_observations             what followed (optional: the next row, and rows whose successor is unknown are left out)

Legend: B batch rows.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.core.errors import ConfigError, InputError
from lockstep.core.extras import require
from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace, MultiDiscreteSpace, Space
from lockstep.core.tree import tree_leaves, tree_map
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control.actor import Actor, as_tensor
from lockstep.models.control.policy import Policy
from lockstep.rl.replay import Batch, uniform_index

ENCODE_ROWS = 8192


@dataclass(frozen=True)
class Transitions:
    """Arrays with one row for each transition; observations may be dictionaries."""

    obs: Any
    action: np.ndarray
    reward: np.ndarray
    next_obs: Any
    terminated: np.ndarray

    def __len__(self) -> int:
        return len(self.reward)


def load_transitions(source: str, obs_space: Space, action_space: Space) -> Transitions:
    """Read and check a data set.

    Args:
        source: path of an `.npz` file, or `minari:ID` / a Minari data set id such as `D4RL/door/human-v2`.

    Raises:
        InputError: a part is missing, or of the wrong shape, length or type, or holds NaN; `field` names it.
        MissingExtraError: Minari is not installed.
    """
    if not source:
        raise InputError("no data set given; expected the path of an .npz file or a Minari id", field="dataset")
    if source.endswith(".npz"):
        data = _from_numpy(_read_npz(Path(source)))
    else:
        data = _from_minari(source.removeprefix("minari:"))
    _check(data, obs_space, action_space)
    return data


def collect_dataset(
    policy: Policy, env: EnvConfig, *, steps: int, seed: int, path: Path, deterministic: bool = False
) -> Path:
    """Record `steps` transitions of each environment under a policy as an `.npz` data set; returns its path."""
    path = Path(path)
    if path.suffix != ".npz" or steps < 1:
        raise ConfigError(f"path={str(path)!r}, steps={steps}; expected a name ending in .npz and at least 1 step")
    stepper = make_env(env, seed=seed)
    actor = Actor(policy, stepper.num_envs, seed=seed)
    rows: dict[str, list[np.ndarray]] = {}
    try:
        obs = stepper.reset(seed)
        for _ in range(steps):
            action = actor.act(obs, deterministic=deterministic).env_action.numpy().copy()
            result = stepper.step(action)
            flags = {"terminals": result.terminated_N, "timeouts": result.truncated_N, "valid": result.valid_N}
            step = {**_named("observations", obs), **_named("next_observations", result.next_obs)}
            for name, value in {**step, "actions": action, "rewards": result.reward_N, **flags}.items():
                rows.setdefault(name, []).append(np.array(value))
            actor.advance(result.starts_N, result.valid_N)
            obs = result.obs
    finally:
        stepper.close()
    # Environment by environment, so that rows follow each other in time.
    arrays = {name: np.stack(values).swapaxes(0, 1) for name, values in rows.items()}
    arrays = {name: array.reshape(-1, *array.shape[2:]) for name, array in arrays.items()}
    valid = arrays.pop("valid")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: array[valid] for name, array in arrays.items()})  # type: ignore[arg-type]
    return path


class OfflineData:
    """Transitions as a policy sees them, in memory, drawn by counter-based index.

    Args:
        data: checked transitions.
        policy: encodes observations; its normaliser, if it has one, takes its statistics from the data first.
        gamma: discount of the bootstrap.
        seed: of the draws.

    Raises:
        ConfigError: the policy stacks frames or is recurrent: transitions do not say what came before them.
    """

    def __init__(self, data: Transitions, policy: Policy, *, gamma: float, seed: int) -> None:
        if policy.is_recurrent or policy.spec.frame_stack > 1:
            raise ConfigError("offline algorithms learn from single transitions; use no recurrence and frame_stack=1")
        self.seed = seed
        policy.preprocess.update(tree_map(as_tensor, data.obs))
        self.features, self.next_features = _encode(policy, data.obs), _encode(policy, data.next_obs)
        self.action = policy.action_map.inverse(as_tensor(data.action)).contiguous()
        self.reward = torch.from_numpy(data.reward.astype(np.float32))
        self.discount = gamma * (1.0 - torch.from_numpy(data.terminated.astype(np.float32)))

    def __len__(self) -> int:
        return len(self.reward)

    def sample(self, num: int, key: int) -> Batch:
        """`num` transitions drawn uniformly, with replacement."""
        index_B = uniform_index(num, len(self), self.seed, key)
        return Batch(
            tree_map(lambda x: x[index_B], self.features),
            self.action[index_B],
            self.reward[index_B],
            tree_map(lambda x: x[index_B], self.next_features),
            self.discount[index_B],
            index_B,
        )


@torch.no_grad()
def _encode(policy: Policy, obs: Any) -> Any:
    num = len(tree_leaves(obs)[0])
    starts = torch.zeros(0, dtype=torch.bool)
    parts = []
    for start in range(0, num, ENCODE_ROWS):
        chunk = tree_map(lambda x, start=start: as_tensor(x[start : start + ENCODE_ROWS]), obs)
        parts.append(policy.encode(chunk, {}, starts)[0])
    return tree_map(lambda *leaves: torch.cat(leaves), *parts)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise InputError(f"data set {path} does not exist", field="dataset") from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"data set {path} is not a readable .npz file of arrays: {error}", field="dataset") from error


def _from_numpy(arrays: dict[str, np.ndarray]) -> Transitions:
    for name in ("actions", "rewards", "terminals"):
        if name not in arrays:
            raise InputError(f"the data set lacks {name!r}; it has {sorted(arrays)}", field=name)
    obs = _tree("observations", arrays)
    if obs is None:
        raise InputError(f"the data set lacks 'observations'; it has {sorted(arrays)}", field="observations")
    action, reward = arrays["actions"], arrays["rewards"]
    terminated = arrays["terminals"].astype(np.bool_)
    timeouts = arrays.get("timeouts", np.zeros(len(terminated), np.bool_)).astype(np.bool_)
    next_obs = _tree("next_observations", arrays)
    named = {**_named("observations", obs), **_named("next_observations", next_obs), "actions": action}
    for name, array in {**named, "rewards": reward, "terminals": terminated, "timeouts": timeouts}.items():
        if array.ndim == 0 or len(array) != len(action):
            raise InputError(f"{name} has shape {array.shape}; expected {len(action)} rows, as actions", field=name)
    if next_obs is not None:
        return Transitions(obs, action, reward, next_obs, terminated)
    keep = ~timeouts | terminated
    keep[-1:] &= terminated[-1:]
    next_obs = tree_map(lambda x: np.concatenate([x[1:], x[-1:]])[keep], obs)
    return Transitions(tree_map(lambda x: x[keep], obs), action[keep], reward[keep], next_obs, terminated[keep])


def _from_minari(name: str) -> Transitions:
    minari = require("minari", extra="minari")
    try:
        episodes = list(minari.load_dataset(name).iterate_episodes())
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise InputError(
            f"Minari has no local data set {name!r} ({error}); fetch it with: minari download {name}", field="dataset"
        ) from error
    if not episodes:
        raise InputError(f"the Minari data set {name!r} is empty", field="dataset")

    def join(*leaves: np.ndarray) -> np.ndarray:
        return np.concatenate(leaves)

    return Transitions(
        tree_map(join, *(tree_map(lambda x: np.asarray(x)[:-1], e.observations) for e in episodes)),
        np.concatenate([np.asarray(e.actions) for e in episodes]),
        np.concatenate([np.asarray(e.rewards) for e in episodes]),
        tree_map(join, *(tree_map(lambda x: np.asarray(x)[1:], e.observations) for e in episodes)),
        np.concatenate([np.asarray(e.terminations, dtype=np.bool_) for e in episodes]),
    )


def _check(data: Transitions, obs_space: Space, action_space: Space) -> None:
    if not len(data):
        raise InputError("the data set holds no transition with a known successor", field="observations")
    for name, tree in (("observations", data.obs), ("next_observations", data.next_obs)):
        _check_leaf(name, tree, obs_space)
    _check_leaf("actions", data.action, action_space)
    if data.reward.ndim != 1:
        raise InputError(f"rewards has shape {data.reward.shape}; expected one number a row", field="rewards")
    _check_finite("rewards", data.reward)


def _check_leaf(name: str, value: Any, space: Space) -> None:
    if isinstance(space, DictSpace):
        if not isinstance(value, dict) or sorted(value) != sorted(space.spaces):
            got = sorted(value) if isinstance(value, dict) else "one array"
            raise InputError(f"{name} has entries {got}; expected {sorted(space.spaces)}", field=name)
        for key, sub in space.spaces.items():
            _check_leaf(f"{name}/{key}", value[key], sub)
        return
    if isinstance(value, dict):
        raise InputError(f"{name} has entries {sorted(value)}; expected one array", field=name)
    shape: tuple[int, ...] = ()
    lowest = highest = None
    match space:
        case BoxSpace():
            shape = space.shape
        case DiscreteSpace():
            lowest, highest = np.asarray(space.start), np.asarray(space.start + space.n - 1)
        case MultiDiscreteSpace():
            shape, lowest = (len(space.nvec),), np.asarray(space.lowest)
            highest = lowest + np.asarray(space.nvec) - 1
    if value.shape[1:] != shape:
        raise InputError(f"{name} has rows of shape {value.shape[1:]}; the environment's are {shape}", field=name)
    if lowest is None or highest is None:
        _check_finite(name, value)
    elif value.dtype.kind not in "iu":
        raise InputError(f"{name} has dtype {value.dtype}; expected integers", field=name)
    elif (value < lowest).any() or (value > highest).any():
        raise InputError(f"{name} lies in {value.min()}..{value.max()}; the space is {space}", field=name)


def _check_finite(name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "fiub":
        raise InputError(f"{name} has dtype {array.dtype}; expected numbers", field=name)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
        raise InputError(f"{name} holds NaN or infinity, first in row {row}; remove such rows", field=name)


def _tree(name: str, arrays: dict[str, np.ndarray]) -> Any:
    """The array `name`, or the dictionary of `name/KEY`, or None."""
    if name in arrays:
        return arrays[name]
    parts = {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}
    return parts or None


def _named(name: str, tree: Any) -> dict[str, np.ndarray]:
    """Inverse of `_tree`."""
    if tree is None:
        return {}
    return {f"{name}/{key}": value for key, value in tree.items()} if isinstance(tree, dict) else {name: tree}
