"""The page pool and the prefix tree on their own."""

from __future__ import annotations

import random

import pytest

from lockstep.core.batch import PAGE
from lockstep.engine.pages import PagePool
from lockstep.engine.radix import Eviction, Node, RadixTree

KEY = ("", "", 0)


def tokens_of(*blocks: int) -> list[int]:
    return [block for block in blocks for _ in range(PAGE)]


def grow(tree: RadixTree, *blocks: int, key: tuple[str, str, int] = KEY) -> tuple[Node, list[int]]:
    """A sequence that computes these blocks; it still holds its pages."""
    tokens = tokens_of(*blocks)
    node, pages = tree.match(key, tokens, len(blocks))
    tree.pool.hold(pages)
    for index in range(len(pages), len(blocks)):
        (page,) = tree.pool.take(1)
        node = tree.insert(node, tuple(tokens[index * PAGE : (index + 1) * PAGE]), page)
        pages.append(page)
    return node, pages


def let_go(tree: RadixTree, node: Node, pages: list[int]) -> None:
    tree.pool.drop(pages)
    tree.release(node)


def cached(tree: RadixTree) -> list[int]:
    return [node.page for node in tree.nodes() if node.page is not None]


def test_prefix_is_found_page_by_page() -> None:
    tree = RadixTree(PagePool(8))
    _, pages = grow(tree, 1, 2, 3)
    assert tree.match(KEY, tokens_of(1, 2, 9), 3)[1] == pages[:2]
    assert tree.match(KEY, tokens_of(1, 2, 3)[:-1], 2)[1] == pages[:2]
    assert tree.match(KEY, tokens_of(2), 1)[1] == []


def test_salt_adapter_and_version_are_apart() -> None:
    tree = RadixTree(PagePool(8))
    grow(tree, 1, key=("a", "", 0))
    for key in (("b", "", 0), ("a", "x", 0), ("a", "", 1)):
        assert tree.match(key, tokens_of(1), 1)[1] == []
    assert len(tree.match(("a", "", 0), tokens_of(1), 1)[1]) == 1


def test_held_pages_are_not_evicted_and_leaves_go_first() -> None:
    tree = RadixTree(PagePool(6))
    held = grow(tree, 1, 2)
    let_go(tree, *grow(tree, 1, 3, 4))
    assert tree.pool.num_idle == 2
    assert tree.evict(1) == 1
    assert len(tree.match(KEY, tokens_of(1, 3, 4), 3)[1]) == 2
    assert tree.evict(5) == 1
    assert tree.pool.audit([held[1]], cached(tree)) == []
    let_go(tree, *held)
    assert tree.evict(5) == 2
    assert tree.pool.num_free == 6


@pytest.mark.parametrize(("eviction", "gone"), [(Eviction.LRU, 1), (Eviction.LFU, 2)])
def test_order_of_eviction(eviction: Eviction, gone: int) -> None:
    tree = RadixTree(PagePool(6), eviction)
    for _ in range(3):
        node, pages = grow(tree, 1)
        tree.use(node)
        let_go(tree, node, pages)
    let_go(tree, *grow(tree, 2))
    tree.evict(1)
    assert tree.match(KEY, tokens_of(gone), 1)[1] == []
    assert len(tree.match(KEY, tokens_of(3 - gone), 1)[1]) == 1


def test_audit_finds_a_lost_and_a_doubly_held_page() -> None:
    pool = PagePool(4)
    first, second = pool.take(2)
    assert pool.audit([[first, second]], []) == []
    assert any("holders by count" in line for line in pool.audit([[first]], []))
    assert any("holders by count" in line for line in pool.audit([[first, second], [second]], []))
    pool.counts[first] = 0
    assert any("3 held" in line or "expected 4" in line for line in pool.audit([[second]], []))


@pytest.mark.parametrize("eviction", list(Eviction))
def test_random_growth_and_eviction_add_up(eviction: Eviction) -> None:
    rng, tree = random.Random(5), RadixTree(PagePool(40), eviction)
    live: list[tuple[Node, list[int]]] = []
    for step in range(1500):
        blocks = [rng.randrange(3) for _ in range(rng.randrange(1, 6))]
        missing = len(blocks) - len(tree.match(KEY, tokens_of(*blocks), len(blocks))[1])
        if tree.pool.num_free < missing:
            tree.evict(missing - tree.pool.num_free)
        # Eviction may have taken what was matched: count again.
        missing = len(blocks) - len(tree.match(KEY, tokens_of(*blocks), len(blocks))[1])
        if tree.pool.num_free >= missing:
            live.append(grow(tree, *blocks))
        while len(live) > rng.randrange(1, 9):
            let_go(tree, *live.pop(rng.randrange(len(live))))
        if step % 50 == 0:
            assert tree.pool.audit([pages for _, pages in live], cached(tree)) == []
            assert tree.audit() == []
    for sequence in live:
        let_go(tree, *sequence)
    assert tree.num_evicted > 50
    assert tree.evict(40) > 0
    assert tree.pool.num_free == 40
