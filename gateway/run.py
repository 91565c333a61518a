"""Runs a gateway in the foreground: `mesh gateway run kong` and `mesh gateway run envoy`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.descriptors import Api
from gateway.edge_client import EdgeClient, EdgeKind, EdgeOutcome, EdgeReport
from gateway.election_state import Role
from gateway.envoy import BOOTSTRAP
from gateway.envoy_admin import EnvoyAdmin
from gateway.envoy_process import EnvoyProcess
from gateway.envoy_push import EnvoyPusher
from gateway.envoy_settings import EnvoySettings
from gateway.errors import PushFailedError
from gateway.exposed_api import ApiInfo, ExposedApi
from gateway.files import private_directory
from gateway.kong_admin import AdminAddress, KongAdmin
from gateway.kong_protos import ProtoDirectory
from gateway.kong_push import KongPusher
from gateway.pushing import Pusher
from gateway.settings import KongSettings
from gateway.sync import EdgeSync
from gateway.sync_state import Result, SyncState
from mesh_client.addresses import HostPort
from mesh_client.core.errors import ConfigError
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Principal
from mesh_client.identity import PemCredentials
from mesh_client.mesh import connect
from mesh_client.stop_signals import StopSignals
from mesh_client.tasks import end_tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """What gateways of every kind need to know."""

    edge: str
    """Whose policy is followed."""
    directory: Path
    """Of the gateway's state, its owner's alone."""
    service: str | None = None
    """The service of the mesh that this process belongs to; by default the one that is named like the edge."""
    control_plane: str | None = None
    """As for `mesh_client.connect`, which reads everything else from its environment variables."""
    insecure: bool | None = None
    info: ApiInfo = field(default_factory=ApiInfo)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvoyOptions(GatewayOptions):
    """An Envoy, started here or by somebody else."""

    settings: EnvoySettings
    secrets: Path | None = None
    program: Path | None = None
    """Envoy's binary; None: somebody else runs it."""
    concurrency: int | None = None
    drain_time: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KongOptions(GatewayOptions):
    """A Kong that somebody else runs."""

    admin: AdminAddress
    protos: Path
    """Where its protos are written, as this process sees the directory."""
    settings: KongSettings = field(default_factory=KongSettings)
    header_file: Path | None = None
    admin_roots: Path | None = None
    roots_file: Path | None = None
    consul: HostPort | None = None
    """The agent by which gateways of this edge elect one of them; None: there is no election."""


_OUTCOMES = {
    Result.APPLIED: EdgeOutcome.APPLIED,
    Result.REJECTED: EdgeOutcome.REJECTED,
    Result.FAILED: EdgeOutcome.FAILED,
    Result.STANDBY: EdgeOutcome.STANDBY,
}


class _Gateway:
    """The parts of a gateway that are the same for every kind of edge.

    Args:
        kind: of the edge.
        options: of this gateway.

    Raises:
        ConfigError, InvalidValueError: an option is wrong; the message says which.
    """

    def __init__(self, kind: EdgeKind, options: GatewayOptions) -> None:
        private_directory(options.directory, "dir")
        self._edge = options.edge
        self._said = False
        self._saying: asyncio.Task[None] | None = None
        self._sync: EdgeSync | None = None
        self.mesh = connect(
            options.control_plane,
            service=options.service or options.edge,
            insecure=options.insecure,
            applied=self._applied,
            identity_dir=_unless_set("MESH_IDENTITY_DIR", options.directory / "identity"),
            cache_dir=_unless_set("MESH_CACHE_DIR", options.directory / "cache"),
        )
        self._client = EdgeClient(
            options.edge,
            kind,
            self.mesh.control_planes,
            self.mesh.transport,
            id=self.mesh.node_id,
            cache=options.directory,
        )
        self.where: Callable[[], Awaitable[str]] = _nowhere
        """Where the edge is, in words, for when it obeys for the first time."""

    def credentials(self) -> PemCredentials | None:
        """What the edge shows to services; None in plaintext.

        Raises:
            IdentityError: there is no certificate yet.
        """
        identity = self.mesh.transport.identity
        return None if identity is None else identity.pem()

    def trust_domain(self) -> str:
        """Of the mesh."""
        identity = self.mesh.transport.identity
        return DEFAULT_TRUST_DOMAIN if identity is None else identity.principal.trust_domain

    def server_name(self, service: str) -> str:
        """The DNS name in the certificates of a service."""
        return Principal.service(self.trust_domain(), service).dns_name

    def drives(self, pusher: Pusher) -> EdgeSync:
        """What keeps the edge in step, by this pusher."""
        self._sync = EdgeSync(pusher, self._on_state)
        return self._sync

    async def run(
        self,
        sync: EdgeSync,
        others: Sequence[Coroutine[Any, Any, None]] = (),
        stop: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """Until SIGTERM or SIGINT, or until a part fails.

        Args:
            sync: from `drives`.
            others: what else runs meanwhile.
            stop: what is done first at the end, while everything still runs.
        """
        if self.mesh.transport.identity is not None:
            self.mesh.transport.identity.confirm_after(sync.applied)
        signals = StopSignals()
        with signals.handled():
            async with self.mesh, self._client as client:
                if client.cached is not None:
                    sync.recovered(client.cached.version, client.cached.policy)
                tasks = [asyncio.create_task(work) for work in (sync.run(self.mesh), _follow(client, sync), *others)]
                failed = asyncio.ensure_future(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))
                try:
                    await signals.first_or(failed)
                    if stop is not None:
                        await signals.unless_again(stop())
                finally:
                    await end_tasks(*tasks, failed, self._saying)
        for task in tasks:
            if not task.cancelled():
                task.result()

    async def _applied(self, services: frozenset[str]) -> None:
        if self._sync is not None:
            await self._sync.applied(services)

    def _on_state(self, state: SyncState) -> None:
        outcome = _OUTCOMES.get(state.result)
        if outcome is not None:
            self._client.report(
                EdgeReport(state.policy_version, outcome, state.reason, state.applied_version, state.endpoints)
            )
        if state.result is Result.APPLIED and not self._said:
            self._said = True
            self._saying = asyncio.create_task(self._say())

    async def _say(self) -> None:
        with contextlib.suppress(PushFailedError):
            sys.stdout.write(f"mesh gateway: edge {self._edge} {await self.where()}\n")
            sys.stdout.flush()


async def _follow(client: EdgeClient, sync: EdgeSync) -> None:
    known: str | None = None
    while True:
        followed = await client.changed(known)
        known = followed.version
        sync.policy_changed(followed.version, followed.policy)


async def _nowhere() -> str:
    return "is served"


def _unless_set(variable: str, default: Path) -> Path | None:
    return None if os.environ.get(variable) else default


async def run_envoy(api: Api, options: EnvoyOptions) -> None:
    """Runs the gateway of an Envoy, and Envoy itself unless somebody else does.

    Args:
        api: the protos of the services that policies may expose.
        options: of this gateway.

    Raises:
        ConfigError, InvalidValueError: an option is wrong; the message says which.
    """
    gateway = _Gateway(EdgeKind.ENVOY, options)
    async with EnvoyAdmin(options.settings.admin) as admin:
        process = None
        if options.program is not None:
            bootstrap = Path(options.settings.directory) / BOOTSTRAP
            process = EnvoyProcess(
                options.program, bootstrap, admin, concurrency=options.concurrency, drain_time=options.drain_time
            )
        pusher = EnvoyPusher(
            ExposedApi(api, options.info),
            options.settings,
            admin,
            credentials=gateway.credentials,
            trust_domain=gateway.trust_domain,
            secrets=options.secrets,
            process=process,
        )
        pusher.open()
        sync = gateway.drives(pusher)
        sync.role_changed(Role.ALONE)

        async def where() -> str:
            scheme = "http" if options.settings.downstream_tls is None else "https"
            return "listens on " + ", ".join(f"{scheme}://{address}" for address in await admin.listening())

        gateway.where = where
        if process is None:
            await gateway.run(sync)
        else:
            await gateway.run(sync, [process.run()], process.stop)


async def run_kong(api: Api, options: KongOptions) -> None:
    """Runs the gateway of a Kong.

    Args:
        api: the protos of the services that policies may expose.
        options: of this gateway.

    Raises:
        ConfigError, InvalidValueError: an option is wrong; the message says which.
    """
    gateway = _Gateway(EdgeKind.KONG, options)
    role = Role.ALONE if options.consul is None else Role.UNDECIDED

    def role_changed(changed: Role) -> None:
        nonlocal role
        role = changed
        sync.role_changed(changed)

    async with KongAdmin(options.admin, header_file=options.header_file, roots=options.admin_roots) as admin:
        pusher = KongPusher(
            ExposedApi(api, options.info),
            options.settings,
            admin,
            ProtoDirectory(options.protos),
            credentials=gateway.credentials,
            server_name=gateway.server_name,
            sole=lambda: role is Role.LEADER,
            roots_file=options.roots_file,
        )
        sync = gateway.drives(pusher)
        sync.role_changed(role)

        async def where() -> str:
            return f"is served by the Kong at {options.admin}"

        gateway.where = where
        if options.consul is None:
            await gateway.run(sync)
        else:
            await gateway.run(sync, [_election(options.edge, options.consul, gateway, role_changed)])


def _election(
    edge: str, consul: HostPort, gateway: _Gateway, role_changed: Callable[[Role], None]
) -> Coroutine[Any, Any, None]:
    try:
        from gateway.election import ConsulElection
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"electing one gateway by Consul needs the package {error.name!r}: pip install 'grpc-mesh[consul]'; or do "
            "without with --no-election"
        ) from None
    return ConsulElection(edge, gateway.mesh.node_id, consul, role_changed).run()
