"""Requests with penalties over many steps, and their expected logits by plain counting."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.protocol.plan import SampleRow
from serve.request import Request, SamplingParams, pack_ids
from serve.sampling.slots import SamplingSlots


@dataclass
class Case:
    """A request and its tokens so far: prompt and output."""

    request: Request
    token_ids: list[int]

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_ids) :]

    def row(self, rng: random.Random) -> SampleRow:
        """Return the row that samples the next token. The host may not know the newest one."""
        known = self.token_ids[: rng.choice([-1, None])] if self.output_ids else self.token_ids
        return SampleRow(self.request, len(self.output_ids), token_ids=list(known))

    def penalised(self, logits: Tensor) -> Tensor:
        """Penalise all earlier tokens of the case: ``[vocab_size]``, float64."""
        values, sampling = logits.double(), self.request.sampling
        for token in set(self.token_ids):
            factor = sampling.repetition_penalty
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        for token in set(self.output_ids):
            count = self.output_ids.count(token)
            values[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
        return values


def random_case(rng: random.Random, number: int, vocab_size: int) -> Case:
    """Make a new request, or one that arrives with output from another replica."""
    prompt = tuple(rng.choices(range(vocab_size), k=rng.randrange(1, 60)))
    sampling = SamplingParams(
        max_tokens=1000,
        presence_penalty=rng.choice([0.0, 0.7]),
        frequency_penalty=rng.choice([0.0, -0.4]),
        repetition_penalty=rng.choice([1.0, 1.3, 0.8]),
    )
    request = Request(id=str(number), prompt=pack_ids(prompt), sampling=sampling)
    return Case(request, [*prompt, *rng.choices(prompt, k=rng.choice([0, 0, 1, 5]))])


def steps(
    rng: random.Random,
    slots: SamplingSlots,
    max_num_rows: int,
    vocab_size: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits changed by ``slots`` and the expected ones, ``[num_rows, vocab_size]``.

    Requests come and go and pause for some steps. There are more of them than slots, and some
    continue from another output index than the counts expect.
    """
    numbers = iter(range(10**6))
    cases = [random_case(rng, next(numbers), vocab_size) for _ in range(2 * max_num_rows)]
    for _ in range(60):
        chosen = rng.sample(cases, rng.randrange(1, max_num_rows + 1))
        logits = torch.randn(len(chosen), vocab_size) * 3
        newest = torch.tensor([case.token_ids[-1] for case in chosen])
        changed = logits.to(device, copy=True)
        rows = [case.row(rng) for case in chosen]
        slots.adjust(changed, slots.place(rows), newest.to(device))
        expected = [case.penalised(row) for case, row in zip(chosen, logits, strict=True)]
        yield changed.cpu(), torch.stack(expected)
        for case in chosen:
            for _ in range(rng.choice([0, 1, 1, 1, 1, 2])):
                case.token_ids.append(rng.choice([rng.randrange(vocab_size), case.token_ids[0]]))
        if rng.random() < 0.3:
            cases[rng.randrange(len(cases))] = random_case(rng, next(numbers), vocab_size)
