"""Files of PyTorch: state dicts, safetensors, torch.export programs, Stable-Baselines3 and CleanRL checkpoints."""

from lockstep.interop.pytorch.state import read_state

__all__ = ["read_state"]
