"""Registers a server with a Consul agent. Needs the ``consul`` extra: ``pip install 'grpc-mesh[consul]'``."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import requests
from consul import base, std

from mesh_client.addresses import HostPort
from mesh_client.core.errors import ConfigError
from mesh_client.core.model import Endpoint
from mesh_client.core.registration import Registration, RegistrationState, RegistrationStatus, Verdict
from mesh_client.identity.store import read_secret_file
from mesh_client.registration import Changes
from mesh_client.tasks import end_tasks

logger = logging.getLogger(__name__)

TAG = "grpc-mesh"
"""Marks registrations that the control plane takes for endpoints."""

ZONE_KEY = "mesh-zone"
REGION_KEY = "mesh-region"
DRAINING_KEY = "mesh-draining"
REGISTRATION_KEY = "mesh-registration"
"""Meta that tells this process from one before it under the same id: control planes forget what drained with that."""

DEREGISTER_AFTER = "1m"
"""How long a critical registration is kept; Consul's own minimum."""

AGENT_TIMEOUT = 5.0
"""Seconds for the agent to answer."""


class AgentError(Exception):
    """The agent did not do what it was asked.

    Attributes:
        refused: it answered that it may not, so that only a change elsewhere can help.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


def service_definition(
    service: str, endpoint: Endpoint, check_lifetime: float, *, passing: bool, draining: bool, registration: str
) -> dict[str, object]:
    """What ``/v1/agent/service/register`` takes (https://developer.hashicorp.com/consul/api-docs/agent/service).

    Args:
        service: the service.
        endpoint: the endpoint. Its id becomes Consul's service id, which must be unique on the agent.
        check_lifetime: seconds that one report of a passed self-check lasts.
        passing: how the check stands until its first report.
        draining: whether the endpoint is leaving.
        registration: another text than any process before had.
    """
    meta = {**endpoint.metadata, REGISTRATION_KEY: registration}
    if endpoint.locality.zone:
        meta[ZONE_KEY] = endpoint.locality.zone
    if endpoint.locality.region:
        meta[REGION_KEY] = endpoint.locality.region
    if draining:
        meta[DRAINING_KEY] = "true"
    return {
        "ID": endpoint.id,
        "Name": service,
        "Tags": [TAG],
        "Address": endpoint.address,
        "Port": endpoint.port,
        "Meta": meta,
        "Weights": {"Passing": endpoint.weight, "Warning": 1},
        "Check": {
            "CheckID": check_id(endpoint),
            "Name": "self-check over gRPC",
            "TTL": f"{check_lifetime:g}s",
            "Status": "passing" if passing else "critical",
            "DeregisterCriticalServiceAfter": DEREGISTER_AFTER,
        },
    }


def check_id(endpoint: Endpoint) -> str:
    """Id of the endpoint's TTL check."""
    return f"grpc-mesh:{endpoint.id}"


class ConsulAgent:
    """The calls to a Consul agent that registration needs, off the event loop.

    python-consul2 blocks, so it runs in one thread of its own. Its ``Consul`` class lets ``CONSUL_HTTP_ADDR`` override
    the address it is given and knows no weights; its HTTP client does neither harm.

    Args:
        address: the agent.
        token: gives the ACL token, or an empty text; asked for each request, so that it can be replaced.
    """

    def __init__(self, address: HostPort, token: Callable[[], str]) -> None:
        self._http = std.HTTPClient(host=address.host, port=address.port, timeout=AGENT_TIMEOUT)
        self._http.session.trust_env = False
        self._token = token
        self._registered_with = ""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="consul-agent")

    async def register(self, definition: dict[str, object]) -> None:
        """Registers, or replaces what is registered with the same id.

        Raises:
            AgentError: it is not registered.
        """
        self._registered_with = await self._put("/v1/agent/service/register", data=json.dumps(definition))

    async def report(self, check: str, verdict: Verdict) -> bool:
        """Reports a TTL check; False when it was with another token than the one that registered it.

        The agent tells the servers of changes by the token of the registration. Once that is deleted they never hear of
        the check again, nor of a deregistration.

        Raises:
            AgentError: the agent does not know the check, or did not take the report.
        """
        verb = "pass" if verdict.healthy else "fail"
        token = await self._put(f"/v1/agent/check/{verb}/{check}", params=[("note", verdict.detail)])
        return token == self._registered_with

    async def deregister(self, service_id: str) -> None:
        """Deregisters; an id that the agent does not know is none of our business any more.

        Raises:
            AgentError: it may still be registered.
        """
        await self._put(f"/v1/agent/service/deregister/{service_id}", unknown_is_fine=True)

    def close(self) -> None:
        """Lets the thread end once its last call has."""
        self._thread.shutdown(wait=False)
        self._http.session.close()

    async def _put(
        self,
        path: str,
        *,
        params: list[tuple[str, str]] | None = None,
        data: str = "",
        unknown_is_fine: bool = False,
    ) -> str:
        """Asks the agent, and returns the token that it was asked with."""

        def put() -> tuple[str, base.Response]:
            token = self._token()
            headers = {"X-Consul-Token": token} if token else {}
            return token, self._http.put(_answer, path, params=params, data=data, headers=headers)

        try:
            token, answer = await asyncio.get_running_loop().run_in_executor(self._thread, put)
        except (requests.RequestException, OSError) as error:
            raise AgentError(f"{type(error).__name__}: {error}") from error
        except ConfigError as error:
            raise AgentError(str(error)) from error
        if answer.code == 200 or (unknown_is_fine and _says_unknown(answer)):
            return token
        raise AgentError(f"{answer.code} {answer.body.strip()[:200]}", refused=answer.code in (400, 401, 403))


def environment_token() -> str:
    """The ACL token of ``CONSUL_HTTP_TOKEN``, else that in the file ``CONSUL_HTTP_TOKEN_FILE``: as Consul's own tools.

    Raises:
        ConfigError: others can read the file.
        OSError: it cannot be read.
    """
    token = os.environ.get("CONSUL_HTTP_TOKEN", "")
    file = os.environ.get("CONSUL_HTTP_TOKEN_FILE")
    if token or not file:
        return token
    return read_secret_file(Path(file), "CONSUL_HTTP_TOKEN_FILE").decode("ascii", "replace").strip()


def _answer(response: base.Response) -> base.Response:
    return response


def _says_unknown(answer: base.Response) -> bool:
    return answer.code == 404 or (answer.code == 500 and "nknown service" in answer.body)


class ConsulRegistrar:
    """Keeps an endpoint registered with a Consul agent, with a TTL check that real self-checks feed.

    An agent that has forgotten the registration, because it restarted, refuses the next report; that registers anew.

    Args:
        service: the service.
        endpoint: the endpoint.
        agent: the Consul agent's address.
        interval: seconds between reports; one report lasts three times as long and a second.
        rng: draws waits between attempts.
    """

    lease_token = ""

    def __init__(self, service: str, endpoint: Endpoint, agent: HostPort, interval: float, rng: Random) -> None:
        self._service = service
        self._endpoint = endpoint
        self._lifetime = 3 * interval + 1.0
        self._registration = secrets.token_hex(8)
        self._agent = ConsulAgent(agent, environment_token)
        self._machine = Registration([str(agent)], rng, time.monotonic())
        self._changes = Changes()
        self._verdict: Verdict | None = None
        self._reported = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def status(self) -> RegistrationStatus:
        """Where the registration stands."""
        return self._machine.status()

    async def changed(self) -> None:
        """Returns at the next change of the status."""
        await self._changes.wait()

    def start(self) -> None:
        """Begins to register, in the background of the running event loop."""
        self._task = asyncio.create_task(self._run(), name=f"Consul registration of {self._endpoint.id}")

    def report(self, verdict: Verdict) -> None:
        """Passes on what a self-check found; without such reports the check turns critical by itself."""
        self._verdict = verdict
        self._reported.set()

    async def announce_drain(self) -> None:
        """Marks the registration as draining, for control planes that `drain_everywhere` cannot reach."""
        was_registered = self._machine.state is RegistrationState.REGISTERED
        self._leave()
        await end_tasks(self._task)
        if was_registered:
            try:
                await self._agent.register(self._definition(draining=True))
            except AgentError as error:
                logger.warning("marking %s/%s as draining: %s", self._service, self._endpoint.id, error)

    async def deregister(self) -> None:
        """Deregisters from the agent, whatever is known of the registration."""
        self._leave()
        await end_tasks(self._task)
        try:
            await self._agent.deregister(self._endpoint.id)
        except AgentError as error:
            logger.warning(
                "deregistration of %s/%s: %s; Consul removes it when its check has been critical for %s",
                self._service,
                self._endpoint.id,
                error,
                DEREGISTER_AFTER,
            )
        else:
            self._machine.left(time.monotonic())
            self._changes.notify()
            logger.info("deregistered %s/%s from Consul", self._service, self._endpoint.id)
        self._agent.close()

    async def close(self) -> None:
        """Ends every background task at once; the check turns critical for want of reports."""
        self._leave()
        await end_tasks(self._task)
        self._agent.close()

    def _leave(self) -> None:
        self._machine.leave(time.monotonic())
        self._changes.notify()

    async def _run(self) -> None:
        while True:
            wait = self._machine.wait(time.monotonic())
            if wait > 0.0:
                await asyncio.sleep(wait)
                continue
            address = self._machine.attempt(time.monotonic())
            self._changes.notify()
            try:
                await self._agent.register(self._definition(draining=False))
                await self._pass_on_verdict()
                self._machine.confirmed(time.monotonic())
                self._changes.notify()
                logger.info("registered %s/%s with Consul at %s", self._service, self._endpoint.id, address)
                while True:
                    await self._reported.wait()
                    await self._pass_on_verdict()
            except AgentError as error:
                self._machine.failed(time.monotonic(), f"{address}: {error}", refused=error.refused)
                self._changes.notify()
                logger.warning(
                    "registration of %s/%s with Consul at %s: %s", self._service, self._endpoint.id, address, error
                )

    async def _pass_on_verdict(self) -> None:
        self._reported.clear()
        if self._verdict is None or await self._agent.report(check_id(self._endpoint), self._verdict):
            return
        await self._agent.register(self._definition(draining=False))
        logger.info("registered %s/%s with Consul again, with a new token", self._service, self._endpoint.id)

    def _definition(self, *, draining: bool) -> dict[str, object]:
        passing = self._verdict is not None and self._verdict.healthy
        return service_definition(
            self._service,
            self._endpoint,
            self._lifetime,
            passing=passing,
            draining=draining,
            registration=self._registration,
        )
