"""Which policy holds for each service: stored documents are validated here, and the last good one is kept. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from control_plane.documents import parse_document
from control_plane.events import PolicyEvent, PolicyStored
from mesh_client.core.errors import FieldError, InvalidPolicyError
from mesh_client.core.policy import ServicePolicy


@dataclass(frozen=True, slots=True)
class PolicyProblem:
    """A stored policy that is not obeyed because it is invalid."""

    service: str
    errors: tuple[FieldError, ...]
    stored_version: str
    """The store's version of the bad document."""
    obeyed_version: str
    """Version of the policy that is obeyed in its place; empty for the defaults."""


PROVISIONAL = "-provisional"
"""Ends the version of defaults that stand for a policy which may exist, but is not known. They tell clients how to
call, and no server whom to serve: the policy that is not known may have authorization rules."""


class PolicyBook:
    """Folds the events of a policy store.

    A service without a good stored policy gets the defaults. A bad document is skipped: the last good one stays, until
    a good one is stored or the document is deleted; without a last good one the defaults are `PROVISIONAL`.

    Attributes:
        unread: whether the store could not be read yet, so that policies may exist that are not known.
    """

    def __init__(self) -> None:
        self.unread = False
        self._good: dict[str, tuple[ServicePolicy, str]] = {}
        self._problems: dict[str, PolicyProblem] = {}
        self._defaults: dict[str, tuple[ServicePolicy, str]] = {}

    def apply(self, event: PolicyEvent) -> bool:
        """Takes an event in. Whether the policy that holds for its service changed."""
        service = event.service
        before = self._good.get(service)
        stood = self._is_provisional(service)
        if isinstance(event, PolicyStored):
            try:
                policy = parse_document(event.document, ServicePolicy, service)
            except InvalidPolicyError as error:
                obeyed = before[1] if before else ""
                self._problems[service] = PolicyProblem(service, error.errors, event.stored_version, obeyed)
                return stood != self._is_provisional(service)
            self._good[service] = (policy, policy.version)
        else:
            self._good.pop(service, None)
        self._problems.pop(service, None)
        return self._good.get(service) != before or stood != self._is_provisional(service)

    def _is_provisional(self, service: str) -> bool:
        return service not in self._good and (self.unread or service in self._problems)

    def policy(self, service: str) -> tuple[ServicePolicy, str]:
        """The policy that holds for a service, and its version, which ends with `PROVISIONAL` where it may be another.

        Raises:
            ValueError: ``service`` is not a service name.
        """
        found = self._good.get(service) or self._defaults.get(service)
        if found is None:
            policy = ServicePolicy(service=service)
            found = self._defaults[service] = (policy, policy.version)
        return (found[0], found[1] + PROVISIONAL) if self._is_provisional(service) else found

    def has_policy(self, service: str) -> bool:
        """Whether a good policy of its own is stored for the service, or was before a bad one replaced it."""
        return service in self._good

    @property
    def problems(self) -> tuple[PolicyProblem, ...]:
        """Stored policies that are not obeyed, ordered by service."""
        return tuple(self._problems[service] for service in sorted(self._problems))
