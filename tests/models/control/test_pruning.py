"""Pruned policies: how much is gone, and that what did not matter is what goes."""

from __future__ import annotations

import pytest
import torch

from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, DiscreteSpace
from lockstep.models.control.policy import Policy
from lockstep.models.control.pruning import prune_units, prune_weights
from lockstep.models.control.spec import NetworkConfig, PolicySpec


def make(**network: object) -> Policy:
    return Policy(
        PolicySpec(
            obs_space=BoxSpace((3,), "float32"),
            action_space=DiscreteSpace(3),
            head="categorical",
            network=NetworkConfig(**network),  # type: ignore[arg-type]
        ),
        seed=1,
    )


OBS, STARTS = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(200, dtype=torch.bool)


def test_the_smallest_weights_of_each_matrix_are_zero() -> None:
    policy = make(hidden_sizes=(32, 32))
    pruned = prune_weights(policy, 0.75)
    for before, after in zip(policy.parameters(), pruned.parameters(), strict=True):
        if before.ndim == 1:
            assert torch.equal(before, after)
            continue
        gone = after == 0
        assert int(gone.sum()) == int(0.75 * before.numel())
        assert torch.equal(after[~gone], before[~gone])
        assert before[gone].abs().max() <= before[~gone].abs().min()


@pytest.mark.parametrize("network", [{"hidden_sizes": (12, 8)}, {"hidden_sizes": (12, 8), "recurrent": "gru"}])
def test_units_that_add_nothing_or_a_constant_go_without_a_trace(network: dict[str, object]) -> None:
    """Half of the first layer's units have no outgoing weight, a quarter of the second's are constant."""
    policy = make(**network)
    for mlp in (policy.actor, policy.critic):
        assert mlp is not None
        mlp.weights[1].data[::2] = 0.0
        mlp.weights[1].data[:, :4] = 0.0
        mlp.biases[1].data[:4] = 1.0
        mlp.weights[2].data.add_(0.1)
    state = {name: torch.randn_like(x) for name, x in policy.initial_state(200).items()}
    pruned = prune_units(policy, 0.5, OBS, state, STARTS)
    assert pruned.spec.network.hidden_sizes == (6, 4)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in policy.parameters())
    with torch.no_grad():
        before, after = policy(OBS, state, STARTS), pruned(OBS, state, STARTS)
    torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[1], before[1], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_pruned_says_so() -> None:
    for ratio in (0.0, 1.0, -1.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            prune_weights(make(), ratio)
    with pytest.raises(ConfigError, match="no hidden layer"):
        prune_units(make(hidden_sizes=()), 0.5, OBS, {}, STARTS)
    spec = PolicySpec(
        obs_space=BoxSpace((3,), "float32"), action_space=DiscreteSpace(3), head="q", critic=False, noisy=True
    )
    with pytest.raises(ConfigError, match="noisy layers"):
        prune_units(Policy(spec), 0.5, OBS, {}, STARTS)
