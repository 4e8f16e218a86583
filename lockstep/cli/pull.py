"""`lockstep pull`: see `store_args`."""

from lockstep.cli.store_args import pull as main

__all__ = ["main"]
