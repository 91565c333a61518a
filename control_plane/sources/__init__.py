"""Where the control plane learns of endpoints and policies: the protocols that every registry implements.

A source runs in the event loop of the control plane and calls ``emit`` synchronously; it never raises for trouble
outside of itself, but says `SourceLost`, keeps trying, and says `SourceConnected` when it can read again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from control_plane.events import Event, PolicyEvent, SourceConnected, SourceLost
from mesh_client.core.errors import MeshError
from mesh_client.core.policy_base import Policy

Emit = Callable[[Event], None]
"""Takes one event of a `Source`. Called in the event loop, never blocks, never raises."""

PolicyStoreEvent = PolicyEvent | SourceConnected | SourceLost
EmitPolicy = Callable[[PolicyStoreEvent], None]
"""Takes one event of a `PolicyStore`. Called in the event loop, never blocks, never raises."""


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A policy document as its store holds it, valid or not."""

    name: str
    document: bytes
    version: str
    """The store's own version, for compare-and-set. Never empty."""


class PolicyStoreError(MeshError):
    """A policy store refused or could not do what it was asked."""


class VersionConflictError(PolicyStoreError):
    """The stored version is another than the caller expected.

    Attributes:
        expected: version that the caller named; empty: that none is stored.
        stored: version that is stored; empty when none is.
    """

    def __init__(self, kind: type[Policy], name: str, expected: str, stored: str) -> None:
        wanted = f"version {expected}" if expected else "no policy"
        found = f"version {stored} is stored" if stored else "none is stored"
        super().__init__(
            f"policy of {kind.called(name)}: expected {wanted}, but {found}; read it again and repeat the change"
        )
        self.expected = expected
        self.stored = stored


class NotStoredError(PolicyStoreError):
    """No policy of this name is stored."""

    def __init__(self, kind: type[Policy], name: str) -> None:
        super().__init__(f"no policy is stored for {kind.called(name)}")


class StoreUnavailableError(PolicyStoreError):
    """The store cannot be reached, or failed; nothing is known about whether a write took place."""


class Source(Protocol):
    """A registry of endpoints."""

    @property
    def name(self) -> str:
        """``consul`` or ``embedded``; stands in every event of the source."""

    async def run(self, emit: Emit) -> None:
        """Emits what the registry holds and every change, until cancelled."""


class PolicyStore(Protocol):
    """Where documents of one kind of policy are kept, as they are; validation is the caller's."""

    @property
    def kind(self) -> type[Policy]:
        """The kind."""

    @property
    def name(self) -> str:
        """Stands in the store's `SourceConnected` and `SourceLost` events."""

    async def run(self, emit: EmitPolicy) -> None:
        """Emits every stored document and every change, until cancelled."""

    async def get(self, name: str) -> StoredDocument | None:
        """The stored document, or None.

        Raises:
            StoreUnavailableError: the store cannot be read.
        """

    async def list(self) -> Sequence[StoredDocument]:
        """Every stored document, ordered by name.

        Raises:
            StoreUnavailableError: the store cannot be read.
        """

    async def put(self, name: str, document: bytes, if_version: str | None) -> StoredDocument:
        """Stores a document by compare-and-set.

        Args:
            name: a DNS label.
            document: at most ``MAX_DOCUMENT_BYTES``.
            if_version: version that must be stored now; empty: none must be; None: whatever is.

        Raises:
            VersionConflictError: another version is stored; nothing is changed.
            StoreUnavailableError: the store cannot be written.
        """

    async def delete(self, name: str, if_version: str | None) -> None:
        """Deletes a document by compare-and-set.

        Raises:
            NotStoredError: there is none.
            VersionConflictError: another version is stored; nothing is changed.
            StoreUnavailableError: the store cannot be written.
        """
