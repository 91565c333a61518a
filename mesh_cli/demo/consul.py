"""A real Consul for the demo: one server in development mode, on ports that the system picks."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from mesh_cli.demo.supervisor import Process, ProcessError, Supervisor
from mesh_client.core.errors import ConfigError

BINARY_VARIABLE = "MESH_CONSUL_BINARY"

READY = re.compile(r"Synced node info")
"""Consul logs this once it has a leader and has registered itself."""

_PORTS = ("http", "server", "serf-lan", "serf-wan")
_ATTEMPTS = 3


def find_consul(root: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """The Consul binary: ``MESH_CONSUL_BINARY``, else the one that ``make`` fetched below ``root``, else on PATH.

    Raises:
        ConfigError: there is none.
    """
    if named := environment.get(BINARY_VARIABLE):
        if not os.access(named, os.X_OK):
            raise ConfigError(f"{BINARY_VARIABLE}: {named!r} is not a program that can be run")
        return Path(named)
    fetched = root / ".tools" / "consul" / "consul"
    if os.access(fetched, os.X_OK):
        return fetched
    if found := shutil.which("consul", path=environment.get("PATH")):
        return Path(found)
    raise ConfigError(f"no Consul binary was found; `make tools` fetches one, or name one with {BINARY_VARIABLE}")


async def start_consul(supervisor: Supervisor, binary: Path, environment: Mapping[str, str]) -> tuple[Process, str]:
    """A running Consul, and ``host:port`` of its HTTP API.

    Raises:
        ProcessError: it does not start.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        command = [
            str(binary),
            "agent",
            "-dev",
            "-ui",
            "-bind=127.0.0.1",
            "-client=127.0.0.1",
            "-node=demo",
            "-log-level=info",
            "-dns-port=-1",
            "-grpc-port=-1",
            *(f"-{name}-port={port}" for name, port in ports.items()),
        ]
        process = await supervisor.start("consul", command, environment, READY)
        try:
            await process.wait_ready()
        except ProcessError:
            # Somebody else may have taken a port between our asking and its binding.
            await process.kill()
            if attempt == _ATTEMPTS:
                raise
        else:
            return process, f"127.0.0.1:{ports['http']}"
    raise AssertionError("unreachable")


def free_ports(count: int) -> list[int]:
    """Ports that are free on the loopback address now, for TCP and UDP as far as the system tells; all different."""
    with ExitStack() as stack:
        ports = []
        for _ in range(count):
            taken = stack.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            ports.append(int(taken.getsockname()[1]))
    return ports
