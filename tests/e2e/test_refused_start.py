"""Jobs that cannot start: one line says why, whichever rank finds it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import write_llama_checkpoint
from tests.support.server import free_port, serving

ONE_TO_ONE = ("--tokenizer", "none", "--num-blocks", "64")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(
        tmp_path_factory.mktemp("model"), seed=1, max_position_embeddings=8192
    )


# --- two ranks ----------------------------------------------------------------------------------


def run_two_ranks(*options: str, entry: str = "serve.launch") -> list[str]:
    """Return the log lines of a job that cannot start, without torchrun's own."""
    with serving(*options, num_ranks=2, ready=False, entry=entry) as server:
        assert server.wait_exited(60.0) != 0
        assert 'File "' + os.getcwd() + "/serve/" not in server.log, (
            "the log has a traceback of ours"
        )
        return [line for line in server.log.splitlines() if re.match(r"serve: |.* rank \d ", line)]


def test_a_missing_model_gives_one_error_line() -> None:
    lines = run_two_ranks("--model", "no/such/dir/")
    assert lines == ["serve: error: --model: no/such/dir/ does not exist"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--model no/such/dir", "--model: no/such/dir does not exist"),
        ("--block-size 32", "has --block-size 32, rank 0 has 16"),
    ],
)
def test_an_error_of_one_rank_alone_is_printed_by_rank_0(
    model: Path, options: str, reason: str
) -> None:
    lines = run_two_ranks(
        "--model", str(model), *ONE_TO_ONE, "--on-rank-1", options, entry="tests.support.odd_rank"
    )
    errors = [line for line in lines if "serve: error" in line]
    assert len(errors) == 1, lines
    assert errors[0].startswith("serve: error: rank 1 on ")
    assert reason in errors[0]


def test_a_port_in_use_gives_one_error_line(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        lines = run_two_ranks("--model", str(model), *ONE_TO_ONE, "--port", port)
    assert len(lines) == 1
    assert lines[0].startswith(f"serve: error: cannot listen on 127.0.0.1:{port}: ")


def test_a_missing_tensor_is_named_once(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=3)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    lines = run_two_ranks("--model", str(tmp_path), "--tokenizer", "none")
    assert_one_error(lines, "model.layers.1.mlp.up_proj.weight")


def assert_one_error(lines: list[str], named: str) -> None:
    errors = [line for line in lines if line.startswith("serve: ")]
    assert len(errors) == 1, lines
    assert errors[0].startswith("serve: error: ")
    assert named.lower() in errors[0].lower()
    assert not [line for line in lines if " ERROR " in line]


# --- one process, without torchrun --------------------------------------------------------------

# What every rank finds while it loads is reported in the same way, as the missing tensor shows.


def run_alone(*options: str) -> list[str]:
    """Return what a single rank that cannot start writes to stderr."""
    command = [sys.executable, "-m", "serve.launch", "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()


def test_a_rank_that_never_comes_is_named(model: Path) -> None:
    environ = os.environ | {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    command = [sys.executable, "-m", "serve.launch", "--model", str(model), *ONE_TO_ONE]
    command += ["--port", "0", "--start-timeout-s", "0.5"]
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=60.0, check=False
    )
    assert done.returncode == 2
    assert "serve: error: rank 1 did not start within 0.5 s" in done.stderr


@pytest.mark.parametrize("option", [["--max-num-seqs", "0"], ["--modle", "x"], ["--port", "x"]])
def test_wrong_options_are_refused_before_torch_is_imported(option: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "serve.launch", *option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=False)
    assert done.returncode == 2
    assert not re.search(r"\| +(torch|transformers|uvloop|aiohttp)\n", done.stderr)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(errors) == 1
    assert errors[0].startswith("serve: error: ")
    assert option[0] in errors[0]


def test_help_works_without_torchrun() -> None:
    command = [sys.executable, "-m", "serve.launch", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=False)
    assert done.returncode == 0
    assert "--replica-spec" in done.stdout
    assert not done.stderr


def test_a_missing_tokenizer_is_named(model: Path) -> None:
    assert_one_error(run_alone("--model", str(model)), "tokenizer")


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=3)
    (tmp_path / "tokenizer.json").write_text("{")
    assert_one_error(run_alone("--model", str(tmp_path)), "tokenizer")


def test_a_truncated_weight_file_is_named(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=3)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert_one_error(
        run_alone("--model", str(tmp_path), "--tokenizer", "none"), "model.safetensors"
    )


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=3)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["SomethingForCausalLM"], "model_type": "something"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_one_error(run_alone("--model", str(tmp_path), "--tokenizer", "none"), "something")


def test_a_max_model_len_beyond_the_pool_is_refused(model: Path) -> None:
    options = ("--tokenizer", "none", "--num-blocks", "4", "--max-model-len", "4096")
    assert_one_error(run_alone("--model", str(model), *options), "--max-model-len 4096")
