"""Rotation of the trust root, as a state machine: add, overlap, retire.

| state | trusted | signs | leaves by |
| --- | --- | --- | --- |
| steady | signing | signing | add: there is a next root |
| added | signing, next | signing | overlap, once everybody trusts the next one |
| overlapping | signing, previous | signing | retire, once nobody's certificate leads up to the previous one |
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from control_plane.identity.errors import RotationRefusedError

NAMED = 10
"""Workloads that a refusal names; of others it says how many there are."""


class Phase(enum.Enum):
    """Where a rotation stands."""

    STEADY = "steady"
    ADDED = "added"
    OVERLAPPING = "overlapping"


@dataclass(frozen=True, slots=True)
class Dependent:
    """A workload that must not be cut off: it is not revoked, and its certificate has not ended.

    Attributes:
        workload_id: which one.
        spiffe_id: whose.
        roots: fingerprints of the roots that its certificates lead up to: of the newest one that was signed, and of the
            one that it was seen with last, which may be older: an answer can be lost.
        trusted: fingerprints of the roots that it has confirmed to trust.
    """

    workload_id: str
    spiffe_id: str
    roots: frozenset[str]
    trusted: frozenset[str]


@dataclass(frozen=True, slots=True)
class Rotation:
    """The state. Roots are named by their fingerprints.

    Attributes:
        signing: the root that new certificates lead up to.
        next: trusted, and to sign later.
        previous: still trusted, and signed before.
    """

    signing: str
    next: str | None = None
    previous: str | None = None

    @property
    def phase(self) -> Phase:
        """Where the rotation stands."""
        if self.next is not None:
            return Phase.ADDED
        return Phase.STEADY if self.previous is None else Phase.OVERLAPPING

    @property
    def trusted(self) -> tuple[str, ...]:
        """Every trusted root, the oldest first."""
        return tuple(root for root in (self.previous, self.signing, self.next) if root is not None)

    def check_add(self) -> None:
        """Whether a next root can be added.

        Raises:
            RotationRefusedError: a rotation is under way.
        """
        if self.phase is Phase.ADDED:
            raise RotationRefusedError("a root was added before: overlap is the next step")
        if self.phase is Phase.OVERLAPPING:
            raise RotationRefusedError("the previous root is trusted still: retire is the next step")

    def add(self, root: str) -> Rotation:
        """With a next root.

        Raises:
            RotationRefusedError: a rotation is under way.
        """
        self.check_add()
        return Rotation(self.signing, next=root)

    def overlap(self, dependents: Iterable[Dependent], *, force: bool = False) -> Rotation:
        """With the next root signing.

        Raises:
            RotationRefusedError: there is none, or a workload has not confirmed that it trusts it.
        """
        root = self.next
        if root is None:
            raise RotationRefusedError(
                "there is no root to go over to: add is the first step"
                if self.phase is Phase.STEADY
                else "new certificates lead up to the new root already: retire is the next step"
            )
        if not force:
            _refuse("have not confirmed that they trust the new root", unconfirmed(root, dependents))
        return Rotation(root, previous=self.signing)

    def retire(self, dependents: Iterable[Dependent], *, force: bool = False) -> Rotation:
        """Without the previous root.

        Raises:
            RotationRefusedError: there is none, or a workload's certificate leads up to it.
        """
        root = self.previous
        if root is None:
            raise RotationRefusedError(
                "there is no root to retire: add is the first step"
                if self.phase is Phase.STEADY
                else "the old root signs still: overlap is the next step"
            )
        if not force:
            people = list(dependents)
            _refuse("have not confirmed that they trust the new root", unconfirmed(self.signing, people))
            _refuse("have certificates that lead up to the old root", below(root, people))
        return Rotation(self.signing)


def unconfirmed(root: str, dependents: Iterable[Dependent]) -> list[Dependent]:
    """Who has not confirmed that they trust the root."""
    return [each for each in dependents if root not in each.trusted]


def below(root: str, dependents: Iterable[Dependent]) -> list[Dependent]:
    """Who has a certificate that leads up to the root."""
    return [each for each in dependents if root in each.roots]


def _refuse(what: str, blockers: list[Dependent]) -> None:
    if blockers:
        named = ", ".join(f"{each.spiffe_id} (workload {each.workload_id})" for each in blockers[:NAMED])
        more = f" and {len(blockers) - NAMED} more" if len(blockers) > NAMED else ""
        raise RotationRefusedError(
            f"{len(blockers)} workloads {what}: {named}{more}. Wait for them, revoke them, or force the step, "
            "which cuts them off"
        )
