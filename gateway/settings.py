"""What is local to one edge: where services run and how they are reached. What is exposed to whom is its policy's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from gateway.errors import SettingsError

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._~-]*$"
_REFERENCE = r"^\{vault://[^{}\s]+\}$"

Name = Annotated[str, StringConstraints(pattern=_NAME, max_length=128)]
Reference = Annotated[str, StringConstraints(pattern=_REFERENCE)]
"""A secret by reference, as in ``{vault://env/shop-certificate}``: configuration holds none itself."""

_TARGET = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):(\d{1,5})")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Target(_Model):
    """One endpoint."""

    address: str
    """``host:port``."""
    weight: int = Field(default=100, ge=0, le=65_535)

    @field_validator("address")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        match = _TARGET.fullmatch(value)
        if match is None or not 0 < int(match[1]) < 65_536:
            raise ValueError("expected host:port")
        return value


class ClientCertificate(_Model):
    """What the edge shows to services, each part by reference."""

    certificate: Reference
    key: Reference


class HeldCertificate(ClientCertificate):
    """The same as PEM, as a gateway holds it that tells Kong itself. Never read from a file of settings."""

    certificate: str
    key: str = Field(repr=False)


class Upstream(_Model):
    """A service of the mesh: where it runs, and how it is reached."""

    targets: tuple[Target, ...] = ()
    host_header: Name | None = None
    """Name in requests and in TLS: the DNS name in the servers' certificates. Needed for TLS."""
    client_certificate: ClientCertificate | None = None
    """With one, calls are over mTLS; without one, in plaintext."""

    @model_validator(mode="after")
    def _tls_has_a_name(self) -> Upstream:
        if self.client_certificate is not None and self.host_header is None:
            raise ValueError("client_certificate needs host_header, the name that the servers' certificates have")
        addresses = [target.address for target in self.targets]
        if len(set(addresses)) < len(addresses):
            raise ValueError("a target is there twice")
        return self


class KongSettings(_Model):
    """What a Kong is told besides the edge's policy."""

    upstreams: Mapping[Name, Upstream] = Field(default_factory=dict)
    """By the names that policies have for them, for rendering without a mesh."""
    vault: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*(/[A-Za-z0-9_-]+)*$")] = "env"
    """Where Kong finds API keys: the secret ``web-key`` of a policy is ``{vault://env/web-key}``."""
    prometheus: bool = False
    proto_directory: Annotated[str, StringConstraints(pattern=r"^/[A-Za-z0-9._/~-]*$")] = "/usr/local/kong/protos"
    """Where Kong finds the rendered protos."""


def parse_settings(document: object) -> KongSettings:
    """Checks a document, as YAML or JSON gives it.

    Raises:
        SettingsError: with the path and the trouble of everything that is wrong.
    """
    try:
        return KongSettings.model_validate_json(json.dumps(document, default=repr))
    except ValidationError as error:
        wrong = [
            ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, "))))
            for item in error.errors(include_url=False, include_input=False)
        ]
        raise SettingsError("; ".join(wrong)) from None
