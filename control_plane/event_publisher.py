"""Publishes what happens in the mesh to a broker, where one is configured.

Nothing waits for it: what happened is put aside in memory, up to a bound, from there into an outbox in the data
directory, and from there the event bus sends it when it can. What there is no room for is dropped and counted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from mesh.v1 import event_pb2

from control_plane.broker import broker_of
from control_plane.catalog import Catalog
from control_plane.discovery import StreamHub
from control_plane.identity.ca import Leaf
from control_plane.mesh_events import CertificateIssued, Detector, MeshEvent
from control_plane.policies import PolicyBook
from control_plane.publisher import Publisher
from control_plane.snapshot import Snapshot
from control_plane.subscription import SubscriptionState
from control_plane.telemetry.recorder import OutboxReport, Recorder
from mesh_client.core.errors import MeshError
from mesh_client.core.events.state import OutboxState
from mesh_client.core.events.topology import CONTROL_PLANE
from mesh_client.core.identity import Principal
from mesh_client.core.model import ResourceKind
from mesh_client.core.policy import ServicePolicy
from mesh_client.events import EventBus
from mesh_client.identity import IdentityState
from mesh_client.tasks import end_tasks

if TYPE_CHECKING:
    from control_plane.identity.certificate_authority import CertificateAuthority
    from control_plane.options import ControlPlaneOptions

OUTBOX = "events.sqlite"
"""In the data directory."""
MAX_WAITING = 10_000
"""Events that wait in memory for their place in the outbox."""
MAX_EVENTS, MAX_BYTES = 10_000, 16 << 20
"""That the outbox holds."""
BATCH = 256
"""Events that are put into the outbox at once."""
STORE_TIMEOUT = 2.0
"""Seconds for that; while the outbox is full, each batch waits for so long and is dropped."""
EJECTIONS_EVERY = 5.0
"""Seconds between looks at which endpoints many clients have ejected: clients report as often."""
TELL_EVERY = 60.0
"""Seconds between complaints in the log."""

_log = logging.getLogger(__name__)


class _Identity:
    """The control plane as the bus knows it."""

    def __init__(self, authority: CertificateAuthority) -> None:
        self.principal = Principal.control_plane(authority.trust_domain)
        self._authority = authority

    def state(self, now: float) -> IdentityState:
        """As far as events say it."""
        del now
        return IdentityState(self.principal.spiffe_id, self._authority.own_workload_id)


class _As:
    """As whom events are published."""

    def __init__(self, authority: CertificateAuthority | None) -> None:
        self.identity = None if authority is None else _Identity(authority)


class EventPublisher:
    """Publishes the events of one control plane. To be made inside the event loop.

    Args:
        options: name the broker and the data directory.
        catalog: services and endpoints.
        book: which policies hold.
        publisher: says when endpoints have changed.
        hub: says which policies clients reject.
        authority: says which certificates are issued; None without identity.

    Raises:
        ConfigError: the broker's options are wrong.

    Attributes:
        published: events that were put into the outbox, by type.
        dropped: events that there was no room for.
        begun: whether the registry and the policies have been read, so that what happens from then on is an event.
    """

    def __init__(
        self,
        options: ControlPlaneOptions,
        *,
        catalog: Catalog,
        book: PolicyBook[ServicePolicy],
        publisher: Publisher,
        hub: StreamHub,
        authority: CertificateAuthority | None,
    ) -> None:
        self.published: Counter[str] = Counter()
        self.dropped = 0
        self._name = options.control_plane_id
        self._directory = options.data_dir or Path()
        self._catalog = catalog
        self._book = book
        self._authority = authority
        self._detector = Detector()
        self._bus = EventBus(
            CONTROL_PLANE,
            _As(authority),
            broker_of(options.broker, options.broker_credentials, options.broker_roots, insecure=options.insecure),
            self._directory / OUTBOX,
            max_events=MAX_EVENTS,
            max_bytes=MAX_BYTES,
        )
        self.begun = self._stopping = False
        self._waiting: deque[MeshEvent] = deque()
        self._wake = asyncio.Event()
        self._told_at = -TELL_EVERY
        self._tasks: list[asyncio.Task[None]] = []
        publisher.listen(self._endpoints_changed)
        hub.on_rejection = self._rejected
        if authority is not None:
            authority.on_change(self._trust_changed)
            authority.issuance.on_issued = self._issued

    def start(self, recorder: Recorder) -> None:
        """Begins to publish, in the background.

        Args:
            recorder: says which endpoints clients have ejected.
        """
        # The mesh says in a line why there is no broker; the AMQP library would, with a traceback, at each attempt.
        logging.getLogger("aiormq").setLevel(logging.CRITICAL)
        self._tasks = [
            asyncio.create_task(self._store(), name="events of the mesh"),
            asyncio.create_task(self._watch_ejections(recorder), name="ejections"),
        ]

    def begin(self) -> None:
        """The registry and the policies have been read: what is there now is there, and changes are events."""
        view = self._catalog.view(asyncio.get_running_loop().time())
        for name, service in view.services.items():
            self._detector.endpoints(name, service.records)
        for name in self._book.names:
            self._look_at_policy(name)
        self.begun = True
        if self._authority is not None:
            self._detector.roots(self._authority.bundle.fingerprints, self._authority.bundle.signing_root)

    async def close(self) -> None:
        """Puts what waits into the outbox, and gives the broker what it takes at once; some seconds at most."""
        self._stopping = True
        self._wake.set()
        for task in self._tasks[1:]:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STORE_TIMEOUT)
        await end_tasks(*self._tasks)
        await self._bus.close()

    def outboxes(self) -> Iterator[tuple[str, str, OutboxReport]]:
        """The outbox as those of other processes are known: whose it is, of which process; none until it is open."""
        if (outbox := self.outbox) is not None:
            oldest = None if outbox.oldest_age is None else time.time() - outbox.oldest_age
            report = OutboxReport(outbox.events, outbox.max_events, oldest, outbox.refused, outbox.relay, outbox.broker)
            yield CONTROL_PLANE, self._name, report

    @property
    def outbox(self) -> OutboxState | None:
        """The outbox; None until it is open."""
        return self._bus.state().outbox

    def policy_changed(self, name: str) -> None:
        """Something was stored, or deleted, under the name."""
        if self.begun:
            self._add(self._look_at_policy(name))

    # -- what happens

    def _endpoints_changed(self, snapshot: Snapshot, changed: Iterable[tuple[ResourceKind, str]]) -> None:
        del snapshot
        if not self.begun:
            return
        services = self._catalog.view(asyncio.get_running_loop().time()).services
        for kind, name in sorted(changed, key=lambda each: each[1]):
            if kind is ResourceKind.ENDPOINTS:
                service = services.get(name)
                self._add(self._detector.endpoints(name, () if service is None else service.records))

    def _look_at_policy(self, name: str) -> list[MeshEvent]:
        problem = next((each for each in self._book.problems if each.name == name), None)
        if problem is not None:
            reason = "; ".join(f"{each.path}: {each.message}" if each.path else each.message for each in problem.errors)
            return self._detector.policy(name, "", problem.stored_version, reason or "it is invalid")
        try:
            _, version = self._book.policy(name)
        except ValueError:  # a name that no service can have
            return []
        return self._detector.policy(name, version)

    def _rejected(self, node_id: str, state: SubscriptionState) -> None:
        if state.kind is ResourceKind.POLICY:
            self._add(self._detector.rejected(state.service, state.rejected_version or "", node_id, state.rejection))

    def _issued(self, kind: str, leaf: Leaf) -> None:
        self._add(
            [
                CertificateIssued(
                    leaf.principal.spiffe_id, leaf.workload_id, leaf.serial, leaf.expires, kind == "renewed"
                )
            ]
        )

    def _trust_changed(self) -> None:
        if self._authority is not None and self.begun:
            bundle = self._authority.bundle
            self._add(self._detector.roots(bundle.fingerprints, bundle.signing_root))

    async def _watch_ejections(self, recorder: Recorder) -> None:
        while True:
            await asyncio.sleep(EJECTIONS_EVERY)
            self._add(self._detector.ejections(recorder.reporters))

    # -- on their way

    def _add(self, events: Iterable[MeshEvent]) -> None:
        for event in events:
            if len(self._waiting) >= MAX_WAITING:
                self._drop("too many happen at once")
            else:
                self._waiting.append(event)
                self._wake.set()

    def _drop(self, why: object) -> None:
        self.dropped += 1
        now = asyncio.get_running_loop().time()
        if now >= self._told_at + TELL_EVERY:
            self._told_at = now
            _log.warning("events of the mesh are dropped, %d so far: %s", self.dropped, why)

    async def _store(self) -> None:
        try:
            await asyncio.to_thread(self._directory.mkdir, 0o700, parents=True, exist_ok=True)
            await self._bus.start()
        except Exception as error:
            _log.error("events of the mesh go nowhere: %s", error)
        while not self._stopping or self._waiting:
            await self._wake.wait()
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            if not self._waiting and not self._stopping:
                self._wake.clear()
            # All at once, in their order: those that are stored at the same time share the wait for the disk.
            await asyncio.gather(*map(self._publish, batch))

    async def _publish(self, event: MeshEvent) -> None:
        message = message_of(event)
        try:
            # Nobody needs to be subscribed.
            await self._bus.publish(message, key=event.key, timeout=STORE_TIMEOUT, mandatory=False)
        except Exception as error:  # whatever it is, the control plane goes on
            self._drop(error if isinstance(error, MeshError) else repr(error))
        else:
            self.published[message.DESCRIPTOR.full_name] += 1


def message_of(event: MeshEvent) -> Message:
    """The event as its message."""
    fields = {each.name: getattr(event, each.name) for each in dataclasses.fields(event)}
    if isinstance(event, CertificateIssued):
        fields["expires"] = Timestamp(seconds=int(event.expires))
    made: Message = getattr(event_pb2, type(event).__name__)(**fields)
    return made
