"""What is remembered of join tokens and workloads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A join token without what makes it one."""

    id: str
    service: str
    expires: int
    uses: int
    uses_left: int
    created_by: str


@dataclass(frozen=True, slots=True)
class WorkloadRecord:
    """A workload with its newest certificate.

    Attributes:
        id: constant through renewals.
        spiffe_id: whose.
        serial: of the certificate, lower-case hex.
        expires: when it ends, seconds since the epoch.
        root: fingerprint of the root that it leads up to.
        attested_by: how it was attested first, with the id of the token that did it.
        bundle_version: that the workload has confirmed; empty for none.
        trusted: fingerprints of the roots in it, or in the bundle that came with its first certificate.
        seen_root: fingerprint of the root of the certificate that it was seen with last; empty when it was not seen.
        revoked: whether it has been revoked.
        key: fingerprint of the public key in the certificate; empty where nobody noted it.
    """

    id: str
    spiffe_id: str
    serial: str
    expires: float
    root: str
    attested_by: str
    bundle_version: str = ""
    trusted: frozenset[str] = frozenset()
    seen_root: str = ""
    revoked: bool = False
    key: str = ""
