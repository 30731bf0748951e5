"""ControlChannel when a peer dies, is stopped or sends garbage, and when processes exit."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from serve.comm.framing import FRAME_BYTES, as_tensor, make_frame
from serve.protocol.messages import Abort, AnyMessage, Goodbye, Ping, encode
from serve.protocol.plan import Entry, Stop
from tests.support.control_peer import Node
from tests.support.world import World

MODULE = "tests.comm.test_control_ends"
MEGABYTE = 1 << 20


# --- disorderly ends ----------------------------------------------------------------------------


async def lose_rank_3() -> tuple[list[tuple[int, str]], dict[int, int]]:
    node = Node()
    node.channel.start()
    if node.rank == 3:
        await node.until(lambda: all(node.count(peer) for peer in node.peers))
        os.kill(os.getpid(), signal.SIGKILL)
    for number in range(40):  # the writers are busy when the connection breaks
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
        assert "onnection" in lost[0][1]
        assert "\n" not in lost[0][1]
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
        patch.setattr("serve.comm.framing.dist", SimpleNamespace(recv=recv, send=dist.send))
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
            await node.channel.wait_closed()
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
        assert node.channel.last_received_s == {1: 100.0, 2: 100.0, 3: 0.0}
        assert node.lost == []
    finally:
        os.kill(pids[3], signal.SIGCONT)
    await node.until(lambda: node.count(3) == 2)
    assert node.channel.silent_peers(60.0) == []
    await node.leave()
    assert node.lost == []


def run_stop_rank_3() -> None:
    asyncio.run(stop_rank_3())


def test_a_stopped_peer_is_silent_not_lost_and_blocks_no_other(world: World) -> None:
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
def test_invalid_data_ends_the_connection(world: World, name: str) -> None:
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


def test_an_error_in_on_entry_ends_the_connection() -> None:
    world = World(2)
    try:
        lost = world.run(f"{MODULE}:run_fail_in_on_entry")
    finally:
        world.close()
    assert lost == [[], [(0, "KeyError: 'the queue is broken'")]]


# --- ends of processes --------------------------------------------------------------------------


async def send_and_exit(folder: str) -> None:
    node = Node()
    node.channel.start()
    for peer in node.peers:
        node.channel.send(peer, Abort("x" * MEGABYTE))
    node.channel.send_goodbye()
    await node.channel.wait_closed()
    await asyncio.to_thread(Path(folder, f"{node.rank}").write_text, f"{node.lost}")
    os._exit(0)


def run_send_and_exit(folder: str) -> None:
    asyncio.run(send_and_exit(folder))


def test_ranks_that_exit_after_wait_closed_lose_no_peer(tmp_path: Path) -> None:
    world = World(4)
    world.run(f"{MODULE}:run_send_and_exit", str(tmp_path), dying=range(4))
    assert [(tmp_path / f"{rank}").read_text() for rank in range(4)] == ["[]"] * 4
