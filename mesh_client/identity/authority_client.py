"""Asks control planes for certificates, one after the other: joins by attestation, renews by the certificate held."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from random import Random

from mesh.v1 import certificate_pb2

from mesh_client.core.errors import ConfigError, IdentityError
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN
from mesh_client.core.renewal import in_words
from mesh_client.identity.certificates import TrustBundle, fingerprint
from mesh_client.identity.enrolment import BusyError, RefusedError, enrol, fetch_root, sign
from mesh_client.identity.settings import IdentitySettings
from mesh_client.transport import CONTROL_PLANE, Transport

log = logging.getLogger(__name__)

Answer = certificate_pb2.SignCertificateResponse


class EveryoneFailedError(IdentityError):
    """No control plane gave a certificate.

    Attributes:
        refused: whether each of them answered, and said no.
        delay: seconds that one of them asks to wait at least.
    """

    def __init__(self, errors: Sequence[IdentityError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.refused = all(isinstance(error, RefusedError) for error in errors)
        self.delay = max((error.delay for error in errors if isinstance(error, BusyError)), default=0.0)


class AuthorityClient:
    """Asks for certificates.

    Args:
        settings: where, and with what attestation.
        rng: draws which control plane is asked first.
    """

    def __init__(self, settings: IdentitySettings, rng: Random) -> None:
        self._settings = settings
        self._rng = rng

    @property
    def can_join(self) -> bool:
        """Whether there is an attestation."""
        return self._settings.token is not None or self._settings.consul_token is not None

    async def check_attestation(self) -> None:
        """Looks whether the attestation can be of use, without asking anybody.

        Raises:
            ConfigError: there is none, or it cannot.
        """
        settings = self._settings
        if settings.token is not None:
            settings.claims(await asyncio.to_thread(settings.token.read))
        elif settings.consul_token is not None:
            await asyncio.to_thread(settings.consul_token.read)
        else:
            raise ConfigError(
                f"identity_dir {settings.identity_dir} holds no identity that is still good, and there is no join "
                "token; give MESH_TOKEN_FILE or MESH_TOKEN, from `mesh token create`"
            )

    async def trust_domain(self) -> str:
        """Of the mesh to join.

        Raises:
            ConfigError: it depends on a join token, which cannot be read.
        """
        settings = self._settings
        if settings.trust_domain is not None:
            return settings.trust_domain
        if settings.token is not None:
            return settings.claims(await asyncio.to_thread(settings.token.read)).trust_domain
        return DEFAULT_TRUST_DOMAIN

    async def join(self, signing_request: bytes, trust_domain: str, bundle: TrustBundle | None) -> Answer:
        """A certificate by attestation.

        Args:
            signing_request: PKCS #10, DER.
            trust_domain: of the mesh.
            bundle: roots that were trusted before, or None.

        Raises:
            IdentityError: nobody gave one.
        """
        settings = self._settings
        known = (*settings.roots, *(bundle.roots if bundle else ()))
        pins = set(map(fingerprint, known))
        request = certificate_pb2.SignCertificateRequest(
            certificate_signing_request=signing_request, service=settings.service
        )
        expiry = ""
        try:
            if settings.token is not None:
                request.join_token = await asyncio.to_thread(settings.token.read)
                claims = settings.claims(request.join_token)
                pins |= claims.roots
                if (late := time.time() - claims.expires) >= 0:
                    expiry = f" (by this host's clock the join token expired {in_words(late)} ago)"
            elif settings.consul_token is not None:
                request.consul_token = await asyncio.to_thread(settings.consul_token.read)
            else:
                raise RefusedError("there is no join token to join again with; restart with a new one")
        except ConfigError as error:
            raise IdentityError(str(error)) from None

        async def ask(address: str) -> Answer:
            # Roots from a file are all that is believed; otherwise whichever of the pinned roots the port presents.
            roots = known if settings.roots else (await fetch_root(address, pins),)
            try:
                return await enrol(address, roots, trust_domain, request)
            except RefusedError as error:
                raise RefusedError(f"{error}{expiry}") from None

        return await self._ask_each(settings.enrolment, ask)

    async def renew(self, signing_request: bytes, transport: Transport) -> Answer:
        """A certificate by the one that the transport shows.

        Raises:
            IdentityError: nobody gave one.
        """
        request = certificate_pb2.SignCertificateRequest(
            certificate_signing_request=signing_request, service=self._settings.service
        )

        async def ask(address: str) -> Answer:
            async with transport.open_channel(address, CONTROL_PLANE) as channel:
                return await sign(channel, address, request)

        return await self._ask_each(self._settings.control_planes, ask)

    async def _ask_each(self, addresses: Sequence[str], ask: Callable[[str], Awaitable[Answer]]) -> Answer:
        errors: list[IdentityError] = []
        first = self._rng.randrange(len(addresses))
        for address in (*addresses[first:], *addresses[:first]):
            try:
                return await ask(address)
            except IdentityError as error:
                errors.append(error)
        raise EveryoneFailedError(errors)
