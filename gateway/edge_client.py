"""A gateway's side of EdgeService: follows the policy of its edge, and says what became of it.

async with EdgeClient("public", EdgeKind.ENVOY, addresses, transport, id=node_id, cache=directory) as client:
followed = await client.changed(None)
while True:
...  # have the edge do what followed.policy says
client.report(EdgeReport(followed.version, EdgeOutcome.APPLIED, applied_version=followed.version))
followed = await client.changed(followed.version)
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import monotonic
from typing import Self

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import edge_service_pb2 as pb
from mesh.v1 import edge_service_pb2_grpc as pb_grpc

from mesh_client.checked_file import CheckedFile, file_of_mesh
from mesh_client.convert import edge_policy_from_proto, edge_policy_to_proto
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import IdentityError, InvalidPolicyError, InvalidValueError
from mesh_client.core.handshake import explain
from mesh_client.core.model import check_service_name
from mesh_client.core.policy import Backoff
from mesh_client.core.rate_limit import TokenBucket
from mesh_client.core.retry import backoff_delay
from mesh_client.discovery import AGED
from mesh_client.stream_end import StreamEnd
from mesh_client.tasks import end_tasks, obey_cancellation
from mesh_client.transport import CONTROL_PLANE, STREAM_OPTIONS, Transport

RECONNECT = Backoff(initial=0.2, max=10.0, multiplier=2.0)
FIRST_RESPONSE_TIMEOUT = 5.0
"""Seconds that a control plane has to answer on a new stream before the next one is tried."""
PATIENCE = 5.0
"""Seconds after which the policy on disk is taken, unless a control plane has told one, or all have failed, before."""
REPORTS_PER_SECOND, REPORTS_AT_ONCE = 1.0, 5
"""Reports that are sent, on average and at once; of those that come faster, the last is."""
MAX_ENDPOINTS_VERSIONS = 200

_Call = grpc.aio.StreamStreamCall[pb.FollowRequest, pb.FollowResponse]

log = logging.getLogger(__name__)


class EdgeKind(enum.Enum):
    """What the gateway drives."""

    KONG = pb.EDGE_KIND_KONG
    ENVOY = pb.EDGE_KIND_ENVOY


class EdgeOutcome(enum.Enum):
    """What became of a policy."""

    APPLIED = pb.EDGE_OUTCOME_APPLIED
    """The edge runs by it."""
    REJECTED = pb.EDGE_OUTCOME_REJECTED
    """It cannot be obeyed, for a reason that time does not change. The edge runs by the one before."""
    FAILED = pb.EDGE_OUTCOME_FAILED
    """The edge could not be told. It will be tried again."""
    STANDBY = pb.EDGE_OUTCOME_STANDBY
    """Another gateway of the edge tells it."""


@dataclass(frozen=True, slots=True)
class FollowedPolicy:
    """The policy that an edge is to obey."""

    policy: EdgePolicy
    version: str
    """Equal policies have equal versions."""
    stored: bool
    """False when none is stored: it exposes nothing."""


@dataclass(frozen=True, slots=True)
class EdgeReport:
    """What became of a policy."""

    policy_version: str
    """Which policy this is about."""
    outcome: EdgeOutcome
    detail: str = ""
    """Why, unless it was applied; shown to operators, so without secrets."""
    applied_version: str = ""
    """Version by which the edge runs now; empty: by none."""
    endpoints_versions: Mapping[str, str] = field(default_factory=dict)
    """By service of the mesh, the version of the endpoints to which the edge sends."""


class EdgeClient:
    """Follows the policy of one edge while it is entered, reconnects for ever, and sends what it is told to report.

    With a ``cache``, the policy that was reported as applied last is on disk, readable by this user alone. It becomes
    `current` if no control plane has answered when all have failed once, or after `PATIENCE`: an older policy may
    expose what a newer one does not.

    Belongs to the event loop that entered it.

    Args:
        edge: whose policy; a DNS label.
        kind: what this gateway drives.
        addresses: control planes, tried in turn from a random one.
        transport: opens its channels; started and stopped with this.
        id: names this process in ``mesh status``; at most 128 characters.
        cache: directory for the file; None for none.
        rng: draws the waits and the first address.
        clock: seconds, monotonic.

    Raises:
        InvalidValueError: ``edge`` is no DNS label.

    Attributes:
        current: the policy to obey; None until one is known, and then never again.
        confirmed: whether `current` is what a control plane has said in this process; False: it is from the disk.
        cached: what an earlier process has reported as applied, if it is on disk; known once this is entered.
        state: of the stream, in words.
    """

    def __init__(
        self,
        edge: str,
        kind: EdgeKind,
        addresses: Sequence[str],
        transport: Transport,
        *,
        id: str,
        cache: Path | None = None,
        rng: Random | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.edge = check_service_name(edge)
        self.current: FollowedPolicy | None = None
        self.confirmed = False
        self.state = "not tried yet"
        self._kind = kind
        self._addresses = tuple(addresses)
        self._transport = transport
        self._id = id
        self._file = None
        if cache is not None:
            path = file_of_mesh(cache, self._addresses, f"edge-{edge}-{{mesh}}.policy")
            self._file = CheckedFile(path, "edge policy cache", b"grpc-mesh edge policy 1\n")
        self._rng = rng or Random()
        self._clock = clock
        self.cached: FollowedPolicy | None = None
        self._changed = asyncio.Event()
        self._report: tuple[EdgeReport, float] | None = None
        self._reported = asyncio.Event()
        self._recent: deque[FollowedPolicy] = deque(maxlen=8)
        self._to_save: FollowedPolicy | None = None
        self._saved_version = ""
        self._save = asyncio.Event()
        self._saving = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._patience: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        """Starts to follow.

        Raises:
            ConfigError: the files of the identity are not as they must be.
        """
        if self._file is not None:
            self.cached = await asyncio.to_thread(self._file.load, self._decode)
            self._saved_version = "" if self.cached is None else self.cached.version
        await self._transport.start()
        self._patience = asyncio.get_running_loop().call_later(PATIENCE, self._fall_back)
        self._tasks = [
            asyncio.create_task(self._run(), name=f"policy of edge {self.edge}"),
            asyncio.create_task(self._save_changes(), name=f"cached policy of edge {self.edge}"),
        ]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Ends the stream, and with it the gateway's presence. What was reported as applied is on disk then."""
        if self._patience is not None:
            self._patience.cancel()
        await end_tasks(*self._tasks)
        await self._save_now()
        await self._transport.stop()

    async def changed(self, known: str | None) -> FollowedPolicy:
        """Returns `current` once its version is another one than ``known``; at once, if it is already.

        Args:
            known: version of the policy that the caller has; None: none.
        """
        while self.current is None or self.current.version == known:
            await self._changed.wait()
        return self.current

    def report(self, report: EdgeReport) -> None:
        """Says what became of a policy, now. Sent as soon as there is a stream; a newer report takes its place."""
        self._report = (report, self._clock())
        self._reported.set()
        if report.outcome is not EdgeOutcome.APPLIED or report.applied_version == self._saved_version:
            return
        for followed in self._recent:
            if followed.version == report.applied_version:
                self._to_save, self._saved_version = followed, followed.version
                self._save.set()

    def _set(self, followed: FollowedPolicy, *, confirmed: bool) -> None:
        known, self.current = self.current, followed
        self.confirmed = confirmed
        if known is None or known.version != followed.version:
            self._recent.append(followed)
            event, self._changed = self._changed, asyncio.Event()
            event.set()

    def _fall_back(self) -> None:
        if self.current is None and self.cached is not None:
            log.warning(
                "no control plane has told the policy of edge %s: it is taken from the disk, version %s (%s)",
                self.edge,
                self.cached.version,
                self.state,
            )
            self._set(self.cached, confirmed=False)

    async def _run(self) -> None:
        index = self._rng.randrange(len(self._addresses))
        failures = 0
        while True:
            await self._credentials()
            answered = await self._follow(self._addresses[index % len(self._addresses)])
            obey_cancellation()
            failures = 0 if answered else failures + 1
            if failures >= len(self._addresses):
                self._fall_back()
            index += 1
            # Another address may be fine: wait only after each has had its turn.
            if failures % len(self._addresses) == 0:
                attempt = min(failures // len(self._addresses) + 1, 32)
                await asyncio.sleep(backoff_delay(RECONNECT, attempt, self._rng))

    async def _credentials(self) -> None:
        """Returns when channels can be opened."""
        changed = asyncio.Event()
        unsubscribe = self._transport.on_change(changed.set)
        try:
            while self._transport.problem:
                self.state = f"not tried, for want of a certificate: {self._transport.problem}"
                if self._transport.failing:
                    self._fall_back()
                changed.clear()
                await changed.wait()
        finally:
            unsubscribe()

    async def _follow(self, address: str) -> bool:
        """Follows one stream to its end; whether it was answered."""
        answered = False
        try:
            async with self._transport.open_channel(address, CONTROL_PLANE, STREAM_OPTIONS) as channel:
                call = pb_grpc.EdgeServiceStub(channel).Follow()
                end = StreamEnd(call)
                sender = asyncio.create_task(self._send(call), name="reports of a gateway")
                try:
                    timeout: float | None = FIRST_RESPONSE_TIMEOUT
                    while True:
                        async with asyncio.timeout(timeout):
                            response = await call.read()
                        if not isinstance(response, pb.FollowResponse):
                            self._lost(address, "it ended the stream", answered)
                            return answered
                        if not answered:
                            log.info("%s tells the policy of edge %s", address, self.edge)
                        answered, timeout = True, None
                        self.state = f"{address} connected"
                        self._take(response, address)
                except grpc.aio.AioRpcError as error:
                    raise await end.instead_of(error) from None
                finally:
                    await end_tasks(sender)
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            details = error.details() or ""
            why = explain(details, "the control plane", secure=self._transport.secure)
            self._lost(address, why or f"{error.code().name}: {details}", answered)
        except TimeoutError:
            self._lost(address, f"no response within {FIRST_RESPONSE_TIMEOUT:g} s", answered)
        except (IdentityError, InvalidValueError) as error:
            self._lost(address, str(error), answered)
        except Exception as error:
            # A defect of ours. To stop following would be worse than to try again.
            log.exception("following the policy of edge %s at %s failed", self.edge, address)
            self._lost(address, f"{type(error).__name__}: {error}", answered)
        return answered

    def _take(self, response: pb.FollowResponse, address: str) -> None:
        if not response.version:
            self.state = f"{address} connected, which does not know the policy yet"
            return
        if not response.HasField("policy"):
            held = self._held()
            if held is None or held.version != response.version:
                raise InvalidValueError("response.policy", None, f"a policy of version {response.version}")
            self._set(held, confirmed=True)
            return
        try:
            followed = self._decode(response.SerializeToString())
        except (InvalidPolicyError, InvalidValueError) as error:
            log.warning("policy %s of edge %s is not understood: %s", response.version, self.edge, error)
            before = self._report[0] if self._report else EdgeReport("", EdgeOutcome.REJECTED)
            self.report(
                EdgeReport(
                    response.version,
                    EdgeOutcome.REJECTED,
                    f"this gateway does not understand it: {error}",
                    before.applied_version,
                    before.endpoints_versions,
                )
            )
            return
        self._set(followed, confirmed=True)

    def _held(self) -> FollowedPolicy | None:
        return self.current or self.cached

    def _decode(self, raw: bytes) -> FollowedPolicy:
        response = pb.FollowResponse.FromString(raw)
        policy = edge_policy_from_proto(response.policy)
        if policy.edge != self.edge:
            raise InvalidValueError("policy.edge", policy.edge, repr(self.edge))
        return FollowedPolicy(policy, response.version, response.stored)

    async def _send(self, call: _Call) -> None:
        held = self._held()
        gateway = pb.EdgeGateway(
            edge=self.edge, id=self._id, kind=self._kind.value, held_version="" if held is None else held.version
        )
        bucket = TokenBucket(REPORTS_PER_SECOND, REPORTS_AT_ONCE, self._clock())
        # What a broken stream raises here, reading it raises as well.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(pb.FollowRequest(gateway=gateway, report=self._message()))
            while True:
                await self._reported.wait()
                while wait := bucket.take(self._clock()):
                    await asyncio.sleep(wait)
                await call.write(pb.FollowRequest(report=self._message()))

    def _message(self) -> pb.EdgeReport | None:
        """The last report, as it is to be sent now."""
        self._reported.clear()
        if self._report is None:
            return None
        report, at = self._report
        versions = sorted(report.endpoints_versions.items())[:MAX_ENDPOINTS_VERSIONS]
        ago = Duration()
        ago.FromNanoseconds(int(max(self._clock() - at, 0.0) * 1e9))
        return pb.EdgeReport(
            policy_version=report.policy_version,
            outcome=report.outcome.value,
            detail=report.detail,
            ago=ago,
            applied_version=report.applied_version,
            endpoints_versions=dict(versions),
        )

    async def _save_changes(self) -> None:
        while True:
            await self._save.wait()
            self._save.clear()
            await asyncio.shield(self._save_now())

    async def _save_now(self) -> None:
        async with self._saving:
            followed, self._to_save = self._to_save, None
            if self._file is not None and followed is not None:
                response = pb.FollowResponse(
                    version=followed.version, policy=edge_policy_to_proto(followed.policy), stored=followed.stored
                )
                await asyncio.to_thread(self._file.save, response.SerializeToString(deterministic=True))

    def _lost(self, address: str, why: str, answered: bool) -> None:
        self.state = f"{address} unreachable: {why}"
        if answered and AGED in why:
            self.state = f"{address} reconnecting: {why}"
            log.info("the stream of edge %s to %s has reached its age; reconnecting", self.edge, address)
        elif answered:
            log.warning("the stream of edge %s to %s is lost, the edge goes on as it is: %s", self.edge, address, why)
        else:
            log.warning("the policy of edge %s cannot be followed at %s: %s", self.edge, address, why)
