"""What a word of the command line names."""

from __future__ import annotations

import json
from pathlib import Path

from lockstep.core.env import model_store
from lockstep.core.errors import ConfigError
from lockstep.interop.store import ModelStore
from lockstep.runs.directory import RunState
from lockstep.runs.record import read_run

KEPT = ("trained", "averaged")
"""Weights of a run that kept an average (`LearnerConfig.serve`): one set in model, the other in model-NAME."""


def of_run(source: str, weights: str) -> str:
    """The model that a word means, where the user chooses between a run's trained and averaged weights.

    Args:
        source: any model; with a choice the directory of a run that kept an average.
        weights: "trained", "averaged", or "" for what the run itself serves.

    Raises:
        ConfigError: another word, or a run that did not keep both.
    """
    refuse_unfinished(Path(source))
    if not weights:
        return source
    if weights not in KEPT:
        raise ConfigError(f"weights={weights!r}; expected one of {', '.join(KEPT)}")
    beside = Path(source) / f"model-{weights}"
    if beside.is_dir():
        return str(beside)
    if any((Path(source) / f"model-{other}").is_dir() for other in KEPT):
        return str(Path(source) / "model")
    raise ConfigError(
        f"{source} holds no choice of weights; a run with learner.ema_decay above 0 keeps both, trained and averaged"
    )


def refuse_unfinished(path: Path) -> None:
    """A language model's run has its model from its first checkpoint on.

    Raises:
        ConfigError: the directory is of one that has none; says how to go on.
    """
    if (path / "run.json").is_file() and not (path / "model").is_dir():
        record = read_run(path)
        if "model" in record.config:
            runs = record.state is RunState.RUNNING
            raise ConfigError(
                f"{path} has no model yet: its run is {record.state} at step {record.num_steps:,} and has written none; "
                + ("wait for the first" if runs else f"go on with `lockstep train --resume {path}`")
            )


def names_language_model(argument: str) -> bool:
    """Whether a word of the command line is a language model's file or folder, a name in the store, or a hub id.

    Raises:
        ConfigError: it is the directory of a language model's run without a checkpoint.

    >>> names_language_model("--port"), names_language_model("a/model.gguf")
    (False, True)
    """
    if argument.startswith("-"):
        return False
    path = Path(argument)
    if path.suffix == ".gguf":
        return True
    if not path.is_dir():
        if not path.exists() and ModelStore(model_store()).find(argument) is not None:
            return True
        # NAME=PATH is a policy; a folder that does not exist is told by whoever looks for it.
        parts = argument.split("/")
        is_id = len(parts) == 2 and all(parts) and "=" not in argument and not parts[0].startswith((".", "~"))
        return is_id and not Path(parts[0]).exists()
    if (path / "model" / "config.json").is_file():
        return True  # the directory of a run that trained one
    refuse_unfinished(path)
    config = path / "config.json"
    if not config.is_file():
        return any(path.glob("*.gguf"))
    try:
        values = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config} cannot be read: {error}") from error
    return isinstance(values, dict) and "model_type" in values
