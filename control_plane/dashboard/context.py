"""Calls of the control plane's own servicers within its process, with the identity of whoever is signed in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, cast

import grpc
import grpc.aio

from mesh_client.core.errors import MeshError


class RefusedError(MeshError):
    """The servicer refused.

    Attributes:
        code: its status code.
        details: why.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class OwnContext:
    """What a servicer sees of a call that no connection brought: who calls, and from where.

    Args:
        certificate: of who is signed in, PEM; None without identity.
        peer: address of the browser, for the log.
    """

    def __init__(self, certificate: bytes | None, peer: str) -> None:
        self._certificate = certificate
        self._peer = peer

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What the handshake established over which the operator asked for the link."""
        return {} if self._certificate is None else {"x509_pem_cert": [self._certificate]}

    def peer(self) -> str:
        """Where the browser is."""
        return f"dashboard:{self._peer}"

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[object] = ()
    ) -> NoReturn:
        """Ends the call.

        Raises:
            RefusedError: always.
        """
        del trailing_metadata
        raise RefusedError(code, details)

    @property
    def for_servicer(self) -> grpc.aio.ServicerContext[Any, Any]:
        """The same, as servicers are annotated: they use what is here and nothing else of it."""
        return cast("grpc.aio.ServicerContext[Any, Any]", self)
