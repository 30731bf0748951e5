"""ConnectionTable: caps in total and per address, and how much of a flood reaches the log."""

from __future__ import annotations

import logging

import pytest

from serve.api.connection_table import ConnectionTable
from serve.config.http import HttpLimits


def test_a_place_is_free_again_when_its_connection_ends() -> None:
    table = ConnectionTable(HttpLimits(max_connections=3, max_connections_per_address=2))
    assert [table.enter("10.0.0.1") is None for _ in range(3)] == [True, True, False]
    assert table.enter("10.0.0.2") is None
    refusal = table.enter("10.0.0.3")
    assert refusal is not None
    assert refusal.status == 503
    assert "--max-connections" in refusal.message
    table.leave("10.0.0.1")
    assert table.enter("10.0.0.1") is None
    assert table.num_open == 3


def test_a_row_of_refusals_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    table = ConnectionTable(HttpLimits(max_connections=1))
    table.enter("10.0.0.1")
    for _ in range(1000):
        table.enter("10.0.0.1")
    assert len(caplog.records) == 1


def test_a_few_refused_requests_a_second_have_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 5.0
    monkeypatch.setattr("serve.api.connection_table.time.monotonic", lambda: now_s)
    table = ConnectionTable(HttpLimits())
    assert sum(table.may_log() for _ in range(1000)) == 10
    now_s = 6.0
    assert sum(table.may_log() for _ in range(1000)) == 10
