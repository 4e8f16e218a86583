"""Mixture of experts: every token through the few experts its router chose.

Legend: T packed tokens, E model width, F an expert's width, X experts, K experts a token, A = T K assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lockstep.core.adapters import AdapterRun
from lockstep.core.errors import ConfigError, InputError
from lockstep.kernels.activation import gated
from lockstep.kernels.low_rank import LowRankRun, add_low_rank
from lockstep.kernels.packed_linear import PackedWeight, grouped_linear, pack, trained_grouped_linear, unpack
from lockstep.layers.gated import GatedKind, GatedMLP
from lockstep.layers.projection import Matrix, Precision, Projection, adapter_runs, pack_parts, plain

ExpertRun = tuple[int, AdapterRun]
"""An expert, and neighbours among the assignments to it that go through one adapter."""


class ExpertProjection(nn.Module):
    """One matrix [N, K] for each of X experts; see `Projection` for what the weight and its packed copy are."""

    def __init__(self, num_experts: int, in_size: int, out_sizes: Sequence[int], precision: Precision) -> None:
        super().__init__()
        self.num_experts, self.in_size, self.out_sizes = num_experts, in_size, tuple(out_sizes)
        self.path = ""
        """See `Projection.path`; an adapter knows expert x as this name, a dot and x."""
        self.precision = precision
        self.weight: nn.Parameter | None
        if precision.master is None:
            self.register_parameter("weight", None)
        else:
            shape = (num_experts, sum(self.out_sizes), in_size)
            self.weight = nn.Parameter(torch.empty(shape, dtype=precision.master))
        self._packs: list[PackedWeight] = []
        self._packed_key: tuple[int, int] | None = None

    def forward(self, x_AK: Tensor, starts: Tensor, adapters: Sequence[ExpertRun] = ()) -> Tensor:
        """Rows starts[x] .. starts[x + 1] - 1 of x [A, K] through expert x -> [A, N]; starts is int64 [X + 1] on the CPU."""
        packs = self.packed()
        if torch.is_grad_enabled():
            y_AN = trained_grouped_linear(x_AK, self.weight, packs, starts)
        else:
            y_AN = grouped_linear(x_AK, packs, starts)
        runs: list[LowRankRun] = []
        for expert, run in adapters:
            runs += adapter_runs(f"{self.path}.{expert}" if self.path else "", [run])
        return add_low_rank(y_AN, x_AK, runs)

    def packed(self) -> list[PackedWeight]:
        """The packed matrices, made anew if the float weight has changed since."""
        weight = self.weight
        if weight is not None:
            key = (weight._version, weight.data_ptr())
            if key != self._packed_key:
                precision = self.precision
                again: list[PackedWeight | None] = [*self._packs] or [None] * self.num_experts
                self._packs = [
                    pack(one, precision.compute, precision.group, into=old)
                    for one, old in zip(weight.detach(), again, strict=True)
                ]
                self._packed_key = key
        if not self._packs:
            raise InputError("the experts hold no weights yet; load or initialise the model first", field="weight")
        return self._packs

    def repack(self) -> None:
        """The float weight was written in a way that torch does not see: pack it at the next product."""
        self._packed_key = None

    @torch.no_grad()
    def fill(self, experts: Sequence[Sequence[Matrix]]) -> None:
        """Take the matrices: for each expert those of `out_sizes`."""
        if self.weight is None:
            self._packs = []
            for parts in experts:
                packs = pack_parts(parts, self.precision)
                if len(packs) != 1:
                    packs = pack_parts([plain(part) for part in parts], self.precision)
                self._packs += packs
            return
        for expert, parts in enumerate(experts):
            self.weight[expert].copy_(torch.cat([plain(part) for part in parts]))

    @torch.no_grad()
    def fill_random(self, generator: torch.Generator, std: float) -> None:
        """Normal weights of standard deviation `std`."""
        if self.weight is not None:
            self.weight.normal_(0.0, std, generator=generator)
            return
        shape = (sum(self.out_sizes), self.in_size)
        self.fill([[torch.empty(shape).normal_(0.0, std, generator=generator)] for _ in range(self.num_experts)])

    @torch.no_grad()
    def parts(self) -> list[list[Tensor]]:
        """For each expert its matrices."""
        wholes = list(self.weight.detach()) if self.weight is not None else [unpack(one) for one in self.packed()]
        return [list(whole.split(list(self.out_sizes))) for whole in wholes]


class SparseMLP(nn.Module):
    """The router's softmax picks K of X gated experts; their outputs are weighted and added in the order of the experts.

    The router is computed in float32 whatever the model's dtype: it is small, and a rounded score changes which expert is
    taken.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        num_chosen: int,
        kind: GatedKind,
        precision: Precision,
        *,
        normalise: bool,
    ) -> None:
        super().__init__()
        if not 1 <= num_chosen <= num_experts:
            raise ConfigError(f"a token takes {num_chosen} of {num_experts} experts; expected 1 to {num_experts}")
        self.num_experts, self.num_chosen, self.normalise, self.kind = num_experts, num_chosen, normalise, kind
        self.router = Projection(width, (num_experts,), Precision("fp32", precision.group, precision.master))
        self.gate_up = ExpertProjection(num_experts, width, (hidden, hidden), precision)
        self.down = ExpertProjection(num_experts, hidden, (width,), precision)

    def forward(self, x_TE: Tensor, adapters: Sequence[AdapterRun] = ()) -> Tensor:
        """x [T, E] -> [T, E]."""
        return mix(x_TE, *self.route(x_TE), self.gate_up, self.down, self.kind, adapters)

    def route(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(share [T, K], expert [T, K] int64, rising in each row)."""
        probability_TX = torch.softmax(self.router(x_TE), dim=-1)
        share_TK, expert_TK = torch.topk(probability_TX, self.num_chosen, dim=-1)
        if self.normalise:
            share_TK = share_TK / _row_sum(share_TK)[:, None]
        expert_TK, order_TK = expert_TK.sort(dim=-1)
        return share_TK.gather(1, order_TK), expert_TK


@dataclass(frozen=True, kw_only=True)
class GroupRule:
    """How a token's experts are chosen in DeepSeek-V3 (2024, section 2.1.2)."""

    num_experts: int
    num_chosen: int
    num_groups: int
    """Neighbouring experts are a group; a group is as good as its two best."""
    num_chosen_groups: int
    """Experts of other groups are not taken."""
    normalise: bool
    """The shares of the chosen experts are divided by their sum."""
    factor: float
    """On the shares."""

    def __post_init__(self) -> None:
        size = self.num_experts // max(self.num_groups, 1)
        if self.num_groups < 1 or self.num_experts % self.num_groups or size < 2:
            raise ConfigError(
                f"{self.num_experts} experts in {self.num_groups} groups; expected equal groups of 2 or more"
            )
        if (
            not 1 <= self.num_chosen_groups <= self.num_groups
            or not 1 <= self.num_chosen <= self.num_chosen_groups * size
        ):
            raise ConfigError(
                f"a token takes {self.num_chosen} experts of {self.num_chosen_groups} groups; there are {self.num_groups} "
                f"groups of {size}"
            )


class ChoiceBias(nn.Module):
    """What is added to each expert's score when experts are chosen, and to nothing else. No gradient reaches it: the
    training that balances experts moves it by rule."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros(num_experts))


class GroupedSparseMLP(nn.Module):
    """Sigmoid scores, group-limited choice, and shared experts that every token takes: DeepSeek-V3's feed-forward.

    The router is computed in float32, as in `SparseMLP`.
    """

    def __init__(
        self, width: int, hidden: int, shared_hidden: int, rule: GroupRule, kind: GatedKind, precision: Precision
    ) -> None:
        super().__init__()
        self.rule, self.kind = rule, kind
        self.router = Projection(width, (rule.num_experts,), Precision("fp32", precision.group, precision.master))
        self.choice = ChoiceBias(rule.num_experts)
        self.gate_up = ExpertProjection(rule.num_experts, width, (hidden, hidden), precision)
        self.down = ExpertProjection(rule.num_experts, hidden, (width,), precision)
        self.shared = GatedMLP(width, shared_hidden, kind, precision)

    def forward(self, x_TE: Tensor, adapters: Sequence[AdapterRun] = ()) -> Tensor:
        """x [T, E] -> [T, E]."""
        mixed_TE = mix(x_TE, *self.route(x_TE), self.gate_up, self.down, self.kind, adapters)
        return mixed_TE + self.shared(x_TE, adapters)

    def route(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(share [T, K], expert [T, K] int64, rising in each row)."""
        rule = self.rule
        score_TX = torch.sigmoid(self.router(x_TE))
        biased_TX = score_TX.detach() + self.choice.weight
        group_TGX = biased_TX.view(len(x_TE), rule.num_groups, -1)
        best_TG = _row_sum(group_TGX.topk(2, dim=-1)[0].flatten(0, 1)).view(len(x_TE), -1)
        taken_TG = torch.zeros_like(best_TG, dtype=torch.bool)
        taken_TG.scatter_(1, best_TG.topk(rule.num_chosen_groups, dim=-1)[1], True)
        limited_TX = group_TGX.masked_fill(~taken_TG[:, :, None], -torch.inf).flatten(1)
        expert_TK = limited_TX.topk(rule.num_chosen, dim=-1)[1].sort(dim=-1)[0]
        share_TK = score_TX.gather(1, expert_TK)
        if rule.normalise:
            share_TK = share_TK / (_row_sum(share_TK)[:, None] + 1e-20)
        return share_TK * rule.factor, expert_TK


def mix(
    x_TE: Tensor,
    share_TK: Tensor,
    expert_TK: Tensor,
    gate_up: ExpertProjection,
    down: ExpertProjection,
    kind: GatedKind,
    adapters: Sequence[AdapterRun] = (),
) -> Tensor:
    """Every token through its experts; what they say is weighted and added in the order of the experts."""
    num_experts, num_chosen = gate_up.num_experts, expert_TK.shape[1]
    # Assignments by expert, tokens in order within one: what each expert computes is one block of rows.
    order_A = torch.argsort(expert_TK.flatten(), stable=True)
    counts_X = torch.bincount(expert_TK.flatten(), minlength=num_experts)
    starts = torch.zeros(num_experts + 1, dtype=torch.int64)
    starts[1:] = counts_X.cumsum(0)
    token_A = order_A // num_chosen
    runs = expert_runs(token_A, starts.tolist(), adapters) if adapters else []
    hidden = gated(gate_up(x_TE[token_A], starts, runs), kind)
    y_AE = down(hidden, starts, runs)
    place_A = torch.empty_like(order_A)
    place_A[order_A] = torch.arange(len(order_A), device=x_TE.device)
    y_TKE = y_AE[place_A].view(*expert_TK.shape, -1)
    out_TE = y_TKE[:, 0] * share_TK[:, 0, None]
    for choice in range(1, num_chosen):
        out_TE = out_TE + y_TKE[:, choice] * share_TK[:, choice, None]
    return out_TE


def _row_sum(x_TK: Tensor) -> Tensor:
    """One addition after another: a library's sum may choose its order by the number of rows."""
    total_T = x_TK[:, 0]
    for column in range(1, x_TK.shape[1]):
        total_T = total_T + x_TK[:, column]
    return total_T


def expert_runs(token_A: Tensor, starts: Sequence[int], adapters: Sequence[AdapterRun]) -> list[ExpertRun]:
    """The batch's runs of rows as runs of assignments: tokens rise within an expert, so a run of rows stays one there.

    Args:
        token_A: row of each assignment, int64, rising within each expert.
        starts: of the experts in the assignments, X + 1.
    """
    found: list[ExpertRun] = []
    for expert, (first, last) in enumerate(pairwise(starts)):
        tokens = token_A[first:last]
        for run in adapters:
            low, high = torch.searchsorted(tokens, torch.tensor([run.first_row, run.last_row])).tolist()
            if low < high:
                found.append((expert, AdapterRun(first + low, first + high, run.adapter)))
    return found
