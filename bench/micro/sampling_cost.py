"""Measure how long sampling the next tokens of a batch takes, by the requests' parameters.

    python -m bench.micro.sampling_cost [--rows 1 64 256] [--vocab-size 128256]
        [--prompt-tokens 8000]

Biases and bans are as many as a request may have. Prints one JSON object for each kind of sampling
and number of rows: milliseconds from the call to the token ids, milliseconds in which the host was
busy, and the time that the device needs to copy the logits, for comparison. On a CPU a small
vocabulary shows the host's share, because little arithmetic is left beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from serve.device import pick_device
from serve.protocol.plan import SampleRow
from serve.replica.scheduler import Batch, Chunk
from serve.replica.sequence import Sequence as TokenSequence
from serve.replica.step import build_step
from serve.replica.token_ids import TokenIds
from serve.request import MAX_TOKEN_RULES, Request, SamplingParams, pack_ids
from serve.sampling.sampler import sample
from serve.sampling.slots import SamplingSlots
from serve.topology import read_rank_info

NUM_ROUNDS = 20
INPUT_ID = 7
EOS_TOKEN_IDS = (2, 3)
_BIASES: dict[str, Any] = {"logit_bias": {i: i / 1000 for i in range(MAX_TOKEN_RULES)}}
_BANS: dict[str, Any] = {"stop_token_ids": tuple(range(MAX_TOKEN_RULES)), "min_tokens": 1 << 20}
_PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5}
_FILTERS = {"top_k": 50, "top_p": 0.95, "min_p": 0.05}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "top_k, top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "greedy, repetition penalty": {"temperature": 0.0, "repetition_penalty": 1.1},
    "penalties": {"temperature": 1.0, **_PENALTIES},
    "greedy, biases": {"temperature": 0.0, **_BIASES},
    "greedy, bans": {"temperature": 0.0, **_BANS},
    "greedy, biases, bans": {"temperature": 0.0, **_BIASES, **_BANS},
    "all": {"temperature": 0.8, **_FILTERS, **_PENALTIES, **_BIASES, **_BANS},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--prompt-tokens", type=int, default=8000, help="prompt tokens of each row")
    parser.add_argument(
        "--output-tokens", type=int, default=500, help="earlier output tokens of each row"
    )
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND",
        help=f"what the requests ask, from: {'; '.join(KINDS)} (default: all kinds)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    device = pick_device(read_rank_info(os.environ).local_rank)
    rng = random.Random(0)
    for num_rows in args.rows:
        tokens = [
            rng.choices(range(args.vocab_size), k=args.prompt_tokens + args.output_tokens)
            for _ in range(num_rows)
        ]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        logits = torch.randn(num_rows, args.vocab_size, device=device, dtype=dtype) * 3
        copy_ms, _ = _median_ms(logits.clone, device)
        for name in args.kinds:
            run = _sampling(logits, _rows(tokens, args.prompt_tokens, KINDS[name]))
            total_ms, host_ms = _median_ms(run, device)
            found = {"ms": total_ms, "host_ms": host_ms, "copy_of_logits_ms": copy_ms}
            print(json.dumps({"sampling": name, "rows": num_rows} | found), flush=True)


def _rows(
    tokens: list[list[int]], num_prompt_tokens: int, kind: dict[str, Any]
) -> Callable[[], tuple[SampleRow, ...]]:
    """Return a function that plans the rows of the next decode step at each call."""
    sequences = []
    for number, ids in enumerate(tokens):
        sampling = SamplingParams(max_tokens=1 << 20, seed=number, **kind)
        prompt = tuple(ids[:num_prompt_tokens])
        request = Request(id=str(number), prompt=pack_ids(prompt), sampling=sampling)
        token_ids = TokenIds(request.prompt, ids[num_prompt_tokens:])
        sequences.append(TokenSequence(request, number, True, token_ids, num_pending=1))

    def plan() -> tuple[SampleRow, ...]:
        for sequence in sequences:
            sequence.token_ids.append(INPUT_ID)
        chunks = [Chunk(one, len(one.token_ids) - 1, 1, True, None, 0) for one in sequences]
        return build_step(Batch(tuple(chunks), (), ()), EOS_TOKEN_IDS).rows

    return plan


def _sampling(logits: Tensor, rows: Callable[[], Sequence[SampleRow]]) -> Callable[[], object]:
    input_ids = torch.full((len(logits),), INPUT_ID, device=logits.device)
    slots = SamplingSlots(len(logits), logits.device)
    if not logits.is_cuda:
        return lambda: sample(logits.clone(), slots.place(rows()), input_ids, slots)
    from serve.sampling.gpu_sampler import GpuSampler

    tokens, sampler = torch.empty_like(input_ids), GpuSampler(slots)
    return lambda: sampler.sample(logits, slots.place(rows()), input_ids, tokens)


@torch.inference_mode()
def _median_ms(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the median times until ``run`` is complete and until it has returned."""
    totals, hosts = [], []
    for _ in range(NUM_ROUNDS + 3):
        started_s = time.perf_counter()
        run()
        returned_s = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        totals.append(1e3 * (time.perf_counter() - started_s))
        hosts.append(1e3 * (returned_s - started_s))
    return statistics.median(totals[3:]), statistics.median(hosts[3:])


if __name__ == "__main__":
    main()
