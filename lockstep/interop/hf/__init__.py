"""Hugging Face model folders and hub ids: read lazily, checked, written back."""

from lockstep.interop.hf.folder import HFFolder
from lockstep.interop.hf.hub import download
from lockstep.interop.hf.save import save_folder

__all__ = ["HFFolder", "download", "save_folder"]
