"""Service and its streams: joining outputs, aborts, draining and failing."""

from __future__ import annotations

import asyncio
import random

import pytest

from serve.dispatch.service import Output, Overloaded, Stream, Unavailable, read_all
from serve.protocol.messages import Delta
from serve.request import FinishReason, Request, SamplingParams, pack_ids
from tests.support.fake_service import FIRST_ID, FakeCluster, make_delta, texts


def make_request(id: str, max_tokens: int = 4) -> Request:
    return Request(
        id=id, prompt=pack_ids((1, 2, 3)), sampling=SamplingParams(max_tokens=max_tokens)
    )


def make_output(index: int, count: int = 1, reason: FinishReason | None = None) -> Output:
    return Output(
        request_id="a",
        first_index=index,
        token_ids=tuple(range(index, index + count)),
        text=texts(count, index),
        finish_reason=reason,
        stop_reason="s" if reason else None,
    )


async def read(stream: Stream) -> list[Output]:
    return [output async for output in stream]


async def test_unread_outputs_are_joined() -> None:
    stream = Stream(make_request("a"))
    for index in range(5):
        stream.put(make_output(index, reason=FinishReason.STOP if index == 4 else None))
    (output,) = await read(stream)
    assert output == make_output(0, 5, FinishReason.STOP)


async def test_outputs_for_a_slow_reader_are_joined_and_complete() -> None:
    stream = Stream(make_request("a"))
    for index in range(1000):
        stream.put(make_output(index, reason=FinishReason.STOP if index == 999 else None))
    (output,) = await read(stream)
    assert output == make_output(0, 1000, FinishReason.STOP)


async def test_reading_again_after_the_end_ends_at_once() -> None:
    stream = Stream(make_request("a"))
    stream.put(make_output(0, reason=FinishReason.LENGTH))
    assert len(await read(stream)) == 1
    assert await asyncio.wait_for(read(stream), 10) == []


async def test_nothing_comes_after_the_end() -> None:
    stream = Stream(make_request("a"))
    stream.put(make_output(0, reason=FinishReason.LENGTH))
    stream.put(make_output(1, reason=FinishReason.ABORT))
    assert await read(stream) == [make_output(0, reason=FinishReason.LENGTH)]
    assert stream.num_tokens == 1


@pytest.mark.parametrize("seed", range(20))
async def test_a_reader_of_any_speed_gets_every_token_in_order(seed: int) -> None:
    rng = random.Random(seed)
    streams = [Stream(make_request(str(i))) for i in range(3)]
    texts_read, ends = [""] * 3, [0] * 3

    async def consume() -> None:
        async for batch in read_all(streams):
            for index, output in batch:
                assert output.first_index == len(texts_read[index].split())
                texts_read[index] += output.text
                ends[index] += output.finish_reason is not None
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)

    reader = asyncio.create_task(consume())
    nexts = {0: 0, 1: 0, 2: 0}
    while nexts:
        index = rng.choice(list(nexts))
        last = nexts[index] == 9
        streams[index].put(make_output(nexts[index], 1, FinishReason.LENGTH if last else None))
        nexts[index] += 1
        if last:
            del nexts[index]
        if rng.random() < 0.5:
            await asyncio.sleep(0)
    await reader
    assert texts_read == [texts(10)] * 3
    assert ends == [1] * 3


async def test_a_request_from_prompt_to_end() -> None:
    cluster = FakeCluster(None, num_prefill=2, num_decode=2)
    streams = cluster.service.submit([make_request("a"), make_request("b", 1)])
    outputs = [await read(stream) for stream in streams]
    for parts, count in zip(outputs, (4, 1), strict=True):
        assert [t for o in parts for t in o.token_ids] == [FIRST_ID + i for i in range(count)]
        assert parts[-1].finish_reason is FinishReason.LENGTH
        timeline = parts[-1].timeline
        assert timeline is not None
        assert timeline.finished_s is not None
        assert timeline.prefill_started_s == 2.0
    await cluster.service.drained()
    cluster.assert_at_rest()


async def test_abort_ends_a_stream_once() -> None:
    cluster = FakeCluster(None)
    cluster.hold_at = 2
    (stream,) = cluster.service.submit([make_request("a")])
    await cluster.until(lambda: stream.num_tokens == 2)
    for _ in range(3):
        cluster.service.abort("a")
    cluster.service.abort("never seen")
    (output,) = await read(stream)
    assert (output.finish_reason, output.text) == (FinishReason.ABORT, texts(2))
    assert cluster.aborted == ["a"]
    cluster.assert_at_rest()


async def test_an_abort_of_something_unread_says_where_it_ended() -> None:
    cluster = FakeCluster(None)
    cluster.hold_at = 2
    (stream,) = cluster.service.submit([make_request("a")])
    outputs = []
    async for output in stream:
        outputs.append(output)
        if stream.num_tokens == 2:
            cluster.service.abort("a")
    assert (outputs[-1].finish_reason, outputs[-1].first_index) == (FinishReason.ABORT, 2)


async def test_tokens_after_an_abort_are_answered_with_another() -> None:
    cluster = FakeCluster(None)
    cluster.hold_at = 1
    (stream,) = cluster.service.submit([make_request("a")])
    await cluster.until(lambda: stream.num_tokens == 1)
    cluster.service.abort("a")
    cluster.active["a"] = object()  # type: ignore[assignment]  # the abort has not arrived
    cluster.report(1, make_delta("a", 1))
    assert cluster.aborted == ["a", "a"]
    assert len(await read(stream)) == 1
    cluster.assert_at_rest()


async def test_submit_takes_all_or_none() -> None:
    cluster = FakeCluster(None, max_waiting=2)
    cluster.hold_at = 0
    with pytest.raises(Overloaded):
        cluster.service.submit([make_request(str(i)) for i in range(3)])
    with pytest.raises(ValueError, match="is active"):
        cluster.service.submit([make_request("a"), make_request("a")])
    cluster.assert_at_rest()
    (stream,) = cluster.service.submit([make_request("a")])
    with pytest.raises(ValueError, match="is active"):
        cluster.service.submit([make_request("b"), make_request("a")])
    assert cluster.service.num_active == 1
    cluster.release()
    assert (await read(stream))[-1].finish_reason is FinishReason.LENGTH
    cluster.service.submit([make_request("a")])  # an id may be used again after its end
    cluster.service.abort("a")


async def test_draining_waits_for_active_requests() -> None:
    cluster = FakeCluster(None)
    cluster.hold_at = 1
    (stream,) = cluster.service.submit([make_request("a")])
    cluster.service.start_draining()
    drained = asyncio.create_task(cluster.service.drained())
    await cluster.until(lambda: stream.num_tokens == 1)
    assert not drained.done()
    with pytest.raises(Unavailable, match="shutting down"):
        cluster.service.submit([make_request("b")])
    cluster.release()
    await drained
    assert (await read(stream))[-1].finish_reason is FinishReason.LENGTH


async def test_not_ready_is_unavailable() -> None:
    cluster = FakeCluster(None, ready=False)
    with pytest.raises(Unavailable, match="starting"):
        cluster.service.submit([make_request("a")])
    await cluster.service.drained()


async def test_when_the_job_fails_every_stream_ends_with_the_reason() -> None:
    cluster = FakeCluster(None)
    cluster.hold_at = 1
    streams = cluster.service.submit([make_request(str(i)) for i in range(5)])
    await cluster.until(lambda: all(stream.num_tokens == 1 for stream in streams))
    cluster.service.fail_all("rank 1 is lost")
    cluster.service.fail_all("again")
    for stream in streams:
        last = (await read(stream))[-1]
        assert (last.finish_reason, last.error) == (FinishReason.ERROR, "rank 1 is lost")
    await cluster.service.drained()
    with pytest.raises(Unavailable):
        cluster.service.submit([make_request("a")])


async def test_an_early_end_waits_for_token_0() -> None:
    """The decode replica's tokens, with the last one, arrive before token 0."""
    cluster = FakeCluster(None)
    cluster.hold_at = 0
    (stream,) = cluster.service.submit([make_request("a", 3)])
    for index in (1, 2):
        reason = FinishReason.LENGTH if index == 2 else None
        cluster.report(1, make_delta("a", index, reason))
    assert stream.num_tokens == 0
    empty = Delta(request_id="a", first_index=5, token_ids=(), text="")
    cluster.report(1, empty)
    cluster.report(0, make_delta("a", 0))
    (output,) = await read(stream)
    assert (output.text, output.finish_reason) == (texts(3), FinishReason.LENGTH)
    cluster.active.clear()
    cluster.assert_at_rest()


async def test_an_output_that_cannot_be_passed_on_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put = Stream.put

    def fail_once(stream: Stream, output: Output) -> None:
        if output.request_id == "b" and output.token_ids == (FIRST_ID + 1,):
            raise RuntimeError("a stream that fails")
        put(stream, output)

    cluster = FakeCluster(None)
    monkeypatch.setattr(Stream, "put", fail_once)
    streams = cluster.service.submit([make_request(name) for name in ("a", "b", "c")])
    ends = [(await read(stream))[-1] for stream in streams]
    assert [end.finish_reason for end in ends] == [
        FinishReason.LENGTH, FinishReason.ERROR, FinishReason.LENGTH,
    ]  # fmt: skip
    assert ends[1].error == "the server failed to pass on this answer"
    await cluster.until(lambda: not cluster.active)
    assert cluster.aborted == ["b"]
    cluster.assert_at_rest()
