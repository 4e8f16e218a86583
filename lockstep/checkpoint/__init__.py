"""Save, verify and load training state; the only writer of it."""

from lockstep.checkpoint.store import Checkpointer, Manifest, read_checkpoint, read_manifest

__all__ = ["Checkpointer", "Manifest", "read_checkpoint", "read_manifest"]
