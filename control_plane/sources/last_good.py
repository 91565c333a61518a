"""The last good policies on disk, so that a restart while a bad one is stored does not mean the defaults."""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from control_plane.documents import parse_document
from control_plane.events import PolicyDeleted, PolicyStored, SourceConnected
from control_plane.sources import EmitPolicy, PolicyStore, PolicyStoreEvent, StoredDocument, StoreUnavailableError
from mesh_client.core.errors import InvalidPolicyError
from mesh_client.core.policy_base import Policy
from mesh_client.tasks import end_tasks, in_thread

_logger = logging.getLogger(__name__)

RETRY_DELAY = 0.5
"""Seconds until a store that cannot be read is asked again whether it was lost."""


class LastGoodPolicies:
    """A policy store that says first which documents were good before, and then what is stored.

    So the defaults take the place of a policy only when it was deleted: those of services authorize everybody and limit
    nobody, those of edges expose nothing.
    The file is a help, not a store: one that is lost or damaged, or cannot be written, is warned of and done without.

    Args:
        store: where policies are.
        directory: for the file; made when it is first written.
        is_fresh: says whether the store has never held a policy. What was good before is stored again then: that a file
            was damaged or lost must not open to everybody what policies had closed. None for a store that is not ours.
    """

    def __init__(
        self, store: PolicyStore, directory: Path, is_fresh: Callable[[], Awaitable[bool]] | None = None
    ) -> None:
        self._store = store
        self._is_fresh = is_fresh
        self._path = directory / f"last-good-{store.kind.STORED_AS}.json"
        self._good: dict[str, bytes] = {}
        self._unconfirmed: set[str] = set()
        """Known from the file alone."""
        self._changed = asyncio.Event()

    @property
    def kind(self) -> type[Policy]:
        """The store's."""
        return self._store.kind

    @property
    def name(self) -> str:
        """The store's."""
        return self._store.name

    async def run(self, emit: EmitPolicy) -> None:
        """Emits the documents that were good, then every stored document and every change, until cancelled."""
        self._good = await asyncio.to_thread(self._load)
        self._unconfirmed = set(self._good)
        for name, document in self._good.items():
            emit(PolicyStored(name, document, ""))
        if self._good and self._is_fresh is not None:
            await self._restore(self._is_fresh)

        def take(event: PolicyStoreEvent) -> None:
            if isinstance(event, SourceConnected):
                for name in sorted(self._unconfirmed):
                    self._forget(name)
                    emit(PolicyDeleted(name))
                self._unconfirmed.clear()
            elif isinstance(event, PolicyStored):
                self._remember(event)
            elif isinstance(event, PolicyDeleted):
                self._forget(event.name)
            emit(event)

        saving = asyncio.create_task(self._save_changes(), name="last good policies")
        try:
            await self._store.run(take)
        finally:
            await end_tasks(saving)
            if self._changed.is_set():
                self._save(dict(self._good))

    async def get(self, name: str) -> StoredDocument | None:
        """As the store's."""
        return await self._store.get(name)

    async def list(self) -> Sequence[StoredDocument]:
        """As the store's."""
        return await self._store.list()

    async def put(self, name: str, document: bytes, if_version: str | None) -> StoredDocument:
        """As the store's."""
        return await self._store.put(name, document, if_version)

    async def delete(self, name: str, if_version: str | None) -> None:
        """As the store's."""
        await self._store.delete(name, if_version)

    async def _restore(self, is_fresh: Callable[[], Awaitable[bool]]) -> None:
        while True:
            try:
                if await is_fresh():
                    for name, document in self._good.items():
                        await self._store.put(name, document, None)
                    _logger.error(
                        "%s were lost: those that were good before are stored again (%s); see whether any is missing",
                        self.name,
                        ", ".join(sorted(self._good)),
                    )
            except StoreUnavailableError as error:
                _logger.error("stored policies cannot be read: %s", error)
                await asyncio.sleep(RETRY_DELAY)
            else:
                return

    def _remember(self, event: PolicyStored) -> None:
        self._unconfirmed.discard(event.name)
        if self._good.get(event.name) == event.document or not self._is_good(event.name, event.document):
            return
        self._good[event.name] = event.document
        self._changed.set()

    def _forget(self, name: str) -> None:
        if self._good.pop(name, None) is not None:
            self._changed.set()

    async def _save_changes(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await in_thread(self._save, dict(self._good))

    def _load(self) -> dict[str, bytes]:
        try:
            documents = json.loads(self._path.read_bytes())
            pairs = {name: str(document).encode() for name, document in dict(documents).items()}
        except FileNotFoundError:
            return {}
        except (OSError, TypeError, ValueError) as error:
            _logger.warning("%s is ignored: %s", self._path, error)
            return {}
        return {name: document for name, document in pairs.items() if self._is_good(name, document)}

    def _save(self, documents: dict[str, bytes]) -> None:
        text = json.dumps({name: document.decode() for name, document in sorted(documents.items())})
        temporary: Path | None = None
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, prefix=f".{self._path.name}.", encoding="utf-8", delete=False
            ) as file:
                temporary = Path(file.name)
                file.write(text)
            temporary.replace(self._path)
        except OSError as error:
            _logger.warning("the last good policies cannot be kept in %s: %s", self._path, error)
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def _is_good(self, name: str, document: bytes) -> bool:
        try:
            parse_document(document, self.kind, name)
        except (InvalidPolicyError, ValueError):
            return False
        return True
