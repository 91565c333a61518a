"""One stream of the trust bundle: what was sent, what was acknowledged, and when it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from mesh.v1 import certificate_pb2 as pb

from control_plane.access import Access
from control_plane.identity.bundle import TrustBundle
from control_plane.identity.errors import StoreUnavailableError
from mesh_client.core.caller import Caller
from mesh_client.tasks import end_tasks

if TYPE_CHECKING:
    from control_plane.identity.certificate_authority import CertificateAuthority

WatchContext = grpc.aio.ServicerContext[pb.WatchTrustBundleRequest, pb.WatchTrustBundleResponse]

MAX_UNACKNOWLEDGED = 8
"""Bundles that can still be acknowledged; older ones cannot."""

_log = logging.getLogger(__name__)


def to_bundle(bundle: TrustBundle) -> pb.TrustBundle:
    """The bundle as a message."""
    return pb.TrustBundle(
        trust_domain=bundle.trust_domain,
        version=bundle.version,
        roots=bundle.roots,
        signing_root=bundle.signing_root,
        revoked_workloads=sorted(bundle.revoked),
    )


class SentBundles:
    """What was sent on a stream. Acknowledgements go forward only: each sent bundle is confirmed once at most."""

    def __init__(self) -> None:
        self._latest = ""
        self._open: dict[str, TrustBundle] = {}

    def send(self, bundle: TrustBundle) -> bool:
        """Whether the bundle has to be sent; from then on it can be acknowledged."""
        if bundle.version == self._latest:
            return False
        self._latest = bundle.version
        self._open.pop(bundle.version, None)  # it was in force before, and is the newest again
        self._open[bundle.version] = bundle
        if len(self._open) > MAX_UNACKNOWLEDGED:
            del self._open[next(iter(self._open))]
        return True

    def acknowledge(self, version: str) -> TrustBundle | None:
        """The bundle that is in force on the other side now; None for what was not sent here or is no news."""
        found = self._open.get(version)
        if found is not None:
            while self._open.pop(next(iter(self._open))) is not found:
                pass
        return found


class BundleStream:
    """Sends the bundle at once and at each change, remembers what is acknowledged, ends when the caller is revoked.

    Args:
        authority: whose bundle it is.
        access: knows of revocations.
        caller: who is on the other side.
    """

    def __init__(self, authority: CertificateAuthority, access: Access, caller: Caller) -> None:
        self._authority = authority
        self._access = access
        self._caller = caller
        self._sent = SentBundles()
        self._woken = asyncio.Event()
        self._cut = False

    async def run(self, requests: AsyncIterator[pb.WatchTrustBundleRequest], context: WatchContext) -> None:
        """Until the caller has ended it, or it is cut."""
        reading = asyncio.create_task(self._read(requests), name="trust bundle acknowledgements")
        reading.add_done_callback(lambda _: self._woken.set())
        unsubscribe = self._authority.on_change(self._woken.set)
        try:
            with self._access.cut_when_revoked(self._caller, self._end):
                while not reading.done():
                    if self._cut:
                        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the workload has been revoked")
                    bundle = self._authority.bundle
                    if self._sent.send(bundle):
                        await context.write(pb.WatchTrustBundleResponse(trust_bundle=to_bundle(bundle)))
                        continue
                    self._woken.clear()
                    await self._woken.wait()
        finally:
            unsubscribe()
            await end_tasks(reading)

    def _end(self) -> None:
        self._cut = True
        self._woken.set()

    async def _read(self, requests: AsyncIterator[pb.WatchTrustBundleRequest]) -> None:
        async for request in requests:
            bundle = self._sent.acknowledge(request.version)
            if bundle is None:
                continue
            try:
                await self._authority.confirm(self._caller.workload_id, bundle)
            except StoreUnavailableError as error:
                _log.error("an acknowledgement of %s is lost: %s", self._caller, error)
