"""Offline generation: the engine and replicas of the server, for a batch of prompts, no HTTP.

    torchrun --standalone --nproc-per-node 2 -m serve.llm --prompts prompts.jsonl --output out.jsonl

or in a script that torchrun starts on every rank::

    with LLM(model="path/to/model") as llm:      # only rank 0 continues after this line
        for completion in llm.generate(["Once upon a time"], max_tokens=32, temperature=0.7):
            print(completion.text)
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import uvloop
from tqdm import tqdm

from serve.api.prompt_file import DEFAULT_MAX_TOKENS, FilePrompt, read_prompt_file
from serve.api.sampling_params import sampling_from_keywords
from serve.config.server import ConfigError, ServerConfig, parse_args
from serve.dispatch.service import Stream
from serve.request import FinishReason, Request, SamplingParams, pack_ids
from serve.runtime.failure import first_leaf
from serve.runtime.join import join_job, report_start_error
from serve.runtime.logs import start_logging
from serve.runtime.rank import RankProcess
from serve.runtime.server import run_to_end, work_until_dismissed
from serve.runtime.shutdown import die_with_parent, exit_now
from serve.runtime.startup import FrontEnd, serving_front_end
from serve.topology import RankInfo, read_rank_info

T = TypeVar("T")

# A batch has no latency to protect. In simulated batches of equal prompts on a small pool this took
# 10 to 40 % fewer steps than 1, for up to 2.5 times the tokens of the prompts computed again.
BATCH_OVERCOMMIT = 8.0


class Completion(msgspec.Struct, frozen=True):
    """The answer to one prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class LLM:
    """A job of all ranks, which rank 0 controls.

    The options are those of the server, as keywords (``LLM(model=..., replica_spec=["1,1",
    "2,1"])``) or as an ``argv``. On rank 0 the constructor returns when every rank is ready. On the
    other ranks it never returns: they work until rank 0 calls ``close`` and then end the process.
    Raises ``ValueError`` with one line for options and models that cannot be served, and
    ``JobFailed`` from any method if the job ends with a failure.
    """

    def __init__(self, argv: Sequence[str] = (), **options: Any) -> None:
        die_with_parent()
        rank_info = read_rank_info(os.environ)
        config = _parse([*argv, *to_argv(options)], rank_info)
        # No limit: a batch waits.
        self.config = replace(
            config,
            max_waiting=sys.maxsize,
            max_waiting_tokens=sys.maxsize,
            max_waiting_share=1.0,
            kv_overcommit=config.kv_overcommit or BATCH_OVERCOMMIT,
        )
        start_logging(self.config, rank_info)
        self._loop = uvloop.new_event_loop()
        self._closing = asyncio.Event()

        process = self._loop.run_until_complete(_join(self.config, rank_info))
        if rank_info.rank != 0:
            main = work_until_dismissed(process)
            exit_now(self._loop.run_until_complete(run_to_end(process, main)))
        self._ready: asyncio.Future[FrontEnd] = self._loop.create_future()
        self._job = self._loop.create_task(self._serve(process))
        self._front_end = self._wait(self._ready)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        **fields: Any,
    ) -> list[Completion]:
        """Complete ``prompts`` (text or token ids) and return the completions in their order.

        ``sampling`` is for all prompts, or has one entry for each. Without it, ``fields`` are the
        sampling fields of ``/v1/completions`` (``max_tokens``, ``temperature``, ``top_p``,
        ``seed``, ``stop``, ...). The default of ``max_tokens`` is what the model
        recommends, or else 16. The default of
        ``temperature`` is 0, which is greedy; ``temperature=None`` stands for the value that the
        model recommends. All other fields default to what the model recommends.

        Raises ``TypeError`` for an unknown field, and ``ValueError`` for a prompt or a field that
        is out of range. Both name it.
        """
        if sampling is None:
            sampling = self._read_sampling(fields)
        elif fields:
            raise TypeError(f"{min(fields)!r} is given beside sampling: give only one of both")
        if isinstance(sampling, SamplingParams):
            sampling = [sampling] * len(prompts)
        if len(sampling) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(sampling)} sampling parameters")
        requests = [self._request(p, s) for p, s in zip(prompts, sampling, strict=True)]
        with tqdm(total=len(requests), unit="prompt", disable=not progress) as bar:
            return self._wait(self._generate(requests, bar))

    def close(self) -> None:
        """End the job on all ranks. Does nothing if it has ended."""
        if not self._job.done():
            self._closing.set()
            self._wait(self._job)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def _serve(self, process: RankProcess) -> None:
        async with serving_front_end(process) as front_end:
            await front_end.get_ready()
            self._ready.set_result(front_end)
            await self._closing.wait()

    def _read_sampling(self, fields: dict[str, Any]) -> SamplingParams:
        return sampling_from_keywords(
            {"temperature": 0.0} | fields,
            self.config.sampling_defaults,
            max_tokens=DEFAULT_MAX_TOKENS,
            vocab_size=self.config.model_config.vocab_size,
            has_tokenizer=self._front_end.tokenizer is not None,
        )

    def _request(self, prompt: str | Sequence[int], sampling: SamplingParams) -> Request:
        ids = self._encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        vocab_size = self.config.model_config.vocab_size
        if not ids or not all(0 <= token_id < vocab_size for token_id in ids):
            raise ValueError(f"a prompt must have token ids in [0, {vocab_size})")
        room = self._front_end.service.max_model_len - len(ids)
        if room < 1:
            limit = self._front_end.service.max_model_len
            raise ValueError(f"a prompt of {len(ids)} tokens; contexts hold {limit}")
        max_tokens = min(sampling.max_tokens, room)
        min_tokens = min(sampling.min_tokens, max_tokens)
        sampling = msgspec.structs.replace(sampling, max_tokens=max_tokens, min_tokens=min_tokens)
        return Request(id=uuid.uuid4().hex, prompt=pack_ids(ids), sampling=sampling)

    def _encode(self, prompt: str) -> tuple[int, ...]:
        if self._front_end.tokenizer is None:
            raise ValueError("without a tokenizer prompts must be token ids")
        return tuple(self._front_end.tokenizer.encode(prompt))

    async def _generate(self, requests: list[Request], bar: tqdm[Any]) -> list[Completion]:
        streams = self._front_end.service.submit(requests)
        return list(await asyncio.gather(*(_collect(stream, bar) for stream in streams)))

    def _wait(self, work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T:
        """Run the loop until ``work`` is done, and return its result.

        Raises the job's exception if the job ends first.
        """
        future = asyncio.ensure_future(work, loop=self._loop)
        both = asyncio.wait((future, self._job), return_when=asyncio.FIRST_COMPLETED)
        self._loop.run_until_complete(both)
        if self._job.done() and (error := self._job.exception()) is not None:
            future.cancel()
            raise first_leaf(error)
        if self._job.done() and future is not self._job:
            future.cancel()
            raise RuntimeError("the job is closed")
        return future.result()


async def _join(config: ServerConfig, rank_info: RankInfo) -> RankProcess:
    try:
        return join_job(config, rank_info)
    except ValueError:
        if rank_info.rank == 0:
            raise
        exit_now(2)  # rank 0 raises the error


def _parse(argv: list[str], rank_info: RankInfo) -> ServerConfig:
    try:
        return parse_args(argv, rank_info.world_size)
    except ConfigError as error:
        if rank_info.rank != 0:
            report_start_error(rank_info, str(error))
        raise


async def _collect(stream: Stream, bar: tqdm[Any]) -> Completion:
    token_ids: list[int] = []
    texts: list[str] = []  # joined at the end, because adding to a tuple or text copies all of it
    async for output in stream:
        token_ids += output.token_ids
        texts.append(output.text)
        if output.finish_reason is not None:
            bar.update()
            return Completion("".join(texts), tuple(token_ids), output.finish_reason)
    raise RuntimeError(f"request {stream.request.id} ended without a reason")


def to_argv(options: dict[str, Any]) -> list[str]:
    """Return the command line for keyword ``options``; None and False are left out."""
    argv: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        argv.append("--" + name.replace("_", "-"))
        if value is not True:
            values = value if isinstance(value, list | tuple) else [value]
            argv += map(str, values)
    return argv


def main() -> None:
    """Read prompts from a JSONL file and write their completions, one JSON object a line."""
    parser = argparse.ArgumentParser(
        prog="serve.llm", description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False, epilog="All other options are those of serve.launch.",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=Path, required=True,
        help="JSONL: prompt (text or token ids), and sampling parameters as in /v1/completions",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSONL, in the same order; else stdout")
    args, rest = parser.parse_known_args()
    try:
        prompts = read_prompt_file(args.prompts)
        sampling = _sampling_params(prompts, rest)
        llm = LLM(rest)
    except ValueError as error:
        rank_info = read_rank_info(os.environ)
        if rank_info.rank == 0:
            print(f"serve: error: {error}", file=sys.stderr)
        else:
            report_start_error(rank_info, str(error))
        exit_now(2)
    with llm:
        completions = llm.generate([prompt.line.prompt for prompt in prompts], sampling)
    text = b"".join(msgspec.json.encode(completion) + b"\n" for completion in completions)
    if args.output is None:
        sys.stdout.buffer.write(text)
    else:
        args.output.write_bytes(text)
    exit_now(0)


def _sampling_params(prompts: Sequence[FilePrompt], argv: Sequence[str]) -> list[SamplingParams]:
    """Check the prompts against the model's configuration, before its weights are loaded."""
    config = parse_args(argv, read_rank_info(os.environ).world_size)
    return [
        prompt.sampling_params(
            config.sampling_defaults,
            vocab_size=config.model_config.vocab_size,
            has_tokenizer=config.tokenizer is not None,
        )
        for prompt in prompts
    ]


if __name__ == "__main__":
    main()
