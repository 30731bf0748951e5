"""ReplicaState: what rank 0 knows of one replica, from its reports and from dispatching."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serve.protocol.messages import ReplicaLoad
from serve.topology import ReplicaInfo, Role


@dataclass(slots=True)
class ReplicaState:
    """Plain data for dispatch policies and ``GET /cluster``.

    ``load`` is the replica's last report. The dispatcher keeps the other counts itself, so that
    they include requests that the replica has not reported yet.
    """

    info: ReplicaInfo
    load: ReplicaLoad = field(default_factory=ReplicaLoad)
    num_prefill_tokens: int = 0  # of prompts sent here whose first token has not arrived
    num_decode_tokens: int = 0  # context of the active requests that decode here
    num_requests: int = 0  # active requests with either phase here

    @property
    def prefills(self) -> bool:
        """Whether prompts may be sent here."""
        return self.info.role is not Role.DECODE

    @property
    def decodes(self) -> bool:
        """Whether requests may be decoded here."""
        return self.info.role is not Role.PREFILL

    def describe(self) -> dict[str, Any]:
        """Return this replica's entry in the answer to ``GET /cluster``."""
        info, load = self.info, self.load
        return {
            "id": info.id,
            "role": str(info.role),
            "ranks": list(info.ranks),
            "tp": info.tp,
            "pp": info.pp,
            "num_blocks": load.num_blocks,
            "num_free_blocks": load.num_free_blocks,
            "num_waiting": load.num_waiting,
            "num_running": load.num_running,
            "num_receiving": load.num_receiving,
            "num_sending": load.num_sending,
        }
