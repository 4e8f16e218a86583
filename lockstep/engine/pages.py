"""The pages of the key-value cache: who holds each, which are free, and the table that kernels read.

A page is full or it belongs to one sequence: only full pages are shared. What samples of one prompt have in common in its last
page is copied into a page of their own when they start, so no page is ever copied on write.

Legend: S slots, P pages of a sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class PagePool:
    """Reference counts of `num_pages` pages. The prefix cache is one holder among the others, told apart by a flag so
    that the pages it alone holds ("idle": they can be evicted) are known without a walk.

    >>> pool = PagePool(4)
    >>> first, second = pool.take(2)
    >>> pool.cache(first)
    >>> pool.drop([first, second])
    >>> pool.num_free, pool.num_idle
    (3, 1)
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.counts = [0] * num_pages
        self.cached = bytearray(num_pages)
        self.num_idle = 0
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that can be had: free ones, and idle ones after eviction."""
        return len(self._free) + self.num_idle

    def take(self, num: int) -> list[int]:
        """`num` free pages, each held once."""
        assert num <= len(self._free), f"{num} pages asked of {len(self._free)} free ones"
        taken = [self._free.pop() for _ in range(num)]
        for page in taken:
            self.counts[page] = 1
        return taken

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder of each page."""
        counts, cached = self.counts, self.cached
        for page in pages:
            if counts[page] == 1 and cached[page]:
                self.num_idle -= 1
            counts[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """One holder fewer; a page without holders is free."""
        counts, cached = self.counts, self.cached
        for page in pages:
            left = counts[page] = counts[page] - 1
            assert left >= 0, f"page {page} was dropped more often than held"
            if left == 0:
                self._free.append(page)
            elif left == 1 and cached[page]:
                self.num_idle += 1

    def cache(self, page: int) -> None:
        """The prefix cache becomes a holder of a page that a sequence holds."""
        assert not self.cached[page]
        assert self.counts[page] > 0
        self.cached[page] = 1
        self.counts[page] += 1

    def uncache(self, page: int) -> None:
        """The prefix cache lets go."""
        assert self.cached[page]
        if self.counts[page] == 1:
            self.num_idle -= 1
        self.cached[page] = 0
        self.drop([page])

    def audit(self, held: Iterable[Sequence[int]], cached: Sequence[int]) -> list[str]:
        """What does not add up, in words; empty when free + held = all.

        Args:
            held: pages of each sequence.
            cached: pages of the prefix cache.
        """
        expected = Counter(page for pages in held for page in pages)
        expected.update(cached)
        found = [
            f"page {page} has {self.counts[page]} holders by count and {expected[page]} by enumeration"
            for page in range(self.num_pages)
            if self.counts[page] != expected[page]
        ]
        if len(set(cached)) != len(cached) or set(cached) != {p for p, flag in enumerate(self.cached) if flag}:
            found.append("the flags of cached pages differ from the prefix cache's own list")
        if len(set(self._free)) != len(self._free) or any(self.counts[page] for page in self._free):
            found.append("the free list holds a page twice or a held page")
        if len(self._free) + len(expected) != self.num_pages:
            found.append(f"{len(self._free)} free + {len(expected)} held pages; expected {self.num_pages} in all")
        idle = sum(1 for page in cached if self.counts[page] == 1)
        if idle != self.num_idle:
            found.append(f"{idle} idle pages by enumeration, {self.num_idle} by count")
        return found


class PageTable:
    """Row s: the pages of the sequence in slot s, in order of position. Slots are stable while a sequence runs."""

    def __init__(self, num_slots: int, pages_per_slot: int) -> None:
        self.rows_SP: NDArray[np.int32] = np.zeros((num_slots, pages_per_slot), dtype=np.int32)
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        assert slot not in self._free
        self._free.append(slot)
