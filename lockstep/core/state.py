"""What a checkpoint holds of a run."""

from __future__ import annotations

from typing import Any, Protocol


class Stateful(Protocol):
    """A part of training state that a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, data: dict[str, Any]) -> Any: ...
