"""`lockstep list`: see `store_args`."""

from lockstep.cli.store_args import list_models as main

__all__ = ["main"]
