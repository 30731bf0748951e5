"""StopStrings: finds the first of several stop strings in text that arrives piece by piece.

It is an Aho-Corasick automaton. A node stands for a text with which one or more stop strings begin.
The current node is the longest of them with which the text so far ends, so the state is that end of
the text, and another replica restores it by reading the end again.

Nodes are made when the text first reaches them. So stop strings cost only a sort when a request
starts, and each character costs a constant on average, however many and however long they are.
It is written here because pyahocorasick builds its whole automaton first, and does not say how much
of the text may still become a match.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """``start`` counts from the beginning of the newest piece; it is negative before that."""

    start: int
    stop: str


class _Node:
    """The first ``depth`` characters of the sorted stop strings ``[low, high)``.

    ``shorter`` is the node of the longest proper suffix that is a node. ``stop`` is the longest
    stop string with which this node ends. ``num_held`` is the length of the longest suffix of this
    node, itself included, that a longer stop string begins with.
    """

    __slots__ = ("children", "depth", "high", "low", "num_held", "shorter", "stop")

    def __init__(self, depth: int, low: int, high: int) -> None:
        self.depth, self.low, self.high = depth, low, high
        self.children: dict[str, _Node] = {}
        self.shorter = self
        self.stop: str | None = None
        self.num_held = 0


class StopStrings:
    """Searches one output for ``stops``, none of which is empty."""

    __slots__ = ("_first_chars", "_node", "_order", "_root", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._order = {stop: index for index, stop in reversed(list(enumerate(stops)))}
        self._stops = sorted(self._order)
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._root = self._node = _Node(0, 0, len(self._stops))

    @property
    def num_held(self) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        return self._node.num_held

    def read(self, text: str) -> StopMatch | None:
        """Read the next piece of the text and return the stop string that ends in it, if any.

        If several do, the one that begins first counts. If those begin at the same place, the one
        listed first counts.
        """
        if self._node is self._root and self._first_chars.isdisjoint(text):
            return None
        found: StopMatch | None = None
        for end, char in enumerate(text, 1):
            self._node = self._next(self._node, char)
            if (stop := self._node.stop) is not None:
                match = StopMatch(end - len(stop), stop)
                if found is None or self._rank(match) < self._rank(found):
                    found = match
        return found

    def _rank(self, match: StopMatch) -> tuple[int, int]:
        return match.start, self._order[match.stop]

    def _next(self, node: _Node, char: str) -> _Node:
        """Return the node after ``char``. Makes it, and those that its links need."""
        made: list[_Node] = []
        while (found := node.children.get(char)) is None:
            if (child := self._make_child(node, char)) is not None:
                node.children[char] = child
                made.append(child)
            if node is self._root:
                found = self._root
                break
            node = node.shorter
        for child in reversed(made):
            self._link(child, found)
            found = child
        return found

    def _make_child(self, node: _Node, char: str) -> _Node | None:
        """Return a node without links, or None if no stop string continues with ``char``."""
        depth = node.depth
        low, high = node.low, node.high
        if len(self._stops[low]) == depth:  # sorted before those that continue it
            low += 1

        def char_of(stop: str) -> str:
            return stop[depth]

        low = bisect_left(self._stops, char, low, high, key=char_of)
        high = bisect_right(self._stops, char, low, high, key=char_of)
        return _Node(depth + 1, low, high) if low < high else None

    def _link(self, node: _Node, shorter: _Node) -> None:
        first = self._stops[node.low]
        is_stop = len(first) == node.depth
        node.shorter = shorter
        node.stop = first if is_stop else shorter.stop
        node.num_held = node.depth if node.high - node.low > is_stop else shorter.num_held
