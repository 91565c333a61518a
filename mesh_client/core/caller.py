"""Who is on the other side of a call: what a verified certificate says, read the same way everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.identity import Kind, Principal

_WORKLOAD_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody whose certificate was verified.

    Attributes:
        principal: who it is.
        workload_id: which workload of theirs, 16 hex digits; constant through renewals.
        name: as authorization rules name it: the service's name, ``operator:NAME`` or ``mesh:control-plane``.
        workload_name: `Principal.workload_name`, as in certificates.
    """

    principal: Principal
    workload_id: str
    name: str = field(init=False, repr=False, compare=False)
    workload_name: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Servers look at them several times a call.
        object.__setattr__(self, "name", self.principal.caller)
        object.__setattr__(self, "workload_name", self.principal.workload_name(self.workload_id).encode())

    @property
    def spiffe_id(self) -> str:
        """The SPIFFE ID."""
        return self.principal.spiffe_id

    @property
    def service(self) -> str | None:
        """The service that it is a workload of; None for others."""
        return self.principal.name if self.principal.kind is Kind.SERVICE else None

    @property
    def is_operator(self) -> bool:
        """Whether it is an operator."""
        return self.principal.kind is Kind.OPERATOR

    @property
    def is_control_plane(self) -> bool:
        """Whether it is a control plane."""
        return self.principal.kind is Kind.CONTROL_PLANE

    def __str__(self) -> str:
        return f"{self.principal.spiffe_id} (workload {self.workload_id})"


def caller_from(spiffe_ids: Iterable[bytes], common_names: Iterable[bytes]) -> Caller | None:
    """Who a certificate names; None when it names nobody of a mesh.

    Args:
        spiffe_ids: its SPIFFE IDs.
        common_names: of its subject.
    """
    ids, names = list(spiffe_ids), list(common_names)
    # Exactly one of each: with several, which of them was meant would be a guess.
    if len(ids) != 1 or len(names) != 1:
        return None
    try:
        principal, workload_id = Principal.parse(ids[0].decode("ascii")), names[0].decode("ascii")
    except (UnicodeDecodeError, InvalidValueError):
        return None
    return Caller(principal, workload_id) if _WORKLOAD_ID.fullmatch(workload_id) else None


class CallerCache:
    """Whom the certificates of authenticated connections name, read once for each: certificates are few.

    Args:
        read: whom a certificate names, PEM; None for nobody of a mesh.
        most: bound on what is remembered.
    """

    __slots__ = ("_known", "_most", "_read")

    def __init__(self, read: Callable[[bytes], Caller | None], most: int = 10_000) -> None:
        self._read = read
        self._most = most
        self._known: dict[bytes, Caller | None] = {}

    def caller(self, properties: Mapping[str, Iterable[bytes]]) -> Caller | None:
        """Who is on the other side, by what grpc's ``auth_context()`` says; None for nobody of a mesh.

        Of that the certificate alone counts: the names that grpc reads from it end at the first NUL byte, and of
        several common names it shows one.
        """
        shown = tuple(properties.get("x509_pem_cert", ()))
        if len(shown) != 1:
            return None
        certificate = shown[0]
        try:
            return self._known[certificate]
        except KeyError:
            pass
        if len(self._known) >= self._most:
            self._known.clear()
        found = self._known[certificate] = self._read(certificate)
        return found
