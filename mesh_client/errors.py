"""Errors that applications catch: gRPC's own types, with the mesh's explanation."""

from __future__ import annotations

import grpc
from grpc.aio import AioRpcError, Metadata

from mesh_client.core.errors import (
    AttemptDetail,
    ConfigError,
    FieldError,
    IdentityError,
    InvalidPolicyError,
    InvalidTransitionError,
    InvalidValueError,
    MeshError,
    MeshErrorDetail,
    Reason,
)
from mesh_client.core.model import StatusCode

__all__ = [
    "AttemptDetail",
    "ConfigError",
    "FieldError",
    "IdentityError",
    "InvalidPolicyError",
    "InvalidTransitionError",
    "InvalidValueError",
    "MeshError",
    "MeshErrorDetail",
    "MeshRpcError",
    "Reason",
]

GRPC_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
"""grpc's status codes by number."""


class MeshRpcError(AioRpcError, MeshError):
    """A call failed. Code, details and metadata are what gRPC's own error would carry.

    `details` is the server's message, untouched, when a server answered; otherwise, and always for UNAVAILABLE that no
    server sent, it is the explanation.

    Attributes:
        mesh: what was tried and why it ended so.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        initial_metadata: Metadata,
        trailing_metadata: Metadata,
        details: str | None,
        debug_error_string: str | None,
        mesh: MeshErrorDetail,
    ) -> None:
        super().__init__(code, initial_metadata, trailing_metadata, details, debug_error_string)
        self.mesh = mesh

    @classmethod
    def decided(cls, code: StatusCode, mesh: MeshErrorDetail) -> MeshRpcError:
        """The error of a call that the mesh ended itself."""
        return cls(GRPC_CODES[code], Metadata(), Metadata(), str(mesh), str(mesh), mesh)

    def __str__(self) -> str:
        details, explanation = self.details() or "", str(self.mesh)
        told = details if explanation in details else f"{details} [mesh: {explanation}]"
        return f"{self.code().name}: {told}"

    __repr__ = __str__

    def __reduce__(self) -> tuple[type[MeshRpcError], tuple[object, ...]]:
        return type(self), (
            self.code(),
            self.initial_metadata(),
            self.trailing_metadata(),
            self.details(),
            self.debug_error_string(),
            self.mesh,
        )
