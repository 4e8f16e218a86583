"""AdamW, Muon, schedules, clipping and averages against what their papers say, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lockstep.core.errors import ConfigError
from lockstep.layers.projection import Projection
from lockstep.learn.optimiser import (
    Ema,
    Optimiser,
    OptimiserConfig,
    ScheduleConfig,
    layer_matrices,
    orthogonalised,
)
from tests.learn.tiny import GPT2, LLAMA, tiny


def gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def test_adamw_is_torchs_with_decay_on_matrices_only() -> None:
    ours, theirs = tiny(), tiny()
    config = OptimiserConfig(lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
    optimiser = Optimiser([ours], config)
    params = list(theirs.parameters())
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=config.betas,
        eps=config.eps,
    )
    for seed in range(4):
        gradients(optimiser.params, seed)
        gradients(params, seed)
        norm = optimiser.step()
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(params, 1.0)), rel=1e-6)
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_muon_moves_along_the_orthogonal_factor() -> None:
    g = torch.randn(48, 20)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    spread = torch.linalg.svdvals(orthogonalised(g, 5))
    assert float(spread.min()) > 0.6
    assert float(spread.max()) < 1.3
    assert float((orthogonalised(g, 5) * (u @ vh)).sum()) / 20 == pytest.approx(1.0, abs=0.2)
    assert torch.allclose(orthogonalised(torch.stack([g, 2 * g]), 5)[1], orthogonalised(g, 5), atol=1e-4)


@pytest.mark.parametrize("values", [LLAMA, GPT2], ids=["untied", "tied"])
def test_muon_takes_the_layers_matrices_part_by_part(values: dict[str, object]) -> None:
    model = tiny(values)
    config = OptimiserConfig(kind="muon", lr=0.0, muon_lr=0.1, muon_momentum=0.5, max_grad_norm=0.0, weight_decay=0.2)
    optimiser = Optimiser([model], config)
    names = {name for name, p in model.named_parameters() if p in layer_matrices([model])}
    assert names == {
        name
        for name, module in ((f"{n}.weight", m) for n, m in model.named_modules())
        if isinstance(module, Projection) and not name.startswith("head")
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients(optimiser.params, 0)
    optimiser.step()
    for name, p in model.named_parameters():
        if name not in names:
            assert torch.equal(p, before[name]), name
    name = "layers.0.attention.qkv.weight"
    module = model.get_submodule("layers.0.attention.qkv")
    assert isinstance(module, Projection)
    assert module.weight is not None
    expected = before[name] * (1 - 0.1 * 0.2)
    rows = 0
    for size in module.out_sizes:
        part = slice(rows, rows + size)
        # first step: momentum is the gradient, so that its Nesterov direction is 1.5 g
        update = orthogonalised(1.5 * module.weight.grad[part], 5)  # type: ignore[index]
        expected[part] -= 0.1 * math.sqrt(max(1.0, size / 32)) * update
        rows += size
    torch.testing.assert_close(module.weight.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("constant", [0.5, 1, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.775, 0.55, 0.325]), ("cosine", None)],
)
def test_schedules(kind: str, expected: list[float] | None) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=2, total_steps=6, final=0.1)
    found = [schedule.factor(step) for step in range(6)]
    if expected is None:
        expected = [0.5, 1.0, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4))]
    assert found == pytest.approx(expected)
    assert schedule.factor(6) == schedule.factor(60) == pytest.approx(1.0 if kind == "constant" else 0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ScheduleConfig(kind="step"),  # type: ignore[arg-type]
        lambda: ScheduleConfig(kind="linear", warmup_steps=5, total_steps=5),
        lambda: OptimiserConfig(lr=-1.0),
        lambda: OptimiserConfig(lr=0.0),
        lambda: OptimiserConfig(kind="muon", lr=0.0, muon_lr=0.0),
        lambda: OptimiserConfig(kind="sgd"),  # type: ignore[arg-type]
        lambda: ScheduleConfig(kind="cosine").factor(0),
        lambda: Ema([], 1.0),
    ],
)
def test_wishes_that_cannot_be_met(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]


def test_the_average_follows_the_weights_and_is_written_elsewhere() -> None:
    p, other = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    ema = Ema([p], 0.75)
    with torch.no_grad():
        p.add_(4.0)
    ema.update()
    ema.write([other])
    assert other.tolist() == [2.0, 3.0]
    assert p.tolist() == [5.0, 6.0]
