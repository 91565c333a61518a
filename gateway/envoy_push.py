"""Tells an Envoy what to do, by the files that it follows, and sees by its own interface that it does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from gateway.envoy import BOOTSTRAP, EnvoyConfiguration, EnvoyRenderer
from gateway.envoy_admin import Applied, EnvoyAdmin
from gateway.envoy_authentication import ways_of
from gateway.envoy_files import EnvoyFiles
from gateway.envoy_process import EnvoyProcess
from gateway.envoy_settings import EnvoySettings
from gateway.errors import GatewayError, PushFailedError, PushRejectedError
from gateway.exposed_api import ExposedApi
from gateway.redaction import fit_for_logs
from gateway.secret_files import AGAIN, read_secrets
from gateway.sync_state import Push
from mesh_client.core.edge_policy import Authentication, EdgePolicy
from mesh_client.core.model import Endpoint
from mesh_client.identity import PemCredentials

log = logging.getLogger(__name__)

APPLY_TIMEOUT = 15.0
"""Seconds for Envoy to start and to apply what it is told; mostly it takes milliseconds."""
SETTLE = 0.05
"""Seconds for Envoy's workers to take over what its main thread says that it has applied."""
LOOK_INTERVAL = 0.01
"""Seconds between looks at what it has applied."""
WATCH_INTERVAL = 5.0
"""Seconds between looks at whether Envoy still has what it was told."""
REASON_PATIENCE = 1.0
"""Seconds for Envoy's log to say why it refuses something."""
_REFUSALS = ("rejected", "Error", "error")


class EnvoyPusher:
    """Pushes to one Envoy. Implements `gateway.pushing.Pusher`.

    Args:
        exposed: what policies make of the protos.
        settings: of this Envoy, without certificates for upstreams.
        admin: its own interface, entered.
        credentials: what Envoy shows to services, and whom it believes; None in plaintext.
        trust_domain: of the mesh.
        secrets: directory of the secrets that policies name; None for none.
        process: what runs Envoy; None if that is somebody else's.
    """

    def __init__(
        self,
        exposed: ExposedApi,
        settings: EnvoySettings,
        admin: EnvoyAdmin,
        *,
        credentials: Callable[[], PemCredentials | None],
        trust_domain: Callable[[], str],
        secrets: Path | None = None,
        process: EnvoyProcess | None = None,
    ) -> None:
        self._exposed = exposed
        self._settings = settings
        self._files = EnvoyFiles(settings)
        self._admin = admin
        self._credentials = credentials
        self._trust_domain = trust_domain
        self._secrets = secrets
        self._process = process
        self._renderer: tuple[tuple[EdgePolicy, EnvoySettings, Mapping[str, str]], EnvoyRenderer] | None = None
        """What all but endpoints is rendered by, and of what."""
        self._doubtful = False
        """Whether Envoy may not have applied what is in its files."""
        self._told: EnvoyConfiguration | None = None
        """What Envoy has applied last, as far as it was this process that told it."""

    def open(self) -> None:
        """Makes the files that Envoy is started with; has it started if an earlier process left the others.

        Raises:
            ConfigError: the directory cannot be used, or others may enter it.
        """
        nothing = self._render(EdgePolicy(), {}, self._settings, {})
        if self._files.open(nothing.files[BOOTSTRAP]):
            log.info("Envoy can start with what was left in %s", self._files.directory)
            self._begin()

    def check(self, policy: EdgePolicy) -> str:
        """What is wrong with a policy, by the protos and by what Envoy can do."""
        try:
            # Any values will do: the real ones are looked at when it is pushed.
            self._render(policy, {}, self._settings, {name: name for name in _key_names(policy)})
        except GatewayError as error:
            return str(error)
        return ""

    async def push(self, push: Push) -> None:
        """Returns when Envoy obeys it, and sends nothing any more to endpoints that have left.

        Raises:
            PushRejectedError: it cannot be rendered, a secret is missing, or Envoy refuses it.
            PushFailedError: Envoy, or its directory, cannot be reached.
        """
        api_keys = await asyncio.to_thread(read_secrets, self._secrets, _key_names(push.policy.policy))
        made = await asyncio.to_thread(self._configuration, push, api_keys)
        if self._process is not None:
            self._process.hide(api_keys.values())
        again, self._doubtful = self._doubtful, True
        try:
            await self._apply(made, api_keys.values(), again=again)
        except PushRejectedError:
            if self._told is not None:
                await asyncio.to_thread(self._files.write, self._told.files)
            raise
        self._told, self._doubtful = made, False
        await asyncio.to_thread(self._files.tidy, made.files)

    async def observe(self, gone: Mapping[str, frozenset[str]]) -> None:
        """Returns at once: each Envoy has a gateway of its own, so there is none that could be waited for."""

    async def watch(self, lost: Callable[[], None]) -> None:
        """Calls back when Envoy has something else, or does not answer."""
        trouble = False
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            told = self._told
            if told is None:
                continue
            try:
                found = told.versions.items() <= (await self._admin.applied()).versions.items()
            except PushFailedError:
                found = False
            if not found and not trouble and told is self._told:
                log.warning("Envoy at %s does not have what it was told", self._admin.address)
                lost()
            trouble = not found

    def _begin(self) -> None:
        if self._process is not None:
            self._process.begin()

    async def _apply(self, made: EnvoyConfiguration, secrets: Iterable[str], *, again: bool) -> None:
        """Clusters first, with their endpoints; then the routes and the listener that name them."""
        started = time.monotonic()
        before: Mapping[str, int] = {}
        with contextlib.suppress(PushFailedError):
            before = (await self._admin.applied()).rejected
        late = {"rds.json", "lds.json", BOOTSTRAP}
        early = {name: text for name, text in made.files.items() if name not in late}
        readouts = {name for name in made.versions if ".rds." not in name and ".lds." not in name}
        running = bool(before)
        await asyncio.to_thread(self._files.write, early, again=again)
        if running:
            await self._confirm(made, readouts, before, started, secrets)
        await asyncio.to_thread(self._files.write, made.files, again=again)
        self._begin()
        await self._confirm(made, set(made.versions), before, started, secrets)
        await asyncio.sleep(SETTLE)

    async def _confirm(
        self,
        made: EnvoyConfiguration,
        readouts: set[str],
        before: Mapping[str, int],
        started: float,
        secrets: Iterable[str],
    ) -> None:
        wanted = {name: version for name, version in made.versions.items() if name in readouts}
        trouble, found = f"Envoy at {self._admin.address} has not answered", Applied({}, {}, 0)
        try:
            async with asyncio.timeout(APPLY_TIMEOUT):
                while True:
                    try:
                        found = await self._admin.applied()
                        if wanted.items() <= found.versions.items() and not found.warming and await self._admin.ready():
                            return
                    except PushFailedError as error:
                        trouble = str(error)
                    else:
                        trouble = ""
                    refused = [
                        name
                        for name, count in found.rejected.items()
                        if count > (before.get(name, 0) if count >= before.get(name, 0) else 0)
                    ]
                    if refused:
                        raise PushRejectedError(await self._refusal(refused, started, secrets), again=AGAIN)
                    await asyncio.sleep(LOOK_INTERVAL)
        except TimeoutError:
            missing = sorted(name for name, version in wanted.items() if found.versions.get(name) != version)
            what = trouble or f"Envoy has not applied {', '.join(missing) or 'everything'} for {APPLY_TIMEOUT:.0f} s"
            raise PushFailedError(what) from None

    async def _refusal(self, refused: Sequence[str], started: float, secrets: Iterable[str]) -> str:
        said: list[str] = []
        if self._process is not None:
            # It counts what it refuses before it says why.
            give_up = time.monotonic() + REASON_PATIENCE
            while not said and time.monotonic() < give_up:
                said = [text for text in self._process.said(started) if any(word in text for word in _REFUSALS)]
                if not said:
                    await asyncio.sleep(LOOK_INTERVAL)
        where = ", ".join(name.removesuffix(".update_rejected") for name in sorted(refused))
        return fit_for_logs(f"Envoy refuses {where}: {'; '.join(said) or 'its log says why'}", secrets)

    def _configuration(self, push: Push, api_keys: Mapping[str, str]) -> EnvoyConfiguration:
        settings = self._files.with_credentials(self._credentials(), self._trust_domain())
        endpoints = {name: () if resource is None else resource.endpoints for name, resource in push.endpoints.items()}
        try:
            return self._render(push.policy.policy, endpoints, settings, api_keys)
        except GatewayError as error:
            raise PushRejectedError(str(error), again=AGAIN) from None

    def _render(
        self,
        policy: EdgePolicy,
        endpoints: Mapping[str, Sequence[Endpoint]],
        settings: EnvoySettings,
        api_keys: Mapping[str, str],
    ) -> EnvoyConfiguration:
        of = policy, settings, api_keys
        if self._renderer is None or self._renderer[0] != of:
            table, document = self._exposed.of(policy)
            self._renderer = of, EnvoyRenderer(table, policy, settings, api_keys=api_keys, openapi=document)
        return self._renderer[1].render(endpoints)


def _key_names(policy: EdgePolicy) -> list[str]:
    if Authentication.API_KEY not in ways_of(policy):
        return []
    return [name for consumer in policy.consumers.values() for name in consumer.api_keys]
