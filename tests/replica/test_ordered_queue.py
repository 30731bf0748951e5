"""OrderedQueue against a sorted list, and how many comparisons it makes."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest

from serve.replica.ordered_queue import OrderedQueue


@dataclass(eq=False)
class Item:
    key: int


@dataclass
class CountingKey:
    """A key that counts how often any two are compared."""

    value: int

    num_compared = 0

    def __lt__(self, other: CountingKey) -> bool:
        CountingKey.num_compared += 1
        return self.value < other.value


@pytest.mark.parametrize("seed", range(10))
def test_items_leave_by_key_and_then_by_age(seed: int) -> None:
    print(f"seed={seed}")
    rng = random.Random(seed)
    queue: OrderedQueue[Item] = OrderedQueue(lambda item: item.key)
    expected: list[Item] = []
    for _ in range(2000):
        action = rng.random()
        if action < 0.5 or not expected:
            item = Item(rng.randrange(20))
            queue.add(item)
            expected.append(item)
            expected.sort(key=lambda item: item.key)  # stable
        elif action < 0.75:
            item = expected.pop(rng.randrange(len(expected)))
            queue.remove(item)
            assert item not in queue
        else:
            assert queue.pop_first() is expected.pop(0)
        assert len(queue) == len(expected)
        if expected:
            assert queue.first is expected[0]
    assert list(queue) == expected


def test_an_item_is_added_once_and_removed_once() -> None:
    queue: OrderedQueue[Item] = OrderedQueue(lambda item: item.key)
    item = Item(1)
    queue.add(item)
    with pytest.raises(ValueError, match="in the queue"):
        queue.add(item)
    queue.discard(item)
    queue.discard(item)
    with pytest.raises(KeyError):
        queue.remove(item)
    with pytest.raises(IndexError):
        _ = queue.first


@pytest.mark.parametrize("count", [100, 10_000])
def test_comparisons_grow_with_the_logarithm_of_the_length(count: int) -> None:
    rng = random.Random(count)
    queue: OrderedQueue[Item] = OrderedQueue(lambda item: CountingKey(item.key))
    items = [Item(rng.randrange(10**9)) for _ in range(count)]
    for item in items:
        queue.add(item)
    CountingKey.num_compared = 0
    for _ in range(1000):
        index = rng.randrange(count)
        queue.remove(items[index])
        items[index] = Item(rng.randrange(10**9))
        queue.add(items[index])
    # Removed entries are at most half of the heap. A rebuild is paid for by as many removals.
    assert CountingKey.num_compared / 1000 < 6 * math.log2(2 * count)
