"""Algorithms of reinforcement learning of language models: each is a composition of (advantage, ratio, clip, aggregation),
with a correction for what the sampler did otherwise and a penalty towards a reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lockstep.core.errors import ConfigError
from lockstep.learn.losses import Divergence
from lockstep.rl.lm.advantages import Advantage

Ratio = Literal["token", "sequence"]
ClipKind = Literal["none", "ppo", "cispo", "gmpo"]
Aggregation = Literal["tokens", "sequences", "fixed"]
CorrectionKind = Literal["none", "truncate", "mask"]
KLEstimator = Literal["k1", "k2", "k3"]


def _known(what: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ConfigError(f"{what} {got!r} is unknown; expected one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How far the ratio r = π / π_old may carry an update.

    ppo: min(r A, clip(r, 1 − low, 1 + high) A) (Schulman et al. 2017); high > low is DAPO's clip-higher (Yu et al. 2025).
    cispo: sg(clip(r, 1 − low, 1 + high)) A log π (MiniMax-M1, Chen et al. 2025): every token keeps a gradient.
    gmpo: A exp(mean over the sequence of sgn(A) min(sgn(A) log r, high)) (Zhao et al. 2025).
    none: r A.
    """

    kind: ClipKind = "ppo"
    """none, ppo, cispo or gmpo."""
    low: float = 0.2
    """Distance below 1. Of ppo and cispo."""
    high: float = 0.2
    """Distance above 1; for gmpo the bound on |log r|."""
    dual: float = 0.0
    """ppo: for A < 0 the objective is at least dual · A (Ye et al. 2020), so dual > 1; 0: unbounded."""

    def __post_init__(self) -> None:
        _known("clip kind", self.kind, get_args(ClipKind))
        if self.low < 0.0 or self.high < 0.0 or (self.dual != 0.0 and self.dual <= 1.0):
            raise ConfigError(
                f"clip low={self.low}, high={self.high}, dual={self.dual}; expected low and high >= 0, dual 0 or above 1"
            )


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Importance weight w = π_old / μ between the learner's and the sampler's distribution.

    truncate: min(w, cap) (TIS, Yao et al. 2025). mask: w where floor <= w <= cap, else the token (or sequence) is left out
    of the loss (IcePop, Ling team 2025; MIS, Liu et al. 2025).
    """

    kind: CorrectionKind = "none"
    """none, truncate or mask."""
    level: Ratio = "token"
    """token: each token's own ratio; sequence: their product over the sequence."""
    cap: float = 2.0
    """Upper bound."""
    floor: float = 0.0
    """Lower bound of mask."""

    def __post_init__(self) -> None:
        _known("correction kind", self.kind, get_args(CorrectionKind))
        _known("correction level", self.level, get_args(Ratio))
        if not 0.0 <= self.floor < self.cap:
            raise ConfigError(f"correction floor={self.floor}, cap={self.cap}; expected 0 <= floor < cap")


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """A penalty coef · KL(π ‖ reference), estimated at the sampled tokens with x = log π − log reference (Schulman 2020).

    k1 = x, k2 = x² / 2, k3 = e^−x − 1 + x. As losses they have different gradients: x itself has expected gradient 0, so k1
    carries the score-function gradient x ∇log π, which is k2's and, on policy, that of each token's own KL (Tang & Munos
    2025; what a token does to later tokens' KL is left out); k3's is the one of GRPO's paper, (1 − e^−x) ∇log π.
    """

    estimator: KLEstimator = "k3"
    """k1, k2 or k3."""
    coef: float = 0.0
    """Weight of the penalty; 0: none, and no reference is needed."""
    in_reward: bool = False
    """gae: take coef · k1 off each token's reward (Ouyang et al. 2022) in place of the loss, so that it is discounted and
    valued; the estimator is then that of the metric."""

    def __post_init__(self) -> None:
        _known("kl estimator", self.estimator, get_args(KLEstimator))
        if self.coef < 0.0:
            raise ConfigError(f"kl coef={self.coef}; expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class TeacherLossConfig:
    """A pull coef · D(teacher t, π) at the tokens that the student sampled: on-policy distillation (GKD, Agarwal et al. 2024;
    with reverse_kl also MiniLLM, Gu et al. 2024, its single-step part).

    forward_kl: KL(t ‖ π); reverse_kl: KL(π ‖ t); jsd: β KL(t ‖ m) + (1 − β) KL(π ‖ m), m = β t + (1 − β) π: each over the whole
    vocabulary, at every token, so that no importance weights are needed where the sampler differed from the learner.
    """

    coef: float = 0.0
    """Weight of the divergence; 0: there is no teacher."""
    divergence: Divergence = "reverse_kl"
    """forward_kl, reverse_kl or jsd."""
    temperature: float = 1.0
    """Divides both models' logits."""
    beta: float = 0.5
    """jsd: share of the teacher in the mixture."""

    def __post_init__(self) -> None:
        _known("teacher divergence", self.divergence, get_args(Divergence))
        if self.coef < 0.0 or self.temperature <= 0.0 or not 0.0 < self.beta < 1.0:
            raise ConfigError(
                f"teacher coef={self.coef}, temperature={self.temperature}, beta={self.beta}; expected coef 0 or more, "
                "temperature above 0, 0 < beta < 1"
            )


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """An algorithm: which advantage, and what is done with it."""

    advantage: Advantage = "group_normalised"
    """See `lockstep.rl.lm.advantages`."""
    ratio: Ratio = "token"
    """token: r_t; sequence: the geometric mean of a sequence's r_t at each of its tokens (GSPO, Zheng et al. 2025)."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """Bound of the update."""
    aggregation: Aggregation = "tokens"
    """tokens: sum over tokens / number of tokens in the batch (DAPO); sequences: mean over each sequence's tokens, then over
    sequences (GRPO); fixed: sum / (number of sequences · max_length) (Dr.GRPO)."""
    max_length: int = 0
    """Tokens that `fixed` divides by; the loop's limit of new tokens."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """Off-policy correction."""
    kl: KLConfig = field(default_factory=KLConfig)
    """Penalty towards a reference model."""
    teacher: TeacherLossConfig = field(default_factory=TeacherLossConfig)
    """Pull towards a teacher."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    value_coef: float = 0.0
    """Weight of the value head's loss (PPO); 0: there is no value head."""
    value_clip: float = 0.0
    """Clip of the value's change (0: none)."""
    gamma: float = 1.0
    """Discount per token, for gae."""
    gae_lambda: float = 0.95
    """Decay of gae."""
    k: int = 1
    """Samples of which the best counts, for pass_at_k."""

    def __post_init__(self) -> None:
        _known("advantage", self.advantage, get_args(Advantage))
        _known("ratio", self.ratio, get_args(Ratio))
        _known("aggregation", self.aggregation, get_args(Aggregation))
        if (self.advantage == "gae") != (self.value_coef > 0.0):
            raise ConfigError(
                f"advantage={self.advantage!r} with value_coef={self.value_coef}; gae needs a value head (value_coef > 0), "
                "the others have none (value_coef=0)"
            )
        if self.kl.in_reward and (self.advantage != "gae" or not self.kl.coef):
            raise ConfigError(
                f"kl in_reward=True with advantage={self.advantage!r}, kl coef={self.kl.coef}; expected gae, whose tokens have "
                "rewards of their own, and coef above 0"
            )
        if self.advantage == "none" and not (self.teacher.coef or self.kl.coef or self.entropy_coef):
            raise ConfigError("advantage='none' learns nothing by itself; give teacher.coef, or another advantage")
        if min(self.entropy_coef, self.value_coef, self.value_clip) < 0.0 or self.max_length < 0:
            raise ConfigError("entropy_coef, value_coef, value_clip and max_length must be 0 or more")

    @property
    def weighs_samples(self) -> bool:
        """Whether a token's gradient has the weight of what was sampled, which other samplers' tokens need a correction for;
        a teacher's divergence has not."""
        return self.advantage != "none" or self.kl.coef > 0.0


_SEQUENCE_CLIP = ClipConfig(low=3e-4, high=4e-4)

ALGORITHMS: dict[str, PolicyLossConfig] = {
    "ppo": PolicyLossConfig(advantage="gae", value_coef=0.5, value_clip=0.2),
    "grpo": PolicyLossConfig(aggregation="sequences", kl=KLConfig(coef=0.04)),
    "dr_grpo": PolicyLossConfig(advantage="group_centred", aggregation="fixed"),
    "dapo": PolicyLossConfig(clip=ClipConfig(high=0.28)),
    "rloo": PolicyLossConfig(advantage="leave_one_out", clip=ClipConfig(kind="none"), aggregation="sequences"),
    "reinforce_pp": PolicyLossConfig(advantage="batch_whitened", kl=KLConfig(estimator="k1", coef=0.01)),
    "reinforce_pp_baseline": PolicyLossConfig(advantage="group_batch_whitened", kl=KLConfig(estimator="k2", coef=0.01)),
    "remax": PolicyLossConfig(advantage="greedy_baseline", clip=ClipConfig(kind="none"), aggregation="sequences"),
    "gspo": PolicyLossConfig(ratio="sequence", clip=_SEQUENCE_CLIP, aggregation="sequences"),
    "cispo": PolicyLossConfig(clip=ClipConfig(kind="cispo", low=1.0, high=4.0)),
    "gmpo": PolicyLossConfig(clip=ClipConfig(kind="gmpo", low=0.4, high=0.4), aggregation="sequences"),
    "maxrl": PolicyLossConfig(advantage="max_likelihood"),
    "pass_at_k": PolicyLossConfig(advantage="pass_at_k", k=4),
    "distill": PolicyLossConfig(
        advantage="none", clip=ClipConfig(kind="none"), teacher=TeacherLossConfig(coef=1.0, divergence="reverse_kl")
    ),
}
"""Named compositions, with the papers' settings; recipes start from one and `replace` what they change."""
