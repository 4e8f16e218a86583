"""Python's search for cycles of objects, put off while much is made that stays."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_num_pauses = 0
_was_enabled = True


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search within, nor in other threads: the collector is the process's. It starts again when the last of the pauses of
    all threads ends.

    Importing PyTorch and building a tokenizer make some hundred thousand objects that are not garbage; looking through
    them again and again took a tenth of a server's start.

    >>> import gc
    >>> with collector_paused():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    global _num_pauses, _was_enabled
    with _lock:
        if _num_pauses == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _num_pauses += 1
    try:
        yield
    finally:
        with _lock:
            _num_pauses -= 1
            if _num_pauses == 0 and _was_enabled:
                if gc.get_freeze_count() == 0:
                    # What was made within counts as old from here on: else the next search would go through all of it.
                    gc.freeze()
                    gc.unfreeze()
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
