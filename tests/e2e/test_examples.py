"""The examples run: a client against a real server, a batch on two ranks, a job of two nodes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from openai import InternalServerError, OpenAI
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from tests.support.checkpoints import write_llama_checkpoint
from tests.support.paths import ROOT
from tests.support.server import free_port, serving

TIMEOUT_S = 250.0
EXAMPLES = ROOT / "examples"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random checkpoint whose tokens are bytes, with a chat template."""
    folder = write_llama_checkpoint(
        tmp_path_factory.mktemp("examples") / "bytes",
        seed=3, vocab_size=257, eos_token_id=256, max_position_embeddings=8192,
    )  # fmt: skip
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<end>", special=True)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(str(folder))
    return folder


def run_example(*command: str) -> list[str]:
    """Run ``command``, which must succeed; return the lines that it prints."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_openai_client(model: Path) -> None:
    with serving("--model", str(model), "--num-blocks", "64", num_ranks=2) as server:
        script = str(EXAMPLES / "openai_client.py")
        lines = run_example(sys.executable, script, "--base-url", server.url)
    chat, streamed, token_ids, refused = lines
    answer = re.fullmatch(r"chat: (.+) \((?:length|stop)\)", chat)
    same = re.fullmatch(r"streamed: (.+) \((\d+) tokens\)", streamed)
    assert answer is not None, chat
    assert same is not None, streamed
    assert same[1] == answer[1]
    assert 0 < int(same[2]) <= 40
    ids = re.fullmatch(r"token ids: \[10, 20, 30\] -> \[(.+)\]", token_ids)
    assert ids is not None, token_ids
    assert len(ids[1].split(", ")) == 8
    assert refused.startswith("refused: 400, temperature: temperature must be in ")


def test_offline(model: Path) -> None:
    lines = run_example(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(EXAMPLES / "offline.py"), "--model", str(model), "--max-tokens", "5",
    )  # fmt: skip
    assert len(lines) == 3
    assert lines[0].startswith("'The capital of France is' -> ")
    assert all(line.endswith(("(length)", "(stop)")) for line in lines)


# --- two hosts ----------------------------------------------------------------------------------


def two_hosts(*arguments: str) -> list[str]:
    return ["bash", str(EXAMPLES / "two_hosts.sh"), *arguments]


def test_two_hosts_dry_run() -> None:
    (line,) = run_example(*two_hosts("--dry-run", "10.0.0.1", "1", "--model", "a b"))
    assert line.split() == [
        "python", "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", "1",
        "--nproc-per-node", "gpu", "--master-addr", "10.0.0.1", "--master-port", "29500",
        "-m", "serve.launch", "--model", "a\\", "b",
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [[], ["10.0.0.1"], ["10.0.0.1", "first"]])
def test_two_hosts_refuses_a_malformed_command(arguments: list[str]) -> None:
    done = subprocess.run(two_hosts(*arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert not done.stdout


class Nodes:
    """The torchruns of one job. All processes write into one pipe, so its end is their end."""

    def __init__(self, *options: str) -> None:
        port = str(free_port())
        extra = {"PYTHON": sys.executable, "NPROC_PER_NODE": "1", "MASTER_PORT": port}
        read_end, write_end = os.pipe()
        self.torchruns = [
            subprocess.Popen(
                two_hosts("127.0.0.1", str(node_rank), *options), env=os.environ | extra,
                stdin=subprocess.DEVNULL, stdout=write_end, stderr=write_end,
                start_new_session=True,
            )
            for node_rank in range(2)
        ]  # fmt: skip
        os.close(write_end)
        self.lines: list[str] = []
        self._pipe = os.fdopen(read_end, encoding="utf-8", errors="replace")

    def read_until(self, pattern: str) -> re.Match[str]:
        for line in self._pipe:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no line like {pattern!r}")

    def read_to_end(self) -> None:
        self.lines += self._pipe

    def kill(self) -> None:
        """Kill what is left; ranks end with their torchrun."""
        for torchrun in self.torchruns:
            with suppress(ProcessLookupError):
                os.killpg(torchrun.pid, signal.SIGKILL)
            torchrun.wait(TIMEOUT_S)
        self._pipe.close()


@contextmanager
def running_nodes(*options: str) -> Iterator[Nodes]:
    nodes = Nodes(*options)
    try:
        yield nodes
    except BaseException:
        print("".join(nodes.lines))
        raise
    finally:
        nodes.kill()


def test_two_hosts(model: Path) -> None:
    with running_nodes("--model", str(model), "--num-blocks", "600", "--port", "0") as nodes:
        url = nodes.read_until(r"listening on (http://\S+)")[1]
        replicas = nodes.read_until(r"replicas: (.+)")[1]
        assert re.search(r"prefill 0 on rank 0 .*decode 1 on rank 1 ", replicas)
        nodes.read_until(r"serve: ready:")
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            done = client.completions.create(model="bytes", prompt=[1, 2, 3], max_tokens=4)
            assert done.usage is not None
            # A signal to either host drains the job. Here it is the host without rank 0.
            chunks = client.completions.create(
                model="bytes", prompt=[1, 2, 3], max_tokens=800, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            assert next(chunks_left := iter(chunks)).choices
            ranks = [psutil.Process(t.pid).children()[0] for t in nodes.torchruns]
            nodes.torchruns[1].send_signal(signal.SIGTERM)
            nodes.read_until("stopping; 1 requests are still open")
            with pytest.raises(InternalServerError, match="shutting down"):
                client.completions.create(model="bytes", prompt=[1], max_tokens=1)
            assert [chunk.choices[0].finish_reason for chunk in chunks_left][-1] == "length"
        for rank in ranks:
            rank.wait(TIMEOUT_S)
        # The first torchrun now waits for the second, which the signal has ended, for 5 minutes.
        nodes.kill()
    assert not [line for line in nodes.lines if re.match(r"serve: |.* ERROR rank ", line)]
