"""Optional dependencies: imported where they are used, named when they are missing."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
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
        raise _missing(module, extra, str(error)) from error


def check_installed(*modules: str, extra: str) -> None:
    """What `require` says of a missing module, without the import, for a caller that has something to do before it.

    Args:
        modules: top-level names.

    Raises:
        MissingExtraError: with the install command.
    """
    for module in modules:
        if find_spec(module) is None:
            raise _missing(module, extra, f"No module named {module!r}")


def _missing(module: str, extra: str, why: str) -> MissingExtraError:
    return MissingExtraError(
        f"{module!r} is needed here and could not be imported ({why}); "
        f"install it with: pip install 'lockstep-rl[{extra}]'"
    )
