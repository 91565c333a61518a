"""What the mesh believes of the policies in Consul's KV store, given what Consul answers and may have lost. Pure.

Unlike registrations, lost keys come back only when somebody writes them. When all of them are gone after Consul was
away, that is a loss and not a decision: what is known is kept, and said so, until each was stored again.
"""

from __future__ import annotations

from collections.abc import Mapping

from control_plane.events import PolicyDeleted, PolicyEvent, PolicyStored
from control_plane.sources import StoredDocument


class PolicyView:
    """Folds answers into events."""

    def __init__(self) -> None:
        self._known: dict[str, StoredDocument] = {}
        self._lost: set[str] = set()

    @property
    def loss(self) -> str | None:
        """What was lost, in words for the operator; None when nothing was."""
        if not self._lost:
            return None
        return (
            f"Consul came back without the policies of {', '.join(sorted(self._lost))}: they stay in force; apply them "
            "again, or restart the control plane to go without"
        )

    def documents(self, stored: Mapping[str, StoredDocument], restarted: bool) -> list[PolicyEvent]:
        """Takes the whole of what is stored in."""
        missing = self._known.keys() - stored.keys()
        if restarted and self._known and not stored:
            self._lost = set(self._known)
        self._lost -= stored.keys()
        events: list[PolicyEvent] = []
        for service in sorted(missing - self._lost):
            del self._known[service]
            events.append(PolicyDeleted(service))
        for service in sorted(stored):
            document = stored[service]
            if document != self._known.get(service):
                self._known[service] = document
                events.append(PolicyStored(service, document.document, document.version))
        return events
