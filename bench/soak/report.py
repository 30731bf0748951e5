"""Report: what a soak found, as JSON and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from bench.soak.monitor import Probe, Sample
from bench.soak.tally import Phase
from bench.soak.verdict import Growth

_BEGIN, _END = "<!-- soak -->", "<!-- end of soak -->"


@dataclass(frozen=True, slots=True)
class Report:
    """One soak. It is written as soak.json."""

    options: Mapping[str, Any]
    duration_s: float
    kinds: Counter[str]
    statuses: Counter[str]
    flood_statuses: Mapping[str, Counter[str]]
    phases: Sequence[Phase]
    growth: Sequence[Growth]
    failures: Sequence[str]  # empty: the soak was passed
    samples: Sequence[Sample]  # idle before the run, during it, idle after it
    probes: Sequence[Probe]

    @property
    def num_requests(self) -> int:
        return self.kinds.total()

    def title(self) -> str:
        """Return the figure's title."""
        floods = len(self.phases)
        return f"{self.num_requests} mixed requests and {floods} floods in {self.duration_s:.0f} s"

    def with_failures(self, failures: Sequence[str]) -> Report:
        """Return the same report with further failures."""
        return replace(self, failures=[*self.failures, *failures])

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))

    def table(self) -> str:
        """Return the main figures in Markdown."""
        before, after = self.samples[0], self.samples[-1]
        rows = [
            ("options", ", ".join(f"{name} {value:g}" for name, value in self.options.items())),
            ("requests", f"{self.num_requests} ({_counts(self.kinds)})"),
            ("status", _counts(self.statuses)),
            ("time", f"{self.duration_s:.0f} s"),
        ]
        rows += [(f"flood: {name}", _counts(c)) for name, c in self.flood_statuses.items()]
        rows.append(("latency of a small request", _probes(self.probes)))
        for old, new, one in zip(before.ranks, after.ranks, self.growth, strict=False):
            slope = one.mib_per_1000_requests
            grown = "not known" if slope is None else f"{slope:+.2f} MiB per 1000 requests"
            rows.append(
                (
                    f"rank {one.rank}",
                    f"{one.start_mib:.0f} MiB before, {one.end_mib:.0f} after, {one.peak_mib:.0f} "
                    f"at most; growth {grown}; file descriptors {old.num_fds} and {new.num_fds}; "
                    f"threads {old.num_threads} and {new.num_threads}",
                )
            )
        if not before.ranks:
            rows.append(("ranks", "not sampled, because their processes are not known"))
        for name, sample in (("before", before), ("after", after)):
            free = [f"{one['num_free_blocks']} of {one['num_blocks']}" for one in sample.replicas]
            rows.append((f"free blocks {name}", ", ".join(free)))
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])

    def outcome(self) -> str:
        """Return the failures, one a line."""
        return "\n".join(f"FAILED: {failure}" for failure in self.failures) or "passed"


def put_table(document: str, table: str) -> str:
    """Return ``document`` with another table. Raises ``ValueError`` if it has no place for one."""
    before, begin, rest = document.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"there are no lines {_BEGIN} and {_END}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def read_metrics(exposition: str) -> dict[str, float]:
    """Return the sum of each sample's values over its labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def _counts(counter: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items()))


def _probes(probes: Sequence[Probe]) -> str:
    found = sorted(probe.latency_s for probe in probes if probe.latency_s is not None)
    if not found:
        return "never answered"
    missed = len(probes) - len(found)
    return (
        f"{found[len(found) // 2] * 1e3:.0f} ms in the median, {found[-1]:.2f} s at most, "
        f"{missed} of {len(probes)} refused or not answered"
    )
