"""An event as its handler gets it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from mesh_client.core.caller import Caller

M_co = TypeVar("M_co", bound=Message, covariant=True)
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Event(Generic[M_co]):
    """One event.

    Attributes:
        message: the protobuf message.
        id: unique together with the source; the same whenever the event is delivered again.
        source: who published it, as a SPIFFE ID, or ``mesh:NAME`` in plaintext.
        caller: the same, proven: the broker let its publisher in under that name. None where it is only claimed.
        type: full name of the message.
        key: what it is ordered by; empty for nothing.
        time: when it was published, seconds since 1970.
        attempt: how often a handler of this group is called for it, this time included.
        group: the group that handles it.
    """

    message: M_co
    id: str
    source: str
    caller: Caller | None
    type: str
    key: str
    time: float
    attempt: int
    group: str


Handler = Callable[[Event[M]], Awaitable[None]]
