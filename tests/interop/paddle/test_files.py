"""Programs and weights of the real PaddlePaddle, read without it, against the outputs that it computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.core.errors import FormatError
from lockstep.interop.paddle.weights import read_pdparams
from lockstep.interop.readers import format_of, load
from tests.interop.stored import arrays

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "frameworks" / "paddle"
# File -> (stored outputs, options, number of weights).
CASES: dict[str, tuple[str, dict[str, object], int]] = {
    "mlp.json": ("mlp", {}, 10),
    "mlp.pdparams": ("mlp", {}, 10),
    "gru.json": ("gru", {}, 7),
    "gru.pdparams": ("gru", {}, 7),
    "lstm.json": ("lstm", {}, 7),
    "lstm.pdiparams": ("lstm", {}, 7),
    "cnn_old.pdmodel": ("cnn", {}, 12),
    "cnn.json": ("cnn", {"params": FILES / "cnn_old.pdiparams"}, 12),
}


@pytest.mark.parametrize("name", list(CASES))
def test_equals_paddle_at_three_batch_sizes_and_trains_every_weight(name: str) -> None:
    io, options, num_weights = CASES[name]
    assert format_of(FILES / name) == "paddle"
    module, stored = load(FILES / name, **options), arrays(FILES / f"{io}_io.npz")
    x = torch.from_numpy(stored["x"])
    for num in (1, 2, 3):
        for got, key in zip(module(x[:num]), ("y0", "y1"), strict=True):
            want = stored[key]
            assert np.abs(got.detach().numpy() - want[:num]).max() <= 1e-5 * np.abs(want).max()
    if x.ndim == 3:
        shorter = module(x[:, :2])[0].detach().numpy()
        assert np.abs(shorter - stored["y0"][:, :2]).max() <= 1e-5
    rng = torch.Generator().manual_seed(0)
    sum((y * torch.randn(y.shape, generator=rng)).sum() for y in module(x)).backward()
    parameters = dict(module.named_parameters())
    assert len(parameters) == num_weights
    assert [key for key, parameter in parameters.items() if not parameter.grad.any()] == []


def test_what_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    program = (FILES / "mlp.json").read_bytes()
    (tmp_path / "a.json").write_bytes(program)
    with pytest.raises(FormatError, match=r"its companion .*a.pdiparams does not exist; give it with params="):
        load(tmp_path / "a.json")
    (tmp_path / "a.pdiparams").write_bytes((FILES / "mlp.pdiparams").read_bytes())
    (tmp_path / "a.json").write_bytes(program.replace(b'"1.gelu"', b'"1.gelo"'))
    with pytest.raises(FormatError, match=r"a.json: operation gelo: is not known here; .*through='paddle2onnx'"):
        load(tmp_path / "a.json")
    (tmp_path / "a.pdiparams").write_bytes((FILES / "mlp.pdiparams").read_bytes()[:-9])
    with pytest.raises(FormatError, match=r"a.pdiparams, byte \d+: tensor 'linear_9.w_0': shape .* truncated"):
        load(tmp_path / "a.pdiparams")
    (tmp_path / "b.pdparams").write_bytes((FILES / "mlp.pdparams").read_bytes())
    with pytest.raises(FormatError, match=r"holds weights and no architecture, and b.json is not beside it"):
        load(tmp_path / "b.pdparams")
    tensors, names = read_pdparams(FILES / "lstm.pdparams")
    assert names["p.weight"] == "linear_3.w_0"
    assert tensors["p.weight"].shape == (32, 4)
