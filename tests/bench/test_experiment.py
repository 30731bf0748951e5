"""Experiments: which files are accepted, the errors for others, and the commands they give."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from bench.sweep.configuration import PORT, Configuration, configurations, load_command
from bench.sweep.experiment import (
    ExperimentError,
    Workload,
    decode,
)
from bench.sweep.server_job import commands
from tests.support.paths import ROOT

EXPERIMENTS = ROOT / "bench" / "experiments"
OUR_SERVER = ("-m", "serve.launch")


def content(**changes: Any) -> dict[str, Any]:
    """Return a small experiment as decoded YAML. A change to None removes the key."""
    found = {
        "name": "small",
        "objectives": {"ttft_s": 1},
        "rates": {"values": [1, 2]},
        "servers": [{"splits": "all"}],
    }
    return {key: value for key, value in (found | changes).items() if value is not None}


def expand(**changes: Any) -> dict[str, Configuration]:
    """Return the experiment's configurations by name."""
    return {one.name: one for one in configurations(decode(content(**changes)))}


def options_of(configuration: Configuration) -> list[str]:
    """Return the words after ``--port PORT`` in the command of our server."""
    (launch,) = configuration.launches
    start = launch.command.index(PORT)
    assert launch.command[start - 3 : start] == (*OUR_SERVER, "--port")
    return list(launch.command[start + 1 :])


def test_defaults_and_both_spellings() -> None:
    experiment = decode(
        content(
            workload={"input-len": 64, "output_len": 16, "token-ids": [5, 9]},
            serve_options={"max_model_len": 512, "enable-chunked-prefill": False},
        )
    )
    assert experiment.goals == [0.9, 0.99]
    assert experiment.gpus == 1
    assert (experiment.rates.bisect, experiment.rates.stop_below) == (3, 0.5)
    assert experiment.workload == Workload(input_len=64, output_len=16, token_ids=(5, 9))
    assert experiment.serve_options == {"max-model-len": 512, "enable-chunked-prefill": False}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rate": [1]}, "`rate`"),
        ({"name": None}, "`name`"),
        ({"name": "a/b"}, "`$.name`"),
        ({"gpus": "two"}, "`$.gpus`"),
        ({"gpus": 0}, "`$.gpus`"),
        ({"objectives": {}}, "`$.objectives`"),
        ({"objectives": {"ttft_s": 0}}, "`$.objectives.ttft_s`"),
        ({"goals": [90]}, "`$.goals[0]`"),
        ({"rates": {"values": []}}, "`$.rates.values`"),
        ({"rates": {"values": [1, 1.0]}}, "`$.rates.values`"),
        ({"rates": {"values": [1], "stop_below": 0.95}}, "`$.rates.stop_below`"),
        ({"workload": {"rate": 3}}, "`rate`"),
        ({"workload": {"input_len": "many"}}, "`$.workload.input_len`"),
        ({"workload": {"input_len": 3, "input-len": 4}}, "`$.workload`"),
        ({"workload": {"arrivals": "closed"}}, "`$.workload.arrivals`"),
        ({"serve_options": {"seed": {}}}, "`$.serve_options"),
        ({"servers": []}, "`$.servers`"),
        ({"servers": {"splits": "all"}}, "`$.servers`"),
        ({"servers": ["all"]}, "`$.servers[0]`"),
        ({"servers": [{"name": "x"}]}, "`$.servers[0]`"),
        ({"servers": [{"splits": "all", "command": "x"}]}, "`$.servers[0]`"),
        ({"servers": [{"splits": "all"}, {"splits": "both"}]}, "`$.servers[1].splits`"),
        ({"servers": [{"splits": [0]}]}, "`$.servers[0].splits"),
        ({"servers": [{"splits": "all", "tpp": 2}]}, "`tpp`"),
        ({"servers": [{"name": "x", "command": "{port}", "copies": 0}]}, "`$.servers[0].copies`"),
    ],
)
def test_mistakes_name_the_key(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ExperimentError) as failed:
        decode(content(**changes))
    assert named in str(failed.value)
    assert "\n" not in str(failed.value)


def test_every_split_of_four() -> None:
    found = expand(gpus=4)
    assert list(found) == ["colocated", "1P+3D", "2P+2D", "3P+1D"]
    assert all(one.num_gpus == 4 for one in found.values())
    assert options_of(found["colocated"]) == ["--mode", "colocated"]
    assert options_of(found["3P+1D"]) == ["--partition-id", "3"]
    (launch,) = found["2P+2D"].launches
    assert launch.command[launch.command.index("--nproc-per-node") + 1] == "4"


def test_one_gpu_can_only_be_colocated() -> None:
    assert list(expand(gpus=1)) == ["colocated"]


def test_replicas_of_two_ranks() -> None:
    found = expand(gpus=6, servers=[{"splits": [2, "colocated"], "tp": 2, "suffix": "x"}])
    assert list(found) == ["2P+1D-tp2-x", "colocated-tp2-x"]
    spec = ["--replica-spec", "2,1", "2,1", "2,1"]
    assert options_of(found["2P+1D-tp2-x"]) == [*spec, "--partition-id", "2"]
    assert options_of(found["colocated-tp2-x"]) == [*spec, "--mode", "colocated"]


def test_options_of_one_entry_come_before_those_of_all() -> None:
    entry = {"splits": ["colocated"], "options": {"max_num_batched_tokens": 512, "seed": None}}
    found = expand(
        serve_options={"max-num-batched-tokens": 64, "seed": 3, "enable-chunked-prefill": False},
        servers=[entry],
    )
    assert options_of(found["colocated"]) == [
        "--max-num-batched-tokens", "512", "--no-enable-chunked-prefill", "--mode", "colocated",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"gpus": 3, "servers": [{"splits": "all", "tp": 2}]}, "tp 2"),
        ({"gpus": 2, "servers": [{"splits": [2]}]}, "none to decode"),
        ({"servers": [{"splits": "all"}, {"splits": "all"}]}, "two configurations"),
        ({"serve_options": {"port": 1}}, "port is set"),
        ({"serve_options": {"no-such-option": 1}}, "--no-such-option"),
        ({"serve_options": {"max-model-len": 0}}, "--max-model-len"),
        ({"servers": [{"name": "x", "command": "vllm serve"}]}, "{port}"),
        ({"servers": [{"name": "x", "command": "a {port} {model}"}]}, "no model"),
        ({"servers": [{"name": "x", "command": "a {port} {modle}"}]}, "{modle}"),
        ({"servers": [{"name": "x", "command": "a '{port}"}]}, "`$.servers[0].command`"),
        ({"gpus": 4, "servers": [{"name": "x", "command": "{port}", "copies": 3}]}, "3 copies"),
    ],
)
def test_impossible_servers(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ExperimentError) as failed:
        expand(**changes)
    assert text in str(failed.value)


def test_copies_of_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {
        "name": "peer",
        "command": """peer "{model}" --tp {gpus} --port {port} --json '{"a": 1}'""",
        "copies": 2,
        "env": {"FLAG": "1"},
    }
    (peer,) = expand(gpus=4, model="/my models/m", servers=[entry]).values()
    assert peer.num_gpus == 4
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    command = """peer '/my models/m' --tp 2 --port {} --json '{{"a": 1}}'"""
    assert commands(peer, [81, 82]) == [
        f"env CUDA_VISIBLE_DEVICES=0,1 FLAG=1 {command.format(81)}",
        f"env CUDA_VISIBLE_DEVICES=2,3 FLAG=1 {command.format(82)}",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert "CUDA_VISIBLE_DEVICES=6,7 " in commands(peer, [81, 82])[1]


def test_a_copy_for_every_gpu_and_one_that_runs_already() -> None:
    found = expand(
        gpus=8,
        servers=[
            {"name": "each", "command": "x {port}", "copies": "per-gpu", "gpus": 3},
            {"name": "there", "base_urls": ["http://a:1/v1/", "http://b:2"], "gpus": 2},
        ],
    )
    assert [launch.gpus for launch in found["each"].launches] == [range(i, i + 1) for i in range(3)]
    assert found["there"].base_urls == ("http://a:1", "http://b:2")
    assert found["there"].launches == ()
    assert found["there"].num_gpus == 2


def test_load_command() -> None:
    """The seed differs with the rate, because a prefix cache would know equal prompts."""
    entry = {
        "name": "peer",
        "command": "x {port}",
        "model_name": "its-name",
        "load_options": {"count-by": "token-ids", "seed": 2, "extra_body": {"k": None}},
    }
    experiment = decode(
        content(
            objectives={"tpot_s": 0.02},
            workload={"input_len": 8, "seed": 1, "token_ids": [5, 9], "no_ignore_eos": False},
            servers=[entry],
        )
    )
    (peer,) = configurations(experiment)
    command = load_command(experiment, peer, ["http://a", "http://b"], 2.5, Path("/x.json"))
    assert command == [
        sys.executable, "-m", "bench.serve", "--base-url", "http://a", "http://b",
        "--model", "its-name", "--rate", "2.5", "--tpot-slo", "0.02", "--input-len", "8",
        "--seed", "2502", "--token-ids", "5", "9", "--count-by", "token-ids",
        "--extra-body", '{"k":null}', "--output", "/x.json",
    ]  # fmt: skip
