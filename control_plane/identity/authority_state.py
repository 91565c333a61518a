"""What every certificate authority has in force, be it the mesh's own or given as files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cryptography import x509

from control_plane.identity import ca
from control_plane.identity.rotation import Dependent


@dataclass(frozen=True, slots=True)
class AuthorityState:
    """What is in force.

    Attributes:
        trusted: roots, the oldest first.
        issuer: what signs leaves; its root is one of them.
    """

    trusted: tuple[x509.Certificate, ...]
    issuer: ca.Issuer = field(repr=False)

    @property
    def signing(self) -> str:
        """Fingerprint of the root that new certificates lead up to."""
        return ca.fingerprint(self.issuer.root)


class Authority(Protocol):
    """Where issuers and roots come from. Changes are stored before they take effect."""

    kind: str
    """Where certificates come from, in words."""
    remedy: str
    """What to do when the issuer comes to its end."""

    @property
    def state(self) -> AuthorityState:
        """What is in force."""

    def open(self, now: float, remembered: Sequence[x509.Certificate]) -> None:
        """Reads or makes everything.

        Args:
            now: seconds since the epoch.
            remembered: roots that were trusted when the control plane ended.

        Raises:
            ConfigError: files are broken, unsafe or missing.
        """

    def tick(self, now: float) -> None:
        """Does what time or changed files ask for, as far as it needs nobody's consent.

        Raises:
            MeshError: something could not be done; everything else goes on.
            OSError: a file could not be written.
        """

    @property
    def pending(self) -> bool:
        """Whether something waits for workloads, for `follow`."""

    def follow(self, dependents: Sequence[Dependent]) -> None:
        """Does what waits, as far as it cuts nobody off."""

    def add(self, now: float) -> None:
        """Trusts a next root.

        Raises:
            RotationRefusedError: there cannot be one now.
        """

    def overlap(self, now: float, dependents: Sequence[Dependent], *, force: bool) -> None:
        """Signs by the next root.

        Raises:
            RotationRefusedError: there is none, or workloads would be cut off.
        """

    def retire(self, dependents: Iterable[Dependent], *, force: bool) -> None:
        """Trusts no root any more that is not needed.

        Raises:
            RotationRefusedError: there is none, or workloads would be cut off.
        """
