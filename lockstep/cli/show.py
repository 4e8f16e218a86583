"""`lockstep show`: see `store_args`."""

from lockstep.cli.store_args import show as main

__all__ = ["main"]
