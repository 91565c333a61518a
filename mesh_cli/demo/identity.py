"""Who is who in the demo: an operator that it makes for itself, and join tokens for the services."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from mesh.v1 import authority_pb2 as pb
from mesh.v1 import operations_pb2

from mesh_cli.client import AdminClient
from mesh_cli.credentials import OperatorCredentials

Result = TypeVar("Result")

OPERATOR = "demo"

_TOKEN_TTL = 24 * 3_600
_TOKEN_USES = 1_000
_TIMEOUT = 10.0


class Identities:
    """An operator's view of the certificate authority, as the `mesh` command has it.

    Args:
        directory: for the operator's credentials and the join tokens.
    """

    def __init__(self, directory: Path) -> None:
        self.operator = directory / "operator"
        """The operator's credentials, for ``MESH_OPERATOR``."""
        self._tokens = directory / "tokens"
        self._services: tuple[str, ...] = ()
        self.address = ""
        """The control plane's."""

    async def set_up(self, data_dir: Path, address: str, services: Iterable[str]) -> None:
        """Makes the operator from the files of a control plane's own CA, and a join token for each service.

        Raises:
            MeshError: something could not be made.
        """
        from control_plane.identity.operators import create_operator

        self.address = address
        self._services = tuple(services)
        await asyncio.to_thread(create_operator, data_dir, OPERATOR, self.operator, now=time.time())
        await self.make_tokens()

    async def make_tokens(self) -> None:
        """Makes the join tokens, in place of those before: they name the roots that were trusted then.

        Raises:
            MeshError: the control plane did not answer, or refused.
        """
        await asyncio.to_thread(self._write_tokens)

    def token_file(self, service: str) -> Path:
        """The service's join token, for ``MESH_TOKEN_FILE``."""
        return self._tokens / f"{service}.token"

    def credentials(self) -> OperatorCredentials:
        """The operator's credentials as they are now: they follow a rotation."""
        return OperatorCredentials.load(self.operator)

    async def status(self) -> pb.GetCertificateAuthorityResponse:
        """The certificate authority.

        Raises:
            MeshError: the control plane did not answer, or refused.
        """
        return await self._ask(
            lambda client: client.call(client.authority.GetCertificateAuthority, pb.GetCertificateAuthorityRequest())
        )

    async def rotate(self, step: pb.RotationStep.ValueType) -> pb.GetCertificateAuthorityResponse:
        """One step of a rotation of the trust root.

        Raises:
            MeshError: the control plane did not answer, or refused.
        """
        request = pb.RotateTrustRootRequest(step=step)
        answer = await self._ask(lambda client: client.call(client.authority.RotateTrustRoot, request))
        return answer.authority

    async def dashboard_link(self) -> str:
        """A link that opens the dashboard as the operator, once.

        Raises:
            MeshError: the control plane did not answer, or refused.
        """
        request = operations_pb2.CreateDashboardLinkRequest()
        return await self._ask(lambda client: client.call(client.operations.CreateDashboardLink, request).url)

    async def _ask(self, ask: Callable[[AdminClient], Result]) -> Result:
        def work() -> Result:
            with self._client() as client:
                return ask(client)

        return await asyncio.to_thread(work)

    def _client(self) -> AdminClient:
        return AdminClient([self.address], _TIMEOUT, self.credentials())

    def _write_tokens(self) -> None:
        from control_plane.files import secret_directory, write_atomically

        secret_directory(self._tokens)
        with self._client() as client:
            for service in self._services:
                request = pb.CreateJoinTokenRequest(service=service, ttl=Duration(seconds=_TOKEN_TTL), uses=_TOKEN_USES)
                token = client.call(client.authority.CreateJoinToken, request).token
                write_atomically(self.token_file(service), f"{token}\n".encode("ascii"))
