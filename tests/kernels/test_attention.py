"""Attention: fast against naive and against a plain softmax, gradients, and the exactness contract over random cases."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lockstep import kernels
from lockstep.core.batch import PAGE, ForwardBatch
from lockstep.core.errors import ConfigError, InputError
from lockstep.kernels import KVCache, LayerCache
from lockstep.kernels.attention import KV_DTYPES
from lockstep.kernels.attention.codes import decode, encode
from lockstep.kernels.attention.naive import rounded

NUM_CASES = 20
"""Random cases per level and cache dtype, each compared through five schedules."""


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    heads: int
    groups: int
    dim: int
    window: int
    softcap: float
    has_sinks: bool
    dtype: torch.dtype

    @staticmethod
    def draw(rng: random.Random, dtype: torch.dtype) -> Case:
        groups = rng.choice([1, 1, 2, 3])
        return Case(
            lengths=tuple(rng.choice([1, 5, 15, 16, 17, 40, 63, 64, 65, 90, 130]) for _ in range(rng.randint(1, 3))),
            heads=groups * rng.choice([1, 2, 3, 7, 9]),
            groups=groups,
            dim=rng.choice([8, 20, 32, 64, 80]),
            window=rng.choice([0, 0, 1, 7, 16, 33, 70]),
            softcap=rng.choice([0.0, 0.0, 3.0]),
            has_sinks=rng.random() < 0.3,
            dtype=dtype,
        )

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        total = sum(self.lengths)
        q, k, v = (torch.randn(total, heads, self.dim) for heads in (self.heads, self.groups, self.groups))
        # A spread of magnitudes moves the running maximum about.
        return (
            q * 2.0,
            k * torch.exp(torch.randn(total, 1, 1) * 0.5),
            v,
            torch.randn(self.heads) if self.has_sinks else None,
        )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, batch: ForwardBatch, cache: LayerCache | None
    ) -> Tensor:
        return kernels.attention(
            q,
            k,
            v,
            batch,
            cache,
            scale=self.dim**-0.5,
            window=self.window,
            softcap=self.softcap,
            sinks_H=sinks,
            kv_dtype=self.dtype,
        )


def poisoned(num_pages: int, case: Case) -> LayerCache:
    cache = LayerCache.allocate(num_pages, case.groups, case.dim, case.dtype)
    for tensor in cache.tensors:
        tensor.fill_(torch.nan if tensor.is_floating_point() else 99)
    return cache


def whole(case: Case) -> ForwardBatch:
    return ForwardBatch.packed([torch.zeros(n, dtype=torch.int64) for n in case.lengths])


def scheduled(
    case: Case, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], rng: random.Random, kind: str
) -> Tensor:
    """The outputs of all tokens when they come a few at a time, several sequences in a batch, through scattered pages."""
    q, k, v, sinks = inputs
    base = [sum(case.lengths[:s]) for s in range(len(case.lengths))]
    counts = [(n + PAGE - 1) // PAGE for n in case.lengths]
    free = list(range(sum(counts) + 3))
    rng.shuffle(free)
    tables = [[free.pop() for _ in range(count)] for count in counts]
    cache, out = poisoned(sum(counts) + 3, case), torch.full_like(q, torch.nan)
    done = [0] * len(case.lengths)
    while any(d < n for d, n in zip(done, case.lengths, strict=True)):
        waiting = [s for s, n in enumerate(case.lengths) if done[s] < n]
        chosen = rng.sample(waiting, rng.randint(1, len(waiting)))
        steps = {}
        for s in chosen:
            left = case.lengths[s] - done[s]
            steps[s] = min(left, 1 if kind == "decode" else rng.randint(1, 50))
        rows = torch.cat([torch.arange(base[s] + done[s], base[s] + done[s] + steps[s]) for s in chosen])
        for s in chosen:
            done[s] += steps[s]
        pages = torch.full((len(chosen), max(counts) + 1), 10**6, dtype=torch.int32)
        for row, s in enumerate(chosen):
            gone = max(0, done[s] - steps[s] + 1 - case.window) // PAGE if case.window else 0
            for p in range(gone, (done[s] + PAGE - 1) // PAGE):  # pages before the window may have been given back
                pages[row, p] = tables[s][p]
        batch = ForwardBatch(
            tokens_T=torch.zeros(len(rows), dtype=torch.int64),
            positions_T=torch.cat([torch.arange(done[s] - steps[s], done[s]) for s in chosen]),
            seq_starts=torch.tensor(
                [0, *torch.tensor([steps[s] for s in chosen]).cumsum(0).tolist()], dtype=torch.int32
            ),
            context_lens=torch.tensor([done[s] for s in chosen], dtype=torch.int32),
            pages_SP=pages,
            num_pages=cache.num_pages,
        )
        out[rows] = case.attend(q[rows], k[rows], v[rows], sinks, batch, cache)
    return out


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_any_schedule_gives_the_bits_of_the_packed_training_row(
    level: int, dtype: torch.dtype, tried: Callable[[str, int], None]
) -> None:
    rng = random.Random(level)
    before = kernels.num_threads()
    try:
        for index in range(NUM_CASES):
            torch.manual_seed(index)
            case = Case.draw(rng, dtype)
            inputs = case.inputs()
            kernels.set_num_threads(1)
            packed = case.attend(*inputs, whole(case), None)
            assert torch.isfinite(packed).all()
            for kind in ("chunks", "chunks", "decode" if index % 5 == 0 else "chunks"):
                kernels.set_num_threads(rng.choice([1, 2]))
                assert torch.equal(scheduled(case, inputs, rng, kind), packed), case
            at = 0
            for n in case.lengths:  # alone, as a batch of one
                q, k, v = (x[at : at + n] for x in inputs[:3])
                alone = case.attend(q, k, v, inputs[3], whole(replace(case, lengths=(n,))), None)
                assert torch.equal(alone, packed[at : at + n]), case
                at += n
            tried(
                "attention: a schedule of chunks, decoding steps, threads or batches against whole rows",
                3 + len(case.lengths),
            )
    finally:
        kernels.set_num_threads(before)


def test_threads_and_long_contexts_do_not_change_bits() -> None:
    case = Case((700, 3), 6, 2, 64, 0, 0.0, False, torch.bfloat16)
    inputs = case.inputs()
    before = kernels.num_threads()
    try:
        results = []
        for threads in (1, 2):
            kernels.set_num_threads(threads)
            results.append(case.attend(*inputs, whole(case), None))
    finally:
        kernels.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("seed", range(5))
def test_the_naive_twin_keeps_the_contract_too(seed: int) -> None:
    rng = random.Random(seed)
    case = replace(Case.draw(rng, KV_DTYPES[seed % 4]), lengths=(33, 5), dim=8 - (seed == 3))
    inputs = case.inputs()
    with kernels.force("naive"):
        assert torch.equal(scheduled(case, inputs, rng, "chunks"), case.attend(*inputs, whole(case), None))


def plain(case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """A softmax over all keys at once, in float64."""
    q, k, v = q.double(), rounded(k, case.dtype).double(), rounded(v, case.dtype).double()
    outs, at = [], 0
    for n in case.lengths:
        rows = slice(at, at + n)
        key, value = (x[rows].repeat_interleave(case.heads // case.groups, 1) for x in (k, v))
        score = torch.einsum("thd,nhd->htn", q[rows], key) * case.dim**-0.5
        score = case.softcap * torch.tanh(score / case.softcap) if case.softcap else score
        distance = torch.arange(n).unsqueeze(1) - torch.arange(n)
        hidden = (distance < 0) | (distance >= case.window) if case.window else distance < 0
        score = score.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            score = torch.cat([score, sinks.double().view(-1, 1, 1).expand(-1, n, 1)], -1)
        weight = score.softmax(-1)[..., :n]
        outs.append(torch.einsum("htn,nhd->thd", weight, value))
        at += n
    return torch.cat(outs).float()


def test_every_level_is_a_softmax(level: int) -> None:
    rng = random.Random(99)
    for index in range(40):
        torch.manual_seed(index)
        case = Case.draw(rng, rng.choice(KV_DTYPES))
        if index < 9:
            case = replace(case, dim=(1, 96, 128, 200, 256, 64, 33, 7, 71)[index])
        q, k, v, sinks = case.inputs()
        torch.testing.assert_close(
            case.attend(q, k, v, sinks, whole(case), None), plain(case, q, k, v, sinks), rtol=1e-4, atol=2e-5
        )


@pytest.mark.parametrize("seed", range(8))
def test_gradients_equal_those_of_the_naive_twin(seed: int) -> None:
    rng = random.Random(seed)
    case = replace(Case.draw(rng, torch.float32), lengths=(20, 1, 37, 90), dim=8, has_sinks=seed % 2 == 0)
    inputs = [None if x is None else x.requires_grad_() for x in case.inputs()]
    leaves = [x for x in inputs if x is not None]
    results = []
    for mode in ("auto", "naive"):
        with kernels.force(mode):  # type: ignore[arg-type]
            y = case.attend(*inputs, whole(case), None)  # type: ignore[arg-type]
            results.append(torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), leaves))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_sequences_share_have_the_bits_and_gradients_of_sequences_laid_out_whole(seed: int) -> None:
    rng = random.Random(seed)
    case = replace(Case.draw(rng, rng.choice([torch.float32, torch.bfloat16])), has_sinks=False)
    prompts = [[rng.randrange(9) for _ in range(rng.choice([15, 16, 40]))] for _ in range(2)]
    texts = [rng.choice(prompts) + [rng.randrange(9) for _ in range(rng.choice([0, 1, 17, 70]))] for _ in range(9)]
    whole_batch = ForwardBatch.packed([torch.tensor(text) for text in texts])
    batch = whole_batch.sharing()
    shared = batch.shared
    assert shared is not None
    num = len(shared.places_T)
    q, k, v = (torch.randn(num, n, case.dim, requires_grad=True) for n in (case.heads, case.groups, case.groups))
    once = case.attend(q, k, v, None, batch, None)
    laid_out = case.attend(*(x[shared.reads_X] for x in (q, k, v)), None, whole_batch, None)[shared.places_T]
    assert torch.equal(once, laid_out)
    weight = torch.randn(once.shape)
    weight[: num // 3] = 0.0
    found, expected = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (once, laid_out))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    before = kernels.num_threads()
    try:
        kernels.set_num_threads(3)
        again = torch.autograd.grad((case.attend(q, k, v, None, batch, None) * weight).sum(), (q, k, v))
    finally:
        kernels.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.slow
def test_gradient_matches_finite_differences() -> None:
    case = Case((5, 3), 4, 2, 3, 4, 2.0, True, torch.float32)
    inputs = [x.double().requires_grad_() for x in case.inputs() if x is not None]
    batch = whole(case)
    assert torch.autograd.gradcheck(lambda q, k, v, s: case.attend(q, k, v, s, batch, None), inputs)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint4])
@pytest.mark.parametrize("dim", [1, 7, 24, 33, 64])
def test_codes_are_those_of_the_naive_twin(level: int, dtype: torch.dtype, dim: int) -> None:
    case = Case((37,), 4, 2, dim, 0, 0.0, False, dtype)
    q, k, v, _ = case.inputs()
    k[3, 0], v[4, 1], k[5, 1] = 0.0, 2.5, 1e-38
    k[6, 0, 0], v[7, 1, dim - 1] = torch.nan, torch.inf
    caches = [poisoned(3, case), poisoned(3, case)]
    with kernels.force("naive"):
        case.attend(q, k, v, None, whole(case), caches[0])
    case.attend(q, k, v, None, whole(case), caches[1])
    for slow, fast in zip(caches[0].tensors, caches[1].tensors, strict=True):
        assert torch.equal(torch.nan_to_num(slow.float(), 77.0), torch.nan_to_num(fast.float(), 77.0))
        assert slow.dtype is fast.dtype


@pytest.mark.parametrize(("dtype", "levels"), [(torch.int8, 254), (torch.uint4, 15)])
def test_a_code_is_at_most_half_a_step_away(dtype: torch.dtype, levels: int) -> None:
    x = torch.randn(500, 3, 64) * torch.exp(torch.randn(500, 3, 1))
    error = (decode(*encode(x, dtype), 64) - x).abs().amax(-1)
    spread = 2 * x.abs().amax(-1) if dtype is torch.int8 else x.amax(-1) - x.amin(-1)
    assert (error <= spread / levels / 2 * (1 + 1e-4)).all()
    assert (error > spread / levels / 4).float().mean() > 0.9  # 64 numbers nearly always come close to half a step
    assert torch.equal(decode(*encode(torch.zeros(2, 5), dtype), 5), torch.zeros(2, 5))


def test_rounded_keys_pass_their_gradient_unchanged() -> None:
    case = Case((6,), 2, 1, 8, 0, 0.0, False, torch.bfloat16)
    q, k, v, _ = case.inputs()
    exact = replace(case, dtype=torch.float32)
    leaf = v.requires_grad_()
    (rounded,) = torch.autograd.grad(case.attend(q, k.bfloat16().float(), leaf, None, whole(case), None).sum(), leaf)
    (plain_grad,) = torch.autograd.grad(
        exact.attend(q, k.bfloat16().float(), leaf, None, whole(case), None).sum(), leaf
    )
    assert torch.equal(rounded, plain_grad)


def test_views_are_read_in_place() -> None:
    case = Case((50,), 4, 2, 16, 0, 0.0, False, torch.float32)
    joint = torch.randn(50, 8 * 16)
    q, k, v = (part.view(50, -1, 16) for part in joint.split([64, 32, 32], 1))
    expected = case.attend(q.contiguous(), k.contiguous(), v.contiguous(), None, whole(case), None)
    assert torch.equal(case.attend(q, k, v, None, whole(case), None), expected)


def test_keys_that_are_not_seen_take_no_part() -> None:
    """Later tokens of the same step may hold anything, also NaN."""
    for window in (0, 5):
        case = Case((40,), 6, 2, 20, window, 0.0, False, torch.float32)
        q, k, v, _ = case.inputs()
        expected = case.attend(q, k, v, None, whole(case), None)
        k[21:], v[21:] = torch.nan, torch.inf
        assert torch.equal(case.attend(q, k, v, None, whole(case), None)[:21], expected[:21])


@pytest.mark.parametrize("mode", ["auto", "naive"])
def test_wrong_inputs(mode: str) -> None:
    case = Case((20,), 2, 1, 8, 0, 0.0, False, torch.float32)
    q, k, v, _ = case.inputs()
    batch = whole(case)
    with kernels.force(mode):  # type: ignore[arg-type]
        for page in (-1, 2):
            bad = replace(batch, pages_SP=torch.tensor([[0, page]], dtype=torch.int32))
            with pytest.raises(InputError, match="pages"):
                case.attend(q, k, v, None, bad, poisoned(2, case))
        with pytest.raises(InputError, match="keys"):
            case.attend(
                q, k, v, None, replace(batch, context_lens=torch.tensor([19], dtype=torch.int32)), poisoned(2, case)
            )
        with pytest.raises(InputError, match="whole"):
            case.attend(q, k, v, None, replace(batch, context_lens=torch.tensor([21], dtype=torch.int32)), None)
        with pytest.raises(InputError, match="multiple"):
            case.attend(torch.zeros(20, 3, 8), *(torch.zeros(20, 2, 8),) * 2, None, batch, None)
        with pytest.raises(InputError, match="tokens"):
            case.attend(q[:5], k[:5], v[:5], None, batch, None)
        with pytest.raises(InputError, match="sinks"):
            case.attend(q, k, v, torch.zeros(3), batch, None)
        with pytest.raises(InputError, match="the cache holds"):
            case.attend(q, k, v, None, batch, LayerCache.allocate(2, 1, 16, torch.float32))
        with pytest.raises(ConfigError, match="kv_dtype"):
            replace(case, dtype=torch.float16).attend(q, k, v, None, batch, None)
        with pytest.raises(InputError, match="float32"):
            case.attend(q, k.double(), v, None, batch, None)
    with pytest.raises(ConfigError, match="kv dtype"):
        KVCache.allocate(1, 1, 1, 8, torch.int32)


def test_cache_shapes() -> None:
    cache = KVCache.allocate(3, 5, kv_heads=2, head_dim=8, dtype=torch.bfloat16)
    assert len(cache.layers) == 3
    assert cache.layers[0].k.shape == (5, 2, 8, PAGE)
    assert cache.layers[0].v.shape == (5, 2, PAGE, 8)
    assert cache.num_bytes == 3 * 2 * 5 * 2 * 8 * PAGE * 2
    for dtype, width, numbers in ((torch.int8, 7, 1), (torch.uint4, 4, 2)):
        cache = KVCache.allocate(3, 5, kv_heads=2, head_dim=7, dtype=dtype)
        assert cache.layers[0].k.shape == (5, 2, width, PAGE)
        assert cache.num_bytes == 3 * 2 * 5 * 2 * PAGE * (width + 4 * numbers)
        first = cache.layers[0]
        first.put(torch.tensor([2]), torch.tensor([3]), torch.ones(1, 2, 7), torch.ones(1, 2, 7))
        cache.copy_pages([2], [4])
        # As bytes: what was never written may be NaN.
        pages = [x.contiguous().view(torch.uint8) for x in first.tensors]
        assert all(torch.equal(x[2], x[4]) for x in pages)
