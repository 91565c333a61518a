"""Who is who in the mesh: SPIFFE IDs, and the DNS names that stand beside them in certificates.

| who | SPIFFE ID | DNS name |
| --- | --- | --- |
| a service's workloads | ``spiffe://<trust-domain>/service/<name>`` | ``<name>.<trust-domain>`` |
| control planes | ``spiffe://<trust-domain>/mesh/control-plane`` | ``control-plane.mesh.<trust-domain>`` |
| operators | ``spiffe://<trust-domain>/operator/<name>`` | none: nobody connects to them |

A service's name is one DNS label, so no service can take the control plane's DNS name.

Source: SPIFFE-ID standard, https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Self

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import check_service_name

DEFAULT_TRUST_DOMAIN = "mesh.internal"

OPERATOR_PREFIX = "operator:"
"""What stands before an operator's name where callers are named."""

MAX_SPIFFE_ID = 2048
"""Bytes, as the standard has it."""

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_TRUST_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_OPERATOR = re.compile(_LABEL)
_CONTROL_PLANE_PATH = "/mesh/control-plane"


class Kind(enum.Enum):
    """What somebody is."""

    SERVICE = "service"
    CONTROL_PLANE = "control-plane"
    OPERATOR = "operator"


def check_trust_domain(name: str) -> str:
    """The name, if it can be a trust domain: a DNS name in lower case of at most 180 characters.

    The bound leaves room for a service's label and stays below the 253 characters of a DNS name.

    Raises:
        InvalidValueError: it cannot.
    """
    if len(name) > 180 or not _TRUST_DOMAIN.fullmatch(name):
        raise InvalidValueError("trust domain", name, "a DNS name in lower case, at most 180 characters")
    return name


def check_operator_name(name: str) -> str:
    """The name, if it can be an operator's: a DNS label.

    Raises:
        InvalidValueError: it cannot.
    """
    if not _OPERATOR.fullmatch(name):
        raise InvalidValueError("operator", name, "a DNS label: lower-case letters, digits and hyphens, at most 63")
    return name


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody with an identity.

    Attributes:
        trust_domain: such as ``mesh.internal``.
        kind: what they are.
        name: the service's or the operator's name; empty for control planes.
    """

    trust_domain: str
    kind: Kind
    name: str = ""

    @classmethod
    def service(cls, trust_domain: str, name: str) -> Self:
        """A service's workloads.

        Raises:
            InvalidValueError: a name is not allowed.
        """
        return cls(check_trust_domain(trust_domain), Kind.SERVICE, check_service_name(name))

    @classmethod
    def operator(cls, trust_domain: str, name: str) -> Self:
        """An operator.

        Raises:
            InvalidValueError: a name is not allowed.
        """
        return cls(check_trust_domain(trust_domain), Kind.OPERATOR, check_operator_name(name))

    @classmethod
    def control_plane(cls, trust_domain: str) -> Self:
        """The control planes.

        Raises:
            InvalidValueError: the name is not allowed.
        """
        return cls(check_trust_domain(trust_domain), Kind.CONTROL_PLANE)

    @classmethod
    def parse(cls, spiffe_id: str) -> Self:
        """Whoever a SPIFFE ID names. Nothing is normalised: what is not exactly as the mesh writes it is refused.

        Raises:
            InvalidValueError: it is no SPIFFE ID of a mesh.
        """
        scheme, separator, rest = spiffe_id.partition("://")
        domain, slash, path = rest.partition("/")
        if scheme != "spiffe" or not separator or not slash or len(spiffe_id) > MAX_SPIFFE_ID:
            raise InvalidValueError("SPIFFE ID", spiffe_id[:200], "spiffe://<trust-domain>/service/<name>")
        kind, _, name = path.partition("/")
        if kind == Kind.SERVICE.value:
            return cls.service(domain, name)
        if kind == Kind.OPERATOR.value:
            return cls.operator(domain, name)
        if f"/{path}" == _CONTROL_PLANE_PATH:
            return cls.control_plane(domain)
        raise InvalidValueError(
            "SPIFFE ID", spiffe_id[:200], "the path /service/<name>, /operator/<name> or /mesh/control-plane"
        )

    @property
    def spiffe_id(self) -> str:
        """The SPIFFE ID."""
        path = _CONTROL_PLANE_PATH if self.kind is Kind.CONTROL_PLANE else f"/{self.kind.value}/{self.name}"
        return f"spiffe://{self.trust_domain}{path}"

    @property
    def dns_name(self) -> str:
        """What those who connect verify; empty for operators."""
        if self.kind is Kind.SERVICE:
            return f"{self.name}.{self.trust_domain}"
        if self.kind is Kind.CONTROL_PLANE:
            return f"control-plane.mesh.{self.trust_domain}"
        return ""

    def workload_name(self, workload_id: str) -> str:
        """Another DNS name in the certificates of a service's workload, which says which one it is; empty for others.

        Nobody connects by it. What servers can tell by the names of a certificate they need not read it for.

        Args:
            workload_id: 16 hex digits.
        """
        return f"{workload_id}.workload.{self.trust_domain}" if self.kind is Kind.SERVICE else ""

    @property
    def caller(self) -> str:
        """As authorization rules name it: the service's name, ``operator:NAME`` or ``mesh:control-plane``.

        No service has a name with a colon, so the three cannot be mistaken for each other.
        """
        if self.kind is Kind.CONTROL_PLANE:
            return "mesh:control-plane"
        return self.name if self.kind is Kind.SERVICE else f"{OPERATOR_PREFIX}{self.name}"

    def __str__(self) -> str:
        return self.spiffe_id
