"""Whether TLS servers answer: ``python healthcheck.py HOST:PORT...`` ends with 0 when all of them do.

It begins a handshake for HTTP/2 and looks at no certificate: it has none to show, and says nothing to the server. A
service says itself, to the registry, whether it is fit for calls.
"""

from __future__ import annotations

import socket
import ssl
import sys

TIMEOUT = 3.0
"""Seconds for each server."""


def answers(address: str) -> bool:
    """Whether a TLS server that speaks HTTP/2 is at ``host:port``."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), TIMEOUT) as connection,
            context.wrap_socket(connection) as handshake,
        ):
            return handshake.selected_alpn_protocol() == "h2"
    except OSError as error:
        print(f"{address}: {error}", file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(0 if all(answers(address) for address in sys.argv[1:]) else 1)
