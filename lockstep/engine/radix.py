"""The prefix cache: a tree whose edges are full pages of tokens, below one root per (salt, adapter, weights version).

An edge is one page, never a run of pages, so nothing is ever split: matching and inserting cost one dictionary look-up
a page. Whoever holds a page of the tree holds all pages above it, so a page that only the tree holds has no held page
below it, and eviction from the leaves can reach it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from enum import Enum

from lockstep.core.batch import PAGE
from lockstep.engine.pages import PagePool

RootKey = tuple[str, str, int]
"""(cache salt, adapter, weights version)."""

_MAX_EMPTY_ROOTS = 1024


class Eviction(Enum):
    """Which idle page goes first."""

    LRU = "lru"
    """The one unused for longest."""
    LFU = "lfu"
    """The one least often hit, and of those the one unused for longest."""


class Node:
    """A page of tokens below its parent; a root has neither block nor page."""

    __slots__ = ("block", "children", "in_tree", "key", "last_used", "num_hits", "page", "parent")

    def __init__(self, key: RootKey, parent: Node | None, block: tuple[int, ...], page: int | None) -> None:
        self.key = key
        self.parent = parent
        self.block = block
        self.page = page
        self.children: dict[tuple[int, ...], Node] = {}
        self.last_used = 0
        self.num_hits = 0
        self.in_tree = True


class RadixTree:
    """Finds the longest cached prefix, takes in full pages, and gives up idle ones.

    Args:
        pool: whose pages the tree holds.
        eviction: order of giving up.
        enabled: False matches nothing and takes nothing in.
    """

    def __init__(self, pool: PagePool, eviction: Eviction = Eviction.LRU, *, enabled: bool = True) -> None:
        self.pool = pool
        self.eviction = eviction
        self.enabled = enabled
        self.num_nodes = 0
        self.num_evicted = 0
        self._roots: dict[RootKey, Node] = {}
        self._clock = 0
        self._serial = 0
        # Idle leaves by age. An entry whose node was used, removed or extended since is skipped when it comes up.
        self._leaves: list[tuple[int, int, int, Node]] = []

    def root(self, key: RootKey) -> Node:
        node = self._roots.get(key)
        if node is None:
            if len(self._roots) >= _MAX_EMPTY_ROOTS:
                self._roots = {name: root for name, root in self._roots.items() if root.children}
            node = self._roots[key] = Node(key, None, (), None)
        return node

    def match(self, key: RootKey, tokens: Sequence[int], max_pages: int) -> tuple[Node, list[int]]:
        """The deepest node that `tokens` lead to, and the pages on the way. Whoever uses them holds them and says `use`."""
        node, pages = self.root(key), []
        for index in range(max_pages):
            child = node.children.get(tuple(tokens[index * PAGE : (index + 1) * PAGE]))
            if child is None:
                break
            assert child.page is not None
            pages.append(child.page)
            node = child
        return node, pages

    def use(self, node: Node) -> None:
        """A new sequence holds the path down to `node`."""
        self._clock += 1
        while node.parent is not None:
            node.num_hits += 1
            node.last_used = self._clock
            node = node.parent

    def insert(self, parent: Node, block: tuple[int, ...], page: int) -> Node:
        """The child of `parent` for this block. If it existed before, its page has the same bits as `page`: the caller
        goes over to it."""
        if parent.parent is None:
            parent = self._roots.setdefault(parent.key, parent)
        child = parent.children.get(block)
        if child is None:
            child = parent.children[block] = Node(parent.key, parent, block, page)
            self.pool.cache(page)
            self.num_nodes += 1
        child.last_used = self._clock
        return child

    def release(self, node: Node) -> None:
        """A sequence that held the path down to `node` has dropped its pages."""
        if node.in_tree and node.page is not None:
            self._clock += 1
            node.last_used = self._clock
            self._offer(node)

    def evict(self, num: int) -> int:
        """Frees up to `num` idle pages; returns how many."""
        done = 0
        while done < num and self._leaves:
            _, used, _, node = heapq.heappop(self._leaves)
            if not self._is_idle_leaf(node) or node.last_used != used:
                continue
            parent = self._remove(node)
            self._offer(parent)
            done += 1
        self.num_evicted += done
        return done

    def flush(self) -> None:
        """Forgets everything. Pages that sequences hold stay theirs."""
        for node in list(self.nodes()):
            node.in_tree = False
            assert node.page is not None
            self.pool.uncache(node.page)
        self._roots.clear()
        self._leaves.clear()
        self.num_nodes = 0

    def nodes(self) -> Iterator[Node]:
        """All nodes that have a page."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.page is not None:
                yield node

    def audit(self) -> list[str]:
        """What does not add up in the tree itself, in words."""
        found, counts = [], self.pool.counts
        for node in self.nodes():
            assert node.parent is not None
            assert node.page is not None
            if node.parent.children.get(node.block) is not node or not node.in_tree:
                found.append(f"the node of page {node.page} is not where its block leads")
            if node.parent.page is not None and counts[node.parent.page] == 1 and counts[node.page] > 1:
                found.append(f"page {node.page} is held below the idle page {node.parent.page}")
        reachable = {id(node) for _, used, _, node in self._leaves if used == node.last_used}
        found += [
            f"the idle leaf of page {node.page} is not up for eviction"
            for node in self.nodes()
            if self._is_idle_leaf(node) and id(node) not in reachable
        ]
        return found

    def _is_idle_leaf(self, node: Node) -> bool:
        return node.in_tree and node.page is not None and not node.children and self.pool.counts[node.page] == 1

    def _offer(self, node: Node) -> None:
        if not self._is_idle_leaf(node):
            return
        self._push(node)
        if len(self._leaves) > 2 * self.num_nodes + 64:
            self._leaves = []
            for leaf in list(self.nodes()):
                if self._is_idle_leaf(leaf):
                    self._push(leaf)

    def _push(self, node: Node) -> None:
        self._serial += 1
        hits = node.num_hits if self.eviction is Eviction.LFU else 0
        heapq.heappush(self._leaves, (hits, node.last_used, self._serial, node))

    def _remove(self, node: Node) -> Node:
        parent = node.parent
        assert parent is not None
        assert node.page is not None
        del parent.children[node.block]
        node.in_tree = False
        self.num_nodes -= 1
        self.pool.uncache(node.page)
        return parent
