"""The key that signs join tokens."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from control_plane.files import read_secret, write_atomically
from mesh_client.core.errors import ConfigError

FILE_NAME = "tokens.key"


def load_token_key(directory: Path | None) -> Ed25519PrivateKey:
    """The key of the directory, made when there is none; a passing one without a directory.

    Raises:
        ConfigError: the file is not safe, or holds something else.
    """
    if directory is None:
        return Ed25519PrivateKey.generate()
    path = directory / FILE_NAME
    if not path.exists() and not path.is_symlink():
        key = Ed25519PrivateKey.generate()
        write_atomically(
            path,
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )
        return key
    try:
        found = serialization.load_pem_private_key(read_secret(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, Ed25519PrivateKey):
        raise ConfigError(
            f"{path} holds no key that can be read: restore it, or move it away, which makes every join token worthless"
        )
    return found
