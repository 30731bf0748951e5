"""Record: the times and token counts of one request, measured by the client."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct, field


class Record(Struct, kw_only=True):
    """One request. Times are seconds of the monotonic clock, which all processes here share.

    ``token_times_s`` has one entry for each network read that brought tokens, ``token_counts`` the
    number of tokens that it brought. A read may bring several tokens, because servers join tokens
    into one chunk and networks join chunks.
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
    counted: bool = True  # whether the server reported how many tokens each chunk brought
    # The server's own clock times of the stages, by name.
    timeline: dict[str, float | None] | None = None
    error: str | None = None

    @property
    def lateness_s(self) -> float:
        """How long after its scheduled time the request was sent."""
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """From the scheduled send to the first token.

        It does not count from the actual send, because a client that sends late would then make
        the server look faster than its users see it.
        """
        return self.token_times_s[0] - self.scheduled_s if self.token_times_s else None

    @property
    def ttft_from_send_s(self) -> float | None:
        """From the actual send to the first token. Most other load generators call this TTFT."""
        return self.token_times_s[0] - self.sent_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None with fewer than two tokens."""
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
        """Yield the inter-token latencies. Tokens that came in one read are 0 s apart."""
        previous = None
        for time_s, count in zip(self.token_times_s, self.token_counts, strict=True):
            if previous is not None:
                yield time_s - previous
            for _ in range(count - 1):
                yield 0.0
            previous = time_s
