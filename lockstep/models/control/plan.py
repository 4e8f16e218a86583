"""The one-call form of simple policies: same kernels, same bits, no Python between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lockstep.models.control.policy import Policy


def build_plan(policy: Policy, num_rows: int) -> None:
    """The plan of `policy` for `num_rows` rows, or None where the policy needs the general path."""
    return
