"""A real RabbitMQ as a plain process: on the loopback address, with ports, data and users of its own.

Nothing of it is left when its processes are killed: epmd, which RabbitMQ would leave running, is one of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh_client.core.errors import ConfigError

ROOT_VARIABLE = "MESH_RABBITMQ_ROOT"

READY = re.compile(r"completed with \d+ plugins")
"""RabbitMQ says this once it takes connections."""

SERVER = "usr/lib/rabbitmq/bin/rabbitmq-server"
_ERLANG = "usr/lib/erlang/bin"


@dataclass(frozen=True, slots=True)
class BrokerPorts:
    """Ports of the loopback address that are this broker's."""

    amqp: int
    distribution: int
    epmd: int


@dataclass(frozen=True, slots=True)
class Command:
    """A program to start."""

    command: list[str]
    environment: dict[str, str]


def find_rabbitmq(root: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """A directory that is laid out as Debian's ``/`` and has RabbitMQ in it.

    It is MESH_RABBITMQ_ROOT, else what ``make`` fetched below ``root``, else ``/``.

    Raises:
        ConfigError: there is none.
    """
    named = environment.get(ROOT_VARIABLE)
    places = [Path(named)] if named else [root / ".tools" / "rabbitmq", Path("/")]
    for place in places:
        if os.access(place / SERVER, os.X_OK) and os.access(place / _ERLANG / "erl", os.X_OK):
            return place
    raise ConfigError(
        f"no RabbitMQ was found; `make setup` fetches one, or name the directory that has {SERVER} in {ROOT_VARIABLE}"
    )


def epmd_command(root: Path, ports: BrokerPorts, directory: Path) -> Command:
    """Erlang's port mapper, which must run before the broker and for as long."""
    return Command(
        [str(root / _ERLANG / "epmd"), "-port", str(ports.epmd), "-address", "127.0.0.1"], _environment(root, directory)
    )


def broker_command(
    root: Path,
    directory: Path,
    ports: BrokerPorts,
    definitions: Mapping[str, Any],
    *,
    tls: tuple[Path, Path, Path] | None = None,
    settings: Mapping[str, str] | None = None,
) -> Command:
    """The broker.

    Args:
        root: where it is installed, see `find_rabbitmq`.
        directory: of this broker, for configuration, data and logs.
        ports: its own.
        definitions: users and what they may, see `mesh_client.events.definitions`; taken over when it has no data yet.
        tls: files with certificate, key and roots: it listens with TLS alone.
        settings: further lines of rabbitmq.conf.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "definitions.json").write_text(json.dumps(definitions))
    lines = {
        f"listeners.{'tcp' if tls is None else 'ssl'}.1": f"127.0.0.1:{ports.amqp}",
        "load_definitions": str(directory / "definitions.json"),
        "log.console": "true",
        "log.console.level": "info",
        "log.file": "false",
        "raft.wal_max_size_bytes": str(64 << 20),
        **(settings or {}),
    }
    if tls is not None:
        certificate, key, roots = tls
        lines |= {
            "listeners.tcp": "none",
            "ssl_options.certfile": str(certificate),
            "ssl_options.keyfile": str(key),
            "ssl_options.cacertfile": str(roots),
            "ssl_options.verify": "verify_none",
        }
    (directory / "rabbitmq.conf").write_text("".join(f"{name} = {value}\n" for name, value in lines.items()))
    environment = broker_environment(root, directory, ports) | {
        "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
    }
    return Command([str(root / SERVER)], environment)


def broker_environment(root: Path, directory: Path, ports: BrokerPorts) -> dict[str, str]:
    """Of a broker, whatever it is configured by: ports of its own, and what it writes below ``directory``."""
    return _environment(root, directory) | {
        "RABBITMQ_ALLOW_INPUT": "1",  # the script becomes the broker; otherwise it would start it and wait
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "RABBITMQ_NODENAME": "mesh@localhost",
        "RABBITMQ_DIST_PORT": str(ports.distribution),
        "ERL_EPMD_PORT": str(ports.epmd),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-noinput -kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_MNESIA_BASE": str(directory / "data"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_PID_FILE": str(directory / "pid"),
    }


def _environment(root: Path, directory: Path) -> dict[str, str]:
    path = f"{root / _ERLANG}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": str(directory), "LANG": "C.UTF-8"}
