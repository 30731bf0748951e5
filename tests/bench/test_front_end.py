"""The measurement of the front end: every token of every stream arrives, on both servers."""

from __future__ import annotations

import json

import pytest

from bench.micro.front_end import main


def test_every_token_arrives(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--streams", "6", "--tokens", "30"])  # fails if a client misses one
    found = json.loads(capsys.readouterr().out)
    assert found["streams"] == 6
    assert 0 < found["events_per_token"] <= 1
    assert found["over_bare"] == pytest.approx(found["tokens_s"] / found["bare_tokens_s"])
