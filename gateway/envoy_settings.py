"""What is local to one Envoy: where it listens, where its files are, and with which certificates it shows itself."""

from __future__ import annotations

import posixpath
import re
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, check_trust_domain
from mesh_client.core.policy_base import Model, at_fields

_ADDRESS = re.compile(r"(?P<host>[0-9.]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})")
_SOCKET = "unix:"


def _path(value: str) -> str:
    if not posixpath.isabs(value) or posixpath.normpath(value) != value:
        raise ValueError("expected an absolute path without . and .. and without a slash at its end")
    return value


def _tcp_address(value: str) -> str:
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match["port"]) > 65_535:
        raise ValueError("expected ip:port, an IPv6 address in brackets")
    return value


def _admin_address(value: str) -> str:
    return _SOCKET + _path(value.removeprefix(_SOCKET)) if value.startswith(_SOCKET) else _tcp_address(value)


def _trust_domain(value: str) -> str:
    try:
        return check_trust_domain(value)
    except InvalidValueError as error:
        raise ValueError(f"expected {error.expected}") from None


AbsolutePath = Annotated[str, AfterValidator(_path)]
ListenAddress = Annotated[str, AfterValidator(_tcp_address)]
AdminAddress = Annotated[str, AfterValidator(_admin_address)]


class _Pair(Model):
    """A certificate with its key: PEM files in one directory, which is watched for files that are renamed into it."""

    certificate: AbsolutePath
    key: AbsolutePath

    @model_validator(mode="after")
    def _in_one_directory(self) -> Self:
        if posixpath.dirname(self.certificate) != posixpath.dirname(self.key):
            raise at_fields(type(self), [(("key",), "expected the directory of the certificate, for both are watched")])
        return self

    @property
    def directory(self) -> str:
        """Where both are."""
        return posixpath.dirname(self.certificate)


class DownstreamTls(_Pair):
    """What the edge shows to those who call it."""


class UpstreamTls(_Pair):
    """What the edge shows to services, and whom it believes."""

    roots: AbsolutePath
    """PEM file with the roots of the mesh; its directory is watched too."""
    trust_domain: Annotated[str, AfterValidator(_trust_domain)] = DEFAULT_TRUST_DOMAIN
    """Servers must have the name ``<service>.<trust domain>``."""

    @property
    def roots_directory(self) -> str:
        """Where the roots are."""
        return posixpath.dirname(self.roots)


class EnvoySettings(Model):
    """What an Envoy is told besides the edge's policy."""

    directory: AbsolutePath
    """Where the rendered files are."""
    listen: ListenAddress = "127.0.0.1:8080"
    admin: AdminAddress = "127.0.0.1:9901"
    """Of Envoy's own interface, which can stop it: a loopback address, or ``unix:/path`` of a socket."""
    upstream_tls: UpstreamTls | None = None
    """With it, services are called over mTLS; without it, in plaintext."""
    downstream_tls: DownstreamTls | None = None
    """With it, the edge is called over TLS; without it, in plaintext."""
    trusted_hops: Annotated[int, Field(ge=0, le=100)] = 0
    """Proxies before this one whose entries in ``x-forwarded-for`` are believed."""
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 50_000
    """Of callers, at one time; further ones are refused."""


def split_address(address: str) -> tuple[str, int]:
    """Host, without brackets, and port of a checked ``ip:port``."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def socket_path(admin: str) -> str | None:
    """The path of a checked ``unix:/path``; None of any other address."""
    return admin.removeprefix(_SOCKET) if admin.startswith(_SOCKET) else None
