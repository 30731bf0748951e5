"""A tiny OpenAI-compatible server for sweeps to start: it streams, and fails in the ways asked for.

python tests/support/fake_openai.py --port 8000 [--refuse | --die | --hold-after N FIFO]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path

from aiohttp import web

DIED = 3


class Fake:
    """What the command line asked for, and how many requests have come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._num_requests = 0

    async def health(self, http: web.Request) -> web.Response:
        return web.Response()

    async def models(self, http: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def complete(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self._num_requests += 1
        if self._args.die:
            print("out of luck", flush=True)
            os._exit(DIED)
        if self._args.refuse:
            return web.json_response({"error": {"message": "never"}}, status=503)
        await self._hold()
        response = web.StreamResponse()
        await response.prepare(http)
        for count in range(1, body["max_tokens"] + 1):
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
            chunk = {"choices": [{"index": 0, "text": "x"}], "usage": usage}
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await response.write_eof(b"data: [DONE]\n\n")
        return response

    async def _hold(self) -> None:
        """While the FIFO is there: tell it who we are, and never answer."""
        if self._args.hold_after is None:
            return
        after, fifo = int(self._args.hold_after[0]), Path(self._args.hold_after[1])
        number = self._num_requests
        if number > after and await asyncio.to_thread(fifo.exists):
            if number == after + 1:
                await asyncio.to_thread(fifo.write_text, str(os.getpid()))
            await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--refuse", action="store_true")
    parser.add_argument("--die", action="store_true")
    parser.add_argument("--hold-after", nargs=2, metavar=("N", "FIFO"))
    args = parser.parse_args()
    fake = Fake(args)
    app = web.Application()
    app.router.add_get("/health", fake.health)
    app.router.add_get("/v1/models", fake.models)
    app.router.add_post("/v1/completions", fake.complete)
    # Requests that are held would hold up its end, too.
    web.run_app(app, host="127.0.0.1", port=args.port, print=None, shutdown_timeout=0.1)


if __name__ == "__main__":
    main()
