"""What a broker has to know before services can use it: users, their passwords and what they may.

RabbitMQ takes it as a file of definitions: at its start (``load_definitions`` in rabbitmq.conf, which also keeps it
from making the guest account), or from ``rabbitmqctl import_definitions``.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Iterable
from typing import Any

from mesh_client.core.events.topology import EXCHANGE, permissions
from mesh_client.events.settings import Credentials

PASSWORD_BYTES = 32
SALT_BYTES = 4


def new_credentials(user: str) -> Credentials:
    """A user with a fresh random password."""
    return Credentials(user, secrets.token_urlsafe(PASSWORD_BYTES))


def definitions(users: Iterable[Credentials], vhosts: Iterable[str] = ("/",)) -> dict[str, Any]:
    """Definitions for RabbitMQ: the exchange for all events, and each user with rights to its own names alone.

    They hold salted hashes of the passwords, not the passwords.

    Args:
        users: services by their names, `CONTROL_PLANE` and `OPERATOR` of `mesh_client.core.events.topology`.
        vhosts: virtual hosts in which they have them.

    Raises:
        InvalidValueError: a user's name is not allowed.
    """
    users, vhosts = list(users), list(vhosts)
    rights = {user.user: permissions(user.user) for user in users}
    return {
        "vhosts": [{"name": vhost} for vhost in vhosts],
        "users": [
            {
                "name": user.user,
                "password_hash": password_hash(user.password),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": "",
            }
            for user in users
        ],
        "permissions": [
            {"user": user, "vhost": vhost, "configure": may.configure, "write": may.write, "read": may.read}
            for user, may in rights.items()
            for vhost in vhosts
        ],
        "topic_permissions": [
            {"user": user, "vhost": vhost, "exchange": EXCHANGE, "write": may.topic, "read": ".*"}
            for user, may in rights.items()
            for vhost in vhosts
        ],
        "exchanges": [
            {
                "name": EXCHANGE,
                "vhost": vhost,
                "type": "topic",
                "durable": True,
                "auto_delete": False,
                "internal": False,
                "arguments": {},
            }
            for vhost in vhosts
        ],
    }


def password_hash(password: str, salt: bytes | None = None) -> str:
    """As RabbitMQ keeps it: a salt of 4 bytes before the SHA-256 of salt and password, base64.

    Args:
        password: the password.
        salt: of a hash that this one is compared with; a random one by default.
    """
    salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode("ascii")


def keep_hashes(wanted: dict[str, Any], present: dict[str, Any], users: Iterable[Credentials]) -> None:
    """Puts the hashes of ``present`` that are of the users' passwords into ``wanted``.

    Hashes are salted anew each time, so without this no two definitions are equal.

    Args:
        wanted: of `definitions`.
        present: what a broker has been told, the same in form.
        users: whose passwords they are.
    """
    passwords = {user.user: user.password for user in users}
    known = {user["name"]: user["password_hash"] for user in present["users"]}
    for user in wanted["users"]:
        there = known.get(user["name"], "")
        salt = base64.b64decode(there)[:SALT_BYTES]
        if there == password_hash(passwords[user["name"]], salt):
            user["password_hash"] = there
