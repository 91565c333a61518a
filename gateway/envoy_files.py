"""The directory that an Envoy follows: files are replaced by renaming others over them, in an order that is safe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from gateway.envoy import BOOTSTRAP
from gateway.envoy_settings import EnvoySettings, UpstreamTls
from gateway.errors import PushFailedError
from gateway.files import private_directory, write_atomically
from mesh_client.core.errors import ConfigError
from mesh_client.identity import PemCredentials

_SETTINGS = "settings.json"
_LISTENERS, _CLUSTERS = "lds.json", "cds.json"
_TLS, _ENDPOINTS = "tls", "eds"


class EnvoyFiles:
    """Everything in one directory, readable by its owner alone: some files hold keys.

    Args:
        settings: whose directory it is.
    """

    def __init__(self, settings: EnvoySettings) -> None:
        self._settings = settings
        self.directory = Path(settings.directory)

    @property
    def bootstrap(self) -> Path:
        """What Envoy is started with."""
        return self.directory / BOOTSTRAP

    def open(self, bootstrap: str) -> bool:
        """Makes the directory, and what Envoy is started with; whether an earlier process left all that it needs.

        Files that were made for other settings do not count: Envoy would listen where it no longer should.

        Args:
            bootstrap: the content of `BOOTSTRAP`.

        Raises:
            ConfigError: the directory cannot be used, or others may enter it.
        """
        private_directory(self.directory, "dir")
        settings, before = self._settings.model_dump_json(), self.directory / _SETTINGS
        try:
            known = before.exists() and before.read_text(encoding="utf-8") == settings
            complete = known and all((self.directory / name).exists() for name in (_LISTENERS, _CLUSTERS))
            if not known:
                (self.directory / _LISTENERS).unlink(missing_ok=True)
            write_atomically(self.bootstrap, bootstrap.encode(), 0o600)
            write_atomically(before, settings.encode(), 0o600)
        except OSError as error:
            raise ConfigError(f"dir: {self.directory} cannot be used: {error.strerror}") from None
        return complete

    def with_credentials(self, credentials: PemCredentials | None, trust_domain: str) -> EnvoySettings:
        """Writes certificates under names of their own, and returns settings that name them. Blocks shortly.

        New names, not new contents: a certificate and its key are never read apart, and what Envoy says that it has
        applied says which they are.

        Raises:
            PushFailedError: they cannot be written.
        """
        if credentials is None:
            return self._settings
        pair = hashlib.sha256(credentials.certificate + credentials.key).hexdigest()[:16]
        roots = hashlib.sha256(credentials.roots).hexdigest()[:16]
        contents = {
            f"{_TLS}/{pair}.crt": credentials.certificate,
            f"{_TLS}/{pair}.key": credentials.key,
            f"{_TLS}/{roots}.roots": credentials.roots,
        }
        self._write(contents)
        certificate, key, trusted = (str(self.directory / name) for name in contents)
        tls = UpstreamTls(certificate=certificate, key=key, roots=trusted, trust_domain=trust_domain)
        return self._settings.model_copy(update={"upstream_tls": tls})

    def write(self, files: Mapping[str, str], *, again: bool = False) -> None:
        """Replaces those that differ, in this order; with ``again`` the others too, so that Envoy reads them. Blocks.

        Raises:
            PushFailedError: one cannot be written.
        """
        self._write({name: text.encode() for name, text in files.items() if name != BOOTSTRAP}, again)

    def tidy(self, files: Mapping[str, str]) -> None:
        """Removes endpoints and certificates that none of these name. Blocks shortly; what cannot be removed stays."""
        named = {Path(word).name for text in files.values() for word in _paths(text)}
        for folder, pattern in ((_TLS, "*"), (_ENDPOINTS, "*.json")):
            for file in (self.directory / folder).glob(pattern):
                if file.name not in named and f"{folder}/{file.name}" not in files:
                    try:
                        file.unlink(missing_ok=True)
                    except OSError:
                        return

    def _write(self, contents: Mapping[str, bytes], again: bool = False) -> None:
        try:
            for name, content in contents.items():
                file = self.directory / name
                file.parent.mkdir(mode=0o700, exist_ok=True)
                if again or not file.exists() or file.read_bytes() != content:
                    write_atomically(file, content, 0o600)
        except OSError as error:
            raise PushFailedError(f"files cannot be written into {self.directory}: {error.strerror}") from None


def _paths(text: str) -> list[str]:
    """Every string of a JSON document that is a path."""
    found: list[str] = []
    todo: list[object] = [json.loads(text)]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list):
            todo += item
        elif isinstance(item, str) and item.startswith("/"):
            found.append(item)
    return found
