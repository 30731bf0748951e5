"""Record: what happened to one request, as the client saw it."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct, field


class Record(Struct, kw_only=True):
    """Times are seconds of the machine's monotonic clock, which all its processes share.

    ``token_times_s`` has one entry for each network read that brought tokens, and
    ``token_counts`` how many it brought: servers join tokens into one chunk, and networks join
    chunks, so neither is a token.
    """

    index: int
    scheduled_s: float
    sent_s: float
    end_s: float = 0.0
    num_prompt_tokens: int = 0
    max_tokens: int = 0
    num_output_tokens: int = 0
    token_times_s: list[float] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    counted: bool = True  # whether the server told how many tokens each chunk brought
    timeline: dict[str, float | None] | None = None
    error: str | None = None

    @property
    def lateness_s(self) -> float:
        """How long after its time the request was sent."""
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """From the scheduled send to the first token, so that a late client does not flatter."""
        return self.token_times_s[0] - self.scheduled_s if self.token_times_s else None

    @property
    def ttft_from_send_s(self) -> float | None:
        """From the actual send to the first token: what most other load generators call TTFT."""
        return self.token_times_s[0] - self.sent_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None with less than two."""
        if self.num_output_tokens < 2 or not self.token_times_s:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.num_output_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """From the scheduled send to the last token; None for a request that failed."""
        if self.error is not None or not self.token_times_s:
            return None
        return self.token_times_s[-1] - self.scheduled_s

    def gaps_s(self) -> Iterator[float]:
        """Inter-token latencies: tokens that came together are no time apart."""
        previous = None
        for time_s, count in zip(self.token_times_s, self.token_counts, strict=True):
            if previous is not None:
                yield time_s - previous
            for _ in range(count - 1):
                yield 0.0
            previous = time_s
