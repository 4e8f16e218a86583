"""Files of Caffe, MXNet and CNTK through `load`: one graph form, equal to the frameworks, every weight trainable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.api import policy_from
from lockstep.core.errors import FormatError
from lockstep.core.spaces import BoxSpace, DiscreteSpace
from lockstep.interop.readers import format_of, load
from lockstep.interop.traced import trace
from lockstep.models.graph.folder import load_graph, save_graph
from lockstep.models.graph.graph import About
from tests.interop.stored import arrays

FILES = Path(__file__).resolve().parents[1] / "fixtures" / "frameworks"
# File -> (stored input, stored outputs, axis of the rows, options, number of weights).
CASES: dict[str, tuple[str, tuple[str, ...], int, dict[str, str], int]] = {
    "caffe/mlp.caffemodel.h5": ("obs", ("act", "value"), 0, {}, 8),
    "caffe/cnn.prototxt": ("obs", ("value", "prob"), 0, {}, 13),
    "mxnet/mlp-symbol.json": ("x", ("y0", "y1"), 0, {}, 10),
    "mxnet/symmlp-0001.params": ("x", ("y0",), 0, {}, 4),
    "mxnet/cnn-symbol.json": ("x", ("y0", "y1"), 0, {"shapes": "data=4,84,84"}, 12),
    "mxnet/gru-symbol.json": ("x", ("y0", "y1"), 1, {}, 8),
    "cntk/mlp.model": ("x", ("y0", "y1"), 0, {}, 10),
    "cntk/cnn.model": ("x", ("y0", "y1"), 0, {}, 12),
    "cntk/gru.model": ("x", ("y0", "y1"), 0, {}, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_the_graph_equals_the_framework(name: str, tmp_path: Path) -> None:
    source, outputs, axis, options, num_weights = CASES[name]
    path = FILES / name
    assert format_of(path) == name.split("/")[0]
    stored = arrays(path.parent / f"{path.name.split('.')[0].split('-')[0]}_io.npz")
    module = load(path, **options)
    x = torch.from_numpy(stored[source])
    save_graph(module, tmp_path / "folder")
    again = load_graph(tmp_path / "folder")
    for rows in (x, x.narrow(axis, 1, 1), torch.cat([x, x], axis)):
        got, repeated = module(rows), again(rows)
        got, repeated = ([got], [repeated]) if isinstance(got, torch.Tensor) else (got, repeated)
        for value, same, key in zip(got, repeated, outputs, strict=True):
            whole = stored[key]
            num = rows.shape[axis]
            expected = whole if rows is x else whole.take([1], axis) if num == 1 else np.concatenate([whole] * 2, axis)
            assert np.abs(value.detach().numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
            assert torch.equal(value, same)
    parameters = dict(module.named_parameters())
    assert len(parameters) == num_weights
    out = module(x)
    sum(value[..., 0].square().sum() for value in ([out] if isinstance(out, torch.Tensor) else out)).backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters.values())


def test_a_recurrence_keeps_its_free_length() -> None:
    stored = arrays(FILES / "mxnet" / "gru_io.npz")
    module = load(FILES / "mxnet" / "gru-0000.params")
    assert module.graph.about.time_axis == 0
    value = module(torch.from_numpy(stored["x"][:2]))[0]
    assert np.abs(value.detach().numpy() - stored["y0"][:2]).max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["caffe/lstm.prototxt", "cntk/lstm.model"])
def test_a_loop_of_an_old_framework_is_one_scan_of_free_length_that_a_policy_steps_through(name: str) -> None:
    """The stored outputs whole, cut short, and with the state carried from step to step."""
    stored = arrays(FILES / f"{name.split('.')[0]}_io.npz")
    module = load(FILES / name)
    assert [node.op for node in module.graph.walk()].count("Scan") == 1
    axis = 0 if name.startswith("caffe") else 1
    names, keys = (("obs", "cont"), ("logits", "value")) if name.startswith("caffe") else (("x",), ("y0", "y1"))
    for num in (1, 3, 5):
        outs = module(*(torch.from_numpy(np.take(stored[key], range(num), axis)) for key in names))
        for got, key in zip(outs, keys, strict=True):
            expected = np.take(stored[key], range(num), axis)
            assert np.abs(got.detach().numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    policy = policy_from(module, BoxSpace((8,), "float32"), DiscreteSpace(4), outputs="logits")
    assert policy.is_recurrent
    state = policy.initial_state(3)
    x = np.moveaxis(stored[names[0]], axis, 0)
    starts = stored["cont"] == 0 if "cont" in names else np.arange(5)[:, None].repeat(3, 1) == 0
    for t in range(5):
        params, _, state = policy(torch.from_numpy(x[t]), state, torch.from_numpy(starts[t]))[:3]
        expected = np.moveaxis(stored[keys[0]], axis, 0)[t]
        assert np.abs(params.detach().numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def test_what_stands_before_softmax_output_is_a_policys_logits() -> None:
    stored = arrays(FILES / "mxnet" / "symmlp_io.npz")
    x = torch.from_numpy(stored["x"])
    policy = policy_from(
        load(FILES / "mxnet" / "symmlp-symbol.json"), BoxSpace((8,), "float32"), DiscreteSpace(4), outputs="logits"
    )
    logits = policy(x, {}, torch.zeros(len(x), dtype=torch.bool))[0]
    assert logits.min() < 0
    assert np.abs(torch.softmax(logits, 1).detach().numpy() - stored["y0"]).max() <= 1e-5


def test_what_a_graph_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not tell the shape of input 'data'; give shapes='data=4,84,84'"):
        load(FILES / "mxnet" / "cnn-symbol.json")
    (tmp_path / "a.prototxt").write_text("")
    with pytest.raises(FormatError, match=r"its companion .*a.caffemodel does not exist; give it with weights="):
        load(tmp_path / "a.prototxt")


def test_a_network_of_one_batch_size_is_refused_where_the_batch_is_free() -> None:
    class Three(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(3, 4) * 2.0

    with pytest.raises(FormatError, match=r"dimension 0 \(batch\), was taken as 3"):
        trace(Three(), {"x": ("batch", 4)}, ["y"], about=About(), path="three")


def test_a_graph_calls_the_registered_operators_and_leaves_them_in_their_place() -> None:
    """A new object in an operator's place has none of its Python kernels, and later traces of the process fail."""

    class Clamped(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clamp(0.0, 1.0).permute(1, 0)

    module = trace(Clamped(), {"x": ("batch", 4)}, ["y"], about=About(), path="clamped")
    registered = [torch.ops.aten.clamp, torch.ops.aten.clamp.default, torch.ops.aten.permute.default]
    assert {node.op for node in module.graph.walk()} >= {"aten.clamp.default", "aten.permute.default"}
    module(torch.ones(2, 4))
    found = [torch.ops.aten.clamp, torch.ops.aten.clamp.default, torch.ops.aten.permute.default]
    assert all(a is b for a, b in zip(registered, found, strict=True))
