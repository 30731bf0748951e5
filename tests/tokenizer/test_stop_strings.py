"""Stop strings in pieces of text: the right one, what is held back, and the cost per character."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from serve.tokenizer import stop_strings
from serve.tokenizer.stop_strings import StopMatch, StopStrings


def _naive(stops: Sequence[str], before: str, piece: str) -> StopMatch | None:
    """Search for the stop strings that end in ``piece``, which follows ``before``."""
    text = before + piece
    found = [
        StopMatch(start - len(before), stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > len(before)
    ]
    return min(found, key=lambda match: (match.start, stops.index(match.stop)), default=None)


def _num_held(stops: Sequence[str], text: str) -> int:
    lengths = range(len(text), 0, -1)
    begins = (n for n in lengths if any(s.startswith(text[-n:]) and len(s) > n for s in stops))
    return next(begins, 0)


@settings(max_examples=500, deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=6),
    pieces=st.lists(st.text("abc", max_size=6), max_size=10),
)
def test_every_piece_against_a_naive_search(stops: list[str], pieces: list[str]) -> None:
    """The search goes on after each match, as it does within ``min_tokens``."""
    automaton, before = StopStrings(stops), ""
    for piece in pieces:
        assert automaton.read(piece) == _naive(stops, before, piece)
        before += piece
        assert automaton.num_held == _num_held(stops, before)
        restored = StopStrings(stops)
        restored.read(before[len(before) - automaton.num_held :])
        assert restored.num_held == automaton.num_held


def test_a_restored_search_goes_on_in_the_middle_of_a_stop_string() -> None:
    first = StopStrings(["ENDING", "DIN"])
    assert first.read("the END") is None
    assert first.num_held == 3
    second = StopStrings(["ENDING", "DIN"])
    assert second.read("END") is None
    assert second.read("ING") == StopMatch(-3, "ENDING")


def _count_lines(automaton: StopStrings, text: str) -> int:
    """Read ``text`` character by character and return how many lines of the module that takes."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != stop_strings.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for char in text:
            automaton.read(char)
    finally:
        sys.settrace(before)
    return count


def test_a_character_costs_the_same_for_one_stop_string_and_for_many_long_ones() -> None:
    """The text runs along the stop strings again and again and leaves them at every place."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    stops = ["".join(rng.choices("ab", k=1024)) for _ in range(64)]
    parts = [rng.choice(stops)[: rng.randrange(1, 1000)] for _ in range(40)]
    text = "c".join(parts)
    many, one = _count_lines(StopStrings(stops), text), _count_lines(StopStrings(["abc"]), text)
    assert many < 3 * one
    # The same text again needs no new nodes.
    automaton = StopStrings(stops)
    _count_lines(automaton, text)
    assert _count_lines(automaton, text) < 1.5 * one


def test_a_stop_string_that_repeats_itself_costs_a_constant_on_average() -> None:
    lengths = [64, 1024]
    costs = [
        _count_lines(StopStrings(["a" * length + "b"]), ("a" * length + "c") * 8) / length
        for length in lengths
    ]
    assert costs[1] < 1.2 * costs[0]
