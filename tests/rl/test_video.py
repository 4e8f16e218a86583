"""Episodes as files that a player opens: every frame is there, and each kind of environment gives pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from lockstep.core.errors import ConfigError, LockstepError
from lockstep.envs.control.config import EnvConfig
from lockstep.envs.control.make import make_env
from lockstep.models.control.policy import Policy
from lockstep.models.control.spec import NetworkConfig, PolicySpec
from lockstep.rl.video import record_episodes

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="extra: video")


def policy_for(config: EnvConfig) -> Policy:
    env = make_env(config, seed=0)
    env.close()
    network = NetworkConfig(hidden_sizes=(8,), encoder_size=8)
    spec = PolicySpec(obs_space=env.obs_space, action_space=env.action_space, head="categorical", network=network)
    return Policy(spec, seed=1)


@pytest.mark.parametrize(
    ("env_id", "suffix"),
    [("CartPole-v1", "gif"), ("CartPole-v1", "mp4"), pytest.param("ALE/Pong-v5", "gif", marks=pytest.mark.slow)],
)
def test_every_step_is_a_frame(env_id: str, suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("ale_py" if env_id.startswith("ALE/") else "pygame", reason="extras: atari, classic")
    config = EnvConfig(id=env_id, time_limit=6, clip_reward=True)
    out = tmp_path / "new" / f"episode.{suffix}"
    returns = record_episodes(policy_for(config), config, out, episodes=1, seed=3, fps=10)
    assert len(returns) == 1
    if suffix == "mp4":
        assert imageio_ffmpeg.count_frames_and_secs(str(out))[0] == 6
        return
    with Image.open(out) as picture:
        # Equal pictures in a row are one, shown longer.
        shown = [
            (frame.info["duration"], np.asarray(frame.convert("L")).std()) for frame in ImageSequence.Iterator(picture)
        ]
    assert sum(duration for duration, _ in shown) == 6 * 100
    assert min(spread for _, spread in shown) > 1


def test_what_cannot_be_recorded_is_said(tmp_path: Path) -> None:
    config = EnvConfig(id="lockstep.envs.control.conformance:CounterEnv")
    policy = policy_for(config)
    with pytest.raises(ConfigError, match="avi"):
        record_episodes(policy, config, tmp_path / "episode.avi", episodes=1, seed=0)
    with pytest.raises(ConfigError, match="episodes=0"):
        record_episodes(policy, config, tmp_path / "episode.gif", episodes=0, seed=0)
    with pytest.raises(LockstepError, match="CounterEnv"):
        record_episodes(policy, config, tmp_path / "episode.gif", episodes=1, seed=0)
    assert not list(tmp_path.iterdir())
