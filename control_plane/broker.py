"""The broker that a control plane publishes its events to. Brings in the AMQP client, which is an extra."""

from __future__ import annotations

from pathlib import Path

from mesh_client.core.errors import ConfigError
from mesh_client.events.settings import BrokerSettings, broker_settings


def broker_of(url: str, credentials: Path | None, roots: Path | None, *, insecure: bool) -> BrokerSettings:
    """The broker that options name.

    Args:
        url: AMQP URLs of its nodes, separated by commas.
        credentials: file with the user and the password; None for the one that the environment names.
        roots: PEM file of the roots that its certificate is verified by; None for the environment's, or the system's.
        insecure: whether plaintext is allowed.

    Raises:
        ConfigError: it is no AMQP URL, it is plaintext without ``insecure``, or the credentials are missing.
    """
    settings = broker_settings(url, credentials, roots, insecure=insecure)
    if settings is None:
        raise ConfigError("broker: it names none")
    return settings
