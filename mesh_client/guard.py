"""Who may call a server: identities, revocation and authorization, decided before anything else of a call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol, TypeAlias

import grpc

from mesh_client.core.authorization import MAX_DECISIONS, Authorizer
from mesh_client.core.caller import Caller, CallerCache
from mesh_client.core.policy import ServicePolicy
from mesh_client.identity.certificates import caller_of
from mesh_client.open_streams import OpenStreams

logger = logging.getLogger(__name__)

LOG_INTERVAL = 1.0
"""Seconds; refusals of one caller and method are logged at most this often, with how many there were."""

POLICY_PATIENCE = 1.0
"""Seconds that a call waits for a policy that is not known yet before it is refused. A server is called the moment that
it registers, and the policy of a service that was not known before comes in that moment too."""

MAX_LOGGED = 1000
"""Callers and methods whose refusals are told apart in the log within `LOG_INTERVAL`; those beyond share a line."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call is not admitted, and when it would be."""

    code: grpc.StatusCode
    details: str
    retry_after: float = 0.0
    """Seconds; for those that are refused for their number."""


class Connection(Protocol):
    """What the asynchronous and the synchronous servicer context know of the other side."""

    def peer(self) -> str:
        """Address of the caller."""

    def peer_identities(self) -> Iterable[bytes] | None:
        """The names in the caller's certificate, as gRPC reads them."""

    def auth_context(self) -> Mapping[str, Any]:
        """What the handshake established, which takes ten times as long."""


class Guard:
    """Decides whether a caller may call a method at all.

    A secure server serves nobody without an identity of its own trust domain, and nobody before its policy is known:
    what it would refuse must not pass because it could not be asked for. On a plaintext server nobody has an identity:
    it serves everybody, unless its policy has authorization rules, which nobody can meet then.

    Args:
        service: whose server it is; for messages.
        secure: whether callers have identities.
        clock: seconds, monotonic; for the log alone.

    Attributes:
        waits: whether calls are refused because the policy is not known yet.
        streams: the streaming calls that were let in, which end when their workload is revoked.
    """

    def __init__(self, service: str, *, secure: bool, clock: Callable[[], float] = monotonic) -> None:
        self._trust_domain = ""
        self._revoked: frozenset[str] = frozenset()
        self._service = service
        self._secure = secure
        self._authorizer: Authorizer | None = None
        self.waits = secure
        self._arrived = asyncio.Event()
        self._arrived_for_threads = threading.Event()
        self._callers = CallerCache(caller_of)
        self._admitted = _Admitted()
        self.streams = OpenStreams()
        self._log = _RefusalLog(service, clock)

    @property
    def denied(self) -> int:
        """Calls refused because of who called."""
        return self._log.count

    @property
    def trust_domain(self) -> str:
        """Whose identities count; nobody's while it is empty."""
        return self._trust_domain

    @trust_domain.setter
    def trust_domain(self, trust_domain: str) -> None:
        self._trust_domain = trust_domain
        self._decide_anew()

    @property
    def revoked(self) -> frozenset[str]:
        """Ids of workloads that are not served; set in the event loop."""
        return self._revoked

    @revoked.setter
    def revoked(self, revoked: frozenset[str]) -> None:
        self._revoked = revoked
        self._decide_anew()
        # Others end by themselves; a stream would go on for as long as its connection.
        for workload_id, count in self.streams.revoke(revoked).items():
            logger.warning(
                "workload %s has been revoked: its %d streaming calls of %s end", workload_id, count, self._service
            )

    def apply(self, policy: ServicePolicy) -> None:
        """Obeys the authorization rules of a policy from the next call on. In the event loop."""
        self._authorizer = Authorizer(policy.authorization, policy.version)
        self.waits = False
        self._decide_anew()
        self._arrived.set()
        self._arrived_for_threads.set()

    async def until_known(self) -> None:
        """Returns once the policy is known, or after `POLICY_PATIENCE`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLICY_PATIENCE):
                await self._arrived.wait()

    def until_known_in_thread(self) -> None:
        """As `until_known`, in a thread that is not the event loop's."""
        self._arrived_for_threads.wait(POLICY_PATIENCE)

    def _decide_anew(self) -> None:
        # After what decides has changed, never before: a thread that decides meanwhile puts what it found into the
        # memory that it took before, which is then this one's no more.
        self._admitted = _Admitted()

    def admit(self, connection: Connection, method: str) -> Caller | Refusal | None:
        """Who calls, or why they may not, which is then counted and logged.

        None for nobody of a mesh who may call all the same, as everybody may in plaintext without rules.

        Args:
            connection: where the call came from.
            method: full name, with its leading slash.
        """
        admitted = self._admitted
        key: _Key = ()
        if self._secure:
            key = (method, connection.peer(), *(connection.peer_identities() or ()))
            known = admitted.callers.get(key)
            if known is not None:
                return known
        caller = self.caller(connection)
        refusal = self.refusal(caller, method, connection)
        if refusal is not None:
            return refusal
        if caller is not None and caller.workload_name and caller.workload_name in key:
            admitted.add(key, caller)
        return caller

    def caller(self, connection: Connection) -> Caller | None:
        """Who is on the other side; None for nobody of a mesh, and always in plaintext."""
        return self._callers.caller(connection.auth_context()) if self._secure else None

    def refusal(self, caller: Caller | None, method: str, connection: Connection) -> Refusal | None:
        """Why the call is refused, which is then counted and logged; None when it may go on.

        Args:
            caller: as `caller` found it.
            method: full name, with its leading slash.
            connection: where the call came from.
        """
        authorizer = self._authorizer
        if not self._secure:
            if authorizer is None or (why := authorizer.check("", method)) is None:
                return None
            why += "; this server speaks plaintext (insecure), where nobody has an identity"
        else:
            nobody = self._unacceptable(caller)
            if nobody is not None:
                why = f"{nobody}, so it may not call {method.removeprefix('/')}"
            elif authorizer is None:
                return Refusal(
                    grpc.StatusCode.UNAVAILABLE,
                    f"this instance of {self._service} does not know yet whom its policy allows to call it: "
                    "no control plane could tell it",
                )
            elif (reason := authorizer.check("" if caller is None else caller.name, method)) is not None:
                why = reason
            else:
                return None
        self._log.note(caller, method, connection, why)
        return Refusal(grpc.StatusCode.PERMISSION_DENIED, why)

    def _unacceptable(self, caller: Caller | None) -> str | None:
        """What is wrong with the caller's identity; None when nothing is."""
        if caller is None:
            return "the caller's certificate names nobody of this mesh"
        if caller.principal.trust_domain != self._trust_domain:
            return f"{caller.spiffe_id} is of another trust domain than {self.trust_domain}"
        if caller.workload_id in self.revoked:
            return f"{caller.name} calls from workload {caller.workload_id}, which has been revoked"
        return None


_Key: TypeAlias = tuple[str | bytes, ...]
"""Method, address and names of a caller."""


class _Admitted:
    """Who was let through to which method: most calls need no more than this one look-up.

    By the names in their certificate, one of which says which workload it is, and by the address of their connection.
    The names alone would do, for the mesh's authority signs none but these; but gRPC shows of each what is before its
    first NUL byte, and whoever could have such names signed is not to profit from it.
    """

    __slots__ = ("callers",)

    def __init__(self) -> None:
        self.callers: dict[_Key, Caller] = {}

    def add(self, key: _Key, caller: Caller) -> None:
        """Remembers it, within a bound."""
        if len(self.callers) >= MAX_DECISIONS:
            self.callers.clear()
        self.callers[key] = caller


class _RefusalLog:
    """Counts refusals, and logs them so that one caller who does not give up does not fill the log."""

    def __init__(self, service: str, clock: Callable[[], float]) -> None:
        self._service = service
        self._clock = clock
        self._lock = threading.Lock()  # plain handlers run in threads
        self._lines: dict[tuple[str, str], _Line] = {}
        self.count = 0

    def note(self, caller: Caller | None, method: str, connection: Connection, why: str) -> None:
        now = self._clock()
        with self._lock:
            self.count += 1
            line = self._line(("" if caller is None else str(caller), method), now)
            line.unsaid += 1
            if now < line.next_at:
                return
            more, line.unsaid, line.next_at = line.unsaid - 1, 0, now + LOG_INTERVAL
        logger.warning(
            "%s refused a call from %s, %s: %s%s",
            self._service,
            connection.peer(),
            caller or "nobody of this mesh",
            why,
            f" ({more} more since the last such line)" if more else "",
        )

    def _line(self, key: tuple[str, str], now: float) -> _Line:
        line = self._lines.get(key)
        if line is None:
            if len(self._lines) >= MAX_LOGGED:
                self._lines = {each: line for each, line in self._lines.items() if now < line.next_at}
            if len(self._lines) >= MAX_LOGGED:
                key = ("", "")
            line = self._lines.setdefault(key, _Line())
        return line


@dataclass(slots=True)
class _Line:
    """Refusals of one caller and method."""

    next_at: float = -math.inf
    unsaid: int = 0
