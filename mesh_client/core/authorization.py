"""Who may call what: authorization rules of a policy, compiled so that a call costs one look-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh_client.core.policy import ANYBODY

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mesh_client.core.policy import AuthorizationRule

HEALTH_METHODS = frozenset(f"/grpc.health.v1.Health/{method}" for method in ("Check", "List", "Watch"))
"""Open to everybody who can connect, whatever the rules say. By name: a server that passes every method on must not
pass on others by that exception."""

MAX_DECISIONS = 10_000
"""Decisions that are remembered, one for each caller and method; past it they are made anew."""


class Authorizer:
    """The authorization rules of one policy.

    Without rules everybody may call everything. With one or more, a call is allowed if some rule names its caller and
    its method, and refused otherwise.

    Args:
        rules: the rules.
        version: version of the policy that they are of; for the reasons.
        max_decisions: bound on what is remembered.
    """

    __slots__ = ("_decisions", "_max_decisions", "_rules", "_version")

    def __init__(self, rules: Sequence[AuthorizationRule], version: str, max_decisions: int = MAX_DECISIONS) -> None:
        self._rules = tuple(_Rule(rule) for rule in rules)
        self._version = version
        self._max_decisions = max_decisions
        self._decisions: dict[tuple[str, str], str | None] = {}

    def __bool__(self) -> bool:
        """Whether there is a rule, so that calls may be refused."""
        return bool(self._rules)

    @property
    def version(self) -> str:
        """Version of the policy that the rules are of."""
        return self._version

    def check(self, caller: str, method: str) -> str | None:
        """None when the call is allowed, else why it is not, in words.

        Args:
            caller: as rules name it: `Principal.caller`; empty for one without an identity.
            method: full name, with or without its leading slash.
        """
        if not self._rules:
            return None
        key = (caller, method)
        try:
            return self._decisions[key]
        except KeyError:
            decision = self._decide(caller, method)
        if len(self._decisions) >= self._max_decisions:
            # Callers are few and methods are what the server has: only a proxy of any method gets here.
            self._decisions.clear()
        self._decisions[key] = decision
        return decision

    def _decide(self, caller: str, method: str) -> str | None:
        if f"/{method.removeprefix('/')}" in HEALTH_METHODS or self.allowing(caller, method) is not None:
            return None
        return self._refusal(caller, method)

    def allowing(self, caller: str, method: str) -> int | None:
        """Number of the first rule that allows the call, counted from 0; None when there is none."""
        if not caller:
            return None
        method = method.removeprefix("/")
        return next((number for number, rule in enumerate(self._rules) if rule.allows(caller, method)), None)

    def _refusal(self, caller: str, method: str) -> str:
        method = method.removeprefix("/")
        who = caller or "a caller without an identity"
        rules = "the authorization rule" if len(self._rules) == 1 else f"any of the {len(self._rules)} rules"
        return f"{who} may not call {method}: it is not allowed by {rules} of policy version {self._version}"


class _Rule:
    """One rule: exact names in sets, patterns taken apart once."""

    __slots__ = ("anybody", "anything", "callers", "methods", "services")

    def __init__(self, rule: AuthorizationRule) -> None:
        self.anybody = ANYBODY in rule.callers
        self.callers = frozenset(rule.callers)
        self.anything = "*" in rule.methods
        self.methods = frozenset(rule.methods)
        self.services = frozenset(_without_star(rule.methods))

    def allows(self, caller: str, method: str) -> bool:
        if not self.anybody and caller not in self.callers:
            return False
        return self.anything or method in self.methods or method.partition("/")[0] in self.services


def _without_star(methods: Iterable[str]) -> Iterable[str]:
    return (method.removesuffix("/*") for method in methods if method.endswith("/*"))
