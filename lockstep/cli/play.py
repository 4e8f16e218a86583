"""`lockstep play`: record episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lockstep.api import record


@dataclass(frozen=True)
class PlayArgs:
    """Play episodes with the policy's best actions and write a video."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run directory or policy folder."""
    out: Path | None = None
    """File to write, .mp4 or .gif (default: play.mp4 in the source)."""
    env: str = ""
    """Environment id or import path (default: the run's own)."""
    episodes: int = 1
    """Episodes to record."""
    seed: int = 0
    """Seed of the environment."""
    fps: int = 0
    """Frames per second (0: the environment's own)."""


def main(args: Sequence[str]) -> int:
    wish = tyro.cli(PlayArgs, args=list(args), prog="lockstep play")
    out = wish.out or wish.source / "play.mp4"
    returns = record(wish.source, out, env=wish.env, episodes=wish.episodes, seed=wish.seed, fps=wish.fps)
    print(f"wrote {out}: {len(returns)} episode(s), return {', '.join(f'{value:.1f}' for value in returns)}")
    return 0
