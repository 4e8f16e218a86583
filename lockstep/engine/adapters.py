"""The low-rank adapters that an engine serves, by name."""

from __future__ import annotations

from collections.abc import Iterator

from lockstep.core.adapters import RowAdapter
from lockstep.core.digest import effective_digest
from lockstep.core.errors import InputError, unknown_name
from lockstep.core.request import WeightsVersion


class LoadedAdapter:
    """One adapter as it was loaded; sequences that began with it keep it when its name is given to another."""

    __slots__ = ("adapter", "key", "name", "weights")

    def __init__(self, name: str, adapter: RowAdapter, key: str, weights: WeightsVersion) -> None:
        self.name = name
        self.adapter = adapter
        self.key = key
        """What tells its prefixes from those of every other adapter, of the same name too."""
        self.weights = weights
        """Version and digest of the adapter alone."""


class AdapterTable:
    """Adapters by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, LoadedAdapter] = {}
        self._num_loaded = 0

    def __iter__(self) -> Iterator[LoadedAdapter]:
        return iter(self._by_name.values())

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> LoadedAdapter:
        """The adapter of this name.

        Raises:
            InputError: none is loaded under it.
        """
        found = self._by_name.get(name)
        if found is None:
            if not self._by_name:
                raise InputError(f"adapter {name!r} is not loaded, nor is any other; leave it empty", field="adapter")
            raise InputError(unknown_name("adapter", name, self._by_name), field="adapter")
        return found

    def load(self, name: str, adapter: RowAdapter, weights: WeightsVersion) -> LoadedAdapter:
        """Requests may name this adapter from now on. If the name was taken, what began with the old one ends with it.

        Args:
            adapter: of the engine's model; kept, not copied: whoever changes its numbers says
                `Engine.publish(..., adapter=name)`.
            weights: version, and digest of the adapter alone (`models.digest.adapter_digest`).

        Raises:
            InputError: a name that cannot be one.
        """
        if not name or name != name.strip():
            raise InputError(f"an adapter's name is {name!r}; expected one without spaces around it", field="name")
        self._num_loaded += 1
        self._by_name[name] = LoadedAdapter(name, adapter, f"{name}#{self._num_loaded}", weights)
        return self._by_name[name]

    def unload(self, name: str) -> None:
        """New requests may not name it any more; what began with it ends with it.

        Raises:
            InputError: it is not loaded.
        """
        self.get(name)
        del self._by_name[name]


def served_weights(base: WeightsVersion, adapter: LoadedAdapter | None) -> WeightsVersion:
    """What a token is told to come from: the adapter's version where there is one, and a digest over both."""
    if adapter is None:
        return base
    return WeightsVersion(adapter.weights.version, effective_digest(base.digest, adapter.weights.digest))
