"""The offline face: the same engine and the same split, for a batch of prompts instead of HTTP.

    torchrun --standalone --nproc-per-node 2 -m serve.llm --prompts prompts.jsonl --output out.jsonl

or in a script that torchrun starts on every rank::

    with LLM(model="path/to/model") as llm:      # ranks other than 0 work here, and end here
        for completion in llm.generate(["Once upon a time"], max_tokens=32):
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

from serve.api.prompt_file import FilePrompt, PromptFileError, read_prompt_file
from serve.config.server import ConfigError, parse_args
from serve.dispatch.metrics import Metrics
from serve.dispatch.service import Service, Stream
from serve.request import FinishReason, Request, SamplingParams
from serve.runtime.logs import start_logging
from serve.runtime.rank import RankProcess, join_job
from serve.runtime.server import follow, run_to_end
from serve.runtime.shutdown import die_with_parent, exit_now
from serve.runtime.startup import fit_max_model_len, make_front
from serve.tokenizer.tokenizer import Tokenizer
from serve.topology import read_rank_info

T = TypeVar("T")


class Completion(msgspec.Struct, frozen=True):
    """What became of one prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class LLM:
    """A job of all ranks, driven by rank 0.

    Options are the server's, as keywords: ``LLM(model=..., replica_spec=["1,1", "2,1"])``, or as an
    ``argv``. On rank 0 the constructor returns when every rank is ready. On the others it works
    until rank 0 closes, and then ends the process. ``ValueError`` for options and models that
    cannot be served.
    """

    def __init__(self, argv: Sequence[str] = (), **options: Any) -> None:
        die_with_parent()
        rank_info = read_rank_info(os.environ)
        config = parse_args([*argv, *to_argv(options)], rank_info.world_size)
        self.config = replace(config, max_waiting=sys.maxsize)  # a batch waits as long as it must
        start_logging(self.config, rank_info)
        self._loop = uvloop.new_event_loop()
        self._closing = asyncio.Event()

        async def make() -> RankProcess:
            return join_job(self.config, rank_info)

        self._node = self._loop.run_until_complete(make())
        if rank_info.rank != 0:
            exit_now(self._loop.run_until_complete(run_to_end(self._node, follow(self._node))))
        self._tokenizer: Tokenizer | None = None
        self._job = self._loop.create_task(self._node.run(self._lead()))
        self._ready: asyncio.Future[Service] = self._loop.create_future()
        self._service = self._wait(self._ready)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        max_tokens: int = 16,
        progress: bool = True,
    ) -> list[Completion]:
        """The completions of ``prompts`` (text or token ids), in their order.

        ``sampling`` for all or one for each; without it greedy, ``max_tokens`` long, with the
        repetition penalty that the model comes with.
        """
        if sampling is None:
            defaults = self.config.sampling_defaults
            sampling = defaults.params(max_tokens=max_tokens, temperature=0.0)
        if isinstance(sampling, SamplingParams):
            sampling = [sampling] * len(prompts)
        if len(sampling) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(sampling)} sampling parameters")
        requests = [self._request(p, s) for p, s in zip(prompts, sampling, strict=True)]
        with tqdm(total=len(requests), unit="prompt", disable=not progress) as bar:
            return self._wait(self._generate(requests, bar))

    def close(self) -> None:
        """End the job on all ranks. Again: nothing."""
        if not self._job.done():
            self._closing.set()
            self._loop.run_until_complete(self._job)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def _lead(self) -> None:
        process, config = self._node, self.config
        front = make_front(
            config, process.topology, Metrics(config.served_model_names[0]), process.channel.send
        )
        process.tell_front = front.on_message
        self._tokenizer = await process.load_tokenizer()
        await process.load(self._tokenizer, lambda done, total: None)
        num_blocks = await front.gather()
        front.service.set_ready(fit_max_model_len(config, process.setup.block_size, num_blocks))
        self._ready.set_result(front.service)
        await self._closing.wait()
        await process.leave()

    def _request(self, prompt: str | Sequence[int], sampling: SamplingParams) -> Request:
        ids = self._encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        vocab_size = self.config.model_config.vocab_size
        if not ids or not all(0 <= token_id < vocab_size for token_id in ids):
            raise ValueError(f"a prompt must have token ids in [0, {vocab_size})")
        room = self._service.max_model_len - len(ids)
        if room < 1:
            raise ValueError(f"a prompt of {len(ids)} tokens; contexts hold {len(ids) + room}")
        sampling = msgspec.structs.replace(sampling, max_tokens=min(sampling.max_tokens, room))
        return Request(id=uuid.uuid4().hex, prompt_ids=ids, sampling=sampling)

    def _encode(self, prompt: str) -> tuple[int, ...]:
        if self._tokenizer is None:
            raise ValueError("without a tokenizer prompts must be token ids")
        return tuple(self._tokenizer.encode(prompt))

    async def _generate(self, requests: list[Request], bar: tqdm[Any]) -> list[Completion]:
        streams = self._service.submit(requests)
        return list(await asyncio.gather(*(_collect(stream, bar) for stream in streams)))

    def _wait(self, work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T:
        """Run the loop until ``work`` is done; raise what ended the job if that comes first."""
        future = asyncio.ensure_future(work, loop=self._loop)
        both = asyncio.wait((future, self._job), return_when=asyncio.FIRST_COMPLETED)
        self._loop.run_until_complete(_no_args(both))
        if self._job.done():
            future.cancel()
            self._job.result()
            raise RuntimeError("the job is closed")
        return future.result()


async def _no_args(waiting: Coroutine[Any, Any, Any]) -> None:
    await waiting


async def _collect(stream: Stream, bar: tqdm[Any]) -> Completion:
    token_ids: tuple[int, ...] = ()
    text = ""
    async for output in stream:
        token_ids += output.token_ids
        text += output.text
        if output.finish_reason is not None:
            bar.update()
            return Completion(text, token_ids, output.finish_reason)
    raise RuntimeError(f"request {stream.request.id} ended without a reason")


def to_argv(options: dict[str, Any]) -> list[str]:
    """Keywords as the command line would have them; None and False are left out."""
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
    except (ConfigError, PromptFileError) as error:
        if read_rank_info(os.environ).rank != 0:
            exit_now(0)  # all ranks find the same error, and rank 0 prints it
        print(f"serve: error: {error}", file=sys.stderr)
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
