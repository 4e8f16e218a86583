"""A network of another framework as part of a control policy: as the whole of it up to the action distribution, or as the
body under dense layers of ours. Every weight of it is trained.

Legend: N rows, D vector features, F stacked frames, K features of a frame, C channels, P distribution parameters, L latent
features.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lockstep.core.errors import CheckpointError, ConfigError, FormatError
from lockstep.layers.linear import MLP
from lockstep.models.control.networks import Encoder
from lockstep.models.control.preprocess import VECTOR, Features
from lockstep.models.control.spec import HeadKind, ImportedNetwork, NetworkConfig
from lockstep.models.graph.folder import is_graph_folder, load_graph
from lockstep.models.graph.graph import Graph, Node, Port, TensorValue
from lockstep.models.graph.module import GraphModule, dtype_of
from lockstep.models.graph.states import STATE_PREFIX, Slot, carried

Role = Literal["auto", "policy", "encoder"]


class ImportedEncoder(nn.Module):
    """Network input -> [N, L]: what the imported network says of the distribution (or its latent features), then the state's
    value if it says that too, then what a critic of ours looks at.

    Args:
        features: what the policy's preprocessing yields.
        imported: the network and how it is used.
        frame_stack: F, the steps of a network that reads sequences.
        critic: encoder of our own critic's input, None where it needs none.
    """

    def __init__(
        self, features: Features, imported: ImportedNetwork, *, frame_stack: int, critic: Encoder | None
    ) -> None:
        super().__init__()
        names = (imported.output, imported.value) if imported.value else (imported.output,)
        graph = with_outputs(imported.graph, names)
        source = imported.module
        self.network = taken_over(graph, source)
        self.adapt = Adapter(graph, features, frame_stack)
        self.critic = critic
        self.out_size = imported.size + (1 if imported.value else 0) + (0 if critic is None else critic.out_size)

    def init(self, generator: torch.Generator) -> None:
        if self.critic is not None:
            self.critic.init(generator)

    def forward(self, x: Any) -> Tensor:
        parts = [self.adapt.rows(y) for y in self.network.outputs([self.adapt(x)])]
        if self.critic is not None:
            parts.append(self.critic(x))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class ImportedCore(nn.Module):
    """A recurrent imported network, step by step: what `layers.recurrent` cores are, with the latent of `ImportedEncoder`.

    Args:
        features: what the policy's preprocessing yields; plain.
        imported: the network with its states.
        keep_input: the features are the latent's last columns, for a critic of ours.
    """

    def __init__(self, features: Features, imported: ImportedNetwork, *, keep_input: bool) -> None:
        super().__init__()
        names = (imported.output, imported.value) if imported.value else (imported.output,)
        self.num_outputs = len(names)
        self.slots = imported.states
        graph = with_outputs(imported.graph, (*names, *(slot.output for slot in self.slots)))
        self.network = taken_over(graph, imported.module)
        self.adapt = Adapter(graph, features, 1)
        self.keep_input = keep_input
        self.hidden_size = imported.size + len(names) - 1 + (features.num_vector if keep_input else 0)

    def init_orthogonal(self, generator: torch.Generator) -> ImportedCore:
        """Nothing: it comes with its weights."""
        return self

    def initial_state(self, num: int) -> dict[str, Tensor]:
        """Zeros, one [M, H] for each state."""
        return {f"r{i}": torch.zeros(num, slot.size) for i, slot in enumerate(self.slots)}

    def forward(self, x_TMK: Tensor, state: dict[str, Tensor], starts_TM: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Run T steps; where `starts` is true the state is zeroed before the step. Returns ([T, M, L], state)."""
        states = [state[f"r{i}"] for i in range(len(self.slots))]
        latents = []
        for x_MK, starts_M in zip(x_TMK, starts_TM, strict=True):
            alive = (~starts_M).to(x_MK.dtype).unsqueeze(1)
            outs = self.network.outputs([self.adapt(x_MK), *((s * alive).unsqueeze(0) for s in states)])
            states = [s.squeeze(0) for s in outs[self.num_outputs :]]
            parts = [self.adapt.rows(y) for y in outs[: self.num_outputs]]
            latents.append(torch.cat([*parts, x_MK], dim=1) if self.keep_input else torch.cat(parts, dim=1))
        return torch.stack(latents), {f"r{i}": s for i, s in enumerate(states)}


def taken_over(graph: Graph, source: GraphModule | None) -> GraphModule:
    """A module of `graph` with the weights and files of `source`; None: zeros, for a folder's weights to come."""
    if source is None:
        return GraphModule(graph, None)
    return GraphModule(graph, dict(source.state_dict()), original=source.original)


class Adapter:
    """Between a policy's features and a network's one input: layout, sequence axis, scale."""

    def __init__(self, graph: Graph, features: Features, frame_stack: int) -> None:
        ports = [port for port in graph.inputs if not port.name.startswith(STATE_PREFIX)]
        if len(ports) != 1:
            raise ConfigError(
                f"the imported network reads {', '.join(map(str, ports)) or 'nothing'}; a policy feeds one input"
            )
        self.port, self.about, self.frame_stack = ports[0], graph.about, frame_stack
        self.image = next(iter(features.images)) if features.images else None
        if len(features.images) > 1 or (features.images and features.num_vector):
            raise ConfigError("an imported network reads one image or one vector; choose it in a wrapper")
        rank = None if self.port.shape is None else len(self.port.shape)
        self.is_sequence = self.image is None and rank == 3
        self.time_axis = 1 if self.about.time_axis is None else self.about.time_axis
        self.channels_last = self.image is not None and _channels_last(graph, features.images[self.image])
        self.dtype = dtype_of(self.port.dtype) if self.port.dtype in NUMBERS else torch.float32

    def __call__(self, features: Any) -> Tensor:
        x: Tensor = features[VECTOR if self.image is None else self.image] if isinstance(features, dict) else features
        if self.is_sequence:
            x = x.view(x.shape[0], self.frame_stack, -1)
            x = x.transpose(0, 1) if self.time_axis == 0 else x
        elif self.channels_last:
            x = x.permute(0, 2, 3, 1)
        if self.about.mean or self.about.scale != 1.0:
            x = x.to(torch.float32)
            if self.about.mean:
                mean = torch.tensor(self.about.mean, device=x.device)
                by_channel = self.image is not None and not self.channels_last and len(self.about.mean) > 1
                x = x - (mean.view(-1, 1, 1) if by_channel else mean)
            x = x * self.about.scale
        return x.to(self.dtype)

    def rows(self, y: Tensor) -> Tensor:
        """An output as float32 [N, L]: of a sequence the last step."""
        if self.is_sequence and y.ndim == 3:
            y = y[-1] if self.time_axis == 0 else y[:, -1]
        y = y.to(torch.float32)
        return y.unsqueeze(1) if y.ndim == 1 else y.flatten(1)


class Columns(nn.Module):
    """Some columns of the encoder's output, through a dense network of ours or as they are.

    Args:
        start, stop: the columns.
        body: what they pass through.
        squash: the columns are an action before its tanh.
        log_std: further columns that are learned and do not depend on the input.
    """

    def __init__(
        self, start: int, stop: int, body: MLP | None = None, *, squash: bool = False, log_std: int = 0
    ) -> None:
        super().__init__()
        self.start, self.stop, self.body, self.squash = start, stop, body, squash
        self.log_std = nn.Parameter(torch.zeros(log_std)) if log_std else None

    def init_orthogonal(self, generator: torch.Generator, *, gain: float, out_gain: float) -> None:
        if self.body is not None:
            self.body.init_orthogonal(generator, gain=gain, out_gain=out_gain)

    def init_uniform(self, generator: torch.Generator) -> None:
        if self.body is not None:
            self.body.init_uniform(generator)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, self.start : self.stop]
        if self.body is not None:
            x = self.body(x)
        x = torch.tanh(x) if self.squash else x
        if self.log_std is None:
            return x.contiguous()
        return torch.cat([x, self.log_std.expand(x.shape[0], -1)], dim=1)


SOFTMAX = (
    "Softmax",
    "LogSoftmax",
    "aten.softmax.int",
    "aten.log_softmax.int",
    "aten._softmax.default",
    "aten._log_softmax.default",
)
TANH = ("Tanh", "aten.tanh.default")
NUMBERS = ("float32", "float16", "float64", "bfloat16", "uint8", "int8", "int16", "int32", "int64")


def imported_network(
    module: GraphModule,
    features: Features,
    *,
    head: HeadKind,
    num_params: int,
    critic: bool,
    frame_stack: int = 1,
    role: Role = "auto",
    output: str = "",
    value: str = "",
) -> ImportedNetwork:
    """How `module` serves a policy, found by running it once on zeros.

    Args:
        features: what the policy's preprocessing yields.
        num_params: P, what the head needs.
        critic: the algorithm needs a value of the state.
        role: policy, encoder, or auto: policy where an output has as many columns as the head needs.
        output, value: names of outputs; empty: the first that fits.

    Raises:
        ConfigError: no output fits, or the network does not take these observations.
    """
    names = [port.name for port in module.graph.outputs]
    for wish in filter(None, (output, value)):
        if wish not in names:
            raise ConfigError(f"the imported network has the outputs {names}; got {wish!r}")
    if not output and head in ("categorical", "q"):
        # A file that yields the best action itself: what it chose from is the policy.
        names += [node.inputs[0] for node in module.graph.nodes if node.op == "ArgMax" and node.inputs[0] not in names]
    module = without_marker(taken_over(with_outputs(module.graph, tuple(names)), module))
    adapt = Adapter(module.graph, features, frame_stack)
    states: tuple[Slot, ...] = ()
    if adapt.is_sequence and frame_stack == 1:
        found = carried(module, adapt.time_axis)
        if found is not None:
            graph, states = found
            module = taken_over(graph, module)
        elif adapt.port.shape is None or adapt.port.shape[adapt.time_axis] != 1:
            # A window of one step (Keras-RL's default) is a row.
            raise ConfigError(
                "the imported network reads sequences and its state cannot be carried; give it frame_stack frames"
            )
    graph, ends = module.graph, _ends(module.graph, head)
    widths = _widths(module, adapt, features, states)
    wanted = {num_params, num_params // 2} if head == "squashed" else {num_params}
    fitting = [name for name in ([output] if output else names) if widths[name] in wanted]
    if role == "policy" and not fitting:
        raise ConfigError(
            f"no output of the imported network has {num_params} columns, which head {head!r} needs; it has {widths}; "
            "use the role encoder to put layers of ours on top"
        )
    if role == "encoder" or not fitting:
        chosen = output or names[0]
        if not widths[chosen]:
            raise ConfigError(f"output {chosen!r} of the imported network has no row for each observation")
        return ImportedNetwork(
            graph=graph, role="encoder", output=chosen, size=widths[chosen], states=states, module=module
        )
    chosen = fitting[0]
    if critic and not value:
        value = next((name for name in names if name != chosen and widths[name] == 1), "")
    return ImportedNetwork(
        graph=graph,
        role="policy",
        output=ends.get(chosen, chosen),
        size=widths[chosen],
        value=value if critic else "",
        states=states,
        module=module,
    )


def read_imported(network: NetworkConfig) -> GraphModule:
    """The folder that a configuration names.

    Raises:
        ConfigError: it is not one that `lockstep import` wrote.
    """
    folder = Path(network.imported)
    if not is_graph_folder(folder):
        raise ConfigError(
            f"network.imported={network.imported!r} is no folder of an imported network; write one with: "
            "lockstep import FILE --out DIR"
        )
    try:
        return load_graph(folder)
    except CheckpointError as error:
        raise ConfigError(f"network.imported: {error}") from error


def actor_of(imported: ImportedNetwork, head: HeadKind, num_params: int) -> Columns:
    """The actor of a policy whose distribution the imported network gives."""
    squash = head == "deterministic" and producer(imported.graph, imported.output).op not in TANH
    return Columns(0, imported.size, squash=squash, log_std=num_params - imported.size)


def critic_of(imported: ImportedNetwork, body: MLP, encoder_size: int) -> Columns:
    """The critic beside it: the network's own value, or `body` on the encoder's last columns."""
    if imported.value:
        return Columns(imported.size, imported.size + 1)
    return Columns(imported.size, encoder_size, body)


def without_marker(module: GraphModule) -> GraphModule:
    """The network with its marker of beginnings always 1: a policy clears states itself."""
    graph = module.graph
    if graph.about.marker not in [port.name for port in graph.inputs]:
        return module
    inputs = tuple(port for port in graph.inputs if port.name != graph.about.marker)
    if len(inputs) != 1:
        raise ConfigError(
            f"beside its marker {graph.about.marker!r} the imported network reads {len(inputs)} inputs, not one"
        )
    ones = [
        Node("Shape", (inputs[0].name,), ("marker.shape",), {"start": 0, "end": 2}),
        Node(
            "ConstantOfShape", ("marker.shape",), (graph.about.marker,), {"value": TensorValue("float32", (1,), (1.0,))}
        ),
    ]
    about = replace(graph.about, marker="")
    return taken_over(replace(graph, inputs=inputs, nodes=(*ones, *graph.nodes), about=about), module)


def with_outputs(graph: Graph, names: tuple[str, ...]) -> Graph:
    """The graph with other outputs, any of its values, and those inputs that they depend on."""
    ports = {port.name: port for port in graph.outputs}
    needed = set(names)
    for node in reversed(graph.nodes):
        if not needed.isdisjoint(node.outputs):
            needed.update(node.inputs)
            needed.update(name for body in bodies(node) for inner in body.walk() for name in inner.inputs)
            needed.update(port.name for body in bodies(node) for port in body.outputs)
    return replace(
        graph,
        outputs=tuple(ports.get(name, Port(name)) for name in names),
        inputs=tuple(port for port in graph.inputs if port.name in needed),
    )


def bodies(node: Node) -> list[Graph]:
    """Graphs inside of a node."""
    return [value for value in node.attributes.values() if isinstance(value, Graph)]


def producer(graph: Graph, name: str) -> Node:
    """The node that computes a value, names passed on by Identity aside."""
    makers = {out: node for node in graph.nodes for out in node.outputs if out}
    node = makers.get(name, Node("", (), ()))
    while node.op == "Identity" and node.inputs[0] in makers:
        node = makers[node.inputs[0]]
    return node


def _ends(graph: Graph, head: HeadKind) -> dict[str, str]:
    """Outputs whose last operation the head does itself -> what goes into it: probabilities -> logits, a tanh -> its mean."""
    ends = {}
    undone = {"categorical": SOFTMAX, "squashed": TANH}.get(head, ())
    for port in graph.outputs:
        node = producer(graph, port.name)
        if node.op in undone:
            ends[port.name] = node.inputs[0]
    return ends


def _channels_last(graph: Graph, image: tuple[int, int, int]) -> bool:
    if graph.about.layout:
        return graph.about.layout == "NHWC"
    shape = graph.inputs[0].shape
    return shape is not None and len(shape) == 4 and shape[3] == image[0] and shape[1] != image[0]


def _widths(module: GraphModule, adapt: Adapter, features: Features, states: tuple[Slot, ...]) -> dict[str, int]:
    """Columns of each output, from two rows of zeros; 0 where it has no row for each."""
    x: Any = torch.zeros(2, features.num_vector)
    if adapt.image is not None:
        x = {adapt.image: torch.zeros(2, *features.images[adapt.image], dtype=torch.uint8)}
    try:
        with torch.no_grad():
            outputs = module.outputs([adapt(x), *(torch.zeros(1, 2, slot.size) for slot in states)])
    except (FormatError, RuntimeError) as error:
        raise ConfigError(f"the imported network does not take these observations: {error}") from error
    widths = {}
    for port, y in zip(module.graph.outputs, outputs, strict=True):
        is_rows = isinstance(y, Tensor) and y.ndim >= 1
        rows = adapt.rows(y) if is_rows else None
        widths[port.name] = rows.shape[1] if rows is not None and rows.shape[0] == 2 else 0
    return widths
