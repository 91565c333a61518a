"""Elects one of several gateways by a lock in Consul. Needs the ``consul`` extra."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import requests
from consul import base, std

from gateway.election_state import Ask, Election, Question, Role
from mesh_client.addresses import HostPort
from mesh_client.consul_registration import environment_token
from mesh_client.core.errors import ConfigError, MeshError

log = logging.getLogger(__name__)

PREFIX = "mesh/edge-leaders/"
"""Of the keys that are locks, each followed by the edge's name."""
RULES = f'key_prefix "{PREFIX}" {{ policy = "write" }} session_prefix "" {{ policy = "write" }}'
"""What Consul's ACLs must allow."""
TTL = 10.0
ANSWER_TIMEOUT = 3.0
"""Seconds for the agent to answer."""
LOCK_DELAY = 1.0
"""Seconds after the end of a holder's session in which nobody gets the lock: what is pushed twice does no harm."""


class ConsulRefusedError(MeshError):
    """Consul cannot be asked, or does not do what it is asked."""


class ConsulElection:
    """One gateway's part in the election of those of its edge.

    Args:
        edge: the edge's name; one key of Consul's for each.
        node_id: of this gateway, for those who look at the key.
        agent: the Consul agent.
        on_change: called with the role, in the event loop, when it has changed.
        ttl: of the session, seconds; another gateway takes over between one and two times that after this one died.
        token: gives the ACL token, or an empty text; asked for each request, so that it can be replaced.
        clock: seconds, monotonic.

    Raises:
        InvalidValueError: the TTL is none that Consul allows.
    """

    def __init__(
        self,
        edge: str,
        node_id: str,
        agent: HostPort,
        on_change: Callable[[Role], None],
        *,
        ttl: float = TTL,
        token: Callable[[], str] = environment_token,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._key = f"/v1/kv/{PREFIX}{edge}"
        self._edge = edge
        self._node_id = node_id
        self._agent = agent
        self._on_change = on_change
        self._ttl = ttl
        self._token = token
        self._clock = clock
        self._http = std.HTTPClient(host=agent.host, port=agent.port, timeout=ANSWER_TIMEOUT)
        self._http.session.trust_env = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="consul-election")
        self._machine = Election(ttl, clock())
        self._trouble = ""
        self.role = Role.UNDECIDED
        """What this gateway is now."""

    @property
    def holder(self) -> str:
        """Node id of the gateway that holds the lock, as far as it is known."""
        return self._machine.holder

    async def run(self) -> None:
        """Takes part until it is cancelled, and then gives the lock back so that another gateway can go on at once."""
        try:
            while True:
                # What follows at once belongs together: between a session and its lock there is no role.
                while (question := self._machine.question(self._clock())) is not None:
                    await self._ask(question)
                self._look_at_role()
                deadline = self._machine.deadline()
                if deadline is not None:
                    await asyncio.sleep(max(0.0, deadline - self._clock()))
        finally:
            await asyncio.shield(self._leave())

    async def _leave(self) -> None:
        session = self._machine.session
        try:
            if session:
                await self._call("PUT", f"/v1/session/destroy/{session}")
        except ConsulRefusedError as error:
            log.warning("the lock of edge %s is free within %.0f s: %s", self._edge, 2 * self._ttl, error)
        self._thread.shutdown(wait=False)
        self._http.session.close()

    def _look_at_role(self) -> None:
        machine, now = self._machine, self._clock()
        if machine.trouble != self._trouble:
            self._trouble = machine.trouble
            if machine.trouble:
                log.warning("election of edge %s: %s", self._edge, machine.trouble)
        role = machine.role(now)
        if role is self.role:
            return
        self.role = role
        if role is Role.LEADER:
            log.info("this gateway leads edge %s now", self._edge)
        elif role is Role.STANDBY:
            log.info("edge %s is led by %s; standing by", self._edge, machine.holder or "nobody yet")
        else:
            log.warning(
                "election of edge %s: Consul has not answered for %.0f s; acting alone, as may others: %s",
                self._edge,
                self._ttl,
                machine.trouble,
            )
        self._on_change(role)

    async def _ask(self, question: Question) -> None:
        machine = self._machine
        try:
            if question.ask is Ask.CREATE:
                machine.created(await self._create())
            elif question.ask is Ask.RENEW:
                answer = await self._call("PUT", f"/v1/session/renew/{question.session}", unknown_is_fine=True)
                machine.renewed(alive=answer.code == 200)
            elif question.ask is Ask.LOOK:
                session, holder = _lock(await self._call("GET", self._key, unknown_is_fine=True))
                machine.looked(session, holder, self._clock())
            else:
                mine = json.dumps({"gateway": self._node_id})
                answer = await self._call("PUT", self._key, {"acquire": question.session}, mine)
                machine.acquired(self._clock(), taken=answer.body.strip() == "true")
        except ConsulRefusedError as error:
            machine.failed(str(error), self._clock())

    async def _create(self) -> str:
        # What dies with the agent's node is given up at once; otherwise the session's end would be waited for.
        session = {
            "Name": f"mesh edge {self._edge}: {self._node_id}",
            "TTL": f"{self._ttl:g}s",
            "Behavior": "delete",
            "LockDelay": f"{LOCK_DELAY:g}s",
        }
        answer = await self._call("PUT", "/v1/session/create", data=json.dumps(session))
        try:
            return str(json.loads(answer.body)["ID"])
        except (ValueError, KeyError, TypeError):
            raise ConsulRefusedError(f"Consul at {self._agent} answered {answer.body[:100]!r} to a session") from None

    async def _call(
        self,
        method: str,
        path: str,
        parameters: dict[str, str] | None = None,
        data: str = "",
        *,
        unknown_is_fine: bool = False,
    ) -> base.Response:
        def call() -> base.Response:
            token = self._token()
            headers = {"X-Consul-Token": token} if token else {}
            params = list((parameters or {}).items())
            if method == "GET":
                return self._http.get(_answer, path, params=params, headers=headers)
            return self._http.put(_answer, path, params=params, data=data, headers=headers)

        try:
            answer = await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except (requests.RequestException, OSError) as error:
            raise ConsulRefusedError(f"Consul at {self._agent} cannot be asked: {type(error).__name__}") from error
        except ConfigError as error:
            raise ConsulRefusedError(str(error)) from error
        if answer.code == 200 or (unknown_is_fine and answer.code == 404):
            return answer
        rights = f"; the token needs {RULES}" if answer.code in (401, 403) else ""
        raise ConsulRefusedError(
            f"Consul at {self._agent} answered {answer.code} {answer.body.strip()[:200]!r}{rights}"
        )


def _answer(response: base.Response) -> base.Response:
    return response


def _lock(answer: base.Response) -> tuple[str, str]:
    """The session that holds the lock, and whose that is; empty without one."""
    if answer.code == 404:
        return "", ""
    try:
        (entry,) = json.loads(answer.body)
        session, value = str(entry.get("Session") or ""), entry.get("Value") or ""
    except (ValueError, AttributeError, TypeError):
        raise ConsulRefusedError(f"Consul answered {answer.body[:100]!r} to a key") from None
    try:
        holder = json.loads(base64.b64decode(value))["gateway"]
        return session, holder if isinstance(holder, str) and holder.isprintable() else session
    except (ValueError, KeyError, TypeError, binascii.Error):
        return session, session
