"""Real Consul agents as child processes: one server, or three under ACLs with default deny.

    async with ConsulCluster.single(tmp_path) as consul:
        await consul.register("orders", "orders-1", port=8080)
        consul.agents[0].kill()
        await consul.agents[0].restart()

The agents listen on 127.0.0.1, on ports that are theirs over restarts, and die with the process that started them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import aiohttp

from tests.ports import hold_ports

REPOSITORY = Path(__file__).resolve().parents[2]
READY_TIMEOUT = 30.0
"""Seconds for agents to become ready; three servers take 1 to 3."""
MESH_TAG = "grpc-mesh"

_GUARD = REPOSITORY / "gateway" / "guard.py"
"""Has the agent die with this process. A ``preexec_fn`` would run in a copy of a process with gRPC's threads."""


def consul_binary() -> Path:
    """The Consul that tests run: ``MESH_CONSUL_BINARY``, else ``.tools/consul/consul``.

    Raises:
        AssertionError: there is none.
    """
    named = os.environ.get("MESH_CONSUL_BINARY")
    path = Path(named) if named else REPOSITORY / ".tools" / "consul" / "consul"
    assert shutil.which(path) is not None, (
        f"there is no Consul at {path}: run make test, which fetches one, or name one in MESH_CONSUL_BINARY"
    )
    return path


class ConsulError(Exception):
    """Consul answered a test's own request with an error."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status} {body}")
        self.status = status


class ConsulAgent:
    """One agent.

    Args:
        name: of the node.
        directory: for its state, its configuration and its log.
        configuration: beyond ports and state.
        dev: keeps its state in memory alone.
    """

    def __init__(self, name: str, directory: Path, configuration: Mapping[str, Any], *, dev: bool = False) -> None:
        self.name = name
        self.directory = directory
        self.configuration = dict(configuration)
        self.dev = dev
        self._held = contextlib.ExitStack()
        self.http_port, self.server_port, self.serf_port = hold_ports(self._held, 3)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """``host:port`` of its HTTP API."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def data(self) -> Path:
        """Where it keeps its state."""
        return self.directory / "data"

    def start(self) -> None:
        """Starts the process; it is not ready yet."""
        assert self.process is None, f"{self.name} runs already"
        self.data.mkdir(parents=True, exist_ok=True)
        file = self.directory / "consul.json"
        file.write_text(json.dumps(self._whole_configuration(), indent=1))
        command = [str(consul_binary()), "agent", "-config-file", str(file), *(["-dev"] if self.dev else [])]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", _GUARD, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ.get("PATH", ""), "HOME": str(self.directory)},
            )

    def runs(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """Ends the process as a crash would: SIGKILL."""
        self._end(signal.SIGKILL)

    def terminate(self) -> None:
        """Ends the process as an operator would: SIGTERM."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Stops it where it is; connections stay open and nothing is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def forget(self) -> None:
        """Deletes its state: it begins anew, and its index at 1."""
        assert self.process is None, f"{self.name} still runs"
        shutil.rmtree(self.data)

    def give_back(self) -> None:
        """Gives its ports back; it must not be started again."""
        self._held.close()

    def log(self) -> str:
        """Its last words."""
        return (self.directory / "log").read_text(errors="replace")[-2000:]

    def _end(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(number)
            if number is signal.SIGKILL:
                process.wait()
                return
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _whole_configuration(self) -> dict[str, Any]:
        return {
            "node_name": self.name,
            "node_id": str(uuid.uuid5(uuid.NAMESPACE_DNS, self.name)),
            "server": True,
            "bind_addr": "127.0.0.1",
            "client_addr": "127.0.0.1",
            "data_dir": "" if self.dev else str(self.data),
            "disable_update_check": True,
            "leave_on_terminate": False,
            "log_level": "INFO",
            # Three times quicker to notice a dead leader than the default, which is for large networks.
            "performance": {"raft_multiplier": 1},
            "ports": {
                "http": self.http_port,
                "server": self.server_port,
                "serf_lan": self.serf_port,
                "serf_wan": -1,
                "dns": -1,
                "grpc": -1,
            },
            **self.configuration,
        }


class ConsulCluster:
    """Servers that know one another.

    Attributes:
        agents: the servers.
        management_token: may do everything; empty without ACLs.
    """

    def __init__(self, agents: Sequence[ConsulAgent], management_token: str = "") -> None:
        self.agents = list(agents)
        self.management_token = management_token
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def single(cls, directory: Path, **configuration: Any) -> Self:
        """One server that keeps its state over restarts."""
        return cls([ConsulAgent("consul-1", directory / "consul-1", {"bootstrap_expect": 1, **configuration})])

    @classmethod
    def dev(cls, directory: Path) -> Self:
        """One server that is ready at once, and forgets everything when it ends."""
        return cls([ConsulAgent("consul-1", directory / "consul-1", {}, dev=True)])

    @classmethod
    def three_with_acl(cls, directory: Path) -> Self:
        """Three servers, ACLs with default deny."""
        token = str(uuid.uuid4())
        acl = {
            "enabled": True,
            "default_policy": "deny",
            # Agents answer with what they cached of a token for this long, tests want changes to be seen.
            "token_ttl": "1s",
            "policy_ttl": "1s",
            "tokens": {"master": token, "agent": token},
        }
        names = ("consul-1", "consul-2", "consul-3")
        agents = [ConsulAgent(name, directory / name, {"bootstrap_expect": 3, "acl": acl}) for name in names]
        for agent in agents:
            agent.configuration["retry_join"] = [
                f"127.0.0.1:{other.serf_port}" for other in agents if other is not agent
            ]
            agent.configuration["retry_interval"] = "200ms"
        return cls(agents, token)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession()
        try:
            for agent in self.agents:
                agent.start()
            for agent in self.agents:
                await self.ready(agent)
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Ends every agent, for good."""
        for agent in self.agents:
            agent.kill()
            agent.give_back()
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def registry(self) -> str:
        """``consul://host:port,...`` of every agent, as the control plane takes it."""
        return "consul://" + ",".join(agent.address for agent in self.agents)

    async def ready(self, agent: ConsulAgent) -> None:
        """Returns when the agent answers reads with a leader behind it.

        Raises:
            AssertionError: it ended, or is not ready in time; its log is in the message.
        """
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                while not await self._answers(agent):
                    assert agent.runs(), f"{agent.name} ended: {agent.log()}"
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{agent.name} is not ready after {READY_TIMEOUT} s: {agent.log()}") from None

    async def restart(self, agent: ConsulAgent) -> None:
        """Starts an agent that was ended, on its ports, and returns when it is ready."""
        agent.start()
        await self.ready(agent)

    async def leader(self) -> ConsulAgent:
        """The agent that leads.

        Raises:
            AssertionError: none does in time.
        """
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                while True:
                    for asked in self.agents:
                        with contextlib.suppress(aiohttp.ClientError, ConsulError):
                            address = await self.request("GET", "/v1/status/leader", agent=asked)
                            for agent in self.agents:
                                if address == f"127.0.0.1:{agent.server_port}" and agent.process is not None:
                                    return agent
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError("there is no leader") from None

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        agent: ConsulAgent | None = None,
        token: str | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> Any:
        """Asks an agent, the first by default, with the management token by default; the decoded answer.

        Raises:
            ConsulError: it answered with another status than 200.
            aiohttp.ClientError: it cannot be reached.
        """
        assert self._session is not None
        secret = self.management_token if token is None else token
        async with self._session.request(
            method,
            f"http://{(agent or self.agents[0]).address}{path}",
            json=body if not isinstance(body, bytes) else None,
            data=body if isinstance(body, bytes) else None,
            params=parameters,
            headers={"X-Consul-Token": secret} if secret else {},
            timeout=aiohttp.ClientTimeout(10),
        ) as response:
            text = await response.text()
            if response.status != 200:
                raise ConsulError(response.status, text)
            return json.loads(text) if text else None

    async def register(
        self,
        service: str,
        instance: str,
        *,
        port: int = 8080,
        tags: Sequence[str] = (MESH_TAG,),
        agent: ConsulAgent | None = None,
        ttl: str | None = None,
        status: str = "passing",
        **fields: Any,
    ) -> None:
        """Registers an instance with an agent; with ``ttl``, such as "10s", it has a TTL check in that status."""
        body: dict[str, Any] = {
            "Name": service,
            "ID": instance,
            "Address": "127.0.0.1",
            "Port": port,
            "Tags": list(tags),
            **fields,
        }
        if ttl is not None:
            body["Check"] = {"CheckID": f"{instance}-ttl", "TTL": ttl, "Status": status}
        await self.request("PUT", "/v1/agent/service/register", body, agent=agent)

    async def deregister(self, instance: str, *, agent: ConsulAgent | None = None) -> None:
        """Deregisters an instance with its agent."""
        await self.request("PUT", f"/v1/agent/service/deregister/{instance}", agent=agent)

    async def set_status(self, instance: str, status: str, *, agent: ConsulAgent | None = None) -> None:
        """Feeds the TTL check of an instance: passing, warning or critical."""
        await self.request(
            "PUT", f"/v1/agent/check/update/{instance}-ttl", {"Status": status, "Output": status}, agent=agent
        )

    async def put_key(self, key: str, value: bytes) -> None:
        """Writes a key, whatever stands there."""
        assert await self.request("PUT", f"/v1/kv/{key}", value) is True

    async def delete_key(self, key: str) -> None:
        """Deletes a key."""
        await self.request("DELETE", f"/v1/kv/{key}")

    async def make_token(self, rules: str) -> str:
        """A fresh token with these rules. Other agents than the first may not know it yet.

        Returns:
            Its secret.
        """
        name = f"rules-{uuid.uuid4()}"
        await self.request("PUT", "/v1/acl/policy", {"Name": name, "Rules": rules})
        created = await self.request("PUT", "/v1/acl/token", {"Policies": [{"Name": name}]})
        return str(created["SecretID"])

    async def delete_token(self, secret: str) -> None:
        """Deletes a token."""
        found = await self.request("GET", "/v1/acl/token/self", token=secret)
        await self.request("DELETE", f"/v1/acl/token/{found['AccessorID']}")

    async def _answers(self, agent: ConsulAgent) -> bool:
        try:
            # Consul's own service is in the catalog once a leader is at work and the token is known.
            services = await self.request("GET", "/v1/catalog/services", agent=agent)
            if self.management_token:
                # While the servers agree on it, ACLs are "in legacy mode".
                await self.request("GET", "/v1/acl/policies", agent=agent)
        except (aiohttp.ClientError, OSError, ConsulError):
            return False
        return "consul" in services
