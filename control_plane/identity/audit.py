"""The audit record: one line for each certificate that was issued, on a logger of its own."""

from __future__ import annotations

import datetime as dt
import logging

from control_plane.identity.ca import Leaf

_log = logging.getLogger("control_plane.identity.audit")


def record(what: str, leaf: Leaf, attested_by: str, peer: str) -> None:
    """Says who got which certificate. Nothing in it is secret, nothing is text that a caller chose freely.

    Args:
        what: "issued" or "renewed".
        leaf: the certificate.
        attested_by: such as "join token ID".
        peer: address of the caller, as gRPC names it.
    """
    _log.info(
        "%s principal=%s workload=%s serial=%s expires=%s root=%s attested_by=%r peer=%s",
        what,
        leaf.principal.spiffe_id,
        leaf.workload_id,
        leaf.serial,
        dt.datetime.fromtimestamp(leaf.expires, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        leaf.root[:16],
        attested_by,
        peer,
    )
