"""What an operation's function is given besides its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.core.errors import FormatError
from lockstep.models.graph.values import Value, to_ints


@dataclass(frozen=True)
class Call:
    """One node at run time. `version` is the opset of the node's domain; bodies of control flow are `Program`s.

    >>> Call("Softmax", {"axis": 1}, 21, 1).get("axis", -1)
    1
    """

    op: str
    attributes: Mapping[str, Any]
    version: int
    num_outputs: int
    wanted: tuple[bool, ...] = ()

    def get(self, name: str, default: Any) -> Any:
        """An attribute, or its default."""
        return self.attributes.get(name, default)

    def need(self, name: str) -> Any:
        """An attribute that has no default.

        Raises:
            FormatError: it is missing.
        """
        if name not in self.attributes:
            raise FormatError(f"attribute {name!r} is missing", op=self.op)
        return self.attributes[name]

    def ints(self, value: Value, name: str) -> list[int] | None:
        """Integers that are an input in newer opsets and an attribute in older ones; None where neither is given."""
        if value is not None:
            return to_ints(value)
        return [int(x) for x in self.attributes[name]] if name in self.attributes else None

    def wants(self, index: int) -> bool:
        """Whether anybody uses an output."""
        return index < len(self.wanted) and self.wanted[index]
