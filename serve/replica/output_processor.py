"""OutputProcessor: the text, stop decision, timeline and Delta of each sampled token. Pure."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from serve.protocol.messages import Delta, DetokenizerState, Handover
from serve.replica.active_request import ActiveRequest
from serve.replica.sequence import Sequence
from serve.replica.stop_check import check_stop, end_tokens
from serve.replica.timeline import record_first_token
from serve.request import FinishReason
from serve.tokenizer.detokenizer import Detokenizer
from serve.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessedToken:
    """The result of one sampled token.

    The request has ended if ``finished``. It continues on its decode replica if ``handover`` is
    set. Otherwise its next token is sampled here.
    """

    delta: Delta
    handover: Handover | None = None

    @property
    def finished(self) -> bool:
        """Whether the token is the request's last one."""
        return self.delta.finish_reason is not None


class OutputProcessor:
    """Processes the sampled tokens of one replica.

    It knows neither blocks nor the scheduler nor transfers: the replica acts on what it returns.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
        clock: Callable[[], float],
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._clock = clock

    def start(self, sequence: Sequence, decode_replica: int) -> ActiveRequest:
        """Return the active request of a prompt without output."""
        request = sequence.request
        detokenizer = Detokenizer(self._tokenizer, request.sampling, request.prompt_ids)
        return self._activate(sequence, detokenizer, decode_replica)

    def resume(
        self, sequence: Sequence, state: DetokenizerState, decode_replica: int
    ) -> ActiveRequest:
        """Return the active request of a sequence whose first tokens another replica processed."""
        detokenizer = Detokenizer.resume(self._tokenizer, sequence.request.sampling, state)
        return self._activate(sequence, detokenizer, decode_replica)

    def fail(self, sequence: Sequence, error: Exception) -> Delta:
        """Return the Delta that ends a request whose text could not be made, and log the error.

        Only this request is concerned. What runs on the GPU does not depend on text.
        """
        log.error("request %s failed", sequence.id, exc_info=error)
        return Delta(
            request_id=sequence.id,
            first_index=sequence.num_output_tokens,
            token_ids=(),
            text="",
            finish_reason=FinishReason.ERROR,
            error="the server failed to process the text of this request",
        )

    def process(self, active: ActiveRequest, token_id: int) -> ProcessedToken:
        """Append ``token_id`` to the sequence, detokenise it and decide whether it is the last."""
        sequence = active.sequence
        sequence.token_ids.append(token_id)
        check = check_stop(sequence, active.detokenizer, token_id, active.end_tokens)
        if sequence.num_output_tokens == 1:
            record_first_token(sequence, self._clock())
        handover = None
        if check.reason is None and not sequence.decodes_here:
            handover = Handover(sequence.output_ids, active.detokenizer.state())
        delta = Delta(
            request_id=sequence.id,
            first_index=sequence.num_output_tokens - 1,
            token_ids=(token_id,),
            text=check.text,
            finish_reason=check.reason,
            stop_reason=check.stop,
            timeline=active.unreported_timeline(),
        )
        return ProcessedToken(delta, handover)

    def _activate(
        self, sequence: Sequence, detokenizer: Detokenizer, decode_replica: int
    ) -> ActiveRequest:
        ends = end_tokens(sequence.request.sampling, self._eos_token_ids)
        return ActiveRequest(sequence, detokenizer, ends, decode_replica)
