"""`lockstep eval`: mean return with a confidence interval; of a language model `evaluate_language`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lockstep.api import evaluate
from lockstep.cli import evaluate_language
from lockstep.cli.model_words import names_language_model
from lockstep.cli.store_args import meant
from lockstep.core.errors import ConfigError


@dataclass(frozen=True)
class EvalArgs:
    """Evaluate a run or policy folder on fresh environments; a language model has options of its own: name it before
    --help."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run directory or policy folder."""
    env: str = ""
    """Environment id or import path (default: the run's own)."""
    episodes: int = 100
    """Whole episodes to play."""
    seed: int = 0
    """Seed of the environments and of sampling."""
    stochastic: bool = False
    """Sample actions instead of taking the distribution's mode."""
    json: Path | None = None
    """Also write the figures to this file."""


def main(args: Sequence[str]) -> int:
    words = [word for word in args if not word.startswith("-")]
    if words and names_language_model(words[0]):
        return evaluate_language.main(args)
    if words and args[0] == words[0] and not Path(words[0]).exists():
        raise ConfigError(
            f"{words[0]!r} does not exist; expected a run directory, a policy folder, or a language model's folder, GGUF file "
            f"or hub id; `lockstep runs list` shows runs{meant(words[0])}"
        )
    wish = tyro.cli(EvalArgs, args=list(args), prog="lockstep eval")
    result = evaluate(
        wish.source, env=wish.env, episodes=wish.episodes, seed=wish.seed, deterministic=not wish.stochastic
    )
    print(f"return {result}; std {result.std:.1f}; mean length {sum(result.lengths) / len(result.lengths):.1f}")
    if wish.json is not None:
        low, high = (bound if math.isfinite(bound) else None for bound in result.interval)
        figures = {"mean": result.mean, "ci_low": low, "ci_high": high, "std": result.std}
        wish.json.write_text(json.dumps({**figures, "returns": list(result.returns)}, indent=2) + "\n")
    return 0
