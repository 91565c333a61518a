"""The audit record: one line for each certificate that was issued, on a logger of its own."""

from __future__ import annotations

import datetime as dt
import logging

from cryptography import x509

from control_plane.identity import ca
from control_plane.identity.records import WorkloadRecord

LOCAL = "local"
"""In place of the caller's address, for what whoever has the files of the CA signed."""

_log = logging.getLogger("control_plane.identity.audit")


def record(what: str, leaf: ca.Leaf, attested_by: str, peer: str) -> None:
    """Says who got which certificate. Nothing in it is secret, nothing is text that a caller chose freely.

    Args:
        what: "issued" or "renewed".
        leaf: the certificate.
        attested_by: such as "join token ID".
        peer: address of the caller, as gRPC names it.
    """
    _write(
        what,
        f"principal={leaf.principal.spiffe_id} workload={leaf.workload_id}",
        leaf.serial,
        leaf.expires,
        leaf.root,
        attested_by,
        peer,
    )


def record_stored(workload: WorkloadRecord) -> None:
    """The same for a certificate that another process signed and left in the store: an operator's."""
    _write(
        "issued",
        f"principal={workload.spiffe_id} workload={workload.id}",
        workload.serial,
        workload.expires,
        workload.root,
        workload.attested_by,
        LOCAL,
    )


def record_authority(certificate: x509.Certificate, root: x509.Certificate) -> None:
    """The same for a certificate of the certificate authority itself: a root, or one that signs others."""
    _write(
        "issued",
        f"authority={certificate.subject.rfc4514_string()!r}",
        f"{certificate.serial_number:x}",
        ca.expires(certificate),
        ca.fingerprint(root),
        "itself" if certificate == root else "its root",
        LOCAL,
    )


def _write(what: str, whose: str, serial: str, expires: float, root: str, attested_by: str, peer: str) -> None:
    _log.info(
        "%s %s serial=%s expires=%s root=%s attested_by=%r peer=%s",
        what,
        whose,
        serial,
        dt.datetime.fromtimestamp(expires, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        root[:16],
        attested_by,
        peer,
    )
