"""ControlChannel between processes: order, sizes, storms, where messages go, orderly ends."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist
import uvloop

from serve.comm.framing import FRAME_BYTES, make_frame
from serve.protocol.messages import Abort, AnyMessage, Goodbye, Ping, encode
from serve.protocol.plan import Entry, PostReceive, Stop, Unpack
from tests.support.control_peer import Node
from tests.support.world import World

MODULE = "tests.comm.test_control"
MEGABYTE = 1 << 20


# --- all pairs at once --------------------------------------------------------------------------


def storm_messages(seed: int, source: int, target: int, size: int) -> Iterator[AnyMessage]:
    """Yield messages of ``source`` to ``target``: most small, some beyond a frame, a few of MB."""
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
    all_ranks = range(dist.get_world_size())
    outgoing = {rank: storm_messages(seed, node.rank, rank, size) for rank in all_ranks}
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
    for source in all_ranks:
        expected = list(storm_messages(seed, source, node.rank, size))
        if source != node.rank:
            expected.append(Goodbye(source))
        assert node.messages[source] == expected, f"seed {seed}: {source} to {node.rank}"


def run_storm(loop: str, seed: int, size: int) -> None:
    (uvloop if loop == "uvloop" else asyncio).run(storm(seed, size))


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_storm_between_all_pairs_keeps_each_order(world: World, loop: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    world.run(f"{MODULE}:run_storm", loop, seed, 1500)


def many_short_storms(rounds: int) -> None:
    for number in range(rounds):
        asyncio.run(storm(number, 3))


def test_goodbye_ends_quietly_every_time(world: World) -> None:
    world.run(f"{MODULE}:many_short_storms", 40)


# --- sizes and coalescing -----------------------------------------------------------------------


async def coalesce(num_messages: int) -> int:
    node = Node()
    for number in range(num_messages):
        for peer in node.peers:
            node.channel.send(peer, Ping(number))
    node.channel.send_goodbye()
    node.channel.start()
    await node.channel.wait_closed()
    for peer in node.peers:
        assert node.messages[peer] == [*map(Ping, range(num_messages)), Goodbye(peer)]
    return node.num_clock_reads - len(node.peers)  # one at the start and one for each frame


def run_coalesce(num_messages: int) -> int:
    return asyncio.run(coalesce(num_messages))


def test_queued_messages_of_a_peer_share_frames(world: World) -> None:
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
        # The next message waits until this one has arrived, so each has a frame of its own.
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
    received: list[Entry] = []
    threads: set[str] = set()

    def on_entry(entry: Entry) -> None:
        received.append(entry)
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
    return received, node.messages.get(0, []), threads, len(node.lost)


def run_entries() -> tuple[list[Entry], list[AnyMessage], set[str], int]:
    return asyncio.run(entries())


def test_entries_are_passed_on_in_the_reader_thread(world: World) -> None:
    received, messages, threads, num_lost = world.run(f"{MODULE}:run_entries")[1]
    expected: list[Entry] = []
    for number in range(100):
        expected += [PostReceive(7, number, 3), Unpack(7, number, (number,))]
    assert received == [*expected, Stop()]
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


async def send_after_goodbye() -> None:
    node = Node()
    node.channel.start()
    node.channel.send_goodbye()
    node.channel.send_goodbye()
    for peer in node.peers:
        node.channel.send(peer, Ping(0))
    await node.channel.wait_closed()
    assert node.messages == {node.rank: []} | {peer: [Goodbye(peer)] for peer in node.peers}
    assert node.channel.silent_peers(-1.0) == []


def run_send_after_goodbye() -> None:
    asyncio.run(send_after_goodbye())


def test_nothing_is_sent_after_goodbye(world: World) -> None:
    world.run(f"{MODULE}:run_send_after_goodbye")
