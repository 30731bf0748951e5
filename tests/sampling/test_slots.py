"""The state of requests by slot: right in every step, and free of host work that users choose."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from serve import device
from serve.protocol.plan import SampleRow
from serve.replica.scheduler import Batch, Chunk
from serve.replica.sequence import Sequence
from serve.replica.step import build_step
from serve.replica.token_ids import TokenIds
from serve.request import Request, SamplingParams, pack_ids
from serve.sampling import token_rules
from serve.sampling.sampler import sample
from serve.sampling.slots import SamplingSlots

VOCAB = 300
CPU = torch.device("cpu")
END_IDS = (1, 2)


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print("seed", seed)
    torch.manual_seed(seed)
    return random.Random(seed)


def _request(name: object, **sampling: Any) -> Request:
    params = SamplingParams(max_tokens=10**6, **sampling)
    return Request(id=str(name), prompt=pack_ids((3, 4, 5)), sampling=params)


def _random_request(rng: random.Random, name: object) -> Request:
    def some_ids(most: int) -> list[int]:
        return rng.sample(range(VOCAB), rng.randrange(most))

    return _request(
        name,
        seed=rng.randrange(2**63),
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_k=rng.choice([0, 0, 5]),
        top_p=rng.choice([1.0, 1.0, 0.8]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        logit_bias={token: rng.uniform(-9, 9) for token in some_ids(rng.choice([1, 3, 200]))},
        stop_token_ids=tuple(2 * some_ids(rng.choice([1, 3, 200]))),
        min_tokens=rng.choice([0, 0, 3, 30]),
    )


@dataclass
class Running:
    """A request and its output so far."""

    request: Request
    output_ids: list[int] = field(default_factory=list)

    @property
    def row(self) -> SampleRow:
        token_ids = [*self.request.prompt_ids, *self.output_ids]
        return SampleRow(self.request, len(self.output_ids), END_IDS, token_ids)

    @property
    def newest(self) -> int:
        return self.row.token_ids[-1]


def _sample(slots: SamplingSlots, logits: Tensor, running: list[Running]) -> list[int]:
    input_ids = torch.tensor([one.newest for one in running])
    placed = slots.place([one.row for one in running])
    ids: list[int] = sample(logits, placed, input_ids, slots).tolist()
    return ids


def _adjusted(slots: SamplingSlots, rows: list[SampleRow]) -> Tensor:
    """Return how the logits of rows without penalties change from 0."""
    logits = torch.zeros(len(rows), VOCAB)
    slots.adjust(logits, slots.place(rows), torch.zeros(len(rows), dtype=torch.int64))
    return logits


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [1, 2, 7])
def test_requests_that_come_and_go_get_the_tokens_that_they_get_alone(
    num_slots: int, rng: random.Random
) -> None:
    """More requests than slots: they pause, lose their slots, end, and their slots are reused."""
    slots = SamplingSlots(num_slots, CPU)
    running = [Running(_random_request(rng, number)) for number in range(2 * num_slots)]
    for step in range(60):
        chosen = rng.sample(running, rng.randrange(1, num_slots + 1))
        logits = torch.randn(len(chosen), VOCAB) * 3
        alone = [
            _sample(SamplingSlots(1, CPU), row[None].clone(), [one])[0]
            for row, one in zip(logits, chosen, strict=True)
        ]
        assert _sample(slots, logits, chosen) == alone
        for one, token in zip(chosen, alone, strict=True):
            one.output_ids.append(token)
        if rng.random() < 0.3:
            running[rng.randrange(len(running))] = Running(_random_request(rng, f"new {step}"))


def test_bans_end_at_min_tokens_and_biases_do_not() -> None:
    request = _request(0, logit_bias={2: 4.0, 7: 3.0}, stop_token_ids=(9, 2, 9), min_tokens=2)
    slots = SamplingSlots(1, CPU)
    for index in range(4):
        expected = torch.zeros(VOCAB)
        expected[[2, 7]] = torch.tensor([4.0, 3.0])
        if index < 2:
            expected[[1, 2, 9]] = -math.inf
        assert torch.equal(_adjusted(slots, [SampleRow(request, index, END_IDS)])[0], expected)


def test_stop_tokens_without_min_tokens_are_not_banned() -> None:
    request = _request(0, stop_token_ids=(9,))
    assert not _adjusted(SamplingSlots(1, CPU), [SampleRow(request, 0, END_IDS)]).any()


def test_an_end_token_beyond_the_vocabulary_is_ignored() -> None:
    rows = [SampleRow(_request(number, min_tokens=1), 0, (VOCAB + 1, 4)) for number in range(2)]
    changed = _adjusted(SamplingSlots(2, CPU), rows)
    assert changed.isinf().nonzero().tolist() == [[0, 4], [1, 4]]


def test_a_request_with_the_id_of_an_earlier_one_has_its_own_parameters() -> None:
    slots = SamplingSlots(3, CPU)
    first = SampleRow(_request("same", logit_bias={5: 1.0}), 0)
    second = SampleRow(_request("same", logit_bias={6: 2.0}), 0)
    for rows in ([first], [second], [first, second], [second, first]):
        changed = _adjusted(slots, rows)
        for row, values in zip(rows, changed, strict=True):
            assert values.nonzero()[:, 0].tolist() == [*row.request.sampling.logit_bias]


def test_the_request_that_was_sampled_last_keeps_its_slot() -> None:
    slots = SamplingSlots(2, CPU)
    a, b, c = (SampleRow(_request(number), 0) for number in range(3))
    first = slots.place([a, b]).slots.tolist()
    slots.place([b])
    assert slots.place([c, b]).slots.tolist() == first
    assert slots.place([b, a]).slots.tolist() == [first[1], first[0]]


def test_more_rows_than_slots_are_refused() -> None:
    rows = [SampleRow(_request(number), 0) for number in range(3)]
    with pytest.raises(ValueError, match="more rows than the 2 sampling slots"):
        SamplingSlots(2, CPU).place(rows)


@pytest.mark.parametrize("max_num_cells", [1, 300, 1000])
def test_long_lists_are_written_in_parts(
    max_num_cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_rules, "_MAX_CELLS", max_num_cells)
    slots = SamplingSlots(5, CPU)
    for longest in (10, 299):  # the second time the memory grows
        biases = [{token: float(token) for token in range(1, longest - i)} for i in range(5)]
        rows = [SampleRow(_request((longest, i), logit_bias=biases[i]), 0) for i in range(5)]
        for values, bias in zip(_adjusted(slots, rows), biases, strict=True):
            assert {i: float(values[i]) for i in values.nonzero()[:, 0].tolist()} == bias


# --- host work ----------------------------------------------------------------------------------


@dataclass
class Work:
    """What the host did: Python instructions, copies to the device and their bytes."""

    num_instructions: int = 0
    copies: list[int] = field(default_factory=list)


def _measure(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Work:
    work, copy = Work(), device._copy

    def note(tensor: Tensor, target: torch.device) -> Tensor:
        work.copies.append(tensor.nbytes)
        return copy(tensor, target)

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        work.num_instructions += event == "opcode"
        return trace

    with monkeypatch.context() as patched:
        patched.setattr(device, "_copy", note)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            run()
        finally:
            sys.settrace(before)
    return work


def _steady_step(num_rows: int, prompt_length: int, **sampling: Any) -> Callable[[], object]:
    """Return a function that plans and samples the next step of requests that have slots."""
    prompt = tuple(range(3, 3 + prompt_length))
    params = [SamplingParams(max_tokens=10**6, seed=i, **sampling) for i in range(num_rows)]
    sequences = [
        Sequence(
            Request(id=str(i), prompt=pack_ids(prompt), sampling=one),
            i,
            True,
            TokenIds(pack_ids(prompt)),
        )
        for i, one in enumerate(params)
    ]
    slots = SamplingSlots(num_rows, CPU)

    def run() -> None:
        chunks = [Chunk(one, len(one.token_ids) - 1, 1, True, None, 0) for one in sequences]
        rows = build_step(Batch(tuple(chunks), (), ()), END_IDS).rows
        input_ids = torch.full((num_rows,), 3)
        sample(torch.zeros(num_rows, 5000), slots.place(rows), input_ids, slots)

    for _ in range(2):
        for sequence in sequences:
            sequence.num_pending = 1
        run()
        for sequence in sequences:
            sequence.token_ids.append(3)
    return run


FEW: dict[str, dict[str, Any]] = {
    "biases": {"logit_bias": {0: 1.0}},
    "stop ids": {"stop_token_ids": (0,), "min_tokens": 9},
    "penalties": {"frequency_penalty": 0.5},
    "all": {"logit_bias": {0: 1.0}, "stop_token_ids": (1,), "min_tokens": 9, "top_p": 0.9,
            "presence_penalty": 0.5},
}  # fmt: skip
MANY: dict[str, dict[str, Any]] = {
    "biases": {"logit_bias": {token: 1.0 for token in range(1024)}},
    "stop ids": {"stop_token_ids": tuple(range(1024)), "min_tokens": 1 << 30},
    "penalties": {"frequency_penalty": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.1},
    "all": {"logit_bias": {token: 1.0 for token in range(1024)}, "min_tokens": 1 << 30,
            "stop_token_ids": tuple(range(1000, 2024)), "top_p": 0.8, "top_k": 40, "min_p": 0.1,
            "presence_penalty": 0.7, "repetition_penalty": 1.2},
}  # fmt: skip


@pytest.mark.parametrize("kind", FEW)
def test_host_work_does_not_grow_with_what_is_asked(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same instructions and bytes for one entry as for the most, and for any prompt."""
    few = _measure(_steady_step(16, 4, **FEW[kind]), monkeypatch)
    many = _measure(_steady_step(16, 4000, **MANY[kind]), monkeypatch)
    assert few.copies == many.copies
    # "all" has a few instructions of its own for min_p, and they differ between versions of torch.
    # One more for each of 1,024 entries would be ten times the limit.
    assert abs(few.num_instructions - many.num_instructions) < 100


def test_host_work_of_a_row_is_small_and_the_same_for_all_kinds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside a constant for the step, a row costs what a row without any parameter costs."""

    def per_row(**sampling: Any) -> tuple[float, float]:
        one, other = (_measure(_steady_step(rows, 4, **sampling), monkeypatch) for rows in (20, 60))
        num_instructions = (other.num_instructions - one.num_instructions) / 40
        return num_instructions, (sum(other.copies) - sum(one.copies)) / 40

    plain, plain_bytes = per_row()
    everything, its_bytes = per_row(**MANY["all"])
    assert everything < 1.5 * plain
    assert its_bytes < plain_bytes + 100
