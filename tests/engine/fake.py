"""A model whose logits are a hash of the tokens that it reads back from the pages of its cache, and of the weights'
version: a wrong page, a stale cell or a wrong position changes the text.

Legend: T packed tokens, S sequences, P pages, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.cells_PC[targets] = self.cells_PC[sources]


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
        return torch.from_numpy(np.stack([_mix(hidden).view(np.int64), batch.tokens_T.numpy()], axis=1))

    def logits(self, hidden_RE: Tensor) -> Tensor:
        """Noise, with a liking for one successor of each token so that texts repeat themselves now and then."""
        hash_R, token_R = hidden_RE.numpy().T
        bits = _mix(hash_R.view(np.uint64)[:, None] + self._columns_V[None])
        logits = ((bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)) * np.float32(8.0)
        logits[np.arange(len(logits)), (5 * token_R + 1) % VOCAB] += np.float32(5.0)
        return torch.from_numpy(logits)


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


def fast_sample_tokens(logits_RV: Tensor, temperature_R: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy or Gumbel-max keyed by (seed, position), without filters: `kernels.sampling` at the speed a fuzz needs."""
    seeds, positions = rest[-2].numpy().view(np.uint64), rest[-1].numpy().astype(np.uint64)
    key = _mix(seeds + positions * _M1)[:, None] + np.arange(logits_RV.shape[1], dtype=np.uint64)
    uniform = ((_mix(key) >> np.uint64(40)).astype(np.float32) + 0.5) / np.float32(1 << 24)
    noise = -np.log(-np.log(uniform))
    scores = logits_RV.numpy() + temperature_R.numpy()[:, None] * noise
    return torch.from_numpy(scores.argmax(1)), torch.zeros(len(scores))


def fast_token_logprobs(logits_RV: Tensor, tokens_R: Tensor) -> Tensor:
    logits = logits_RV.numpy()
    top = logits.max(1)
    total = np.exp(logits - top[:, None]).sum(1)
    return torch.from_numpy(logits[np.arange(len(logits)), tokens_R.numpy()] - top - np.log(total))


class Oracle:
    """What a request must yield, computed without an engine: no pages, no batches, no cache."""

    def __init__(self) -> None:
        self._model = FakeModel()
        self._known: dict[tuple, list[int]] = {}

    def text(self, prompt: tuple[int, ...], params: SamplingParams, seed: int, version: int, num: int) -> list[int]:
        """The first `num` tokens, fewer if the text ends before."""
        known = self._known.get((prompt, params, seed, version), [])
        if len(known) < num and (not known or known[-1] != 0):
            known = self._known[prompt, params, seed, version] = self._generate(prompt, params, seed, version, num)
        return known[:num]

    def _generate(
        self, prompt: tuple[int, ...], params: SamplingParams, seed: int, version: int, num: int
    ) -> list[int]:
        model = self._model
        model.version = version
        tokens = np.array(prompt, dtype=np.uint64)
        shift = np.uint64(1000 * version + 1)
        total_11 = (_mix(tokens + shift) * model._weight_T[: len(tokens)]).sum(dtype=np.uint64).reshape(1, 1)
        temperature, seeds = torch.tensor([params.temperature]), torch.tensor([seed])
        written, before = list[int](), prompt[-1]
        while len(written) < num:
            position = len(prompt) + len(written)
            hidden = np.array([[_mix(total_11 ^ np.uint64(version * 7919)).view(np.int64).item(), before]])
            draw, _ = fast_sample_tokens(
                model.logits(torch.from_numpy(hidden)), temperature, seeds, torch.tensor([position])
            )
            written.append(int(draw))
            if written[-1] == 0:
                break
            before = written[-1]
            last = np.array([before], dtype=np.uint64)
            total_11 = total_11 + _mix(last + shift) * model._weight_T[position]
        return written
