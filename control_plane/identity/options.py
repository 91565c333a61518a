"""What an operator can set about identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesh_client.core.errors import ConfigError
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, check_trust_domain


@dataclass(frozen=True, slots=True)
class IdentityOptions:
    """Options of one certificate authority. Times are in seconds.

    Raises:
        ConfigError: an option is wrong; the message names it.
        InvalidValueError: the trust domain is wrong.
    """

    trust_domain: str = DEFAULT_TRUST_DOMAIN
    """Of the mesh; constant for its life."""
    data_dir: Path | None = None
    """Where keys, join tokens and workloads are kept. None: in memory, lost at the end."""
    leaf_lifetime: float = 86_400.0
    """How long certificates of workloads are good. 1 to 2592000 (30 days)."""
    ca_certificate: Path | None = None
    """PEM: an intermediate of an offline root, then the certificates between the two. None: an own root is made."""
    ca_key: Path | None = None
    """PEM: its key. 0600, or refused."""
    ca_roots: Path | None = None
    """PEM: the roots to trust."""
    consul: str = ""
    """``consul://host:port,...``: accepts Consul's ACL tokens as attestation. Empty: does not."""
    enrolments_per_second: float = 100.0
    """First certificates for each address that asks, on average; five times as many at once. Above 0."""
    renewals_per_second: float = 1.0
    """Renewals for each workload, on average; ten times as many at once. Above 0."""

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        if not 1.0 <= self.leaf_lifetime <= 30 * 86_400.0:
            raise ConfigError(f"leaf_lifetime: {self.leaf_lifetime} is not allowed; expected 1 to 2592000 s")
        given = [self.ca_certificate is not None, self.ca_key is not None, self.ca_roots is not None]
        if any(given) and not all(given):
            raise ConfigError("ca_certificate, ca_key and ca_roots: give all three or none")
        for name, rate in (
            ("enrolments_per_second", self.enrolments_per_second),
            ("renewals_per_second", self.renewals_per_second),
        ):
            if not rate > 0.0:
                raise ConfigError(f"{name}: {rate} is not allowed; expected more than 0")
        if self.consul:
            # Brings in the HTTP client, which others do without.
            from control_plane.sources.consul_http import parse_registry

            parse_registry(self.consul)
