"""Named runs: functions that return a complete frozen config. The first line of a function's docstring is its summary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lockstep.core.errors import ConfigError, unknown_name
from lockstep.recipes import a2c, language, ppo, replay, supervised

RECIPES: dict[str, Callable[[], Any]] = {
    "grpo-spell-backward": language.spell_backward,
    "grpo-chain-sum": language.chain_sum,
    "grpo-letter-counting": language.letter_counting,
    "grpo-task": language.task,
    "grpo-kl-spell-backward": language.grpo_kl_spell_backward,
    "ppo-spell-backward": language.ppo_spell_backward,
    "dr-grpo-spell-backward": language.dr_grpo_spell_backward,
    "dapo-spell-backward": language.dapo_spell_backward,
    "rloo-spell-backward": language.rloo_spell_backward,
    "reinforce-pp-spell-backward": language.reinforce_pp_spell_backward,
    "remax-spell-backward": language.remax_spell_backward,
    "gspo-spell-backward": language.gspo_spell_backward,
    "cispo-spell-backward": language.cispo_spell_backward,
    "gmpo-spell-backward": language.gmpo_spell_backward,
    "maxrl-spell-backward": language.maxrl_spell_backward,
    "pass-at-k-spell-backward": language.pass_at_k_spell_backward,
    "distill-spell-backward": language.distill_spell_backward,
    "lora-spell-backward": language.lora_spell_backward,
    "int8-spell-backward": language.int8_spell_backward,
    "sft-jsonl": supervised.sft_jsonl,
    "reward-jsonl": supervised.reward_jsonl,
    "distill-jsonl": supervised.distill_jsonl,
    "dpo-jsonl": supervised.dpo_jsonl,
    "ipo-jsonl": supervised.ipo_jsonl,
    "kto-jsonl": supervised.kto_jsonl,
    "orpo-jsonl": supervised.orpo_jsonl,
    "simpo-jsonl": supervised.simpo_jsonl,
    "ppo-cartpole": ppo.cartpole,
    "ppo-cartpole-zoo": ppo.cartpole_zoo,
    "ppo-acrobot": ppo.acrobot,
    "ppo-pendulum": ppo.pendulum,
    "ppo-lunarlander": ppo.lunarlander,
    "ppo-lunarlander-zoo": ppo.lunarlander_zoo,
    "ppo-lunarlander-continuous": ppo.lunarlander_continuous,
    "ppo-halfcheetah": ppo.halfcheetah,
    "ppo-hopper": ppo.hopper,
    "ppo-halfcheetah-zoo": ppo.halfcheetah_zoo,
    "ppo-hopper-zoo": ppo.hopper_zoo,
    "ppo-walker2d": ppo.walker2d,
    "ppo-minigrid": ppo.minigrid,
    "ppo-minigrid-memory": ppo.minigrid_memory,
    "ppo-minatar-breakout": ppo.minatar_breakout,
    "ppo-pong": ppo.pong,
    "a2c-cartpole": a2c.cartpole,
    "a2c-pendulum": a2c.pendulum,
    "dqn-cartpole": replay.dqn_cartpole,
    "dqn-lunarlander": replay.dqn_lunarlander,
    "dqn-minatar-breakout": replay.dqn_minatar_breakout,
    "rainbow-cartpole": replay.rainbow_cartpole,
    "qrdqn-cartpole": replay.qrdqn_cartpole,
    "sac-pendulum": replay.sac_pendulum,
    "sac-pendulum-bf16": replay.sac_pendulum_bf16,
    "sac-halfcheetah": replay.sac_halfcheetah,
    "sac-cartpole": replay.sac_cartpole,
    "td3-pendulum": replay.td3_pendulum,
    "ddpg-pendulum": replay.ddpg_pendulum,
    "tqc-pendulum": replay.tqc_pendulum,
    "bc-npz": replay.bc_npz,
    "iql-npz": replay.iql_npz,
    "distill-policy": replay.distill_policy,
}


def recipe(name: str) -> Any:
    """The config of a named recipe.

    Raises:
        ConfigError: unknown name, with the nearest known one.
    """
    if name not in RECIPES:
        raise ConfigError(unknown_name("recipe", name, RECIPES))
    return RECIPES[name]()


def list_recipes() -> dict[str, str]:
    """Name -> one-line summary of every recipe."""
    return {name: (build.__doc__ or "").strip().splitlines()[0] for name, build in RECIPES.items()}
