"""Fingerprints of tensors: equal bytes, equal digest, in whatever process and on whatever machine.

Each tensor is hashed by SHA-256, for which processors of the last years have instructions, several
tensors at a time on threads: the hash lets go of the interpreter's lock. The digest is the hash of those, in order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hexadecimal letters over names, types, shapes and bytes, in the order given.

    >>> tensors_digest([("a", torch.zeros(2))]) == tensors_digest([("a", torch.zeros(1, 2))])
    False
    """
    whole = hashlib.sha256()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for found in pool.map(_digest, tensors):
            whole.update(found)
    return whole.hexdigest()[:16]


def effective_digest(base: str, adapter: str) -> str:
    """Of a base model and the adapter on it; `adapter` empty: the base's own.

    >>> effective_digest("0123", "")
    '0123'
    """
    return hashlib.sha256(f"{base}+{adapter}".encode()).hexdigest()[:16] if adapter else base


def _digest(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    tensor = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return found.digest()
