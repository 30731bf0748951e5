"""An abort at every stage of a request, with either side receiving it first, leaks nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from serve.protocol.messages import AnyMessage, Offer, Prefill, Push, Ready, Report
from serve.request import FinishReason, Request, SamplingParams, pack_ids
from tests.support.simulation import Cluster, random_request

VICTIM = "victim"

Seen = list[tuple[str, AnyMessage]]  # ("sent" or "received", message) of the victim


def kinds(seen: Seen, event: str) -> list[type]:
    return [type(message) for what, message in seen if what == event]


def num_tokens(seen: Seen) -> int:
    reports = [message for _, message in seen if isinstance(message, Report)]
    return sum(delta.request_id == VICTIM for report in reports for delta in report.deltas)


def has_last_push(seen: Seen, event: str) -> bool:
    return any(isinstance(m, Push) and m.handover is not None for what, m in seen if what == event)


STAGES: dict[str, Callable[[Seen], bool]] = {
    "on its way to prefill": lambda seen: Prefill in kinds(seen, "sent"),
    "before the Offer": lambda seen: Prefill in kinds(seen, "received"),
    "before Ready: the Offer is sent": lambda seen: Offer in kinds(seen, "sent"),
    "before Ready: the Offer is received": lambda seen: Offer in kinds(seen, "received"),
    "between Ready and Push: Ready is sent": lambda seen: Ready in kinds(seen, "sent"),
    "between Ready and Push: Ready is received": lambda seen: Ready in kinds(seen, "received"),
    "during a push: announced": lambda seen: Push in kinds(seen, "sent"),
    "during a push: the announcement is received": lambda seen: Push in kinds(seen, "received"),
    "after the last push: announced": lambda seen: has_last_push(seen, "sent"),
    "after the last push: the announcement is received": lambda seen: has_last_push(
        seen, "received"
    ),
    "decoding": lambda seen: num_tokens(seen) >= 3,
}


def belongs(message: AnyMessage) -> bool:
    match message:
        case Prefill():
            return any(choice.request_id == VICTIM for choice in message.choices)
        case Offer(_, request):
            return request.id == VICTIM
        case Ready(request_id):
            return request_id == VICTIM
        case Push():
            return message.request_id == VICTIM
        case Report():
            return any(delta.request_id == VICTIM for delta in message.deltas)
        case _:
            return False


class RecordingCluster(Cluster):
    """Records the victim's messages, and can deliver an abort to one side first."""

    def watch(self) -> Seen:
        self.seen: Seen = []
        return self.seen

    def _post(self, source: int, target: int, message: AnyMessage) -> None:
        if belongs(message):
            self.seen.append(("sent", message))
        super()._post(source, target, message)

    def _deliver(self, pair: tuple[int, int]) -> None:
        if belongs(self.channels[pair][0]):
            self.seen.append(("received", self.channels[pair][0]))
        super()._deliver(pair)

    def drain_abort(self, replica: int) -> None:
        """Deliver all messages from rank 0 to ``replica``, including the abort, before others."""
        while self.channels.get((0, replica + 1)):
            self._deliver((0, replica + 1))


@pytest.mark.parametrize("first", ["prefill", "decode", "either"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("seed", range(4))
def test_abort(stage: str, first: str, seed: int) -> None:
    print(f"seed={seed} stage={stage} first={first}")
    rng = random.Random(seed)
    cluster = RecordingCluster(rng, 1, 1, max_push_blocks=2, max_num_batched_tokens=8)
    seen = cluster.watch()
    others = [random_request(rng, i, max_total=40) for i in range(6)]
    victim = Request(
        id=VICTIM,
        prompt=pack_ids(rng.randrange(1000) for _ in range(30)),
        sampling=SamplingParams(max_tokens=20, ignore_eos=True),
    )
    for request in [*others[:3], victim, *others[3:]]:
        cluster.submit(request)

    aborted = False

    def abort_at_stage() -> None:
        nonlocal aborted
        if not aborted and STAGES[stage](seen):
            aborted = True
            cluster.abort(VICTIM)
            if first != "either":
                cluster.drain_abort(0 if first == "prefill" else 1)

    cluster.run(abort_at_stage)
    assert aborted, "the request never reached this stage"
    cluster.check([*others, victim])
    assert cluster.endings[VICTIM] == [FinishReason.ABORT]
    assert len(cluster.answers[VICTIM]) < 20
