"""Gymnasium's MuJoCo v5 tasks over N rows: one `MjData` per row, observations and rewards in batched NumPy.

Stepping a row is the same `mj_step` on the same kind of `MjData` that the single environment makes, so warm starts and
solver iterations agree bit for bit; what is saved is the Python around it (a third of a HalfCheetah step). Threads step
disjoint rows (`mj_step` releases the interpreter lock). `mujoco.rollout` was not used: it hands back no warm start, so
a step would differ from Gymnasium's.
"""

# N environments

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from lockstep.core.errors import DeadlineError
from lockstep.core.extras import require
from lockstep.envs.control.batch import BatchSim, Outcome

Judgement = tuple[np.ndarray, np.ndarray]
"""(reward_N float64, terminated_N bool)."""


@dataclass(frozen=True)
class Task:
    """How a task reads its simulator.

    `fields` are the `MjData` arrays that it reads besides qpos and qvel; `observe(sim)` gives [N, ...]; `judge(sim,
    actions)` gives rewards and terminations, where `sim.before` is `position(sim)` of the step before.
    """

    observe: Callable[[MujocoSim], np.ndarray]
    judge: Callable[[MujocoSim, np.ndarray], Judgement]
    position: Callable[[MujocoSim], np.ndarray]
    fields: tuple[str, ...] = ()
    needs_forces: bool = False
    """Reads contact forces, which MuJoCo computes only when asked."""


class MujocoSim(BatchSim):
    """N copies of one MuJoCo task.

    Attributes:
        spec: the single environment; holds the model, the weights and ranges of the reward, and draws the resets.
        arrays: copies of qpos, qvel and the task's fields after the last step, [N, ...] each.
        dt: seconds between steps.
        before: positions before the last step, as the task defines them.
    """

    def __init__(self, single: gym.Env, task: Task, num_envs: int, num_threads: int) -> None:
        self.mujoco = require("mujoco", extra="mujoco")
        self.single, self.task, self.num_envs = single, task, num_envs
        self.spec = _untyped(single.unwrapped)
        self.observation_space, self.action_space = single.observation_space, single.action_space
        self.model: Any = self.spec.model
        self.dt: float = self.spec.dt
        self.data = [self.mujoco.MjData(self.model) for _ in range(num_envs)]
        names = ("qpos", "qvel", *task.fields)
        # Views into the simulators' own memory, made once: reading the attribute costs a microsecond each time.
        self._views = {name: [vars_of(data, name) for data in self.data] for name in names}
        self._controls = [data.ctrl for data in self.data]
        self.arrays = {name: np.stack(views) for name, views in self._views.items()}
        self.before = np.copy(task.position(self))
        self._never_N = np.zeros(num_envs, np.bool_)
        num_threads = max(1, min(num_threads, num_envs))
        self._chunks = [chunk.tolist() for chunk in np.array_split(np.arange(num_envs), num_threads)]
        self._pool = ThreadPoolExecutor(num_threads - 1, "mujoco") if num_threads > 1 else None

    def reset_rows(self, rows: list[int], seeds: list[int]) -> None:
        """Let the single environment draw and settle the start, and copy its simulator."""
        for i, seed in zip(rows, seeds, strict=True):
            self.spec.reset(seed=seed)
            self.mujoco.mj_copyData(self.data[i], self.model, self.spec.data)
            self._read(i)
        self.before[rows] = self.task.position(self)[rows]

    def step(self, actions: np.ndarray) -> Outcome:
        """`frame_skip` simulator steps of every row."""
        if self._pool is None:
            self._step_rows(self._chunks[0], actions)
        else:
            futures = [self._pool.submit(self._step_rows, rows, actions) for rows in self._chunks[1:]]
            self._step_rows(self._chunks[0], actions)
            done, late = wait(futures, timeout=60.0)
            if late:
                raise DeadlineError("a MuJoCo thread has not finished a step in 60 s; use num_threads=1")
            for future in done:
                future.result()
        reward_N, terminated_N = self.task.judge(self, actions)
        self.before = np.copy(self.task.position(self))
        return reward_N, terminated_N, self._never_N

    def observe(self) -> np.ndarray:
        """[N, size] float32."""
        return self.task.observe(self).astype(np.float32)

    def get_state(self) -> dict[str, np.ndarray]:
        """MuJoCo's integration state (with warm starts), and what the task reads."""
        which = self.mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty((self.num_envs, self.mujoco.mj_stateSize(self.model, which)))
        for row, data in zip(state, self.data, strict=True):
            self.mujoco.mj_getState(self.model, data, row, which)
        return {"integration": state, "before": self.before.copy()} | {
            f"array_{name}": array.copy() for name, array in self.arrays.items()
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse."""
        which = self.mujoco.mjtState.mjSTATE_INTEGRATION
        for row, data in zip(np.asarray(state["integration"]), self.data, strict=True):
            self.mujoco.mj_setState(self.model, data, row, which)
        self.before = np.array(state["before"])
        for name, array in self.arrays.items():
            array[:] = state[f"array_{name}"]

    def close(self) -> None:
        """End the threads and close the single environment."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self.single.close()

    def _step_rows(self, rows: list[int], actions: np.ndarray) -> None:
        model, frame_skip, step = self.model, self.spec.frame_skip, self.mujoco.mj_step
        for i in rows:
            data = self.data[i]
            self._controls[i][:] = actions[i]
            step(model, data, frame_skip)
            if self.task.needs_forces:
                self.mujoco.mj_rnePostConstraint(model, data)
            self._read(i)

    def _read(self, i: int) -> None:
        for name, array in self.arrays.items():
            array[i] = self._views[name][i]


def _untyped(env: Any) -> Any:
    """Gymnasium types `unwrapped` as a plain `Env`; the task's own attributes are what is needed."""
    return env


def vars_of(data: Any, name: str) -> np.ndarray:
    """Array `name` of an `MjData` (an extension type, whose fields are properties of its class)."""
    view: np.ndarray = type(data).__dict__[name].__get__(data)
    return view


def control_cost(sim: MujocoSim, actions: np.ndarray) -> np.ndarray:
    """Weight times the squared actions, summed in the actions' own precision as Gymnasium does. [N]"""
    cost: np.ndarray = sim.spec._ctrl_cost_weight * np.add.reduce(np.square(actions), axis=1)
    return cost


def _x(sim: MujocoSim) -> np.ndarray:
    return sim.arrays["qpos"][:, 0]


def _velocity(sim: MujocoSim) -> np.ndarray:
    velocity: np.ndarray = (sim.task.position(sim) - sim.before) / sim.dt
    return velocity


def _observe_skipping(skip: int, clip: bool = False) -> Callable[[MujocoSim], np.ndarray]:
    def observe(sim: MujocoSim) -> np.ndarray:
        qvel = np.clip(sim.arrays["qvel"], -10, 10) if clip else sim.arrays["qvel"]
        start = skip if sim.spec._exclude_current_positions_from_observation else 0
        return np.concatenate((sim.arrays["qpos"][:, start:], qvel), axis=1)

    return observe


def _judge_forward(sim: MujocoSim, actions: np.ndarray) -> Judgement:
    reward_N = sim.spec._forward_reward_weight * _velocity(sim) - control_cost(sim, actions)
    return reward_N, np.zeros(sim.num_envs, np.bool_)


def _judge_walker(healthy: Callable[[MujocoSim], np.ndarray]) -> Callable[[MujocoSim, np.ndarray], Judgement]:
    def judge(sim: MujocoSim, actions: np.ndarray) -> Judgement:
        spec, healthy_N = sim.spec, healthy(sim)
        costs_N: np.ndarray = control_cost(sim, actions)
        if sim.task.needs_forces:
            force = np.clip(sim.arrays["cfrc_ext"], *spec._contact_force_range)
            costs_N = costs_N + spec._contact_cost_weight * np.sum(np.square(force).reshape(sim.num_envs, -1), axis=1)
        reward_N = spec._forward_reward_weight * _velocity(sim) + healthy_N * spec._healthy_reward - costs_N
        return reward_N, ~healthy_N & bool(spec._terminate_when_unhealthy)

    return judge


def _within(value: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    inside: np.ndarray = (bounds[0] < value) & (value < bounds[1])
    return inside


def _walker_healthy(sim: MujocoSim) -> np.ndarray:
    qpos = sim.arrays["qpos"]
    healthy: np.ndarray = _within(qpos[:, 1], sim.spec._healthy_z_range)
    healthy &= _within(qpos[:, 2], sim.spec._healthy_angle_range)
    return healthy


def _hopper_healthy(sim: MujocoSim) -> np.ndarray:
    state = np.concatenate((sim.arrays["qpos"][:, 2:], sim.arrays["qvel"]), axis=1)
    healthy: np.ndarray = _walker_healthy(sim) & _within(state, sim.spec._healthy_state_range).all(axis=1)
    return healthy


def _ant_healthy(sim: MujocoSim) -> np.ndarray:
    qpos, (low, high) = sim.arrays["qpos"], sim.spec._healthy_z_range
    finite = np.isfinite(qpos).all(axis=1) & np.isfinite(sim.arrays["qvel"]).all(axis=1)
    healthy: np.ndarray = finite & (low <= qpos[:, 2]) & (qpos[:, 2] <= high)
    return healthy


def _ant_x(sim: MujocoSim) -> np.ndarray:
    body = sim.spec._main_body
    index = body if isinstance(body, int) else sim.model.body(body).id
    x: np.ndarray = sim.arrays["xpos"][:, index, 0]
    return x


def _observe_ant(sim: MujocoSim) -> np.ndarray:
    obs = _observe_skipping(2)(sim)
    if not sim.spec._include_cfrc_ext_in_observation:
        return obs
    force = np.clip(sim.arrays["cfrc_ext"], *sim.spec._contact_force_range)
    return np.concatenate((obs, force[:, 1:].reshape(sim.num_envs, -1)), axis=1)


def _observe_pendulum(sim: MujocoSim) -> np.ndarray:
    return np.concatenate((sim.arrays["qpos"], sim.arrays["qvel"]), axis=1)


def _judge_pendulum(sim: MujocoSim, actions: np.ndarray) -> Judgement:
    obs = _observe_pendulum(sim)
    terminated_N = ~np.isfinite(obs).all(axis=1) | (np.abs(obs[:, 1]) > 0.2)
    return (~terminated_N).astype(np.float64), terminated_N


def _observe_double(sim: MujocoSim) -> np.ndarray:
    qpos, qvel = sim.arrays["qpos"], np.clip(sim.arrays["qvel"], -10, 10)
    constraint = np.clip(sim.arrays["qfrc_constraint"][:, :1], -10, 10)
    return np.concatenate((qpos[:, :1], np.sin(qpos[:, 1:]), np.cos(qpos[:, 1:]), qvel, constraint), axis=1)


def _judge_double(sim: MujocoSim, actions: np.ndarray) -> Judgement:
    x, y = sim.arrays["site_xpos"][:, 0, 0], sim.arrays["site_xpos"][:, 0, 2]
    v1, v2 = sim.arrays["qvel"][:, 1], sim.arrays["qvel"][:, 2]
    terminated_N = y <= 1
    distance_N = 0.01 * x**2 + (y - 2) ** 2
    velocity_N = 1e-3 * v1**2 + 5e-3 * v2**2
    return sim.spec._healthy_reward * (~terminated_N).astype(np.int64) - distance_N - velocity_N, terminated_N


_ANT = Task(_observe_ant, _judge_walker(_ant_healthy), _ant_x, ("xpos", "cfrc_ext"), needs_forces=True)
_DOUBLE = Task(_observe_double, _judge_double, _x, ("qfrc_constraint", "site_xpos"))

TASKS = {
    "HalfCheetah-v5": Task(_observe_skipping(1), _judge_forward, _x),
    "Swimmer-v5": Task(_observe_skipping(2), _judge_forward, _x),
    "Hopper-v5": Task(_observe_skipping(1, clip=True), _judge_walker(_hopper_healthy), _x),
    "Walker2d-v5": Task(_observe_skipping(1, clip=True), _judge_walker(_walker_healthy), _x),
    "Ant-v5": _ANT,
    "InvertedPendulum-v5": Task(_observe_pendulum, _judge_pendulum, _x),
    "InvertedDoublePendulum-v5": _DOUBLE,
}
"""Tasks with a verified native form."""
