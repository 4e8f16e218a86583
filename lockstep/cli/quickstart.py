"""`lockstep quickstart [NAME]`: a first result in minutes, from training to a served model."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from lockstep.core.errors import ConfigError, unknown_name

QUICKSTARTS = {
    "language": ("lockstep.cli.quickstart_language", "train a new language model by GRPO, serve it, ask it a question"),
    "control": ("lockstep.cli.quickstart_control", "train CartPole by PPO, plot, serve and query the policy"),
}
DEFAULT = "language"


def main(args: Sequence[str]) -> int:
    if args and args[0] in ("-h", "--help"):
        print(f"usage: lockstep quickstart [NAME]   (default: {DEFAULT})\n")
        print("\n".join(f"  {name:<9} {summary}" for name, (_, summary) in QUICKSTARTS.items()))
        return 0
    name, *rest = args or (DEFAULT,)
    if name not in QUICKSTARTS:
        raise ConfigError(unknown_name("quickstart", name, QUICKSTARTS))
    return importlib.import_module(QUICKSTARTS[name][0]).main(rest)
