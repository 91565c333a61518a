"""Where sessions are kept, so that a restart of the control plane signs nobody out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from control_plane.access import caller
from control_plane.dashboard.context import OwnContext
from control_plane.dashboard.sessions import Identity, Session
from control_plane.files import read_secret, write_atomically
from mesh_client.core.errors import ConfigError

NAME = "dashboard-sessions.json"
"""In the data directory. It holds hashes of keys, and the certificates of operators; no keys."""

_log = logging.getLogger(__name__)


def load(path: Path) -> dict[str, Session]:
    """The sessions in a file, those included that have ended; none where there is no such file, or a broken one."""
    if not path.exists():
        return {}
    try:
        found = {
            str(each["key"]): Session(identity, float(each["expires"]))
            for each in json.loads(read_secret(path))
            if (identity := _identity(str(each["certificate"]).encode(), float(each["certificate_expires"])))
        }
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        _log.error("%s is ignored, so operators have to sign in to the dashboard again: %s", path, error)
        return {}
    return found


def save(path: Path, sessions: Mapping[str, Session]) -> None:
    """Writes them. That it cannot is logged; they then end with this process."""
    document = [
        {
            "key": key,
            "certificate": session.identity.certificate.decode(),
            "certificate_expires": session.identity.expires,
            "expires": session.expires,
        }
        for key, session in sessions.items()
    ]
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, json.dumps(document).encode())
    except OSError as error:
        _log.error("sessions of the dashboard cannot be kept in %s, and end with this process: %s", path, error)


def _identity(certificate: bytes, expires: float) -> Identity | None:
    who = caller(OwnContext(certificate, "file"))
    return None if who is None or not who.is_operator else Identity(who, certificate, expires)
