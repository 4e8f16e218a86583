"""Networks that the real Caffe wrote: equal to what it computed, trainable, and refused when something is amiss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.core.errors import FormatError, InputError
from lockstep.interop.caffe.graph import CaffeNetwork, load_caffe
from lockstep.interop.caffe.reader import net_from_message, read_net, read_weights
from lockstep.interop.caffe.text import parse_text
from lockstep.interop.caffe.writer import save_caffemodel
from tests.interop.stored import arrays

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "frameworks" / "caffe"


def _relative(got: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(got.detach().numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    "weights", ["mlp.caffemodel", "mlp.caffemodel.h5", "cnn.caffemodel", "lstm.caffemodel", "lstm.caffemodel.h5"]
)
def test_every_blob_equals_caffes(weights: str) -> None:
    name = weights.split(".")[0]
    net = load_caffe(FILES / f"{name}.prototxt", FILES / weights)
    stored = arrays(FILES / f"{name}_io.npz")
    blobs = net.compute({key: torch.from_numpy(stored[key]) for key in net.input_names})
    compared = [key for key in blobs if key in stored]
    assert set(net.output_names) <= set(compared)
    for key in compared:
        assert _relative(blobs[key], stored[key]) <= 1e-5, key


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm"])
def test_batch_size_is_free(name: str) -> None:
    """Rows (streams of the LSTM) one at a time, and doubled, give what the stored batch gave."""
    net = load_caffe(FILES / f"{name}.prototxt", FILES / f"{name}.caffemodel")
    stored = arrays(FILES / f"{name}_io.npz")
    axis = 1 if name == "lstm" else 0
    inputs = [torch.from_numpy(stored[key]) for key in net.input_names]
    ones = net(*(x.narrow(axis, 1, 1) for x in inputs))
    doubled = net(*(torch.cat([x, x], axis) for x in inputs))
    for one, two, key in zip(ones, doubled, net.output_names, strict=True):
        expected = stored[key]
        assert _relative(one, expected.take([1], axis)) <= 1e-5
        assert _relative(two, np.concatenate([expected, expected], axis)) <= 1e-5


def test_sequence_length_is_free_and_cont_restarts() -> None:
    net = load_caffe(FILES / "lstm.prototxt", FILES / "lstm.caffemodel")
    stored = arrays(FILES / "lstm_io.npz")
    obs, cont = torch.from_numpy(stored["obs"]), torch.from_numpy(stored["cont"])
    logits, _ = net(obs[:2], cont[:2])
    assert _relative(logits, stored["logits"][:2]) <= 1e-5
    restart = cont.clone()
    restart[2] = 0
    again, _ = net(obs, restart)
    alone, _ = net(obs[2:], restart[2:])
    assert torch.allclose(again[2:], alone, atol=1e-6)
    assert not torch.allclose(again[2:], torch.from_numpy(stored["logits"][2:]), atol=1e-3)


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm"])
def test_gradient_reaches_every_weight(name: str) -> None:
    net = load_caffe(FILES / f"{name}.prototxt", FILES / f"{name}.caffemodel")
    stored = arrays(FILES / f"{name}_io.npz")
    blobs = net.compute({key: torch.from_numpy(stored[key]) for key in net.input_names})
    sum(value.square().sum() for value in blobs.values()).backward()
    gradients = {key: parameter.grad for key, parameter in net.named_parameters()}
    assert len(gradients) == sum(len(blobs) for blobs in read_weights(FILES / f"{name}.caffemodel").values()) - 3 * (
        name == "cnn"
    )
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())


def test_weights_go_back_into_a_caffemodel(tmp_path: Path) -> None:
    net = load_caffe(FILES / "cnn.prototxt", FILES / "cnn.caffemodel")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.01)
    save_caffemodel(net, tmp_path / "tuned.caffemodel")
    again = load_caffe(FILES / "cnn.prototxt", tmp_path / "tuned.caffemodel")
    for key, value in net.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("TanH", "TanHH"),
            r"mlp.prototxt: line \d+: layer 't1' \(TanHH\): unknown layer type 'TanHH'; did you mean 'TanH'",
        ),
        (
            ("num_output: 64", "num_output: 63"),
            r"layer 'fc1' \(InnerProduct\): blob 0 should have shape \(63, 11\); the weights have",
        ),
        (("num_output: 64", "num_outputs: 64"), r"unknown field 'num_outputs'; did you mean 'num_output'"),
        (('bottom: "fc1"', 'bottom: "fc9"'), r"layer 't1' \(TanH\): unknown bottom 'fc9'"),
        (("dim: 11", "dim: x"), r"line \d+: shape: dim: 'x' is not an integer"),
        (('type: "TanH"\n', 'type: "TanH" {'), "was expected"),
    ],
)
def test_errors_name_file_line_and_layer(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = (FILES / "mlp.prototxt").read_text()
    assert change[0] in text
    (tmp_path / "mlp.prototxt").write_text(text.replace(*change))
    with pytest.raises(FormatError, match=message) as caught:
        load_caffe(tmp_path / "mlp.prototxt", FILES / "mlp.caffemodel")
    assert "mlp.prototxt" in str(caught.value)


def test_errors_name_file_and_offset(tmp_path: Path) -> None:
    data = (FILES / "mlp.caffemodel").read_bytes()
    (tmp_path / "cut.caffemodel").write_bytes(data[:5000])
    with pytest.raises(
        FormatError, match=r"cut.caffemodel: byte \d+: field \d+ claims \d+ bytes and \d+ are left: truncated"
    ):
        read_weights(tmp_path / "cut.caffemodel")
    with pytest.raises(FormatError, match="Are they weights of this network"):
        load_caffe(FILES / "mlp.prototxt", FILES / "cnn.caffemodel")
    with pytest.raises(FormatError, match="does not exist"):
        load_caffe(FILES / "mlp.prototxt", tmp_path / "absent.caffemodel")
    with pytest.raises(InputError, match="input 'cont' is missing"):
        load_caffe(FILES / "lstm.prototxt", FILES / "lstm.caffemodel")(torch.zeros(1, 1, 8))


OLD_V1 = """
name: "old" input: "data" input_dim: 2 input_dim: 3 input_dim: 8 input_dim: 8
layers { name: "c" type: CONVOLUTION bottom: "data" top: "c" blobs_lr: 1 blobs_lr: 2 weight_decay: 1 weight_decay: 0
         convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "gaussian" std: 0.1 } } }
layers { name: "r" type: RELU bottom: "c" top: "c" }
layers { name: "f" type: INNER_PRODUCT bottom: "c" top: "f" inner_product_param { num_output: 5 } }
layers { name: "train" type: SOFTMAX_LOSS bottom: "f" bottom: "label" top: "loss" include { phase: TRAIN } }
layers { name: "p" type: SOFTMAX bottom: "f" top: "p" include: { phase: TEST } }
"""
OLD_V0 = """
input: "data" input_dim: 2 input_dim: 3 input_dim: 8 input_dim: 8
layers { layer { name: "c" type: "conv" num_output: 4 kernelsize: 3 biasterm: false weight_filler { type: "xavier" }
                 blobs_lr: 3 } bottom: "data" top: "c" }
layers { layer { name: "p" type: "pool" pool: MAX kernelsize: 2 stride: 2 } bottom: "c" top: "p" }
"""


def test_older_spellings() -> None:
    net = CaffeNetwork(net_from_message(parse_text(OLD_V1), phase="TEST"))
    assert net.output_names == ("p",)
    assert [(item.spec.lr_mult, item.spec.decay_mult) for item in net.learnables()] == [(1, 1), (2, 0), (1, 1), (1, 1)]
    assert net(torch.zeros(7, 3, 8, 8)).shape == (7, 5)
    oldest = CaffeNetwork(net_from_message(parse_text(OLD_V0), phase="TEST"))
    assert oldest(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 3, 3)
    assert [(item.name, item.spec.lr_mult) for item in oldest.learnables()] == [("layers.c.weight", 3)]


def test_blobs_of_one_name_are_one_parameter() -> None:
    text = """
    input: "a" input_shape { dim: 1 dim: 4 } input: "b" input_shape { dim: 1 dim: 4 }
    layer { name: "x" type: "InnerProduct" bottom: "a" top: "x" param { name: "w" lr_mult: 2 } param { name: "v" }
            inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
    layer { name: "y" type: "InnerProduct" bottom: "b" top: "y" param { name: "w" } param { name: "v" }
            inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
    """
    net = CaffeNetwork(net_from_message(parse_text(text), phase="TEST"))
    assert len(list(net.parameters())) == 2 == len(net.learnables())
    x = torch.randn(2, 4)
    first, second = net(x, x)
    assert torch.equal(first, second)


def test_batch_norm_learns_its_statistics_as_caffe_does() -> None:
    text = """input: "x" input_shape { dim: 1 dim: 2 dim: 3 dim: 3 }
    layer { name: "n" type: "BatchNorm" bottom: "x" top: "n" batch_norm_param { moving_average_fraction: 0.9 } }"""
    net = CaffeNetwork(net_from_message(parse_text(text), phase="TRAIN")).train()
    x = torch.randn(4, 2, 3, 3) * 3 + 1
    out = net(x)
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(2), atol=1e-5)
    norm = net.layers["n"]
    assert float(norm.factor) == 1.0
    assert torch.allclose(norm.variance_sum, x.var((0, 2, 3), correction=1), rtol=1e-5)
    net(x)
    assert float(norm.factor) == pytest.approx(1.9)
    assert torch.allclose(norm.mean_sum / norm.factor, x.mean((0, 2, 3)), atol=1e-5)


def test_a_description_alone_starts_from_its_fillers() -> None:
    spec = read_net(FILES / "cnn.prototxt")
    first, second, other = CaffeNetwork(spec, seed=3), CaffeNetwork(spec, seed=3), CaffeNetwork(spec, seed=4)
    weight = first.layers["conv1"].weight
    assert torch.equal(weight, second.layers["conv1"].weight)
    assert not torch.equal(weight, other.layers["conv1"].weight)
    bound = (3 / (4 * 8 * 8)) ** 0.5
    assert 0.9 * bound < float(weight.detach().abs().max()) <= bound


def _one_layer(kind: str, parameters: str, shape: str) -> CaffeNetwork:
    text = f"""input: "x" input_shape {{ {shape} }} layer {{ name: "y" type: "{kind}" bottom: "x" top: "y" {parameters} }}"""
    return CaffeNetwork(net_from_message(parse_text(text), phase="TEST"))


def test_transposed_product_and_lrn_constant() -> None:
    net = _one_layer(
        "InnerProduct",
        'inner_product_param { num_output: 5 transpose: true bias_term: false weight_filler { type: "gaussian" } }',
        "dim: 3 dim: 7",
    )
    weight = net.layers["y"].weight
    x = torch.randn(3, 7)
    assert weight.shape == (7, 5)
    assert torch.allclose(net(x), x @ weight, atol=1e-6)
    lrn = _one_layer("LRN", "lrn_param { local_size: 3 alpha: 0.5 beta: 0.6 k: 2 }", "dim: 1 dim: 4 dim: 2 dim: 2")
    image = torch.randn(1, 4, 2, 2)
    squares = image.square()
    near = (
        squares
        + torch.cat([squares[:, 1:], torch.zeros(1, 1, 2, 2)], 1)
        + torch.cat([torch.zeros(1, 1, 2, 2), squares[:, :-1]], 1)
    )
    assert torch.allclose(lrn(image), image / (2 + 0.5 / 3 * near) ** 0.6, atol=1e-6)
