"""One measurement in a process of its own: `python -m lockstep.cli.bench_worker WHO CASE STEPS THREADS`, JSON on stdout.

A process per measurement keeps thread pools, allocators and compiled code of one library away from the other.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lockstep.core.errors import ConfigError, unknown_name
from lockstep.core.extras import require
from lockstep.envs.control.config import EnvConfig
from lockstep.layers.linear import ComputeDtype
from lockstep.models.control.spec import NetworkConfig
from lockstep.rl.algorithms import train_function
from lockstep.rl.control.dqn import DQNConfig
from lockstep.rl.control.ppo import PPOConfig
from lockstep.rl.control.sac import SACConfig
from lockstep.rl.offpolicy import ReplayConfig
from lockstep.rl.session import RunConfig, Session


@dataclasses.dataclass(frozen=True)
class Case:
    """The same training, said to both libraries: our config, and the peers' class name, environment and arguments."""

    ours: Any
    algorithm: str
    env_id: str
    num_envs: int
    arguments: dict[str, Any]
    warmup: int


def _ppo_cartpole() -> Case:
    ours = PPOConfig(
        env=EnvConfig(id="CartPole-v1", num_envs=8),
        num_steps=32,
        num_epochs=20,
        minibatch_size=256,
        learning_rate=1e-3,
        gamma=0.98,
        gae_lambda=0.8,
    )
    peer = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "learning_rate": 1e-3, "gamma": 0.98, "gae_lambda": 0.8}
    return Case(ours, "PPO", "CartPole-v1", 8, peer, 2048)


def _ppo_halfcheetah(num_envs: int) -> Case:
    env = EnvConfig(id="HalfCheetah-v5", num_envs=num_envs)
    ours = PPOConfig(env=env, num_steps=2048, num_epochs=10, minibatch_size=64, learning_rate=3e-4)
    return Case(ours, "PPO", "HalfCheetah-v5", num_envs, {}, 2048 * num_envs)


def _dqn_cartpole() -> Case:
    ours = DQNConfig(
        env=EnvConfig(id="CartPole-v1", num_envs=1),
        network=NetworkConfig(hidden_sizes=(64, 64), activation="relu", init="uniform"),
        replay=ReplayConfig(buffer_size=100_000, batch_size=32, learning_starts=100, train_freq=4, gradient_steps=1),
        learning_rate=1e-4,
        target_every=10_000,
    )
    return Case(ours, "DQN", "CartPole-v1", 1, {"buffer_size": 100_000}, 1000)


def _dqn_cartpole_zoo(dtype: ComputeDtype) -> Case:
    ours = DQNConfig(
        env=EnvConfig(id="CartPole-v1", num_envs=1),
        network=NetworkConfig(hidden_sizes=(256, 256), activation="relu", init="uniform", compute_dtype=dtype),
        run=RunConfig(threads=2),
        replay=ReplayConfig(
            buffer_size=100_000, batch_size=64, learning_starts=1000, train_freq=256, gradient_steps=128
        ),
        learning_rate=2.3e-3,
        target_every=10,
    )
    peer = {
        "learning_rate": 2.3e-3,
        "batch_size": 64,
        "buffer_size": 100_000,
        "learning_starts": 1000,
        "train_freq": 256,
        "gradient_steps": 128,
        "target_update_interval": 10,
        "policy_kwargs": {"net_arch": [256, 256]},
    }
    return Case(ours, "DQN", "CartPole-v1", 1, peer, 2048)


def _sac_halfcheetah(dtype: ComputeDtype, threads: int) -> Case:
    ours = SACConfig(
        env=EnvConfig(id="HalfCheetah-v5", num_envs=1),
        network=NetworkConfig(hidden_sizes=(256, 256), activation="relu", init="uniform", compute_dtype=dtype),
        run=RunConfig(threads=threads),
        replay=ReplayConfig(buffer_size=1_000_000, batch_size=256, learning_starts=100),
        learning_rate=3e-4,
    )
    return Case(ours, "SAC", "HalfCheetah-v5", 1, {}, 500)


CASES: dict[str, Callable[[], Case]] = {
    "ppo-cartpole-8": _ppo_cartpole,
    "ppo-halfcheetah-1": lambda: _ppo_halfcheetah(1),
    "ppo-halfcheetah-8": lambda: _ppo_halfcheetah(8),
    "dqn-cartpole": _dqn_cartpole,
    "dqn-cartpole-zoo": lambda: _dqn_cartpole_zoo("fp32"),
    "dqn-cartpole-zoo-bf16": lambda: _dqn_cartpole_zoo("bf16"),
    "sac-halfcheetah": lambda: _sac_halfcheetah("fp32", 2),
    "sac-halfcheetah-bf16": lambda: _sac_halfcheetah("bf16", 2),
}


def measure_ours(case: Case, steps: int) -> float:
    """Environment steps per second of collecting and learning, warm-up excluded."""
    total = case.warmup + steps
    run = dataclasses.replace(
        case.ours.run, total_steps=total, log_every=max(case.warmup // 2, 1), final_episodes=0, tensorboard=False
    )
    config = dataclasses.replace(case.ours, run=run)
    points: list[tuple[int, float]] = []
    session = Session(run, config.env, on_progress=lambda step, _, m: points.append((step, session.train_seconds)))
    train_function(type(config).__name__)[1](config, session)
    begin = next(point for point in points if point[0] >= case.warmup)
    end = points[-1]
    return (end[0] - begin[0]) / (end[1] - begin[1])


def measure_peer(who: str, case: Case, steps: int) -> float:
    """The same for Stable-Baselines3 or SBX: `learn` after a warm-up `learn` (which also compiles)."""
    module = require("stable_baselines3" if who == "sb3" else "sbx", extra="bench")
    make_vec_env = require("stable_baselines3.common.env_util", extra="bench").make_vec_env
    env = make_vec_env(case.env_id, n_envs=case.num_envs, seed=1)
    device = "cpu" if who == "sb3" else "auto"
    model = module.__dict__[case.algorithm]("MlpPolicy", env, seed=1, device=device, **case.arguments)
    model.learn(case.warmup)
    before = model.num_timesteps
    start = time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - start
    return float((model.num_timesteps - before) / seconds)


def predict_latency(who: str) -> float:
    """Microseconds of one best-action prediction of the CartPole policy, median of 200 batches of 100 calls."""
    obs = np.array([0.01, -0.02, 0.03, 0.04], dtype=np.float32)
    call = _predict_call(who, obs)
    for _ in range(200):
        call()
    times = []
    for _ in range(200):
        start = time.perf_counter()
        for _ in range(100):
            call()
        times.append((time.perf_counter() - start) / 100)
    return statistics.median(times) * 1e6


def _predict_call(who: str, obs: np.ndarray) -> Callable[[], Any]:
    if who == "sb3":
        module = require("stable_baselines3", extra="bench")
        model = module.PPO("MlpPolicy", "CartPole-v1", device="cpu")
        return lambda: model.predict(obs, deterministic=True)
    from lockstep.core.spaces import BoxSpace, DiscreteSpace
    from lockstep.models.control.policy import Policy
    from lockstep.models.control.spec import PolicySpec

    policy = Policy(PolicySpec(obs_space=BoxSpace((4,), "float32"), action_space=DiscreteSpace(2), head="categorical"))
    if who == "ours":
        return lambda: policy.predict(obs)
    return _onnx_call(policy, obs)


def _onnx_call(policy: Any, obs: np.ndarray) -> Callable[[], Any]:
    import tempfile
    from pathlib import Path

    from lockstep.interop import export_onnx

    runtime = require("onnxruntime", extra="onnx")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.onnx"
        export_onnx(policy, path)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = [session.get_outputs()[0].name]
    row = obs[None]
    return lambda: session.run(outputs, {name: row})


def main() -> None:
    who, name, steps, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if threads:
        torch.set_num_threads(threads)
    if name == "predict":
        print(json.dumps({"value": predict_latency(who)}))
        return
    if name not in CASES:
        raise ConfigError(unknown_name("case", name, CASES))
    case = CASES[name]()
    value = measure_ours(case, steps) if who == "ours" else measure_peer(who, case, steps)
    print(json.dumps({"value": value}))


if __name__ == "__main__":
    main()
