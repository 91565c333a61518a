"""A deployment as deploy/prepare.py and deploy/consul/bootstrap.py make it, and its containers as processes.

What a container runs, with which environment and mounts, is read from deploy/compose.yaml; it is confined as
`tests.deploy.confinement` says. Addresses alone are others: all of them are this host's.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mesh_cli.demo.supervisor import Process, Supervisor
from tests.deploy.confinement import Box
from tests.deploy.consul import DEPLOY, Cluster, running
from tests.ports import hold_ports

CONTAINERS: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
PLANE_READY = re.compile(r"mesh control-plane listening on (\S+)")
SERVES = re.compile(r"serves on (\S+:\d+)")
_ENTRYPOINTS = {"grpc-mesh/control-plane": ("-m", "mesh_cli"), "grpc-mesh/service": ("-m",)}
"""Of the images, as arguments of Python."""


@dataclass(frozen=True)
class Deployment:
    """One that is prepared, with Consul bootstrapped and running."""

    box: Box
    consul: Cluster
    first_output: str

    def bootstrap(self, *options: str) -> subprocess.CompletedProcess[str]:
        program = f"{self.box.checkout}/deploy/consul/bootstrap.py"
        # Isolated: it needs nothing but Python.
        return self.box.run("-I", program, *self.consul.options, "--secrets", f"{self.box.state}/secrets", *options)

    @property
    def secrets(self) -> Path:
        return self.box.directory / "secrets"

    def token(self, part: str) -> str:
        return (self.secrets / part / "consul.token").read_text().strip()

    def tokens(self) -> dict[str, str]:
        return {file.parent.name: file.read_text().strip() for file in self.secrets.glob("*/consul.token")}


@contextmanager
def deployed(directory: Path) -> Iterator[Deployment]:
    """A deployment after the README's steps `prepare`, `up consul-...` and `bootstrap`."""
    box = Box(directory / "box")
    prepare(box)
    with running(directory / "consul", box.directory / "secrets") as consul:
        deployment = Deployment(box, consul, "")
        done = deployment.bootstrap("--timeout", "30")
        assert done.returncode == 0, done.stderr
        yield Deployment(box, consul, done.stdout)


def prepare(box: Box, *options: str) -> str:
    """Runs prepare.py; what it says."""
    return box.output(f"{box.checkout}/deploy/prepare.py", *_state(box), *options)


def _state(box: Box) -> list[str]:
    return ["--secrets", f"{box.state}/secrets", "--data", f"{box.state}/data"]


class Containers:
    """Starts containers of compose.yaml, each as a process.

    Args:
        deployment: whose secrets and state they have.
        supervisor: owns the processes.
        stack: holds the ports that they listen on.

    Attributes:
        plane: where the control plane listens.
        enrolment: where it enrols; in a container that is the port after, here any other.
        broker_port: where RabbitMQ is looked for.
        jaeger_port: where services send spans.
    """

    def __init__(self, deployment: Deployment, supervisor: Supervisor, stack: ExitStack) -> None:
        self._box = deployment.box
        self._supervisor = supervisor
        self._stack = stack
        self.plane, self.enrolment = (f"127.0.0.1:{port}" for port in hold_ports(stack, 2))
        self.broker_port, self.jaeger_port = hold_ports(stack, 2)
        self._addresses = {
            "control-plane:7070": self.plane,
            "0.0.0.0:7070": self.plane,
            # The name in RabbitMQ's certificate that this host has too.
            "rabbitmq:5671": f"localhost:{self.broker_port}",
            "jaeger:4317": f"127.0.0.1:{self.jaeger_port}",
            **{f"{agent.name}:8500": agent.address for agent in deployment.consul.agents},
        }

    def environment(self, name: str, **variables: str) -> dict[str, str]:
        """A container's, with further variables or others in place of its own."""
        own = {key: self._here(name, value) for key, value in CONTAINERS[name].get("environment", {}).items()}
        return self._box.environment(MESH_ENROLMENT=self.enrolment, **{**own, **variables})

    async def start_control_plane(self) -> Process:
        """Starts it; returns when it is ready."""
        return await self._start("control-plane", PLANE_READY, "--enrol-listen", self.enrolment)

    async def start_service(self, name: str, **variables: str) -> Process:
        """Starts an instance of a service, with further variables or others; returns when it serves."""
        (port,) = hold_ports(self._stack, 1)
        return await self._start(name, SERVES, SHOP_ADDRESS=f"127.0.0.1:{port}", **variables)

    def run(self, name: str, *arguments: str) -> str:
        """What `docker compose run --rm NAME ...` says, of a container that is `mesh`; it must end with 0."""
        program, *options = CONTAINERS[name].get("entrypoint", ["mesh"])
        assert program == "mesh"
        command = [self._here(name, word) for word in (*options, *arguments)]
        return self._box.output("-m", "mesh_cli", *command, variables=self.environment(name))

    def mesh(self, *arguments: str) -> str:
        """What `docker compose run --rm mesh ...` says."""
        return self.run("mesh", *arguments)

    async def _start(self, name: str, ready: re.Pattern[str], *options: str, **variables: str) -> Process:
        container = CONTAINERS[name]
        command = [self._here(name, word) for word in container["command"]]
        python = self._box.python(*_ENTRYPOINTS[container["image"].partition(":")[0]], *command, *options)
        process = await self._supervisor.start(name, python, self.environment(name, **variables), ready)
        await process.wait_ready()
        return process

    def _here(self, name: str, text: str) -> str:
        """A container's text with its paths and addresses as processes on this host have them."""
        for target, place in self._mounts(name).items():
            text = re.sub(rf"(^|=){re.escape(target)}(?=/|$)", rf"\1{place}", text)
        for address, here in self._addresses.items():
            text = text.replace(address, here)
        return text

    def _mounts(self, name: str) -> Mapping[str, str]:
        found = {}
        for volume in CONTAINERS[name].get("volumes", ()):
            source = volume["source"].removeprefix("./")
            of_state = source.startswith(("secrets", "data"))
            found[volume["target"]] = f"{self._box.state if of_state else f'{self._box.checkout}/deploy'}/{source}"
        return found
