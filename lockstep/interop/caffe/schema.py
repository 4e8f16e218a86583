"""What a `.prototxt` may say: the fields of each layer's parameters, and the older spellings brought to the current one.

Three generations are read: `layer { type: "Convolution" convolution_param {...} }` (current), `layers { type: CONVOLUTION
convolution_param {...} blobs_lr: 1 }` (V1) and `layers { layer { type: "conv" num_output: 8 } }` (V0).
"""

from __future__ import annotations

from lockstep.core.errors import unknown_name
from lockstep.interop.caffe.text import Message, Scalar

_ENGINE = "engine"
PARAMETERS: dict[str, tuple[str, ...]] = {
    name: tuple(fields.split())
    for name, fields in {
        "accuracy_param": "top_k axis ignore_label",
        "argmax_param": "out_max_val top_k axis",
        "batch_norm_param": "use_global_stats moving_average_fraction eps",
        "bias_param": "axis num_axes filler",
        "clip_param": "min max",
        "concat_param": "axis concat_dim",
        "contrastive_loss_param": "margin legacy_version",
        "convolution_param": "num_output bias_term pad kernel_size stride dilation pad_h pad_w kernel_h kernel_w stride_h"
        " stride_w group weight_filler bias_filler engine axis force_nd_im2col",
        "crop_param": "axis offset",
        "data_param": "source batch_size rand_skip backend scale mean_file crop_size mirror force_encoded_color prefetch",
        "dropout_param": "dropout_ratio scale_train",
        "dummy_data_param": "data_filler shape num channels height width",
        "eltwise_param": "operation coeff stable_prod_grad",
        "elu_param": "alpha",
        "embed_param": "num_output input_dim bias_term weight_filler bias_filler",
        "exp_param": "base scale shift",
        "flatten_param": "axis end_axis",
        "hdf5_data_param": "source batch_size shuffle",
        "hdf5_output_param": "file_name",
        "hinge_loss_param": "norm",
        "image_data_param": "source batch_size rand_skip shuffle new_height new_width is_color scale mean_file crop_size"
        " mirror root_folder",
        "infogain_loss_param": "source axis",
        "inner_product_param": "num_output bias_term weight_filler bias_filler axis transpose",
        "input_param": "shape",
        "log_param": "base scale shift",
        "loss_param": "ignore_label normalization normalize",
        "lrn_param": "local_size alpha beta norm_region k engine",
        "memory_data_param": "batch_size channels height width",
        "mvn_param": "normalize_variance across_channels eps",
        "parameter_param": "shape",
        "permute_param": "order",
        "pooling_param": "pool pad pad_h pad_w kernel_size kernel_h kernel_w stride stride_h stride_w engine"
        " global_pooling round_mode",
        "power_param": "power scale shift",
        "prelu_param": "filler channel_shared",
        "python_param": "module layer param_str share_in_parallel",
        "recurrent_param": "num_output weight_filler bias_filler debug_info expose_hidden",
        "reduction_param": "operation axis coeff",
        "relu_param": "negative_slope engine",
        "reshape_param": "shape axis num_axes",
        "scale_param": "axis num_axes filler bias_term bias_filler",
        "sigmoid_param": _ENGINE,
        "slice_param": "axis slice_point slice_dim",
        "softmax_param": "engine axis",
        "swish_param": "beta",
        "tanh_param": _ENGINE,
        "threshold_param": "threshold",
        "tile_param": "axis tiles",
        "transform_param": "scale mirror crop_size mean_file mean_value force_color force_gray",
        "window_data_param": "source scale mean_file batch_size crop_size mirror fg_threshold bg_threshold fg_fraction"
        " context_pad crop_mode cache_images root_folder",
    }.items()
}
LAYER_FIELDS = (
    *[
        "name",
        "type",
        "bottom",
        "top",
        "phase",
        "loss_weight",
        "param",
        "blobs",
        "propagate_down",
        "include",
        "exclude",
    ],
    *PARAMETERS,
)
V1_LAYER_FIELDS = (
    *("bottom", "top", "name", "include", "exclude", "type", "blobs", "param", "blob_share_mode", "blobs_lr"),
    *("weight_decay", "loss_weight", "layer"),
    *PARAMETERS,
)
NET_FIELDS = ("name", "input", "input_shape", "input_dim", "force_backward", "state", "debug_info", "layer", "layers")
STATE_RULE_FIELDS = ("phase", "min_level", "max_level", "stage", "not_stage")
SPEC_FIELDS = ("name", "share_mode", "lr_mult", "decay_mult")
FILLER_FIELDS = ("type", "value", "min", "max", "mean", "std", "sparse", "variance_norm")

V1_TYPES = {
    "ABSVAL": "AbsVal",
    "ACCURACY": "Accuracy",
    "ARGMAX": "ArgMax",
    "BNLL": "BNLL",
    "CONCAT": "Concat",
    "CONTRASTIVE_LOSS": "ContrastiveLoss",
    "CONVOLUTION": "Convolution",
    "DATA": "Data",
    "DECONVOLUTION": "Deconvolution",
    "DROPOUT": "Dropout",
    "DUMMY_DATA": "DummyData",
    "ELTWISE": "Eltwise",
    "EUCLIDEAN_LOSS": "EuclideanLoss",
    "EXP": "Exp",
    "FLATTEN": "Flatten",
    "HDF5_DATA": "HDF5Data",
    "HDF5_OUTPUT": "HDF5Output",
    "HINGE_LOSS": "HingeLoss",
    "IM2COL": "Im2col",
    "IMAGE_DATA": "ImageData",
    "INFOGAIN_LOSS": "InfogainLoss",
    "INNER_PRODUCT": "InnerProduct",
    "LRN": "LRN",
    "MEMORY_DATA": "MemoryData",
    "MULTINOMIAL_LOGISTIC_LOSS": "MultinomialLogisticLoss",
    "MVN": "MVN",
    "POOLING": "Pooling",
    "POWER": "Power",
    "RELU": "ReLU",
    "SIGMOID": "Sigmoid",
    "SIGMOID_CROSS_ENTROPY_LOSS": "SigmoidCrossEntropyLoss",
    "SILENCE": "Silence",
    "SLICE": "Slice",
    "SOFTMAX": "Softmax",
    "SOFTMAX_LOSS": "SoftmaxWithLoss",
    "SPLIT": "Split",
    "TANH": "TanH",
    "THRESHOLD": "Threshold",
    "WINDOW_DATA": "WindowData",
}
V0_TYPES = {
    "accuracy": "Accuracy",
    "bnll": "BNLL",
    "concat": "Concat",
    "conv": "Convolution",
    "data": "Data",
    "dropout": "Dropout",
    "euclidean_loss": "EuclideanLoss",
    "flatten": "Flatten",
    "hdf5_data": "HDF5Data",
    "images": "ImageData",
    "innerproduct": "InnerProduct",
    "lrn": "LRN",
    "multinomial_logistic_loss": "MultinomialLogisticLoss",
    "pool": "Pooling",
    "relu": "ReLU",
    "sigmoid": "Sigmoid",
    "softmax": "Softmax",
    "softmax_loss": "SoftmaxWithLoss",
    "split": "Split",
    "tanh": "TanH",
    "window_data": "WindowData",
}
# V0 kept every parameter on the layer itself: (field there, parameter message, field here), by current layer type.
_V0_MOVES: dict[str, tuple[str, dict[str, str]]] = {
    "Convolution": (
        "convolution_param",
        {name: name for name in ("num_output", "weight_filler", "bias_filler", "pad", "group", "stride")}
        | {"biasterm": "bias_term", "kernelsize": "kernel_size"},
    ),
    "InnerProduct": (
        "inner_product_param",
        {name: name for name in ("num_output", "weight_filler", "bias_filler")} | {"biasterm": "bias_term"},
    ),
    "Pooling": ("pooling_param", {"pool": "pool", "pad": "pad", "kernelsize": "kernel_size", "stride": "stride"}),
    "Dropout": ("dropout_param", {"dropout_ratio": "dropout_ratio"}),
    "LRN": ("lrn_param", {name: name for name in ("local_size", "alpha", "beta", "k")}),
    "Concat": ("concat_param", {"concat_dim": "concat_dim"}),
    "Data": ("data_param", {"source": "source", "batchsize": "batch_size", "rand_skip": "rand_skip"}),
    "ImageData": ("image_data_param", {"source": "source", "batchsize": "batch_size", "rand_skip": "rand_skip"}),
    "HDF5Data": ("hdf5_data_param", {"source": "source", "batchsize": "batch_size"}),
}
_V0_TRANSFORM = {"scale": "scale", "meanfile": "mean_file", "cropsize": "crop_size", "mirror": "mirror"}


def upgrade_v1(old: Message) -> Message:
    """A V1 (or V0) `layers {...}` entry as a current `layer {...}`."""
    old.known(V1_LAYER_FIELDS)
    new = Message(old.path, old.line, "layer")
    if "layer" in old:
        _upgrade_v0(old.message("layer"), new)
    else:
        kind = old.string("type")
        if kind not in V1_TYPES:
            raise old.fail(unknown_name("layer type", kind, V1_TYPES))
        new.fields["type"] = [Scalar(V1_TYPES[kind], "text", old.line)]
    specs = [Message(old.path, old.line, "param") for _ in range(_num_specs(old, new))]
    for source, field, target in (
        (old, "param", "name"),
        (old, "blobs_lr", "lr_mult"),
        (old, "weight_decay", "decay_mult"),
    ):
        for spec, value in zip(specs, source.scalars(field) or new.scalars(field), strict=False):
            spec.fields[target] = [value]
    for name, values in old.fields.items():
        if name not in ("type", "layer", "param", "blobs_lr", "weight_decay", "blob_share_mode", "blobs"):
            new.fields.setdefault(name, []).extend(values)
    for name in ("blobs_lr", "weight_decay"):
        new.fields.pop(name, None)
    if specs:
        new.fields["param"] = list(specs)
    return new


def _num_specs(old: Message, new: Message) -> int:
    return max(
        len(old.scalars("param")),
        *(len(old.scalars(name) or new.scalars(name)) for name in ("blobs_lr", "weight_decay")),
    )


def _upgrade_v0(old: Message, new: Message) -> None:
    kind = old.string("type")
    if kind not in V0_TYPES:
        raise old.fail(unknown_name("layer type", kind, V0_TYPES))
    current = V0_TYPES[kind]
    new.fields["type"] = [Scalar(current, "text", old.line)]
    parameter, moves = _V0_MOVES.get(current, ("", {}))
    for name, values in old.fields.items():
        if name in ("name", "blobs_lr", "weight_decay"):
            new.fields[name] = values
        elif name in moves:
            _inside(new, parameter).fields[moves[name]] = values
        elif name in _V0_TRANSFORM and current.endswith("Data"):
            _inside(new, "transform_param").fields[_V0_TRANSFORM[name]] = values
        elif name not in ("type", "blobs"):
            raise old.fail(f"field {name!r} has no meaning for a layer of type {kind!r}", values[0].line)


def _inside(message: Message, name: str) -> Message:
    if name not in message:
        message.fields[name] = [Message(message.path, message.line, name)]
    return message.messages(name)[0]
