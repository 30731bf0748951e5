"""Dispatch policies on plain replica states: the right roles, fair turns, even load."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from serve.dispatch.policies import POLICIES, Choice, PolicyInput
from serve.dispatch.replica_state import ReplicaState
from serve.request import Request, SamplingParams
from serve.topology import ReplicaInfo, Role

ROLES = {"P": Role.PREFILL, "D": Role.DECODE, "M": Role.MIXED}
SHAPES = ("PD", "PPD", "PDD", "PPDDD", "PPPPDDDD", "M", "MMM")


def make_states(shape: str, tokens: Sequence[tuple[int, int]] = ()) -> list[ReplicaState]:
    """One replica per letter; ``tokens`` are (prefill, decode) counts of each."""
    states = [ReplicaState(ReplicaInfo(i, ROLES[r], (i,), 1, 1)) for i, r in enumerate(shape)]
    for state, (prefill, decode) in zip(states, tokens, strict=False):
        state.num_prefill_tokens, state.num_decode_tokens = prefill, decode
    return states


def choose(policy: str, states: Sequence[ReplicaState], number: int, prompt: int = 4) -> Choice:
    sampling = SamplingParams(max_tokens=8)
    request = Request(id=f"r{number}", prompt_ids=tuple(range(prompt)), sampling=sampling)
    return POLICIES[policy](PolicyInput(request, states, number))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("PD", [(0, 1), (0, 1), (0, 1)]),
        ("PPD", [(0, 2), (1, 2), (0, 2)]),
        ("PDD", [(0, 1), (0, 2), (0, 1)]),
        ("PPDDD", [(0, 2), (1, 3), (0, 4), (1, 2)]),
        ("MMM", [(0, 0), (1, 1), (2, 2), (0, 0)]),
    ],
)
def test_round_robin_takes_turns(shape: str, expected: list[tuple[int, int]]) -> None:
    states = make_states(shape)
    assert [choose("round-robin", states, i) for i in range(len(expected))] == expected


@pytest.mark.parametrize(
    ("shape", "tokens", "expected"),
    [
        ("PPDD", [(9, 0), (3, 0), (0, 50), (0, 40)], (1, 3)),
        ("PPDD", [(3, 0), (9, 0), (0, 40), (0, 50)], (0, 2)),
        # What the other phase has to do elsewhere does not count.
        ("PPDD", [(3, 99), (9, 0), (99, 40), (0, 50)], (0, 2)),
        # A replica that does both is as busy as both phases make it.
        ("MM", [(0, 30), (20, 0)], (1, 1)),
        ("MM", [(40, 0), (0, 30)], (1, 1)),
    ],
)
@pytest.mark.parametrize("number", range(4))
def test_the_least_loaded_is_chosen_whosever_turn_it_is(
    shape: str, tokens: list[tuple[int, int]], expected: tuple[int, int], number: int
) -> None:
    assert choose("least-num-unfinished-tokens", make_states(shape, tokens), number) == expected


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_replicas_are_chosen_equally_often(policy: str, shape: str) -> None:
    states = make_states(shape)
    choices = [choose(policy, states, i) for i in range(120)]
    for picks, mine in (
        ([c.prefill for c in choices], [s.info.id for s in states if s.prefills]),
        ([c.decode for c in choices], [s.info.id for s in states if s.decodes]),
    ):
        assert Counter(picks) == dict.fromkeys(mine, 120 // len(mine))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(20))
def test_roles_are_kept_and_states_untouched(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    shape = rng.choice(["P" * rng.randint(1, 5) + "D" * rng.randint(1, 5), "M" * rng.randint(1, 6)])
    for number in range(50):
        tokens = [(rng.randrange(3), rng.randrange(3)) for _ in shape]
        states = make_states(shape, tokens)
        prefill, decode = choose(policy, states, number, prompt=rng.randint(1, 50))
        assert states[prefill].prefills
        assert states[decode].decodes
        if states[prefill].decodes:
            assert prefill == decode
        assert states == make_states(shape, tokens)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shape", ["PPPDD", "PDDDD", "MMMM"])
def test_tokens_spread_evenly_over_prompts_of_any_length(shape: str, seed: int) -> None:
    """Nothing finishes: the difference between two replicas is at most one prompt."""
    rng, longest = random.Random(seed), 1000
    states = make_states(shape)
    for number in range(200):
        prompt = rng.randint(1, longest)
        prefill, decode = choose("least-num-unfinished-tokens", states, number, prompt)
        states[prefill].num_prefill_tokens += prompt
        states[decode].num_decode_tokens += prompt
    for counts in (
        [s.num_prefill_tokens for s in states if s.prefills],
        [s.num_decode_tokens for s in states if s.decodes],
    ):
        assert max(counts) - min(counts) <= longest
