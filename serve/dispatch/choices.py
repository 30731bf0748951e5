"""Group the requests of a call into choices of one prompt, which travel in one message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec.structs import astuple, replace

from serve.request import Request, SamplingParams


def group_choices(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Yield runs of ``requests`` that differ in nothing but their id and seed."""
    run: list[Request] = []
    for request in requests:
        if run and not _are_choices(run[0], request):
            yield run
            run = []
        run.append(request)
    if run:
        yield run


def _are_choices(first: Request, other: Request) -> bool:
    return first.prompt == other.prompt and _same_but_seed(first.sampling, other.sampling)


def _same_but_seed(first: SamplingParams, other: SamplingParams) -> bool:
    # Choices of a call share the values of all other fields. Tuples compare identical elements
    # without looking into them, so a long logit_bias costs nothing.
    return astuple(first) == astuple(replace(other, seed=first.seed))
