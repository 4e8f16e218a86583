"""Sum tree and row gathering."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep import kernels
from lockstep.core.errors import InputError


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 1000])
def test_twins_build_the_same_tree(size: int) -> None:
    rng = np.random.default_rng(size)
    trees = []
    for mode in ("auto", "naive"):
        rng = np.random.default_rng(size)
        with kernels.force(mode):
            tree = kernels.SumTree(size)
            for _ in range(5):
                tree.update(rng.integers(0, size, 17), rng.random(17) + 0.01)
            trees.append((tree, tree.find(np.linspace(0, tree.total * (1 - 1e-12), 101))))
    (fast, found_fast), (slow, found_slow) = trees
    assert np.array_equal(fast.sums, slow.sums)
    assert np.array_equal(fast.minima, slow.minima)
    assert np.array_equal(found_fast, found_slow)


def test_find_is_the_inverse_of_the_cumulative_sum() -> None:
    weights = np.array([0.0, 2.0, 0.0, 1.0, 0.5, 0.0])
    tree = kernels.SumTree(6)
    tree.update(np.arange(6), weights)
    prefix = np.linspace(0, 3.5, 50, endpoint=False)
    assert tree.find(prefix).tolist() == np.searchsorted(np.cumsum(weights), prefix, side="right").tolist()
    assert tree.find([3.5, 10.0]).tolist() == [4, 4]
    assert tree.total == 3.5
    assert tree.get([1, 4]).tolist() == [2.0, 0.5]


def test_sumtree_errors() -> None:
    tree = kernels.SumTree(3)
    with pytest.raises(InputError, match="empty"):
        tree.find([0.0])
    with pytest.raises(InputError, match=r"0\.\.2"):
        tree.update([3], [1.0])
    with pytest.raises(InputError, match="finite"):
        tree.update([0], [float("nan")])


@pytest.mark.parametrize("mode", ["auto", "naive"])
@pytest.mark.parametrize("num", [0, 1, 63])
def test_gather_rows(mode: str, num: int) -> None:
    sources = [
        torch.randn(100, 17),
        torch.randint(0, 9, (100,)),
        torch.randint(0, 255, (100, 4, 3), dtype=torch.uint8),
        torch.rand(100) > 0.5,
        torch.randn(100),
    ]
    index = torch.randint(0, 100, (num,))
    with kernels.force(mode):
        outs = kernels.gather_rows(sources, index)
    for source, out in zip(sources, outs, strict=True):
        assert torch.equal(out, source[index])


def test_gather_errors() -> None:
    with pytest.raises(InputError, match=r"0\.\.2"):
        kernels.gather_rows([torch.zeros(3)], torch.tensor([3]))
    with pytest.raises(InputError, match="out is"):
        kernels.gather_rows([torch.zeros(3)], torch.tensor([1]), [torch.zeros(2)])
