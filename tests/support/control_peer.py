"""A control channel that records its callbacks, for tests over several processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch.distributed as dist

from serve.comm.control import ControlChannel
from serve.comm.process_groups import new_control_group
from serve.protocol.messages import AnyMessage, Ping, Pong
from serve.protocol.plan import Entry


class Node:
    """A channel on the running loop, with the messages and lost peers that it has reported."""

    def __init__(
        self,
        peers: list[int] | None = None,
        on_entry: Callable[[Entry], None] | None = None,
        answer_pings: bool = False,
    ) -> None:
        self.rank = dist.get_rank()
        others = [rank for rank in range(dist.get_world_size()) if rank != self.rank]
        self.peers = others if peers is None else peers
        self.messages: dict[int, list[AnyMessage]] = {self.rank: []}
        self.lost: list[tuple[int, str]] = []
        self.now_s = 0.0
        self.num_clock_reads = 0
        self._answer_pings = answer_pings
        self._changed = asyncio.Event()
        self.group = new_control_group()
        self.channel = ControlChannel(
            self.rank,
            self.peers,
            self.group,
            asyncio.get_running_loop(),
            on_message=self._on_message,
            on_lost=self._on_lost,
            on_entry=on_entry,
            clock=self._clock,
        )

    def count(self, source: int) -> int:
        return len(self.messages.get(source, []))

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def leave(self) -> None:
        self.channel.send_goodbye()
        await self.channel.wait_closed()
        dist.destroy_process_group(self.group)

    def _on_message(self, source: int, message: AnyMessage) -> None:
        self.messages.setdefault(source, []).append(message)
        if self._answer_pings and isinstance(message, Ping):
            self.channel.send(source, Pong(self.rank, message.number, 0.0))
        self._changed.set()

    def _on_lost(self, peer: int, reason: str) -> None:
        self.lost.append((peer, reason))
        self._changed.set()

    def _clock(self) -> float:
        self.num_clock_reads += 1
        return self.now_s
