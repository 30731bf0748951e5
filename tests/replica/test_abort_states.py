"""An abort at each station of a request's way, on the way to either side first: nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from serve.protocol.messages import AnyMessage, Offer, Prefill, Push, Ready, Report
from serve.request import FinishReason, Request, SamplingParams
from tests.support.simulation import Cluster, random_request

VICTIM = "victim"

Seen = list[tuple[str, AnyMessage]]  # ("sent" or "got", message), of the victim


def kinds(seen: Seen, event: str) -> list[type]:
    return [type(message) for what, message in seen if what == event]


def num_tokens(seen: Seen) -> int:
    reports = [message for _, message in seen if isinstance(message, Report)]
    return sum(delta.request_id == VICTIM for report in reports for delta in report.deltas)


def has_last_push(seen: Seen, event: str) -> bool:
    return any(isinstance(m, Push) and m.handover is not None for what, m in seen if what == event)


STATIONS: dict[str, Callable[[Seen], bool]] = {
    "on its way to prefill": lambda seen: Prefill in kinds(seen, "sent"),
    "before the Offer": lambda seen: Prefill in kinds(seen, "got"),
    "before Ready: the Offer is under way": lambda seen: Offer in kinds(seen, "sent"),
    "before Ready: the Offer is there": lambda seen: Offer in kinds(seen, "got"),
    "between Ready and Push: Ready is under way": lambda seen: Ready in kinds(seen, "sent"),
    "between Ready and Push: Ready is there": lambda seen: Ready in kinds(seen, "got"),
    "during a push: announced": lambda seen: Push in kinds(seen, "sent"),
    "during a push: the announcement is there": lambda seen: Push in kinds(seen, "got"),
    "after the last push: announced": lambda seen: has_last_push(seen, "sent"),
    "after the last push: the announcement is there": lambda seen: has_last_push(seen, "got"),
    "decoding": lambda seen: num_tokens(seen) >= 3,
}


def belongs(message: AnyMessage) -> bool:
    match message:
        case Prefill(request, _) | Offer(_, request):
            return request.id == VICTIM
        case Ready(request_id):
            return request_id == VICTIM
        case Push():
            return message.request_id == VICTIM
        case Report():
            return any(delta.request_id == VICTIM for delta in message.deltas)
        case _:
            return False


class Watched(Cluster):
    """Notes the victim's messages, and lets one side hear of an abort first."""

    def watch(self) -> Seen:
        self.seen: Seen = []
        return self.seen

    def _post(self, source: int, target: int, message: AnyMessage) -> None:
        if belongs(message):
            self.seen.append(("sent", message))
        super()._post(source, target, message)

    def _deliver(self, pair: tuple[int, int]) -> None:
        if belongs(self.channels[pair][0]):
            self.seen.append(("got", self.channels[pair][0]))
        super()._deliver(pair)

    def drain_abort(self, replica: int) -> None:
        """Deliver all that rank 0 has sent to ``replica``, the abort with it, before the rest."""
        while self.channels.get((0, replica + 1)):
            self._deliver((0, replica + 1))


@pytest.mark.parametrize("first", ["prefill", "decode", "either"])
@pytest.mark.parametrize("station", STATIONS)
@pytest.mark.parametrize("seed", range(4))
def test_abort(station: str, first: str, seed: int) -> None:
    print(f"seed={seed} station={station} first={first}")
    rng = random.Random(seed)
    cluster = Watched(rng, 1, 1, max_push_blocks=2, max_num_batched_tokens=8)
    seen = cluster.watch()
    others = [random_request(rng, i, max_total=40) for i in range(6)]
    victim = Request(
        id=VICTIM,
        prompt_ids=tuple(rng.randrange(1000) for _ in range(30)),
        sampling=SamplingParams(max_tokens=20, ignore_eos=True),
    )
    for request in [*others[:3], victim, *others[3:]]:
        cluster.submit(request)

    aborted = False

    def abort_there() -> None:
        nonlocal aborted
        if not aborted and STATIONS[station](seen):
            aborted = True
            cluster.abort(VICTIM)
            if first != "either":
                cluster.drain_abort(0 if first == "prefill" else 1)

    cluster.run(abort_there)
    assert aborted, "the request never came to this station"
    cluster.check([*others, victim])
    assert cluster.endings[VICTIM] == [FinishReason.ABORT]
    assert len(cluster.answers[VICTIM]) < 20
