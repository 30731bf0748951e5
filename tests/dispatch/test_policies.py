"""Dispatch policies on plain replica states: the right roles, fair turns, even load."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from serve.dispatch.policies import POLICIES, DispatchPolicy, Placement
from serve.dispatch.replica_state import ReplicaState
from serve.request import Request, SamplingParams, pack_ids
from serve.topology import ReplicaInfo, Role

ROLES = {"P": Role.PREFILL, "D": Role.DECODE, "M": Role.MIXED}
SHAPES = ("PD", "PPD", "PDD", "PPDDD", "PPPPDDDD", "M", "MMM")


def make_states(shape: str, tokens: Sequence[tuple[int, int]] = ()) -> list[ReplicaState]:
    """Make one replica for each letter; ``tokens`` are the (prefill, decode) counts of each."""
    states = [ReplicaState(ReplicaInfo(i, ROLES[r], (i,), 1, 1)) for i, r in enumerate(shape)]
    for state, (prefill, decode) in zip(states, tokens, strict=False):
        state.num_prefill_tokens, state.num_decode_tokens = prefill, decode
    return states


def choose(policy: DispatchPolicy, states: Sequence[ReplicaState], prompt: int = 4) -> Placement:
    sampling = SamplingParams(max_tokens=8)
    request = Request(id="r", prompt=pack_ids(range(prompt)), sampling=sampling)
    return policy.choose(request, states)


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
    policy, states = POLICIES["round-robin"](), make_states(shape)
    assert [choose(policy, states) for _ in expected] == expected


@pytest.mark.parametrize(
    ("shape", "tokens", "expected"),
    [
        ("PPDD", [(9, 0), (3, 0), (0, 50), (0, 40)], (1, 3)),
        ("PPDD", [(3, 0), (9, 0), (0, 40), (0, 50)], (0, 2)),
        # Tokens of the phase that a replica does not run do not count.
        ("PPDD", [(3, 99), (9, 0), (99, 40), (0, 50)], (0, 2)),
        # The load of a replica that runs both phases is the sum of both.
        ("MM", [(0, 30), (20, 0)], (1, 1)),
        ("MM", [(40, 0), (0, 30)], (1, 1)),
    ],
)
def test_the_least_loaded_is_chosen_at_every_turn(
    shape: str, tokens: list[tuple[int, int]], expected: tuple[int, int]
) -> None:
    policy = POLICIES["least-num-unfinished-tokens"]()
    for _ in range(4):
        assert choose(policy, make_states(shape, tokens)) == expected


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_replicas_are_chosen_equally_often(name: str, shape: str) -> None:
    policy, states = POLICIES[name](), make_states(shape)
    placements = [choose(policy, states) for _ in range(120)]
    for picks, candidates in (
        ([p.prefill for p in placements], [s.info.id for s in states if s.prefills]),
        ([p.decode for p in placements], [s.info.id for s in states if s.decodes]),
    ):
        assert Counter(picks) == dict.fromkeys(candidates, 120 // len(candidates))


@pytest.mark.parametrize("name", POLICIES)
def test_each_instance_counts_its_own_turns(name: str) -> None:
    first, second, states = POLICIES[name](), POLICIES[name](), make_states("PPPD")
    choose(first, states)
    assert choose(first, states) == (1, 3)
    assert choose(second, states) == (0, 3)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(20))
def test_roles_are_kept_and_states_untouched(name: str, seed: int) -> None:
    policy, rng = POLICIES[name](), random.Random(seed)
    shape = rng.choice(["P" * rng.randint(1, 5) + "D" * rng.randint(1, 5), "M" * rng.randint(1, 6)])
    for _ in range(50):
        tokens = [(rng.randrange(3), rng.randrange(3)) for _ in shape]
        states = make_states(shape, tokens)
        prefill, decode = choose(policy, states, prompt=rng.randint(1, 50))
        assert states[prefill].prefills
        assert states[decode].decodes
        if states[prefill].decodes:
            assert prefill == decode
        assert states == make_states(shape, tokens)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shape", ["PPPDD", "PDDDD", "MMMM"])
def test_tokens_spread_evenly_over_prompts_of_any_length(shape: str, seed: int) -> None:
    """While no request finishes, two replicas differ by at most one prompt."""
    rng, longest = random.Random(seed), 1000
    policy, states = POLICIES["least-num-unfinished-tokens"](), make_states(shape)
    for _ in range(200):
        prompt = rng.randint(1, longest)
        prefill, decode = choose(policy, states, prompt)
        states[prefill].num_prefill_tokens += prompt
        states[decode].num_decode_tokens += prompt
    for counts in (
        [s.num_prefill_tokens for s in states if s.prefills],
        [s.num_decode_tokens for s in states if s.decodes],
    ):
        assert max(counts) - min(counts) <= longest
