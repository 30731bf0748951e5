"""Traces: small files in the formats of Mooncake, Azure and prompts; bad lines are named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.prompts import BLOCK
from bench.load.traces import TraceRequest, cut, read_azure, read_mooncake, read_prompts, read_trace

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def mooncake_line(timestamp: float, input_length: int, *hash_ids: int) -> str:
    line = {"timestamp": timestamp, "input_length": input_length, "output_length": 7}
    return json.dumps({**line, "hash_ids": hash_ids}) + "\n"


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read_prompt(folder: Path, line: Any) -> TraceRequest:
    (request,) = read_prompts(written(folder, json.dumps(line)))
    return request


def test_mooncake_lines_are_read(tmp_path: Path) -> None:
    text = mooncake_line(27482, 1025, 46, 47, 2353) + "\n" + mooncake_line(30535, 512, 46)
    assert read_mooncake(written(tmp_path, text)) == [
        TraceRequest(time_s=27.482, input_len=1025, output_len=7, hash_ids=(46, 47, 2353)),
        TraceRequest(time_s=30.535, input_len=512, output_len=7, hash_ids=(46,)),
    ]


def test_requests_come_in_order_of_time_and_ties_in_order_of_the_file(tmp_path: Path) -> None:
    text = "".join(mooncake_line(time, 10 + row, row) for row, time in enumerate([5, 3, 5, 3, 0]))
    requests = read_trace("mooncake", written(tmp_path, text))
    assert [request.hash_ids[0] for request in requests] == [4, 1, 3, 0, 2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json}\n", "malformed"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}\n', "hash_ids"),
        (mooncake_line(-1, 5, 0), "timestamp"),
        (mooncake_line(0, 0), "input_length"),
        (mooncake_line(0, 5, 0).replace("7", '"7"'), "output_length"),
        (mooncake_line(0, 5, -3), "hash_ids"),
        (mooncake_line(0, 513, 0), "513 tokens are 2 blocks of 512, but there are 1"),
        (mooncake_line(0, 512, 0, 1), "512 tokens are 1 blocks of 512, but there are 2"),
    ],
)
def test_a_bad_mooncake_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = written(tmp_path, mooncake_line(0, 5, 0) + "\n" + line + mooncake_line(0, 5, 0))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 3: ") as raised:
        read_mooncake(path)
    assert words in str(raised.value)


def test_azure_rows_are_read(tmp_path: Path) -> None:
    # No line end after the last row, as in the published files.
    rows = "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319601,3180,8"
    assert read_azure(written(tmp_path, AZURE_HEADER + rows)) == [
        TraceRequest(time_s=0.0, input_len=4808, output_len=10),
        TraceRequest(time_s=0.0520001, input_len=3180, output_len=8),  # the seventh decimal too
    ]


def test_azure_times_with_offsets_count_from_the_earliest(tmp_path: Path) -> None:
    text = AZURE_HEADER + (
        "2024-05-10 00:00:02.5+00:00,1,1\n"
        "2024-05-10 00:00:01+00:00,2,1\n"
        "2024-05-10T02:00:01.250000+02:00,3,1\n"
        "2024-05-10 00:00:01.5Z,4,1\n"
        "2024-05-10 00:00:01.75,5,1\n"
    )
    requests = read_azure(written(tmp_path, text))
    assert [(request.time_s, request.input_len) for request in requests] == [
        (0.0, 2),
        (0.25, 3),
        (0.5, 4),
        (0.75, 5),
        (1.5, 1),
    ]


def test_azure_columns_are_found_by_name(tmp_path: Path) -> None:
    text = (
        "\ufeffGeneratedTokens,Other,ContextTokens,TIMESTAMP\r\n"
        "9,x,70,2023-11-16 23:59:59.5\r\n"
        "8,x,60,2023-11-17 00:00:00.5\r\n"
    )
    assert read_azure(written(tmp_path, text)) == [
        TraceRequest(time_s=0.0, input_len=70, output_len=9),
        TraceRequest(time_s=1.0, input_len=60, output_len=8),
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"18:17:03,5,5", "'18:17:03' is not a timestamp"),
        (b"2023-13-16 18:17:03,5,5", "is not a timestamp"),
        (b"2023-11-16 18:17:03.1234567890,5,5", "is not a timestamp"),
        (b"2023-11-16 18:17:03,5", "'' is not a number of tokens"),
        (b"2023-11-16 18:17:03,0,5", "'0' is not a number of tokens"),
        (b"2023-11-16 18:17:03,5,-5", "'-5' is not a number of tokens"),
        (b"2023-11-16 18:17:03,5.0,5", "'5.0' is not a number of tokens"),
        (b"2023-11-16 18:17:03,\xff,5", "is not a number of tokens"),
    ],
)
def test_a_bad_azure_row_is_named(tmp_path: Path, row: bytes, words: str) -> None:
    good = b"2023-11-16 18:17:03.1,5,5\n"
    path = written(tmp_path, AZURE_HEADER.encode() + good + row + b"\n" + good)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 3: ") as raised:
        read_azure(path)
    assert words in str(raised.value)


def test_a_missing_azure_column_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "TIMESTAMP,Context\n2023-11-16 18:17:03,5\n")
    with pytest.raises(ValueError, match="line 1: the header lacks ContextTokens, GeneratedTokens"):
        read_azure(path)


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "hello"},
        {"text": "hello", "label": 3},
        {"question": "hello", "prompt": None},
        {
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "hello"},
                {"role": "user", "content": "again"},
            ]
        },
        {
            "conversations": [
                {"from": "system", "value": "be kind"},
                {"from": "human", "value": "hello"},
                {"from": "gpt", "value": "hi"},
                {"from": "human", "value": "again"},
            ]
        },
        {"conversations": [{"value": "hello"}, {"value": "hi"}]},
    ],
)
def test_prompts_of_text_are_found(tmp_path: Path, line: dict[str, Any]) -> None:
    assert read_prompt(tmp_path, line) == TraceRequest(None, None, None, prompt="hello")


def test_prompts_of_token_ids_are_found(tmp_path: Path) -> None:
    assert read_prompt(tmp_path, {"prompt": [5, 0, 7]}) == TraceRequest(
        time_s=None, input_len=3, output_len=None, prompt=(5, 0, 7)
    )


@pytest.mark.parametrize("key", ["output_len", "max_tokens", "output_tokens"])
def test_prompts_can_have_output_lengths_and_times(tmp_path: Path, key: str) -> None:
    line = {"prompt": "hello", key: 12, "timestamp": 1500}
    assert read_prompt(tmp_path, line) == TraceRequest(1.5, None, 12, prompt="hello")


def test_prompts_are_sorted_if_all_have_times(tmp_path: Path) -> None:
    late, soon = {"prompt": "late", "timestamp": 9}, {"prompt": "soon", "timestamp": 1}
    never = {"prompt": "never", "timestamp": None}
    cases: list[tuple[list[dict[str, Any]], list[str]]] = [
        ([late, soon], ["soon", "late"]),
        ([late, never, soon], ["late", "never", "soon"]),
    ]
    for lines, expected in cases:
        text = "\n".join(json.dumps(line) for line in lines)
        requests = read_trace("prompts", written(tmp_path, text))
        assert [request.prompt for request in requests] == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[", "truncated"),
        (b'["hello"]', "not a JSON object"),
        (b'{"prompt": "\xff"}', "utf-8"),
        (b'{"input": "hello"}', "expected exactly one of prompt, text"),
        (b'{"prompt": "a", "text": "b"}', "found prompt, text"),
        (b'{"prompt": ""}', "no text"),
        (b'{"question": ["a"]}', "no text"),
        (b'{"prompt": []}', "token ids"),
        (b'{"prompt": [1, true]}', "token ids"),
        (b'{"prompt": [1, -1]}', "token ids"),
        (b'{"messages": "hello"}', "not a list of objects"),
        (b'{"messages": [{"role": "system", "content": "x"}]}', "no turn of the user"),
        (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "no text"),
        (b'{"conversations": []}', "no turn of the user"),
        (b'{"prompt": "a", "max_tokens": 0}', "output tokens"),
        (b'{"prompt": "a", "max_tokens": true}', "output tokens"),
        (b'{"prompt": "a", "max_tokens": 1, "output_len": 1}', "only one of output_len"),
        (b'{"prompt": "a", "timestamp": "now"}', "timestamp"),
        (b'{"prompt": "a", "timestamp": ' + b"9" * 400 + b"}", "timestamp"),
    ],
)
def test_a_bad_line_of_prompts_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = written(tmp_path, b'{"prompt": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 2: ") as raised:
        read_prompts(path)
    assert words in str(raised.value)


@pytest.mark.parametrize(("kind", "text"), [("mooncake", "\n"), ("azure", AZURE_HEADER)])
def test_a_file_without_requests_is_refused(tmp_path: Path, kind: str, text: str) -> None:
    with pytest.raises(ValueError, match="has no requests"):
        read_trace(kind, written(tmp_path, text))


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("mooncake", "github.com/kvcache-ai/Mooncake"),
        ("azure", "github.com/Azure/AzurePublicDataset"),
        ("prompts", "one JSON object a line"),
    ],
)
def test_a_missing_file_is_told_where_to_get(tmp_path: Path, kind: str, place: str) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        read_trace(kind, tmp_path / "absent")
    assert str(tmp_path / "absent") in str(raised.value)
    assert place in str(raised.value)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'burst'.*mooncake, azure, prompts"):
        read_trace("burst", tmp_path)


@pytest.mark.parametrize(
    ("lengths", "max_model_len", "expected"),
    [
        ((900, 100), 1000, (900, 100)),
        ((901, 100), 1000, (900, 100)),  # a short answer stays whole
        ((5000, 300), 1000, (700, 300)),
        ((5000, 4000), 1000, (500, 500)),
        ((100, 4000), 1000, (100, 900)),  # a short prompt leaves the answer more than half
        ((600, 4000), 1000, (500, 500)),
        ((5000, 4000), 2, (1, 1)),
        ((5000, 4000), 3, (2, 1)),
        ((5000, None), 1000, (999, None)),
    ],
)
def test_long_requests_are_cut(
    lengths: tuple[int, int | None], max_model_len: int, expected: tuple[int, int | None]
) -> None:
    made = cut(TraceRequest(1.5, *lengths), max_model_len)
    assert made == TraceRequest(1.5, *expected)


def test_hash_ids_and_token_ids_are_cut_with_the_input() -> None:
    hashed = TraceRequest(0.0, 4 * BLOCK, 100, hash_ids=(1, 2, 3, 4))
    assert cut(hashed, 4 * BLOCK + 100) is hashed
    assert cut(hashed, 2 * BLOCK + 100).hash_ids == (1, 2)
    assert cut(hashed, 2 * BLOCK + 101).hash_ids == (1, 2, 3)
    listed = TraceRequest(0.0, 4, 1, prompt=(7, 8, 9, 10))
    assert cut(listed, 3) == TraceRequest(0.0, 2, 1, prompt=(7, 8))


def test_prompts_of_text_are_not_cut() -> None:
    request = TraceRequest(0.0, None, 5000, prompt="hello " * 1000)
    assert cut(request, 10) is request


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(2, 10**6))
def test_cut_requests_fit_and_fill_the_model(input_len: int, output_len: int, limit: int) -> None:
    num_blocks = -(-input_len // BLOCK)
    request = TraceRequest(0.0, input_len, output_len, hash_ids=tuple(range(num_blocks)))
    made = cut(request, limit)
    assert made.input_len is not None
    assert made.output_len is not None
    assert 1 <= made.input_len <= input_len
    assert 1 <= made.output_len <= output_len
    assert made.input_len + made.output_len == min(limit, input_len + output_len)
    assert made.hash_ids == tuple(range(-(-made.input_len // BLOCK)))


@pytest.mark.parametrize("limit", [1, 0, -5])
def test_a_model_without_room_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="no request fits"):
        cut(TraceRequest(0.0, 1, 1), limit)
