from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep.core.errors import ConfigError
from lockstep.rl.prioritised import PrioritisedReplay
from lockstep.rl.replay import ReplayBuffer


def make(alpha: float = 0.6, num_rows: int = 10) -> PrioritisedReplay:
    return PrioritisedReplay(ReplayBuffer(num_rows * 2, 2, seed=0, gamma=0.9), alpha=alpha, seed=0)


def add(replay: PrioritisedReplay, num: int, valid: tuple[bool, bool] = (True, True)) -> None:
    flags = np.zeros(2, bool)
    for _ in range(num):
        replay.add(
            torch.zeros(2, 3), torch.zeros(2), np.zeros(2, np.float32), torch.zeros(2, 3), flags, flags, np.array(valid)
        )


def frequencies(replay: PrioritisedReplay, rounds: int = 400) -> np.ndarray:
    counts = np.zeros(20)
    for key in range(rounds):
        np.add.at(counts, replay.sample(32, key, 0.4).index_B.numpy(), 1)
    return counts / counts.sum()


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_sampling_is_proportional_to_priorities(alpha):
    replay = make(alpha)
    add(replay, 10)
    error = torch.linspace(0.1, 4.0, 20)
    replay.update(torch.arange(20), -error)
    expected = (error.double().numpy() + replay.eps) ** alpha
    assert np.abs(frequencies(replay) - expected / expected.sum()).max() < 0.006


def test_weights_are_the_importance_ratios_over_the_largest():
    replay = make(0.7)
    add(replay, 10)
    error = torch.linspace(0.1, 4.0, 20)
    replay.update(torch.arange(20), error)
    batch = replay.sample(16, 3, 0.5)
    mass = (error.double() + replay.eps) ** 0.7
    ratio = (20 * mass / mass.sum())[batch.index_B] ** -0.5
    assert torch.allclose(batch.weight_B.double(), ratio / ratio.max(), atol=1e-6)


def test_rows_that_are_no_transitions_get_no_mass_and_new_ones_the_largest():
    replay = make()
    add(replay, 4, valid=(True, False))
    replay.update(torch.tensor([0]), torch.tensor([9.0]))
    add(replay, 1)
    mass = replay.tree.get(np.arange(10))
    assert (mass[1:8:2] == 0).all()
    assert mass[8] == mass[9] == pytest.approx((9.0 + replay.eps) ** 0.6)
    assert mass[2] == pytest.approx(1.0)


def test_overwritten_rows_lose_their_priority():
    replay = make(1.0, num_rows=2)
    add(replay, 2)
    replay.update(torch.arange(4), torch.tensor([5.0, 5.0, 0.1, 0.1]))
    add(replay, 2)
    assert replay.tree.total == pytest.approx(4 * (5.0 + replay.eps))


def test_state_restores_sampling_exactly():
    replay, other = make(), make()
    add(replay, 13)
    replay.update(torch.arange(20), torch.rand(20, generator=torch.Generator().manual_seed(0)) * 3)
    other.load_state_dict(replay.state_dict())
    for source in (replay, other):
        add(source, 1)
    one, two = replay.sample(32, 5, 0.4), other.sample(32, 5, 0.4)
    assert torch.equal(one.index_B, two.index_B)
    assert torch.equal(one.weight_B, two.weight_B)


def test_alpha_outside_its_range_is_refused():
    with pytest.raises(ConfigError, match="priority_alpha"):
        make(1.5)
