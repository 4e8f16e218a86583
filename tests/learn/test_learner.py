"""The learner: the engine's bits, packing, accumulation, resumption, and what it does when something diverges."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lockstep.checkpoint.store import Checkpointer
from lockstep.core import batch as batch_module
from lockstep.core.errors import CheckpointError, ConfigError, DivergedError, InputError
from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.engine.config import EngineConfig
from lockstep.engine.engine import Engine
from lockstep.kernels.logprobs import token_logprobs
from lockstep.learn.learner import Learner, LearnerConfig, Loss
from lockstep.learn.logprobs import Logprobs, Truncation, forward_logprobs, micro_logprobs, plain_head
from lockstep.learn.optimiser import OptimiserConfig, ScheduleConfig
from lockstep.learn.packing import Example, MicroBatch, first_fit, micro_batches
from lockstep.models.adapter import LoraConfig, new_adapter
from lockstep.models.families import build_model
from lockstep.models.language import LanguageModel
from tests.learn.tiny import GPT2, LLAMA, VOCAB, examples, tiny


def mean_loss(count: int) -> Loss:
    def loss(logprobs: Logprobs, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        share = -(logprobs.logprob_R * micro.weight_R).sum() / count
        return share, {"logprob": logprobs.logprob_R.detach().sum() / count, "worst_max": -logprobs.logprob_R.min()}

    return loss


def count(batch: list[Example]) -> int:
    return sum(example.num_weighted for example in batch)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_learner_and_engine_agree_bit_for_bit(dtype: str, temperature: float) -> None:
    model = build_model(LLAMA, 7, dtype)
    engine, rng = Engine(model, None, EngineConfig(num_pages=200)), random.Random(3)
    params = SamplingParams(max_tokens=20, temperature=temperature, n=2, ignore_eos=True)
    samples = []
    for index in range(4):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40)))
        samples += engine.add(Request(id=f"{index}", prompt=prompt, params=params))
    while engine.has_work:
        engine.step()
    batch = []
    for sample in samples:
        zeros = [0.0] * len(sample.prompt)
        batch.append(
            Example.of(
                [*sample.prompt, *sample.tokens],
                weight=[*zeros, *[1.0] * len(sample.tokens)],
                columns={"raw": zeros + sample.logprobs, "drawn": zeros + sample.sampling_logprobs},
            )
        )
    for max_tokens in (64, 1000):
        micros = micro_batches(batch, max_tokens)
        for micro in micros:
            assert torch.equal(micro_logprobs(model, micro).logprob_R, micro.columns["raw"])
            found = micro_logprobs(model, micro, temperature=temperature, entropy=True)
            assert found.logprob_R.requires_grad
            assert torch.equal(found.logprob_R, micro.columns["drawn"])
        assert all(map(torch.equal, forward_logprobs(model, micros), [micro.columns["raw"] for micro in micros]))


@pytest.mark.parametrize(
    "wish",
    [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1, "temperature": 1.3}, {"top_k": 30, "top_p": 0.9, "typical_p": 0.8}],
)
def test_truncated_sampling_is_recomputed_bit_for_bit(wish: dict[str, float]) -> None:
    model = tiny()
    engine, params = Engine(model, None, EngineConfig(num_pages=100)), SamplingParams(max_tokens=25, n=3, **wish)
    samples = engine.add(Request(id="a", prompt=(5, 6, 7), params=params))
    while engine.has_work:
        engine.step()
    batch = [
        Example.of(
            [5, 6, 7, *sample.tokens],
            weight=[0.0] * 3 + [1.0] * len(sample.tokens),
            columns={"drawn": [0.0] * 3 + sample.sampling_logprobs},
        )
        for sample in samples
    ]
    truncation = Truncation.of(params)
    for micro in micro_batches(batch, 60):
        found = micro_logprobs(model, micro, temperature=params.temperature, truncation=truncation, entropy=True)
        assert torch.equal(found.logprob_R, micro.columns["drawn"])
        free = micro_logprobs(model, micro, temperature=params.temperature, entropy=True)
        assert bool((found.logprob_R >= free.logprob_R).all())
        assert bool((found.logprob_R > free.logprob_R + 1e-3).any())
        torch.testing.assert_close(found.entropy_R, free.entropy_R)


def test_gradient_of_truncated_sampling_is_that_of_the_kept_softmax() -> None:
    model, truncation = tiny(), Truncation(top_k=7)
    (micro,) = micro_batches(examples(3, seed=8), 1000)
    found = micro_logprobs(model, micro, temperature=0.8, truncation=truncation)
    found.hidden_RE.retain_grad()
    pull = torch.randn(micro.num_rows)
    (found.logprob_R * pull).sum().backward()
    hidden = found.hidden_RE.detach().requires_grad_()
    assert model.head.weight is not None
    logits = hidden @ model.head.weight.detach().T / 0.8
    kept = logits.detach() >= logits.detach().topk(7, dim=1).values[:, -1:]
    kept[torch.arange(micro.num_rows), micro.targets_R] = True
    logprob = logits.masked_fill(~kept, -torch.inf).log_softmax(1)[torch.arange(micro.num_rows), micro.targets_R]
    torch.testing.assert_close(found.logprob_R.detach(), logprob.detach(), rtol=1e-4, atol=1e-5)
    assert bool(torch.isfinite(found.logprob_R).all())
    (logprob * pull).sum().backward()
    torch.testing.assert_close(found.hidden_RE.grad, hidden.grad, rtol=1e-4, atol=1e-5)


def test_a_shaped_distribution_is_refused() -> None:
    assert Truncation.of(SamplingParams(temperature=0.7, max_tokens=3, seed=1)) is None
    with pytest.raises(ConfigError, match="penalties"):
        Truncation.of(SamplingParams(presence_penalty=0.5))


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_an_adapter_is_trained_beside_a_frozen_model(dtype: str) -> None:
    batch = micro_batches(examples(5, seed=9), 70)
    states = []
    for _ in range(2):
        model = build_model({**LLAMA, "intermediate_size": 64}, 7, dtype, trainable=dtype == "fp32")
        adapter = new_adapter(model, LoraConfig(rank=4))
        learner = Learner(model, LearnerConfig(optimiser=OptimiserConfig(lr=1e-2)), adapter=adapter)
        base = forward_logprobs(model, batch)
        assert all(map(torch.equal, learner.forward_logprobs(batch), base))  # B is zero
        metrics = [learner.step(batch, mean_loss(50)) for _ in range(3)]
        assert metrics[-1]["loss"] < metrics[0]["loss"]
        assert all(name.startswith("adapter:") for name in learner.named_parameters())
        after = learner.forward_logprobs(batch)
        assert not torch.equal(after[0], base[0])
        assert all(map(torch.equal, forward_logprobs(model, batch), base))  # without it: the reference
        states.append((learner.state_dict(), after))
    resumed = Learner(model, LearnerConfig(), adapter=new_adapter(model, LoraConfig(rank=4)))
    resumed.load_state_dict(states[0][0])
    assert all(map(torch.equal, resumed.forward_logprobs(batch), states[0][1]))


def test_packing_keeps_every_token_in_its_place() -> None:
    batch = examples(9, seed=1)
    micros = micro_batches(batch, 60)
    assert sorted(place for micro in micros for place in micro.examples) == list(range(9))
    assert all(micro.num_tokens <= 60 for micro in micros)
    assert len(micros) < 9
    for micro in micros:
        starts = micro.batch.seq_starts.tolist()
        assert micro.sequence_rows().sum() == micro.num_rows
        for r in range(micro.num_rows):
            sequence, position = int(micro.sequence_R[r]), int(micro.positions_R[r])
            example = batch[micro.examples[sequence]]
            assert int(micro.rows_R[r]) == starts[sequence] + position - 1
            assert int(micro.targets_R[r]) == int(example.tokens[position])
            assert float(micro.weight_R[r]) == float(example.weight[position]) != 0.0
            assert float(micro.columns["advantage"][r]) == float(example.columns["advantage"][position])


@pytest.mark.parametrize("values", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_that_samples_share_are_computed_once_and_keep_their_bits(
    values: dict[str, object], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of a prompt, one of them twice, and a loner: as many rows as distinct prefixes, the same log-probabilities
    as with a row for each token, the same gradient up to the order of its sums."""
    rng, made = random.Random(3), []
    for prompt_length, num in ((19, 4), (1, 1), (33, 2)):
        prompt = [rng.randrange(VOCAB) for _ in range(prompt_length)]
        answers = [[rng.randrange(VOCAB) for _ in range(rng.randrange(2, 9))] for _ in range(num)]
        for answer in [*answers, answers[0]]:
            weight = [0.0] * prompt_length + [1.0] * len(answer)
            made.append(Example.of([*prompt, *answer], weight=weight))
    prefixes = {tuple(one.tokens[: n + 1].tolist()) for one in made for n in range(len(one.tokens) - 1)}
    found = []
    for part in (1.0, 0.0):
        monkeypatch.setattr(batch_module, "SHARED", part)
        model = tiny(values, dtype)
        (micro,) = micro_batches(made, 1000)
        logprob_R = micro_logprobs(model, micro, temperature=0.8).logprob_R
        (logprob_R * torch.linspace(-1.0, 1.0, len(logprob_R))).sum().backward()
        found.append((micro, logprob_R.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (shared, *_), (whole, *_) = found
    assert shared.num_tokens == len(prefixes) < whole.num_tokens == sum(len(one.tokens) - 1 for one in made)
    assert torch.equal(found[0][1], found[1][1])
    for name, gradient in found[0][2].items():
        # Sums in another order; in bf16 a row's gradient is rounded after the sum over its samples, not before.
        difference = (gradient - found[1][2][name]).norm() / gradient.norm()
        assert float(difference) < (1e-5 if dtype == "fp32" else 1e-2), name


def test_first_fit_is_deterministic_and_within_capacity() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(1, 50) for _ in range(200)]
    bins = first_fit(lengths, 64)
    assert sorted(place for places in bins for place in places) == list(range(200))
    loads = sorted(sum(lengths[place] for place in places) for places in bins)
    assert loads[-1] <= 64
    assert loads[0] + loads[1] > 64  # first fit leaves no two bins that would go into one


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: micro_batches([Example.of([1] * 9, weight=[0] * 8 + [1])], 8), "9 tokens"),
        (lambda: Example.of([1, 2], weight=[1, 1]), "weight\\[0\\]"),
        (lambda: Example.of([1, 2], weight=[0, 1], columns={"advantage": [0.0]}), "advantage"),
        (lambda: Example.of([1, 2], weight=[0, 1], columns={"advantage": [0.0, float("nan")]}), "not finite"),
        (lambda: Example.of([], weight=[]), "at least 1"),
        (
            lambda: micro_batches(
                [Example.of([1], weight=[0]), Example.of([1], weight=[0], columns={"advantage": [0]})], 8
            ),
            "columns",
        ),
    ],
)
def test_bad_examples_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


def test_gradient_does_not_depend_on_the_cut_into_micro_batches() -> None:
    batch = examples(8, seed=2)
    gradients = []
    for max_tokens in (31, 70, 1000):
        model = tiny()
        learner = Learner(model, LearnerConfig())
        total, metrics = learner.accumulate(micro_batches(batch, max_tokens), mean_loss(count(batch)))
        gradients.append({name: p.grad.clone() for name, p in learner.named_parameters().items()})
        assert metrics["logprob"] == pytest.approx(-total, rel=0.5)  # weights are not all 1
    for other in gradients[1:]:
        for name, grad in other.items():
            torch.testing.assert_close(grad, gradients[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("values", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recomputed_layers_have_the_same_bits(values: dict[str, object], dtype: str) -> None:
    batch = micro_batches(examples(4, seed=3), 80)
    states = []
    for recompute in (False, True):
        learner = Learner(tiny(values, dtype), LearnerConfig(recompute_layers=recompute))
        metrics = [learner.step(batch, mean_loss(50)) for _ in range(2)]
        states.append((metrics, learner.named_parameters()))
    assert states[0][0] == states[1][0]
    assert all(torch.equal(p, states[1][1][name]) for name, p in states[0][1].items())


def test_weights_are_packed_again_after_a_step() -> None:
    """What the model computes after a step is what a model freshly built of the new weights computes."""
    batch = micro_batches(examples(4, seed=4), 200)
    learner = Learner(tiny(), LearnerConfig(optimiser=OptimiserConfig(lr=1e-2)))
    (before,) = learner.forward_logprobs(batch)
    learner.step(batch, mean_loss(50))
    fresh = tiny()
    fresh.load_state_dict(learner.model.state_dict())
    (after,) = learner.forward_logprobs(batch)
    assert torch.equal(after, forward_logprobs(fresh, batch)[0])
    assert not torch.equal(after, before)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_resumed_training_is_bit_equal(kind: str, tmp_path: Path) -> None:
    optimiser = OptimiserConfig(
        kind=kind,
        lr=1e-3,
        weight_decay=0.1,
        max_grad_norm=0.5,
        schedule=ScheduleConfig(kind="cosine", warmup_steps=2, total_steps=6),
    )
    config = LearnerConfig(optimiser=optimiser, ema_decay=0.9)
    batches = [micro_batches(examples(3, seed=seed), 64) for seed in range(6)]
    whole = Learner(tiny(), config)
    trace = [whole.step(batch, mean_loss(40)) for batch in batches]
    first = Learner(tiny(), config)
    assert [first.step(batch, mean_loss(40)) for batch in batches[:3]] == trace[:3]
    Checkpointer(tmp_path).save(3, first.state_dict())
    second = Learner(tiny(seed=99), config)
    second.load_state_dict(Checkpointer(tmp_path).load()[1])
    assert [second.step(batch, mean_loss(40)) for batch in batches[3:]] == trace[3:]
    assert all(torch.equal(p, second.named_parameters()[name]) for name, p in whole.named_parameters().items())
    assert all(map(torch.equal, whole.ema.averages, second.ema.averages))  # type: ignore[union-attr]


def test_a_step_that_diverges_changes_nothing() -> None:
    batch = micro_batches(examples(3, seed=5), 64)
    learner = Learner(tiny(), LearnerConfig(ema_decay=0.5))
    before = copy.deepcopy(learner.state_dict())

    def bad(logprobs: Logprobs, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return (logprobs.logprob_R * float("nan")).sum(), {}

    with pytest.raises(DivergedError, match="nothing was changed"):
        learner.step(batch, bad)
    assert torch.equal(before["parameters"]["norm.weight"], learner.state_dict()["parameters"]["norm.weight"])
    assert learner.num_steps == 0
    again = Learner(tiny(), LearnerConfig(ema_decay=0.5))
    assert learner.step(batch, mean_loss(30)) == again.step(batch, mean_loss(30))


def test_a_frozen_model_and_a_foreign_checkpoint_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        Learner(build_model(LLAMA, 0, trainable=False), LearnerConfig())
    learner = Learner(tiny(), LearnerConfig())
    state = learner.state_dict()
    state["parameters"].pop("norm.weight")
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        learner.load_state_dict(state)


def test_a_head_that_is_not_one_matrix_gives_the_same_bits_and_gradients() -> None:
    model = tiny()
    (micro,) = micro_batches(examples(5, seed=6), 1000)
    plain = micro_logprobs(model, micro, temperature=0.8, entropy=True)
    model.head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
    assert plain_head(model) is None
    general = micro_logprobs(model, micro, temperature=0.8, entropy=True)
    assert torch.equal(plain.logprob_R, general.logprob_R)
    assert torch.equal(plain.entropy_R, general.entropy_R)  # type: ignore[arg-type]
    pull = torch.randn(2, micro.num_rows)
    for found in (plain, general):
        found.hidden_RE.retain_grad()
        ((found.logprob_R * pull[0]).sum() + (found.entropy_R * pull[1]).sum()).backward()  # type: ignore[operator]
    torch.testing.assert_close(plain.hidden_RE.grad, general.hidden_RE.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_entropy_and_its_gradient_are_those_of_the_definition(softcap: float) -> None:
    from lockstep.kernels.logprobs import head_logprobs_and_entropy, soft_cap

    hidden, weight = torch.randn(70, 24, dtype=torch.float64), torch.randn(300, 24, dtype=torch.float64)
    tokens, pull = torch.randint(300, (70,)), torch.randn(2, 70, dtype=torch.float64)

    def definition(h: Tensor, w: Tensor) -> Tensor:
        logprob = (soft_cap(h @ w.T, softcap) / 0.7).log_softmax(1)
        entropy = -(logprob.exp() * logprob).sum(1)
        return (logprob.gather(1, tokens[:, None])[:, 0] * pull[0] + entropy * pull[1]).sum()

    def ours(h: Tensor, w: Tensor) -> Tensor:
        logprob, entropy = head_logprobs_and_entropy(
            h, w, tokens, lambda rows: rows @ w.T, temperature=0.7, softcap=softcap
        )
        return (logprob * pull[0] + entropy * pull[1]).sum()

    gradients = []
    for compute in (definition, ours):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = compute(h, w)
        value.backward()
        gradients.append((value.detach(), h.grad, w.grad))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_logits_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model: LanguageModel = tiny()
    (micro,) = micro_batches(examples(12, seed=7), 10_000)
    assert micro.num_rows > 64
    seen = []
    before = model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda x: (seen.append(len(x)), before(x))[1])
    found = micro_logprobs(model, micro, entropy=True)
    assert max(seen) == 64
    logits = before(found.hidden_RE)
    assert torch.equal(token_logprobs(logits, micro.targets_R), found.logprob_R)
