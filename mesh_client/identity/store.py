"""A workload's key, certificate and trust bundle on disk, so that it starts again without joining again."""

from __future__ import annotations

import base64
import fcntl
import json
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import IO

from google.protobuf.message import DecodeError
from mesh.v1 import certificate_pb2

from mesh_client.core.errors import ConfigError, IdentityError
from mesh_client.core.identity import Principal
from mesh_client.identity.certificates import Credential, TrustBundle, accept, from_pem

log = logging.getLogger(__name__)

_FILE = "identity.json"
_LOCK = "lock"
_VERSION = 1
MAX_BYTES = 4 * 1024 * 1024
"""A larger file is not ours."""


class IdentityStore:
    """One directory, held by one process, for one service.

    The directory is readable by its owner only, as is what is in it; anything else is refused, not mended: whoever
    could read the key has it. The one file is replaced whole, so that key and certificate always belong together.

    Args:
        directory: made when needed.
        service: whose identity it holds.
        trust_domain: of the mesh; None for any.
    """

    def __init__(self, directory: Path, service: str, trust_domain: str | None) -> None:
        self.directory = directory
        self._service = service
        self._trust_domain = trust_domain
        self._lock: int | None = None

    def open(self) -> None:
        """Takes the directory for this process. Blocks shortly.

        Raises:
            ConfigError: it cannot be made, others can read it, or another process holds it.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_if_shared(self.directory.stat(), self.directory, "identity_dir")
            lock = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"identity_dir {self.directory} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ConfigError(
                f"identity_dir {self.directory} is used by another process; give each process a directory of its own"
            ) from None
        self._lock = lock

    def close(self) -> None:
        """Lets others have the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def load(self) -> tuple[Credential, TrustBundle] | None:
        """What was saved last; None when there is nothing, or when it is damaged (it is set aside then). Blocks.

        Raises:
            ConfigError: others can read the file, or it is another service's.
        """
        path = self.directory / _FILE
        try:
            raw = read_secret_file(path, "identity_dir")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"identity_dir: {path} cannot be read: {error.strerror}") from error
        try:
            return self._decode(raw)
        except (IdentityError, DecodeError, ValueError, LookupError, TypeError, AttributeError) as error:
            why = str(error) if isinstance(error, IdentityError) else type(error).__name__
            log.warning("the identity in %s is damaged and set aside: %s", path, why)
            path.replace(path.with_suffix(".damaged"))
            return None

    def save(self, credential: Credential, bundle: TrustBundle) -> None:
        """Replaces what is there. Blocks.

        Raises:
            OSError: it could not.
        """
        document = {
            "version": _VERSION,
            "spiffe_id": credential.principal.spiffe_id,
            "private_key": credential.key.decode(),
            "certificate_chain": credential.chain_pem.decode(),
            "trust_bundle": base64.b64encode(bundle.to_proto().SerializeToString(deterministic=True)).decode(),
        }
        handle, temporary = tempfile.mkstemp(prefix=f".{_FILE}.", dir=self.directory)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.directory / _FILE)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _decode(self, raw: bytes) -> tuple[Credential, TrustBundle]:
        document = json.loads(raw)
        if document["version"] != _VERSION:
            raise IdentityError(f"it has version {document['version']!r}; expected {_VERSION}")
        held = Principal.parse(document["spiffe_id"])
        if held != Principal.service(self._trust_domain or held.trust_domain, self._service):
            domain = f" in {self._trust_domain}" if self._trust_domain else ""
            raise ConfigError(
                f"identity_dir {self.directory} holds the identity of {held}, not of {self._service}{domain}; give "
                "each service of each mesh a directory of its own"
            )
        message = certificate_pb2.TrustBundle.FromString(base64.b64decode(document["trust_bundle"], validate=True))
        bundle = TrustBundle.from_proto(message)
        chain = from_pem(document["certificate_chain"].encode())
        return accept(document["private_key"].encode(), chain, bundle, held), bundle


def read_secret_file(path: Path, name: str) -> bytes:
    """What a file holds that nobody but its owner can read or change.

    It is looked at through what was opened, so that nobody can exchange it in between.

    Args:
        path: the file; links are followed.
        name: the option that named it, for the error.

    Raises:
        ConfigError: it is not ours alone; it may be root's.
        OSError: it cannot be read, or is too large to be ours.
    """
    with path.open("rb") as file:
        _refuse_if_shared(os.fstat(file.fileno()), path, name)
        return _read_small(file)


def read_trusted_file(path: Path, name: str) -> bytes:
    """What a file holds that anybody may read, and that nobody but this user and root can change or replace.

    Args:
        path: the file; links are followed, and nobody else may be able to replace them either.
        name: the option that named it, for the error.

    Raises:
        ConfigError: it, or its directory, is another user's, or can be written by others.
        OSError: it cannot be read, or is too large to be ours.
    """
    with path.open("rb") as file:
        _refuse_if_changeable(os.fstat(file.fileno()), path, name)
        for directory in dict.fromkeys((path.absolute().parent, path.resolve().parent)):
            # Volumes of configuration in containers are 0777, and read-only.
            if not os.statvfs(directory).f_flag & os.ST_RDONLY:
                _refuse_if_changeable(directory.stat(), directory, name)
        return _read_small(file)


def _refuse_if_changeable(status: os.stat_result, path: Path, name: str) -> None:
    # In a sticky directory, such as /tmp, nobody replaces what is another's.
    if status.st_mode & 0o022 and not (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        raise ConfigError(f"{name}: {path} can be written by others; chmod go-w it, and check what is in it")
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{name}: {path} belongs to another user; expected one of this process's own, or root's")


def _refuse_if_shared(status: os.stat_result, path: Path, name: str) -> None:
    if stat.S_IMODE(status.st_mode) & 0o077:
        wanted = "700" if stat.S_ISDIR(status.st_mode) else "600"
        raise ConfigError(f"{name}: {path} can be read or written by others; chmod {wanted} it, and make a new secret")
    owners = {os.geteuid()} if stat.S_ISDIR(status.st_mode) else {os.geteuid(), 0}
    if status.st_uid not in owners:
        raise ConfigError(f"{name}: {path} belongs to another user; expected one of this process's own")


def _read_small(file: IO[bytes]) -> bytes:
    raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise OSError(0, f"it is larger than {MAX_BYTES} bytes")
    return raw
