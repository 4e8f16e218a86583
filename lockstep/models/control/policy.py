"""A control policy: the whole way from raw observation to environment action, as one module.

    obs -> preprocess -> encoder -> (recurrent core) -> actor MLP -> head -> action map -> environment action
                                                     \\-> critic MLP -> value

Collection, evaluation, serving and export run this module; none of them has a step of its own.

Legend: N or M rows, T time steps, P distribution parameters, A action dimensions.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lockstep import kernels
from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace, Space
from lockstep.core.tree import tree_leaves, tree_map
from lockstep.layers.linear import MLP, Activation, NoisyMLP
from lockstep.layers.recurrent import GRU, LSTM, build_recurrent
from lockstep.models.control.actions import ActionMap
from lockstep.models.control.actor import Actor
from lockstep.models.control.heads import (
    Categorical,
    Deterministic,
    Gaussian,
    Head,
    MultiCategorical,
    QValues,
    SquashedGaussian,
)
from lockstep.models.control.imported import (
    Columns,
    ImportedCore,
    ImportedEncoder,
    actor_of,
    critic_of,
    imported_network,
    read_imported,
)
from lockstep.models.control.networks import Encoder
from lockstep.models.control.preprocess import ACTION_MASK, Features, Preprocess
from lockstep.models.control.spec import PolicySpec
from lockstep.models.control.step import PolicyStep
from lockstep.models.graph.module import GraphModule

State = dict[str, Tensor]


class Policy(nn.Module):
    """Built from a `PolicySpec`; see the module's docstring for its parts.

    Args:
        spec: what to build.
        seed: of the initial weights.

    Raises:
        ConfigError: head and action space do not fit, or a part cannot be built for the observation space.
    """

    def __init__(self, spec: PolicySpec, *, seed: int = 0) -> None:
        super().__init__()
        self.preprocess = Preprocess(
            spec.obs_space, normalise=spec.normalise_obs, frame_stack=spec.frame_stack, clip=spec.obs_clip
        )
        self.head = build_head(spec)
        self.spec = spec = with_imported(spec, self.preprocess.features, self.head)
        self.encoder = build_encoder(spec, self.preprocess.features)
        size = self.encoder.out_size
        self.core = build_core(spec, self.preprocess.features, size)
        size = size if self.core is None else self.core.hidden_size
        _check_mask(self.preprocess.features.num_mask, self.head)
        self.actor = build_actor(spec, size, self.head.num_params)
        self.critic = build_critic(spec, size) if spec.critic else None
        self.action_map = ActionMap(spec.action_space, squashed=spec.head in ("squashed", "deterministic"))
        self.version = 0
        self._init(seed)
        self._take_over_deviation()
        self._predictor: Actor | None = None

    def _init(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.encoder.init(generator)
        if self.core is not None:
            self.core.init_orthogonal(generator)
        if self.spec.network.init == "uniform" or isinstance(self.actor, NoisyMLP):
            self.actor.init_uniform(generator)
            if self.critic is not None:
                self.critic.init_uniform(generator)
            return
        gain = 5 / 3 if self.spec.network.activation == "tanh" else 2**0.5
        gain = 2**0.5 if self.spec.critic else gain
        self.actor.init_orthogonal(generator, gain=gain, out_gain=0.01)
        if self.critic is not None:
            self.critic.init_orthogonal(generator, gain=gain, out_gain=1.0)

    @torch.no_grad()
    def _take_over_deviation(self) -> None:
        """The standard deviation that an imported network's file keeps beside the network."""
        about = None if self.imported is None else self.imported.graph.about
        if about is not None and isinstance(self.head, Gaussian) and len(about.log_std) == self.head.num_params:
            self.head.log_std.copy_(torch.tensor(about.log_std))

    @property
    def imported(self) -> GraphModule | None:
        """The network of another framework inside of the policy, None where there is none."""
        if isinstance(self.core, ImportedCore):
            return self.core.network
        return self.encoder.network if isinstance(self.encoder, ImportedEncoder) else None

    @property
    def is_recurrent(self) -> bool:
        """True if the policy has a recurrent core."""
        return self.core is not None

    def initial_state(self, num: int) -> State:
        """State of `num` rows before their first observation (frame stacks, recurrent state)."""
        state = self.preprocess.initial_state(num)
        return state if self.core is None else {**state, **self.core.initial_state(num)}

    def encode(self, obs: Any, state: State, starts_N: Tensor) -> tuple[Any, State]:
        """Raw observation -> (network input, state with the frame stacks advanced)."""
        features, stacks = self.preprocess(obs, state, starts_N)
        return features, {**state, **stacks} if stacks else state

    def forward(self, features: Any, state: State, starts_N: Tensor) -> tuple[Tensor, Tensor | None, State]:
        """One step from network input: (distribution parameters [N, P], value [N], state)."""
        latent = self.encoder(features)
        if self.core is not None:
            latent, core_state = self.core(latent.unsqueeze(0), state, starts_N.unsqueeze(0))
            latent, state = latent.squeeze(0), {**state, **core_state}
        value = None if self.critic is None else self.critic(latent).squeeze(-1)
        return self.actor(latent), value, state

    def act(self, obs: Any, state: State, starts_N: Tensor, noise: Tensor, *, deterministic: bool) -> PolicyStep:
        """Decide for N rows. `noise` [N, head.num_noise] comes from the counter-based generator."""
        features, state = self.encode(obs, state, starts_N)
        params, value, state = self.forward(features, state, starts_N)
        mask = features[ACTION_MASK] if isinstance(features, dict) and ACTION_MASK in features else None
        if deterministic:
            action, logprob = self.head.mode(params, mask)
        else:
            action, logprob = self.head.sample(params, noise, mask)
        return PolicyStep(action, self.action_map(action), logprob, value, features, state)

    def evaluate(self, features: Any, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Learner's view of M independent rows: (logprob [M], entropy [M], value [M]), differentiable."""
        latent = self.encoder(features)
        return self._evaluate_latent(latent, features, action)

    def evaluate_sequence(
        self, features_TM: Any, action_TM: Tensor, state: State, starts_TM: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Learner's view of M sequences of T steps that begin in `state`: (logprob, entropy, value), each [T, M]."""
        if self.core is None:
            raise ConfigError("evaluate_sequence needs a recurrent policy; use evaluate")
        num_steps, num = starts_TM.shape
        rows = tree_map(lambda x: x.flatten(0, 1), features_TM)
        latent = self.encoder(rows).view(num_steps, num, -1)
        latent, _ = self.core(latent, state, starts_TM)
        outs = self._evaluate_latent(latent.flatten(0, 1), rows, action_TM.flatten(0, 1))
        logprob, entropy, value = (out.view(num_steps, num) for out in outs)
        return logprob, entropy, value

    def _evaluate_latent(self, latent: Tensor, features: Any, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = features[ACTION_MASK] if isinstance(features, dict) and ACTION_MASK in features else None
        logprob, entropy = self.head.evaluate(self.actor(latent), action, mask)
        value = torch.zeros_like(logprob) if self.critic is None else self.critic(latent).squeeze(-1)
        return logprob, entropy, value

    def noise(self, seed: int, streams_N: Tensor, positions_N: Tensor) -> Tensor:
        """Sampling noise of each row, a function of (seed, stream, position) alone."""
        if self.head.noise == "uniform":
            return kernels.uniform(seed, streams_N, positions_N, self.head.num_noise)
        if self.head.noise == "normal":
            return kernels.normal(seed, streams_N, positions_N, self.head.num_noise)
        return torch.zeros(len(streams_N), 0)

    def predict(self, obs: Any) -> np.ndarray:
        """Best action for one observation (no leading row dimension), in the environment's own form.

        A policy with state (recurrent, frame stack) remembers it from call to call; `reset_predict()` starts an episode.

        Raises:
            InputError: the observation is not of the policy's space; `field` names the part.
        """
        if self._predictor is None:
            self._predictor = Actor(self, 1, seed=0)
        return self._predictor.predict(obs)

    def reset_predict(self) -> None:
        """Forget the state that `predict` carries: the next observation begins an episode."""
        self._predictor = None

    def digest(self) -> str:
        """SHA-256 over names and bits of every saved tensor: equal digests mean equal policies."""
        sha = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()


def build_head(spec: PolicySpec) -> Head:
    """The action distribution for the spec's action space.

    Raises:
        ConfigError: the head cannot drive that action space.
    """
    space: Space = spec.action_space
    match spec.head, space:
        case "categorical", DiscreteSpace():
            return Categorical(space.n)
        case "categorical", MultiDiscreteSpace():
            return MultiCategorical(space.nvec)
        case "gaussian", BoxSpace():
            return Gaussian(int(np.prod(space.shape)), log_std_init=spec.log_std_init)
        case "squashed", BoxSpace():
            return SquashedGaussian(int(np.prod(space.shape)))
        case "deterministic", BoxSpace():
            return Deterministic(int(np.prod(space.shape)))
        case "q", DiscreteSpace():
            return QValues(space.n, dueling=spec.dueling, num_atoms=spec.num_atoms, support=spec.support)
    fits = {"categorical": "Discrete or MultiDiscrete", "q": "Discrete"}.get(spec.head, "Box")
    raise ConfigError(f"head {spec.head!r} needs a {fits} action space; got {space}; choose another algorithm or head")


def with_imported(spec: PolicySpec, features: Features, head: Head) -> PolicySpec:
    """The spec with the network that its configuration names in it, so that it no longer depends on a path.

    Raises:
        ConfigError: there is no such network, or it does not fit the policy.
    """
    net = spec.network
    if not net.imported or spec.imported is not None:
        return spec
    imported = imported_network(
        read_imported(net),
        features,
        head=spec.head,
        num_params=head.num_params,
        critic=spec.critic,
        frame_stack=spec.frame_stack,
        role=net.imported_role,
        output=net.imported_output,
    )
    return replace(spec, imported=imported, network=replace(net, imported=""))


def build_encoder(spec: PolicySpec, features: Features) -> Encoder | ImportedEncoder:
    """The body: our own, or the imported network with what a critic of ours looks at."""
    net, imported = spec.network, spec.imported
    own = Encoder(features, net.encoder, net.encoder_size, net.compute_dtype)
    if imported is None or imported.states:
        return own
    if imported.role == "policy" and (net.recurrent != "none" or spec.noisy):
        raise ConfigError("an imported policy has no recurrent core or noisy layers of ours; use imported_role=encoder")
    needs_own = spec.critic and imported.role == "policy" and not imported.value
    return ImportedEncoder(features, imported, frame_stack=spec.frame_stack, critic=own if needs_own else None)


def build_core(spec: PolicySpec, features: Features, size: int) -> LSTM | GRU | ImportedCore | None:
    """The recurrent part, if there is one.

    Raises:
        ConfigError: an imported recurrent network where observations are not vectors, or a second core on top of it.
    """
    net, imported = spec.network, spec.imported
    if imported is not None and imported.states:
        if not features.plain or net.recurrent != "none" or spec.noisy:
            raise ConfigError(
                "a recurrent imported network reads vectors and takes no further core or noisy layers of ours"
            )
        needs_own = spec.critic and imported.role == "policy" and not imported.value
        return ImportedCore(features, imported, keep_input=needs_own)
    return None if net.recurrent == "none" else build_recurrent(net.recurrent, size, net.recurrent_size)


def build_actor(spec: PolicySpec, size: int, num_params: int) -> MLP | NoisyMLP | Columns:
    """From `size` latent features to the distribution's parameters."""
    net, imported = spec.network, spec.imported
    if imported is not None and imported.role == "policy":
        return actor_of(imported, spec.head, num_params)
    widths = (size, *net.hidden_sizes, num_params)
    if spec.noisy:
        return NoisyMLP(widths, net.activation)
    squash: Activation = "tanh" if spec.head == "deterministic" else "none"
    mlp = MLP(widths, net.activation, output_activation=squash, compute_dtype=net.compute_dtype)
    return mlp if imported is None else Columns(0, size, mlp)


def build_critic(spec: PolicySpec, size: int) -> MLP | Columns:
    """From `size` latent features to the state's value."""
    net, imported = spec.network, spec.imported
    if imported is None:
        return MLP((size, *net.hidden_sizes, 1), net.activation, compute_dtype=net.compute_dtype)
    own = size if imported.role == "encoder" else size - imported.size
    body = MLP((own, *net.hidden_sizes, 1), net.activation, compute_dtype=net.compute_dtype)
    return Columns(0, size, body) if imported.role == "encoder" else critic_of(imported, body, size)


def _check_mask(num_mask: int, head: Head) -> None:
    if not num_mask:
        return
    if isinstance(head, Gaussian | SquashedGaussian | Deterministic):
        raise ConfigError("an action mask needs a discrete action space; drop 'action_mask' from the observation")
    expected = head.n if isinstance(head, Categorical | QValues) else sum(head.nvec)
    if num_mask != expected:
        raise ConfigError(f"action_mask has {num_mask} entries; expected {expected}, one for each choice")


def num_parameters(policy: Policy) -> int:
    """Number of trainable scalars."""
    return sum(leaf.numel() for leaf in tree_leaves(dict(policy.named_parameters())))
