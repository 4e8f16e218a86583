"""MXNet operators that take weights, or behave differently while training. Each entry of `LAYERS` gives a function of
(inputs, training); weights come as inputs, so a network's parameters keep the names and layouts of the file.

Legend: M images or rows, T time steps, C channels, N units, H hidden units, L layers, D directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.core.errors import InputError, unknown_name
from lockstep.interop.mxnet.reader import Node
from lockstep.interop.windows import pool_windows

LayerFunction = Callable[[Sequence[Tensor], bool], Tensor | tuple[Tensor, ...]]
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_LAYOUTS = {1: "NCW", 2: "NCHW", 3: "NCDHW"}


def _fully_connected(node: Node) -> LayerFunction:
    has_bias, flattens = not node.flag("no_bias", False), node.flag("flatten", True)
    num = node.integer("num_hidden", 0)

    def linear(inputs: Sequence[Tensor], training: bool) -> Tensor:
        x, weight = inputs[0], inputs[1]
        if weight.shape[0] != num:
            raise InputError(f"{node.name}: num_hidden={num}, weight {tuple(weight.shape)}", field=node.name)
        return F.linear(x.flatten(1) if flattens else x, weight, inputs[2] if has_bias else None)

    return linear


def _windows(node: Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    kernel = tuple(int(size or 0) for size in node.integers("kernel"))
    dims = len(kernel)
    stride = node.integers("stride") or (1,) * dims
    dilate = node.integers("dilate") or (1,) * dims
    pad = node.integers("pad") or (0,) * dims
    layout = node.string("layout", "None")
    if dims not in _LAYOUTS or layout not in ("None", _LAYOUTS[dims]):
        raise node.fail(
            f"kernel={kernel}, layout={layout}: one to three dimensions behind batch and channel are supported"
        )
    if any(len(values) != dims for values in (stride, dilate, pad)):
        raise node.fail(f"kernel={kernel}, stride={stride}, dilate={dilate}, pad={pad} differ in length")
    if min(*kernel, *stride, *dilate) < 1 or min(pad) < 0 or max(*kernel, *stride, *dilate, *pad) > 1 << 16:
        raise node.fail(f"kernel={kernel}, stride={stride}, dilate={dilate}, pad={pad}")
    return kernel, tuple(stride), tuple(dilate), tuple(pad)


def _convolution(node: Node) -> LayerFunction:
    kernel, stride, dilate, pad = _windows(node)
    has_bias, groups = not node.flag("no_bias", False), node.integer("num_group", 1)
    node.integer("num_filter", 0)
    function = _CONVOLUTIONS[len(kernel)]

    def convolve(inputs: Sequence[Tensor], training: bool) -> Tensor:
        bias = inputs[2] if has_bias else None
        return function(inputs[0], inputs[1], bias, stride, pad, dilate, groups)  # type: ignore[operator]

    return convolve


def _deconvolution(node: Node) -> LayerFunction:
    kernel, stride, dilate, pad = _windows(node)
    has_bias, groups = not node.flag("no_bias", True), node.integer("num_group", 1)
    adjust = node.integers("adj") or (0,) * len(kernel)
    target = node.integers("target_shape")
    node.integer("num_filter", 0)
    function = _TRANSPOSED[len(kernel)]

    def deconvolve(inputs: Sequence[Tensor], training: bool) -> Tensor:
        x = inputs[0]
        padding, extra = list(pad), list(adjust)
        if target and any(target):
            for dim, size in enumerate(target):
                full = (x.shape[2 + dim] - 1) * stride[dim] + dilate[dim] * (kernel[dim] - 1) + 1
                extra[dim] = (full - size) % 2
                padding[dim] = (full - size + 1) // 2
        bias = inputs[2] if has_bias else None
        return function(x, inputs[1], bias, stride, padding, extra, groups, dilate)  # type: ignore[operator]

    return deconvolve


def _pooling(node: Node) -> LayerFunction:
    kind, convention = node.string("pool_type", "max"), node.string("pooling_convention", "valid")
    counts_padding, power = node.flag("count_include_pad", True), node.integer("p_value", 2)
    kinds = ("max", "avg", "sum", "lp")
    if kind not in kinds or convention not in ("valid", "full", "same"):
        raise node.fail(f"pool_type={kind!r}, pooling_convention={convention!r}")
    if node.flag("global_pool", False):
        for name in ("kernel", "stride", "pad", "layout"):
            node.string(name, "")
        return lambda inputs, training: _global_pool(inputs[0], kind, power)
    kernel, stride, _, pad = _windows(node)

    def pool(inputs: Sequence[Tensor], training: bool) -> Tensor:
        x = inputs[0]
        sizes = x.shape[2:]
        edges: list[tuple[int, int]] = []
        for size, k, s, p in zip(sizes, kernel, stride, pad, strict=True):
            if convention == "same":
                num = -(-size // s)
                total = max((num - 1) * s + k - size, 0)
                edges.append((total // 2, total - total // 2))
                continue
            room = size + 2 * p - k
            num = (-(-room // s) if convention == "full" else room // s) + 1
            if num < 1:
                raise InputError(
                    f"{node.name}: kernel {kernel} is larger than the padded input {tuple(sizes)}", field=node.name
                )
            edges.append((p, max((num - 1) * s + k - size - p, 0)))
        # Windows are made explicit: what "full" adds on the right is padding that an average does not count.
        counted = [(a, min(b, p)) for (a, b), p in zip(edges, pad, strict=True)]
        return pool_windows(x, kind, kernel, stride, edges, counted if counts_padding else None, power)

    return pool


def _global_pool(x: Tensor, kind: str, power: int) -> Tensor:
    dims = tuple(range(2, x.ndim))
    match kind:
        case "max":
            return x.amax(dims, keepdim=True)
        case "avg":
            return x.mean(dims, keepdim=True)
        case "sum":
            return x.sum(dims, keepdim=True)
        case _:
            return (x.abs() ** power).sum(dims, keepdim=True) ** (1 / power)


def _batch_norm(node: Node) -> LayerFunction:
    """Scale is fixed at 1 by default (`fix_gamma`); the running statistics are the auxiliary inputs, changed in training."""
    eps, momentum = node.real("eps", 1e-3), node.real("momentum", 0.9)
    fixes, uses_global = node.flag("fix_gamma", True), node.flag("use_global_stats", False)
    axis = node.integer("axis", 1)
    if node.flag("output_mean_var", False):
        raise node.fail("output_mean_var is not supported")
    for name in ("min_calib_range", "max_calib_range"):
        node.string(name, "")

    def normalise(inputs: Sequence[Tensor], training: bool) -> Tensor:
        x, gamma, beta, mean, variance = inputs
        dim = axis % x.ndim
        shape = [-1 if d == dim else 1 for d in range(x.ndim)]
        if training and not uses_global:
            dims = [d for d in range(x.ndim) if d != dim]
            new_mean, new_variance = x.mean(dims), x.var(dims, correction=0)
            with torch.no_grad():
                mean.mul_(momentum).add_(new_mean, alpha=1 - momentum)
                variance.mul_(momentum).add_(new_variance, alpha=1 - momentum)
            mean, variance = new_mean, new_variance
        scale = torch.rsqrt(variance + eps)
        scale = scale if fixes else scale * gamma
        return x * scale.reshape(shape) + (beta - mean * scale).reshape(shape)

    return normalise


def _layer_norm(node: Node) -> LayerFunction:
    axis, eps = node.integer("axis", -1), node.real("eps", 1e-5)
    if node.flag("output_mean_var", False):
        raise node.fail("output_mean_var is not supported")

    def normalise(inputs: Sequence[Tensor], training: bool) -> Tensor:
        x, gamma, beta = inputs
        moved = x.movedim(axis, -1)
        return F.layer_norm(moved, (moved.shape[-1],), gamma, beta, eps).movedim(-1, axis)

    return normalise


def _instance_norm(node: Node) -> LayerFunction:
    eps = node.real("eps", 1e-3)
    return lambda inputs, training: F.instance_norm(inputs[0], weight=inputs[1], bias=inputs[2], eps=eps)


def _group_norm(node: Node) -> LayerFunction:
    groups, eps = node.integer("num_groups", 1), node.real("eps", 1e-5)

    def normalise(inputs: Sequence[Tensor], training: bool) -> Tensor:
        x, gamma, beta = inputs
        channels = x.shape[1]
        # Since MXNet 1.7 scale and shift are by channel; before, by group.
        gamma, beta = (v if v.numel() == channels else v.repeat_interleave(channels // groups) for v in (gamma, beta))
        return F.group_norm(x, groups, gamma, beta, eps)

    return normalise


def _embedding(node: Node) -> LayerFunction:
    for name in ("input_dim", "output_dim", "dtype", "sparse_grad"):
        node.string(name, "")

    def embed(inputs: Sequence[Tensor], training: bool) -> Tensor:
        index, table = inputs
        return F.embedding(index.long().clamp(0, table.shape[0] - 1), table)

    return embed


def _leaky_relu(node: Node) -> LayerFunction:
    kind, slope = node.string("act_type", "leaky"), node.real("slope", 0.25)
    lower, upper = node.real("lower_bound", 0.125), node.real("upper_bound", 0.334)
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "leaky": lambda x: F.leaky_relu(x, slope),
        "elu": lambda x: torch.where(x > 0, x, slope * torch.expm1(x.clamp(max=0))),
        "selu": F.selu,
        "gelu": F.gelu,
    }
    if kind == "prelu":
        return lambda inputs, training: F.prelu(inputs[0], inputs[1].reshape(-1))
    if kind == "rrelu":
        return lambda inputs, training: F.rrelu(inputs[0], lower, upper, training)
    if kind not in kinds:
        raise node.fail(unknown_name("act_type", kind, [*kinds, "prelu", "rrelu"]))
    return lambda inputs, training: kinds[kind](inputs[0])


def _dropout(node: Node) -> LayerFunction:
    share, always = node.real("p", 0.5), node.string("mode", "training") == "always"
    axes = node.integers("axes")
    if not 0 <= share < 1:
        raise node.fail(f"p={share} must lie in [0, 1)")

    def drop(inputs: Sequence[Tensor], training: bool) -> Tensor:
        x = inputs[0]
        if not (training or always):
            return x
        if not axes:
            return F.dropout(x, share, True)
        mask = x.new_ones([1 if dim in axes else size for dim, size in enumerate(x.shape)])
        return x * F.dropout(mask, share, True)

    return drop


_GATES = {"lstm": 4, "gru": 3, "rnn_relu": 1, "rnn_tanh": 1}


def _rnn(node: Node) -> LayerFunction:
    """The fused recurrence. Its one vector of weights holds, layer by layer and direction by direction, the matrices of the
    input and of the state, then in the same order their biases; gates i, f, g, o and r, z, n."""
    mode, hidden, layers = node.string("mode", ""), node.integer("state_size", 0), node.integer("num_layers", 1)
    bidirectional, dropout = node.flag("bidirectional", False), node.real("p", 0.0)
    gives_state, uses_length = node.flag("state_outputs", False), node.flag("use_sequence_length", False)
    if mode not in _GATES:
        raise node.fail(unknown_name("mode", mode, _GATES))
    if node.has("projection_size") or node.has("lstm_state_clip_min") or node.has("lstm_state_clip_max"):
        raise node.fail("projection_size and clipping of the state are not supported")
    node.string("lstm_state_clip_nan", "")
    if not (1 <= hidden < 1 << 20 and 1 <= layers < 1 << 10) or uses_length:
        raise node.fail(f"state_size={hidden}, num_layers={layers}, use_sequence_length={uses_length}")
    directions = 2 if bidirectional else 1
    functions = {"lstm": torch.lstm, "gru": torch.gru, "rnn_relu": torch.rnn_relu, "rnn_tanh": torch.rnn_tanh}

    def run(inputs: Sequence[Tensor], training: bool) -> Tensor | tuple[Tensor, ...]:
        x_TMC, vector = inputs[0], inputs[1].reshape(-1)
        weights = _unpack(node, vector, x_TMC.shape[2], hidden, layers, directions, _GATES[mode])
        for state in inputs[2:]:
            if (
                state.shape[0] != layers * directions
            ):  # torch would take each of a million layers apart before it says so
                raise InputError(
                    f"{node.name}: a state of {state.shape[0]} layers and directions; {layers * directions} were expected",
                    field=node.name,
                )
        states = [state.expand(-1, x_TMC.shape[1], -1).contiguous() for state in inputs[2:]]
        start = states if mode == "lstm" else states[0]
        p = dropout if training else 0.0
        out = functions[mode](x_TMC, start, weights, True, layers, p, training, bidirectional, False)  # type: ignore[operator]
        return tuple(out) if gives_state else out[0]

    return run


def _unpack(
    node: Node, vector: Tensor, num_features: int, hidden: int, layers: int, directions: int, gates: int
) -> list[Tensor]:
    shapes: list[tuple[int, ...]] = []
    for layer in range(layers):
        width = num_features if layer == 0 else hidden * directions
        shapes += [(gates * hidden, width), (gates * hidden, hidden)] * directions
    shapes += [(gates * hidden,)] * (2 * layers * directions)
    if vector.numel() != sum(math.prod(shape) for shape in shapes):
        raise InputError(
            f"{node.name}: {vector.numel()} weights; {sum(math.prod(shape) for shape in shapes)} were expected for inputs of "
            f"width {num_features}, state_size={hidden}, num_layers={layers}, directions={directions}",
            field=node.name,
        )
    parts = [
        part.reshape(shape) for part, shape in zip(vector.split([math.prod(s) for s in shapes]), shapes, strict=True)
    ]
    num = layers * directions
    matrices, biases = parts[: 2 * num], parts[2 * num :]
    return [value for at in range(num) for value in (*matrices[2 * at : 2 * at + 2], *biases[2 * at : 2 * at + 2])]


LAYERS: dict[str, tuple[Callable[[Node], LayerFunction], tuple[str, ...]]] = {
    "BatchNorm": (_batch_norm, ("data", "gamma", "beta", "moving_mean", "moving_var")),
    "BatchNorm_v1": (_batch_norm, ("data", "gamma", "beta", "moving_mean", "moving_var")),
    "CuDNNBatchNorm": (_batch_norm, ("data", "gamma", "beta", "moving_mean", "moving_var")),
    "Convolution": (_convolution, ("data", "weight", "bias")),
    "Convolution_v1": (_convolution, ("data", "weight", "bias")),
    "Deconvolution": (_deconvolution, ("data", "weight", "bias")),
    "Dropout": (_dropout, ("data",)),
    "Embedding": (_embedding, ("data", "weight")),
    "FullyConnected": (_fully_connected, ("data", "weight", "bias")),
    "GroupNorm": (_group_norm, ("data", "gamma", "beta")),
    "InstanceNorm": (_instance_norm, ("data", "gamma", "beta")),
    "LayerNorm": (_layer_norm, ("data", "gamma", "beta")),
    "LeakyReLU": (_leaky_relu, ("data", "gamma")),
    "Pooling": (_pooling, ("data",)),
    "Pooling_v1": (_pooling, ("data",)),
    "RNN": (_rnn, ("data", "parameters")),
}
"""The operator's name -> (what makes its function, names of its inputs: those after data are weights the file must hold)."""
