"""The trust bundle: whom to trust, and whom not any more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """What workloads are told.

    Attributes:
        trust_domain: constant.
        roots: DER, the oldest first; at least one.
        signing_root: SHA-256 of the root that new certificates lead up to, lower-case hex.
        revoked: ids of revoked workloads whose certificates have not ended yet.
        version: hash of all the above.
    """

    trust_domain: str
    roots: tuple[bytes, ...]
    signing_root: str
    revoked: frozenset[str]
    version: str

    @classmethod
    def of(
        cls, trust_domain: str, roots: Iterable[bytes], signing_root: str, revoked: Iterable[str] = ()
    ) -> TrustBundle:
        """The bundle with its version."""
        ordered, gone = tuple(roots), frozenset(revoked)
        hashed = hashlib.sha256()
        for part in (trust_domain, signing_root, *map(_hex, ordered), "revoked", *sorted(gone)):
            hashed.update(f"{part}\n".encode())
        return cls(trust_domain, ordered, signing_root, gone, hashed.hexdigest()[:16])

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """SHA-256 of each root, lower-case hex."""
        return tuple(map(_hex, self.roots))


def _hex(root: bytes) -> str:
    return hashlib.sha256(root).hexdigest()
