"""ControlChannel between processes: order, size, storms, orderly and disorderly ends."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import uvloop

from serve.comm.control import ControlChannel
from serve.comm.frames import FRAME_BYTES, as_tensor, make_frame
from serve.comm.messages import (
    Abort,
    AnyMessage,
    Entry,
    Goodbye,
    Ping,
    Pong,
    PostReceive,
    Stop,
    Unpack,
    encode,
)
from serve.comm.process_groups import new_control_group
from tests.world import World, WorldError

MODULE = "tests.test_control"
MEGABYTE = 1 << 20


class Node:
    """A channel and all that it has said, on the running loop."""

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
        self.channel.goodbye()
        await self.channel.closed()
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


# --- all pairs at once --------------------------------------------------------------------------


def storm_messages(seed: int, source: int, target: int, size: int) -> Iterator[AnyMessage]:
    """What ``source`` sends ``target``: mostly small, some beyond a frame, a few megabytes."""
    rng = random.Random(f"{seed} {source} {target}")
    for number in range(size):
        kind = rng.random()
        if kind < 0.9:
            yield Ping(number)
        elif kind < 0.99:
            yield Abort(f"{number} " + "x" * rng.randrange(3 * FRAME_BYTES))
        elif kind < 0.998:
            yield PostReceive(source, number, target)
        else:
            yield Abort(f"{number} " + "y" * rng.randrange(3 * MEGABYTE))


async def storm(seed: int, size: int) -> None:
    node = Node()
    everybody = range(dist.get_world_size())
    outgoing = {rank: storm_messages(seed, node.rank, rank, size) for rank in everybody}
    rng = random.Random(seed + node.rank)
    node.channel.start()
    while outgoing:
        target = rng.choice(list(outgoing))
        message = next(outgoing[target], None)
        if message is None:
            del outgoing[target]
        else:
            node.channel.send(target, message)
        if rng.random() < 0.1:
            await asyncio.sleep(0)
    await node.until(lambda: node.count(node.rank) == size)
    await node.leave()
    assert node.lost == []
    for source in everybody:
        wanted = list(storm_messages(seed, source, node.rank, size))
        if source != node.rank:
            wanted.append(Goodbye(source))
        assert node.messages[source] == wanted, f"seed {seed}: {source} to {node.rank}"


def run_storm(loop: str, seed: int, size: int) -> None:
    (uvloop if loop == "uvloop" else asyncio).run(storm(seed, size))


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_storm_between_all_pairs_keeps_each_order(world: World, loop: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    world.run(f"{MODULE}:run_storm", loop, seed, 1500)


def many_short_lives(rounds: int) -> None:
    for number in range(rounds):
        asyncio.run(storm(number, 3))


def test_goodbye_ends_quietly_every_time(world: World) -> None:
    world.run(f"{MODULE}:many_short_lives", 40)


# --- sizes and coalescing -----------------------------------------------------------------------


async def coalesce(num_messages: int) -> int:
    node = Node()
    for number in range(num_messages):
        for peer in node.peers:
            node.channel.send(peer, Ping(number))
    node.channel.goodbye()
    node.channel.start()
    await node.channel.closed()
    for peer in node.peers:
        assert node.messages[peer] == [*map(Ping, range(num_messages)), Goodbye(peer)]
    return node.num_clock_reads - len(node.peers)  # one at the start and one for each frame


def run_coalesce(num_messages: int) -> int:
    return asyncio.run(coalesce(num_messages))


def test_what_waits_for_a_peer_travels_together(world: World) -> None:
    assert world.run(f"{MODULE}:run_coalesce", 300) == [3, 3, 3, 3]


async def sizes() -> None:
    node = Node()
    node.channel.start()
    head = len(make_frame([encode(Abort("x" * FRAME_BYTES))])) - FRAME_BYTES
    lengths = [FRAME_BYTES + extra for extra in range(-head - 2, -head + 3)]
    lengths += [0, 1, 255, 256, 65535, 65536, 5 * MEGABYTE, 1]
    for index, length in enumerate(lengths):
        for peer in node.peers:
            node.channel.send(peer, Abort("z" * length))
        # Until then no other is sent, so that each is a frame of its own.
        await node.until(lambda: all(node.count(peer) > index for peer in node.peers))  # noqa: B023
    await node.leave()
    for peer in node.peers:
        assert node.messages[peer] == [*(Abort("z" * n) for n in lengths), Goodbye(peer)]


def run_sizes() -> None:
    asyncio.run(sizes())


def test_bodies_of_any_size(world: World) -> None:
    world.run(f"{MODULE}:run_sizes")


# --- where messages go --------------------------------------------------------------------------


async def entries() -> tuple[list[Entry], list[AnyMessage], set[str], int]:
    got: list[Entry] = []
    threads: set[str] = set()

    def on_entry(entry: Entry) -> None:
        got.append(entry)
        threads.add(threading.current_thread().name)

    node = Node(on_entry=on_entry if dist.get_rank() == 1 else None)
    node.channel.start()
    if node.rank == 0:
        for number in range(100):
            node.channel.send(1, PostReceive(7, number, 3))
            node.channel.send(1, Ping(number))
            node.channel.send(1, Unpack(7, number, (number,)))
        node.channel.send(1, Stop())
    await node.leave()
    return got, node.messages.get(0, []), threads, len(node.lost)


def run_entries() -> tuple[list[Entry], list[AnyMessage], set[str], int]:
    return asyncio.run(entries())


def test_entries_go_straight_to_the_queue(world: World) -> None:
    got, messages, threads, num_lost = world.run(f"{MODULE}:run_entries")[1]
    wanted: list[Entry] = []
    for number in range(100):
        wanted += [PostReceive(7, number, 3), Unpack(7, number, (number,))]
    assert got == [*wanted, Stop()]
    assert messages == [*map(Ping, range(100)), Goodbye(0)]
    assert threads == {"read-0"}
    assert num_lost == 0


async def alone() -> list[AnyMessage]:
    node = Node(peers=[])
    with pytest.raises(ValueError, match="rank 77 is not a control peer"):
        node.channel.send(77, Ping(0))
    node.channel.start()
    for number in range(10):
        node.channel.send(node.rank, Ping(number))
    await node.until(lambda: node.count(node.rank) == 10)
    await node.leave()
    return node.messages[node.rank]


def run_alone() -> list[AnyMessage]:
    return asyncio.run(alone())


def test_without_peers_messages_to_oneself_arrive(world: World) -> None:
    assert world.run(f"{MODULE}:run_alone") == [[*map(Ping, range(10))]] * 4


async def speak_after_goodbye() -> None:
    node = Node()
    node.channel.start()
    node.channel.goodbye()
    node.channel.goodbye()
    for peer in node.peers:
        node.channel.send(peer, Ping(0))
    await node.channel.closed()
    assert node.messages == {node.rank: []} | {peer: [Goodbye(peer)] for peer in node.peers}
    assert node.channel.silent_peers(-1.0) == []


def run_speak_after_goodbye() -> None:
    asyncio.run(speak_after_goodbye())


def test_nothing_is_sent_after_goodbye(world: World) -> None:
    world.run(f"{MODULE}:run_speak_after_goodbye")


# --- disorderly ends ----------------------------------------------------------------------------


async def lose_rank_3() -> tuple[list[tuple[int, str]], dict[int, int]]:
    node = Node()
    node.channel.start()
    if node.rank == 3:
        await node.until(lambda: all(node.count(peer) for peer in node.peers))
        os.kill(os.getpid(), signal.SIGKILL)
    for number in range(40):  # so that the writers are at it when the connection breaks
        node.channel.send(3, Abort("x" * MEGABYTE) if number else Ping(0))
    await node.until(lambda: bool(node.lost))
    node.channel.send(3, Ping(0))
    for peer in node.peers:
        if peer != 3:
            for number in range(500):
                node.channel.send(peer, Ping(number))
    await node.leave()
    return node.lost, {peer: node.count(peer) for peer in node.peers}


def run_lose_rank_3() -> tuple[list[tuple[int, str]], dict[int, int]]:
    return asyncio.run(lose_rank_3())


def test_a_killed_peer_is_named_once_and_harms_no_other_connection(world: World) -> None:
    results = world.run(f"{MODULE}:run_lose_rank_3", dying=[3])
    for rank, (lost, counts) in enumerate(results[:3]):
        assert [peer for peer, _ in lost] == [3]
        assert "onnection" in lost[0][1] and "\n" not in lost[0][1]
        assert counts == {peer: 501 for peer in range(3) if peer != rank} | {3: 0}


async def lose_rank_1_in_a_body() -> list[tuple[int, str]]:
    posted = threading.Event()  # rank 0 has begun to receive the body

    def recv(tensor: torch.Tensor, source: int, group: dist.ProcessGroup, tag: int) -> None:
        work = dist.irecv(tensor, source, group, tag)
        if len(tensor) > FRAME_BYTES:
            posted.set()
        assert work is not None
        work.wait()

    node = Node(peers=[1] if dist.get_rank() == 0 else [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve.comm.frames.dist", SimpleNamespace(recv=recv, send=dist.send))
        node.channel.start()
        if node.rank == 1:
            tensor = as_tensor(make_frame([encode(Abort("x" * 256 * MEGABYTE))]))
            dist.send(tensor[:FRAME_BYTES], 0, node.group)
            work = dist.isend(tensor[FRAME_BYTES:], 0, node.group)
            dist.barrier()
            assert work is not None
            os.kill(os.getpid(), signal.SIGKILL)
        if node.rank == 0:
            await asyncio.to_thread(posted.wait)
        await asyncio.to_thread(dist.barrier)
        if node.rank == 0:
            await node.until(lambda: bool(node.lost))
            await node.channel.closed()
    return node.lost


def run_lose_rank_1_in_a_body() -> list[tuple[int, str]]:
    return asyncio.run(lose_rank_1_in_a_body())


def test_a_peer_that_dies_in_the_middle_of_a_message_is_lost(world: World) -> None:
    lost = world.run(f"{MODULE}:run_lose_rank_1_in_a_body", dying=[1])[0]
    assert [peer for peer, _ in lost] == [1]


async def stop_rank_3() -> None:
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    node = Node(answer_pings=True)
    node.channel.start()
    if node.rank != 0:
        await node.until(lambda: Goodbye(0) in node.messages.get(0, []))
        await node.leave()
        assert node.lost == []
        return
    for peer in node.peers:
        node.channel.send(peer, Ping(0))
    await node.until(lambda: all(node.count(peer) for peer in node.peers))
    os.kill(pids[3], signal.SIGSTOP)
    try:
        node.now_s = 100.0
        node.channel.send(3, Abort("x" * 20 * MEGABYTE))
        for peer in node.peers:
            node.channel.send(peer, Ping(1))
        await node.until(lambda: node.count(1) == node.count(2) == 2)
        assert node.channel.silent_peers(60.0) == [3]
        assert node.channel.silent_peers(100.0) == []
        assert node.channel.last_heard_s == {1: 100.0, 2: 100.0, 3: 0.0}
        assert node.lost == []
    finally:
        os.kill(pids[3], signal.SIGCONT)
    await node.until(lambda: node.count(3) == 2)
    assert node.channel.silent_peers(60.0) == []
    await node.leave()
    assert node.lost == []


def run_stop_rank_3() -> None:
    asyncio.run(stop_rank_3())


def test_a_stopped_peer_is_silent_not_lost_and_holds_up_nobody(world: World) -> None:
    world.run(f"{MODULE}:run_stop_rank_3")


GARBAGE = {
    "zeros": bytes(FRAME_BYTES),
    "noise": random.Random(1).randbytes(FRAME_BYTES),
    "no message": bytes(make_frame([])),
    "unknown message": bytes(make_frame([b"\x91\xa6Nobody"])),
    "no msgpack": bytes(make_frame([b"\xc1"])),
    "size beyond the body": bytes(make_frame([encode(Ping(1))])).replace(
        len(encode(Ping(1))).to_bytes(4, "little"), b"\xff\xff\x00\x00", 1
    ),
    "endless body": b"SRV1" + b"\xff" * (FRAME_BYTES - 4),
}


async def read_garbage(garbage: bytes) -> tuple[list[tuple[int, str]], list[AnyMessage]]:
    node = Node(peers=[1] if dist.get_rank() == 0 else [])
    if node.rank == 1:
        dist.send(as_tensor(make_frame([encode(Ping(5))])), 0, node.group)
        dist.send(as_tensor(bytearray(garbage)), 0, node.group)
    node.channel.start()
    if node.rank == 0:
        await node.until(lambda: bool(node.lost))
    await asyncio.to_thread(dist.barrier)
    await node.leave()
    return node.lost, node.messages.get(1, [])


def run_read_garbage(garbage: bytes) -> tuple[list[tuple[int, str]], list[AnyMessage]]:
    return asyncio.run(read_garbage(garbage))


@pytest.mark.parametrize("name", GARBAGE)
def test_what_cannot_be_understood_is_loud(world: World, name: str) -> None:
    lost, messages = world.run(f"{MODULE}:run_read_garbage", GARBAGE[name])[0]
    assert [peer for peer, _ in lost] == [1]
    assert lost[0][1]
    assert messages == [Ping(5)]


async def fail_in_on_entry() -> list[tuple[int, str]]:
    def on_entry(entry: Entry) -> None:
        raise KeyError("the queue is broken")

    node = Node(on_entry=on_entry if dist.get_rank() == 1 else None)
    node.channel.start()
    if node.rank == 0:
        node.channel.send(1, Stop())
    if node.rank == 1:
        await node.until(lambda: bool(node.lost))
    await asyncio.to_thread(dist.barrier)
    return node.lost


def run_fail_in_on_entry() -> list[tuple[int, str]]:
    return asyncio.run(fail_in_on_entry())


def test_an_entry_that_is_refused_is_loud() -> None:
    world = World(2)
    try:
        lost = world.run(f"{MODULE}:run_fail_in_on_entry")
    finally:
        world.close()
    assert lost == [[], [(0, "KeyError: 'the queue is broken'")]]


# --- ends of processes --------------------------------------------------------------------------


async def live_and_leave(folder: str) -> None:
    node = Node()
    node.channel.start()
    for peer in node.peers:
        node.channel.send(peer, Abort("x" * MEGABYTE))
    node.channel.goodbye()
    await node.channel.closed()
    Path(folder, f"{node.rank}").write_text(f"{node.lost}")
    os._exit(0)


def run_live_and_leave(folder: str) -> None:
    asyncio.run(live_and_leave(folder))


def test_ranks_that_exit_after_closed_lose_nobody(tmp_path: Path) -> None:
    world = World(4)
    world.run(f"{MODULE}:run_live_and_leave", str(tmp_path), dying=range(4))
    assert [(tmp_path / f"{rank}").read_text() for rank in range(4)] == ["[]"] * 4


# --- the world itself ---------------------------------------------------------------------------


def misbehave(how: dict[int, str]) -> int:
    match how.get(dist.get_rank()):
        case "raise":
            raise ValueError("of my own")
        case "hang":
            threading.Event().wait()
        case "exit":
            os._exit(3)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
    return dist.get_rank()


def test_a_failed_case_tells_all_and_spoils_nothing() -> None:
    world = World(2)
    try:
        for how, text in (({1: "raise"}, "of my own"), ({0: "exit"}, "exit code 3")):
            with pytest.raises(WorldError, match=text):
                world.run(f"{MODULE}:misbehave", how)
            assert world.run(f"{MODULE}:misbehave", {}) == [0, 1]
        with pytest.raises(WorldError, match=r"(?s)rank 0 was not done.*in misbehave.*rank 1 was"):
            world.run(f"{MODULE}:misbehave", {0: "hang", 1: "stop"}, timeout_s=0.5)
        assert world.run(f"{MODULE}:misbehave", {0: "exit"}, dying=[0]) == [None, 1]
        with pytest.raises(WorldError, match=r"failed on ranks \[0\]"):
            world.run(f"{MODULE}:misbehave", {}, dying=[0])
    finally:
        world.close()
