"""Figures of our runs and of guidellm's, from small files in both formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.load.agreement import main, read


def guidellm_request(sent_s: float, first_s: float, last_s: float, tokens: int) -> dict[str, Any]:
    timings = {
        "targeted_start": sent_s - 0.001,
        "request_start": sent_s,
        "first_token_iteration": first_s,
        "last_token_iteration": last_s,
        "token_iterations": tokens,
        "request_end": last_s + 0.001,
        "something_else": 1,
    }
    return {"info": {"timings": timings}, "prompt_tokens": 9, "output_tokens": tokens}


def our_request(sent_s: float, first_s: float, last_s: float, tokens: int) -> dict[str, Any]:
    return {
        "scheduled_s": sent_s - 0.002,
        "sent_s": sent_s,
        "first_token_s": first_s,
        "last_token_s": last_s,
        "end_s": last_s + 0.001,
        "num_prompt_tokens": 9,
        "num_output_tokens": tokens,
        "error": None,
    }


def write(path: Path, content: dict[str, Any]) -> str:
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def ours(tmp_path: Path) -> str:
    requests = [our_request(i, i + 0.1 + i / 100, i + 1.1, 11) for i in range(3)]
    failed = {**our_request(9.0, 9.1, 9.2, 2), "first_token_s": None, "error": "503: full"}
    return write(tmp_path / "ours.json", {"version": 1, "requests": [*requests, failed]})


@pytest.fixture
def theirs(tmp_path: Path) -> str:
    requests = [guidellm_request(100 + i, 100 + i + 0.22, 100 + i + 1.22, 11) for i in range(3)]
    errored = [{"info": {"timings": {}, "error": "timeout"}}]
    by_status = {"successful": requests, "errored": errored, "incomplete": []}
    return write(tmp_path / "theirs.json", {"benchmarks": [{"requests": by_status}]})


def test_both_formats_give_the_same_figures(ours: str, theirs: str) -> None:
    mine, other = read(Path(ours)), read(Path(theirs))
    assert (mine.tool, other.tool) == ("ours", "guidellm")
    assert mine.median_ms(lambda answer: answer.ttft_s) == pytest.approx(110)
    assert other.median_ms(lambda answer: answer.ttft_s) == pytest.approx(220)
    assert other.median_ms(lambda answer: answer.tpot_s) == pytest.approx(100)
    assert mine.median_ms(lambda answer: answer.lateness_s) == pytest.approx(2)
    assert dict(mine.failures) == {"503: full": 1}
    assert dict(other.failures) == {"timeout": 1}


def test_the_table_has_the_ratio(
    ours: str, theirs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([ours, theirs]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("TTFT"))
    assert row.split()[-3:] == ["110.00", "220.00", "0.5000"]


def test_a_reduced_report_reads_the_same(theirs: str, tmp_path: Path) -> None:
    reduced = tmp_path / "reduced.json"
    assert main([theirs, "--reduce", str(reduced)]) == 0
    assert "something_else" not in reduced.read_text()
    assert read(reduced).answers == read(Path(theirs)).answers


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write(tmp_path / "x.json", {"benchmarks": [{}]})]) == 1
    assert "no report of guidellm or bench.serve" in capsys.readouterr().err
