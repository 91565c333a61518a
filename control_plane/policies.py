"""Which policies hold: stored documents are validated here, and the last good one is kept. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from control_plane.documents import parse_document
from control_plane.events import PolicyEvent, PolicyStored
from mesh_client.core.errors import FieldError, InvalidPolicyError
from mesh_client.core.policy_base import Policy

Kind = TypeVar("Kind", bound=Policy)


@dataclass(frozen=True, slots=True)
class PolicyProblem:
    """A stored policy that is not obeyed because it is invalid."""

    name: str
    errors: tuple[FieldError, ...]
    stored_version: str
    """The store's version of the bad document."""
    obeyed_version: str
    """Version of the policy that is obeyed in its place; empty for the defaults."""


PROVISIONAL = "-provisional"
"""Ends the version of defaults that stand for a policy which may exist, but is not known. They tell clients how to
call, and no server whom to serve: the policy that is not known may have authorization rules."""


class PolicyBook(Generic[Kind]):
    """Folds the events of a policy store.

    Who has no good stored policy gets the defaults. A bad document is skipped: the last good one stays, until
    a good one is stored or the document is deleted; without a last good one the defaults are `PROVISIONAL`.

    Args:
        kind: of policy.

    Attributes:
        unread: whether the store could not be read yet, so that policies may exist that are not known.
    """

    def __init__(self, kind: type[Kind]) -> None:
        self._kind = kind
        self.unread = False
        self._good: dict[str, tuple[Kind, str]] = {}
        self._problems: dict[str, PolicyProblem] = {}
        self._defaults: dict[str, tuple[Kind, str]] = {}

    def apply(self, event: PolicyEvent) -> bool:
        """Takes an event in. Whether the policy that holds under its name changed."""
        name = event.name
        before = self._good.get(name)
        stood = self.is_provisional(name)
        if isinstance(event, PolicyStored):
            try:
                policy = parse_document(event.document, self._kind, name)
            except InvalidPolicyError as error:
                obeyed = before[1] if before else ""
                self._problems[name] = PolicyProblem(name, error.errors, event.stored_version, obeyed)
                return stood != self.is_provisional(name)
            self._good[name] = (policy, policy.version)
        else:
            self._good.pop(name, None)
        self._problems.pop(name, None)
        return self._good.get(name) != before or stood != self.is_provisional(name)

    def is_provisional(self, name: str) -> bool:
        """Whether the defaults hold for want of knowing better: a policy is or may be stored that is not known."""
        return name not in self._good and (self.unread or name in self._problems)

    def policy(self, name: str) -> tuple[Kind, str]:
        """The policy that holds under a name, and its version, which ends with `PROVISIONAL` where it may be another.

        Raises:
            ValueError: ``name`` is none that a policy can have.
        """
        found = self._good.get(name) or self._defaults.get(name)
        if found is None:
            policy = self._kind.parse({self._kind.NAMED_BY: name})
            found = self._defaults[name] = (policy, policy.version)
        return (found[0], found[1] + PROVISIONAL) if self.is_provisional(name) else found

    def has_policy(self, name: str) -> bool:
        """Whether a good policy is stored under the name, or was before a bad one replaced it."""
        return name in self._good

    @property
    def problems(self) -> tuple[PolicyProblem, ...]:
        """Stored policies that are not obeyed, ordered by name."""
        return tuple(self._problems[name] for name in sorted(self._problems))

    @property
    def names(self) -> tuple[str, ...]:
        """Whose policies are stored, good or not, in order."""
        return tuple(sorted(self._good.keys() | self._problems.keys()))
