"""Recurrent cores whose state restarts where an episode does.

Legend: T time steps, M sequences, K input features, H hidden units.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lockstep import kernels
from lockstep.layers.linear import Linear

State = dict[str, Tensor]


class LSTM(nn.Module):
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate after Gers et al. 2000), gates i, f, g, o.

    >>> core = LSTM(3, 5)
    >>> y, state = core(torch.zeros(4, 2, 3), core.initial_state(2), torch.zeros(4, 2, dtype=torch.bool))
    >>> y.shape, sorted(state)
    (torch.Size([4, 2, 5]), ['c', 'h'])
    """

    def __init__(self, in_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = Linear(in_size, 4 * hidden_size)
        self.recurrent = Linear(hidden_size, 4 * hidden_size)

    def init_orthogonal(self, generator: torch.Generator) -> LSTM:
        self.input.init_orthogonal(generator, 1.0)
        self.recurrent.init_orthogonal(generator, 1.0)
        return self

    def initial_state(self, num: int) -> State:
        """Zeros, {"h": [M, H], "c": [M, H]}."""
        return {"h": torch.zeros(num, self.hidden_size), "c": torch.zeros(num, self.hidden_size)}

    def forward(self, x_TMK: Tensor, state: State, starts_TM: Tensor) -> tuple[Tensor, State]:
        """Run T steps; where `starts` is true the state is zeroed before the step. Returns ([T, M, H], state)."""
        num_steps, num = x_TMK.shape[:2]
        inputs = self.input(x_TMK.reshape(num_steps * num, -1)).view(num_steps, num, -1)
        weight, bias = self.recurrent.weight, self.recurrent.bias
        h_TMH, c = kernels.lstm_sequence(inputs, weight, bias, state["h"], state["c"], starts_TM)
        return h_TMH, {"h": h_TMH[-1], "c": c}


class GRU(nn.Module):
    """Gated recurrent unit (Cho et al. 2014, in the form with the reset gate after the product), gates r, z, n.

    >>> core = GRU(3, 5)
    >>> core(torch.zeros(4, 2, 3), core.initial_state(2), torch.zeros(4, 2, dtype=torch.bool))[0].shape
    torch.Size([4, 2, 5])
    """

    def __init__(self, in_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = Linear(in_size, 3 * hidden_size)
        self.recurrent = Linear(hidden_size, 3 * hidden_size)

    def init_orthogonal(self, generator: torch.Generator) -> GRU:
        self.input.init_orthogonal(generator, 1.0)
        self.recurrent.init_orthogonal(generator, 1.0)
        return self

    def initial_state(self, num: int) -> State:
        """Zeros, {"h": [M, H]}."""
        return {"h": torch.zeros(num, self.hidden_size)}

    def forward(self, x_TMK: Tensor, state: State, starts_TM: Tensor) -> tuple[Tensor, State]:
        """Run T steps; where `starts` is true the state is zeroed before the step. Returns ([T, M, H], state)."""
        num_steps, num = x_TMK.shape[:2]
        inputs = self.input(x_TMK.reshape(num_steps * num, -1)).view(num_steps, num, -1)
        h_TMH = kernels.gru_sequence(inputs, self.recurrent.weight, self.recurrent.bias, state["h"], starts_TM)
        return h_TMH, {"h": h_TMH[-1]}


def build_recurrent(kind: Literal["lstm", "gru"], in_size: int, hidden_size: int) -> LSTM | GRU:
    """The recurrent core named by a configuration."""
    kinds: dict[str, type[LSTM] | type[GRU]] = {"lstm": LSTM, "gru": GRU}
    return kinds[kind](in_size, hidden_size)
