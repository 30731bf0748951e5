"""A small OpenAI-compatible server for tests of sweeps: it streams, or fails as its options say.

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
    """The handlers of the server, which share its options and a count of requests."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._num_requests = 0
        self._has_written_pid = False

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
        if self._must_hold():
            await self._hold()
        response = web.StreamResponse()
        await response.prepare(http)
        for count in range(1, body["max_tokens"] + 1):
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
            chunk = {"choices": [{"index": 0, "text": "x"}], "usage": usage}
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await response.write_eof(b"data: [DONE]\n\n")
        return response

    def _must_hold(self) -> bool:
        """Return whether the request is after the first N and the FIFO still exists."""
        if self._args.hold_after is None:
            return False
        after, fifo = self._args.hold_after
        return self._num_requests > int(after) and Path(fifo).exists()

    async def _hold(self) -> None:
        """Write this process's id to the FIFO at the first call; never return."""
        if not self._has_written_pid:
            self._has_written_pid = True
            # In a thread, because opening a FIFO blocks until the test opens its other end.
            await asyncio.to_thread(Path(self._args.hold_after[1]).write_text, str(os.getpid()))
        await asyncio.Event().wait()  # never set


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
    # A short timeout, because held requests would delay the shutdown.
    web.run_app(app, host="127.0.0.1", port=args.port, print=None, shutdown_timeout=0.1)


if __name__ == "__main__":
    main()
