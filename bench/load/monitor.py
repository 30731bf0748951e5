"""Monitor: samples the server's queues and KV cache during a run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S = 5.0

# The gauges in ``GET /metrics`` of vLLM and servers like it, and our names for them.
_GAUGES = {
    "vllm:num_requests_waiting": "num_waiting",
    "vllm:num_requests_running": "num_running",
}
_KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_FIELDS = (
    "id",
    "role",
    "num_waiting",
    "num_running",
    "num_receiving",
    "num_sending",
    "num_blocks",
    "num_free_blocks",
)

Sample = dict[str, Any]


class Monitor:
    """Reads ``GET /cluster`` every ``interval_s``, or ``GET /metrics`` if there is no ``/cluster``.

    A server that has neither gives no samples. A server that does not answer in time leaves a gap
    in them.
    """

    def __init__(
        self, base_urls: Sequence[str], headers: Mapping[str, str], interval_s: float
    ) -> None:
        self.samples: list[Sample] = []
        self._urls, self._headers, self._interval_s = base_urls, headers, interval_s

    async def run(self, start_s: float) -> None:
        """Sample until cancelled. Times are seconds since ``start_s`` of the monotonic clock."""
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session:
            read = await self._choose(session)
            while read is not None:
                asked_s = time.monotonic()
                replicas = await read(session)
                if replicas:
                    self.samples.append({"time_s": asked_s - start_s, "replicas": replicas})
                await asyncio.sleep(max(0.0, asked_s + self._interval_s - time.monotonic()))

    async def _choose(self, session: aiohttp.ClientSession) -> Any:
        for read in (self._read_cluster, self._read_metrics):
            if await read(session):
                return read
        return None

    async def _read_cluster(self, session: aiohttp.ClientSession) -> list[Sample]:
        found = []
        for url in self._urls:
            body = await _get(session, f"{url}/cluster")
            replicas = _json(body).get("replicas", [])
            found += [{name: replica.get(name) for name in _FIELDS} for replica in replicas]
        return [{**replica, "id": index} for index, replica in enumerate(found)]

    async def _read_metrics(self, session: aiohttp.ClientSession) -> list[Sample]:
        bodies = [await _get(session, f"{url}/metrics") for url in self._urls]
        return [
            {"id": index, "role": "mixed", **gauges}
            for index, body in enumerate(bodies)
            if (gauges := read_gauges(body.decode(errors="replace")))
        ]


def read_gauges(exposition: str) -> Sample:
    """Return queue lengths and KV use of a vLLM-like server; empty if its metrics lack them.

    KV use is a fraction there, so the pool counts as one block of which a part is free.
    """
    found: Sample = {}
    for family in text_string_to_metric_families(exposition):
        if family.name in _GAUGES:
            total = sum(sample.value for sample in family.samples)
            found[_GAUGES[family.name]] = int(total)
        elif family.name in _KV_USAGE and family.samples:
            used = max(sample.value for sample in family.samples)
            found |= {"num_blocks": 1, "num_free_blocks": 1 - used}
    if "num_running" not in found:
        return {}
    return {"num_waiting": 0, "num_receiving": 0, "num_sending": 0} | found


async def _get(session: aiohttp.ClientSession, url: str) -> bytes:
    try:
        async with session.get(url) as response:
            return await response.read() if response.status == 200 else b""
    except (aiohttp.ClientError, TimeoutError):
        return b""  # one sample is missing; the load reports requests that fail


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(body) if body else {}
    except msgspec.MsgspecError:  # another server may have another page at this path
        return {}
    return found if isinstance(found, dict) else {}
