"""What outbound calls inherit from the inbound call that they are made for.

The server's shell sets `inbound` in the context of each handler; tasks started by the handler inherit it.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from mesh_client.addresses import parse_peer_ip
from mesh_client.core.caller import Caller
from mesh_client.core.tally import Tally

if TYPE_CHECKING:
    from mesh_client.tracing import ServedCall

CALLER_METADATA_KEY = "mesh-caller"
"""Metadata by which a client says, in plaintext, which service it belongs to. Unproven: it is good for sharing out load
among callers. With identity it is not sent, and would mean nothing."""

PREVIOUS_ATTEMPTS_KEY = "mesh-previous-attempts"
"""Metadata of a retry: how many attempts of the call came before. gRPC strips its own ``grpc-previous-rpc-attempts``
from what an application sends."""

LATE_WITHIN = 0.05
"""Seconds. Whoever cancels a call so shortly before its deadline is late: the caller's own timer was set before the
call was on its way, and what it sends then may come before the server's timer says so."""


class Cancellable(Protocol):
    """An outbound call, as far as its scope needs to know it."""

    def cancel(self) -> object:
        """Cancels the call; harmless when it is done."""


class InboundCall:
    """One call that this process is serving.

    Attributes:
        deadline: when its caller stops waiting, in seconds of `time.monotonic`, the event loop's clock; None for never.
        peer: where it came from, as gRPC says it.
        caller: who made it, as their certificate proves; None in plaintext.
        trace: the span of the call; None where nothing is traced.
        tally: where it is counted; None where it is not.
        started_at: when it came, in seconds of `time.monotonic`.
        scope: outbound calls to cancel when it is cancelled. Callers add theirs, and discard them when done.
    """

    __slots__ = ("caller", "deadline", "peer", "scope", "started_at", "tally", "trace")

    def __init__(
        self,
        deadline: float | None = None,
        peer: str = "",
        caller: Caller | None = None,
        started_at: float = 0.0,
        tally: Tally | None = None,
    ) -> None:
        self.deadline = deadline
        self.started_at = started_at
        self.tally = tally
        self.peer = peer
        self.caller = caller
        self.trace: ServedCall | None = None
        self.scope: set[Cancellable] = set()

    @property
    def peer_ip(self) -> str:
        """The IP address that it came from; empty when it came through something else, such as a Unix socket."""
        return parse_peer_ip(self.peer)

    def cancel(self) -> None:
        """Cancels every outbound call in scope."""
        while self.scope:
            self.scope.pop().cancel()


inbound: ContextVar[InboundCall | None] = ContextVar("mesh_inbound", default=None)
"""The call that the running task serves; None outside of handlers."""


def current_caller() -> Caller | None:
    """Who made the call that the running handler serves, as their certificate proves.

    Works in handlers of every kind, and in tasks that they start. None outside of handlers, and on plaintext servers,
    where nobody has an identity.
    """
    call = inbound.get()
    return None if call is None else call.caller
