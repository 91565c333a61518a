"""Links that open the dashboard."""

from __future__ import annotations

import secrets
import time

from cryptography import x509
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import operations_pb2

from control_plane.access import Context, caller
from control_plane.dashboard.sessions import CODE_LIFETIME, SESSION_LIFETIME, Identity, Sessions
from mesh_client.core.errors import ConfigError


def identity_of(context: Context) -> Identity | None:
    """The operator on the other side, to be shown to servicers again; None without identity."""
    who = caller(context)
    if who is None:
        return None
    (certificate,) = context.auth_context()["x509_pem_cert"]
    expires = x509.load_pem_x509_certificate(certificate).not_valid_after_utc.timestamp()
    return Identity(who, certificate, expires)


class DashboardLinks:
    """Makes them.

    Attributes:
        url: of the dashboard, once it listens; empty without one.
        sessions: where their codes are known.
    """

    def __init__(self) -> None:
        self.url = ""
        self.sessions = Sessions()

    def create(self, context: Context) -> operations_pb2.CreateDashboardLinkResponse:
        """A link for the operator who asks.

        Raises:
            ConfigError: there is no dashboard.
            TooManyCodesError: too many links wait to be opened.
        """
        if not self.url:
            raise ConfigError("this control plane has no dashboard; start it with --dashboard-listen 127.0.0.1:7080")
        identity = identity_of(context)
        if identity is None:
            return operations_pb2.CreateDashboardLinkResponse(url=self.url)
        code = secrets.token_urlsafe(32)
        self.sessions.issue(code, identity, time.time())
        return operations_pb2.CreateDashboardLinkResponse(
            # What stands behind the # stays in the browser: it is in no log and no Referer.
            url=f"{self.url}#login={code}",
            valid=Duration(seconds=int(CODE_LIFETIME)),
            session=Duration(seconds=int(SESSION_LIFETIME)),
        )
