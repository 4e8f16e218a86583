"""A run's directory that is served while it trains: the model of each later checkpoint takes over.

    training: writes RUN/model anew beside the old one, then puts it in its place by a rename
    follow: looks every reload_every_s --files changed--> Updates.update --does not fit, twice--> the old one serves on

One task; it ends when it is cancelled at shutdown. It awaits one update at a time.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from lockstep.engine.engine import Gate
from lockstep.server.replies import Refusal
from lockstep.server.run_folder import Signature, signature
from lockstep.server.service import LanguageService, State
from lockstep.server.updates import Update, Updates

log = logging.getLogger("lockstep.server")


async def follow(service: LanguageService, updates: Updates, folder: Path, seen: Signature) -> None:
    """Take up what the folder holds whenever it changes, for ever; cancelled at shutdown.

    Args:
        seen: the folder's signature from before the served model was read.
    """
    failed: Signature = ()
    while True:
        await asyncio.sleep(service.config.reload_every_s)
        now = signature(folder)
        if now in ((), seen) or service.state is not State.READY:
            continue
        if await service.engine.call(lambda engine: engine.gate) is Gate.DRAINING:
            continue  # for somebody's pause or update, which takes no other meanwhile
        try:
            told = await updates.update(Update(path=str(folder)))
        except Refusal as error:
            if error.status == 400 and failed == now:
                log.error("%s is left alone until it changes again: %s", folder, error)
                seen = now
            failed = now if error.status == 400 else failed
        except Exception:  # the watch must outlive whatever a folder holds
            log.exception("%s could not be taken up", folder)
            seen = now
        else:
            seen = now
            log.info("%s changed: version %d is served, digest %s", folder, told["version"], told["digest"][:12])
