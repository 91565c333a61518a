"""The last snapshot on disk, so that a process starts with the control plane down."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mesh.v1 import resource_pb2

from mesh_client.checked_file import CheckedFile, file_of_mesh
from mesh_client.convert import snapshot_from_proto, snapshot_to_proto
from mesh_client.core.store import EndpointsResource, PolicyResource


def default_directory() -> Path:
    """``$XDG_CACHE_HOME/grpc-mesh``, by default below the home directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "grpc-mesh"


class DiskCache:
    """One file, replaced whole and checked whole. Trouble with it is logged once and never raised.

    Args:
        path: the file. Its directory is made when needed, readable by its owner only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = CheckedFile(path, "snapshot cache", b"grpc-mesh snapshot 1\n")

    @classmethod
    def for_control_planes(cls, directory: Path, addresses: Iterable[str], service: str) -> DiskCache:
        """The file of one service's clients of one mesh: other meshes have other files."""
        return cls(file_of_mesh(directory, tuple(addresses), f"{service or 'client'}-{{mesh}}.snapshot"))

    def load(self) -> tuple[list[PolicyResource], list[EndpointsResource]]:
        """What was saved last; nothing when there is none, or when it is damaged (it is set aside then).

        Nothing either when somebody else could have written it: it says whom a server may serve.
        """
        loaded = self._file.load(lambda body: snapshot_from_proto(resource_pb2.CachedSnapshot.FromString(body)))
        return ([], []) if loaded is None else loaded

    def save(self, active: Iterable[tuple[PolicyResource, EndpointsResource]]) -> bool:
        """Replaces the file; False when that failed. Blocks: call it in a thread."""
        return self._file.save(snapshot_to_proto(active).SerializeToString(deterministic=True))
