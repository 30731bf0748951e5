"""Serve full steps of prompts and of decodes; fail if torch allocates more memory meanwhile.

python -m tests.support.memory_growth MODEL
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from serve.llm import LLM
from serve.request import SamplingParams

LENGTHS = [1, 2, 40, 700, 8191, 12000] * 40
SAMPLING = [
    SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=0.8, ignore_eos=True),
    SamplingParams(max_tokens=31, temperature=1.2, top_p=0.9, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=17, top_k=40, min_p=0.02, repetition_penalty=1.1, ignore_eos=True),
    SamplingParams(max_tokens=25, presence_penalty=0.5, logit_bias={7: 2.0}, ignore_eos=True),
]


def main() -> None:
    """Serve with random weights and compare the numbers of allocations before and after."""
    rng = random.Random(37)
    prompts = [[rng.randrange(128256) for _ in range(length)] for length in LENGTHS]
    sampling = [rng.choice(SAMPLING) for _ in prompts]
    options: dict[str, Any] = {"load_format": "dummy", "tokenizer": "none", "max_model_len": 12100}
    with LLM(model=sys.argv[1], **options) as llm:
        before = _counts()
        llm.generate(prompts, sampling, progress=False)
        after = _counts()
    print(f"allocations from the driver, of device and pinned memory: {before}, then {after}")
    if after != before:
        sys.exit(1)


def _counts() -> tuple[int, int]:
    device, pinned = torch.cuda.memory_stats(), torch.cuda.host_memory_stats()
    return device["num_device_alloc"], pinned["num_host_alloc"]


if __name__ == "__main__":
    main()
