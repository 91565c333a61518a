"""What goes wrong with identities."""

from __future__ import annotations

from mesh_client.core.errors import MeshError


class InvalidTokenError(MeshError):
    """An attestation does not hold. The message is for the log of the control plane: callers are not told why."""


class WrongServiceError(MeshError):
    """An attestation holds, but for another service."""


class AttestationUnavailableError(MeshError):
    """Whoever knows whether an attestation holds cannot be asked now."""


class NotRenewableError(MeshError):
    """The certificate of the connection cannot be renewed."""


class RevokedError(MeshError):
    """The workload has been revoked."""


class IssuerNotValidError(MeshError):
    """Nothing can be signed now: the issuing certificate has ended, or has not begun."""


class RotationRefusedError(MeshError):
    """A step is not taken; nothing has changed. The message names the workloads that it would cut off."""


class TooManyTokensError(MeshError):
    """There are too many join tokens."""


class StoreUnavailableError(MeshError):
    """The file of join tokens and workloads cannot be used now, such as for a full disk."""
