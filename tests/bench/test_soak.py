"""The soak: it passes a right server, and finds planted leaks and wrong answers."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.soak.answers import Answer, Checker, WrongAnswer
from bench.soak.client import Target
from bench.soak.figure import draw
from bench.soak.floods import FLOODS, Flooder
from bench.soak.monitor import Probe, RankSample, Sample
from bench.soak.recipes import COMPLETIONS, Recipe, draw_recipes
from bench.soak.report import Report, put_table, read_metrics
from bench.soak.run import main
from bench.soak.tally import Phase, Tally
from bench.soak.traffic import MAX_WRONG, Traffic
from bench.soak.verdict import (
    find_growth,
    find_leaks,
    find_log_errors,
    find_missing,
    measure_growth,
)
from serve.request import Request, SamplingParams, pack_ids
from tests.support.fake_service import FakeCluster

MIB = 2**20
GREEDY = {"prompt": [1], "max_tokens": 3, "temperature": 0.0, "ignore_eos": True}
RECIPE = Recipe(7, COMPLETIONS, GREEDY)


def choice(ids: list[int], reason: str | None = "length", index: int = 0) -> dict[str, Any]:
    return {"index": index, "token_ids": ids, "text": str(ids), "finish_reason": reason}


def answer(*bodies: list[dict[str, Any]], usage: int | None = None) -> Answer:
    found = Answer()
    for choices in bodies:
        found.add({"choices": choices})
    if usage is not None:
        found.add({"choices": [], "usage": {"completion_tokens": usage}})
    return found


# --- answers ------------------------------------------------------------------------------------


def test_equal_answers_are_right_whole_or_streamed() -> None:
    checker = Checker()
    entry = choice([4, 5, 6])
    streamed = [
        [{"index": 0, "token_ids": [4], "text": "[4, ", "finish_reason": None}],
        [{"index": 0, "token_ids": [5, 6], "text": "5, 6]", "finish_reason": "length"}],
    ]
    checker.check(RECIPE, answer([entry], usage=3))
    checker.check(RECIPE, answer(*streamed, usage=3))
    checker.check_beginning(RECIPE, answer(streamed[0]))
    checker.check_beginning(RECIPE, answer())


def test_a_chats_text_is_read_of_messages_and_deltas() -> None:
    found = answer(
        [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
        [{"index": 0, "delta": {"content": "hi"}, "token_ids": [1], "finish_reason": None}],
    )
    assert found.choices[0].text == "hi"
    whole = answer([{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}])
    assert whole.choices[0].text == "hi"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (answer([choice([4, 5, 7])]), "recipe 7"),
        (answer([choice([4, 5])]), "2 tokens"),
        (answer([choice([4, 5, 6, 7])]), "4 tokens"),
        (answer([choice([4, 5], "stop")]), "finish reason 'stop'"),
        (answer([choice([4, 5, 6], "abort")]), "finish reason 'abort'"),
        (answer([choice([4, 5, 6], None)]), "ended 0 times"),
        (answer([choice([4, 5, 6])], [choice([])]), "ended 2 times"),
        (answer([choice([4, 5, 6])], usage=4), "usage of 4"),
        (answer([choice([4, 5, 6], index=1)]), r"choices \[1\]"),
        (answer(), r"choices \[\]"),
    ],
)
def test_planted_wrong_answers_are_found(wrong: Answer, named: str) -> None:
    checker = Checker()
    checker.check(RECIPE, answer([choice([4, 5, 6])]))
    with pytest.raises(WrongAnswer, match=named):
        checker.check(RECIPE, wrong)


def test_an_answer_that_is_cut_off_must_begin_as_before() -> None:
    checker = Checker()
    checker.check(RECIPE, answer([choice([4, 5, 6])]))
    with pytest.raises(WrongAnswer, match="began with"):
        checker.check_beginning(RECIPE, answer([choice([4, 6], None)]))
    with pytest.raises(WrongAnswer, match="choice 1"):
        checker.check_beginning(RECIPE, answer([choice([4], None, index=1)]))


def test_an_error_in_a_stream_is_wrong() -> None:
    with pytest.raises(WrongAnswer, match="broken"):
        Answer().add({"error": {"message": "broken"}})


def test_an_end_by_a_stop_is_right_where_one_is_possible() -> None:
    stopped = Recipe(1, COMPLETIONS, {**GREEDY, "stop": ["x"]})
    Checker().check(stopped, answer([choice([4, 5], "stop")]))


def test_recipes_depend_only_on_the_seed() -> None:
    recipes = draw_recipes(random.Random(3), 200)
    assert recipes == draw_recipes(random.Random(3), 200)
    assert {recipe.n for recipe in recipes} == {1, 2, 3}
    for recipe in recipes:
        assert recipe.body["temperature"] == 0.0 or "seed" in recipe.body, "the answer is fixed"


# --- traffic and floods over the real front end -------------------------------------------------


def traffic_to(url: str, tally: Tally, checker: Checker, num_recipes: int = 30) -> Traffic:
    recipes = draw_recipes(random.Random(5), num_recipes)
    return Traffic(Target(url), recipes, checker, tally, seed=5)


async def test_a_right_server_passes_traffic_and_floods(url: str, cluster: FakeCluster) -> None:
    tally = Tally()
    await traffic_to(url, tally, Checker()).run(250, 16)
    flooder = Flooder(
        Target(url), max_waiting=20, body_bytes=1 << 16, num_half_open=5, num_slow=2, hold_s=0.0
    )
    await flooder.run(tally, random.Random(6))
    assert (tally.num_wrong, tally.wrong) == (0, [])
    assert set(tally.kinds) == {"whole", "streamed", "dropped", "hung up", "malformed"}
    assert tally.num_done == tally.kinds.total() == tally.statuses.total() == 250
    assert {phase.name for phase in tally.phases} == set(tally.flood_statuses) == set(FLOODS)
    assert tally.flood_statuses["n = 128"] == {"200": 6}
    assert tally.flood_statuses["half-open connections"] == {
        "held": 5,
        "new client 200": 1,
    }
    # All are too long for the context, but the one of a field that is not ours and /tokenize.
    assert tally.flood_statuses["large bodies"] == {"200": 6, "400": 9}
    await cluster.until(lambda: cluster.service.num_active == 0)


async def test_answers_that_change_are_found(url: str, cluster: FakeCluster) -> None:
    tally, checker = Tally(), Checker()
    await traffic_to(url, tally, checker).run(150, 8)
    assert tally.num_wrong == 0
    cluster.stop_at = 1
    await traffic_to(url, tally, checker).run(150, 8)
    assert tally.num_wrong > 0
    await cluster.until(lambda: cluster.service.num_active == 0)


async def test_a_refusal_without_a_flood_is_found(url: str, cluster: FakeCluster) -> None:
    cluster.hold_at = 0
    one = SamplingParams(max_tokens=1)
    count = cluster.dispatcher.limits.max_requests
    waiting = [Request(id=f"w{i}", prompt=pack_ids((1,)), sampling=one) for i in range(count)]
    cluster.service.submit(waiting)
    tally = Tally()
    await traffic_to(url, tally, Checker()).run(40, 4)
    refused = tally.statuses["429"]
    assert tally.num_wrong == refused > 0
    with tally.flood("refusing"):
        await traffic_to(url, tally, Checker()).run(40, 4)
    assert tally.statuses["429"] == 2 * refused
    assert tally.num_wrong == refused
    for request in waiting:
        cluster.service.abort(request.id)


async def test_a_server_that_is_gone_ends_the_traffic() -> None:
    tally = Tally()
    traffic = traffic_to("http://127.0.0.1:9", tally, Checker())
    await traffic.run(10_000, 8)
    assert traffic.broken
    assert MAX_WRONG <= tally.num_wrong <= MAX_WRONG + 8


# --- the verdict --------------------------------------------------------------------------------

RANK = RankSample(rank=0, rss_bytes=300 * MIB, uss_bytes=0, num_fds=30, num_threads=16)
REPLICA = {
    "id": 0, "role": "mixed", "num_blocks": 100, "num_free_blocks": 100,
    "num_waiting": 0, "num_running": 0, "num_receiving": 0, "num_sending": 0,
}  # fmt: skip
IDLE = Sample(time_s=0.0, num_done=0, ranks=(RANK,), replicas=(REPLICA,))


def run_of(mib_per_1000: float, flood_mib: float = 0.0) -> tuple[list[Sample], list[Phase]]:
    """Make a run of 20,000 requests in 200 s, with a flood of 5 s at every 20th second."""
    rng = random.Random(9)
    phases = [Phase("flood", start, start + 5.0) for start in range(20, 200, 20)]
    samples = []
    for second in range(201):
        rss = 300 + mib_per_1000 * second / 10 + rng.uniform(-1, 1)
        if any(phase.start_s <= second <= phase.end_s for phase in phases):
            rss += flood_mib
        rank = replace(RANK, rss_bytes=int(rss * MIB))
        samples.append(replace(IDLE, time_s=float(second), num_done=second * 100, ranks=(rank,)))
    return samples, phases


def test_the_growth_of_a_planted_leak_is_measured() -> None:
    (growth,) = measure_growth(*run_of(mib_per_1000=3.0))
    assert growth.mib_per_1000_requests == pytest.approx(3.0, abs=0.1)
    (found,) = find_growth([growth], 2.0, 512.0)
    assert "rank 0 grows" in found


def test_the_memory_of_a_flood_is_a_rise_and_not_growth() -> None:
    (growth,) = measure_growth(*run_of(mib_per_1000=0.0, flood_mib=900.0))
    assert growth.mib_per_1000_requests == pytest.approx(0.0, abs=0.1)
    assert find_growth([growth], 2.0, 1024.0) == []
    (found,) = find_growth([growth], 2.0, 512.0)
    assert "more than at first" in found


def test_few_samples_say_nothing_of_growth() -> None:
    (growth,) = measure_growth(run_of(3.0)[0][:9], [])
    assert growth.mib_per_1000_requests is None
    assert find_growth([growth], 0.0, 512.0) == []


def test_a_server_that_is_as_before_has_no_leak() -> None:
    later = replace(RANK, num_fds=33, num_threads=24, rss_bytes=2 * RANK.rss_bytes)
    assert find_leaks(IDLE, replace(IDLE, ranks=(later,))) == []


@pytest.mark.parametrize(
    ("end", "named"),
    [
        (replace(IDLE, replicas=({**REPLICA, "num_free_blocks": 99},)), "free blocks"),
        (replace(IDLE, replicas=({**REPLICA, "num_sending": 1},)), "not idle"),
        (replace(IDLE, ranks=(replace(RANK, num_fds=60),)), "num_fds was 30 and is 60"),
        (replace(IDLE, ranks=(replace(RANK, num_threads=90),)), "num_threads"),
        (replace(IDLE, ranks=()), "ranks [0] have ended"),
    ],
)
def test_planted_leaks_are_found(end: Sample, named: str) -> None:
    (found,) = find_leaks(IDLE, end)
    assert named in found


def test_a_request_that_never_ended_is_found() -> None:
    text = "\n".join(
        [
            "# TYPE vllm:request_params_max_tokens histogram",
            'vllm:request_params_max_tokens_bucket{le="+Inf"} 12.0',
            "vllm:request_params_max_tokens_count 12.0",
            "vllm:request_params_max_tokens_sum 40.0",
            "# TYPE vllm:request_success counter",
            'vllm:request_success_total{finished_reason="stop"} 4.0',
            'vllm:request_success_total{finished_reason="abort"} 7.0',
            "",
        ]
    )
    metrics = read_metrics(text)
    assert find_missing(metrics, {}) == ["12 requests were accepted, 11 ended"]
    assert find_missing(metrics, metrics) == []
    assert len(find_missing({}, metrics)) == 1


def test_errors_in_the_log_are_found() -> None:
    assert find_log_errors("x INFO rank 0\nx WARNING rank 1\n") == []
    (found,) = find_log_errors("x INFO a\nx ERROR rank 1: bad\nTraceback (most recent\n")
    assert found.startswith("2 errors")
    assert found.endswith("x ERROR rank 1: bad")


def test_figure_and_report(tmp_path: Path) -> None:
    samples, phases = run_of(0.0, 200.0)
    tally = Tally()
    report = Report(
        options={},
        duration_s=200.0,
        kinds=tally.kinds,
        statuses=tally.statuses,
        flood_statuses={},
        phases=phases,
        growth=measure_growth(samples, phases),
        failures=[],
        samples=samples,
        probes=[Probe(float(second), random.Random(second).random()) for second in range(200)],
    )
    draw(report, tmp_path / "soak.png")
    assert 10_000 < (tmp_path / "soak.png").stat().st_size < 150_000
    assert report.outcome() == "passed"
    failed = report.with_failures(["a leak"])
    assert failed.outcome() == "FAILED: a leak"
    failed.write(tmp_path / "soak.json")
    written = json.loads((tmp_path / "soak.json").read_bytes())
    assert written["failures"] == ["a leak"]
    assert len(written["samples"]) == 201


def test_the_table_replaces_the_documents_table() -> None:
    document = "before\n<!-- soak -->\nold\n<!-- end of soak -->\nafter\n"
    found = put_table(document, "new")
    assert found == document.replace("old", "new")
    assert put_table(found, "old") == document
    with pytest.raises(ValueError, match="no lines"):
        put_table("before\n<!-- soak -->\n", "new")


@pytest.mark.slow
def test_a_short_soak_of_a_real_server_passes(tmp_path: Path) -> None:
    options = ["--requests", "300", "--flood-every", "200"]
    options += ["--body-bytes", str(1 << 16), "--half-open", "50"]
    assert main(["--output", str(tmp_path), *options]) == 0
    written = json.loads((tmp_path / "soak.json").read_bytes())
    assert sum(written["kinds"].values()) == 300
    assert len(written["phases"]) == len(FLOODS)
    assert (tmp_path / "soak.png").is_file()
