"""Join the job: check that all ranks can start together, connect them, make the RankProcess."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import sys
import threading
from collections.abc import Iterator

import torch

from serve.comm.process_groups import DEFAULT_START_TIMEOUT_S, init_world, new_control_group
from serve.comm.rendezvous import Rendezvous, StartError, open_store
from serve.config.server import ServerConfig
from serve.device import pick_device
from serve.engine.rank_setup import RankSetup
from serve.protocol.messages import protocol_digest
from serve.runtime.rank import RankProcess
from serve.topology import RankInfo, build_topology

# Python's 5 ms is too long: a busy event loop would starve the GPU thread, and the GPU thread it.
SWITCH_INTERVAL_S = 1e-4

# What may differ between ranks: where things are on a host, and what only rank 0 uses.
_HOST_OPTIONS = frozenset((
    "model", "model_config", "tokenizer", "served_model_names", "host", "port", "api_keys", "http",
    "sampling_defaults", "chat_template", "log_level", "notes", "dtype", "block_size",
    "max_waiting", "max_waiting_tokens", "max_waiting_share", "drain_timeout_s",
    "start_timeout_s", "dispatch_policy", "warnings",
))  # fmt: skip


def join_job(config: ServerConfig, rank_info: RankInfo) -> RankProcess:
    """Connect to the other ranks and return this rank's process, on the running event loop.

    Raises ``StartError`` on every rank if one of them cannot start, has other options or another
    model, or does not come within ``config.start_timeout_s``.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    store = open_store(rank_info, config.start_timeout_s)
    rendezvous = Rendezvous(rank_info, store, config.start_timeout_s)
    topology = build_topology(config.replica_specs, config.partition_id, mixed=config.colocated)
    try:
        device = pick_device(rank_info.local_rank)
        facts = collect_facts(RankSetup(config, topology, rank_info, device))
    except Exception as error:  # the others must not wait for this rank, whatever it is
        rendezvous.report(f"{type(error).__name__}: {error}")
        raise
    rendezvous.arrive(facts)
    with _deadline(rank_info, config.start_timeout_s):
        init_world(rank_info, "cuda" if device.type == "cuda" else "cpu", store)
        control_group = new_control_group()
    return RankProcess(config, rank_info, topology, device, control_group)


def report_start_error(rank_info: RankInfo, error: str) -> None:
    """Let rank 0 print why this other rank cannot start; print it here if rank 0 is not reached."""
    try:
        store = open_store(rank_info, DEFAULT_START_TIMEOUT_S)
    except StartError:
        print(f"serve: error: rank {rank_info.rank}: {error}", file=sys.stderr)
    else:
        Rendezvous(rank_info, store, DEFAULT_START_TIMEOUT_S).report(error)


def collect_facts(setup: RankSetup) -> dict[str, str]:
    """Return what must be equal on all ranks, by names that a user understands."""
    options = {
        "--" + field.name.replace("_", "-"): str(getattr(setup.config, field.name))
        for field in dataclasses.fields(setup.config)
        if field.name not in _HOST_OPTIONS
    }
    model = hashlib.sha256(repr(setup.config.model_config).encode()).hexdigest()[:12]
    return options | {
        "a model configuration with digest": model,
        "--dtype": str(setup.dtype),
        "--block-size": str(setup.block_size),
        "protocol": protocol_digest(),
        "torch": str(torch.__version__),
    }


@contextlib.contextmanager
def _deadline(rank_info: RankInfo, timeout_s: float) -> Iterator[None]:
    """End the process if the block takes longer than ``timeout_s``.

    gloo connects the ranks in a blocking call. It must not have a time-out of its own, because that
    would hold for the life of the groups.
    """

    def give_up() -> None:
        print(
            f"serve: error: rank {rank_info.rank} could not connect to the other ranks within "
            f"--start-timeout-s {timeout_s:.0f}. Hosts must reach each other on all ports; "
            "GLOO_SOCKET_IFNAME names the network interface.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
