"""Lockstep: one stack that trains reinforcement-learning models and serves them.

    from lockstep import evaluate, load, train

    run = train("ppo-cartpole")
    print(evaluate(run.path, episodes=100))
    action = load(run.path).predict(observation)

Names are imported when they are first used, so that `import lockstep` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lockstep.api import Run, evaluate, load, policy_from, record, resume, train
    from lockstep.core.errors import ConfigError, InputError, LockstepError
    from lockstep.envs.control.config import EnvConfig
    from lockstep.models.control.policy import Policy
    from lockstep.recipes import list_recipes, recipe

_HOMES = {
    "Run": "lockstep.api",
    "evaluate": "lockstep.api",
    "load": "lockstep.api",
    "policy_from": "lockstep.api",
    "record": "lockstep.api",
    "resume": "lockstep.api",
    "train": "lockstep.api",
    "ConfigError": "lockstep.core.errors",
    "InputError": "lockstep.core.errors",
    "LockstepError": "lockstep.core.errors",
    "EnvConfig": "lockstep.envs.control.config",
    "Policy": "lockstep.models.control.policy",
    "recipe": "lockstep.recipes",
    "list_recipes": "lockstep.recipes",
}

__all__ = [
    "ConfigError",
    "EnvConfig",
    "InputError",
    "LockstepError",
    "Policy",
    "Run",
    "__version__",
    "evaluate",
    "list_recipes",
    "load",
    "policy_from",
    "recipe",
    "record",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return importlib.import_module(_HOMES[name]).__dict__[name]
    raise AttributeError(f"module 'lockstep' has no attribute {name!r}")
