"""The last snapshot on disk, so that a process starts with the control plane down."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from google.protobuf.message import DecodeError
from mesh.v1 import resource_pb2

from mesh_client.convert import snapshot_from_proto, snapshot_to_proto
from mesh_client.core.errors import InvalidPolicyError, InvalidValueError
from mesh_client.core.store import EndpointsResource, PolicyResource

log = logging.getLogger(__name__)

_MAGIC = b"grpc-mesh snapshot 1\n"
_DIGEST = 32
MAX_BYTES = 256 * 1024 * 1024
"""A larger file is not ours."""


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
        self._warned = False

    @classmethod
    def for_control_planes(cls, directory: Path, addresses: Iterable[str], service: str) -> DiskCache:
        """The file of one service's clients of one mesh: other meshes have other files."""
        mesh = hashlib.sha256(",".join(sorted(addresses)).encode()).hexdigest()[:12]
        return cls(directory / f"{service or 'client'}-{mesh}.snapshot")

    def load(self) -> tuple[list[PolicyResource], list[EndpointsResource]]:
        """What was saved last; nothing when there is none, or when it is damaged (it is set aside then).

        Nothing either when somebody else could have written it: it says whom a server may serve.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
                    raise PermissionError(errno.EPERM, "others can write it, so it is not believed")
                if status.st_size > MAX_BYTES:
                    raise InvalidValueError("cache", self.path.name, f"a file of at most {MAX_BYTES} bytes")
                raw = file.read()
            return snapshot_from_proto(self._decode(raw))
        except FileNotFoundError:
            return [], []
        except OSError as error:
            self._warn("cannot read", error)
        except (DecodeError, InvalidValueError, InvalidPolicyError) as error:
            log.warning("snapshot cache %s is damaged and set aside: %s", self.path, error)
            self._set_aside()
        return [], []

    def save(self, active: Iterable[tuple[PolicyResource, EndpointsResource]]) -> bool:
        """Replaces the file; False when that failed. Blocks: call it in a thread."""
        body = snapshot_to_proto(active).SerializeToString(deterministic=True)
        temporary = None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            Path(temporary).replace(self.path)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            self._warn("cannot write", error)
            return False
        return True

    @staticmethod
    def _decode(raw: bytes) -> resource_pb2.CachedSnapshot:
        if not raw.startswith(_MAGIC):
            raise InvalidValueError("cache", raw[:16], "a snapshot written by this version")
        digest, body = raw[len(_MAGIC) :][:_DIGEST], raw[len(_MAGIC) + _DIGEST :]
        if hashlib.sha256(body).digest() != digest:
            raise InvalidValueError("cache", "checksum", "content that was written whole")
        return resource_pb2.CachedSnapshot.FromString(body)

    def _set_aside(self) -> None:
        try:
            self.path.replace(self.path.with_suffix(".damaged"))
        except OSError as error:
            self._warn("cannot set aside", error)

    def _warn(self, what: str, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s the snapshot cache %s, going on without: %s", what, self.path, error.strerror)
