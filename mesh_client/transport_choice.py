"""Plaintext or mutual TLS, by what a process was told; and one identity for everything that it opens."""

from __future__ import annotations

import asyncio
import weakref

from mesh_client.identity.settings import IdentitySettings
from mesh_client.identity.workload import WorkloadIdentity
from mesh_client.transport import MutualTls, PlaintextTransport, Transport

_identities: weakref.WeakKeyDictionary[
    asyncio.AbstractEventLoop, weakref.WeakValueDictionary[IdentitySettings, WorkloadIdentity]
] = weakref.WeakKeyDictionary()


def _shared_identity(settings: IdentitySettings) -> WorkloadIdentity:
    """The identity for these settings, one for all clients and servers of an event loop.

    A process joins once however many of them it makes: each join would spend a use of its token.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return WorkloadIdentity(settings)
    identities = _identities.setdefault(loop, weakref.WeakValueDictionary())
    identity = identities.get(settings)
    if identity is None:
        identity = identities[settings] = WorkloadIdentity(settings)
    return identity


def make_transport(settings: IdentitySettings | None) -> Transport:
    """Mutual TLS with the identity of these settings; plaintext where there are none."""
    return PlaintextTransport() if settings is None else MutualTls(_shared_identity(settings))
