"""RabbitMQ with the configuration that deploy/ has: this machine's RabbitMQ, confined as a container is."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import ExitStack
from pathlib import Path

from mesh_cli.demo.rabbitmq import READY, SERVER, BrokerPorts, broker_environment, epmd_command, find_rabbitmq
from mesh_cli.demo.supervisor import Process, Supervisor
from tests.deploy.confinement import REPOSITORY, Box
from tests.deploy.consul import DEPLOY
from tests.integration.rabbitmq import READY_TIMEOUT
from tests.ports import hold_ports

# As the image's own, and bounded where it would take half a gigabyte.
_IMAGE = {"log.console": "true", "log.file": "false", "raft.wal_max_size_bytes": str(64 << 20)}


class DeployedBroker:
    """One broker, with what prepare.py has made in a box.

    Args:
        box: whose secrets and state it has.
        supervisor: owns the processes.
        stack: holds the ports of its parts.
        port: where it takes connections.
    """

    def __init__(self, box: Box, supervisor: Supervisor, stack: ExitStack, port: int) -> None:
        self._box = box
        self._supervisor = supervisor
        self._ports = BrokerPorts(port, *hold_ports(stack, 2))
        root = find_rabbitmq(REPOSITORY)
        self._root = Path(box.checkout) / root.relative_to(REPOSITORY) if root.is_relative_to(REPOSITORY) else root
        self._directory = Path(f"{box.state}/data/rabbitmq")
        self._process: Process | None = None
        self._epmd: Process | None = None
        mesh = (DEPLOY / "rabbitmq" / "90-mesh.conf").read_text()
        # Where nothing is mounted, and only on this host.
        mesh = mesh.replace("/run/secrets", f"{box.state}/secrets/rabbitmq")
        mesh = mesh.replace("= 5671", f"= 127.0.0.1:{port}")
        configuration = box.directory / "rabbitmq"
        (configuration / "conf.d").mkdir(parents=True)
        (configuration / "conf.d" / "90-mesh.conf").write_text(mesh)
        lines = "".join(f"{name} = {value}\n" for name, value in _IMAGE.items())
        (configuration / "rabbitmq.conf").write_text(lines)

    async def start(self) -> None:
        """Starts it on what it has kept; returns when it takes connections."""
        if self._epmd is None:
            epmd = epmd_command(self._root, self._ports, self._directory)
            self._epmd = await self._supervisor.start("epmd", self._box.command(*epmd.command), epmd.environment, READY)
        command = self._box.command(str(self._root / SERVER))
        self._process = await self._supervisor.start("rabbitmq", command, self._environment(), READY)
        await self._process.wait_ready(READY_TIMEOUT)

    async def stop(self) -> None:
        """Ends it as Docker does."""
        assert self._process is not None
        await self._process.stop(READY_TIMEOUT)

    async def control(self, *arguments: str) -> list[list[str]]:
        """Runs rabbitmqctl; the lines of its output, each as its columns."""
        program = (self._root / SERVER).with_name("rabbitmqctl")
        done = await asyncio.to_thread(
            subprocess.run,
            self._box.command(str(program), "--quiet", *arguments),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=READY_TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [line.split("\t") for line in done.stdout.splitlines()]

    def _environment(self) -> dict[str, str]:
        configuration = f"{self._box.state}/rabbitmq"
        return broker_environment(self._root, self._directory, self._ports) | {
            "RABBITMQ_CONFIG_FILE": f"{configuration}/rabbitmq.conf",
            "RABBITMQ_CONFIG_FILES": f"{configuration}/conf.d",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{self._box.checkout}/deploy/rabbitmq/enabled_plugins",
        }
