"""The whole act of a dense policy in one call: normalise, actor, head, critic.

For latency: one observation costs a few microseconds, of which most is Python. The result has the bits of the composed
ops (`plan.naive`), so what a deployed policy does is what the learner computed.

Legend: M rows, D observation features, A actions.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lockstep.core.errors import ConfigError, InputError, unknown_name
from lockstep.kernels import native
from lockstep.kernels.plan import cpu, naive
from lockstep.kernels.plan.spec import HEADS, Head, Net, Normaliser

__all__ = ["ActPlan", "Head", "Net", "Normaliser"]

_SEED_MASK = (1 << 64) - 1
_data_ptr = Tensor.data_ptr


class ActPlan:
    """An act for a fixed number of rows, into arrays that are allocated once and overwritten by every `run`.

    Args:
        actor: the policy network; its last width is what the head reads.
        head: see `Head`.
        num_rows: M.
        critic: a network of one output, for `value`.
        normaliser: applied to observations before both networks.

    Attributes (NumPy arrays; `torch.from_numpy` gives views):
        obs [M, D] float32, streams [M] int64, positions [M] int64: inputs; write into them, or pass others to `run`.
        features [M, D]: what the networks read. head_input [M, ...]: the actor's output.
        actions [M, A] float32, choices [M, blocks] int64: whichever the head gives; the other is empty.
        logprob [M] (NaN for tanh and argmax), value [M] (NaN without a critic).

    Parameters may change in place at any time; tensors that moved are found at the next `run`.
    """

    def __init__(
        self,
        actor: Net,
        head: Head,
        num_rows: int,
        critic: Net | None = None,
        normaliser: Normaliser | None = None,
    ) -> None:
        self._spec = (actor, head, critic, normaliser)
        num_obs, width = actor.weights[0].shape[-2], actor.weights[-1].shape[-1]
        self._sizes = tuple(head.nvec) if head.nvec else (width,)
        _check(actor, head, critic, normaliser, self._sizes)
        discrete = head.kind in ("categorical", "argmax")
        num_actions = 0 if discrete else (width // 2 if head.kind == "squashed" else width)
        num_choices = len(self._sizes) if discrete else 0
        self.obs: NDArray[np.float32] = np.zeros((num_rows, num_obs), np.float32)
        self.streams: NDArray[np.int64] = np.arange(num_rows, dtype=np.int64)
        self.positions: NDArray[np.int64] = np.zeros(num_rows, np.int64)
        self.features: NDArray[np.float32] = np.zeros((num_rows, num_obs), np.float32)
        self.head_input: NDArray[np.float32] = np.zeros((num_rows, width), np.float32)
        self.actions: NDArray[np.float32] = np.zeros((num_rows, num_actions), np.float32)
        self.choices: NDArray[np.int64] = np.zeros((num_rows, num_choices), np.int64)
        self.logprob: NDArray[np.float32] = np.full(num_rows, np.nan, np.float32)
        self.value: NDArray[np.float32] = np.full(num_rows, np.nan, np.float32)
        self._inputs = (self.obs.ctypes.data, self.streams.ctypes.data, self.positions.ctypes.data)
        self._tensors = cpu.tensors_of(*self._spec)
        self._addresses: list[int] = []
        self._compiled: cpu.Compiled | None = None

    def set_epsilon(self, epsilon: float) -> None:
        """Chance of a uniform choice of the argmax head from now on."""
        actor, head, critic, normaliser = self._spec
        head = Head(head.kind, head.nvec, head.log_std, head.log_std_min, head.log_std_max, epsilon)
        self._spec = (actor, head, critic, normaliser)
        if self._compiled is not None:
            self._compiled.struct.epsilon = epsilon

    def run(
        self,
        obs: NDArray[np.float32] | int | None = None,
        seed: int = 0,
        streams: NDArray[np.int64] | None = None,
        positions: NDArray[np.int64] | int | None = None,
        deterministic: bool = False,
    ) -> ActPlan:
        """Act once; the results lie in this object's arrays.

        Args:
            obs: an array that fits [M, D] (copied), the address of M * D float32 (read in place), or None: `self.obs`.
            seed, streams, positions: key of the noise, as in `lockstep.kernels.uniform`; None: the arrays as they are;
                an integer position is used for every row.
            deterministic: mode, mean or maximum instead of a draw.
        """
        address, stream_address, position_address = self._inputs
        if isinstance(obs, int):
            address = obs
        elif obs is not None:
            self.obs[:] = obs
        if streams is not None:
            self.streams[:] = streams
        if positions is not None:
            self.positions[:] = positions
        if not native.state.fast:
            native.usable()
            self._run_naive(address, seed, deterministic)
            return self
        if self._addresses != [*map(_data_ptr, self._tensors)]:
            self._bind()
        compiled = self._compiled
        assert compiled is not None
        compiled.function(compiled.address, address, seed & _SEED_MASK, stream_address, position_address, deterministic)
        return self

    def _bind(self) -> None:
        arrays = {name: self.__dict__[name] for name in ("features", "head_input", "actions", "choices")}
        arrays |= {"logprob": self.logprob, "value": self.value}
        self._compiled = cpu.Compiled(*self._spec, arrays, self._sizes)
        self._addresses = [t.data_ptr() for t in self._tensors]

    def _run_naive(self, address: int, seed: int, deterministic: bool) -> None:
        obs = self.obs
        if address != self._inputs[0]:
            buffer = (ctypes.c_float * obs.size).from_address(address)
            obs = np.ctypeslib.as_array(buffer).reshape(obs.shape)
        actor, head, critic, normaliser = self._spec
        out = naive.act(
            torch.from_numpy(obs.copy()),
            actor,
            head,
            critic,
            normaliser,
            seed,
            torch.from_numpy(self.streams),
            torch.from_numpy(self.positions),
            deterministic,
        )
        for name, tensor in out.items():
            self.__dict__[name][:] = tensor.numpy()


def _check(actor: Net, head: Head, critic: Net | None, normaliser: Normaliser | None, sizes: tuple[int, ...]) -> None:
    if head.kind not in HEADS:
        raise ConfigError(unknown_name("head", head.kind, HEADS))
    num_obs, width = actor.weights[0].shape[-2], actor.weights[-1].shape[-1]
    for net in (actor, critic):
        if net is not None and net.weights[0].dim() != 2:
            raise InputError("an act takes plain chains [K, N], not ensembles", field="weights")
    if sum(sizes) != width:
        raise InputError(f"the actor has {width} outputs; nvec {sizes} needs {sum(sizes)}", field="nvec")
    if head.kind == "gaussian" and (head.log_std is None or tuple(head.log_std.shape) != (width,)):
        got = None if head.log_std is None else tuple(head.log_std.shape)
        raise InputError(f"a gaussian head needs log_std [{width}]; got {got}", field="log_std")
    if head.kind == "squashed" and width % 2:
        raise InputError(f"a squashed head needs means and log stds: an even width; got {width}", field="actor")
    if critic is not None and (critic.weights[0].shape[-2], critic.weights[-1].shape[-1]) != (num_obs, 1):
        raise InputError(f"the critic must map {num_obs} features to 1 value", field="critic")
    if normaliser is not None:
        for tensor in (normaliser.mean, normaliser.inv_std):
            if tuple(tensor.shape) != (num_obs,) or tensor.dtype is not torch.float32:
                raise InputError(
                    f"normaliser tensors are float32 [{num_obs}]; got {tensor.dtype} {tuple(tensor.shape)}"
                )
