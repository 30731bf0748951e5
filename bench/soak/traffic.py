"""Traffic: mixed requests from many clients at once, each answer checked."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import aiohttp

from bench.soak.answers import Checker, WrongAnswer
from bench.soak.client import Refused, Target, hang_up, read_error, read_stream, read_whole
from bench.soak.recipes import MALFORMED, UNKNOWN_FIELDS, Recipe
from bench.soak.tally import Tally

STALL_S = 60.0  # a request that takes longer counts as hung
MAX_WRONG = 100  # after as many the run ends, because the server is broken or gone

# How a request can fail. The last three come of an answer without the fields that it must have.
FAILURES = (
    WrongAnswer, aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError
)  # fmt: skip
_WEIGHTS = {"whole": 40, "streamed": 30, "dropped": 12, "hung up": 8, "malformed": 10}


class Traffic:
    """The clients of the mixed traffic. Request ``i`` of a seed is always the same."""

    def __init__(
        self, target: Target, recipes: Sequence[Recipe], checker: Checker, tally: Tally, seed: int
    ) -> None:
        self._target, self._recipes, self._checker = target, recipes, checker
        self._tally, self._seed = tally, seed
        self.broken = False

    async def run(self, num_requests: int, num_clients: int) -> None:
        """Send ``num_requests``, up to ``num_clients`` at a time."""
        numbers = iter(range(num_requests))

        async def client(session: aiohttp.ClientSession) -> None:
            for number in numbers:
                if self.broken:
                    return
                await self._one(session, random.Random(f"{self._seed} {number}"))

        async with self._target.session() as session, asyncio.TaskGroup() as group:
            for _ in range(num_clients):
                group.create_task(client(session))

    async def _one(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        kind = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        tally, recipe = self._tally, rng.choice(self._recipes)
        status = "failed"
        try:
            async with asyncio.timeout(STALL_S):
                status = await self._send(kind, session, recipe, rng)
        except Refused as refused:
            status = str(refused.status)
            if refused.status != 429 or not tally.flooded:
                tally.add_wrong(f"{kind}: {refused}, and there was no flood")
        except FAILURES as error:
            tally.add_wrong(f"{kind}: {type(error).__name__}: {error}")
            self.broken = tally.num_wrong >= MAX_WRONG
        tally.add_done(kind, status)

    async def _send(
        self, kind: str, session: aiohttp.ClientSession, recipe: Recipe, rng: random.Random
    ) -> str:
        """Send one request of ``kind`` and check the answer. Return its status."""
        match kind:
            case "whole":
                extra = UNKNOWN_FIELDS if rng.random() < 0.2 else {}
                self._checker.check(recipe, await read_whole(session, recipe, extra))
            case "streamed":
                self._checker.check(recipe, await read_stream(session, recipe, stop_after=None))
            case "dropped":
                answer = await read_stream(session, recipe, stop_after=rng.randint(0, 8))
                self._checker.check_beginning(recipe, answer)
            case "hung up":
                return await hang_up(self._target, recipe, rng)
            case _:
                return await _send_malformed(session, rng)
        return "200"


async def _send_malformed(session: aiohttp.ClientSession, rng: random.Random) -> str:
    path, body, status = rng.choice(MALFORMED)
    async with session.post(path, data=body) as response:
        error = await read_error(response)
        if response.status != status:
            raise WrongAnswer(f"{response.status} where {status} was due for {body!r}: {error}")
    return str(status)
