"""Recurrent cores whose state restarts where an episode does.

Legend: T time steps, M sequences, K input features, H hidden units.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

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
        h, c = state["h"], state["c"]
        outputs = []
        for t in range(num_steps):
            keep = (~starts_TM[t]).unsqueeze(1).to(h.dtype)
            h, c = h * keep, c * keep
            i, f, g, o = (inputs[t] + self.recurrent(h)).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs), {"h": h, "c": c}


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
        h = state["h"]
        outputs = []
        for t in range(num_steps):
            h = h * (~starts_TM[t]).unsqueeze(1).to(h.dtype)
            in_r, in_z, in_n = inputs[t].chunk(3, dim=1)
            re_r, re_z, re_n = self.recurrent(h).chunk(3, dim=1)
            z = torch.sigmoid(in_z + re_z)
            n = torch.tanh(in_n + torch.sigmoid(in_r + re_r) * re_n)
            h = (1.0 - z) * n + z * h
            outputs.append(h)
        return torch.stack(outputs), {"h": h}


def build_recurrent(kind: Literal["lstm", "gru"], in_size: int, hidden_size: int) -> LSTM | GRU:
    """The recurrent core named by a configuration."""
    return {"lstm": LSTM, "gru": GRU}[kind](in_size, hidden_size)
