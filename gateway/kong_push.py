"""Tells a Kong without a database what to do: protos into a directory, then the configuration through its admin API."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from gateway import kong
from gateway.endpoints import routable
from gateway.errors import GatewayError, PushFailedError, PushRejectedError
from gateway.exposed_api import ExposedApi
from gateway.files import write_atomically
from gateway.kong_admin import KongAdmin
from gateway.kong_answers import EMPTY_HASH, same_target
from gateway.kong_protos import ProtoDirectory
from gateway.settings import HeldCertificate, KongSettings, Target, Upstream
from gateway.sync_state import Push
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.store import EndpointsResource
from mesh_client.identity import PemCredentials

log = logging.getLogger(__name__)

SETTLE = 1.0
"""Seconds for which Kong's workers may still use what was just replaced: measured, they then do not any more."""
OBSERVE_TIMEOUT = 30.0
"""Seconds that another gateway is waited for: as long as it takes to replace it, should it have died."""
LOOK_INTERVAL = 0.5
"""Seconds between looks at what another gateway has done."""
WATCH_INTERVAL = 5.0
"""Seconds between looks at whether Kong still has what it was told."""
CONTESTED_INTERVAL = 60.0
"""The same while other gateways may push too: they would replace each other's configuration without end."""

_KONG_WEIGHT, _MAX_KONG_WEIGHT = 100, 65_535


class KongPusher:
    """Pushes to one Kong. Implements `gateway.pushing.Pusher`.

    Args:
        exposed: what policies make of the protos.
        settings: of this Kong; its upstreams are not looked at.
        admin: its admin API, entered.
        protos: the directory of its protos, as this process sees it.
        credentials: what Kong shows to services, and whom it believes; None in plaintext.
        server_name: the DNS name in the certificates of a service of the mesh.
        sole: whether no other gateway pushes to this Kong.
        roots_file: where the roots are written for ``nginx_proxy_grpc_ssl_trusted_certificate``; None: nowhere.
    """

    def __init__(
        self,
        exposed: ExposedApi,
        settings: KongSettings,
        admin: KongAdmin,
        protos: ProtoDirectory,
        *,
        credentials: Callable[[], PemCredentials | None],
        server_name: Callable[[str], str],
        sole: Callable[[], bool] = lambda: True,
        roots_file: Path | None = None,
    ) -> None:
        self._exposed = exposed
        self._settings = settings
        self._admin = admin
        self._protos = protos
        self._credentials = credentials
        self._server_name = server_name
        self._sole = sole
        self._roots_file = roots_file
        self._roots = b""
        self._hash = ""
        """Of the configuration that Kong was told last; empty when it is not known."""

    def check(self, policy: EdgePolicy) -> str:
        """What is wrong with a policy, by the protos and by what Kong can do."""
        try:
            self._render(policy, {name: Upstream() for name in policy.upstreams})
        except GatewayError as error:
            return str(error)
        return ""

    async def push(self, push: Push) -> None:
        """Returns when Kong obeys it, and sends nothing any more to endpoints that have left.

        Raises:
            PushRejectedError: it cannot be rendered, or Kong refuses it.
            PushFailedError: Kong, or the directory of its protos, cannot be reached.
        """
        credentials = self._credentials()
        made = await asyncio.to_thread(self._configuration, push, credentials)
        await asyncio.to_thread(self._write, made, credentials)
        secrets = [] if credentials is None else [credentials.key.decode("ascii")]
        self._hash = ""
        if await self._admin.load(made.declarative, secrets):
            log.info(
                "Kong at %s obeys policy %s now", self._admin.address, push.policy.version or "that exposes nothing"
            )
            await asyncio.sleep(SETTLE)
        await asyncio.to_thread(self._protos.named, made.protos)
        with contextlib.suppress(PushFailedError):
            self._hash = await self._admin.configuration_hash()

    async def observe(self, gone: Mapping[str, frozenset[str]]) -> None:
        """Returns when Kong has none of these targets any more, or after `OBSERVE_TIMEOUT`."""
        left = {name: frozenset(map(same_target, targets)) for name, targets in gone.items()}
        try:
            async with asyncio.timeout(OBSERVE_TIMEOUT):
                while left := await self._still_there(left):
                    await asyncio.sleep(LOOK_INTERVAL)
        except TimeoutError:
            log.warning(
                "Kong at %s still has %s, which left %.0f s ago: no gateway tells it so",
                self._admin.address,
                ", ".join(sorted(target for targets in left.values() for target in targets)),
                OBSERVE_TIMEOUT,
            )
        else:
            await asyncio.sleep(SETTLE)

    async def _still_there(self, gone: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
        try:
            return {
                name: still for name, targets in gone.items() if (still := targets & await self._admin.targets(name))
            }
        except PushFailedError:
            return dict(gone)

    async def watch(self, lost: Callable[[], None]) -> None:
        """Calls back when Kong has got another configuration, or none, as after a restart, or does not answer."""
        loop = asyncio.get_running_loop()
        trouble, contested_until = "", 0.0
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            told = self._hash
            if not told:
                continue
            try:
                found = await self._admin.configuration_hash()
            except PushFailedError as error:
                if not trouble:
                    lost()
                trouble = str(error)
                continue
            trouble = ""
            if not found or told in (found, "") or told != self._hash:
                continue  # what was just pushed is looked at next time
            if found != EMPTY_HASH and not self._sole():
                if loop.time() < contested_until:
                    continue
                contested_until = loop.time() + CONTESTED_INTERVAL
            log.warning(
                "Kong at %s has %s; telling it again",
                self._admin.address,
                "no configuration any more" if found == EMPTY_HASH else "a configuration of somebody else",
            )
            lost()

    def _configuration(self, push: Push, credentials: PemCredentials | None) -> kong.KongConfiguration:
        certificate = None
        if credentials is not None:
            certificate = HeldCertificate(
                certificate=credentials.certificate.decode("ascii"), key=credentials.key.decode("ascii")
            )
        upstreams = {
            name: Upstream(
                targets=_targets(resource),
                host_header=None if certificate is None else self._server_name(name),
                client_certificate=certificate,
            )
            for name, resource in push.endpoints.items()
        }
        try:
            return self._render(push.policy.policy, upstreams)
        except GatewayError as error:
            raise PushRejectedError(str(error)) from None

    def _render(self, policy: EdgePolicy, upstreams: Mapping[str, Upstream]) -> kong.KongConfiguration:
        table, document = self._exposed.of(policy)
        return kong.render(table, policy, upstreams, self._settings, document)

    def _write(self, made: kong.KongConfiguration, credentials: PemCredentials | None) -> None:
        self._protos.write(made.protos)
        if self._roots_file is None or credentials is None or credentials.roots == self._roots:
            return
        try:
            held = self._roots_file.read_bytes() if self._roots_file.exists() else b""
            if held != credentials.roots:
                write_atomically(self._roots_file, credentials.roots)
                log.warning("the roots in %s have changed; Kong reads them at `kong reload` only", self._roots_file)
        except OSError as error:
            raise PushFailedError(f"the roots cannot be written to {self._roots_file}: {error.strerror}") from None
        self._roots = credentials.roots


def _targets(resource: EndpointsResource | None) -> tuple[Target, ...]:
    """The endpoints as Kong takes them, those at one address once. What has the weight 1 has Kong's default weight."""
    found = {endpoint.target: endpoint.weight for endpoint in routable(() if resource is None else resource.endpoints)}
    scale = min(_KONG_WEIGHT, _MAX_KONG_WEIGHT / max(found.values(), default=1))
    return tuple(Target(address=address, weight=max(1, round(scale * weight))) for address, weight in found.items())
