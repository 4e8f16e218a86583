"""Gradients in closed form against the losses that they belong to."""

from __future__ import annotations

import torch

from lockstep.core.spaces import BoxSpace
from lockstep.rl.losses import critic_gradient, critic_loss, sac_actor_gradients, sac_actor_loss, temperature_loss
from lockstep.rl.soft import Temperature


def test_critic_gradient_is_that_of_the_loss() -> None:
    values, target = torch.randn(2, 33, requires_grad=True), torch.randn(33)
    loss, expected = critic_loss(values, target)
    loss.backward()
    gradient, metrics = critic_gradient(values, target)
    torch.testing.assert_close(gradient, values.grad)
    torch.testing.assert_close(metrics, expected)


def test_actor_gradients_are_those_of_the_loss() -> None:
    entropy, q = torch.randn(33, requires_grad=True), torch.randn(33, requires_grad=True)
    alpha = torch.tensor([0.3])
    loss, expected = sac_actor_loss(-entropy, q, alpha)
    loss.backward()
    gradients, metrics = sac_actor_gradients(entropy, q, alpha)
    torch.testing.assert_close(gradients, (entropy.grad, q.grad))
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(value.squeeze(), expected[name])


def test_temperature_gradient_is_that_of_the_loss() -> None:
    temperature = Temperature(None, 0.7, None, BoxSpace((3,), "float32"))
    entropy = torch.randn(33)
    temperature_loss(temperature.log_alpha, -entropy, temperature.target_entropy).backward()
    expected = temperature.log_alpha.grad
    temperature.set_gradient(entropy)
    torch.testing.assert_close(temperature.log_alpha.grad, expected)
