"""From raw observations to network input, as a module of the saved policy.

What a library usually keeps beside the model (normaliser, frame stack, one-hot, image layout) is part of it here, so the
deployed policy sees what the trained one saw.

Legend: N rows (environments, sessions), D vector features, C channels, H and W image size, F stacked frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lockstep.core.errors import ConfigError
from lockstep.core.spaces import BoxSpace, DictSpace, DiscreteSpace, MultiDiscreteSpace, Space
from lockstep.layers.norm import RunningNorm

ACTION_MASK = "action_mask"
VECTOR = "vector"


@dataclass(frozen=True)
class Features:
    """What the preprocessing yields: `num_vector` features and images by name, each (C, H, W) with its scale.

    >>> Features(4, {}, {}, 0).num_vector
    4
    """

    num_vector: int
    images: dict[str, tuple[int, int, int]]
    image_scales: dict[str, float]
    num_mask: int

    @property
    def plain(self) -> bool:
        """True if the network input is one tensor [N, D] rather than a dictionary."""
        return not self.images and not self.num_mask


class Preprocess(nn.Module):
    """Observation tree -> network input.

    Vectors, one-hot encoded integers and small arrays are concatenated, in the space's order, into one float32 row (and
    normalised, if asked: one-hot columns are left as they are); images stay uint8 or float [N, C*F, H, W] and are scaled
    to [0, 1] by the network; `action_mask` passes through as bool. With `frame_stack` F > 1 the last F frames are joined
    (oldest first); the first observation of an episode fills the stack.
    """

    def __init__(self, space: Space, *, normalise: bool, frame_stack: int = 1, clip: float = 10.0) -> None:
        super().__init__()
        if frame_stack < 1:
            raise ConfigError(f"frame_stack={frame_stack} must be at least 1")
        self.space = space
        self.frame_stack = frame_stack
        self.parts = _parts(space)
        vector = [part for part in self.parts if part.kind in ("vector", "one_hot")]
        self.frame_features = sum(part.size for part in vector)
        self.features = Features(
            num_vector=self.frame_features * frame_stack,
            images={
                p.name: (p.shape[0] * frame_stack, p.shape[1], p.shape[2]) for p in self.parts if p.kind == "image"
            },
            image_scales={p.name: p.scale for p in self.parts if p.kind == "image"},
            num_mask=sum(p.size for p in self.parts if p.kind == "mask"),
        )
        self.normaliser: RunningNorm | None = None
        if normalise and vector:
            self.normaliser = RunningNorm(self.frame_features, clip=clip)
            columns = torch.cat([torch.full((p.size,), p.kind == "vector") for p in vector])
            self.register_buffer("columns", columns, persistent=False)

    @property
    def is_simple(self) -> bool:
        """True if raw float rows need at most the normaliser: the case that the one-call plan covers."""
        return (
            self.features.plain
            and self.frame_stack == 1
            and len(self.parts) == 1
            and self.parts[0].kind == "vector"
            and not self.parts[0].is_integer
        )

    def initial_state(self, num: int) -> dict[str, Tensor]:
        """Frame stacks of `num` rows, zeros; empty without stacking."""
        if self.frame_stack == 1:
            return {}
        state = {}
        if self.frame_features:
            state["stack.vector"] = torch.zeros(num, self.frame_stack, self.frame_features)
        for part in self.parts:
            if part.kind == "image":
                dtype = torch.uint8 if part.is_integer else torch.float32
                state[f"stack.{part.name}"] = torch.zeros(num, self.frame_stack, *part.shape, dtype=dtype)
        return state

    def forward(self, obs: Any, state: dict[str, Tensor], starts_N: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Returns (network input, new state). `obs` is a tensor or a dictionary of tensors with N rows."""
        vectors, images, mask = self._split(obs)
        new_state = {}
        out: dict[str, Tensor] = {}
        if vectors:
            row_ND = vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1)
            if self.normaliser is not None:
                row_ND = self.normaliser(row_ND)
            if self.frame_stack > 1:
                stack = _push(state["stack.vector"], row_ND, starts_N)
                new_state["stack.vector"] = stack
                row_ND = stack.flatten(1)
            out[VECTOR] = row_ND
        for name, image in images.items():
            if self.frame_stack > 1:
                stack = _push(state[f"stack.{name}"], image, starts_N)
                new_state[f"stack.{name}"] = stack
                image = stack.flatten(1, 2)
            out[name] = image
        if mask is not None:
            out[ACTION_MASK] = mask
        return (out[VECTOR] if self.features.plain else out), new_state

    @torch.no_grad()
    def update(self, obs: Any) -> None:
        """Gather the normaliser's statistics from raw observations (leading dims are rows)."""
        if self.normaliser is None:
            return
        vectors, _, _ = self._split(obs)
        self.normaliser.update(torch.cat(vectors, dim=1), self.columns)  # type: ignore[arg-type]

    def _split(self, obs: Any) -> tuple[list[Tensor], dict[str, Tensor], Tensor | None]:
        vectors: list[Tensor] = []
        images: dict[str, Tensor] = {}
        mask: Tensor | None = None
        for part in self.parts:
            x = obs[part.name] if part.name or isinstance(obs, dict) else obs
            if part.kind == "vector":
                vectors.append(x.reshape(x.shape[0], part.size).to(torch.float32))
            elif part.kind == "one_hot":
                vectors.append(part.one_hot(x))
            elif part.kind == "image":
                image = x.permute(0, 3, 1, 2) if part.channels_last else x
                image = image if image.ndim == 4 else image.unsqueeze(1)
                if part.is_integer and image.dtype != torch.uint8:
                    image = image.to(torch.uint8)
                images[part.name] = image.contiguous()
            else:
                mask = x.reshape(x.shape[0], part.size).to(torch.bool)
        return vectors, images, mask


@dataclass(frozen=True)
class Part:
    """One leaf of the observation and how it enters the network. Column i of integers counts from `lowest[i]`.

    >>> Part("", "one_hot", (1,), 3, nvec=(3,), lowest=(1,)).one_hot(torch.tensor([2])).tolist()
    [[0.0, 1.0, 0.0]]
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    size: int
    channels_last: bool = False
    is_integer: bool = False
    scale: float = 1.0
    nvec: tuple[int, ...] = ()
    lowest: tuple[int, ...] = ()

    def one_hot(self, x: Tensor) -> Tensor:
        """[N] or [N, len(nvec)] integers -> [N, sum(nvec)] float32."""
        columns = x.reshape(x.shape[0], len(self.nvec)).to(torch.int64)
        spans = [torch.arange(first, first + n) for first, n in zip(self.lowest, self.nvec, strict=True)]
        blocks = [(columns[:, i : i + 1] == span).to(torch.float32) for i, span in enumerate(spans)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _push(stack: Tensor, frame: Tensor, starts_N: Tensor) -> Tensor:
    """Shift `frame` into `stack` [N, F, ...]; rows that start an episode hold the frame F times."""
    shifted = torch.cat([stack[:, 1:], frame.unsqueeze(1)], dim=1)
    filled = frame.unsqueeze(1).expand_as(stack)
    where = starts_N.view(-1, *([1] * (stack.ndim - 1)))
    return torch.where(where, filled, shifted)


def _parts(space: Space) -> list[Part]:
    if isinstance(space, DictSpace):
        parts = [_leaf(name, sub) for name, sub in space.spaces.items()]
        if not any(part.kind != "mask" for part in parts):
            raise ConfigError("a dictionary observation needs at least one entry besides action_mask")
        return parts
    return [_leaf("", space)]


def _leaf(name: str, space: Space) -> Part:
    match space:
        case BoxSpace() if name == ACTION_MASK:
            return Part(name, "mask", space.shape, int(np.prod(space.shape)))
        case BoxSpace() if _is_image(space):
            return _image_part(name, space)
        case BoxSpace():
            integer = not space.dtype.startswith("float")
            return Part(name, "vector", space.shape, int(np.prod(space.shape)), is_integer=integer)
        case DiscreteSpace():
            return Part(name, "one_hot", (1,), space.n, nvec=(space.n,), lowest=space.lowest)
        case MultiDiscreteSpace():
            nvec = space.nvec
            kind = "mask" if name == ACTION_MASK else "one_hot"
            return Part(name, kind, (len(nvec),), sum(nvec), nvec=nvec, lowest=space.lowest)
    raise ConfigError(f"observation part {name!r}: nested dictionaries are flattened by the environment; got {space}")


def _is_image(space: BoxSpace) -> bool:
    return len(space.shape) in (2, 3) and min(space.shape[-2:]) >= 3 and int(np.prod(space.shape)) >= 100


def _image_part(name: str, space: BoxSpace) -> Part:
    """Layout by size: the channel axis is the odd one out (last for HWC frames, first for stacks)."""
    shape = space.shape
    integer = not space.dtype.startswith("float")
    high = float(space.bounds()[1].max())
    scale = 1.0 / high if np.isfinite(high) and high > 1.0 else 1.0
    channels_last = len(shape) == 3 and (shape[0] == shape[1] or shape[2] <= 4) and shape[2] != shape[1]
    if len(shape) == 2:
        shape = (1, *shape)
    elif channels_last:
        shape = (shape[2], shape[0], shape[1])
    return Part(name, "image", shape, int(np.prod(shape)), channels_last, integer, scale)
