"""Settings of one instance, from environment variables.

The mesh reads its own (``MESH_CONTROL_PLANE``, ``MESH_TOKEN_FILE``, ``MESH_REGISTRY``, ``MESH_ZONE``, ...); these are
the shop's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """What an instance needs to know about itself."""

    database: Path
    """``SHOP_DATABASE``: SQLite file that all instances of the service share. Default ``NAME.sqlite`` here."""
    address: str
    """``SHOP_ADDRESS``: host and port to listen on. Default ``127.0.0.1:0``, a port that the system picks."""
    instance: str
    """``SHOP_INSTANCE``: name of the instance, unique within the service. Default ``NAME-PROCESS_ID``."""
    weight: int
    """``SHOP_WEIGHT``: share of calls relative to its siblings, 1 to 1000. Default 1."""

    @classmethod
    def from_environment(cls, service: str, environment: Mapping[str, str] = os.environ) -> Settings:
        """Settings of an instance of ``service``.

        Raises:
            ValueError: ``SHOP_WEIGHT`` is not a number from 1 to 1000.
        """
        weight = environment.get("SHOP_WEIGHT", "1")
        if not weight.isdecimal() or not 1 <= int(weight) <= 1000:
            raise ValueError(f"SHOP_WEIGHT is {weight!r}; expected a number from 1 to 1000")
        return cls(
            database=Path(environment.get("SHOP_DATABASE", f"{service}.sqlite")),
            address=environment.get("SHOP_ADDRESS", "127.0.0.1:0"),
            instance=environment.get("SHOP_INSTANCE", f"{service}-{os.getpid()}"),
            weight=int(weight),
        )
