"""A Caffe network as a module: layers run in the order of the description, each blob under its name.

>>> from lockstep.interop.caffe.text import parse_text
>>> from lockstep.interop.caffe.reader import net_from_message
>>> spec = net_from_message(parse_text('''
... input: "obs" input_shape { dim: 1 dim: 4 }
... layer { name: "fc" type: "InnerProduct" bottom: "obs" top: "fc" inner_product_param { num_output: 2 } }
... layer { name: "act" type: "TanH" bottom: "fc" top: "fc" }'''), phase="TEST")
>>> net = CaffeNetwork(spec)
>>> net(torch.zeros(3, 4)).shape, net.input_names, net.output_names
(torch.Size([3, 2]), ('obs',), ('fc',))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lockstep.core.errors import FormatError, InputError, LockstepError, unknown_name
from lockstep.interop.caffe.layers import Affine, BatchNorm, Constant, Convolution, Embed, InnerProduct, PReLU, Source
from lockstep.interop.caffe.losses import LOSSES
from lockstep.interop.caffe.ops import NUM_BOTTOMS, OPS, Dropout, Op, Shapes
from lockstep.interop.caffe.pooling import build_pooling
from lockstep.interop.caffe.reader import (
    Blobs,
    LayerSpec,
    NetSpec,
    ParamSpec,
    Phase,
    check_names,
    read_net,
    read_weights,
)
from lockstep.interop.caffe.recurrent import LSTM, RNN

DATA_LAYERS = ("Input", "Data", "DummyData", "HDF5Data", "ImageData", "MemoryData", "WindowData")
WEIGHTED: dict[str, type[nn.Module]] = {
    "BatchNorm": BatchNorm,
    "Bias": Affine,
    "Convolution": Convolution,
    "Deconvolution": Convolution,
    "Embed": Embed,
    "InnerProduct": InnerProduct,
    "LSTM": LSTM,
    "PReLU": PReLU,
    "Parameter": Constant,
    "RNN": RNN,
    "Scale": Affine,
}
MAX_ELEMENTS = 1 << 31
"""Of one blob of activations; a description that asks for more is damaged."""
MAX_DIM = 1 << 24
TRANSFORM_SETTINGS = ("scale", "mean_value", "mean_file", "crop_size", "mirror")


@dataclass(frozen=True)
class Step:
    """A layer's place in the run: its module's key, and the names of the blobs it reads and writes."""

    key: str
    spec: LayerSpec
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]


@dataclass(frozen=True)
class Learnable:
    """A trainable blob with its settings."""

    name: str
    parameter: nn.Parameter
    spec: ParamSpec


class CaffeNetwork(nn.Module):
    """A network read from a description, with weights from a file or from fillers.

    `input_shapes` maps each input to its declared shape (the batch size in it binds nobody); `outputs` are the blobs nobody
    reads, in the order they are made. `preprocessing` holds a data layer's `transform_param` by the name of its output.

    Args:
        spec: the description of one phase.
        weights: blobs by layer; None fills them as the description says.
        shapes: shapes of inputs whose layer does not tell (data bases), or to use instead of the declared ones.
        with_loss: keep loss and accuracy layers and their label inputs.
        seed: of the fillers.

    Raises:
        FormatError: a layer cannot be built; the message names file, line, layer and type.
    """

    def __init__(
        self,
        spec: NetSpec,
        weights: dict[str, Blobs] | None = None,
        *,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        with_loss: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleDict()
        self.steps: list[Step] = []
        self.preprocessing: dict[str, dict[str, str]] = {}
        self.loss_weights: dict[str, float] = {}
        self._shared: dict[str, tuple[str, nn.Parameter]] = {}
        self._specs: dict[str, ParamSpec] = {}
        generator = torch.Generator().manual_seed(seed)
        known = {name: _checked(spec, name, shape) for name, shape in self._inputs(shapes or {}, with_loss).items()}
        self.input_shapes = dict(known)
        for layer in spec.layers:
            if layer.type in DATA_LAYERS or layer.type == "Silence" or (layer.type in LOSSES and not with_loss):
                continue
            self._add(layer, known, weights, generator)
        if not self.steps:
            raise FormatError("has no layers that compute anything", path=spec.path)
        self.input_names = tuple(self.input_shapes)
        self.output_names = self._outputs()
        self.output_shapes = {name: known[name] for name in self.output_names}

    def _inputs(self, given: Mapping[str, tuple[int, ...]], with_loss: bool) -> dict[str, tuple[int, ...] | None]:
        """Names and shapes of the inputs that some layer reads."""
        read = {
            name
            for layer in self.spec.layers
            if layer.type != "Silence" and (with_loss or layer.type not in LOSSES)
            for name in layer.bottoms
        }
        inputs = dict(self.spec.inputs)
        for layer in self.spec.layers:
            if layer.type in DATA_LAYERS:
                inputs |= data_shapes(layer)
                transform = layer.param("transform_param")
                if transform.fields:
                    self.preprocessing[layer.tops[0]] = {
                        name: " ".join(transform.strings(name)) for name in TRANSFORM_SETTINGS if name in transform
                    }
        for name in given:
            if name not in inputs:
                raise InputError(unknown_name("input", name, inputs), field="shapes")
        return {name: given.get(name, shape) for name, shape in inputs.items() if name in read}

    def _add(
        self,
        layer: LayerSpec,
        known: dict[str, tuple[int, ...]],
        weights: dict[str, Blobs] | None,
        generator: torch.Generator,
    ) -> None:
        for name in layer.bottoms:
            if name not in known:
                raise layer.fail(unknown_name("bottom", name, known))
        bottom_shapes = [known[name] for name in layer.bottoms]
        try:
            module = self._build(layer, bottom_shapes, weights, generator)
            tops = _infer(module, bottom_shapes)
        except (RuntimeError, ValueError, TypeError, IndexError, OverflowError, ZeroDivisionError) as error:
            if isinstance(error, FormatError):
                raise
            raise layer.fail(f"cannot take inputs of shapes {bottom_shapes}: {str(error).splitlines()[0]}") from error
        if len(tops) != len(layer.tops):
            raise layer.fail(f"names {len(layer.tops)} outputs and makes {len(tops)}")
        for name, shape in zip(layer.tops, tops, strict=True):
            known[name] = _checked(self.spec, name, shape)
        key = layer.name.replace(".", "_") or layer.type
        while key in self.layers or not _is_free(self.layers, key):
            key += "_"
        self.layers[key] = module
        self.steps.append(Step(key, layer, layer.bottoms, layer.tops))
        self._settle(key, layer, module)

    def _build(
        self, layer: LayerSpec, shapes: Shapes, weights: dict[str, Blobs] | None, generator: torch.Generator
    ) -> nn.Module:
        kind = layer.type
        if kind in WEIGHTED:
            least = 0 if kind == "Parameter" else 1
            if len(shapes) < least:
                raise layer.fail("has no input")
            source = Source(layer, None if weights is None else weights.get(layer.name, []), generator)
            module = WEIGHTED[kind](layer, shapes, source)
            source.finish()
            return module
        if kind in LOSSES:
            make, num, weight = LOSSES[kind]
            _check_bottoms(layer, num, num)
            given = layer.loss_weights or (weight, *(0.0,) * (len(layer.tops) - 1))
            self.loss_weights |= dict(zip(layer.tops, given, strict=False))
            return Op(make(layer, shapes), kind)
        self.loss_weights |= dict(zip(layer.tops, layer.loss_weights, strict=False))
        if kind not in OPS and kind not in ("Pooling", "Dropout"):
            raise layer.fail(
                unknown_name("layer type", kind, [*WEIGHTED, *LOSSES, *OPS, "Pooling", "Dropout", *DATA_LAYERS])
            )
        least, most = NUM_BOTTOMS.get(kind, (1, 1))
        _check_bottoms(layer, least, most)
        if kind == "Pooling":
            return build_pooling(layer, shapes[0])
        return Dropout(layer) if kind == "Dropout" else Op(OPS[kind](layer, shapes), kind)

    def _settle(self, key: str, layer: LayerSpec, module: nn.Module) -> None:
        """Note the settings of each blob, and let blobs of one name be one parameter."""
        if layer.type not in WEIGHTED:
            return
        for index, name in enumerate(blob_names(module)):
            spec = layer.specs[index] if index < len(layer.specs) else ParamSpec()
            value = dict(module.named_parameters(recurse=False)).get(name)
            if value is None:
                continue
            path = f"layers.{key}.{name}"
            if spec.name in self._shared:
                owner, first = self._shared[spec.name]
                if first.shape != value.shape:
                    raise layer.fail(
                        f"shares {spec.name!r} of shape {tuple(first.shape)} with {owner}; here it is {tuple(value.shape)}"
                    )
                module.register_parameter(name, first)
                continue
            if spec.name:
                self._shared[spec.name] = (path, value)
            self._specs[path] = spec

    def _outputs(self) -> tuple[str, ...]:
        waiting: dict[str, None] = {}
        for step in self.steps:
            for name in step.bottoms:
                waiting.pop(name, None)
            for name in step.tops:
                waiting[name] = None
        return tuple(waiting)

    def learnables(self) -> list[Learnable]:
        """The trainable blobs in file order, with their multipliers."""
        parameters = dict(self.named_parameters())
        return [Learnable(path, parameters[path], spec) for path, spec in self._specs.items()]

    def compute(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every blob by name; one written in place holds its last value.

        Raises:
            InputError: an input is missing.
        """
        for name in self.input_names:
            if name not in inputs:
                raise InputError(f"input {name!r} is missing; the network reads {list(self.input_names)}", field=name)
        blobs = dict(inputs)
        for step in self.steps:
            bottoms = [blobs[name] for name in step.bottoms]
            if torch.compiler.is_compiling():
                out = self.layers[step.key](*bottoms)
            else:
                out = self._run(step, bottoms)
            for name, value in zip(step.tops, (out,) if isinstance(out, Tensor) else out, strict=True):
                blobs[name] = value
        return blobs

    def _run(self, step: Step, bottoms: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        try:
            out: Tensor | tuple[Tensor, ...] = self.layers[step.key](*bottoms)
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, LockstepError):
                raise InputError(f"{self.spec.path}: {error}", field=step.spec.name) from error
            shapes = [tuple(bottom.shape) for bottom in bottoms]
            raise InputError(
                f"{self.spec.path}: layer {step.spec.name!r} ({step.spec.type}) cannot take inputs of shapes {shapes}: "
                f"{str(error).splitlines()[0]}",
                field=step.spec.name,
            ) from error
        return out

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Inputs in the order of `input_names`, or by name -> the output, or outputs in the order of `output_names`.

        Raises:
            InputError: an input is missing, or there are too many.
        """
        if len(inputs) > len(self.input_names):
            raise InputError(f"{len(inputs)} inputs; the network reads {list(self.input_names)}", field="inputs")
        blobs = self.compute({**dict(zip(self.input_names, inputs, strict=False)), **named})
        outputs = tuple(blobs[name] for name in self.output_names)
        return outputs[0] if len(outputs) == 1 else outputs

    def loss(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective (outputs times their loss weights, summed) and the outputs by name.

        Raises:
            InputError: the network has no loss (build it with `with_loss=True`), or an input is missing.
        """
        blobs = self.compute(inputs)
        parts = [weight * blobs[name].sum() for name, weight in self.loss_weights.items() if weight]
        if not parts:
            raise InputError(f"{self.spec.path} has no loss layer in this phase", field="with_loss")
        return torch.stack(parts).sum(), {name: blobs[name] for name in self.output_names}


def blob_names(module: nn.Module) -> tuple[str, ...]:
    """The attributes of a layer with weights, in the order of Caffe's files, those that it has."""
    present = {name for name, value in (*module.named_parameters(), *module.named_buffers()) if value is not None}
    names: tuple[str, ...] = module.blobs  # type: ignore[assignment]
    return tuple(name for name in names if name in present)


def _is_free(modules: nn.ModuleDict, key: str) -> bool:
    return key not in dir(modules)


def _check_bottoms(layer: LayerSpec, least: int, most: int | None) -> None:
    if len(layer.bottoms) < least or (most is not None and len(layer.bottoms) > most):
        raise layer.fail(f"has {len(layer.bottoms)} inputs; {least if least == most else f'{least} or more'} expected")
    if not layer.tops:
        raise layer.fail("names no output")


def data_shapes(layer: LayerSpec) -> dict[str, tuple[int, ...] | None]:
    """The outputs of a data layer with their shapes where the description tells."""
    shapes: list[tuple[int, ...] | None] = [None] * len(layer.tops)
    if layer.type in ("Input", "DummyData"):
        param = layer.param("input_param" if layer.type == "Input" else "dummy_data_param")
        given: list[tuple[int, ...] | None] = [tuple(shape.integers("dim")) for shape in param.messages("shape")]
        if not given and "num" in param:
            columns = [param.integers(name) for name in ("num", "channels", "height", "width")]
            given += [tuple(dims) for dims in zip(*columns, strict=False)]
        if len(given) == 1:
            given *= len(layer.tops)
        if given and len(given) != len(layer.tops):
            raise layer.fail(f"{len(given)} shapes for {len(layer.tops)} outputs")
        shapes = given or shapes
    elif layer.type == "MemoryData":
        param = layer.param("memory_data_param")
        image = tuple(param.integer(name, 0) for name in ("batch_size", "channels", "height", "width"))
        shapes[:] = [image, image[:1]][: len(layer.tops)]
    return dict(zip(layer.tops, shapes, strict=True))


def _checked(spec: NetSpec, name: str, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    if shape is None:
        raise FormatError(
            f"does not tell the shape of input {name!r}; give it, as in shapes={{{name!r}: (1, 3, 84, 84)}}",
            path=spec.path,
        )
    if any(not 1 <= dim <= MAX_DIM for dim in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise FormatError(f"blob {name!r} would have shape {shape}: damaged, or not meant to be run", path=spec.path)
    return tuple(shape)


def _infer(module: nn.Module, shapes: Shapes) -> list[tuple[int, ...]]:
    """The shapes that a layer makes, without computing."""
    with torch.no_grad():
        bottoms = [torch.empty(shape, device="meta") for shape in shapes]
        state = {name: torch.empty_like(value, device="meta") for name, value in module.state_dict().items()}
        out = torch.func.functional_call(module, state, tuple(bottoms))
    return [tuple(value.shape) for value in ((out,) if isinstance(out, Tensor) else out)]


def load_caffe(
    prototxt: str | Path,
    weights: str | Path | None = None,
    *,
    phase: Phase = "TEST",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    with_loss: bool = False,
    seed: int = 0,
) -> CaffeNetwork:
    """Load a Caffe network without Caffe; every weight is trainable.

    Args:
        prototxt: the network (V0, V1 or current spelling).
        weights: `.caffemodel` or `.caffemodel.h5`; None starts from the fillers.
        phase: whose layers are kept; TRAIN puts the module in training mode.
        shapes: shapes of inputs that the description leaves to a data base.
        with_loss: keep loss and accuracy layers.
        seed: of the fillers.

    Raises:
        FormatError: a file is missing, damaged or not known; names file, line or offset, layer and type.
    """
    spec = read_net(prototxt, phase=phase)
    blobs = None if weights is None else read_weights(weights)
    if blobs is not None:
        check_names(blobs, spec, str(weights))
    net = CaffeNetwork(spec, blobs, shapes=shapes, with_loss=with_loss, seed=seed)
    return net.train(phase == "TRAIN")
