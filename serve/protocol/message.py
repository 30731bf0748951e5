"""Message: the base of everything that is sent on the control channel."""

from __future__ import annotations

from msgspec import Struct


class Message(Struct, frozen=True, tag=True, array_like=True, omit_defaults=True):
    """Base of all messages on the control channel."""
