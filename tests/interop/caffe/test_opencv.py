"""Layers against a second reader of Caffe's files: OpenCV's dnn, from the same .prototxt and .caffemodel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.interop.caffe.graph import load_caffe
from lockstep.interop.caffe.writer import save_caffemodel
from tests.interop.stored import arrays

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "frameworks" / "caffe"
GAUSSIAN = 'weight_filler { type: "gaussian" std: 0.3 } bias_filler { type: "gaussian" std: 0.3 }'
_CONV = f"convolution_param {{ num_output: 4 %s {GAUSSIAN} }}"
IMAGE = (2, 6, 9, 11)
# OpenCV passes over `k` of LRN and `transpose` of InnerProduct; test_files.py holds these against their formulas.
# Type and parameters of the layer that is judged; its input is an image [2, 6, 9, 11] unless a shape is given.
LAYERS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "convolution": ("Convolution", f"convolution_param {{ num_output: 4 kernel_size: 3 {GAUSSIAN} }}", IMAGE),
    "convolution-strides": (
        "Convolution",
        f"convolution_param {{ num_output: 4 kernel_h: 3 kernel_w: 2 stride_h: 2 stride_w: 3 pad_h: 1 pad_w: 0 {GAUSSIAN} }}",
        IMAGE,
    ),
    "convolution-groups": ("Convolution", _CONV % "kernel_size: 3 group: 2 dilation: 2", IMAGE),
    "deconvolution": ("Deconvolution", _CONV % "kernel_size: 4 stride: 2 pad: 1", IMAGE),
    "deconvolution-groups": ("Deconvolution", _CONV % "kernel_size: 3 stride: 2 group: 2", IMAGE),
    "inner-product": ("InnerProduct", f"inner_product_param {{ num_output: 5 {GAUSSIAN} }}", IMAGE),
    "max-pool": ("Pooling", "pooling_param { pool: MAX kernel_size: 3 stride: 2 }", (2, 6, 10, 13)),
    "max-pool-pad": ("Pooling", "pooling_param { pool: MAX kernel_size: 3 stride: 2 pad: 1 }", (2, 6, 10, 13)),
    "average-pool": ("Pooling", "pooling_param { pool: AVE kernel_size: 3 stride: 2 }", (2, 6, 9, 11)),
    "average-pool-pad": ("Pooling", "pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 }", (2, 6, 10, 13)),
    "global-pool": ("Pooling", "pooling_param { pool: AVE global_pooling: true }", IMAGE),
    "lrn-across": ("LRN", "lrn_param { local_size: 3 alpha: 0.5 beta: 0.6 }", IMAGE),
    "lrn-within": ("LRN", "lrn_param { local_size: 3 alpha: 0.5 beta: 0.6 norm_region: WITHIN_CHANNEL }", IMAGE),
    "scale": ("Scale", 'scale_param { bias_term: true filler { type: "gaussian" } bias_filler { type: "gaussian" } }', IMAGE),
    "relu-slope": ("ReLU", "relu_param { negative_slope: 0.2 }", IMAGE),
    "prelu": ("PReLU", 'prelu_param { filler { type: "gaussian" } }', IMAGE),
    "elu": ("ELU", "elu_param { alpha: 0.7 }", IMAGE),
    "sigmoid": ("Sigmoid", "", IMAGE),
    "tanh": ("TanH", "", IMAGE),
    "absval": ("AbsVal", "", IMAGE),
    "bnll": ("BNLL", "", IMAGE),
    "power": ("Power", "power_param { power: 2 scale: 0.5 shift: 3 }", IMAGE),
    "exp": ("Exp", "exp_param { base: 2 scale: 0.5 shift: 1 }", IMAGE),
    "softmax": ("Softmax", "softmax_param { axis: 2 }", IMAGE),
    "flatten": ("Flatten", "flatten_param { axis: 2 }", IMAGE),
    "reshape": ("Reshape", "reshape_param { shape { dim: 0 dim: 3 dim: -1 } }", IMAGE),
    "permute": ("Permute", "permute_param { order: 0 order: 3 order: 1 order: 2 }", IMAGE),
    "mvn": ("MVN", "mvn_param { eps: 1e-5 }", IMAGE),
}  # fmt: skip


def _judge(prototxt: Path, weights: Path, x: np.ndarray) -> np.ndarray:
    net = pytest.importorskip("cv2").dnn.readNetFromCaffe(str(prototxt), str(weights))
    net.setInput(x, "x")
    return net.forward("y")


def _describe(shape: tuple[int, ...], layers: str) -> str:
    dims = " ".join(f"dim: {dim}" for dim in shape)
    return f'layer {{ name: "x" type: "Input" top: "x" input_param {{ shape {{ {dims} }} }} }}\n{layers}'


def _compare(folder: Path, shape: tuple[int, ...], layers: str) -> None:
    (folder / "n.prototxt").write_text(_describe(shape, layers))
    net = load_caffe(folder / "n.prototxt", seed=5)
    save_caffemodel(net, folder / "n.caffemodel")
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = _judge(folder / "n.prototxt", folder / "n.caffemodel", x)
    ours = load_caffe(folder / "n.prototxt", folder / "n.caffemodel")(torch.from_numpy(x)).detach().numpy()
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= 2e-5 * max(np.abs(expected).max(), 1)


@pytest.mark.parametrize("name", list(LAYERS))
def test_layer(name: str, tmp_path: Path) -> None:
    kind, parameters, shape = LAYERS[name]
    _compare(tmp_path, shape, f'layer {{ name: "y" type: "{kind}" bottom: "x" top: "y" {parameters} }}')


def test_eltwise_concat_slice_and_crop(tmp_path: Path) -> None:
    _compare(
        tmp_path,
        IMAGE,
        """
        layer { name: "s" type: "Slice" bottom: "x" top: "a" top: "b" slice_param { slice_point: 3 } }
        layer { name: "e" type: "Eltwise" bottom: "a" bottom: "b" top: "e" eltwise_param { coeff: 2 coeff: -0.5 } }
        layer { name: "m" type: "Eltwise" bottom: "a" bottom: "e" top: "m" eltwise_param { operation: MAX } }
        layer { name: "q" type: "Eltwise" bottom: "m" bottom: "b" top: "q" eltwise_param { operation: PROD } }
        layer { name: "p" type: "Pooling" bottom: "q" top: "p" pooling_param { kernel_size: 3 } }
        layer { name: "c" type: "Crop" bottom: "e" bottom: "p" top: "c" crop_param { axis: 2 offset: 1 offset: 2 } }
        layer { name: "y" type: "Concat" bottom: "p" bottom: "c" top: "y" }
        """,
    )


def test_batch_norm_divides_by_its_third_blob(tmp_path: Path) -> None:
    text = _describe(IMAGE, 'layer { name: "y" type: "BatchNorm" bottom: "x" top: "y" batch_norm_param { eps: 1e-3 } }')
    (tmp_path / "n.prototxt").write_text(text)
    net = load_caffe(tmp_path / "n.prototxt")
    norm = net.layers["y"]
    norm.mean_sum.copy_(torch.randn(6))
    norm.variance_sum.copy_(torch.rand(6) + 1)
    norm.factor.fill_(2.5)
    save_caffemodel(net, tmp_path / "n.caffemodel")
    x = torch.randn(IMAGE)
    expected = _judge(tmp_path / "n.prototxt", tmp_path / "n.caffemodel", x.numpy())
    assert np.abs(net(x).numpy() - expected).max() <= 1e-5


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_real_files(name: str) -> None:
    reader = pytest.importorskip("cv2").dnn
    net = reader.readNetFromCaffe(str(FILES / f"{name}.prototxt"), str(FILES / f"{name}.caffemodel"))
    stored = arrays(FILES / f"{name}_io.npz")
    net.setInput(stored["obs"], "obs")
    ours = load_caffe(FILES / f"{name}.prototxt", FILES / f"{name}.caffemodel")
    got = dict(zip(ours.output_names, ours(torch.from_numpy(stored["obs"])), strict=True))
    for key in ours.output_names:
        expected = net.forward(key)
        assert np.abs(got[key].detach().numpy() - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1)
