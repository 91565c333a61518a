"""Whether a TLS server answers: ``python healthcheck.py HOST:PORT [IDENTITY]`` ends with 0 when it does.

It shakes hands for HTTP/2 and leaves. IDENTITY is the process's own ``identity.json``: a server of the mesh takes
nobody without a certificate, and would log each time that it did not. Whose certificate the server shows is not looked
at. Whether a service is fit for calls it finds out itself, and tells the registry.

It is run often, so it imports little.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import sys

TIMEOUT = 3.0
"""Seconds."""


def answers(address: str, identity: str | None = None) -> bool:
    """Whether a TLS server that speaks HTTP/2 is at ``host:port`` and takes the identity.

    Raises:
        OSError: nobody answers, or the identity is not there.
    """
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if identity is not None:
        show(context, identity)
    with (
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT) as connection,
        context.wrap_socket(connection) as handshake,
    ):
        return handshake.selected_alpn_protocol() == "h2"


def show(context: ssl.SSLContext, identity: str) -> None:
    """Has the context show the certificate of an ``identity.json``. The key gets into memory alone."""
    with open(identity, encoding="utf-8") as file:  # noqa: PTH123  # pathlib is another import
        document = json.load(file)
    descriptor = os.memfd_create("identity")
    try:
        os.write(descriptor, (document["private_key"] + document["certificate_chain"]).encode())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    try:
        sys.exit(0 if answers(*sys.argv[1:]) else 1)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")
