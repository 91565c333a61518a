"""Who is on the other side of an RPC, and whether they may do what they ask for.

The connection says who somebody is: its certificate was verified in the handshake, and nothing in a request can change
it. Without identity (``insecure``) there is no caller, and everything is allowed.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn, Protocol

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID

from control_plane.identity.limits import CallerLimits
from mesh_client.core.caller import Caller, CallerCache, caller_from

__all__ = ["Access", "Caller", "Context", "Revocations", "caller"]

TOLD_PER_SECOND, TOLD_AT_ONCE = 1.0, 100
"""Refusals of one workload that are logged, on average and at once: one that does not give up must not fill the log."""

_log = logging.getLogger(__name__)


class Context(Protocol):
    """What is needed of ``grpc.aio.ServicerContext``, whatever its messages are."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What the handshake established."""

    def peer(self) -> str:
        """Address of the other side."""

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """Ends the RPC."""


def caller(context: Context) -> Caller | None:
    """Who the verified certificate of the connection names; None when it names nobody of a mesh."""
    return _CALLERS.caller(context.auth_context())


_MALFORMED = (
    ValueError,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def _named(certificate: bytes) -> Caller | None:
    try:
        leaf = x509.load_pem_x509_certificate(certificate)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except _MALFORMED:
        return None
    subject = [attribute.value for attribute in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return caller_from(
        [uri.encode() for uri in names.get_values_for_type(x509.UniformResourceIdentifier)],
        [name if isinstance(name, bytes) else name.encode() for name in subject],
    )


_CALLERS = CallerCache(_named)


class Revocations(Protocol):
    """Knows revoked workloads: the certificate authority."""

    def is_revoked(self, workload_id: str) -> bool:
        """Whether the workload has been revoked."""


class Access:
    """Decides on RPCs; refuses with PERMISSION_DENIED, in words, counted and logged.

    Args:
        trust_domain: whose identities are meant; None without identity (``insecure``): everything is allowed.
        revocations: knows revoked workloads.

    Attributes:
        denials: how many RPCs were refused, by who asked: a SPIFFE ID, or ``nobody``.
    """

    def __init__(self, trust_domain: str | None, revocations: Revocations | None = None) -> None:
        self._trust_domain = trust_domain
        self._revocations = revocations
        self._open: dict[str, dict[object, Callable[[], None]]] = {}
        self.denials: Counter[str] = Counter()
        self._told = CallerLimits(TOLD_PER_SECOND, TOLD_AT_ONCE)

    @property
    def trust_domain(self) -> str:
        """Whose identities are meant; empty without identity."""
        return self._trust_domain or ""

    @property
    def secure(self) -> bool:
        """Whether callers have identities."""
        return self._trust_domain is not None

    def is_revoked(self, caller: Caller | None) -> bool:
        """Whether the caller's workload has been revoked since."""
        return caller is not None and self._revocations is not None and self._revocations.is_revoked(caller.workload_id)

    async def require_caller(self, context: Context, action: str) -> Caller | None:
        """Whoever calls, who must have an identity of this mesh and not be revoked; None without identity.

        Args:
            context: of the RPC.
            action: what they ask for, as in "may not ACTION".
        """
        if self._trust_domain is None:
            return None
        who = caller(context)
        if who is None:
            await self.refuse(context, None, f"may not {action}: the connection has no identity of this mesh")
        if who.principal.trust_domain != self._trust_domain:
            await self.refuse(
                context, who, f"may not {action}: it is of another trust domain than {self._trust_domain}"
            )
        if self.is_revoked(who):
            await self.refuse(context, who, f"may not {action}: the workload has been revoked")
        return who

    async def require_operator(self, context: Context, action: str) -> Caller | None:
        """Whoever calls, who must be an operator; None without identity."""
        who = await self.require_caller(context, action)
        if who is not None and not who.is_operator:
            await self.refuse(context, who, f"may not {action}: that takes an operator's identity")
        return who

    async def require_service(
        self, context: Context, service: str, action: str, *, operators: bool = False, control_planes: bool = False
    ) -> Caller | None:
        """Whoever calls, who must be a workload of the service; None without identity.

        Args:
            context: of the RPC.
            service: the service that the request is about.
            action: what they ask for, as in "may not ACTION".
            operators: operators may too.
            control_planes: control planes may too.
        """
        who = await self.require_caller(context, action)
        if who is None or who.service == service:
            return who
        if not ((operators and who.is_operator) or (control_planes and who.is_control_plane)):
            await self.refuse(context, who, f"may not {action}: only {service}'s own workloads may")
        return who

    async def require_one_of(self, context: Context, services: Collection[str], action: str) -> Caller | None:
        """Whoever calls, who must be a workload of one of these services; None without identity."""
        who = await self.require_caller(context, action)
        if who is not None and who.service not in services:
            await self.refuse(context, who, f"may not {action}: only workloads of {' or '.join(services)} may")
        return who

    async def require_workload(self, context: Context, action: str) -> Caller | None:
        """Whoever calls, who must be a workload of some service; None without identity."""
        who = await self.require_caller(context, action)
        if who is not None and who.service is None:
            await self.refuse(context, who, f"may not {action}: that takes the identity of a service")
        return who

    def when_revoked(self, caller: Caller | None, cut: Callable[[], None]) -> Callable[[], None]:
        """Has ``cut`` called if the caller is revoked, for streams; the returned function ends that.

        Args:
            caller: None for nobody, who cannot be revoked.
            cut: ends the stream; may be called more than once.
        """
        if caller is None:
            return _nothing
        workload_id = caller.workload_id
        cuts = self._open.setdefault(workload_id, {})
        key = object()
        cuts[key] = cut
        if self.is_revoked(caller):  # between the check at its beginning and here
            cut()

        def forget() -> None:
            cuts.pop(key, None)
            if not cuts and self._open.get(workload_id) is cuts:
                del self._open[workload_id]

        return forget

    @contextmanager
    def cut_when_revoked(self, caller: Caller | None, cut: Callable[[], None]) -> Iterator[None]:
        """Has ``cut`` called if the caller is revoked within the block; see `when_revoked`."""
        forget = self.when_revoked(caller, cut)
        try:
            yield
        finally:
            forget()

    def cut_revoked(self) -> None:
        """To be called when workloads have been revoked: cuts their open streams at once."""
        revocations = self._revocations
        if revocations is None:
            return
        for workload_id in [each for each in self._open if revocations.is_revoked(each)]:
            cuts = self._open[workload_id]
            _log.warning("workload %s has been revoked: its %d streams are cut", workload_id, len(cuts))
            for cut in list(cuts.values()):
                cut()

    async def refuse(self, context: Context, who: Caller | None, reason: str) -> NoReturn:
        """Ends the RPC with PERMISSION_DENIED; counted, and logged unless one workload is refused all the time.

        Args:
            context: of the RPC.
            who: who called; None for nobody of this mesh.
            reason: as in "may not ACTION: WHY".
        """
        self.denials["nobody" if who is None else who.spiffe_id] += 1
        if not self._told.take("" if who is None else who.workload_id, time.monotonic()):
            _log.warning("refused: %s at %s %s", who or "a caller without identity", context.peer(), reason)
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED, f"{'the caller' if who is None else who.spiffe_id} {reason}"
        )


def _nothing() -> None:
    """There is nothing to end."""
