"""OrderedQueue: a queue by key, in which an item can be added, found and removed in O(log n)."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_MIN_DEAD = 64  # fewer removed entries are not worth a rebuild


class _Entry(Generic[T]):
    """An item with its place. ``item`` is None once it is removed, so that it can be freed."""

    __slots__ = ("item", "place")

    def __init__(self, place: tuple[Any, ...], item: T) -> None:
        self.place = place
        self.item: T | None = item

    def __lt__(self, other: _Entry[T]) -> bool:
        return self.place < other.place


class OrderedQueue(Generic[T]):
    """Items by ``key``, the smallest first; of equal ones, the one that was added first.

    A heap that keeps removed entries until they come to its top or are the larger part of it (see
    the notes on priority queues in Python's ``heapq``). ``key`` is called once for each item, when
    it is added. Items are told apart by identity.
    """

    def __init__(self, key: Callable[[T], Any]) -> None:
        self._key = key
        self._counter = itertools.count()
        self._heap: list[_Entry[T]] = []  # its top is never a removed entry
        self._entries: dict[int, _Entry[T]] = {}  # by the item's identity

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return id(item) in self._entries

    def __iter__(self) -> Iterator[T]:
        """Iterate in order, over a copy."""
        live = (entry for entry in sorted(self._heap) if entry.item is not None)
        return iter([entry.item for entry in live if entry.item is not None])

    @property
    def first(self) -> T:
        """The first item. Raises ``IndexError`` if there is none."""
        item = self._heap[0].item
        assert item is not None
        return item

    def add(self, item: T) -> None:
        """Add an item. Raises ``ValueError`` if it is in the queue."""
        if item in self:
            raise ValueError("the item is in the queue")
        entry = _Entry((self._key(item), next(self._counter)), item)
        self._entries[id(item)] = entry
        heapq.heappush(self._heap, entry)

    def remove(self, item: T) -> None:
        """Take an item out. Raises ``KeyError`` if it is not in the queue."""
        self._entries.pop(id(item)).item = None
        num_dead = len(self._heap) - len(self._entries)
        if num_dead > max(_MIN_DEAD, len(self._entries)):
            self._heap = [entry for entry in self._heap if entry.item is not None]
            heapq.heapify(self._heap)
        while self._heap and self._heap[0].item is None:
            heapq.heappop(self._heap)

    def discard(self, item: T) -> None:
        """Take an item out if it is in the queue."""
        if item in self:
            self.remove(item)

    def pop_first(self) -> T:
        """Take the first item out and return it. Raises ``IndexError`` if there is none."""
        item = self.first
        self.remove(item)
        return item
