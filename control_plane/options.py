"""What an operator can set."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

from control_plane.addresses import split_address
from control_plane.catalog import CatalogSettings
from control_plane.dashboard.options import DashboardOptions
from control_plane.identity.options import IdentityOptions
from control_plane.traces.settings import TraceSettings
from mesh_client.core.errors import ConfigError

EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True)
class ControlPlaneOptions:
    """Options of one control plane. Times are in seconds.

    Raises:
        ConfigError: an option is wrong; the message names it.
    """

    address: str = "127.0.0.1:0"
    """Where to listen, ``host:port``; port 0 for any free one. An IPv6 address stands in brackets."""
    registry: str = EMBEDDED
    """``embedded``, or ``consul://host:port`` with more hosts after commas."""
    data_dir: Path | None = None
    """For the embedded registry, the last good policies and the certificate authority. None: in memory, lost at the
    end."""
    insecure: bool = False
    """Plaintext, and nobody proves who they are: everybody may everything."""
    enrolment_address: str | None = None
    """Where workloads get their first certificates, ``host:port``. None: the port after ``address``'s, or any free one
    when that is 0."""
    identity: IdentityOptions = field(default_factory=IdentityOptions)
    """The certificate authority. Its data directory is ``data_dir``, and its Consul the registry."""
    connection_age: float = 600.0
    """Connections end after this long, so that whoever is gone or revoked is gone; clients come back. At least 1."""
    connection_age_grace: float = 300.0
    """What RPCs that run then have to end. At least 1."""
    consul_token: str = field(default="", repr=False)
    """ACL token for Consul. Secret: never logged. Without it and a file: ``CONSUL_HTTP_TOKEN``, if set."""
    consul_token_file: Path | None = None
    """Where the token is read from instead, and again when Consul does not accept it any more."""
    metrics_address: str | None = None
    """Where Prometheus metrics are served, ``host:port``; port 0 for any free one. None: nowhere."""
    dashboard: DashboardOptions | None = None
    """Where the dashboard is. None: there is none."""
    max_streams: int = 10_000
    """Discovery streams at once; further ones are refused with RESOURCE_EXHAUSTED. 1 to 1000000."""
    debounce_quiet: float = 0.02
    """Changes are published after this long without another one."""
    debounce_maximum: float = 0.2
    """Changes are published after this long at the latest."""
    policy_wait: float = 30.0
    """Once the registry was read, policies must be within this time, or services get the defaults. Above 0."""
    catalog: CatalogSettings = field(default_factory=CatalogSettings)
    """Mass removal guard, and when services are forgotten."""
    traces: TraceSettings = field(default_factory=TraceSettings)
    """The embedded trace view."""
    broker: str = ""
    """Where events of the mesh are published, ``amqps://host:port/vhost``, more nodes after commas. Empty: nowhere."""
    broker_credentials: Path | None = None
    """File with the control plane's user and password there, one a line, mode 0600."""
    broker_roots: Path | None = None
    """PEM file of the roots that the broker's certificate is verified by. None: the system's."""
    control_plane_id: str = field(default_factory=lambda: f"control-plane-{uuid.uuid4().hex[:8]}")
    """Name of this process in responses and status."""

    def __post_init__(self) -> None:
        _, port = split_address(self.address)
        if self.metrics_address is not None:
            split_address(self.metrics_address, "metrics_address")
        if self.dashboard is not None:
            self.dashboard.check(insecure=self.insecure)
        if self.enrolment_address is not None:
            split_address(self.enrolment_address)
            if self.insecure:
                raise ConfigError("enrolment_address: without identity (insecure) nobody enrols; leave one of them out")
            if port and self.enrolment_address == self.address:
                raise ConfigError(f"enrolment_address: {self.enrolment_address!r} is where clients connect already")
        elif port == 65535 and not self.insecure:
            raise ConfigError("enrolment_address: there is no port after 65535; name one")
        for name, age in (
            ("connection_age", self.connection_age),
            ("connection_age_grace", self.connection_age_grace),
        ):
            if not 1.0 <= age <= 7 * 86_400.0:
                raise ConfigError(f"{name}: {age} is not allowed; expected 1 s to 7 days")
        if not 1 <= self.max_streams <= 1_000_000:
            raise ConfigError(f"max_streams: {self.max_streams} is not allowed; expected 1 to 1000000")
        if not 0.0 <= self.debounce_quiet <= self.debounce_maximum:
            raise ConfigError(
                f"debounce_quiet: {self.debounce_quiet} is not allowed; expected 0 to debounce_maximum "
                f"({self.debounce_maximum})"
            )
        if self.traces.otlp_address is not None:
            split_address(self.traces.otlp_address, "otlp_address")
        if self.broker:
            self._check_broker()
        if not self.policy_wait > 0.0:
            raise ConfigError(f"policy_wait: {self.policy_wait} is not allowed; expected more than 0 s")
        if self.registry != EMBEDDED:
            # Brings in the HTTP client, which the embedded registry does without.
            from control_plane.sources.consul_http import parse_registry

            parse_registry(self.registry)

    def _check_broker(self) -> None:
        if self.data_dir is None:
            raise ConfigError("broker: events wait in data_dir, so there must be one")
        try:
            # Brings in the AMQP client, which is an extra.
            from control_plane.broker import broker_of
        except ModuleNotFoundError as error:
            raise ConfigError(f"broker: {error.name} is not installed; install 'grpc-mesh[events]'") from None
        broker_of(self.broker, self.broker_credentials, self.broker_roots, insecure=self.insecure)

    @property
    def enrols_at(self) -> str:
        """Where workloads get their first certificates, ``host:port``."""
        if self.enrolment_address is not None:
            return self.enrolment_address
        host, _, port = self.address.rpartition(":")
        return f"{host}:{int(port) + 1 if int(port) else 0}"

    @property
    def identity_options(self) -> IdentityOptions:
        """Options of the certificate authority, in full."""
        consul = "" if self.registry == EMBEDDED else self.registry
        return replace(self.identity, data_dir=self.data_dir, consul=consul)
