"""The soak: it passes a right server, and finds planted leaks and wrong answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench.soak.answers import Answer, Checker, WrongAnswer
from bench.soak.client import Target
from bench.soak.floods import FLOODS, Flooder
from bench.soak.recipes import COMPLETIONS, Recipe, draw_recipes
from bench.soak.run import main
from bench.soak.tally import Tally
from bench.soak.traffic import MAX_WRONG, Traffic
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


@pytest.mark.slow
def test_a_short_soak_of_a_real_server_passes(tmp_path: Path) -> None:
    options = ["--requests", "300", "--flood-every", "200"]
    options += ["--body-bytes", str(1 << 16), "--half-open", "50"]
    assert main(["--output", str(tmp_path), *options]) == 0
    written = json.loads((tmp_path / "soak.json").read_bytes())
    assert sum(written["kinds"].values()) == 300
    assert len(written["phases"]) == len(FLOODS)
    assert (tmp_path / "soak.png").is_file()
