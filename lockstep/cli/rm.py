"""`lockstep rm`: see `store_args`."""

from lockstep.cli.store_args import remove as main

__all__ = ["main"]
