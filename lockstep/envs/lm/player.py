"""Episodes in progress: a turn costs one step of the environment, and a replay only where nobody has the episode any more."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, final

from lockstep.core.errors import EnvError
from lockstep.envs.lm.task import Episode, EpisodeTask, Turn

MAX_EPISODES = 512


@final
class Player:
    """Plays a task's episodes as `EpisodeTask.play` does, and keeps those that go on.

    An episode is a function of its texts, so which of two that were alike so far is gone on with makes no difference.
    """

    def __init__(self, task: EpisodeTask) -> None:
        self._task = task
        self._going: OrderedDict[tuple[int, tuple[str, ...]], Episode] = OrderedDict()

    def play(self, index: int, texts: tuple[str, ...]) -> Turn:
        """See `EpisodeTask.play`.

        Raises:
            EnvError: an episode that answers with something else than a turn.
        """
        episode = self._going.pop((index, texts[:-1]), None) if len(texts) > 1 else None
        if episode is not None:
            turn = episode.step(texts[-1])
        else:
            episode, turn = self._task.replay(index, texts)
        if not isinstance(turn, Turn):
            raise EnvError(f"{self._task.name}: a step of an episode gave {type(turn).__name__}; expected a Turn")
        if not turn.is_done:
            self._going[index, texts] = episode
            while len(self._going) > MAX_EPISODES:
                self._going.popitem(last=False)
        return turn


def playing(task: Any) -> Any:
    """A task as a verifier's process holds it."""
    return Player(task) if isinstance(task, EpisodeTask) else task
