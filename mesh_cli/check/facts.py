"""What checks decide on, as gathered at one moment. Pure values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh.v1 import admin_pb2, authority_pb2, operations_pb2

PRIVATE = 0o077
"""Mode bits of others that a secret must not have."""
WRITABLE = 0o022
"""Mode bits by which others could change a file."""


@dataclass(frozen=True, slots=True)
class FileFact:
    """One file or directory.

    Attributes:
        path: where.
        purpose: what it is, in words.
        forbidden: mode bits that it must not have.
        exists: whether it is there.
        required: whether it has to be.
        mode: its permission bits.
        owner: its owner's user id.
        problem: why nothing is known of it; empty when it is.
    """

    path: str
    purpose: str
    forbidden: int
    exists: bool = True
    required: bool = False
    mode: int = 0o600
    owner: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class PortFact:
    """An address that a control plane would listen on.

    Attributes:
        address: ``host:port``.
        problem: why not; empty when it can be.
    """

    address: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """This host, and this process on it.

    Attributes:
        environment: variables, secrets blanked.
        files: those that hold secrets, or are trusted.
        user: id of the user.
        python: version.
        packages: versions of what grpc-mesh needs; None for one that is missing.
        bounds: what it needs of them, as ``grpcio`` to ``>=1.85.1``.
        version: of grpc-mesh.
        open_files: soft limit; 0 for none.
        open_files_hard: hard limit; 0 for none.
        ports: that a control plane would listen on.
        free_bytes: where the data directory is, or would be; None if it cannot be told.
        unresolved: names of control planes that have no address, with the reason.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    files: tuple[FileFact, ...] = ()
    user: int = 0
    python: str = ""
    packages: Mapping[str, str | None] = field(default_factory=dict)
    bounds: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    open_files: int = 0
    open_files_hard: int = 0
    ports: tuple[PortFact, ...] = ()
    free_bytes: int | None = None
    unresolved: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OperatorFacts:
    """Who runs the command.

    Attributes:
        insecure: in plaintext, as asked.
        problem: why there are no credentials; empty when there are.
        name: whose they are.
        expires: when they end, seconds since the epoch.
        life: how long they last in all, seconds.
    """

    insecure: bool = False
    problem: str = ""
    name: str = ""
    expires: float = 0.0
    life: float = 0.0


@dataclass(frozen=True, slots=True)
class PlaneFacts:
    """One control plane, as far as it answered.

    Attributes:
        address: ``host:port``.
        problem: why it did not answer; empty when it did.
        status: its state.
        later: its state a moment later, where somebody was behind.
        diagnosis: facts about it; None of a version that has none.
        authority: the certificate authority; None without identity.
        policies: as stored; None where they cannot be read.
        processes: that attend.
        asked: this host's clock before `diagnosis` was asked for, seconds since the epoch.
        answered: and after.
    """

    address: str
    problem: str = ""
    status: admin_pb2.GetStatusResponse = field(default_factory=admin_pb2.GetStatusResponse)
    later: admin_pb2.GetStatusResponse | None = None
    diagnosis: operations_pb2.GetDiagnosisResponse | None = None
    authority: authority_pb2.GetCertificateAuthorityResponse | None = None
    policies: tuple[admin_pb2.StoredPolicy, ...] | None = ()
    processes: tuple[operations_pb2.Process, ...] = ()
    asked: float = 0.0
    answered: float = 0.0


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything.

    Attributes:
        now: this host's clock, seconds since the epoch.
        host: this host.
        operator: who asks.
        planes: the control planes that were named.
    """

    now: float
    host: HostFacts
    operator: OperatorFacts
    planes: tuple[PlaneFacts, ...]

    @property
    def reached(self) -> tuple[PlaneFacts, ...]:
        """Those that answered."""
        return tuple(plane for plane in self.planes if not plane.problem)
