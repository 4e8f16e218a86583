"""Data sets are checked before they are learned from, and become the transitions that were recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.core.errors import ConfigError, InputError
from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl.dataset import OfflineData, collect_dataset, load_transitions

OBS = BoxSpace((3,), "float32")
DISCRETE = DiscreteSpace(2)
BOX = BoxSpace((2,), "float32", (-2.0,), (2.0,))


def arrays(num: int = 10) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    terminals, timeouts = np.zeros(num, bool), np.zeros(num, bool)
    terminals[3], timeouts[6] = True, True
    return {
        "observations": rng.normal(size=(num, 3)).astype(np.float32),
        "actions": rng.integers(0, 2, num),
        "rewards": rng.normal(size=num),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def save(path: Path, data: dict[str, Any]) -> str:
    np.savez(path / "data.npz", **data)
    return str(path / "data.npz")


def test_successors_are_the_next_rows_and_unknown_ones_are_left_out(tmp_path: Path) -> None:
    data = arrays()
    loaded = load_transitions(save(tmp_path, data), OBS, DISCRETE)
    kept = [0, 1, 2, 3, 4, 5, 7, 8]
    assert np.array_equal(loaded.obs, data["observations"][kept])
    assert np.array_equal(loaded.next_obs, data["observations"][[row + 1 for row in kept]])
    assert np.array_equal(loaded.reward, data["rewards"][kept])
    assert loaded.terminated.tolist() == [row == 3 for row in kept]


def test_a_terminal_last_row_is_kept(tmp_path: Path) -> None:
    data = arrays()
    data["terminals"][-1] = True
    assert len(load_transitions(save(tmp_path, data), OBS, DISCRETE)) == 9


def test_given_successors_keep_every_row(tmp_path: Path) -> None:
    data = arrays()
    data["next_observations"] = data["observations"] + 1
    del data["timeouts"]
    loaded = load_transitions(save(tmp_path, data), OBS, DISCRETE)
    assert len(loaded) == 10
    assert np.array_equal(loaded.next_obs, data["next_observations"])


def broken(name: str, value: Any) -> dict[str, Any]:
    data = arrays()
    if value is None:
        del data[name]
    else:
        data[name] = value
    return data


NAN = np.full((10, 3), np.nan, np.float32)
INF = np.zeros(10)
INF[4] = np.inf


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("observations", None),
        ("actions", None),
        ("rewards", None),
        ("terminals", None),
        ("observations", NAN),
        ("observations", np.zeros((10, 4), np.float32)),
        ("observations", np.zeros((9, 3), np.float32)),
        ("observations", np.full((10, 3), "a")),
        ("rewards", INF),
        ("rewards", np.zeros((10, 2))),
        ("rewards", np.zeros(11)),
        ("terminals", np.zeros(3, bool)),
        ("timeouts", np.zeros(3, bool)),
        ("actions", np.full(10, 2)),
        ("actions", np.full(10, -1)),
        ("actions", np.zeros(10)),
        ("actions", np.zeros((10, 2), int)),
        ("next_observations", NAN),
        ("next_observations", np.zeros((10, 2), np.float32)),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field) as caught:
        load_transitions(save(tmp_path, broken(field, value)), OBS, DISCRETE)
    assert caught.value.field == field


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_files_that_are_no_archives_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"data\.npz") as caught:
        load_transitions(str(path), OBS, DISCRETE)
    assert caught.value.field == "dataset"


def test_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, {**arrays(), "rewards": np.array([{"a": 1}] * 10, dtype=object)})
    with pytest.raises(InputError, match=r"data\.npz"):
        load_transitions(path, OBS, DISCRETE)


def test_missing_files_and_names_are_input_errors(tmp_path: Path) -> None:
    for source in ("", str(tmp_path / "no.npz")):
        with pytest.raises(InputError):
            load_transitions(source, OBS, DISCRETE)


def test_dictionary_observations(tmp_path: Path) -> None:
    data = arrays()
    obs = data.pop("observations")
    space = DictSpace({"a": OBS, "b": DiscreteSpace(4)})
    path = save(tmp_path, {**data, "observations/a": obs, "observations/b": np.arange(10) % 4})
    loaded = load_transitions(path, space, DISCRETE)
    assert np.array_equal(loaded.next_obs["b"][:3], [1, 2, 3])
    with pytest.raises(InputError, match="entries"):
        load_transitions(path, OBS, DISCRETE)
    with pytest.raises(InputError, match=r"observations/b"):
        load_transitions(path, DictSpace({"a": OBS, "b": DiscreteSpace(3)}), DISCRETE)


def make_policy(**kwargs: Any) -> Policy:
    head = "gaussian" if kwargs.get("action_space", DISCRETE) is BOX else "categorical"
    spec = {"obs_space": OBS, "action_space": DISCRETE, "head": head, "critic": False, **kwargs}
    return Policy(PolicySpec(**spec), seed=0)


def test_batches_hold_what_the_policy_sees(tmp_path: Path) -> None:
    data = {**arrays(), "actions": np.linspace(-2, 2, 20).reshape(10, 2).astype(np.float32)}
    transitions = load_transitions(save(tmp_path, data), OBS, BOX)
    policy = make_policy(action_space=BOX, normalise_obs=True)
    offline = OfflineData(transitions, policy, gamma=0.9, seed=0)
    assert torch.allclose(offline.features.mean(0), torch.zeros(3), atol=1e-5)
    batch = offline.sample(16, 3)
    rows = batch.index_B.numpy()
    assert np.array_equal(batch.action.numpy(), transitions.action[rows])
    assert np.allclose(batch.discount_B.numpy(), 0.9 * ~transitions.terminated[rows])
    assert torch.equal(offline.sample(16, 3).index_B, batch.index_B)
    assert not torch.equal(offline.sample(16, 4).index_B, batch.index_B)


@pytest.mark.parametrize("change", [{"frame_stack": 2}, {"network": NetworkConfig(recurrent="lstm")}])
def test_policies_with_memory_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    transitions = load_transitions(save(tmp_path, arrays()), OBS, DISCRETE)
    with pytest.raises(ConfigError, match="frame_stack"):
        OfflineData(transitions, make_policy(**change), gamma=0.9, seed=0)


@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
def test_collected_data_loads_and_successors_follow(tmp_path: Path, autoreset: Any) -> None:
    config = EnvConfig(num_envs=2, time_limit=15, autoreset=autoreset, vectoriser="sync")
    env = make_env(config, seed=0)
    policy = Policy(PolicySpec(obs_space=env.obs_space, action_space=env.action_space, head="categorical"), seed=0)
    path = collect_dataset(policy, config, steps=60, seed=0, path=tmp_path / "sub" / "data.npz")
    data = load_transitions(str(path), env.obs_space, env.action_space)
    env.close()
    stored = np.load(path)
    ended = stored["terminals"] | stored["timeouts"]
    assert ended.any()
    inside = np.flatnonzero(~ended[:-1])
    inside = inside[inside != len(data) // 2 - 1] if autoreset == "same_step" else inside
    same = (data.next_obs[inside] == data.obs[inside + 1]).all(axis=1)
    assert same.sum() >= len(inside) - 1
    with pytest.raises(ConfigError, match=r"\.npz"):
        collect_dataset(policy, config, steps=60, seed=0, path=tmp_path / "data.csv")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_data_set_equals_its_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    gym = pytest.importorskip("gymnasium")
    pytest.importorskip("jax", reason="Minari's writer asks for it; its reader, which is ours to test, does not")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = minari.DataCollector(gym.make("CartPole-v1", max_episode_steps=12))
    env.reset(seed=0)
    env.action_space.seed(0)
    rewards = []
    for _ in range(40):
        _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        rewards.append(reward)
        if terminated or truncated:
            env.reset()
    env.create_dataset(
        "test/cartpole-v0", algorithm_name="random", author="", author_email="", code_permalink="", description=""
    )
    env.close()
    data = load_transitions("minari:test/cartpole-v0", BoxSpace((4,), "float32"), DISCRETE)
    assert np.array_equal(data.reward, rewards)
    assert data.obs.shape == data.next_obs.shape == (40, 4)
    assert not np.array_equal(data.obs, data.next_obs)
    with pytest.raises(InputError, match="minari download"):
        load_transitions("minari:test/none-v0", OBS, DISCRETE)
