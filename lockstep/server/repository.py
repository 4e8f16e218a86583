"""The served policies by name, and how a newer version of one takes over.

    folder on disk --(watch: every reload_every_s, or asked)--> load in a thread --> Loaded --> Served.loaded
                                                                    |
    requests: check against Served.loaded, queue in its batcher     '-> damaged or half written: keep the old one

- `watch` is one task; it ends when it is cancelled at shutdown. It sleeps between rounds and awaits one load at a time.
- A swap is one assignment on the event loop. Requests already queued run on the version they were checked against.
- A folder is written file by file, weights last, so a load may meet two versions mixed: the digest tells. It is tried
  again each round until the files change once more or it loads; only what fails twice is reported.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.core.errors import CheckpointError, ConfigError, LockstepError, unknown_name
from lockstep.models.control.folder import load_policy
from lockstep.models.control.policy import Policy
from lockstep.server.batcher import INLINE_BELOW_S, Batcher
from lockstep.server.config import ServeConfig
from lockstep.server.replies import Refusal, shortened
from lockstep.server.runner import Runner
from lockstep.server.sessions import Sessions
from lockstep.server.tensors import Interface, interface_of

log = logging.getLogger("lockstep.server")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
Signature = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Loaded:
    """One version of a policy, ready to run. `inline`: quick enough for the event loop."""

    policy: Policy
    interface: Interface
    runner: Runner
    version: str
    digest: str
    inline: bool


class Served:
    """A policy under its name: what is loaded, its queue, its sessions and its reload counts."""

    def __init__(self, name: str, path: Path, config: ServeConfig) -> None:
        self.name = name
        self.path = path
        self.config = config
        self.batcher = Batcher(
            max_batch=config.max_batch, max_wait_s=config.max_wait_us * 1e-6, max_queue=config.max_queue
        )
        self.sessions = Sessions(config.max_sessions, config.session_ttl_s)
        self.num_reloads = 0
        self.num_failed_reloads = 0
        self.ready = True
        self._signature = _signature(path)
        self._failed: Signature | None = None
        self._reloading = asyncio.Lock()
        self.loaded = load(path, config)

    async def reload(self) -> bool:
        """Load the folder anew; True if another version took over.

        Raises:
            CheckpointError: it cannot be read; the old version serves on.
        """
        async with self._reloading:
            signature = _signature(self.path)
            try:
                loaded = await asyncio.to_thread(load, self.path, self.config)
            except LockstepError as error:
                self.num_failed_reloads += 1
                raise CheckpointError(f"{self.name}: version {self.loaded.version} serves on: {error}") from error
            self._signature, self._failed = signature, None
            if (loaded.digest, loaded.version) == (self.loaded.digest, self.loaded.version):
                return False
            log.info("%s: version %s takes over from %s", self.name, loaded.version, self.loaded.version)
            self.loaded = loaded
            self.num_reloads += 1
            return True

    async def reload_if_changed(self) -> None:
        """One round of the watch."""
        signature = _signature(self.path)
        if signature == self._signature or not signature:
            return
        try:
            await self.reload()
        except CheckpointError as error:
            if self._failed == signature:
                log.error("%s", error)
                self._signature = signature
            self._failed = signature


class Repository:
    """All policies of a server.

    Args:
        folders: policy folders or run directories by name.

    Raises:
        CheckpointError: a folder cannot be read.
    """

    def __init__(self, folders: Mapping[str, Path], config: ServeConfig) -> None:
        self.config = config
        self.seed = secrets.randbits(63) if config.seed is None else config.seed
        self.policies = {name: Served(name, Path(path), config) for name, path in folders.items()}
        self._next_stream = 0

    def __getitem__(self, name: str) -> Served:
        served = self.policies.get(name)
        if served is None:
            raise Refusal(404, unknown_name("policy", shortened(name), self.policies), field="name")
        return served

    def new_streams(self, num: int) -> int:
        """The first of `num` random streams that no other request has."""
        first = self._next_stream
        self._next_stream += num
        return first

    async def watch(self) -> None:
        """Reload what changed on disk and forget old sessions, for ever; cancelled at shutdown."""
        while True:
            await asyncio.sleep(self.config.reload_every_s or 1.0)
            for served in self.policies.values():
                served.sessions.expire()
                if self.config.reload_every_s:
                    try:
                        await served.reload_if_changed()
                    except Exception:  # the watch must outlive whatever a folder holds
                        log.exception("%s: reload failed", served.name)

    def close(self) -> None:
        """Refuse what is queued."""
        for served in self.policies.values():
            served.batcher.close()


def load(path: Path, config: ServeConfig) -> Loaded:
    """Read a policy and run it once.

    Raises:
        CheckpointError: it cannot be read.
    """
    policy = load_policy(path)
    interface = interface_of(policy)
    runner = Runner(policy, interface, config.max_batch)
    inline = runner.warm() < INLINE_BELOW_S
    return Loaded(policy, interface, runner, str(policy.version), policy.digest(), inline)


def name_folders(wishes: Sequence[str]) -> dict[str, Path]:
    """`NAME=PATH` or `PATH` (named by its folder; RUN/policy by the run) -> paths by name.

    Raises:
        ConfigError: none given, a name twice, or one that does not fit in a URL.
    """
    folders: dict[str, Path] = {}
    for wish in wishes:
        name, equals, rest = wish.partition("=")
        path = Path(rest if equals else wish)
        if not equals:
            resolved = path.resolve()
            name = resolved.parent.name if resolved.name == "policy" else resolved.name
        if not NAME.fullmatch(name):
            raise ConfigError(f"policy name {name!r}; expected letters, digits, '.', '_' and '-'; give NAME={path}")
        if name in folders:
            raise ConfigError(f"two policies are named {name!r}; give one as NAME={path}")
        folders[name] = path
    if not folders:
        raise ConfigError("nothing to serve; give a run directory or a policy folder")
    return folders


def _signature(path: Path) -> Signature:
    """Time, size and inode of the folder's files; empty while one is missing."""
    folder = path if (path / "config.json").exists() and (path / "model.safetensors").exists() else path / "policy"
    try:
        stats = [(folder / name).stat() for name in ("config.json", "model.safetensors")]
    except OSError:
        return ()
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
