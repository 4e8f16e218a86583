"""The replay buffer against brute force over the stream of transitions that went in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep.core.errors import ConfigError, InputError
from lockstep.rl.replay import Batch, ReplayBuffer, uniform_index

GAMMA = 0.9


def fill(buffer: ReplayBuffer, num_rows: int, *, seed: int = 0, with_invalid: bool = False) -> list[list[dict]]:
    """Write random episodes; returns, for every environment, its rows in order (invalid ones included)."""
    rng = np.random.default_rng(seed)
    n = buffer.num_envs
    streams: list[list[dict]] = [[] for _ in range(n)]
    pending = np.zeros(n, bool)
    for t in range(num_rows):
        valid = ~pending if with_invalid else np.ones(n, bool)
        ends = (rng.random(n) < 0.25) & valid
        terminated = ends & (rng.random(n) < 0.5)
        truncated = ends & ~terminated
        reward = rng.normal(size=n).astype(np.float32)
        features = torch.tensor([[t, i, 0.5] for i in range(n)])
        following = torch.tensor([[t + 1, i, 0.25] for i in range(n)])
        action = torch.tensor([t * n + i for i in range(n)])
        buffer.add(features, action, reward, following, terminated, truncated, valid)
        pending = ends if with_invalid else pending
        for i in range(n):
            streams[i].append(
                {
                    "t": t,
                    "reward": float(reward[i]),
                    "terminated": bool(terminated[i]),
                    "ended": bool(ends[i]),
                    "valid": bool(valid[i]),
                }
            )
    return streams


def brute_force(stream: list[dict], t: int, n_step: int) -> tuple[float, float, int]:
    total, factor = 0.0, 1.0
    for row in stream[t : t + n_step]:
        total += factor * row["reward"]
        factor *= GAMMA
        last = row["t"]
        if row["terminated"]:
            return total, 0.0, last
        if row["ended"]:
            break
    return total, factor, last


@pytest.mark.parametrize("n_step", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [7, 20, 53])
@pytest.mark.parametrize("with_invalid", [False, True])
def test_every_transition_equals_brute_force_before_and_after_wrapping(n_step, num_rows, with_invalid):
    buffer = ReplayBuffer(20 * 3 + 2, 3, seed=0, gamma=GAMMA, n_step=n_step)
    streams = fill(buffer, num_rows, with_invalid=with_invalid)
    batch = buffer.gather(torch.arange(len(buffer)))
    assert len(buffer) == min(num_rows, 20) * 3
    seen = set()
    for b in range(len(buffer)):
        t, env = int(batch.features[b, 0]), int(batch.features[b, 1])
        seen.add((t, env))
        assert int(batch.action[b]) == t * 3 + env
        if not streams[env][t]["valid"]:
            continue
        reward, discount, last = brute_force(streams[env], t, n_step)
        assert float(batch.reward_B[b]) == pytest.approx(reward, abs=1e-5)
        assert float(batch.discount_B[b]) == pytest.approx(discount, abs=1e-6)
        assert batch.next_features[b].tolist() == [last + 1, env, 0.25]
    oldest = max(0, num_rows - 20)
    assert seen == {(t, env) for t in range(oldest, num_rows) for env in range(3)}


def test_invalid_rows_are_never_drawn_and_the_others_uniformly():
    buffer = ReplayBuffer(60, 3, seed=3, gamma=GAMMA)
    fill(buffer, 31, with_invalid=True)
    counts = np.zeros(60)
    for key in range(200):
        np.add.at(counts, buffer.draw(100, key).numpy(), 1)
    valid = buffer.valid.view(-1).numpy()
    assert (counts[~valid] == 0).all()
    assert (~valid).any()
    expected = counts.sum() / valid.sum()
    assert np.abs(counts[valid] - expected).max() < 5 * np.sqrt(expected)


def test_draws_are_a_function_of_seed_and_key():
    one, two = (uniform_index(64, 10**6, seed, 5) for seed in (1, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, uniform_index(64, 10**6, 1, 6))
    assert not torch.equal(one, uniform_index(64, 10**6, 2, 5))


def test_large_buffers_reach_every_index_evenly():
    """With 23 bits a draw, neighbouring indices of 3 million would come up 2 or 3 times as often as each other."""
    index = uniform_index(600_000, 3_000_000, 0, 1)
    residues = torch.bincount(index % 3, minlength=3).double()
    assert int(index.min()) >= 0
    assert int(index.max()) < 3_000_000
    assert float((residues - 200_000).abs().max()) < 2_000


def test_state_restores_the_filled_part_exactly_after_wrapping():
    buffer = ReplayBuffer(60, 3, seed=0, gamma=GAMMA, n_step=3)
    fill(buffer, 27, with_invalid=True)
    other = ReplayBuffer(60, 3, seed=0, gamma=GAMMA, n_step=3)
    other.load_state_dict(buffer.state_dict())
    for source in (buffer, other):
        fill(source, 4, seed=9)
    one, two = buffer.sample(50, 7), other.sample(50, 7)
    assert torch.equal(one.features, two.features)
    assert torch.equal(one.next_features, two.next_features)
    assert torch.equal(one.reward_B, two.reward_B)
    assert torch.equal(one.discount_B, two.discount_B)


def test_an_empty_buffer_saves_loads_and_refuses_to_sample():
    buffer = ReplayBuffer(60, 3, seed=0, gamma=GAMMA)
    other = ReplayBuffer(60, 3, seed=0, gamma=GAMMA)
    other.load_state_dict(buffer.state_dict())
    assert len(other) == 0
    with pytest.raises(InputError, match="empty"):
        other.sample(1, 0)


def test_dictionary_features_and_images_keep_their_dtypes():
    buffer = ReplayBuffer(8, 2, seed=0, gamma=GAMMA)
    image = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    features = {"image": image, "mask": torch.ones(2, 5, dtype=torch.bool), "vector": torch.ones(2, 7)}
    flags = np.zeros(2, bool)
    buffer.add(features, torch.zeros(2, 6), np.ones(2, np.float32), features, flags, flags, ~flags)
    batch = buffer.sample(4, 0)
    assert batch.features["image"].dtype == torch.uint8
    assert batch.features["mask"].dtype == torch.bool
    assert torch.equal(batch.features["image"], image[batch.index_B])
    assert batch.next_features["vector"].shape == (4, 7)
    assert isinstance(batch.split(2)[1], Batch)
    assert torch.equal(batch.split(2)[1].features["image"], batch.features["image"][2:])


def test_stored_observations_are_encoded_when_sampled():
    scale = [1.0]
    buffer = ReplayBuffer(8, 1, seed=0, gamma=GAMMA, encode=lambda x: x * scale[0])
    flags = np.zeros(1, bool)
    buffer.add(torch.ones(1, 2), torch.zeros(1), np.ones(1, np.float32), torch.ones(1, 2), flags, flags, ~flags)
    scale[0] = 3.0
    batch = buffer.sample(2, 0)
    assert batch.features.tolist() == [[3.0, 3.0]] * 2
    assert batch.next_features.tolist() == [[3.0, 3.0]] * 2


@pytest.mark.parametrize(("capacity", "n_step", "word"), [(1, 1, "buffer_size"), (8, 0, "n_step"), (8, 5, "n_step")])
def test_impossible_buffers_are_refused(capacity, n_step, word):
    with pytest.raises(ConfigError, match=word):
        ReplayBuffer(capacity, 2, seed=0, gamma=GAMMA, n_step=n_step)


def test_a_state_of_another_shape_is_refused():
    buffer = ReplayBuffer(8, 2, seed=0, gamma=GAMMA)
    with pytest.raises(InputError, match="num_rows"):
        buffer.load_state_dict(ReplayBuffer(10, 2, seed=0, gamma=GAMMA).state_dict())
