"""What a person wants to know of an update: numbers of its groups, and texts to read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from lockstep.core.trajectory import Verdict
from lockstep.envs.lm.verify import VerifierPool
from lockstep.rl.lm.batch import LearnConfig, SampleKey
from lockstep.rl.lm.problems import text_of
from lockstep.rl.lm.rollout import Group, RolloutStats
from lockstep.tokenize.tokenizer import Tokenizer


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


def alarms(groups: Sequence[Group], learn: LearnConfig, known: Container[str]) -> list[tuple[str, str]]:
    """What should not go unnoticed in an update, as (kind, text) of events: answers that nobody could judge, and rewards that
    are all the same and not full marks, where rewards are learned from.

    Args:
        learn: what is done with rewards.
        known: kinds that were told before; each is told once a run, and its metric counts on.
    """
    answers = [one for group in groups for one in group.trajectories]
    unjudged = [one for one in answers if one.score is None or not one.score.is_scored]
    rewards = {one.score.value for one in answers if one.score is not None and one.score.is_scored}
    told = []
    if unjudged and "first_unjudged" not in known:
        score = unjudged[0].score
        why = "no score" if score is None else f"{score.verdict.value}: {score.detail}"
        text = f"{len(unjudged)} of {len(answers)} answers could not be judged and teach nothing; of problem "
        told.append(("first_unjudged", f"{text}{unjudged[0].problem}: {why}"))
    is_taught = learn.loss.advantage != "none"
    if is_taught and len(rewards) == 1 and max(rewards) < 1.0 and "first_alike" not in known:
        num, reward = len(answers) - len(unjudged), max(rewards)
        text = (
            f"all {num} answers have the reward {reward:g}, and nothing tells the better ones: read some (lockstep runs show "
            "RUN --samples) and try the verifier (lockstep doctor), or give easier problems, larger groups or a supervised "
            "start"
        )
        told.append(("first_alike", text))
    return told


def shown(groups: Sequence[Group]) -> list[Group]:
    """The groups of an update that people may want to read: the first, and the first with an answer that nobody could judge."""
    doubtful = (g for g in groups[1:] if any(t.score is None or not t.score.is_scored for t in g.trajectories))
    return [*groups[:1], *itertools.islice(doubtful, 1)]


def readable(
    group: Group,
    advantages: Mapping[SampleKey, float],
    mismatch: Mapping[SampleKey, float],
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    """A group as plain values for samples.jsonl. Of several turns the text is the whole conversation after the prompt.

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
            "text": one.text
            if one.num_turns == 1
            else tokenizer.decode(one.tokens[one.num_prompt :], skip_special=False),
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
