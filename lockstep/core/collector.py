"""Python's search for cycles of objects, put off while much is made that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search within; where one was paused already it stays so.

    Importing PyTorch and building a tokenizer make some hundred thousand objects that are not garbage; looking through
    them again and again took a tenth of a server's start.

    >>> import gc
    >>> with collector_paused():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def collector_spared() -> Iterator[None]:
    """Searches within leave out what was there before: a loop that makes many small objects sets off a full search every so
    often, which would go through all modules and models again.

    >>> import gc
    >>> with collector_spared():
    ...     gc.get_freeze_count() > 0
    True
    >>> gc.get_freeze_count()
    0
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
