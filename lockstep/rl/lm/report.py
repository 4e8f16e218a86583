"""What a person wants to know of an update: numbers of its groups, and texts to read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.core.trajectory import Verdict
from lockstep.envs.lm.verify import VerifierPool
from lockstep.rl.lm.batch import SampleKey
from lockstep.rl.lm.problems import text_of
from lockstep.rl.lm.rollout import Group, RolloutStats


def rollout_metrics(groups: Sequence[Group], stats: RolloutStats, verifier: VerifierPool) -> dict[str, float]:
    """Rewards, lengths, speed, what the verifier could not say, and how many prompts left no room for an answer."""
    scored = [[t.score.value for t in g.trajectories if t.score is not None and t.score.is_scored] for g in groups]
    rewards = [value for group in scored for value in group]
    trajectories = [one for group in groups for one in group.trajectories]
    num_sampled = sum(one.num_sampled for one in trajectories)
    too_long = float(sum(not group.trajectories for group in groups))
    return {
        **({"too_long": too_long} if too_long else {}),
        "reward": _mean(rewards),
        "pass_at_k": _mean([float(max(group) >= 1.0) for group in scored if group]),
        "uniform": _mean([float(len(set(group)) <= 1) for group in scored]),
        "length": num_sampled / max(len(trajectories), 1),
        "truncated": _mean([float(one.is_truncated) for one in trajectories]),
        "turns": _mean([float(one.num_turns) for one in trajectories]),
        "cached": stats.num_cached / max(stats.num_prompt_tokens, 1),
        "rollout_s": stats.seconds,
        "verify_s": stats.verify_seconds,
        "rollout_tok_s": stats.num_sampled / stats.seconds if stats.seconds else math.nan,
        "verifier_failed": float(verifier.counts[Verdict.FAILED]),
        "verifier_timed_out": float(verifier.counts[Verdict.TIMED_OUT]),
    }


def readable(
    group: Group, advantages: Mapping[SampleKey, float], mismatch: Mapping[SampleKey, float]
) -> list[dict[str, Any]]:
    """A group as plain values for samples.jsonl.

    Args:
        advantages, mismatch: by sample; null where there is none, as for a sample that had no gradient.
    """
    return [
        {
            "group": group.number,
            "problem": one.problem,
            "sample": one.index,
            "prompt": text_of(group.problem),
            "answer": group.problem.answer,
            "text": one.text,
            "reward": None if one.score is None else one.score.value,
            "advantage": advantages.get((group.number, one.index)),
            "mismatch": mismatch.get((group.number, one.index)),
            "versions": sorted({stamp.version for stamp in one.versions if stamp is not None}),
            "verdict": None if one.score is None else one.score.verdict.value,
            "detail": "" if one.score is None else one.score.detail,
            "tokens": one.num_sampled,
            "turns": one.num_turns,
            "truncated": one.is_truncated,
        }
        for one in group.trajectories
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
