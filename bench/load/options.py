"""Options: the command line of ``bench.serve``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import msgspec

from bench.load.lengths import NAMED
from bench.load.workload import TRACES, WorkloadOptions

ARRIVALS = ("poisson", "gamma", "uniform", "closed", "trace")


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve", description=description, allow_abbrev=False
    )
    _add_target(parser.add_argument_group("server"))
    _add_workload(parser.add_argument_group("requests"))
    _add_arrivals(parser.add_argument_group("arrivals"))
    _add_report(parser.add_argument_group("report"))
    return parser


# One argument a line would make these lists four times as long.
# fmt: off
def _add_target(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--base-url", nargs="+", required=True, metavar="URL",
        help="address of the server. Several addresses are copies of it, used in turn.")
    add("--model", help="model name in requests. Default: the first in /v1/models.")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"),
        help="bearer token. Default: $OPENAI_API_KEY.")
    add("--endpoint", choices=("completions", "chat"), default="completions",
        help="chat needs --workload prompts. Default: %(default)s.")
    add("--no-ignore-eos", action="store_true",
        help="let the model end answers. Default: every answer has its planned length.")
    add("--count-by", choices=("usage", "token-ids"), default="usage",
        help="count tokens by the running usage (continuous_usage_stats, as in vLLM) or by the "
        "token ids in each chunk. Default: %(default)s.")
    add("--extra-body", type=_json_object, default={}, metavar="JSON",
        help="further fields of every request. A null removes a field.")


def _add_workload(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    kinds = ("fixed", "uniform", "lognormal", *NAMED, *TRACES)
    add("--workload", choices=kinds, default="fixed",
        help="where lengths come from: --input-len and --output-len (fixed, uniform, lognormal), "
        "published means (sharegpt, humaneval, longbench), or --trace (mooncake, azure, prompts). "
        "Default: %(default)s.")
    add("--input-len", type=int, metavar="TOKENS",
        help="length of a prompt; for uniform and lognormal the mean length")
    add("--output-len", type=int, metavar="TOKENS",
        help="length of an answer; for uniform and lognormal the mean length. Also used where a "
        "trace has no output length.")
    add("--length-spread", type=float, metavar="SHARE",
        help="uniform: half the range over the mean. lognormal: standard deviation over the mean. "
        "Default: 0.5.")
    add("--trace", metavar="FILE", help="file of the mooncake, azure and prompts workloads")
    add("--max-model-len", type=int, metavar="TOKENS",
        help="shorten requests whose input and output exceed this together. Default: no limit.")
    add("--token-ids", type=int, nargs=2, default=(1000, 30000), metavar=("LOW", "HIGH"),
        help="range of the random token ids of prompts. Default: 1000 30000.")
    add("--num-requests", type=int, metavar="N",
        help="number of requests. Default: as many as fit into --duration-s, or the whole trace; "
        "else 100.")
    add("--seed", type=int, default=0,
        help="seed of lengths, arrivals and prompts. Default: %(default)s.")


def _add_arrivals(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--arrivals", choices=ARRIVALS, default="poisson",
        help="when requests are sent. closed: whenever another one ends. trace: at the times of "
        "--trace. Default: %(default)s.")
    add("--rate", type=float, metavar="RPS",
        help="requests per second. The times of a trace are scaled to it.")
    add("--cv", type=float, help="coefficient of variation of the gaps of gamma arrivals")
    add("--concurrency", type=int, metavar="N",
        help="number of requests in flight with closed arrivals")
    add("--time-scale", type=float, default=1.0,
        help="factor on the times of a trace; not with --rate. Default: %(default)g.")
    add("--duration-s", type=float, metavar="S",
        help="send no request later than this after the start. Default: no limit.")
    add("--num-warmups", type=int, default=1, metavar="N",
        help="requests sent one by one before the run, to every address. Default: %(default)s.")
    add("--processes", type=int, default=0, metavar="N",
        help="number of sending processes. Default: one for every 10000 planned output tokens per "
        "second, at most one fewer than there are processors.")


def _add_report(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--ttft-slo", type=float, metavar="S", help="objective for TTFT. Default: none.")
    add("--tpot-slo", type=float, metavar="S", help="objective for TPOT. Default: none.")
    add("--output", type=Path, metavar="FILE", help="write the run as JSON")
    add("--plots", type=Path, metavar="FOLDER", help="draw the run as PNG and SVG")
    add("--monitor-interval-s", type=float, default=0.5, metavar="S",
        help="interval at which the server's queues and KV cache are read; 0: never. "
        "Default: %(default)g.")
    add("--quiet", action="store_true", help="print neither progress bar nor table")
# fmt: on


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return found


def workload_options(args: argparse.Namespace) -> WorkloadOptions:
    return WorkloadOptions(
        workload=args.workload,
        input_len=args.input_len,
        output_len=args.output_len,
        length_spread=args.length_spread,
        trace=args.trace,
        max_model_len=args.max_model_len,
        arrivals=args.arrivals,
        rate=args.rate,
        cv=args.cv,
        concurrency=args.concurrency,
        time_scale=args.time_scale,
        num_requests=args.num_requests,
        duration_s=args.duration_s,
        seed=args.seed,
        token_ids=tuple(args.token_ids),
    )
