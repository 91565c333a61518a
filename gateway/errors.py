"""What is wrong with an API's protos, or with the settings of its edge."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mesh_client.core.errors import MeshError


class GatewayError(MeshError):
    """Root of what the gateway raises."""


class DescriptorError(GatewayError):
    """A descriptor set cannot be read, is incomplete, or contradicts another one."""


class SettingsError(GatewayError, ValueError):
    """Settings of the edge are invalid or do not fit the protos. The message says which, and what is expected."""


class PushRejectedError(GatewayError):
    """An edge, or what makes its configuration, refuses what it was to be told. The edge obeys what it did before.

    Attributes:
        again: seconds after which the reason may have passed; None: only another policy helps.
    """

    def __init__(self, message: str, *, again: float | None = None) -> None:
        super().__init__(message)
        self.again = again


class PushFailedError(GatewayError):
    """An edge could not be told, and that may pass.

    Attributes:
        after: seconds to wait at least before it is tried again.
    """

    def __init__(self, message: str, *, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong with the annotation of a method."""

    method: str
    """Full name, such as ``shop.v1.OrderService.GetOrder``."""
    message: str
    """What is wrong, and what to do."""

    def __str__(self) -> str:
        return f"{self.method}: {self.message}"


class InvalidRoutesError(GatewayError, ValueError):
    """Annotations are malformed or contradict each other.

    Attributes:
        problems: all of them, in the order of methods; never empty.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems)))
        super().__init__("; ".join(map(str, self.problems)))
