"""Optional dependencies: imported where they are used, named when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from lockstep.core.errors import MissingExtraError


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module, or say which extra installs it.

    Args:
        module: dotted module name.
        extra: the extra of `lockstep-rl` that brings it.

    Raises:
        MissingExtraError: with the install command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module!r} is needed here and could not be imported ({error}); "
            f"install it with: pip install 'lockstep-rl[{extra}]'"
        ) from error
