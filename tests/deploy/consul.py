"""Three Consul servers with the configuration that deploy/ has, as processes of this machine's Consul."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.consul.bootstrap import Server
from deploy.prepare import CONSUL_SERVERS
from tests.integration.consul_cluster import ConsulAgent

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def configuration(secrets: Path) -> dict[str, Any]:
    """A server's configuration, by the names that Consul 1.8 has for what newer ones call otherwise."""
    found: dict[str, Any] = json.loads((DEPLOY / "consul" / "server.json").read_text())
    found.update(json.loads((secrets / "gossip.json").read_text()))
    tls = found.pop("tls")["internal_rpc"]
    tls["verify_incoming_rpc"] = tls.pop("verify_incoming")
    del found["ports"]["grpc_tls"]
    # What ConsulAgent says of every agent.
    del found["data_dir"], found["client_addr"]
    for name in ("ca_file", "cert_file", "key_file"):
        tls[name] = tls[name].replace("/run/secrets", str(secrets))
    # Consul caches tokens for 30 s; a test wants to see at once that one is gone.
    found["acl"] |= {"token_ttl": "1s", "policy_ttl": "1s"}
    return {**found, **tls}


class Cluster:
    """The servers.

    Attributes:
        agents: as processes.
        servers: as APIs.
    """

    def __init__(self, directory: Path, secrets: Path) -> None:
        self.agents = [ConsulAgent(name, directory / name, configuration(secrets / name)) for name in CONSUL_SERVERS]
        for agent in self.agents:
            agent.configuration["ports"] |= {
                "http": agent.http_port,
                "server": agent.server_port,
                "serf_lan": agent.serf_port,
            }
            agent.configuration["retry_join"] = [f"127.0.0.1:{each.serf_port}" for each in self.agents]
            agent.configuration["retry_interval"] = "200ms"
        self.servers = [Server(f"http://{agent.address}") for agent in self.agents]

    @property
    def options(self) -> list[str]:
        """As bootstrap.py takes them."""
        return [option for server in self.servers for option in ("--consul", server.url)]

    @property
    def registry(self) -> str:
        """As a control plane takes it."""
        return "consul://" + ",".join(agent.address for agent in self.agents)


@contextmanager
def running(directory: Path, secrets: Path) -> Iterator[Cluster]:
    """The servers, started and not waited for."""
    cluster = Cluster(directory, secrets)
    try:
        for agent in cluster.agents:
            agent.start()
        yield cluster
    finally:
        for agent in cluster.agents:
            agent.kill()
            agent.give_back()
