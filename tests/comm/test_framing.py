"""Frames: messages come out as they were put in, and invalid data is refused."""

from __future__ import annotations

from queue import SimpleQueue

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.comm.control import describe_error
from serve.comm.framing import COALESCED_BYTES, FRAME_BYTES, make_frame, split_body, take_queued

HEAD_BYTES = 12


def body_of(frame: bytearray) -> memoryview:
    num_bytes = int.from_bytes(frame[4:HEAD_BYTES], "little")
    return memoryview(frame)[HEAD_BYTES : HEAD_BYTES + num_bytes]


@given(st.lists(st.binary(max_size=5000), min_size=1, max_size=8))
def test_messages_come_out_as_they_went_in(messages: list[bytes]) -> None:
    frame = make_frame(messages)
    assert [bytes(message) for message in split_body(body_of(frame))] == messages
    assert len(frame) == max(FRAME_BYTES, HEAD_BYTES + len(body_of(frame)))


@given(st.binary(min_size=1, max_size=50))
def test_a_body_is_made_of_whole_messages(body: bytes) -> None:
    try:
        messages = [bytes(message) for message in split_body(memoryview(body))]
    except ValueError:
        return
    assert b"".join(len(m).to_bytes(4, "little") + m for m in messages) == body


def test_queued_messages_are_taken_together() -> None:
    outbox: SimpleQueue[bytes | None] = SimpleQueue()
    for data in (b"a", b"b", b"c"):
        outbox.put(data)
    assert take_queued(outbox) == ([b"a", b"b", b"c"], False)
    outbox.put(b"d")
    outbox.put(None)
    assert take_queued(outbox) == ([b"d"], True)
    outbox.put(None)
    assert take_queued(outbox) == ([], True)


def test_a_frame_does_not_grow_without_end() -> None:
    outbox: SimpleQueue[bytes | None] = SimpleQueue()
    half = bytes(COALESCED_BYTES // 2)
    for data in (half, half, b"next", None):
        outbox.put(data)
    assert take_queued(outbox) == ([half, half], False)
    assert take_queued(outbox) == ([b"next"], True)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("[/a/b/pair.cc:534] Connection closed by peer"), "Connection closed by peer"),
        (RuntimeError("[/a:5] Read error: reset. This is typically x. y"), "Read error: reset"),
        (RuntimeError("two\nlines"), "two lines"),
        (ValueError("not a frame"), "ValueError: not a frame"),
    ],
)
def test_errors_are_described_in_one_line(error: Exception, text: str) -> None:
    assert describe_error(error) == text
