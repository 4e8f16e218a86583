"""A model whose logits are a hash of the tokens that it reads back from the pages of its cache, and of the weights'
version: a wrong page, a stale cell or a wrong position changes the text.

Legend: T packed tokens, S sequences, P pages, R rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lockstep.core.batch import PAGE, ForwardBatch
from lockstep.core.request import Request, Sample
from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.engine import Engine

VOCAB = 23
_M1, _M2, _M3 = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _M2
    x = (x ^ (x >> np.uint64(27))) * _M3
    return x ^ (x >> np.uint64(31))


@dataclass
class FakeCache:
    cells_PC: np.ndarray
    num_bytes: int = 1024


@dataclass(frozen=True)
class FakePrecision:
    kv_dtype: torch.dtype = torch.float32


class FakeModel:
    """`version` stands for the weights."""

    def __init__(self, max_context: int = 256) -> None:
        self.vocab_size = VOCAB
        self.max_context = max_context
        self.precision = FakePrecision()
        self.version = 0
        self.num_rows = 0
        self._weight_T = _mix(np.arange(1, max_context + 1 + PAGE, dtype=np.uint64) * _M1) | np.uint64(1)
        self._columns_V = np.arange(VOCAB, dtype=np.uint64) * _M1

    def new_cache(self, num_pages: int, dtype: torch.dtype) -> FakeCache:
        garbage = np.random.default_rng(num_pages).integers(0, 2**63, (num_pages, PAGE)).astype(np.uint64)
        return FakeCache(garbage)

    def __call__(self, batch: ForwardBatch, cache: FakeCache) -> Tensor:
        starts, positions = batch.seq_starts.numpy(), batch.positions_T.numpy()
        pages_SP = batch.pages_SP.numpy()
        owner_T = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        page_T = pages_SP[owner_T, positions // PAGE]
        cells_T = _mix(batch.tokens_T.numpy().astype(np.uint64) + np.uint64(1000 * self.version + 1))
        cache.cells_PC[page_T, positions % PAGE] = cells_T
        cells = cache.cells_PC[pages_SP].reshape(len(pages_SP), -1)
        sums = np.cumsum(cells * self._weight_T[: cells.shape[1]], axis=1)
        self.num_rows += len(positions)
        hidden = sums[owner_T, positions] ^ np.uint64(self.version * 7919)
        return torch.from_numpy(_mix(hidden).view(np.int64)[:, None])

    def logits(self, hidden_RE: Tensor) -> Tensor:
        bits = _mix(hidden_RE.numpy().view(np.uint64) + self._columns_V[None])
        return torch.from_numpy(((bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - 0.5) * 8.0)


def tiny(**changes: object) -> EngineConfig:
    values = {"max_sequences": 8, "max_step_tokens": 64, "num_pages": 200, "eos_token_ids": (0,)} | changes
    return EngineConfig(**values)  # type: ignore[arg-type]


def run(engine: Engine, limit: int = 5000) -> None:
    """Steps until nothing is left."""
    for _ in range(limit):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError(f"still at work after {limit} steps")


def alone(prompt: tuple[int, ...], params: SamplingParams, *, version: int = 0) -> list[Sample]:
    """The samples of one request that has a cold engine to itself."""
    model = FakeModel()
    model.version = version
    engine = Engine(model, None, tiny(prefix_cache=False, max_step_tokens=300))
    samples = engine.add(Request(id="alone", prompt=prompt, params=params))
    run(engine)
    return samples
