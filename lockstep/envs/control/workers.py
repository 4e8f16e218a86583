"""Environments in worker processes, several per worker, with arrays in shared memory.

    learner process                        worker k (one process, a SerialVectorEnv of its share)
    ---------------                        ----------------------------------------------------
    step: write actions  -- b"s" pipe -->  step its rows, write obs, reward, ended, final obs
          wait for all   <-- b"." pipe --  (or b"!" and the traceback)
    reset, restore: the same with a pickled command
    close: b"c" to all, join with the deadline, then terminate

Each wait has the deadline of the config. A worker ends when told to, when its pipe closes (the learner died), or with
an exception, which the learner raises as an `EnvError` that names the worker's environments. Gymnasium's
`AsyncVectorEnv` runs one process per environment and pickles every info; on few cores that costs more than it saves.
"""

# N environments

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from lockstep.core.errors import DeadlineError, EnvError
from lockstep.envs.control.episodes import Replay, SeededEpisodes
from lockstep.envs.control.serial import SerialVectorEnv, leaf_layout

Makers = Sequence[Callable[[], SeededEpisodes]]
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]


class SharedArrays:
    """Named arrays over one block of shared memory; picklable to a child process."""

    def __init__(self, context: Any, layout: Layout) -> None:
        self._layout = layout
        size = sum(_aligned(shape, dtype) for shape, dtype in layout.values())
        self._block = context.RawArray("b", max(size, 1))

    def arrays(self) -> dict[str, np.ndarray]:
        """Views of all arrays, by name."""
        views, offset = {}, 0
        for name, (shape, dtype) in self._layout.items():
            count = int(np.prod(shape))
            views[name] = np.frombuffer(self._block, dtype, count, offset).reshape(shape)
            offset += _aligned(shape, dtype)
        return views


class WorkerVectorEnv(gym.vector.VectorEnv):
    """Steps `SeededEpisodes` environments in `num_workers` processes; Gymnasium's vector API in any autoreset mode."""

    def __init__(
        self,
        makers: Makers,
        mode: AutoresetMode,
        spaces: tuple[gym.Space[Any], gym.Space[Any]],
        *,
        num_workers: int,
        deadline_s: float,
    ) -> None:
        self.num_envs, self.mode, self._deadline_s = len(makers), mode, deadline_s
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = spaces
        self.observation_space = batch_space(spaces[0], self.num_envs)
        self.action_space = batch_space(spaces[1], self.num_envs)
        self.num_workers = min(num_workers or os.cpu_count() or 1, self.num_envs)
        # fork would copy a process whose threads (torch, OpenMP) may hold locks.
        context: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
        if os.name == "posix":
            context.set_forkserver_preload(["lockstep.envs.control.workers"])
        self._obs_layout = leaf_layout(spaces[0], self.num_envs)
        shared = SharedArrays(context, _layout(self._obs_layout, self.action_space, self.num_envs))
        self._arrays = shared.arrays()
        self._rows = np.array_split(np.arange(self.num_envs), self.num_workers)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rows in self._rows:
            mine, theirs = context.Pipe()
            arguments = (list(makers[rows[0] : rows[-1] + 1]), mode, theirs, shared, int(rows[0]), int(rows[-1]) + 1)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self._gather("start")

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset all environments, or those of `options["reset_mask"]`. `seed` is the base seed of all of them."""
        mask = (options or {}).get("reset_mask")
        self._command("reset", [(seed, None if mask is None else mask[rows]) for rows in self._rows])
        return self._obs("obs/"), {}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of every environment."""
        arrays = self._arrays
        arrays["actions"][:] = actions
        arrays["has_final"][:] = False
        self._send([b"s"] * self.num_workers)
        self._gather("step")
        terminated_N, truncated_N = arrays["terminated"].copy(), arrays["truncated"].copy()
        infos: dict[str, Any] = {}
        if self.mode is AutoresetMode.SAME_STEP and np.count_nonzero(arrays["has_final"]):
            infos["final_obs"] = self._obs("final/")
        return self._obs("obs/"), arrays["rewards"].copy(), terminated_N, truncated_N, infos

    def restore(self, base_seed: int, plans: list[Replay]) -> tuple[Any, np.ndarray]:
        """Replay every environment's plan; (observations, whether each replay ended where it should) follow."""
        self._command("restore", [(base_seed, plans)] * self.num_workers)
        return self._obs("obs/"), self._arrays["has_final"].copy()

    def close_extras(self, **kwargs: Any) -> None:
        """End the workers; those that do not answer are terminated."""
        for pipe in self._pipes:
            try:
                pipe.send_bytes(b"c")
            except OSError:
                continue  # the worker is gone already
        limit = time.monotonic() + min(self._deadline_s, 5.0)
        for process in self._processes:
            process.join(max(0.0, limit - time.monotonic()))
            if process.is_alive():
                process.terminate()
                process.join(1.0)
        for pipe in self._pipes:
            pipe.close()

    def _obs(self, prefix: str) -> Any:
        copies = {key: self._arrays[prefix + key].copy() for key in self._obs_layout}
        return copies if isinstance(self.single_observation_space, gym.spaces.Dict) else copies[""]

    def _command(self, name: str, arguments: list[tuple[Any, ...]]) -> None:
        self._send([b"p" + pickle.dumps((name, argument)) for argument in arguments])
        self._gather(name)

    def _send(self, messages: list[bytes]) -> None:
        for k, (pipe, message) in enumerate(zip(self._pipes, messages, strict=True)):
            try:
                pipe.send_bytes(message)
            except OSError as error:
                raise EnvError(f"{self._name(k)} is gone ({error}); {self._exit(k)}") from error

    def _gather(self, what: str) -> None:
        """Wait for every worker's answer to `what`."""
        limit = time.monotonic() + self._deadline_s
        for k, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, limit - time.monotonic())):
                raise DeadlineError(
                    f"{self._name(k)} did not finish {what!r} in deadline_s={self._deadline_s:g}; raise deadline_s, "
                    "or run vectoriser='sync' to see where the environment hangs"
                )
            try:
                answer = pipe.recv_bytes()
            except (EOFError, OSError) as error:
                raise EnvError(f"{self._name(k)} died during {what!r}; {self._exit(k)}") from error
            if answer[:1] == b"!":
                raise EnvError(f"{self._name(k)} failed during {what!r}:\n{answer[1:].decode()}")

    def _name(self, k: int) -> str:
        rows = self._rows[k]
        return f"worker {k} (environments {rows[0]} to {rows[-1]})"

    def _exit(self, k: int) -> str:
        self._processes[k].join(1.0)
        return f"its exit code is {self._processes[k].exitcode}"


def _layout(obs: Layout, action_space: gym.Space[Any], num_envs: int) -> Layout:
    flags = {name: ((num_envs,), np.dtype(np.bool_)) for name in ("terminated", "truncated", "has_final")}
    assert action_space.shape is not None
    return {
        "actions": (action_space.shape, np.dtype(action_space.dtype)),
        "rewards": ((num_envs,), np.dtype(np.float64)),
        **flags,
        **{f"obs/{key}": leaf for key, leaf in obs.items()},
        **{f"final/{key}": leaf for key, leaf in obs.items()},
    }


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return -(-int(np.prod(shape)) * dtype.itemsize // 64) * 64


def _work(makers: Makers, mode: AutoresetMode, pipe: Connection, shared: SharedArrays, first: int, end: int) -> None:
    """A worker's life: answer each message once, end at b"c" or when the pipe closes."""
    env = None
    try:
        env = SerialVectorEnv(makers, mode)
        rows = {name: array[first:end] for name, array in shared.arrays().items()}
        pipe.send_bytes(b".")
        while (message := pipe.recv_bytes())[:1] != b"c":
            if message[:1] == b"s":
                _step(env, rows)
            else:
                name, argument = pickle.loads(message[1:])
                _command(env, rows, name, argument)
            pipe.send_bytes(b".")
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass  # the learner is gone, or stops all of us
    except Exception:
        pipe.send_bytes(b"!" + traceback.format_exc().encode())
    finally:
        if env is not None:
            env.close()


def _step(env: SerialVectorEnv, rows: dict[str, np.ndarray]) -> None:
    obs, rows["rewards"][:], rows["terminated"][:], rows["truncated"][:], infos = env.step(rows["actions"].copy())
    _write(rows, "obs/", obs)
    if env.mode is AutoresetMode.SAME_STEP:
        # Rows of a worker without an end are read too when another worker has one.
        _write(rows, "final/", infos.get("final_obs", obs))
        rows["has_final"][:] = "final_obs" in infos


def _command(env: SerialVectorEnv, rows: dict[str, np.ndarray], name: str, argument: tuple[Any, ...]) -> None:
    if name == "reset":
        seed, mask = argument
        obs, _ = env.reset(seed=seed, options=None if mask is None else {"reset_mask": mask})
    else:
        assert name == "restore", name
        obs, rows["has_final"][:] = env.restore(*argument)
    _write(rows, "obs/", obs)


def _write(rows: dict[str, np.ndarray], prefix: str, obs: Any) -> None:
    for key, leaf in obs.items() if isinstance(obs, dict) else (("", obs),):
        rows[prefix + key][:] = leaf
