"""The contract's services behind a real Envoy."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gateway.descriptors import Api, read
from gateway.envoy import EnvoyConfiguration, render
from gateway.openapi import render as render_openapi
from gateway.routes import RouteTable, build
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.model import Endpoint
from tests.edge import contract
from tests.edge.contract_server import FILE, PROTOS
from tests.edge.envoy_process import EnvoyProcess, short_directory
from tests.gateway.compiling import ROOT, compile_files


@functools.cache
def contract_api() -> Api:
    """The API of tests/edge/protos."""
    return read([compile_files(PROTOS, FILE)])


@contextlib.contextmanager
def contract_server(host: str = "127.0.0.1") -> Iterator[int]:
    """The port of a server of the contract's services, in a process of its own."""
    command = [sys.executable, "-m", "tests.edge.contract_server", host]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(10)


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

    def render(self, policy: EdgePolicy | None = None) -> EnvoyConfiguration:
        """The files of this Envoy, by the contract's policy or another one."""
        return rendered(policy or self.policy, self.endpoint, self.envoy)


def rendered(policy: EdgePolicy, endpoint: Endpoint, envoy: EnvoyProcess) -> EnvoyConfiguration:
    """The files of an Envoy before one server."""
    table = build(contract_api(), policy.services)
    endpoints: Mapping[str, list[Endpoint]] = {"contract": [endpoint], "gone": []}
    document = json.dumps(render_openapi(table, title="Contract", version="1", policy=policy))
    return render(table, policy, endpoints, envoy.settings, api_keys=contract.KEYS, openapi=document)


@contextlib.contextmanager
def contract_rig() -> Iterator[ContractRig]:
    """Starts both."""
    with contract_server() as port, short_directory() as directory:
        envoy = EnvoyProcess(directory)
        rig = ContractRig(envoy, Endpoint("one", "127.0.0.1", port), EdgePolicy.parse(contract.policy()))
        try:
            envoy.start(rig.render())
            yield rig
        finally:
            envoy.stop()
