"""Writes a trace of text prompts with Poisson times, which other load generators can replay, too.

    python -m bench.load.text_trace TOKENIZER OUT.jsonl --rate 8 --num-requests 560 \\
        --input-len 2000 --output-len 128

For comparing load generators: both send the same prompts at the same times. One line is read by
``bench.serve --workload prompts --arrivals trace`` and by guidellm's ``replay`` profile.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

_WORD = re.compile(
    r"Ġ[A-Za-z]{2,}"
)  # a whole word with the blank before it, as byte-level BPE says


def lines(
    tokenizer: Any, rate: float, num_requests: int, input_len: int, output_len: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Prompts of random words of one token each, so that a text has exactly ``input_len`` tokens.

    ``ValueError`` if the tokenizer joins words in another way.
    """
    words = sorted(token[1:] for token in tokenizer.get_vocab() if _WORD.fullmatch(token))
    rng = random.Random(seed)
    time_s = 0.0
    for _ in range(num_requests):
        prompt = "".join(f" {rng.choice(words)}" for _ in range(input_len))
        if len(tokenizer.encode(prompt, add_special_tokens=False)) != input_len:
            raise ValueError("this tokenizer does not keep a word with its blank as one token")
        yield {
            "prompt": prompt,
            "timestamp": round(time_s * 1e3, 6),  # milliseconds: bench.serve
            "output_len": output_len,
            "relative_timestamp": round(time_s, 9),  # seconds: guidellm
            "prompt_tokens_count": input_len,
            "output_tokens_count": output_len,
        }
        time_s += rng.expovariate(rate)


def main() -> None:
    """Write the trace that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="a directory")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rate", type=float, required=True, help="requests per second")
    parser.add_argument("--num-requests", type=int, required=True)
    parser.add_argument("--input-len", type=int, required=True)
    parser.add_argument("--output-len", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    lengths = (args.num_requests, args.input_len, args.output_len)
    with args.output.open("w", encoding="utf-8") as file:
        for line in lines(tokenizer, args.rate, *lengths, args.seed):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
