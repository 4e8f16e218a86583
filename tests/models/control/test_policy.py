"""A policy is its whole pipeline, and does the same wherever it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep import kernels
from lockstep.core.errors import CheckpointError, ConfigError, InputError
from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace, MultiDiscreteSpace, Space
from lockstep.models.control.actor import Actor
from lockstep.models.control.folder import load_policy, save_policy
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import HeadKind, NetworkConfig, PolicySpec

VECTOR = BoxSpace((5,), "float32")
IMAGE = BoxSpace((10, 10, 4), "uint8", (0.0,), (255.0,))
TORQUE = BoxSpace((3,), "float32", (-2.0, -1.0, 0.0), (2.0, 1.0, 4.0))
MASKED = DictSpace({"obs": VECTOR, "action_mask": BoxSpace((3,), "bool", (0.0,), (1.0,))})
MIXED = DictSpace({"camera": IMAGE, "speed": VECTOR, "gear": DiscreteSpace(4)})

CASES: dict[str, PolicySpec] = {
    "mlp-discrete": PolicySpec(obs_space=VECTOR, action_space=DiscreteSpace(3), head="categorical"),
    "mlp-start": PolicySpec(obs_space=VECTOR, action_space=DiscreteSpace(3, start=2), head="categorical"),
    "mlp-normalised": PolicySpec(
        obs_space=VECTOR, action_space=DiscreteSpace(3), head="categorical", normalise_obs=True
    ),
    "multi": PolicySpec(obs_space=VECTOR, action_space=MultiDiscreteSpace((3, 2)), head="categorical"),
    "gaussian": PolicySpec(obs_space=VECTOR, action_space=TORQUE, head="gaussian", normalise_obs=True),
    "squashed": PolicySpec(obs_space=VECTOR, action_space=TORQUE, head="squashed", critic=False),
    "deterministic": PolicySpec(obs_space=VECTOR, action_space=TORQUE, head="deterministic", critic=False),
    "q": PolicySpec(obs_space=VECTOR, action_space=DiscreteSpace(3), head="q", critic=False),
    "q-rainbow": PolicySpec(
        obs_space=VECTOR,
        action_space=DiscreteSpace(3),
        head="q",
        critic=False,
        dueling=True,
        noisy=True,
        num_atoms=5,
        support=(-1.0, 1.0),
    ),
    "stack": PolicySpec(obs_space=VECTOR, action_space=DiscreteSpace(3), head="categorical", frame_stack=3),
    "image": PolicySpec(
        obs_space=IMAGE,
        action_space=DiscreteSpace(3),
        head="categorical",
        frame_stack=2,
        network=NetworkConfig(hidden_sizes=(), encoder_size=32),
    ),
    "impala": PolicySpec(
        obs_space=IMAGE,
        action_space=DiscreteSpace(3),
        head="categorical",
        network=NetworkConfig(hidden_sizes=(), encoder="impala_cnn", encoder_size=32),
    ),
    "lstm": PolicySpec(
        obs_space=VECTOR,
        action_space=DiscreteSpace(3),
        head="categorical",
        network=NetworkConfig(recurrent="lstm", recurrent_size=17),
    ),
    "gru": PolicySpec(
        obs_space=MIXED,
        action_space=TORQUE,
        head="gaussian",
        normalise_obs=True,
        network=NetworkConfig(recurrent="gru", recurrent_size=9, encoder_size=16),
    ),
    "masked": PolicySpec(obs_space=MASKED, action_space=DiscreteSpace(3), head="categorical"),
    "dict": PolicySpec(
        obs_space=MIXED,
        action_space=DiscreteSpace(2),
        head="categorical",
        network=NetworkConfig(encoder_size=16),
        normalise_obs=True,
    ),
}


def make_policy(name: str) -> Policy:
    """A policy with every weight and statistic away from its initial value."""
    policy = Policy(CASES[name], seed=3)
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    rng = np.random.default_rng(0)
    policy.preprocess.update(tree_tensor(random_obs(CASES[name].obs_space, 50, rng)))
    return policy


def random_obs(space: Space, num: int, rng: np.random.Generator) -> np.ndarray | dict[str, np.ndarray]:
    match space:
        case DictSpace():
            parts = {name: random_obs(sub, num, rng) for name, sub in space.spaces.items()}
            if "action_mask" in parts:
                parts["action_mask"] = rng.random((num, 3)) < 0.5
                parts["action_mask"][:, 1] = True
            return parts
        case DiscreteSpace():
            return rng.integers(0, space.n, num)
        case BoxSpace() if space.dtype == "uint8":
            return rng.integers(0, 256, (num, *space.shape)).astype(np.uint8)
        case BoxSpace():
            return rng.normal(0.5, 3.0, (num, *space.shape)).astype(np.float32)
    raise AssertionError(space)


def tree_tensor(obs):  # type: ignore[no-untyped-def]
    return {k: torch.from_numpy(v) for k, v in obs.items()} if isinstance(obs, dict) else torch.from_numpy(obs)


def rows(obs, index):  # type: ignore[no-untyped-def]
    return {k: v[index] for k, v in obs.items()} if isinstance(obs, dict) else obs[index]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("deterministic", [True, False])
def test_rows_do_not_depend_on_their_batch(name: str, deterministic: bool) -> None:
    """8 rows together, and each of them alone: the same actions, log-probabilities, values, for 6 steps with resets."""
    policy = make_policy(name)
    rng = np.random.default_rng(1)
    together = Actor(policy, 8, seed=7)
    alone = [Actor(policy, 1, seed=7, streams=torch.tensor([i])) for i in range(8)]
    for t in range(6):
        obs = random_obs(policy.spec.obs_space, 8, rng)
        starts = rng.random(8) < 0.3
        step = together.act(obs, deterministic=deterministic)
        for i, actor in enumerate(alone):
            single = actor.act(rows(obs, slice(i, i + 1)), deterministic=deterministic)
            assert torch.equal(single.action[0], step.action[i])
            assert torch.equal(single.env_action[0], step.env_action[i])
            assert torch.equal(single.logprob[0], step.logprob[i])
            if step.value is not None:
                assert torch.equal(single.value[0], step.value[i])
            actor.advance(starts[i : i + 1])
        together.advance(starts)
        assert t < 6


@pytest.mark.parametrize("name", [n for n, spec in CASES.items() if spec.critic and spec.network.recurrent == "none"])
def test_learner_logprob_is_the_samplers(name: str) -> None:
    """No tolerance: evaluate() on recorded features gives the recorded log-probability and value."""
    policy = make_policy(name)
    actor = Actor(policy, 33, seed=7)
    step = actor.act(random_obs(policy.spec.obs_space, 33, np.random.default_rng(2)))
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))[:20]
    features = rows(step.features, order)
    logprob, _, value = policy.evaluate(features, step.action[order])
    assert torch.equal(logprob, step.logprob[order])
    assert torch.equal(value, step.value[order])


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_learner_equals_sampler(name: str) -> None:
    policy = make_policy(name)
    actor = Actor(policy, 4, seed=7)
    state = {key: x.clone() for key, x in actor.state.items()}
    rng = np.random.default_rng(3)
    steps, starts = [], []
    for _ in range(7):
        starts.append(actor.starts.clone())
        steps.append(actor.act(random_obs(policy.spec.obs_space, 4, rng)))
        actor.advance(rng.random(4) < 0.3)
    features = _stack([s.features for s in steps])
    action = torch.stack([s.action for s in steps])
    logprob, _, value = policy.evaluate_sequence(features, action, state, torch.stack(starts))
    assert torch.equal(logprob, torch.stack([s.logprob for s in steps]))
    assert torch.equal(value, torch.stack([s.value for s in steps]))


def _stack(trees):  # type: ignore[no-untyped-def]
    if isinstance(trees[0], dict):
        return {key: torch.stack([tree[key] for tree in trees]) for key in trees[0]}
    return torch.stack(trees)


@pytest.mark.parametrize("name", CASES)
def test_folder_round_trip(name: str, tmp_path: Path) -> None:
    policy = make_policy(name)
    policy.version = 42
    save_policy(policy, tmp_path / "p", results={"return": "1"})
    loaded = load_policy(tmp_path / "p")
    assert loaded.digest() == policy.digest()
    assert loaded.version == 42
    obs = random_obs(policy.spec.obs_space, 3, np.random.default_rng(4))
    one, two = Actor(policy, 3, seed=1).act(obs), Actor(loaded, 3, seed=1).act(obs)
    assert torch.equal(one.env_action, two.env_action)
    assert torch.equal(one.logprob, two.logprob)


def test_folder_damage_is_named(tmp_path: Path) -> None:
    save_policy(make_policy("mlp-discrete"), tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_policy(tmp_path)
    weights.write_bytes(content[:-4] + b"\x00\x01\x02\x03")
    with pytest.raises(CheckpointError, match="digest"):
        load_policy(tmp_path)
    with pytest.raises(CheckpointError, match="not a policy folder"):
        load_policy(tmp_path / "nowhere")


def test_frame_stack_restarts_with_the_episode() -> None:
    policy = make_policy("stack")
    actor = Actor(policy, 1, seed=0)
    frames = [np.full((1, 5), float(i), np.float32) for i in range(4)]
    actor.act(frames[0])
    actor.advance(np.array([False]))
    step = actor.act(frames[1])
    assert step.features[0].view(3, 5)[:, 0].tolist() == [0.0, 0.0, 1.0]
    actor.advance(np.array([True]))
    step = actor.act(frames[2])
    assert step.features[0].view(3, 5)[:, 0].tolist() == [2.0, 2.0, 2.0]


def test_masked_actions_are_never_taken() -> None:
    policy = make_policy("masked")
    obs = random_obs(MASKED, 500, np.random.default_rng(0))
    for deterministic in (True, False):
        action = Actor(policy, 500, seed=1).act(obs, deterministic=deterministic).action
        assert bool(tree_tensor(obs)["action_mask"][torch.arange(500), action].all())


def test_squashed_actions_fill_the_bounds() -> None:
    policy = make_policy("squashed")
    action = Actor(policy, 500, seed=1).act(random_obs(VECTOR, 500, np.random.default_rng(0))).env_action
    low, high = TORQUE.bounds()
    assert (action.numpy() >= low).all()
    assert (action.numpy() <= high).all()
    assert torch.allclose(policy.action_map(policy.action_map.inverse(action)), action, atol=1e-4)


@pytest.mark.parametrize(
    ("head", "space"), [("categorical", TORQUE), ("gaussian", DiscreteSpace(2)), ("q", MultiDiscreteSpace((2, 2)))]
)
def test_wrong_head_is_an_error(head: HeadKind, space: Space) -> None:
    with pytest.raises(ConfigError, match="action space"):
        Policy(PolicySpec(obs_space=VECTOR, action_space=space, head=head))


def test_naive_kernels_agree() -> None:
    policy = make_policy("gaussian")
    obs = random_obs(VECTOR, 9, np.random.default_rng(4))
    fast = Actor(policy, 9, seed=1).act(obs)
    value, action = fast.value.clone(), fast.action.clone()
    with kernels.force("naive"):
        slow = Actor(policy, 9, seed=1).act(obs)
    assert torch.allclose(value, slow.value, atol=1e-4)
    assert torch.allclose(action, slow.action, atol=1e-4)


def test_predict_matches_actor_and_env_dtype() -> None:
    for name in ("mlp-discrete", "gaussian", "lstm"):
        policy = make_policy(name)
        obs = random_obs(policy.spec.obs_space, 1, np.random.default_rng(5))
        expected = Actor(policy, 1, seed=0).act(obs, deterministic=True).env_action[0].numpy()
        assert np.array_equal(policy.predict(rows(obs, 0)), expected)


NAN = [0.0, 0.0, 0.0, 0.0, float("nan")]
CAMERA = np.zeros((10, 10, 4), np.uint8)


@pytest.mark.parametrize(
    ("name", "obs", "told"),
    [
        ("mlp-discrete", "text", "expected an array of numbers"),
        ("mlp-discrete", {"a": 1}, "expected an array of numbers"),
        ("lstm", "text", "expected numbers"),
        ("lstm", None, "expected numbers"),
        ("lstm", [0.0] * 4, r"shape \(4,\); expected \(5,\)"),
        ("stack", NAN, "holds NaN"),
        ("gru", {"camera": CAMERA, "speed": [0.0] * 5}, "lacks 'gear'"),
        ("gru", {"camera": CAMERA, "speed": [0.0] * 5, "gear": 4}, "gear=4; expected 0 to 3"),
        ("gru", {"camera": CAMERA, "speed": [0.0] * 5, "gear": 0.5}, "gear: expected integers"),
        ("gru", [0.0] * 5, "lacks 'camera'"),
    ],
)
def test_predict_names_what_is_wrong(name: str, obs: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        make_policy(name).predict(obs)


def test_predict_takes_nested_observations_and_leaves_out_what_it_does_not_know() -> None:
    space = DictSpace({"outer.inner": VECTOR, "pair.0": DiscreteSpace(4, start=2), "pair.1": VECTOR})
    policy = Policy(PolicySpec(obs_space=space, action_space=DiscreteSpace(3), head="categorical"), seed=1)
    inner, other = np.linspace(-1, 1, 5), [0.5] * 5
    nested = policy.predict({"outer": {"inner": inner}, "pair": (3, other), "words": "hi"})
    flat = {"outer.inner": inner[None], "pair.0": np.array([3]), "pair.1": np.array([other])}
    assert nested == Actor(policy, 1, seed=0).act(flat, deterministic=True).env_action[0]
