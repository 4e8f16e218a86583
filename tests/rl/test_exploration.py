from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace
from lockstep.models.control.policy import PolicyStep
from lockstep.rl.exploration import EpsilonGreedy, GaussianNoise, PolicySamples, UniformsAhead, UniformUntil

N = 4000
STREAMS, POSITIONS = torch.arange(N), torch.full((N,), 7)


def make_step(action: torch.Tensor, mask: torch.Tensor | None = None) -> PolicyStep:
    features = torch.zeros(N, 1) if mask is None else {"vector": torch.zeros(N, 1), "action_mask": mask}
    return PolicyStep(action, action, torch.zeros(N), None, features, {})


def greedy(start: float, end: float) -> EpsilonGreedy:
    return EpsilonGreedy(4, start=start, end=end, fraction=0.5, total_steps=100, seed=0)


def test_epsilon_falls_linearly_and_stays() -> None:
    exploration = greedy(1.0, 0.2)
    assert [exploration.epsilon(n) for n in (0, 25, 50, 90)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_random_actions_have_the_asked_frequency_and_are_uniform(epsilon: float) -> None:
    action = greedy(epsilon, epsilon).choose(make_step(torch.zeros(N, dtype=torch.int64)), STREAMS, POSITIONS, 0)
    frequency = np.bincount(action.numpy(), minlength=4) / N
    expected = np.full(4, epsilon / 4)
    expected[0] += 1 - epsilon
    assert np.abs(frequency - expected).max() < 0.03


def test_without_exploration_the_policys_action_stays() -> None:
    assert greedy(0.0, 0.0).choose(make_step(torch.ones(N, dtype=torch.int64)), STREAMS, POSITIONS, 0) is None


def test_masked_actions_are_never_explored() -> None:
    mask = torch.tensor([False, True, False, True]).expand(N, 4)
    step = make_step(torch.ones(N, dtype=torch.int64), mask)
    for exploration in (greedy(1.0, 1.0), UniformUntil(DiscreteSpace(4), 10, PolicySamples(), seed=0)):
        action = exploration.choose(step, STREAMS, POSITIONS, 0)
        assert set(action.tolist()) == {1, 3}
        assert abs(float((action == 1).float().mean()) - 0.5) < 0.03


def test_a_rows_noise_does_not_depend_on_the_other_rows() -> None:
    step = make_step(torch.zeros(N, dtype=torch.int64))
    whole = greedy(0.9, 0.9).choose(step, STREAMS, POSITIONS, 0)
    rows = slice(17, 29)
    part = PolicyStep(step.action[rows], step.action[rows], torch.zeros(12), None, torch.zeros(12, 1), {})
    assert torch.equal(greedy(0.9, 0.9).choose(part, STREAMS[rows], POSITIONS[rows], 0), whole[rows])


def test_warm_up_is_uniform_in_the_box_and_then_hands_over() -> None:
    step = make_step(torch.zeros(N, 2))
    exploration = UniformUntil(BoxSpace((2,), "float32", (-3.0,), (9.0,)), 10, PolicySamples(), seed=0)
    action = exploration.choose(step, STREAMS, POSITIONS, 9)
    assert action.shape == (N, 2)
    assert float(action.min()) >= -1
    assert float(action.max()) <= 1
    assert torch.allclose(action.mean(0), torch.zeros(2), atol=0.05)
    assert torch.allclose(action.var(0), torch.full((2,), 1 / 3), atol=0.03)
    assert exploration.choose(step, STREAMS, POSITIONS, 10) is None
    assert exploration.deterministic is False


def test_gaussian_noise_has_its_deviation_and_stays_in_bounds() -> None:
    action = GaussianNoise(1, 0.1, seed=0).choose(make_step(torch.zeros(N, 1)), STREAMS, POSITIONS, 0)
    assert float(action.std()) == pytest.approx(0.1, rel=0.05)
    clipped = GaussianNoise(1, 0.5, seed=0).choose(make_step(torch.ones(N, 1)), STREAMS, POSITIONS, 0)
    assert float(clipped.max()) == 1.0


def test_other_action_spaces_are_refused() -> None:
    exploration = UniformUntil(MultiDiscreteSpace((2, 2)), 10, PolicySamples(), seed=0)
    with pytest.raises(ConfigError, match="Discrete or Box"):
        exploration.choose(make_step(torch.zeros(N, 2)), STREAMS, POSITIONS, 0)


@pytest.mark.parametrize("num_rows", [1, 3, 9])
def test_uniforms_ahead_are_the_uniforms_of_each_position(num_rows: int) -> None:
    ahead = UniformsAhead(5, 4)
    streams, positions = torch.arange(num_rows) + 7, torch.arange(num_rows) * 3
    for step in range(300):
        assert np.array_equal(ahead(streams, positions), kernels.uniform(5, streams, positions, 4).numpy())
        positions += torch.arange(num_rows) % 2 + 1 if step % 50 else -1
    other = streams + 1
    assert np.array_equal(ahead(other, positions), kernels.uniform(5, other, positions, 4).numpy())
