"""Write a trace of text prompts with Poisson times, which other load generators can replay.

    python -m bench.load.text_trace TOKENIZER OUT.jsonl --rate 8 --num-requests 560
        --input-len 2000 --output-len 128

Its purpose is to compare load generators: both send the same prompts at the same times. The file
is read by ``bench.serve --workload prompts --arrivals trace`` and by guidellm's ``replay`` profile.
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

# A whole word with the blank before it, as byte-level BPE writes it.
_WORD = re.compile(r"Ġ[A-Za-z]{2,}")


def lines(
    tokenizer: Any, rate: float, num_requests: int, input_len: int, output_len: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield the trace. A prompt has ``input_len`` random words that are one token each.

    Raises ``ValueError`` if the tokenizer splits or joins these words, because the prompt's length
    would then differ.
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="directory of a tokenizer")
    parser.add_argument("output", type=Path, help="the file to write")
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
