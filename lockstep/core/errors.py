"""The error tree. Every message says what was wrong, what was got, what was expected and how to fix it.

LockstepError
  ConfigError         a wish that cannot be met: unknown key, value out of range, combination that makes no sense
  InputError          data handed in at run time: wrong shape, dtype, NaN; `field` names the offending part
  EnvError            an environment broke its contract or could not be made
  CheckpointError     a file of ours is missing, truncated or does not match
  FormatError         a file of the field's formats (weights, tokenizer) is damaged, hostile or of a kind we do not read
  ExportError         an exported program does something else than the policy it was made from
  MissingExtraError   an optional part is not installed; names the extra
  DeadlineError       a wait passed its deadline; names the owner and what to do
  ServingError        the server refused a request for a reason that is not the request's content
  DivergedError       training produced weights or losses that are not finite
  WeightsError        weights did not arrive at the sampler, or a sample is of weights that were never published
  WorkerError         a process that samples failed, or could not be kept alive; says how it ended
  ExactnessError      sampler and learner computed different log-probabilities where the mode promises equal ones
  StoppedError        a person or the system asked the run to stop; it was checkpointed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LockstepError(Exception):
    """Root of every error that Lockstep raises on purpose."""


class ConfigError(LockstepError, ValueError):
    """A configuration that cannot be run."""


class InputError(LockstepError, ValueError):
    """Data of the wrong shape, dtype or value. `field` names the part that is wrong."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class EnvError(LockstepError, RuntimeError):
    """An environment could not be made or broke the Gymnasium contract."""


class CheckpointError(LockstepError, RuntimeError):
    """A checkpoint, policy folder or run directory is missing, damaged or does not match."""


class FormatError(LockstepError, ValueError):
    """A file somebody else wrote cannot be read: truncated, damaged, hostile or of an unknown kind.

    `path` names the file, `offset` the byte and `op` the operation at fault, where there is one.
    """

    def __init__(self, message: str, *, path: str = "", op: str = "", offset: int | None = None) -> None:
        self.reason, self.path, self.op, self.offset = message, path, op, offset
        place = path if offset is None else f"{path or 'file'}, byte {offset}"
        super().__init__(": ".join(part for part in (place, op and f"operation {op}", message) if part))


class ExportError(LockstepError, RuntimeError):
    """An exported program does not do what the policy does."""


class MissingExtraError(LockstepError, ImportError):
    """An optional dependency is not installed."""


class DeadlineError(LockstepError, TimeoutError):
    """A wait passed its deadline."""


class ServingError(LockstepError, RuntimeError):
    """The server cannot take the request now (overload, shutdown)."""


class DivergedError(LockstepError, ArithmeticError):
    """Training produced NaN or infinity; nothing was saved after the last good checkpoint."""


class WeightsError(LockstepError, RuntimeError):
    """Weights that were not delivered, or a sample whose fingerprint no publication of this run has."""


class WorkerError(LockstepError, RuntimeError):
    """A process of ours failed, or ended again and again."""


class ExactnessError(LockstepError, ArithmeticError):
    """The learner's log-probability of a token is not, bit for bit, the one that the sampler recorded."""


class StoppedError(LockstepError):
    """The run was asked to stop and left a checkpoint."""


MANY = 150
"""Names that are told in full."""


def unknown_name(what: str, got: str, known: Iterable[str]) -> str:
    """Message for an unknown name, with the nearest known one as a suggestion.

    >>> unknown_name("recipe", "ppo-cartpol", ["ppo-cartpole", "dqn-cartpole"])
    "unknown recipe 'ppo-cartpol'; did you mean 'ppo-cartpole'? Known: dqn-cartpole, ppo-cartpole"
    """
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    if len(names) > MANY:
        near = difflib.get_close_matches(got, names, n=10, cutoff=0.3) or names[:10]
        return f"unknown {what} {got!r}{hint} {len(names)} are known, such as {', '.join(near)}"
    return f"unknown {what} {got!r}{hint} Known: {', '.join(names)}"
