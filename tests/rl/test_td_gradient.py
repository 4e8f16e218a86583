from __future__ import annotations

import pytest
import torch

from lockstep.rl.losses import td_gradient, td_loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num", [1, 63])
def test_it_is_the_gradient_of_the_loss(num: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(num, 5, generator=generator) * 2).requires_grad_()
    action = torch.randint(0, 5, (num,), generator=generator)
    target = torch.randn(num, generator=generator) * 2
    weight = torch.rand(num, generator=generator) if weighted else None
    loss, error = td_loss(values.gather(1, action.unsqueeze(1)).squeeze(1), target, weight)
    loss.backward()
    gradient, magnitude = td_gradient(values, action, target, weight)
    assert torch.allclose(gradient, values.grad, atol=1e-7)
    assert torch.equal(magnitude, error)
