"""What the mesh believes of the policies in Consul's KV store, given what Consul answers and may have lost. Pure.

Unlike registrations, lost keys come back only when somebody writes them. When all of them are gone after Consul was
away, that is a loss and not a decision: what is known is kept, and said so, until each was stored again.
"""

from __future__ import annotations

from collections.abc import Mapping

from control_plane.events import PolicyDeleted, PolicyEvent, PolicyStored
from control_plane.sources import StoredDocument
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.policy_base import Policy


class PolicyView:
    """Folds answers into events.

    Args:
        kind: of policy.
    """

    def __init__(self, kind: type[Policy] = ServicePolicy) -> None:
        self._kind = kind
        self._known: dict[str, StoredDocument] = {}
        self._lost: set[str] = set()

    @property
    def loss(self) -> str | None:
        """What was lost, in words for the operator; None when nothing was."""
        if not self._lost:
            return None
        lost = ", ".join(self._kind.called(name) for name in sorted(self._lost))
        return (
            f"Consul came back without the policies of {lost}: they stay in force; apply them "
            "again, or restart the control plane to go without"
        )

    def documents(self, stored: Mapping[str, StoredDocument], restarted: bool) -> list[PolicyEvent]:
        """Takes the whole of what is stored in."""
        missing = self._known.keys() - stored.keys()
        if restarted and self._known and not stored:
            self._lost = set(self._known)
        self._lost -= stored.keys()
        events: list[PolicyEvent] = []
        for name in sorted(missing - self._lost):
            del self._known[name]
            events.append(PolicyDeleted(name))
        for name in sorted(stored):
            document = stored[name]
            if document != self._known.get(name):
                self._known[name] = document
                events.append(PolicyStored(name, document.document, document.version))
        return events
