"""What a check found. Pure."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Outcome(enum.Enum):
    """How a check ended."""

    PASS = "pass"
    WARN = "warn"
    """It works, and may not for long, or not as somebody thinks."""
    FAIL = "fail"
    SKIP = "skip"
    """It could not be told."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's result.

    Attributes:
        group: where it belongs: ``this host``, ``identity``, ...
        name: of the check; several findings may have one name.
        outcome: how it ended.
        detail: what was found.
        fix: what to do about it; empty when it passed.
    """

    group: str
    name: str
    outcome: Outcome
    detail: str
    fix: str = ""


def passed(group: str, name: str, detail: str) -> Finding:
    """All is well."""
    return Finding(group, name, Outcome.PASS, detail)


def warning(group: str, name: str, detail: str, fix: str) -> Finding:
    """Something to look at."""
    return Finding(group, name, Outcome.WARN, detail, fix)


def failure(group: str, name: str, detail: str, fix: str) -> Finding:
    """Something to mend."""
    return Finding(group, name, Outcome.FAIL, detail, fix)


def skipped(group: str, name: str, detail: str) -> Finding:
    """It could not be told."""
    return Finding(group, name, Outcome.SKIP, detail)


def or_passed(found: Iterable[Finding], group: str, name: str, detail: str) -> list[Finding]:
    """What was found, or that all is well."""
    return list(found) or [passed(group, name, detail)]


def tally(findings: Iterable[Finding]) -> dict[Outcome, int]:
    """How many ended how."""
    counted = dict.fromkeys(Outcome, 0)
    for finding in findings:
        counted[finding.outcome] += 1
    return counted


def some(names: Iterable[str], most: int = 5) -> str:
    """Names in a sentence; of many, the first."""
    shown = list(names)
    more = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {more} more" if more > 0 else "")
