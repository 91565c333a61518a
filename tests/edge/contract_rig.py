"""The contract's services behind a real Envoy."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.descriptors import Api, read
from gateway.envoy import EnvoyConfiguration, EnvoyRenderer
from gateway.envoy_settings import DownstreamTls, UpstreamTls
from gateway.openapi import render as render_openapi
from gateway.routes import RouteTable, build
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.model import Endpoint
from tests.edge import contract
from tests.edge.contract_server import FILE, PROTOS
from tests.edge.envoy_process import EnvoyProcess, short_directory
from tests.edge.http_client import Response, ask
from tests.gateway.compiling import ROOT, compile_files


@functools.cache
def contract_api() -> Api:
    """The API of tests/edge/protos."""
    return read([compile_files(PROTOS, FILE)])


@contextlib.contextmanager
def contract_server(host: str = "127.0.0.1", **files: str) -> Iterator[int]:
    """The port of a server of the contract's services, in a process of its own.

    Args:
        host: where it listens.
        files: paths of its certificate, key and roots, for mTLS.
    """
    command = [sys.executable, "-m", "tests.edge.contract_server", json.dumps({"host": host, **files})]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(30)


@dataclass(frozen=True)
class ContractRig:
    """An Envoy with the contract's policy."""

    envoy: EnvoyProcess
    endpoint: Endpoint
    policy: EdgePolicy

    @property
    def address(self) -> tuple[str, int]:
        """Where the edge listens."""
        return "127.0.0.1", self.envoy.port

    @property
    def table(self) -> RouteTable:
        """The routes of what is exposed."""
        return build(contract_api(), self.policy.services)

    def ask(
        self, path: str, headers: Mapping[str, str] | None = None, *, verb: str = "GET", body: str | bytes | None = None
    ) -> Response:
        """One request on a connection of its own."""
        return ask(self.address, verb, path, headers, body)

    def render(
        self, *endpoints: Endpoint, keys: Mapping[str, str] = contract.KEYS, **changes: object
    ) -> EnvoyConfiguration:
        """The files of this Envoy.

        Args:
            endpoints: of the contract's service, in place of the server of the rig.
            keys: values of API keys.
            changes: of the policy.
        """
        policy = EdgePolicy.parse({**contract.policy(), **changes})
        table = build(contract_api(), policy.services)
        document = json.dumps(render_openapi(table, title="Contract", version="1", policy=policy))
        found: Mapping[str, Sequence[Endpoint]] = {"contract": endpoints or [self.endpoint], "gone": []}
        return EnvoyRenderer(table, policy, self.envoy.settings, api_keys=keys, openapi=document).render(found)


def local(port: int, name: str = "one", host: str = "127.0.0.1") -> Endpoint:
    """An endpoint on this host."""
    return Endpoint(name, host, port)


@contextlib.contextmanager
def running_envoy(
    port: int,
    *,
    upstream_tls: UpstreamTls | None = None,
    downstream_tls: DownstreamTls | None = None,
    **changes: Any,
) -> Iterator[ContractRig]:
    """An Envoy before a server on this port, with a changed policy if wished."""
    with short_directory() as directory:
        envoy = EnvoyProcess(directory, upstream_tls=upstream_tls, downstream_tls=downstream_tls)
        rig = ContractRig(envoy, local(port), EdgePolicy.parse(contract.policy()))
        try:
            envoy.start(rig.render(**changes))
            yield rig
        finally:
            envoy.stop()


@contextlib.contextmanager
def contract_rig(**options: Any) -> Iterator[ContractRig]:
    """Starts both."""
    with contract_server() as port, running_envoy(port, **options) as rig:
        yield rig
