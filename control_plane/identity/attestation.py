"""Attestation by Consul: whoever has an ACL token whose service identity names a service is that service."""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Sequence

from control_plane.identity.errors import AttestationUnavailableError, InvalidTokenError, WrongServiceError
from control_plane.sources.blocking_query import Failure
from control_plane.sources.consul_http import ConsulAddress, ConsulError, ConsulReader, ConsulToken

MAX_QUESTIONS = 16
"""Tokens that are asked about at once; others wait."""
ATTEMPTS = 4
"""How often an agent is asked that does not know the token: followers learn of fresh ones within some 100 ms."""
RETRY_DELAY = 0.15
"""Seconds between them."""

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ANONYMOUS = "00000000-0000-0000-0000-000000000002"


class ConsulAttestation:
    """Asks Consul about tokens, with the tokens themselves: the control plane needs no rights for it.

    Args:
        addresses: Consul's agents.
        grace: seconds that an agent has to answer.
    """

    def __init__(self, addresses: Sequence[ConsulAddress], *, grace: float = 5.0) -> None:
        self._addresses = tuple(addresses)
        self._grace = grace
        self._places = asyncio.Semaphore(MAX_QUESTIONS)

    async def attest(self, secret: str, service: str) -> str:
        """How the token attests the service, in words without the token itself.

        Args:
            secret: the ACL token.
            service: that the caller means to be.

        Raises:
            InvalidTokenError: the token does not hold.
            WrongServiceError: it is another service's.
            AttestationUnavailableError: no agent can say.
        """
        if not _UUID.fullmatch(secret):
            raise InvalidTokenError("it is no Consul token")
        async with self._places:
            return f"consul token {check_self(await self._ask(secret), secret, service)}"

    async def _ask(self, secret: str) -> object:
        async with ConsulReader(self._addresses, ConsulToken(secret), grace=self._grace) as reader:
            unknown = unreachable = 0
            while True:
                try:
                    return (await reader.get("/v1/acl/token/self")).body
                except ConsulError as error:
                    if error.failure is Failure.FORBIDDEN:
                        unknown += 1
                        if unknown == ATTEMPTS:
                            raise InvalidTokenError("Consul does not know the token") from None
                        await asyncio.sleep(RETRY_DELAY)
                        continue
                    # The reader has gone over to the next agent where this one could not be reached.
                    unreachable += 1
                    if error.failure is not Failure.UNREACHABLE or unreachable == len(self._addresses):
                        raise AttestationUnavailableError(str(error)) from None


def check_self(answer: object, secret: str, service: str) -> str:
    """The accessor id of the token that Consul described, if it is the service's.

    Only service identities of the token itself count: what roles and policies allow says nothing about who somebody is.

    Args:
        answer: of ``/v1/acl/token/self``.
        secret: the token that was asked about.
        service: that it should name, exactly.

    Raises:
        InvalidTokenError: it is not a token with a service identity.
        WrongServiceError: its service identities name others.
    """
    fields = answer if isinstance(answer, dict) else {}
    accessor, found = fields.get("AccessorID"), fields.get("SecretID")
    if not isinstance(found, str) or not hmac.compare_digest(found.encode(), secret.encode()):
        raise InvalidTokenError("Consul described another token")
    if not isinstance(accessor, str) or not _UUID.fullmatch(accessor) or accessor == _ANONYMOUS:
        raise InvalidTokenError("Consul described a token without an accessor of its own")
    identities = fields.get("ServiceIdentities")
    entries = [each for each in identities if isinstance(each, dict)] if isinstance(identities, list) else []
    if not entries:
        raise InvalidTokenError(f"the Consul token {accessor} has no service identity")
    named = [each for each in entries if each.get("ServiceName") == service]
    if not named:
        raise WrongServiceError(f"the Consul token {accessor} is of another service")
    if all(each.get("Datacenters") for each in named):
        raise InvalidTokenError(f"the Consul token {accessor} is good in some datacenters only")
    return accessor
