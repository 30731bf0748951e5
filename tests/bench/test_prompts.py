"""Prompts: exact lengths, the same everywhere, shared only where hash ids are equal."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.prompts import BLOCK, PromptMaker

LOW, HIGH = 1000, 30000


@given(st.integers(0, 2**40), st.integers(0, 10**9), st.integers(0, 2000))
def test_tokens_have_the_length_and_the_range_asked_for(seed: int, index: int, length: int) -> None:
    ids = PromptMaker(seed, 5, 9).tokens(index, length)
    assert len(ids) == length
    assert all(type(token) is int and 5 <= token <= 9 for token in ids)


def test_tokens_use_the_whole_range_evenly() -> None:
    ids = PromptMaker(0, 10, 19).tokens(0, 20_000)
    counts = np.bincount(ids)[10:]
    assert len(counts) == 10
    assert counts.min() > 1800
    assert counts.max() < 2200


def test_requests_differ_from_their_first_token_on() -> None:
    maker = PromptMaker(3, LOW, HIGH)
    num_ids = HIGH - LOW + 1
    assert len({maker.tokens(index, 1)[0] for index in range(num_ids)}) == num_ids
    one, other = maker.tokens(0, 8000), maker.tokens(1, 8000)
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


def test_prompts_do_not_depend_on_what_was_made_before() -> None:
    maker = PromptMaker(7, LOW, HIGH)
    maker.tokens(1, 100)
    maker.from_hashes(2, [4, 5], 1000)
    fresh = PromptMaker(7, LOW, HIGH)
    assert fresh.from_hashes(0, [5, 4], 1000) == maker.from_hashes(0, [5, 4], 1000)
    assert fresh.tokens(9, 100) == maker.tokens(9, 100)


def test_prompts_are_the_same_in_another_process() -> None:
    program = (
        "from bench.load.prompts import PromptMaker; maker = PromptMaker(7, 1000, 30000); "
        "print(maker.tokens(3, 20), maker.from_hashes(3, [10**12], 530))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    maker = PromptMaker(7, LOW, HIGH)
    assert printed.strip() == f"{maker.tokens(3, 20)} {maker.from_hashes(3, [10**12], 530)}"


def test_another_seed_makes_other_prompts() -> None:
    one, other = PromptMaker(0, LOW, HIGH), PromptMaker(1, LOW, HIGH)
    assert one.tokens(0, 10) != other.tokens(0, 10)
    assert one.from_hashes(0, [0], 10) != other.from_hashes(0, [0], 10)


def test_what_was_made_can_be_changed_without_harm() -> None:
    maker = PromptMaker(0, LOW, HIGH)
    made = maker.from_hashes(0, [1], BLOCK)
    kept = list(made)
    made[0] = -1
    assert maker.from_hashes(0, [1], BLOCK) == kept


def test_equal_hash_ids_are_equal_prefixes() -> None:
    maker = PromptMaker(0, LOW, HIGH)
    one = maker.from_hashes(0, [0, 1, 2], 3 * BLOCK)
    other = maker.from_hashes(1, [0, 1, 9], 2 * BLOCK + 88)
    assert len(one) == 3 * BLOCK
    assert len(other) == 2 * BLOCK + 88
    assert one[: 2 * BLOCK] == other[: 2 * BLOCK]
    assert sum(a == b for a, b in zip(one[2 * BLOCK :], other[2 * BLOCK :], strict=False)) < 5


def test_a_block_depends_on_its_hash_id_and_not_on_its_place() -> None:
    maker = PromptMaker(0, LOW, HIGH)
    first = maker.from_hashes(0, [6, 7], 2 * BLOCK)
    swapped = maker.from_hashes(5, [7, 6], 2 * BLOCK)
    assert first[:BLOCK] == swapped[BLOCK:]
    assert first[BLOCK:] == swapped[:BLOCK]
    assert first[:BLOCK] != first[BLOCK:]


def test_different_hash_ids_are_different_blocks() -> None:
    maker = PromptMaker(0, LOW, HIGH)
    hash_ids = [*range(200), 2**32, 2**63, 2**64]
    ids = maker.from_hashes(0, hash_ids, len(hash_ids) * BLOCK)
    starts = {tuple(ids[at : at + 8]) for at in range(0, len(ids), BLOCK)}
    assert len(starts) == len(hash_ids)
    assert tuple(maker.tokens(0, 8)) not in starts


def test_what_hash_ids_do_not_cover_is_the_requests_own() -> None:
    maker = PromptMaker(0, LOW, HIGH)
    one = maker.from_hashes(0, [3], BLOCK + 200)
    other = maker.from_hashes(1, [3], BLOCK + 200)
    assert one[:BLOCK] == other[:BLOCK]
    assert one[BLOCK:] == maker.tokens(0, 200)
    assert other[BLOCK:] == maker.tokens(1, 200)
    assert maker.from_hashes(0, [], 50) == maker.tokens(0, 50)


@given(st.lists(st.integers(0, 2**64), max_size=6), st.integers(0, 7 * BLOCK))
def test_a_prompt_of_hash_ids_has_the_length_asked_for(hash_ids: list[int], length: int) -> None:
    ids = PromptMaker(0, 3, 4).from_hashes(11, hash_ids, length)
    assert len(ids) == length
    assert set(ids) <= {3, 4}


@pytest.mark.parametrize(
    ("seed", "low", "high", "words"),
    [
        (0, 9, 8, "no token ids from 9 to 8"),
        (0, -1, 8, "no token ids from -1 to 8"),
        (-1, 0, 8, "seed must not be negative: -1"),
    ],
)
def test_invalid_ranges_and_seeds_are_refused(seed: int, low: int, high: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PromptMaker(seed, low, high)


def test_a_negative_length_is_refused() -> None:
    maker = PromptMaker(0, LOW, HIGH)
    with pytest.raises(ValueError, match="negative"):
        maker.tokens(0, -1)
    with pytest.raises(ValueError, match="negative"):
        maker.from_hashes(0, [], -1)
